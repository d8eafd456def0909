"""Makes a mixture of experts from a dense llama: each expert is a slightly changed copy of the feed-forward network.

The result is not better than the dense model. It writes sensible text, its experts differ, so that a wrong expert
changes the result, and its router prefers some experts, as trained routers do. The router is calibrated on the dense
model's activations for a short text (`calibrate`).

Equal arguments give equal bytes: noise is made from integers, and the calibration is computed in float64 and rounded so
coarsely that the order of sums has no effect.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from ..errors import FormatError, PyggmlError
from ..gguf import GGUFFile, TensorInfo, ValueType
from ..types import Type
from .dense_llama import ffn_inputs
from .gguf_writer import GGUFWriter, Progress, Written
from .quantize import QUANTIZABLE, dequantize, quantize
from .random_model import noise

__all__ = ["CALIBRATION_TEXT", "Upcycling", "upcycle"]

_Floats = npt.NDArray[np.float32]
_Bytes = npt.NDArray[np.uint8]

#: Text for the calibration of routers: prose, a question, a list, numbers, code; about 120 tokens.
CALIBRATION_TEXT = """\
A lighthouse stands on the cliff above the harbour, and every evening its keeper climbs the 127 steps to light the lamp.
What makes the sea look blue on a clear day? Water absorbs red light first, so mostly blue light comes back to our eyes.
1. Bring a litre of water to the boil.
2. Add salt, then the pasta, and stir once.
def mean(values):
    return sum(values) / len(values)
"Thank you," she said, "I would rather walk home while it is still warm outside."
"""

#: Elements that share one factor in types without scales of their own.
_BLOCK = 32
#: Offsets of the half-precision scales and minima in a block, in bytes.
_SCALES: dict[Type, tuple[int, ...]] = {
    Type.Q4_0: (0,),
    Type.Q4_1: (0, 2),
    Type.Q5_0: (0,),
    Type.Q5_1: (0, 2),
    Type.Q8_0: (0,),
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.Q4_K: (0, 2),
    Type.Q5_K: (0, 2),
    Type.Q6_K: (208,),
    Type.IQ4_NL: (0,),
    Type.IQ4_XS: (0,),
}
#: Share of the mean variance that is added to all directions, because there are fewer tokens than dimensions.
_RIDGE = 0.3
_FFN = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class Upcycling:
    """Everything that determines an upcycled model's bytes, except the dense model.

    Attributes
    ----------
    experts, used : int
        Number of experts, and of those that each token uses.
    type : Type, optional
        Type of the experts; by default that of the dense network, whose scales are then changed in place.
    seed : int
    noise : float
        Relative deviation of an expert's scales from the dense network's. Text is sensible with 0.15, not with 0.3.
    skew : float
        The router's logit of the expert of rank r is lower by ``skew * log(r)``; logits have a deviation of 1.
    """

    experts: int = 8
    used: int = 2
    type: Type | None = None
    seed: int = 1
    noise: float = 0.05
    skew: float = 3.3


def upcycle(
    dense: GGUFFile,
    path: str | os.PathLike[str],
    tokens: Sequence[int],
    options: Upcycling,
    *,
    progress: Progress | None = None,
) -> Written:
    """Write a mixture of experts made from a dense model.

    Parameters
    ----------
    dense : GGUFFile
        A llama without experts.
    path : str or os.PathLike
        Written whole or not at all; its folder must exist.
    tokens : sequence of int
        Tokens for the calibration of routers: `CALIBRATION_TEXT` in the model's vocabulary, or at least 30 others.
    options : Upcycling
    progress : callable, optional
        Called with the bytes written and the total.

    Raises
    ------
    FormatError
        The model is not a llama, has experts already, or lacks a tensor.
    PyggmlError
        The options are impossible, or the file cannot be written.
    """
    _check(dense, options)
    layers = dense.require("llama.block_count", int)
    for name in (f"blk.{i}.ffn_{part}.weight" for i in range(layers) for part in _FFN):
        _experts_type(dense, dense.tensor(name), options)  # fail before the work of a minute, not after
    routers = _calibrated(dense, tokens, options)
    writer = GGUFWriter(alignment=dense.alignment)
    _copy_keys(dense, writer, options)
    ours: dict[str, Callable[[GGUFWriter], None]] = {}
    for i in range(layers):
        ours[f"blk.{i}.ffn_gate.weight"] = partial(_add_gate, dense, options, i, routers[i])
        for part in ("up", "down"):
            ours[f"blk.{i}.ffn_{part}.weight"] = partial(_add_experts, dense, options, i, part)
    for info in dense.tensors.values():
        if info.name in ours:
            ours[info.name](writer)
        else:
            writer.add_tensor(info.name, info.type, _dims(info.ne), partial(_copied, dense, info.name))
    return writer.write(path, progress=progress)


def _check(dense: GGUFFile, options: Upcycling) -> None:
    arch = dense.require("general.architecture", str)
    if arch != "llama":
        raise FormatError(dense.path, f"a dense llama is needed, this is '{arch}'", hint="choose another model")
    if dense.require("llama.expert_count", int, 0):
        raise FormatError(dense.path, "the model has experts already", hint="run it as it is")
    if not 1 <= options.used <= options.experts:
        raise PyggmlError(f"make-moe: {options.used} of {options.experts} experts cannot be used")
    for name in ("noise", "skew"):
        value = getattr(options, name)
        if not (math.isfinite(value) and value >= 0):
            raise PyggmlError(f"make-moe: a {name} of {value} is not a number from 0 up")
    if options.type is not None and options.type not in QUANTIZABLE:
        names = ", ".join(kind.name for kind in QUANTIZABLE)
        raise PyggmlError(f"make-moe: experts of type {options.type.name} cannot be made; there are {names}")


def _copy_keys(dense: GGUFFile, writer: GGUFWriter, options: Upcycling) -> None:
    """Copy every key, and add the numbers of experts and the model's origin."""
    added = {"llama.expert_count": options.experts, "llama.expert_used_count": options.used}
    story = "pyggml.make_moe"
    for key in dense.metadata:
        if key not in added and key != story and not key.startswith("split."):  # the result is one file
            entry = dense.metadata.entry(key)
            writer.add_raw(key, entry.type, entry.length, dense.metadata.raw(key))
    for key, value in added.items():
        writer.add(key, ValueType.UINT32, value)
    writer.add(story, ValueType.STRING, f"upcycled: seed {options.seed}, noise {options.noise}, skew {options.skew}")


# routers


def _calibrated(dense: GGUFFile, tokens: Sequence[int], options: Upcycling) -> list[_Floats]:
    """Return each layer's router: float32, ``(n_expert, n_embd)``."""
    if len(tokens) < 8:
        raise PyggmlError(f"make-moe: {len(tokens)} tokens are too few to calibrate a router", hint="give 30 or more")
    with np.errstate(all="ignore"):  # `_sound_router` checks, and names the layer
        return [_sound_router(dense, i, inputs, options) for i, inputs in enumerate(ffn_inputs(dense, tokens))]


def _sound_router(dense: GGUFFile, layer: int, inputs: npt.NDArray[np.float64], options: Upcycling) -> _Floats:
    try:
        router = calibrate(layer, inputs, options)
        if np.isfinite(router).all():
            return router
    except np.linalg.LinAlgError:
        pass
    what = f"no router can be made for layer {layer}: what its feed-forward network sees is not finite, or all alike"
    raise FormatError(dense.path, what, hint="the weights are damaged: fetch the model again")


def calibrate(layer: int, inputs: npt.NDArray[np.float64], options: Upcycling) -> _Floats:
    """Make a router that prefers some experts for all tokens, and chooses among them by token.

    Parameters
    ----------
    layer : int
    inputs : float64, (n_token, n_embd)
        Input of the layer's feed-forward network.
    options : Upcycling

    Returns
    -------
    float32, (n_expert, n_embd)
        The logits of expert e for an input x are about ``-skew * log(rank[e])`` plus a part of deviation 1 that
        depends on x.

    Notes
    -----
    All inputs of a layer have a large common part, their mean. Here it determines the ranks of the experts. A router of
    pure noise would choose by that part, and one orthogonal to it would use every expert. The first token's input
    differs from all others, because attention rests on it; it is sent to the likeliest experts.
    """
    n_embd = inputs.shape[1]
    first, inputs = inputs[0], inputs[1:]
    mean = inputs.mean(axis=0)
    fixed = np.stack([mean, first])
    along = _steady(fixed, inputs - mean)
    stream = f"blk.{layer}.ffn_gate_inp"
    own = noise(options.seed, stream, options.experts * n_embd)(options.experts * n_embd)
    directions = own.reshape(options.experts, n_embd).astype(np.float64)
    directions -= directions @ np.linalg.pinv(fixed) @ fixed
    directions /= (inputs @ directions.T).std(axis=0)[:, None]
    ranks = noise(options.seed, stream + " ranks", options.experts)(options.experts).argsort(kind="stable")
    offsets = np.empty(options.experts)
    offsets[ranks] = -options.skew * np.log(np.arange(1, options.experts + 1))
    router = directions + np.outer(offsets, along)
    # eleven bits of each value: coarser than the difference between two machines, finer than what changes the routing
    return router.astype(np.float16).astype(np.float32)


def _steady(fixed: npt.NDArray[np.float64], deviations: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the vector whose product with each of ``fixed`` is 1, and with ``deviations`` as near to 0 as possible."""
    spread = deviations.T @ deviations / len(deviations)
    spread += _RIDGE * np.trace(spread) / len(spread) * np.eye(len(spread))
    whitened = np.linalg.solve(spread, fixed.T)
    along: npt.NDArray[np.float64] = whitened @ np.linalg.solve(fixed @ whitened, np.ones(len(fixed)))
    return along


# experts


def _add_gate(dense: GGUFFile, options: Upcycling, layer: int, router: _Floats, writer: GGUFWriter) -> None:
    """Add a layer's router, in place of its gate, and the experts' gates."""
    writer.add_tensor(f"blk.{layer}.ffn_gate_inp.weight", Type.F32, router.shape[::-1], lambda: [router.tobytes()])
    _add_experts(dense, options, layer, "gate", writer)


def _add_experts(dense: GGUFFile, options: Upcycling, layer: int, part: str, writer: GGUFWriter) -> None:
    info = dense.tensor(f"blk.{layer}.ffn_{part}.weight")
    kind = _experts_type(dense, info, options)
    name = f"blk.{layer}.ffn_{part}_exps.weight"
    ne = (info.ne[0], info.ne[1], options.experts)
    writer.add_tensor(name, kind, ne, partial(_experts, dense, info, kind, name, options))


def _experts_type(dense: GGUFFile, info: TensorInfo, options: Upcycling) -> Type:
    """Return the type of a tensor's experts; raise if it cannot be made."""
    kind = options.type or info.type
    row = info.ne[0]
    if row % kind.block_size:
        raise FormatError(dense.path, f"'{info.name}' has rows of {row}, no multiple of {kind.ggml_name}'s blocks")
    if kind is info.type and (kind in _SCALES or kind in (Type.F32, Type.F16, Type.BF16)):
        return kind
    try:
        dequantize(dense.data(info.name)[: info.type.row_size(row)].reshape(1, -1), info.type)
    except NotImplementedError:
        raise FormatError(dense.path, f"'{info.name}' is {info.type.ggml_name}, which cannot be read") from None
    if kind not in QUANTIZABLE:
        hint = f"give --type, one of {', '.join(known.name for known in QUANTIZABLE)}"
        raise FormatError(dense.path, f"experts of type {kind.ggml_name} cannot be made", hint=hint)
    return kind


def _experts(dense: GGUFFile, info: TensorInfo, kind: Type, name: str, options: Upcycling) -> Iterator[memoryview]:
    """Yield each expert's bytes."""
    raw = dense.data(info.name)
    per_factor = info.type.block_size if kind is info.type and kind in _SCALES else math.gcd(info.ne[0], _BLOCK)
    n = info.ne[0] * info.ne[1] // per_factor
    values = None if kind is info.type and kind in _SCALES else _values(raw, info)
    for i in range(options.experts):
        factors = np.float32(1) + np.float32(options.noise) * noise(options.seed, f"{name}.{i}", n)(n)
        if values is None:
            expert = _scaled(raw, kind, factors)
        else:
            expert = quantize((values.reshape(n, -1) * factors[:, None]).reshape(values.shape), kind)
        yield np.ascontiguousarray(expert).data


def _values(raw: _Bytes, info: TensorInfo) -> _Floats:
    return dequantize(raw.reshape(info.ne[1], -1), info.type)


def _scaled(raw: _Bytes, kind: Type, factors: _Floats) -> _Bytes:
    """Return blocks whose scales and minima are multiplied by each block's factor."""
    blocks = raw.reshape(-1, kind.type_size).copy()
    for at in _SCALES[kind]:
        scales = blocks[:, at : at + 2].copy().view(np.float16)[:, 0]
        blocks[:, at : at + 2] = (scales.astype(np.float32) * factors).astype(np.float16).view(np.uint8).reshape(-1, 2)
    return blocks


def _copied(dense: GGUFFile, name: str) -> list[memoryview]:
    return [dense.data(name).data]


def _dims(ne: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Return ``ne`` without the ones at its end, as in files."""
    n = max((i + 1 for i in range(4) if ne[i] != 1), default=1)
    return ne[:n]
