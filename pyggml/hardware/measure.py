"""Finds this host's cores and memory, and measures how fast all cores read."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .apple import found_mac
from .hosts import Host, find_cpu

__all__ = ["UNKNOWN", "found_host", "measure_host"]

_GIB = 2**30
#: The description of a host of which the system tells nothing.
UNKNOWN = "this machine"


def found_host() -> Host | None:
    """Return this host as the system describes it, without a memory rate; None if the system has no description.

    Notes
    -----
    On Linux: reads ``/proc`` and the CPUs that this process may use. On macOS: see `found_mac`.
    """
    if (mac := found_mac()) is not None:
        return mac.host
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        memory = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    lines = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    name, flags = fields.get("model name", ""), set(fields.get("flags", fields.get("Features", "")).split())
    siblings, cores = int(fields.get("siblings", 1)), int(fields.get("cpu cores", 1))
    n_cores = max(1, len(os.sched_getaffinity(0)) * cores // max(siblings, 1))
    isa = next(
        (isa for flag, isa in (("amx_int8", "amx"), ("avx512_vnni", "avx512"), ("avx512f", "avx512"), ("avx_vnni", "vnni"),
                               ("avx2", "avx2"), ("asimd", "neon")) if flag in flags),
        find_cpu(name)[1] or "avx2",
    )  # fmt: skip
    kib = int(next(line.split()[1] for line in memory.splitlines() if line.startswith("MemTotal")))
    return Host(0.0, n_cores, isa, kib * 1024, name or "a processor without a name")


def measure_host(*, n_bytes: int = _GIB // 2, n_times: int = 5) -> Host:
    """Return this host with its read rate, measured: the best of several passes over arrays.

    Parameters
    ----------
    n_bytes : int
        Bytes of all arrays together; must be much more than the caches hold.

    Raises
    ------
    ValueError
        ``n_bytes`` is too small for arrays with elements.

    Notes
    -----
    Each thread sums its own array with numpy, which releases the interpreter lock.
    """
    host = found_host() or Host(0.0, os.cpu_count() or 1, "avx2", 0, UNKNOWN)
    n = n_bytes // 8 // host.n_cores
    if n < 1:
        raise ValueError(f"{n_bytes} bytes are too few for {host.n_cores} threads")
    arrays = [np.ones(n) for _ in range(host.n_cores)]
    best = 0.0
    with ThreadPoolExecutor(host.n_cores) as pool:
        for _ in range(n_times):
            start = time.perf_counter()
            list(pool.map(np.sum, arrays))
            best = max(best, 8 * n * host.n_cores / (time.perf_counter() - start))
    return Host(best, host.n_cores, host.isa, host.memory_bytes, host.description)
