"""`live_fit`: what llama.cpp's own ``--fit`` chooses, asked in a child; `pyggml.fit` has the same rule for where there is no llama.cpp."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from ..backend import Device
from ..fit import MARGIN_BYTES, N_CTX_MIN, Fit
from ..gguf import GGUFFile
from ..models.context import ContextFlags
from ..models.placement import PlacementFlags
from .library import find_llama
from .process import LlamaProcess
from .source import about_context, about_placement
from .store import Captures

__all__ = ["live_fit"]


def live_fit(file: GGUFFile, devices: Sequence[Device], context: ContextFlags) -> tuple[Fit, str]:
    """Return the flags that `common_fit_params` chooses where the user gave none that places weights, and llama.cpp's version.

    Parameters
    ----------
    file : GGUFFile
        The model; its header is enough.
    devices : sequence of Device
        The cards, without the CPU. llama.cpp sees all of their memory as free.
    context
        The flags of the context; a size of 0 lets ``--fit`` choose it.

    Raises
    ------
    DeviceUnavailableError
        llama.cpp is not installed, or does not export the function.
    ModelError
        llama.cpp refuses the model.
    """
    placement = PlacementFlags(fit=True)
    about = {"placement": about_placement(placement, devices, []), "context": about_context(context)}
    for device in about["placement"]["devices"]:
        device["free"] = device["total"]  # a planner in another thread may hold some of it now
    with LlamaProcess(find_llama()) as process:  # its own, so that graphs can be captured meanwhile
        answer = Captures(process, file.paths, about).ask("fit", margin=MARGIN_BYTES, n_ctx_min=N_CTX_MIN)
    # its last pattern is that of the layer behind the last one, which has no weights
    overrides = [
        (pattern, where) for pattern, where in answer["overrides"] if any(re.search(pattern, n) for n in file.tensors)
    ]
    flags = replace(
        placement, fit=False, n_gpu_layers=answer["n_gpu_layers"], tensor_split=tuple(answer["tensor_split"]) if len(devices) > 1 else (),
        overrides=tuple(f"{pattern}={where}" for pattern, where in overrides),
    )  # fmt: skip
    note = "" if answer["fits"] else "it finds no flags that are projected to fit"
    return Fit(flags, replace(context, n_ctx=answer["n_ctx"]), note, answer["n_tried"]), answer["build"]
