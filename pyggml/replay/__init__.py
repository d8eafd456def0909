"""Replay: runs recorded scheduler cases in `Scheduler` on mock backends, and writes the traces of what it does."""

from .case import BufferSpec, Case, GraphSpec, Step, TensorSpec
from .reading import CASE_FORMAT, parse_case, read_case
from .run import TRACE_FORMAT, Replay, replay, replay_file, write_trace

__all__ = [
    "CASE_FORMAT",
    "TRACE_FORMAT",
    "BufferSpec",
    "Case",
    "GraphSpec",
    "Replay",
    "Step",
    "TensorSpec",
    "parse_case",
    "read_case",
    "replay",
    "replay_file",
    "write_trace",
]
