"""Recommends llama.cpp's flags for a model on a machine: settings ranked by predicted time, with memory from the scheduler."""

from .advice import Advice, Help, Recommendation, plan
from .calibrate import BenchRun, Calibration, Comparison, calibrate, compare_runs, read_bench
from .memory import DeviceMemory, MemoryModel
from .search import Goal, Search
from .settings import EXPLAIN, Space, flags_of

__all__ = [
    "EXPLAIN",
    "Advice",
    "BenchRun",
    "Calibration",
    "Comparison",
    "DeviceMemory",
    "Goal",
    "Help",
    "MemoryModel",
    "Recommendation",
    "Search",
    "Space",
    "calibrate",
    "compare_runs",
    "flags_of",
    "plan",
    "read_bench",
]
