"""`InputFiller`: writes the inputs of a graph before each compute."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..tensor import Tensor
from ..types import Type
from .batch import MicroBatch
from .graph import AttnInputs, GraphInputs
from .kv_cache import KVCache, Slot, hadamard
from .kv_cells import Cells

__all__ = ["InputFiller"]


_DTYPES = {Type.F32: np.float32, Type.F16: np.float16, Type.I32: np.int32, Type.I64: np.int64}


class _Input:
    """An input of a graph, with an array in host memory from which it is written."""

    __slots__ = ("_address", "_n_bytes", "_tensor", "array")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.array: npt.NDArray[np.generic] = np.empty(tensor.numel, _DTYPES[tensor.type])
        self._address, self._n_bytes = self.array.ctypes.data, self.array.nbytes

    def write(self, values: npt.NDArray[np.generic]) -> None:
        """Write the tensor."""
        self.array[:] = values
        self.send()

    def send(self) -> None:
        """Write the tensor from the array."""
        tensor = self._tensor
        buffer = tensor.storage
        assert buffer is not None
        if buffer.tenancy is not None:
            buffer.tenancy.note_write(tensor)
        buffer.set_tensor(tensor, self._address, 0, self._n_bytes)


class InputFiller:
    """Writes the inputs of one allocated graph, again for each micro-batch that uses it.

    Notes
    -----
    Mirrors `llm_graph_result::set_inputs` and the `set_input` of each input. All are written each time, because an
    input's memory may be reused for results.
    """

    def __init__(self, inputs: GraphInputs, cache: KVCache) -> None:
        self._tokens, self._pos = _Input(inputs.tokens), _Input(inputs.pos)
        self._layer_tokens = None if inputs.layer_tokens is None else _Input(inputs.layer_tokens)
        self._out_ids = _Input(inputs.out_ids) if inputs.out_ids.ne[0] else None
        self._state_sources = None
        if inputs.state_sources is not None and inputs.state_sources.buffer is not None:
            self._state_sources = _Input(inputs.state_sources)
        self._token_scale = None
        if inputs.token_scale is not None:
            self._token_scale = _Input(inputs.token_scale)
            self._token_scale.array.fill(cache.hparams.token_scale)
        self._n_pos = cache.hparams.n_pos_per_token
        self._states = cache.states
        self._attn = _AttnFiller(inputs.attn, cache)
        self._attn_swa: _AttnFiller | None = None
        if inputs.attn_swa is not None:
            assert cache.swa is not None
            self._attn_swa = _AttnFiller(inputs.attn_swa, cache.swa)

    def fill(self, part: MicroBatch, slot: Slot) -> None:
        """Write the inputs for a micro-batch whose cells are taken."""
        self._tokens.write(part.tokens)
        pos = part.pos
        self._pos.write(pos if self._n_pos == 1 else np.concatenate([pos, pos, pos, np.zeros_like(pos)]))
        if self._state_sources is not None:
            assert self._states is not None
            self._state_sources.write(self._states.sources())
        if self._layer_tokens is not None:
            self._layer_tokens.write(part.tokens)
        if self._token_scale is not None:
            self._token_scale.send()
        if self._out_ids is not None:
            self._out_ids.write(part.outputs.nonzero()[0])
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
        self.cache = cache
        self._is_used = (
            inputs.kq_mask.buffer is not None
        )  # else no layer is of this kind, and the graph has no such input
        self._k_idxs = _Input(inputs.k_idxs)
        self._v_idxs = None if inputs.v_idxs is None else _Input(inputs.v_idxs)
        self._kq_mask, self._n_kv = _Input(inputs.kq_mask), inputs.kq_mask.ne[0]
        self._mask = self._kq_mask.array.reshape(-1, self._n_kv)
        self._drop = self._mask.dtype.type(-np.inf)
        #: of the latest mask of one token that is its sequence's last: cells, their changes, sequence, position
        self._masked: tuple[Cells, int, int, int] | None = None
        self._rotations = [_Input(t) for t in (inputs.k_rot, inputs.v_rot) if t is not None]
        for rotation, t in zip(
            self._rotations, (t for t in (inputs.k_rot, inputs.v_rot) if t is not None), strict=True
        ):
            rotation.array[:] = hadamard(t.ne[0]).reshape(-1)

    def _write_mask(self, part: MicroBatch, slot: Slot) -> None:
        """Write the mask; for the next token of the same sequence, only its own cell is seen in addition."""
        cells, before = self.cache.streams[slot.streams[0]], self._masked
        self._masked = None
        now: tuple[Cells, int, int, int] | None = None
        if part.n_tokens == 1 and not self.cache.window and len(self.cache.streams) == 1:
            seq, pos = part.seqs_unq[0], int(part.pos[0])
            if cells.last(seq) == pos:
                now = cells, cells.n_changes, seq, pos
        if now is not None and before == (cells, cells.n_changes - 1, now[2], now[3] - 1):
            self._mask[0, slot.cells[0, 0]] = 0
        else:
            self._mask.fill(0)
            np.copyto(self._mask, self._drop, where=self.cache.mask(part, self._n_kv))
        self._masked = now

    def fill(self, part: MicroBatch, slot: Slot) -> None:
        """Write the inputs for a micro-batch whose cells are taken."""
        if not self._is_used:
            return
        cache = self.cache
        k_idxs = cache.k_idxs(slot)
        self._k_idxs.write(k_idxs)
        if self._v_idxs is not None:
            self._v_idxs.write(cache.v_idxs(slot) if cache.v_trans else k_idxs)
        self._write_mask(part, slot)
        self._kq_mask.send()
        for rotation in self._rotations:
            rotation.send()
