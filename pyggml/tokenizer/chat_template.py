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
        It is no Jinja template.
    """

    def __init__(self, source: str, path: str) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._path = path
        # a file from anywhere is untrusted: no attribute of Python's leaks, nothing handed in can be changed
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            raise self._error(f"is no Jinja template: {error}{f' (line {line})' if line else ''}") from None

    def render(self, **values: Any) -> str:
        """Return the text for a conversation; ``values`` are the names that the template sees.

        Raises
        ------
        FormatError
            The template refuses the conversation, or fails.
        """
        try:
            return self._template.render(**values)
        except _RefusedError as refusal:
            raise self._error(
                f"refuses the conversation: {refusal}", hint="change roles or order of the messages"
            ) from None
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
