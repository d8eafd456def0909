"""Chat templates: the Jinja text in a model's file, rendered in a sandbox with the names that such templates expect."""

from __future__ import annotations

import datetime
import json
from typing import Any, NoReturn

from ..errors import FormatError

__all__ = ["ChatTemplate"]


class _RefusedError(Exception):
    """A template called ``raise_exception``."""


class ChatTemplate:
    """A parsed template.

    Parameters
    ----------
    source : str
        The Jinja text.
    path : str
        The file that contains it, for errors.

    Raises
    ------
    FormatError
        It is not a Jinja template, or it is longer than 1 MiB.
    """

    def __init__(self, source: str, path: str) -> None:
        from .template_bounds import MAX_SOURCE, bounded_environment

        self._path = path
        if len(source) > MAX_SOURCE:
            raise self._error(f"has {len(source):,} characters, more than {MAX_SOURCE:,}")
        self._environment = bounded_environment()
        self._environment.add_filter("tojson", _tojson)
        self._environment.globals["raise_exception"] = _refuse
        self._environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:  # noqa: BLE001  # parsers and Python's compiler: nested too deep, `break` in no loop
            line = getattr(error, "lineno", None)
            says = str(error).partition("\n")[0] or type(error).__name__
            raise self._error(f"is not a Jinja template: {says}{f' (line {line})' if line else ''}") from None

    def render(self, **values: Any) -> str:
        """Return the text for a conversation; ``values`` are the names that the template can use.

        ``tools`` and ``documents`` are None unless given, as in transformers. A missing value adds nothing to a text, and
        a loop over it does nothing, as in llama.cpp.

        Raises
        ------
        FormatError
            The template refuses the conversation, fails, runs too long or writes too much (`template_bounds`).
        """
        from .template_bounds import Budget, TooMuchError

        self._environment.budget = Budget(len(repr(values)))
        try:
            return self._template.render({"tools": None, "documents": None} | values)
        except _RefusedError as refusal:
            raise self._error(
                f"refuses the conversation: {refusal}", hint="change the roles or the order of the messages"
            ) from None
        except TooMuchError as error:
            raise self._error(f"exceeds its limits: {error}") from None
        except Exception as error:  # noqa: BLE001  # a template is a program: whatever it does wrong is the file's fault
            raise self._error(f"fails: {type(error).__name__}: {error}") from None

    def _error(self, what: str, *, hint: str = "give the prompt without the template") -> FormatError:
        return FormatError(self._path, f"the chat template {what}", hint=hint)


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as Python does; Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
