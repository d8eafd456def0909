"""llama.cpp in a child process: captures its graphs, and runs its models on pyggml's devices.

pyggml builds the graphs of some families itself. Graphs of other families are *captured*: a child process loads
llama.cpp, opens the model's header without data, and gives it a device written in Python, which receives every graph
whole. `CapturedSource` turns the child's answers into graphs that a `Planner` splits.

===============  ===========================================================================================
`source`         from captured graphs to a `GraphSource`
`model`          `LlamaModel`: a model that llama.cpp runs
`store`          keeps captured graphs in files; `process` starts the child for those that are not kept
`child`          the child: reads requests, answers them with `capture` or `engine`
`capture`        one model and one context in llama.cpp, and the graphs that they make
`engine`         one model and one context in llama.cpp that compute
`device`         a device in Python: `capturing` sees graphs, `computing` runs them on a device of pyggml
`host_memory`    llama.cpp's buffers in host memory
`known`          calls that repeat, answered in compiled code
`ledger`         statistics, records and virtual time of what the devices see
`tensors`        ggml's tensors and graphs as pyggml's; `params`: flags as llama.cpp's structs
`library`        the functions of llama.cpp; `slots`: where this build keeps its interfaces
===============  ===========================================================================================

Only modules that `child` imports call llama.cpp. If an assertion fails there, and the parent raises a `ModelError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import LlamaModel

__all__ = ["LlamaModel"]


def __getattr__(name: str) -> Any:
    """Import names on first use, because planners do not need models."""
    if name == "LlamaModel":
        from .model import LlamaModel

        return LlamaModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
