"""Decode over [sim, cpu] while every host buffer is unreadable whenever the device computes.

Run in a process of its own: a kernel that reads host memory ends it. Prints the largest difference from the CPU alone.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np

import pyggml as ggml
from pyggml.backends._machine import HostBuffer
from pyggml.backends.sim import SimBackend, SimBuffer
from pyggml.graph import GraphView
from pyggml.session import PlacementFlags, Session

TOKENS = list(range(3, 43))
PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)


def protect(buffer: HostBuffer, protection: int) -> None:
    """Set the protection of the whole pages of a buffer."""
    start = -(-buffer.base // PAGE) * PAGE
    end = (buffer.base + buffer.size) // PAGE * PAGE
    if end > start and libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(end - start), protection):
        raise OSError(ctypes.get_errno(), "mprotect")


def host_buffers(session: Session) -> list[HostBuffer]:
    """Return every host buffer that a tensor of the allocated graph lies in."""
    graph = session.sched.graph_copy
    tensors = [t for n in (*graph.nodes, *graph.leafs) for t in (n, *n.src) if t is not None]
    found = {id(b): b for t in tensors if isinstance(b := t.storage, HostBuffer)}
    return list(found.values())


def main(path: str) -> None:
    """Decode twice and compare."""
    with Session.open(path, cpu=ggml.CPU(2)) as alone:
        expected = alone.decode(TOKENS, outputs="all")
    gpu = ggml.Sim()
    with Session.open(path, devices=[gpu], cpu=ggml.CPU(2), placement=PlacementFlags(cpu_moe=True)) as session:
        compute = SimBackend.graph_compute
        n_guarded = 0

        def guarded(self: SimBackend, graph: GraphView) -> None:
            nonlocal n_guarded
            buffers = host_buffers(session)
            for b in buffers:
                protect(b, mmap.PROT_NONE if hasattr(mmap, "PROT_NONE") else 0)
            try:
                compute(self, graph)
                self.synchronize()
            finally:
                for b in buffers:
                    protect(b, mmap.PROT_READ | (mmap.PROT_WRITE if b.is_writable else 0))
            n_guarded += len(buffers)

        SimBackend.graph_compute = guarded
        got = session.decode(TOKENS, outputs="all")
        assert n_guarded > 0
        assert any(isinstance(t.storage, SimBuffer) for t in session.sched.graph_copy.nodes)
    print(f"{np.abs(got - expected).max():g}")


if __name__ == "__main__":
    main(sys.argv[1])
