"""Chat templates: the Jinja text in a model's file, rendered in a sandbox with what such templates expect to find."""

from __future__ import annotations

import datetime
import json
from typing import Any, NoReturn

from ..errors import FormatError

__all__ = ["ChatTemplate"]


class _RefusedError(Exception):
    """A template called ``raise_exception``."""


class ChatTemplate:
    """A template that was parsed.

    Parameters
    ----------
    source : str
        Its Jinja text.
    path : str
        The file it came from, for errors.

    Raises
    ------
    FormatError
        It is no Jinja template, or longer than 1 MiB.
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
            raise self._error(f"is no Jinja template: {says}{f' (line {line})' if line else ''}") from None

    def render(self, **values: Any) -> str:
        """Return the text for a conversation; ``values`` are the names that the template sees.

        ``tools`` and ``documents`` are None unless given, as in transformers; to put what is missing behind a text adds
        nothing, and a loop over it has no turn, as in llama.cpp.

        Raises
        ------
        FormatError
            The template refuses the conversation, fails, or takes too long or makes too much (`template_bounds`).
        """
        from .template_bounds import Budget, TooMuchError

        self._environment.budget = Budget(len(repr(values)))
        try:
            return self._template.render({"tools": None, "documents": None} | values)
        except _RefusedError as refusal:
            raise self._error(
                f"refuses the conversation: {refusal}", hint="change roles or order of the messages"
            ) from None
        except TooMuchError as error:
            raise self._error(f"does not end within its bounds: {error}") from None
        except Exception as error:  # noqa: BLE001  # a template is a program: whatever it does wrong is the file's fault
            raise self._error(f"fails: {type(error).__name__}: {error}") from None

    def _error(self, what: str, *, hint: str = "give the prompt as it is, without the template") -> FormatError:
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
    """Write JSON as Python does; Jinja's own escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
