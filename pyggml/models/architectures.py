"""`ARCHITECTURES`: the families that pyggml builds, by their names in files."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping

from ..errors import FormatError
from ..gguf import GGUFFile, TensorInfo
from . import families
from .architecture import Architecture
from .graph import GraphParams, ModelGraph
from .hparams import HParams, KeyReader
from .weights import Weights, WeightSpec

__all__ = ["ARCHITECTURES", "build_graph", "read_hparams", "weight_specs"]


def _gathered() -> dict[str, Architecture]:
    """Return the architecture of each module in `families`, under each of its names."""
    out: dict[str, Architecture] = {}
    for module in pkgutil.iter_modules(families.__path__):
        arch: Architecture = importlib.import_module(f"{families.__name__}.{module.name}").ARCHITECTURE
        for name in (*arch.names, *arch.moe_names):
            assert name not in out, f"two families are called {name}"
            out[name] = arch
    return out


ARCHITECTURES: Mapping[str, Architecture] = _gathered()


def read_hparams(file: GGUFFile) -> HParams:
    """Return the hyper-parameters of a file.

    Raises
    ------
    FormatError
        The architecture is not supported, or a key is missing, has another type, or is out of range.
    """
    name = file.require("general.architecture", str)
    if name not in ARCHITECTURES:
        raise FormatError(
            file.path,
            f"the architecture '{name}' is not supported",
            hint=f"supported are {', '.join(ARCHITECTURES)}; `pyggml splits` plans any that llama.cpp loads",
        )
    arch = ARCHITECTURES[name]
    return arch.read(KeyReader(file, name, arch.uneven_keys))


def weight_specs(hp: HParams, present: Mapping[str, TensorInfo]) -> list[WeightSpec]:
    """Return the specs of the tensors that a model uses, in upstream's order."""
    return ARCHITECTURES[hp.arch].weight_specs(hp, present)


def build_graph(p: GraphParams, weights: Weights) -> ModelGraph:
    """Return the graph of a micro-batch."""
    return ARCHITECTURES[p.hparams.arch].build_graph(p, weights)
