"""ggml's backend scheduler in Python: the same decisions, explained, tested and extendable.

The names here are the public API. Ops have upstream's names without the prefix (`pyggml.ops`); `CPU` and `Sim` open
devices; `Scheduler` runs graphs over them; `Session` runs models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import ops
from .alloc import Context, alloc_tensors
from .backend import REGISTRY, Backend, Device, Event
from .buffer import Buffer, BufferType
from .dialect import DIALECTS, Dialect, Repairs
from .errors import (
    AllocError,
    BackendError,
    ComputeError,
    DeviceUnavailableError,
    ExpertIdError,
    FormatError,
    GraphError,
    OutOfMemoryError,
    PyggmlError,
    RPCError,
    SchedError,
    ShapeError,
    UnsupportedOpError,
)
from .graph import Graph, GraphView
from .ops import *  # the ops are the vocabulary of the package; ops.__all__ lists them
from .record import Observer, Recording, Statistics
from .sched.plan import Plan
from .sched.policies import CopyPolicy, FullCopier, UpstreamCopier, UsedExpertCopier
from .sched.scheduler import Scheduler
from .sched.state import Cause, Split
from .sched.transfer import Transfer
from .tensor import Tensor
from .types import BufferUsage, DeviceType, Op, TensorFlag, Type

if TYPE_CHECKING:
    from .backends.host import CPU
    from .backends.sim import Sim
    from .gguf import GGUFFile
    from .session import Session

__version__ = "0.1.0"

__all__ = [
    "CPU",
    "DIALECTS",
    "REGISTRY",
    "AllocError",
    "Backend",
    "BackendError",
    "Buffer",
    "BufferType",
    "BufferUsage",
    "Cause",
    "ComputeError",
    "Context",
    "CopyPolicy",
    "Device",
    "DeviceType",
    "DeviceUnavailableError",
    "Dialect",
    "Event",
    "ExpertIdError",
    "FormatError",
    "FullCopier",
    "GGUFFile",
    "Graph",
    "GraphError",
    "GraphView",
    "Observer",
    "Op",
    "OutOfMemoryError",
    "Plan",
    "PyggmlError",
    "RPCError",
    "Recording",
    "Repairs",
    "SchedError",
    "Scheduler",
    "Session",
    "ShapeError",
    "Sim",
    "Split",
    "Statistics",
    "Tensor",
    "TensorFlag",
    "Transfer",
    "Type",
    "UnsupportedOpError",
    "UpstreamCopier",
    "UsedExpertCopier",
    "alloc_tensors",
]
__all__ += ops.__all__

#: What needs more than the core, by module: imported when first asked for.
_LAZY = {"CPU": "backends.host", "Sim": "backends.sim", "GGUFFile": "gguf", "Session": "session"}


def __getattr__(name: str) -> Any:  # the types stand in the TYPE_CHECKING block above
    if name not in _LAZY:
        raise AttributeError(f"module 'pyggml' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
