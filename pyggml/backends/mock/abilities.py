"""The configuration of mock devices and their memory, and the log of their calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ...backend import op_batch_size
from ...tensor import Tensor
from ...types import MAX_NAME, SIZE_MAX, DeviceType, Op, Type

__all__ = [
    "BackendAbilities",
    "BufferTypeAbilities",
    "Capabilities",
    "FailCompute",
    "Note",
    "OffloadWish",
    "OpSupport",
    "Optimize",
    "ignore",
    "short_name",
]

#: Takes one call, in the form of a trace: its name, then its facts.
Note = Callable[[list[object]], None]


def ignore(call: list[object]) -> None:
    """Note nothing."""


def short_name(tensor: Tensor) -> str:
    """Return a name as traces print it, cut to the length of upstream's array."""
    return tensor.name[:MAX_NAME]


@dataclass(frozen=True, slots=True)
class BufferTypeAbilities:
    """What a mock buffer type is and can do."""

    name: str
    is_host: bool = False
    alignment: int = 64  #: bytes
    max_size: int = SIZE_MAX  #: bytes of one buffer
    quant_row: int = 0  #: rows of quantised types are padded to a multiple of this many elements
    extra_bytes: int = 0  #: added to every tensor
    round_to_bytes: int = 1  #: sizes are rounded up to a multiple of it
    cpy_from: frozenset[str] | None = None  #: buffer types that its buffers copy from; None: no `cpy_tensor`
    alloc_limit: int = 0  #: bytes above which an allocation fails; 0: never


@dataclass(frozen=True, slots=True)
class OpSupport:
    """Which ops a mock device runs; view ops always, unless denied."""

    allow: frozenset[Op] | None = None  #: only these; None: all
    deny: frozenset[Op] = frozenset()  #: not these, if all are allowed
    min_batch: Mapping[Op, int] = field(default_factory=dict)
    deny_src0_types: frozenset[Type] = frozenset()

    def __call__(self, op: Tensor) -> bool:
        """Whether an op can be run."""
        kind = op.op
        if kind in self.deny if self.allow is None else kind not in self.allow and not kind.is_empty:
            return False
        if self.min_batch and op_batch_size(op) < self.min_batch.get(kind, 0):
            return False
        if self.deny_src0_types and op.src and not kind.is_empty:
            src0 = op.src[0]
            return src0 is None or src0.type not in self.deny_src0_types
        return True


@dataclass(frozen=True, slots=True)
class OffloadWish:
    """The ops with host weights that a mock device offloads."""

    min_batch: int
    ops: frozenset[Op] | None = None  #: None: all

    def __call__(self, op: Tensor) -> bool:
        """Whether the op is wanted."""
        return (self.ops is None or op.op in self.ops) and op_batch_size(op) >= self.min_batch


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Optional calls that a mock backend has; without one, the default of `Backend` does."""

    synchronize: bool = True
    set_async: bool = False
    get_async: bool = False
    events: bool = False
    cpy_async_from: frozenset[str] | None = None  #: buffer types that it copies from; None: no `cpy_tensor_async`


@dataclass(frozen=True, slots=True)
class FailCompute:
    """Computing a graph that holds a node of this name fails."""

    node: str
    status: int = -1
    times: int | None = None  #: only the first ``times`` calls; None: all


@dataclass(frozen=True, slots=True)
class Optimize:
    """What `graph_optimize` does: order nodes, and keep tensors allocated until another."""

    order: tuple[str, ...] = ()
    keep: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class BackendAbilities:
    """What a mock device and its backend are and can do."""

    name: str
    type: DeviceType
    buft: str
    bufts: frozenset[str]
    ops: OpSupport = OpSupport()
    offload: OffloadWish | None = None
    caps: Capabilities = Capabilities()
    fail_compute: FailCompute | None = None
    optimize: Optimize | None = None
