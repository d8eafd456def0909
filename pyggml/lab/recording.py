"""`RoutingRecorder`: records the experts that a session's model chooses, and makes a `Trace`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..gguf import GGUFFile
from ..models.batch import MicroBatch
from ..models.graph import ModelGraph
from ..models.source import ModelFacts
from ..tensor import Tensor
from .trace import Phase, Trace, TraceBuilder

__all__ = ["RoutingRecorder", "expert_bytes_of"]

#: Expert weights of a layer, in the order in which they are multiplied.
_PROJECTIONS = ("gate_up", "gate", "up", "down")


class RoutingRecorder:
    """Reads ``ffn_moe_topk`` of every layer while graphs are computed; set `Session.watcher` to it.

    A micro-batch is a step. The ids are a view of all experts, sorted; they are read by their strides.

    Attributes
    ----------
    phase : Phase
        Phase of the steps that follow.
    """

    def __init__(self, path: str, hparams: ModelFacts, file: GGUFFile | None = None) -> None:
        self.phase = Phase.PREFILL
        self._hparams, self._file = hparams, file
        self._builder = TraceBuilder(path)
        self._step = -1

    def watch(self, graph: ModelGraph, part: MicroBatch) -> Callable[[Tensor, bool], bool]:
        """Return the eval callback that reads the ids of one micro-batch."""
        self._step += 1
        layers = {tensor: int(tensor.name.rpartition("-")[2]) for tensor in graph.topk}

        def see(tensor: Tensor, ask: bool) -> bool:
            layer = layers.get(tensor)
            if not ask and layer is not None:
                rows = tensor.numpy().reshape(-1, tensor.ne[0])
                # the last layer runs only for tokens whose logits are wanted
                self._add(layer, rows, part.seqs if len(rows) == part.n_tokens else part.seqs[part.outputs])
            return not ask or layer is not None

        return see

    def take(self, chosen: Mapping[int, npt.NDArray[np.int32]], *, seq: int = 0) -> None:
        """Add the experts of one micro-batch of a sequence: for each layer, int32, (n_token, n_used)."""
        self._step += 1
        for layer, rows in chosen.items():
            self._add(layer, rows, np.full(len(rows), seq))

    def _add(self, layer: int, rows: npt.NDArray[np.int32], seqs: npt.NDArray[np.integer[Any]]) -> None:
        self._builder.add(0, self._step, self.phase, layer, rows.tolist(), sequences=seqs.tolist())

    def trace(self) -> Trace:
        """Return what was recorded.

        Raises
        ------
        FormatError
            Nothing was recorded: the model has no experts, or nothing was computed.
        """
        hp = self._hparams
        sizes, projections = (None, ("all",)) if self._file is None else expert_bytes_of(self._file, hp.n_layer)
        return self._builder.finish(
            n_layer=hp.n_layer, n_expert=hp.n_expert, n_used=hp.n_expert_used, expert_bytes=sizes,
            projections=projections, model=hp.name, format="recorded", n_used_model=hp.n_expert_used,
        )  # fmt: skip


def expert_bytes_of(file: GGUFFile, n_layer: int) -> tuple[npt.NDArray[np.int64] | None, tuple[str, ...]]:
    """Return the bytes of one expert, int64, (n_layer, n_projection), or None, and the projections' names."""
    found = {
        name: {
            layer: file.tensors[key]
            for layer in range(n_layer)
            if (key := f"blk.{layer}.ffn_{name}_exps.weight") in file.tensors
        }
        for name in _PROJECTIONS
    }
    names = tuple(name for name in _PROJECTIONS if found[name])
    if not names:
        return None, ("all",)
    table = np.zeros((n_layer, len(names)), np.int64)
    for i, name in enumerate(names):
        for layer, tensor in found[name].items():
            table[layer, i] = tensor.nbytes // tensor.ne[2]
    return table, names
