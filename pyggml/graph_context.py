"""Who collects the tensors that ops make: the graph whose ``with`` block is running, if any.

Builders need no graph; a graph that wants to see what they make sets itself here for the length of its block.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .tensor import Tensor

__all__ = ["Collector", "current"]


class Collector(Protocol):
    """Something that is told of each new tensor."""

    def add(self, tensor: Tensor) -> None:
        """Take note of a tensor that an op has just made."""


#: The collector of this thread or task; None outside every block.
current: ContextVar[Collector | None] = ContextVar("pyggml.graph_context.current", default=None)
