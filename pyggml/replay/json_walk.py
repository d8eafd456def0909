"""`At`: reads JSON values, with errors that name the place in the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator
from typing import Any, NoReturn

from ..errors import FormatError
from ..types import SIZE_MAX

__all__ = ["At", "shown"]

#: Most bytes of a name in a case: one less than a trace can print, so that names stay distinct.
_MAX_CASE_NAME = 62
_KINDS: dict[type, str] = {str: "text", int: "a whole number", bool: "true or false", list: "a list", dict: "an object"}
_MISSING: Any = object()


class At:
    """A value of the file, and its path."""

    __slots__ = ("path", "value", "where")

    def __init__(self, path: str, where: str, value: Any) -> None:
        self.path = path
        self.where = where
        self.value = value

    def fail(self, message: str) -> NoReturn:
        """Raise a `FormatError` that names the place."""
        raise FormatError(self.path, f"{self.where or 'the file'}: {message}")

    def kind(self, kind: type) -> Any:
        """Return the value if it has the given type."""
        if type(self.value) is not kind:
            self.fail(f"{_KINDS[kind]} expected, not {shown(self.value)}")
        return self.value

    def integer(self, low: int, high: int = SIZE_MAX) -> int:
        """Return the value if it is an integer from ``low`` to ``high``."""
        value: int = self.kind(int)
        if not low <= value <= high:
            self.fail(f"{value} is out of range: {low} to {high}")
        return value

    def text(self) -> str:
        """Return the value if it is text."""
        value: str = self.kind(str)
        return value

    def boolean(self) -> bool:
        """Return the value if it is true or false."""
        value: bool = self.kind(bool)
        return value

    def name(self) -> str:
        """Return a name that a trace can print."""
        name = self.text()
        if not name.isascii() or '"' in name or "\\" in name or not 0 < len(name) <= _MAX_CASE_NAME:
            self.fail(f"{shown(name)} is no name: 1 to {_MAX_CASE_NAME} ASCII characters without quote and backslash")
        return name

    def one_of(self, names: Container[str], what: str) -> str:
        """Return a name that was defined before."""
        name = self.text()
        if name not in names:
            self.fail(f"there is no {what} '{name}' here")
        return name

    def get(self, key: str, default: Any = _MISSING) -> At:
        """Return a member of an object."""
        value = self.kind(dict).get(key, default)
        if value is _MISSING:
            self.fail(f"'{key}' is missing")
        return At(self.path, f"{self.where}.{key}" if self.where else key, value)

    def optional(self, key: str) -> At | None:
        """Return a member of an object, or None if it is absent or null."""
        return None if self.kind(dict).get(key) is None else self.get(key)

    def items(self) -> Iterator[At]:
        """Yield the members of a list."""
        for i, value in enumerate(self.kind(list)):
            yield At(self.path, f"{self.where}[{i}]", value)

    def members(self) -> Iterator[tuple[str, At]]:
        """Yield keys and members of an object."""
        for key, value in self.kind(dict).items():
            yield key, At(self.path, f"{self.where}.{key}", value)

    def list_of(self, read: Callable[[At], Any]) -> tuple[Any, ...]:
        """Return the result of ``read`` for each member of a list."""
        return tuple(read(item) for item in self.items())


def shown(value: object) -> str:
    """Return a value as an error quotes it, cut if it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
