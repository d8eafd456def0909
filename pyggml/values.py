"""Arrays to the bytes of a tensor and back: converted, quantised, or read from blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import GraphError, ShapeError
from .types import Type

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .tensor import Tensor

__all__ = ["decode_array", "encode_array"]

_NUMPY_TYPE = {
    Type.F32: "f4",
    Type.F64: "f8",
    Type.F16: "f2",
    Type.I8: "i1",
    Type.I16: "i2",
    Type.I32: "i4",
    Type.I64: "i8",
}


_INTEGERS = frozenset({Type.I8, Type.I16, Type.I32, Type.I64})


def _check_integers(tensor: Tensor, values: npt.NDArray[Any]) -> None:
    """Refuse numbers that a tensor of integers cannot hold."""
    import numpy as np

    limits = np.iinfo(_NUMPY_TYPE[tensor.type])
    if values.dtype.kind not in "biuf":
        raise GraphError(f"'{tensor.name}' is {tensor.type.ggml_name}: {values.dtype} cannot be written into it")
    if values.dtype.kind == "f":  # the limits of 64 bits are no floats
        held = (values >= limits.min) & (values < float(limits.max) + 1) & (values == np.rint(values))
    else:
        held = (values >= limits.min) & (values <= limits.max)
    if not held.all():
        at = int(np.flatnonzero(~held.reshape(-1))[0])
        raise GraphError(
            f"'{tensor.name}' is {tensor.type.ggml_name} and cannot hold {values.reshape(-1)[at]} (element {at})",
            hint="round or clip the values",
        )


def encode_array(tensor: Tensor, array: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Return ``array`` as the bytes of ``tensor``.

    Raises
    ------
    ShapeError
        The shapes differ, the tensor has gaps, or values cannot be quantised to its type.
    """
    import numpy as np

    values = np.asarray(array)
    if values.size != tensor.numel or tuple(n for n in values.shape if n != 1) != tuple(
        n for n in tensor.shape if n != 1
    ):
        raise ShapeError("set_array", f"'{tensor.name}' has shape {tensor.shape}, the array {values.shape}")
    if not tensor.is_contiguous():
        raise ShapeError(
            "set_array", f"'{tensor.name}' has gaps (nb {tensor.nb})", hint="write the tensor that it views"
        )
    if tensor.numel == 0:
        return np.empty(0, np.uint8)
    if tensor.type in _INTEGERS:
        _check_integers(tensor, values)
    if tensor.type in _NUMPY_TYPE:
        raw = np.ascontiguousarray(values, dtype=_NUMPY_TYPE[tensor.type])
    elif tensor.type is Type.BF16:
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        raw = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
    else:
        raw = _quantize(tensor, np.ascontiguousarray(values, dtype=np.float32))
    return raw.reshape(-1).view(np.uint8)


def _quantize(tensor: Tensor, values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    from gguf import GGMLQuantizationType, quants

    try:
        rows: npt.NDArray[np.uint8] = quants.quantize(
            values.reshape(-1, tensor.ne[0]), GGMLQuantizationType(int(tensor.type))
        )
    except NotImplementedError:
        raise ShapeError(
            "set_array",
            f"values cannot be quantised to {tensor.type.ggml_name}",
            hint="quantise with llama.cpp, or use q4_0, q4_1, q5_0, q5_1, q8_0, mxfp4, f16 or bf16",
        ) from None
    return np_contiguous(rows)


def np_contiguous(a: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return ``a`` as a contiguous array."""
    import numpy as np

    return np.ascontiguousarray(a)


def decode_array(tensor: Tensor, raw: bytes) -> npt.NDArray[Any]:
    """Return the values in the bytes of ``tensor``, without gaps."""
    import numpy as np

    if tensor.numel == 0:
        return np.zeros(tensor.shape, _NUMPY_TYPE.get(tensor.type, "f4"))
    type, ne, nb = tensor.type, tensor.ne, tensor.nb
    if type in _NUMPY_TYPE or type is Type.BF16:
        dtype = np.dtype(_NUMPY_TYPE.get(type, "u2"))
        values = np.ndarray(ne[::-1], dtype, buffer=raw, strides=nb[::-1]).reshape(tensor.shape)
        if type is Type.BF16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32) if type is Type.F16 else values.copy()
    if ne[0] % type.block_size:
        raise GraphError(
            f"'{tensor.name}' cannot be read: a row of {ne[0]} elements does not consist of whole blocks of {type.ggml_name}"
        )
    blocks = ne[0] // type.block_size
    packed = np.ndarray(
        (ne[3], ne[2], ne[1], blocks * type.type_size), np.uint8, buffer=raw, strides=(nb[3], nb[2], nb[1], 1)
    )
    if type in (Type.Q1_0, Type.Q2_0):
        return _few_bits(type, packed.reshape(*packed.shape[:3], blocks, 18)).reshape(tensor.shape)
    from gguf import GGMLQuantizationType, quants

    return quants.dequantize(np.ascontiguousarray(packed), GGMLQuantizationType(int(type))).reshape(tensor.shape)


def _few_bits(type: Type, packed: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the values of blocks that the gguf package cannot read: a half, then 16 bytes of -1 and 1, or of -1 .. 2."""
    import numpy as np

    n = 2 if type is Type.Q2_0 else 1
    codes = packed[..., 2:, None] >> np.arange(0, 8, n, dtype=np.uint8) & (2**n - 1)
    steps = codes.astype(np.float32) - 1 if n == 2 else codes.astype(np.float32) * 2 - 1
    d = np.ascontiguousarray(packed[..., :2]).view(np.float16).astype(np.float32)
    values: npt.NDArray[Any] = steps.reshape(*d.shape[:-1], -1) * d
    return values
