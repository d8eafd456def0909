"""`Stats`: counts of one launch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt


@dataclass
class Stats:
    """Counts over one launch. Counts by warp: one for each warp with at least one active lane.

    Attributes
    ----------
    by_opcode : Counter
        Warp instructions by kind.
    global_load_requests, global_load_sectors, global_load_bytes : int
        Load instructions by warp, the 32-byte sectors that they touch, the bytes that the lanes asked for.
    global_load_unique : int
        Different sectors read: what an endless cache would read from DRAM.
    shared_load_wavefronts, shared_store_wavefronts : int
        More of them than requests means bank conflicts.
    local_accesses : int
        Stack traffic; 0 is wanted.
    barriers : int
        Barriers passed, counted by block.
    """

    blocks: int = 0
    threads: int = 0
    warp_instructions: int = 0
    thread_instructions: int = 0
    by_opcode: Counter[str] = field(default_factory=Counter)
    global_load_requests: int = 0
    global_load_sectors: int = 0
    global_load_bytes: int = 0
    global_load_unique: int = 0
    global_store_requests: int = 0
    global_store_sectors: int = 0
    global_store_bytes: int = 0
    shared_load_requests: int = 0
    shared_load_wavefronts: int = 0
    shared_store_requests: int = 0
    shared_store_wavefronts: int = 0
    local_accesses: int = 0
    atomics: int = 0
    barriers: int = 0
    seconds: float = 0.0
    #: while running: buffer address -> sectors read
    touched: dict[int, npt.NDArray[Any]] = field(default_factory=dict, repr=False)

    @property
    def simt_efficiency(self) -> float:
        """Active lanes of an average warp instruction, as a part of 32."""
        return self.thread_instructions / max(1, 32 * self.warp_instructions)

    def __str__(self) -> str:
        d = {k: v for k, v in vars(self).items() if k not in ("by_opcode", "touched")}
        d["simt_efficiency"] = round(self.simt_efficiency, 4)
        top = ", ".join(f"{k} {v}" for k, v in self.by_opcode.most_common(12))
        rows = [f"{k:24} {v:.3f}" if isinstance(v, float) else f"{k:24} {v}" for k, v in d.items()]
        return "\n".join([*rows, f"{'by_opcode':24} {top}"])
