"""`InputFiller`: writes the inputs of a graph before each compute."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..buffer import tensor_set
from ..tensor import Tensor
from ..types import Type
from .batch import MicroBatch
from .graph import AttnInputs, GraphInputs
from .kv_cache import KVCache, Slot, hadamard

__all__ = ["InputFiller"]


def _write(tensor: Tensor, values: npt.NDArray[np.generic]) -> None:
    tensor_set(tensor, values.ctypes.data, 0, values.nbytes)


class InputFiller:
    """Writes the inputs of one allocated graph, again for each micro-batch that uses it.

    Notes
    -----
    Mirrors `llm_graph_result::set_inputs` and the `set_input` of each input. All are written each time, because an
    input's memory may be reused for results.
    """

    def __init__(self, inputs: GraphInputs, cache: KVCache) -> None:
        self.inputs = inputs
        self._token_scale, self._n_pos = cache.hparams.token_scale, cache.hparams.n_pos_per_token
        self._states = cache.states
        self._attn = _AttnFiller(inputs.attn, cache)
        self._attn_swa: _AttnFiller | None = None
        if inputs.attn_swa is not None:
            assert cache.swa is not None
            self._attn_swa = _AttnFiller(inputs.attn_swa, cache.swa)

    def fill(self, part: MicroBatch, slot: Slot) -> None:
        """Write the inputs for a micro-batch whose cells are taken."""
        inputs = self.inputs
        _write(inputs.tokens, part.tokens)
        _write(inputs.pos, part.pos if self._n_pos == 1 else np.concatenate([*[part.pos] * 3, np.zeros_like(part.pos)]))
        if inputs.state_sources is not None and inputs.state_sources.buffer is not None:
            assert self._states is not None
            _write(inputs.state_sources, self._states.sources())
        if inputs.layer_tokens is not None:
            _write(inputs.layer_tokens, part.tokens)
        if inputs.token_scale is not None:
            _write(inputs.token_scale, np.full(part.n_tokens, self._token_scale, np.float32))
        if inputs.out_ids.ne[0]:
            _write(inputs.out_ids, np.flatnonzero(part.outputs).astype(np.int32))
        self._attn.fill(part, slot)
        if self._attn_swa is not None:
            assert slot.swa is not None
            self._attn_swa.fill(part, slot.swa)


class _AttnFiller:
    """Writes the inputs of attention over one cache, if any layer uses it.

    Notes
    -----
    Mirrors `llm_graph_input_attn_kv::set_input`, and half of `llm_graph_input_attn_kv_iswa::set_input`.
    """

    def __init__(self, inputs: AttnInputs, cache: KVCache) -> None:
        self.inputs, self.cache = inputs, cache
        mask = inputs.kq_mask
        self._mask = np.empty(
            (mask.ne[1] * mask.ne[3], mask.ne[0]), np.float16 if mask.type is Type.F16 else np.float32
        )
        self._drop = self._mask.dtype.type(-np.inf)
        self._rotations = [(t, hadamard(t.ne[0])) for t in (inputs.k_rot, inputs.v_rot) if t is not None]

    def fill(self, part: MicroBatch, slot: Slot) -> None:
        """Write the inputs for a micro-batch whose cells are taken."""
        inputs, cache = self.inputs, self.cache
        if inputs.kq_mask.buffer is None:  # no layer is of this kind, so the graph has no such input
            return
        k_idxs = cache.k_idxs(slot)
        _write(inputs.k_idxs, k_idxs)
        if inputs.v_idxs is not None:
            _write(inputs.v_idxs, cache.v_idxs(slot) if cache.v_trans else k_idxs)
        self._mask.fill(0)
        self._mask[cache.mask(part, inputs.kq_mask.ne[0])] = self._drop
        _write(inputs.kq_mask, self._mask)
        for tensor, values in self._rotations:
            _write(tensor, values)
