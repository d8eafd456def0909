"""The definition of each op in plain numpy: slow, in float64, and checked against the real library op by op.

`compute` takes a tensor and the values of its sources and returns its values, in numpy's order of all four dimensions.
Kernels of all backends are compared with it, within `nmse_bound`.

Shape letters are ggml's: the value of a tensor of ``ne`` [n0, n1, n2, n3] has shape (n3, n2, n1, n0).
"""
# numpy types what it makes of arrays of any dtype as Any:
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UnsupportedOpError
from ..ops import SortOrder, TriType
from ..ops.modes import skips_ids
from ..tensor import Tensor
from ..types import GluOp, Op, Type, UnaryOp
from ..values import decode_array, encode_array

# values of any dtype
Array = npt.NDArray[Any]
Sources = Sequence[Array]
Definition = Callable[[Tensor, Sources], Array]

_INTEGER = {Type.I8: np.int8, Type.I16: np.int16, Type.I32: np.int32, Type.I64: np.int64}
_DEFINITIONS: dict[Op, Definition] = {}


def define(*ops: Op) -> Callable[[Definition], Definition]:
    """Register the definition of ops."""

    def register(definition: Definition) -> Definition:
        for op in ops:
            _DEFINITIONS[op] = definition
        return definition

    return register


def compute(tensor: Tensor, arrays: Sequence[Array | None]) -> Array:
    """Return the values of a tensor, given those of its sources.

    Parameters
    ----------
    tensor : Tensor
        Its op, parameters and the shapes of its sources are read, but no data.
    arrays : sequence of array or None
        Values of its sources, dequantised, in numpy's order; any shape with the right number of elements.

    Returns
    -------
    array
        float32, or the integer type of the tensor, shape ``ne[::-1]``; rounded as the tensor's type rounds.

    Raises
    ------
    UnsupportedOpError
        The op has no definition here.
    """
    from . import ref_attention, ref_recurrent  # noqa: F401  register their definitions

    definition = _DEFINITIONS.get(tensor.op)
    if definition is None:
        raise UnsupportedOpError(tensor.name, tensor.op.name, ("ref",))
    sources = []
    for src, array in zip(tensor.src, arrays, strict=False):
        if src is None or array is None:
            sources.append(np.empty(0))
            continue
        values = np.asarray(array).reshape(src.ne[::-1])
        sources.append(values.astype(np.float64) if values.dtype.kind == "f" else values)
    return store(tensor.type, definition(tensor, sources).reshape(tensor.ne[::-1]))


def defined_ops() -> set[Op]:
    """Return the ops that have a definition."""
    from . import ref_attention, ref_recurrent  # noqa: F401  register their definitions

    return set(_DEFINITIONS)


def store(type: Type, values: Array) -> Array:
    """Return values as a tensor of ``type`` would hold them, read back."""
    if type in _INTEGER:
        return values.astype(_INTEGER[type])
    values = values.astype(np.float32)
    if type is Type.F32 or type is Type.F64 or values.size == 0:
        return values
    holder = Tensor(type, values.shape[::-1])
    return decode_array(holder, encode_array(holder, values.reshape(holder.shape)).tobytes()).reshape(values.shape)


def nmse(reference: Array, values: Array) -> float:
    """Return the squared error divided by the reference's square; equal infinities count as equal."""
    a, b = np.asarray(reference, np.float64), np.asarray(values, np.float64)
    differs = a != b
    error = float(np.sum((a[differs] - b[differs]) ** 2))
    return 0.0 if error == 0 else error / float(np.sum(a**2))


#: The bounds of upstream's tests/test-backend-ops.cpp that are not 1e-7.
_BOUNDS = {
    Op.MUL_MAT: 5e-4,
    Op.MUL_MAT_ID: 5e-4,
    Op.OUT_PROD: 5e-4,
    Op.FLASH_ATTN_EXT: 5e-4,
    Op.SOFT_MAX: 1e-6,
    Op.ARGMAX: 0.0,
    Op.ARGSORT: 0.0,
    Op.TOP_K: 0.0,
    Op.COUNT_EQUAL: 0.0,
}


def nmse_bound(tensor: Tensor) -> float:
    """Return the largest NMSE with which a backend's result counts as correct.

    Notes
    -----
    Mirrors `max_nmse_err` of test-backend-ops. Differs: a quantised result may be off by one step in one of fifty
    elements; upstream allows one element in total, for its shapes and inputs.
    """
    if tensor.op in (Op.SET_ROWS, Op.CPY) and tensor.type.is_quantized:
        bits = 8 if tensor.type is Type.Q8_0 else 5 if tensor.type in (Type.Q5_0, Type.Q5_1) else 4
        return (2.0 / 2**bits) ** 2 / 0.25 / 50
    return _BOUNDS.get(tensor.op, 1e-7)


# -- copies and views ------------------------------------------------------------


@define(Op.DUP, Op.CONT, Op.RESHAPE)
def _same(t: Tensor, src: Sources) -> Array:
    return src[0]


@define(Op.CPY)
def _cpy(t: Tensor, src: Sources) -> Array:
    # from a number to an integer C truncates, as numpy does
    return src[0].astype(np.float64) if t.type not in _INTEGER else np.trunc(src[0])


@define(Op.PERMUTE)
def _permute(t: Tensor, src: Sources) -> Array:
    order = [0] * 4
    for i in range(4):
        order[3 - t.param_i32(i)] = 3 - i
    return src[0].transpose(order)


@define(Op.TRANSPOSE)
def _transpose(t: Tensor, src: Sources) -> Array:
    return src[0].swapaxes(2, 3)


@define(Op.VIEW)
def _view(t: Tensor, src: Sources) -> Array:
    """Return a view of a contiguous source; values of a source with gaps do not determine a view."""
    a = t.src[0]
    assert a is not None
    if not a.is_contiguous() or a.type.block_size != 1:
        raise UnsupportedOpError(t.name, "VIEW", ("ref",), reason="only views of contiguous, unquantised tensors")
    size = a.type.type_size
    offset = (t.view_offs - a.view_offs) // size
    index = offset + sum(
        (np.arange(t.ne[i]) * (t.nb[i] // size)).reshape([-1 if i == j else 1 for j in (3, 2, 1, 0)]) for i in range(4)
    )
    return src[0].reshape(-1)[index]


@define(Op.GET_ROWS)
def _get_rows(t: Tensor, src: Sources) -> Array:
    a, b = src[0], src[1][0]  # b: (ne2, ne1 = upper dimensions, n_index)
    upper3, upper2 = np.ix_(*map(np.arange, a.shape[:2]))
    return a[upper3[..., None], upper2[..., None], b]


@define(Op.SET_ROWS)
def _set_rows(t: Tensor, src: Sources) -> Array:
    b, c, a = src[0], src[1][0], src[2].copy()
    for i3 in range(b.shape[0]):
        for i2 in range(b.shape[1]):
            a[i3, i2, c[i3 % c.shape[0], i2 % c.shape[1]]] = b[i3, i2]
    return a


@define(Op.SET, Op.ACC)
def _set(t: Tensor, src: Sources) -> Array:
    a, b = src[0].copy(), src[1]
    flat, size = a.reshape(-1), t.type.type_size
    nb = (size, *(t.param_i32(i) for i in range(3)))
    index = t.param_i32(3) // size + sum(
        (np.arange(b.shape[3 - i]) * (nb[i] // size)).reshape([-1 if i == j else 1 for j in (3, 2, 1, 0)])
        for i in range(4)
    )
    flat[index] = b if t.op is Op.SET else flat[index] + b
    return a


@define(Op.REPEAT)
def _repeat(t: Tensor, src: Sources) -> Array:
    return np.tile(src[0], [n // m for n, m in zip(t.ne[::-1], src[0].shape, strict=True)])


@define(Op.CONCAT)
def _concat(t: Tensor, src: Sources) -> Array:
    return np.concatenate(src[:2], axis=3 - t.param_i32(0))


@define(Op.PAD)
def _pad(t: Tensor, src: Sources) -> Array:
    widths = [(t.param_i32(2 * i), t.param_i32(2 * i + 1)) for i in (3, 2, 1, 0)]
    return np.pad(src[0], widths, mode="wrap" if t.param_i32(8) else "constant")


@define(Op.ROLL)
def _roll(t: Tensor, src: Sources) -> Array:
    return np.roll(src[0], [t.param_i32(i) for i in range(4)], axis=(3, 2, 1, 0))


@define(Op.DIAG)
def _diag(t: Tensor, src: Sources) -> Array:
    return src[0] * np.eye(t.ne[0])


@define(Op.TRI)
def _tri(t: Tensor, src: Sources) -> Array:
    kind = TriType(t.param_i32(0))
    if kind in (TriType.UPPER, TriType.UPPER_DIAG):
        return np.triu(src[0], 1 if kind is TriType.UPPER else 0)
    return np.tril(src[0], -1 if kind is TriType.LOWER else 0)


@define(Op.FILL)
def _fill(t: Tensor, src: Sources) -> Array:
    return np.full(t.ne[::-1], t.param_f32(0))


@define(Op.ARANGE)
def _arange(t: Tensor, src: Sources) -> Array:
    return t.param_f32(0) + t.param_f32(2) * np.arange(t.ne[0])


# -- arithmetic ------------------------------------------------------------------


def _broadcast(to: Array, b: Array) -> Array:
    return np.tile(b, [n // m if m else 1 for n, m in zip(to.shape, b.shape, strict=True)])


@define(Op.ADD, Op.ADD1)
def _add(t: Tensor, src: Sources) -> Array:
    return src[0] + _broadcast(src[0], src[1])


@define(Op.SUB)
def _sub(t: Tensor, src: Sources) -> Array:
    return src[0] - _broadcast(src[0], src[1])


@define(Op.MUL)
def _mul(t: Tensor, src: Sources) -> Array:
    return src[0] * _broadcast(src[0], src[1])


@define(Op.DIV)
def _div(t: Tensor, src: Sources) -> Array:
    return src[0] / _broadcast(src[0], src[1])


@define(Op.ADD_ID)
def _add_id(t: Tensor, src: Sources) -> Array:
    a, b, ids = src
    return a + b[0, 0][ids[0, 0]]


@define(Op.SQR, Op.SQRT, Op.LOG, Op.SIN, Op.COS)
def _function(t: Tensor, src: Sources) -> Array:
    f: dict[Op, Callable[[Array], Array]] = {
        Op.SQR: np.square,
        Op.SQRT: np.sqrt,
        Op.LOG: np.log,
        Op.SIN: np.sin,
        Op.COS: np.cos,
    }
    return f[t.op](src[0])


@define(Op.SCALE)
def _scale(t: Tensor, src: Sources) -> Array:
    return src[0] * t.param_f32(0) + t.param_f32(1)


@define(Op.CLAMP)
def _clamp(t: Tensor, src: Sources) -> Array:
    return np.clip(src[0], t.param_f32(0), t.param_f32(1))


@define(Op.LEAKY_RELU)
def _leaky_relu(t: Tensor, src: Sources) -> Array:
    return np.where(src[0] > 0, src[0], src[0] * t.param_f32(0))


# -- activations -----------------------------------------------------------------


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x)))


def _gelu_erf(x: Array) -> Array:
    return 0.5 * x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2)))


def _gelu_quick(x: Array) -> Array:
    return x * _sigmoid(1.702 * x)


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _relu(x: Array) -> Array:
    return np.maximum(x, 0)


def _hardsigmoid(x: Array) -> Array:
    return np.clip((x + 3) / 6, 0, 1)


_UNARY: dict[UnaryOp, Callable[[Array], Array]] = {
    UnaryOp.ABS: np.abs,
    UnaryOp.SGN: np.sign,
    UnaryOp.NEG: np.negative,
    UnaryOp.STEP: lambda x: np.where(x > 0, 1.0, 0.0),
    UnaryOp.TANH: np.tanh,
    UnaryOp.ELU: lambda x: np.where(x > 0, x, np.expm1(x)),
    UnaryOp.RELU: _relu,
    UnaryOp.SIGMOID: _sigmoid,
    UnaryOp.GELU: _gelu,
    UnaryOp.GELU_QUICK: _gelu_quick,
    UnaryOp.SILU: _silu,
    UnaryOp.HARDSWISH: lambda x: x * _hardsigmoid(x),
    UnaryOp.HARDSIGMOID: _hardsigmoid,
    UnaryOp.EXP: np.exp,
    UnaryOp.EXPM1: np.expm1,
    UnaryOp.SOFTPLUS: lambda x: np.logaddexp(0, x),
    UnaryOp.GELU_ERF: _gelu_erf,
    UnaryOp.FLOOR: np.floor,
    UnaryOp.CEIL: np.ceil,
    UnaryOp.ROUND: lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x),
    UnaryOp.TRUNC: np.trunc,
}


@define(Op.UNARY)
def _unary(t: Tensor, src: Sources) -> Array:
    op, x = UnaryOp(t.param_i32(0)), src[0]
    if op is UnaryOp.XIELU:
        alpha_n, alpha_p, beta, eps = (t.param_f32(i) for i in range(1, 5))
        negative = (np.expm1(np.minimum(x, eps)) - x) * alpha_n + beta * x
        return np.where(x > 0, alpha_p * x * x + beta * x, negative)
    return _UNARY[op](x)


@define(Op.GLU)
def _glu(t: Tensor, src: Sources) -> Array:
    op = GluOp(t.param_i32(0))
    if src[1].size or t.src[1] is not None:
        gate, up = src[0], src[1]
    else:
        n = t.ne[0]
        gate, up = src[0][..., :n], src[0][..., n : 2 * n]
        if t.param_i32(1):
            gate, up = up, gate
    if op is GluOp.SWIGLU_OAI:
        alpha, limit = t.param_f32(2), t.param_f32(3)
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return gate * _sigmoid(alpha * gate) * (up + 1)
    if op is GluOp.SWIGLU_CLAMP:
        limit = t.param_f32(3)
        return _silu(np.minimum(gate, limit)) * np.clip(up, -limit, limit)
    functions = {
        GluOp.REGLU: _relu,
        GluOp.GEGLU: _gelu,
        GluOp.SWIGLU: _silu,
        GluOp.GEGLU_ERF: _gelu_erf,
        GluOp.GEGLU_QUICK: _gelu_quick,
    }
    return functions[op](gate) * up


# -- along rows ------------------------------------------------------------------


@define(Op.SUM)
def _sum(t: Tensor, src: Sources) -> Array:
    return np.sum(src[0], keepdims=True)


@define(Op.SUM_ROWS)
def _sum_rows(t: Tensor, src: Sources) -> Array:
    return np.sum(src[0], axis=3, keepdims=True)


@define(Op.MEAN)
def _mean(t: Tensor, src: Sources) -> Array:
    return np.mean(src[0], axis=3, keepdims=True)


@define(Op.CUMSUM)
def _cumsum(t: Tensor, src: Sources) -> Array:
    return np.cumsum(src[0], axis=3)


@define(Op.ARGMAX)
def _argmax(t: Tensor, src: Sources) -> Array:
    return np.argmax(src[0], axis=3)


@define(Op.COUNT_EQUAL)
def _count_equal(t: Tensor, src: Sources) -> Array:
    return np.array(np.count_nonzero(src[0] == src[1]))


@define(Op.ARGSORT)
def _argsort(t: Tensor, src: Sources) -> Array:
    sign = -1 if t.param_i32(0) == SortOrder.DESC else 1
    return np.argsort(sign * src[0], axis=3, kind="stable")


@define(Op.TOP_K)
def _top_k(t: Tensor, src: Sources) -> Array:
    """Return the indices by descending value; a backend may order them in any way."""
    return np.argsort(-src[0], axis=3, kind="stable")[..., : t.ne[0]]


@define(Op.NORM)
def _norm(t: Tensor, src: Sources) -> Array:
    centred = src[0] - np.mean(src[0], axis=3, keepdims=True)
    return centred / np.sqrt(np.mean(centred**2, axis=3, keepdims=True) + t.param_f32(0))


@define(Op.RMS_NORM)
def _rms_norm(t: Tensor, src: Sources) -> Array:
    return src[0] / np.sqrt(np.mean(src[0] ** 2, axis=3, keepdims=True) + t.param_f32(0))


@define(Op.L2_NORM)
def _l2_norm(t: Tensor, src: Sources) -> Array:
    return src[0] / np.maximum(np.sqrt(np.sum(src[0] ** 2, axis=3, keepdims=True)), t.param_f32(0))


@define(Op.GROUP_NORM)
def _group_norm(t: Tensor, src: Sources) -> Array:
    out = np.zeros_like(src[0])
    per_group = -(-t.ne[2] // t.param_i32(0))
    for first in range(0, t.ne[2], per_group):
        part = src[0][:, first : first + per_group]
        centred = part - np.mean(part, axis=(1, 2, 3), keepdims=True)
        variance = np.mean(centred**2, axis=(1, 2, 3), keepdims=True)
        out[:, first : first + per_group] = centred / np.sqrt(variance + t.param_f32(1))
    return out


# -- matrices --------------------------------------------------------------------


def spread(a: Array, b: Array) -> Array:
    """Return ``a`` with each upper slice repeated in place until there are as many as of ``b``.

    Notes
    -----
    Mirrors how MUL_MAT broadcasts: adjacent slices share a matrix, whereas ADD repeats the whole tensor.
    """
    return a.repeat(b.shape[1] // a.shape[1], axis=1).repeat(b.shape[0] // a.shape[0], axis=0)


@define(Op.MUL_MAT)
def _mul_mat(t: Tensor, src: Sources) -> Array:
    a, b = src
    return b @ spread(a, b).swapaxes(2, 3)


@define(Op.MUL_MAT_ID)
def _mul_mat_id(t: Tensor, src: Sources) -> Array:
    experts, b, ids = src[0][0], src[1][0], src[2][0, 0]
    n_token, n_used = ids.shape
    rows = b[:, np.arange(n_used) % b.shape[1]]  # (n_token, n_used, k)
    out = np.empty((n_token, n_used, experts.shape[1]))
    for token in range(n_token):
        for slot in range(n_used):
            expert = ids[token, slot]
            out[token, slot] = experts[expert] @ rows[token, slot] if expert >= 0 or not skips_ids(t) else 0.0
    return out


@define(Op.OUT_PROD)
def _out_prod(t: Tensor, src: Sources) -> Array:
    a, b = src
    return b.swapaxes(2, 3) @ spread(a, b)
