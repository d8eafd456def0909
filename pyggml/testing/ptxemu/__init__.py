"""Runs PTX on the CPU with numpy, counts its instructions and accesses, and finds errors.

It runs the PTX that numba-cuda makes for a card: address arithmetic, unrolling, inline PTX, divergence, barriers,
shuffles, atomics. Read in this order: `parser` (text to instructions), `emitter` and `codegen` (a Python function for
each basic block), `engine` (which block runs next), then the memories and `warp`; `bridge` compiles without a driver.

Limits: fused multiply-adds are computed in double (one extra rounding, about 1 case in 2**29); approximate functions
are exact; ``.ftz`` is ignored; one schedule is run, and the race check finds conflicts between warps, not lanes;
cp.async happens at once; calls, textures, clusters and named barriers are not supported; there is no model of time.
Bank conflicts of 8- and 16-byte accesses are upper bounds.
"""

from .engine import KernelRunner, Program
from .memory import (
    BarrierError,
    Buffer,
    Memory,
    Misaligned,
    OutOfBounds,
    PtxError,
    Race,
    Uninitialised,
    Unsupported,
)
from .parser import parse
from .stats import Stats

__all__ = [
    "BarrierError",
    "Buffer",
    "KernelRunner",
    "Memory",
    "Misaligned",
    "OutOfBounds",
    "Program",
    "PtxError",
    "Race",
    "Stats",
    "Uninitialised",
    "Unsupported",
    "parse",
]
