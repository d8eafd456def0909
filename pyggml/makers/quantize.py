"""`quantize`: quantises rows with gguf, and with numpy or the CPU's kernels where gguf cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, quants

from pyggml.kernels.cpu.loading import LOADING

from ..types import Type

__all__ = ["QUANTIZABLE", "dequantize", "quantize"]

#: Types that `quantize` can make.
QUANTIZABLE = (
    Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q3_K, Type.Q4_K,
    Type.Q5_K, Type.Q6_K, Type.IQ4_NL, Type.TQ1_0, Type.TQ2_0, Type.MXFP4,
)  # fmt: skip
#: Types that CPU kernels quantise.
_BY_KERNEL = frozenset({Type.Q2_K, Type.Q3_K, Type.IQ4_NL})

_Floats = npt.NDArray[np.float32]
_Bytes = npt.NDArray[np.uint8]


def quantize(values: _Floats, kind: Type) -> _Bytes:
    """Quantise float32 rows.

    Parameters
    ----------
    values : float32, (..., n)
        n must be a multiple of the type's block size.
    kind : Type
        One of `QUANTIZABLE`.

    Returns
    -------
    uint8, (..., row_size(n))
    """
    if kind is Type.F32 or kind is Type.F16:
        packed = values.astype(np.float32 if kind is Type.F32 else np.float16, copy=False)
        return np.ascontiguousarray(packed).view(np.uint8)
    if kind is Type.Q4_K or kind is Type.Q5_K:
        return _quantize_with_minima(values, kind)
    if kind is Type.Q6_K:
        return _quantize_q6_k(values)
    if kind in _BY_KERNEL:
        return _quantize_by_kernel(values, kind)
    rows: _Bytes = quants.quantize(values, GGMLQuantizationType(int(kind)))
    return rows


def dequantize(packed: _Bytes, kind: Type) -> _Floats:
    """Return quantised rows, uint8, (..., row bytes), as float32 rows.

    Raises
    ------
    NotImplementedError
        gguf cannot read the type.
    """
    if kind is Type.F32:
        return packed.view(np.float32)
    if kind is Type.F16:
        return packed.view(np.float16).astype(np.float32)
    values: _Floats = quants.dequantize(packed, GGMLQuantizationType(int(kind)))
    return values


def _quantize_by_kernel(values: _Floats, kind: Type) -> _Bytes:
    with LOADING:
        from pyggml.kernels.cpu.quantise import quantiser  # brings Numba

    values = np.ascontiguousarray(values, np.float32)
    rows = np.empty((*values.shape[:-1], kind.row_size(values.shape[-1])), np.uint8)
    quantiser(kind)(int(kind), values.ctypes.data, rows.ctypes.data, values.size)
    return rows


def _inverse(values: _Floats) -> _Floats:
    """Return 1 / x, and 0 for 0."""
    nonzero = values != 0
    inverse: _Floats = np.where(nonzero, np.float32(1) / np.where(nonzero, values, np.float32(1)), np.float32(0))
    return inverse


def _steps(values: npt.NDArray[Any], low: int, high: int) -> npt.NDArray[Any]:
    steps: npt.NDArray[Any] = np.clip(np.rint(values), low, high)
    return steps


def _quantize_with_minima(values: _Floats, kind: Type) -> _Bytes:
    """Make Q4_K or Q5_K blocks of 256 values: d, dmin, eight 6-bit pairs of scale and minimum, fifth bits, nibbles."""
    top = 31 if kind is Type.Q5_K else 15
    *lead, n = values.shape
    v = values.reshape(-1, 8, 32).astype(np.float32)
    low = np.minimum(v.min(-1), 0).astype(np.float32)
    scale = ((v.max(-1) - low) / np.float32(top)).astype(np.float32)
    d = (scale.max(-1) / np.float32(63)).astype(np.float16)
    dmin = ((-low).max(-1) / np.float32(63)).astype(np.float16)
    d32, dmin32 = d.astype(np.float32)[:, None], dmin.astype(np.float32)[:, None]
    scales = _steps(scale * _inverse(d32), 0, 63).astype(np.uint8)
    mins = _steps(-low * _inverse(dmin32), 0, 63).astype(np.uint8)
    step, shift = d32 * scales, dmin32 * mins
    q = _steps((v + shift[..., None]) * _inverse(step)[..., None], 0, top).astype(np.uint8)
    pairs = np.empty((len(v), 12), np.uint8)  # the upper two bits of the last four fill the first eight bytes up
    pairs[:, 0:4] = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    pairs[:, 4:8] = mins[:, :4] | ((mins[:, 4:] >> 4) << 6)
    pairs[:, 8:12] = (scales[:, 4:] & 15) | ((mins[:, 4:] & 15) << 4)
    low_bits = q & 15
    parts: list[_Bytes] = [_half_bytes(d), _half_bytes(dmin), pairs]
    if kind is Type.Q5_K:  # byte j holds the fifth bits of the j-th value of all eight groups
        fifth = (q >> 4) << np.arange(8, dtype=np.uint8)[:, None]
        parts.append(np.bitwise_or.reduce(fifth, axis=1).astype(np.uint8))
    nibbles = low_bits[:, 0::2] | (low_bits[:, 1::2] << 4)
    parts.append(nibbles.reshape(len(v), 128).astype(np.uint8))
    return np.concatenate(parts, axis=1).reshape(*lead, kind.row_size(n))


def _quantize_q6_k(values: _Floats) -> _Bytes:
    """Make Q6_K blocks: 256 values in 210 bytes (low nibbles, upper bit pairs, sixteen int8 scales, d)."""
    *lead, n = values.shape
    v = values.reshape(-1, 16, 16).astype(np.float32)
    scale = (_largest(v) / np.float32(-32)).astype(np.float32)
    d = (_largest(scale) / np.float32(-128)).astype(np.float16)
    d32 = d.astype(np.float32)[:, None]
    scales = _steps(scale * _inverse(d32), -128, 127).astype(np.int8)
    step = d32 * scales
    q = (_steps(v * _inverse(step)[..., None], -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = np.stack([(q[:, :, i] & 15) | ((q[:, :, i + 2] & 15) << 4) for i in (0, 1)], axis=2)
    high = (q[:, :, 0] >> 4) | ((q[:, :, 1] >> 4) << 2) | ((q[:, :, 2] >> 4) << 4) | ((q[:, :, 3] >> 4) << 6)
    blocks = np.concatenate([low.reshape(-1, 128), high.reshape(-1, 64), scales.view(np.uint8), _half_bytes(d)], axis=1)
    return blocks.reshape(*lead, Type.Q6_K.row_size(n))


def _largest(values: _Floats) -> _Floats:
    """Return the value with the largest magnitude along the last axis."""
    at = np.abs(values).argmax(-1)[..., None]
    largest: _Floats = np.take_along_axis(values, at, -1)[..., 0]
    return largest


def _half_bytes(values: npt.NDArray[np.float16]) -> _Bytes:
    return values.view(np.uint8).reshape(-1, 2)
