"""The graph that collects the tensors that ops make: the one whose ``with`` block is active, if any.

Builders need no graph. During its ``with`` block a graph is the collector of all new tensors.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .tensor import Tensor

__all__ = ["Collector", "current"]


class Collector(Protocol):
    """An object that receives each new tensor."""

    def add(self, tensor: Tensor) -> None:
        """Receive a tensor that an op has just made."""


#: The collector of this thread or task; None outside every block.
current: ContextVar[Collector | None] = ContextVar("pyggml.graph_context.current", default=None)
