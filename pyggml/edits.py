"""`EDITS`: a number that changes whenever user code changes a tensor, so that changes are found without comparing all nodes.

It counts sources replaced in place, parameters, flags of inputs and outputs, and memory that a context allocates or
frees. It does not count what builders and passes do to tensors that they make.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

__all__ = ["EDITS", "Edits", "Sources"]


class Edits:
    """The number of the latest change in this process; unequal numbers mean that something changed in between."""

    __slots__ = ("_numbers", "latest")

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self.latest = 0

    def note(self) -> None:
        """Count a change."""
        self.latest = next(self._numbers)


EDITS = Edits()


def _counted(name: str) -> Callable[..., Any]:
    change = getattr(list, name)

    def method(self: Sources, *arguments: Any, **options: Any) -> Any:
        EDITS.note()
        return change(self, *arguments, **options)

    method.__name__ = name
    method.__doc__ = f"As `list.{name}`, counted."
    return method


class Sources(list[Any]):
    """A node's sources: a list whose changes in place are counted."""

    __slots__ = ()


for _name in ("__delitem__", "__iadd__", "__imul__", "__setitem__", "append", "clear", "extend", "insert", "pop", "remove",
              "reverse", "sort"):  # fmt: skip
    setattr(Sources, _name, _counted(_name))
