"""The modules of CPU kernels, each imported when it is first used, because it brings Numba with it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pyggml.kernels.cpu.loading import LOADING


def __getattr__(name: str) -> Any:  # a module; of what the kernels are made of, mypy knows nothing
    if name.startswith("_"):  # what looks through modules asks for such names
        raise AttributeError(name)
    with LOADING:
        module = globals()[name] = import_module(f"pyggml.kernels.cpu.{name}")
    return module
