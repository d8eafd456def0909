"""ggml's backend scheduler in Python: the same decisions, with reasons, and with policies that you can replace.

The names in ``__all__`` are the public API. Ops have upstream's names without the prefix, here and in `pyggml.ops`. Errors
are in `pyggml.errors`; all are `PyggmlError`. `CPU` and `Sim` open devices, `Scheduler` runs graphs on them, `Planner` plans
models, `Session` runs them, and `plan` recommends llama.cpp's flags.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import errors, ops
from .alloc import Context
from .backend import Backend, Device, Event
from .buffer import Buffer, BufferType
from .clock import VirtualClock
from .dialect import DIALECTS, Dialect, Repairs
from .errors import PyggmlError
from .graph import Graph, GraphView
from .ops import *  # pyggml.mul_mat is an op; `import *` gives the namespace alone, so that no built-in name is hidden
from .record import (
    ComputeRecord,
    CopyRecord,
    EventRecord,
    Observer,
    ReadRecord,
    Recording,
    SplitRecord,
    Statistics,
    UsedExpertsRecord,
    WaitRecord,
)
from .sched.plan import Plan
from .sched.policies import CopyPolicy, FullCopier, UsedExpertCopier
from .sched.scheduler import Scheduler
from .sched.state import Cause, Split
from .sched.transfer import Transfer
from .tensor import Tensor
from .types import BufferUsage, DeviceType, Op, TensorFlag, Type

if TYPE_CHECKING:
    from .advisor import plan
    from .backends.host import CPU
    from .backends.sim import Sim
    from .gguf import GGUFFile
    from .planning import Planner
    from .session import Session

__version__ = "0.1.0"

__all__ = [
    "CPU",
    "DIALECTS",
    "Backend",
    "Buffer",
    "BufferType",
    "BufferUsage",
    "Cause",
    "ComputeRecord",
    "Context",
    "CopyPolicy",
    "CopyRecord",
    "Device",
    "DeviceType",
    "Dialect",
    "Event",
    "EventRecord",
    "FullCopier",
    "GGUFFile",
    "Graph",
    "GraphView",
    "Observer",
    "Op",
    "Plan",
    "Planner",
    "PyggmlError",
    "ReadRecord",
    "Recording",
    "Repairs",
    "Scheduler",
    "Session",
    "Sim",
    "Split",
    "SplitRecord",
    "Statistics",
    "Tensor",
    "TensorFlag",
    "Transfer",
    "Type",
    "UsedExpertCopier",
    "UsedExpertsRecord",
    "VirtualClock",
    "WaitRecord",
    "errors",
    "ops",
    "plan",
]

#: What needs more than the core, by module: imported when first asked for.
_LAZY = {
    "CPU": "backends.host",
    "Sim": "backends.sim",
    "GGUFFile": "gguf",
    "Planner": "planning",
    "Session": "session",
    "plan": "advisor",
}


def __getattr__(name: str) -> Any:  # the types stand in the TYPE_CHECKING block above
    if name not in _LAZY:
        raise AttributeError(f"module 'pyggml' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
