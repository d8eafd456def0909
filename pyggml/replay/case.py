"""A scheduler case as plain values: backends, tensors, graphs and steps of a replay."""

from __future__ import annotations

from dataclasses import dataclass

from ..backends.mock import BackendAbilities, BufferTypeAbilities
from ..types import BufferUsage, Op, Type

__all__ = ["BufferSpec", "Case", "GraphSpec", "Step", "TensorSpec"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to make; sources and view source by name."""

    id: str
    type: Type
    ne: tuple[int, ...]
    nb: tuple[int, ...] | None
    op: Op
    src: tuple[str | None, ...]
    view: tuple[str, int] | None  #: root, offset in bytes
    flags: int
    op_params: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BufferSpec:
    """A buffer that exists for the whole case, and its tensors."""

    id: str
    buft: str
    usage: BufferUsage
    tensors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """A graph to build: its tensors, and those to expand."""

    tensors: tuple[TensorSpec, ...]
    expand: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One call on the scheduler; the fields that its ``op`` does not use are empty."""

    op: str
    graph: str | None = None
    tensor: str = ""
    backend: int = 0
    is_async: bool = False
    data: bytes = b""
    offset: int = 0
    need: frozenset[str] | None = None
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """A case."""

    name: str
    bufts: tuple[BufferTypeAbilities, ...]
    backends: tuple[BackendAbilities, ...]
    tensors: tuple[TensorSpec, ...]
    buffers: tuple[BufferSpec, ...]
    graphs: dict[str, GraphSpec]
    graph_size: int
    parallel: bool
    op_offload: bool
    sched_bufts: tuple[str, ...] | None
    steps: tuple[Step, ...]
