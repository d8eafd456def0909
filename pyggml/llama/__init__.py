"""llama.cpp in a child process: the graphs that it builds, and models that it runs on devices of pyggml.

pyggml builds the graphs of some families itself. Every other family that llama.cpp knows is *captured*: a child process
loads the real llama.cpp, opens the model's header without data, and gives it a device that is written in Python. The
device sees every graph whole. `CapturedSource` turns what the child reports into the graphs that a `Planner` splits.

===============  ===========================================================================================
`source`         from captured graphs to a `GraphSource`
`model`          `LlamaModel`: a model that llama.cpp runs
`store`          what was captured, kept in files; `process` starts the child that answers what is not kept
`child`          the child: reads requests, answers them with `capture` or `engine`
`capture`        one model and one context in llama.cpp, and the graphs that they make
`engine`         one model and one context in llama.cpp that compute
`device`         a device in Python: `capturing` sees graphs, `computing` runs them on a device of pyggml
`ledger`         statistics, records and virtual time of what the devices see
`tensors`        ggml's tensors and graphs as pyggml's; `params`: flags as llama.cpp's structs
`library`        the functions of llama.cpp; `slots`: where this build keeps its interfaces
===============  ===========================================================================================

Only what `child` imports touches llama.cpp, and it runs in the child: an assertion that fails there costs the child its life,
and the parent gets a `ModelError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import LlamaModel

__all__ = ["LlamaModel"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is: planners need no models."""
    if name == "LlamaModel":
        from .model import LlamaModel

        return LlamaModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
