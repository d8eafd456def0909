"""Which module knows an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..gguf import TensorInfo
from . import deepseek2, dots1, gemma3, glm4moe, gpt_oss, granitemoe, llama, minimax_m2, olmoe, qwen2, qwen3
from .graph import GraphParams, ModelGraph
from .hparams import HParams
from .weights import Weights, WeightSpec, scale_specs

__all__ = ["build_graph", "weight_specs"]


class Architecture(Protocol):
    """What the module of an architecture offers."""

    def weight_specs(self, hp: HParams, present: Mapping[str, TensorInfo]) -> list[WeightSpec]:
        """Return the tensors that a model uses."""

    def build_graph(self, p: GraphParams, weights: Weights) -> ModelGraph:
        """Return the graph of a micro-batch."""


_MODULES: dict[str, Architecture] = {
    "llama": llama,
    "qwen3": qwen3,
    "qwen3moe": qwen3,
    "gpt-oss": gpt_oss,
    "glm4moe": glm4moe,
    "qwen2": qwen2,
    "qwen2moe": qwen2,
    "olmoe": olmoe,
    "granitemoe": granitemoe,
    "deepseek2": deepseek2,
    "minimax-m2": minimax_m2,
    "dots1": dots1,
    "ernie4_5-moe": dots1,
    "gemma3": gemma3,
}


def weight_specs(hp: HParams, present: Mapping[str, TensorInfo]) -> list[WeightSpec]:
    """Return the tensors that a model of this architecture uses, in upstream's order."""
    specs = _MODULES[hp.arch].weight_specs(hp, present)
    return [*specs, *scale_specs(hp, specs, present)]


def build_graph(p: GraphParams, weights: Weights) -> ModelGraph:
    """Return the graph of a micro-batch."""
    return _MODULES[p.hparams.arch].build_graph(p, weights)
