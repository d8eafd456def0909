"""Recommends llama.cpp's flags for a model on a machine: settings ranked by predicted time, with memory from the scheduler."""

from .advice import plan
from .answer import Advice, Recommendation
from .calibrate import BenchRun, Calibration, Comparison, calibrate, compare_runs, read_bench
from .explain import Choice, Explanation, flag_name
from .limits import Help
from .memory import DeviceMemory, MemoryModel
from .search import Goal, Search
from .settings import EXPLAIN, Space, flags_of

__all__ = [
    "EXPLAIN",
    "Advice",
    "BenchRun",
    "Calibration",
    "Choice",
    "Comparison",
    "DeviceMemory",
    "Explanation",
    "Goal",
    "Help",
    "MemoryModel",
    "Recommendation",
    "Search",
    "Space",
    "calibrate",
    "compare_runs",
    "flag_name",
    "flags_of",
    "plan",
    "read_bench",
]
