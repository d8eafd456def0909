r"""Patterns of ``-ot``: translates the ECMAScript of `std::regex`, which llama.cpp uses, to Python's syntax.

A form that cannot be translated raises an error that names it, instead of matching differently.
"""

from __future__ import annotations

import re
import warnings

from ..errors import GraphError

__all__ = ["compile_pattern"]

#: Letters with a meaning after a backslash; in ECMAScript any other character stands for itself.
_CLASSES = "dDsSwWbB"
_CONTROLS = {"f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "0": "\0"}
#: POSIX classes that `std::regex` knows inside of brackets, as Python spells them in ASCII.
_POSIX = {
    "alnum": "a-zA-Z0-9", "alpha": "a-zA-Z", "blank": r" \t", "cntrl": r"\x00-\x1f\x7f", "d": "0-9", "digit": "0-9",
    "graph": r"\x21-\x7e", "lower": "a-z", "print": r"\x20-\x7e", "punct": r"!-/:-@\[-`{-~", "s": r" \t-\r",
    "space": r" \t-\r", "upper": "A-Z", "w": r"a-zA-Z0-9_", "xdigit": "0-9a-fA-F",
}  # fmt: skip
_QUANTIFIER = re.compile(r"\{\d+(,\d*)?\}")


def compile_pattern(pattern: str) -> re.Pattern[str]:
    r"""Return a Python pattern that finds what ``std::regex_search`` finds with ``pattern``.

    Raises
    ------
    GraphError
        The pattern is not a regular expression of ECMAScript, or has a form that is not translated; the text names it.

    Examples
    --------
    >>> bool(compile_pattern(r"blk\.[[:digit:]]+\.ffn_.*_exps").search("blk.12.ffn_up_exps.weight"))
    True
    """
    translated = _Translator(pattern).translate()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of sets such as [a||b], which mean the same in both
            return re.compile(translated, re.ASCII)
    except (re.error, OverflowError, RecursionError) as error:
        raise _refusal(pattern, str(error) or type(error).__name__) from None


def _refusal(pattern: str, what: str) -> GraphError:
    return GraphError(
        f"-ot: '{pattern}' is not a regular expression that llama.cpp takes: {what}",
        hint="escape dots and brackets with \\",
    )


class _Translator:
    def __init__(self, pattern: str) -> None:
        self.pattern, self.at = pattern, 0
        self.out: list[str] = []

    def refuse(self, what: str) -> GraphError:
        return _refusal(self.pattern, f"{what} at character {self.at + 1}")

    def translate(self) -> str:
        while self.at < len(self.pattern):
            char = self.pattern[self.at]
            if char == "\\":
                self.out.append(self._escape(in_set=False))
            elif char == "[":
                self.out.append(self._set())
            elif char == "(":
                self.out.append(self._open())
            elif char in "*+?{":
                self.out.append(self._quantifier())
            elif char == "}":
                raise self.refuse("a '}' without '{'")
            else:
                self.out.append({"$": r"\Z", "#": r"\#"}.get(char, char))
                self.at += 1
        return "".join(self.out)

    def _open(self) -> str:
        text = self.pattern[self.at : self.at + 3]
        if not text.startswith("(?"):
            self.at += 1
            return "("
        if text not in ("(?:", "(?=", "(?!"):
            names = {"(?<": "lookbehind or a named group", "(?P": "Python's named groups", "(?#": "a comment"}
            raise self.refuse(f"'{text}' ({names.get(text, 'inline flags and the like')}), which ECMAScript lacks,")
        self.at += 3
        return text

    def _quantifier(self) -> str:
        """Return a quantifier, lazy or not; raise for one that Python would read as possessive."""
        found = _QUANTIFIER.match(self.pattern, self.at)
        if self.pattern[self.at] == "{" and found is None:
            raise self.refuse("'{' that begins no count such as {2} or {1,} (ECMAScript wants it escaped)")
        text = found.group() if found else self.pattern[self.at]
        self.at += len(text)
        lazy = "?" if self.pattern[self.at : self.at + 1] == "?" else ""
        self.at += len(lazy)
        if self.pattern[self.at : self.at + 1] in tuple("*+?{"):
            raise self.refuse(f"a quantifier after '{text}{lazy}'")
        return text + lazy

    def _escape(self, *, in_set: bool) -> str:
        """Return an escape, or the letter alone if the escape has no meaning in ECMAScript."""
        start = self.at
        char = self.pattern[start + 1 : start + 2]
        self.at += 2
        if not char:
            raise self.refuse("a backslash at the end")
        if char in _CLASSES and not (in_set and char in "bB"):
            return f"\\{char}"
        if char == "b":
            return r"\x08"
        if char in "xu":
            digits = self.pattern[self.at : self.at + (2 if char == "x" else 4)]
            if not re.fullmatch("[0-9a-fA-F]{2}|[0-9a-fA-F]{4}", digits) or len(digits) != (2 if char == "x" else 4):
                raise self.refuse(f"'\\{char}' without its hexadecimal digits")
            self.at += len(digits)
            return f"\\{char}{digits}"
        if char == "c" or (in_set and char.isdigit() and char != "0"):
            raise self.refuse(f"'\\{char}'")
        if char.isdigit() and char != "0":
            # digits that follow belong to the number in both; the bracket ends the number
            number = re.match(r"\d+", self.pattern[start + 1 :])
            assert number is not None
            self.at = start + 1 + number.end()
            return f"(?:\\{number.group()})"
        return re.escape(_CONTROLS.get(char, char))

    def _set(self) -> str:
        """Return a bracket expression."""
        self.at += 1
        out = "["
        if self.pattern[self.at : self.at + 1] == "^":
            self.at += 1
            out += "^"
        if self.pattern[self.at : self.at + 1] == "]":
            raise self.refuse("an empty '[]' or '[^]'")
        while self.at < len(self.pattern):
            char, pair = self.pattern[self.at], self.pattern[self.at : self.at + 2]
            if char == "]":
                self.at += 1
                return out + "]"
            if pair == "[:":
                end = self.pattern.find(":]", self.at)
                name = self.pattern[self.at + 2 : end] if end >= 0 else ""
                if name not in _POSIX:
                    raise self.refuse(f"the class '[:{name}:]'")
                out, self.at = out + _POSIX[name], end + 2
            elif pair in ("[.", "[="):
                raise self.refuse(f"'{pair}'")
            elif char == "\\":
                out += self._escape(in_set=True)
            else:
                out += "\\[" if char == "[" else char
                self.at += 1
        raise self.refuse("a '[' without ']'")
