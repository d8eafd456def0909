"""A dense llama in plain numpy: slow, to read a model's inner values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ..errors import FormatError
from ..gguf import GGUFFile
from .quantize import dequantize

__all__ = ["ffn_inputs"]

_Array = npt.NDArray[np.float64]


def ffn_inputs(file: GGUFFile, tokens: Sequence[int]) -> Iterator[_Array]:
    """Yield the normed input of each layer's feed-forward network: float64, (n_token, n_embd).

    Parameters
    ----------
    file : GGUFFile
        A llama without experts.
    tokens : sequence of int

    Raises
    ------
    FormatError
        A tensor or key is missing, or has another shape or a type that cannot be read.
    """
    model = _Model(file)
    x = model.rows("token_embd.weight", tokens)
    for i in range(model.n_layer):
        block = f"blk.{i}"
        x = x + model.attention(block, model.norm(x, f"{block}.attn_norm.weight"))
        seen = model.norm(x, f"{block}.ffn_norm.weight")
        yield seen
        if i + 1 < model.n_layer:
            gate = model.times(seen, f"{block}.ffn_gate.weight")
            hidden = gate / (1 + np.exp(-gate)) * model.times(seen, f"{block}.ffn_up.weight")
            x = x + model.times(hidden, f"{block}.ffn_down.weight")


class _Model:
    """Hyper-parameters, and weights that are dequantised on request."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.n_layer = file.require("llama.block_count", int)
        self.n_embd = file.require("llama.embedding_length", int)
        self.n_head = file.require("llama.attention.head_count", int)
        self.n_head_kv = file.require("llama.attention.head_count_kv", int, self.n_head)
        self.eps = file.require("llama.attention.layer_norm_rms_epsilon", float)
        self.base = file.require("llama.rope.freq_base", float, 10000.0)
        if min(self.n_layer, self.n_embd, self.n_head, self.n_head_kv) < 1 or self.n_head % self.n_head_kv:
            raise FormatError(file.path, "the sizes of the attention make no sense", hint="convert the model again")
        self.head = file.require("llama.attention.key_length", int, self.n_embd // self.n_head)
        self.n_rot = file.require("llama.rope.dimension_count", int, self.head)

    def matrix(self, name: str) -> _Array:
        """Return a weight: float64, (rows, columns)."""
        info = self.file.tensor(name)
        try:
            values = dequantize(self.file.data(name).reshape(info.ne[1], -1), info.type)
        except NotImplementedError:
            kind = info.type.ggml_name
            raise FormatError(
                self.file.path, f"'{name}' is {kind}, which cannot be read here", hint="use q8_0"
            ) from None
        return values.astype(np.float64)

    def rows(self, name: str, ids: Sequence[int]) -> _Array:
        """Return some rows of a weight."""
        info = self.file.tensor(name)
        if not all(0 <= id < info.ne[1] for id in ids):
            raise FormatError(self.file.path, f"'{name}' has {info.ne[1]:,} rows, fewer than the vocabulary has tokens")
        packed = self.file.data(name).reshape(info.ne[1], -1)[list(ids)]
        return dequantize(packed, info.type).astype(np.float64)

    def times(self, x: _Array, name: str) -> _Array:
        """Return ``x @ w.T``, and the bias if there is one."""
        weight = self.matrix(name)
        if weight.shape[1] != x.shape[1]:
            raise FormatError(self.file.path, f"'{name}' has rows of {weight.shape[1]:,}, {x.shape[1]:,} are needed")
        bias = name.removesuffix("weight") + "bias"
        out: _Array = x @ weight.T
        return out + self.matrix(bias)[0] if bias in self.file.tensors else out

    def norm(self, x: _Array, name: str) -> _Array:
        """Return the RMS norm of rows, times its factors."""
        scale = 1 / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + self.eps)
        out: _Array = x * scale * self.matrix(name)[0]
        return out

    def attention(self, block: str, x: _Array) -> _Array:
        """Return causal attention over all tokens."""
        n, groups = len(x), self.n_head // self.n_head_kv
        q = self.rotate(self.times(x, f"{block}.attn_q.weight").reshape(n, self.n_head, -1))
        k = self.rotate(self.times(x, f"{block}.attn_k.weight").reshape(n, self.n_head_kv, -1))
        v = self.times(x, f"{block}.attn_v.weight").reshape(n, self.n_head_kv, -1)
        later = np.triu(np.ones((n, n), bool), 1)
        mixed = np.empty((n, self.n_head, v.shape[2]))
        for i in range(self.n_head):
            scores = q[:, i] @ k[:, i // groups].T / np.sqrt(self.head)
            scores[later] = -np.inf
            scores = np.exp(scores - scores.max(axis=1, keepdims=True))
            mixed[:, i] = scores / scores.sum(axis=1, keepdims=True) @ v[:, i // groups]
        return self.times(mixed.reshape(n, -1), f"{block}.attn_output.weight")

    def rotate(self, heads: _Array) -> _Array:
        """Rotate adjacent pairs of elements by position (RoPE in the layout of llama's files)."""
        steps = self.base ** -(np.arange(0, self.n_rot, 2) / self.n_rot)
        if "rope_freqs.weight" in self.file.tensors:
            steps = steps / self.matrix("rope_freqs.weight")[0]
        angles = np.arange(len(heads))[:, None, None] * steps
        cos, sin = np.cos(angles), np.sin(angles)
        out = heads.copy()
        even, odd = heads[..., 0 : self.n_rot : 2], heads[..., 1 : self.n_rot : 2]
        out[..., 0 : self.n_rot : 2] = even * cos - odd * sin
        out[..., 1 : self.n_rot : 2] = even * sin + odd * cos
        return out
