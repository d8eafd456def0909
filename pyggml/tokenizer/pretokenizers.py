"""How a byte-pair vocabulary cuts text into words before it merges, by the name in ``tokenizer.ggml.pre``.

A file names its rule and does not hold it, so that every reader needs this table. The patterns are those of llama.cpp,
which stand for case-insensitive groups and letter cases where its own engine has none.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PRETOKENIZERS", "Pretokenizer"]


@dataclass(frozen=True, slots=True)
class Pretokenizer:
    """One rule: patterns applied one after the other to the pieces that the one before left."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  #: a word that is a token is taken whole
    add_bos: bool = False  #: unless the file says otherwise


_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_TAIL = r"\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _TAIL
_NEWLINES = r"\s*[\r\n]+|" + _TAIL


def _words(digits: str, *, letters: str = r"\p{L}", contractions: str = _CONTRACTIONS + "|") -> str:
    """Make the pattern that most models since 2023 share."""
    others = letters + r"\p{N}"
    return contractions + rf"[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{digits}| ?[^\s{others}]+[\r\n]*|" + _NEWLINES


# a letter that is no small ASCII letter, and one that is no capital
_BIG, _SMALL = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"


def _cased(digits: str, *, contractions: str = "") -> str:
    """Make the pattern that also cuts before a capital."""
    word = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{word}{_BIG}*{_SMALL}+{contractions}|{word}{_BIG}+{_SMALL}*{contractions}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _NEWLINES
    )


_LLAMA3 = _words(r"\p{N}{1,3}")
_QWEN2 = _words(r"\p{N}")

_DEFAULT = Pretokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
_BY_RULE = {
    ("default",): _DEFAULT,
    (
        "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum", "modern-bert",
        "jina-v1-en", "jina-v2-code", "roberta-bpe", "exaone4", "mpt", "olmo", "jais", "trillion", "granite-docling",
    ): Pretokenizer((_GPT2,)),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"):
        Pretokenizer((r"\p{N}", _GPT2)),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"):
        Pretokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    ("dbrx", "smaug-bpe"): Pretokenizer((_LLAMA3,)),
    ("glm4", "glm5"): Pretokenizer((_LLAMA3,), ignore_merges=True),
    (
        "qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2",
    ): Pretokenizer((_QWEN2,)),
    ("qwen35",): Pretokenizer((_words(r"\p{N}", letters=r"\p{L}\p{M}"),)),
    ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"):
        Pretokenizer((_cased(r"\p{N}{1,3}", contractions=_CONTRACTIONS + "?"),)),
    ("tekken",): Pretokenizer((_cased(r"\p{N}"),), ignore_merges=True, add_bos=True),
    ("falcon",): Pretokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
}  # fmt: skip

#: Rules by every name that means them.
PRETOKENIZERS = {name: rule for names, rule in _BY_RULE.items() for name in names}
