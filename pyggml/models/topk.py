"""`TopK`: reads the experts that each layer chose while a graph is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from ..tensor import Tensor
from .batch import MicroBatch
from .graph import ModelGraph
from .hparams import HParams

__all__ = ["TopK"]


class TopK:
    """Collects the experts that each layer with experts chooses.

    Attributes
    ----------
    ids : int32, (n_moe_layer, n_token, n_used)
        Of all tokens in order; -1 if a layer did not run for a token, as the last does only for wanted logits.
    """

    def __init__(self) -> None:
        self.ids: npt.NDArray[np.int32] = np.empty((0, 0, 0), np.int32)
        self._n_before = 0

    def start(self, hparams: HParams, n_tokens: int) -> None:
        """Add ``n_tokens`` tokens to `ids`, all -1."""
        self._start(hparams.n_layer_moe, n_tokens, hparams.n_expert_used)

    def take(self, chosen: Mapping[int, npt.NDArray[np.int32]], n_tokens: int, n_layers: int) -> None:
        """Add the experts of one micro-batch: for each layer with experts, int32, (n_row, n_used).

        Parameters
        ----------
        n_tokens : int
            Tokens of the micro-batch; if there are fewer rows, they are those of its last tokens.
        n_layers : int
            Number of layers with experts.
        """
        n_used = next((rows.shape[1] for rows in chosen.values()), 0)
        self._start(n_layers, n_tokens, n_used)
        for i, layer in enumerate(sorted(chosen)):
            rows = chosen[layer]
            self.ids[i, self._n_before + n_tokens - len(rows) : self._n_before + n_tokens] = rows

    def _start(self, n_layers: int, n_tokens: int, n_used: int) -> None:
        shape = (n_layers, n_tokens, n_used)
        fresh = np.full(shape, -1, np.int32)
        self._n_before = self.ids.shape[1]
        self.ids = np.concatenate([self.ids, fresh], axis=1) if self._n_before else fresh

    def watch(self, graph: ModelGraph, part: MicroBatch) -> Callable[[Tensor, bool], bool]:
        """Return the eval callback that reads the ids of one micro-batch."""
        layers = {tensor: i for i, tensor in enumerate(graph.topk)}
        places = part.idxs + self._n_before

        def see(tensor: Tensor, ask: bool) -> bool:
            layer = layers.get(tensor)
            if not ask and layer is not None:
                rows = places if tensor.ne[1] == part.n_tokens else places[part.outputs]
                self.ids[layer, rows] = tensor.numpy().reshape(len(rows), -1)
            return not ask or layer is not None

        return see
