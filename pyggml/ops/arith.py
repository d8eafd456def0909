"""Element-wise arithmetic.

The second source of ADD, SUB, MUL and DIV repeats to the shape of the first. The result of ``*_inplace`` is a view of the
first source and uses its memory.
"""

from __future__ import annotations

from ..tensor import Tensor
from ..types import Op, Type
from ._make import (
    can_repeat,
    f32,
    is_padded_1d,
    like,
    member,
    new,
    refuse,
)
from .modes import TriType

__all__ = [
    "acc", "acc_inplace", "add", "add1", "add1_inplace", "add_cast", "add_id", "add_inplace", "clamp",
    "clamp_inplace", "cos", "cos_inplace", "div", "div_inplace", "dup", "dup_inplace", "fill", "fill_inplace",
    "leaky_relu", "log", "log_inplace", "mul", "mul_inplace", "scale", "scale_bias", "scale_bias_inplace",
    "scale_inplace", "set", "set_1d", "set_1d_inplace", "set_2d", "set_2d_inplace", "set_inplace", "sin",
    "sin_inplace", "sqr", "sqr_inplace", "sqrt", "sqrt_inplace", "sub", "sub_inplace", "tri",
]  # fmt: skip


def dup(a: Tensor) -> Tensor:
    """Copy. Mirrors `ggml_dup`."""
    return like(Op.DUP, a, (a,))


def dup_inplace(a: Tensor) -> Tensor:
    """DUP in place: the result is a view of ``a``. Mirrors `ggml_dup_inplace`."""
    return like(Op.DUP, a, (a,), (), True)


# -- two tensors -----------------------------------------------------------------


def _binary(op: Op, a: Tensor, b: Tensor, inplace: bool = False) -> Tensor:
    if not can_repeat(b, a):
        refuse(op.name.lower(), "b does not repeat to the shape of a", a=a, b=b)
    return like(op, a, (a, b), (), inplace)


def add(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a + b``.

    Raises
    ------
    ShapeError
        ``b`` does not repeat to the shape of ``a``.

    Notes
    -----
    Mirrors `ggml_add`.
    """
    return _binary(Op.ADD, a, b)


def add_inplace(a: Tensor, b: Tensor) -> Tensor:
    """`add` in place: the result is a view of ``a``."""
    return _binary(Op.ADD, a, b, True)


def add_cast(a: Tensor, b: Tensor, type: Type | str) -> Tensor:
    """Return ``a + b`` as another type.

    Raises
    ------
    ShapeError
        The rows of ``b`` do not repeat to ``a``, or ``a`` is neither quantised nor f16 nor bf16.

    Notes
    -----
    Mirrors `ggml_add_cast`.
    """
    if a.ne[0] != b.ne[0] or not can_repeat(b, a):
        refuse("add_cast", "the rows of b do not repeat to the shape of a", a=a, b=b)
    if not a.type.is_quantized and a.type is not Type.F16 and a.type is not Type.BF16:
        refuse("add_cast", "a must be quantised, f16 or bf16", a=a)
    return new(Op.ADD, Type.of(type), a.ne, (a, b))


def add_id(a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    """Add to each row of ``a`` the row of ``b`` that its id names.

    Parameters
    ----------
    a : Tensor, [n, n_used, n_token]
    b : Tensor, [n, n_expert]
    ids : Tensor, i32, [n_used, n_token]

    Raises
    ------
    ShapeError
        Shapes do not fit, or ``ids`` is not i32.

    Notes
    -----
    Mirrors `ggml_add_id`.
    """
    if a.ne[0] != b.ne[0]:
        refuse("add_id", "the rows of a and b differ in length", a=a, b=b)
    if a.ne[1] != ids.ne[0] or a.ne[2] != ids.ne[1]:
        refuse("add_id", "there is not one id for each row of a", a=a, ids=ids)
    if ids.type is not Type.I32:
        refuse("add_id", "ids must be i32", ids=ids)
    return like(Op.ADD_ID, a, (a, b, ids))


def _add1(a: Tensor, b: Tensor, inplace: bool) -> Tensor:
    if b.ne != (1, 1, 1, 1):
        refuse("add1", "b is not a scalar", a=a, b=b)
    if not is_padded_1d(a):
        refuse("add1", "a's rows do not lie at one distance", a=a)
    return like(Op.ADD1, a, (a, b), (), inplace)


def add1(a: Tensor, b: Tensor) -> Tensor:
    """Add the scalar ``b`` to each element.

    Raises
    ------
    ShapeError
        ``b`` has more than one element, or a's rows do not lie at one distance.

    Notes
    -----
    Mirrors `ggml_add1`.
    """
    return _add1(a, b, False)


def add1_inplace(a: Tensor, b: Tensor) -> Tensor:
    """`add1` in place: the result is a view of ``a``."""
    return _add1(a, b, True)


def sub(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a - b``; refuses as `add`. Mirrors `ggml_sub`."""
    return _binary(Op.SUB, a, b)


def sub_inplace(a: Tensor, b: Tensor) -> Tensor:
    """`sub` in place: the result is a view of ``a``."""
    return _binary(Op.SUB, a, b, True)


def mul(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a * b``; refuses as `add`. Mirrors `ggml_mul`."""
    return _binary(Op.MUL, a, b)


def mul_inplace(a: Tensor, b: Tensor) -> Tensor:
    """`mul` in place: the result is a view of ``a``."""
    return _binary(Op.MUL, a, b, True)


def div(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a / b``; refuses as `add`. Mirrors `ggml_div`."""
    return _binary(Op.DIV, a, b)


def div_inplace(a: Tensor, b: Tensor) -> Tensor:
    """`div` in place: the result is a view of ``a``."""
    return _binary(Op.DIV, a, b, True)


def _into(op: Op, a: Tensor, b: Tensor, nb: tuple[int, int, int], offset: int, inplace: bool) -> Tensor:
    end = offset + b.type.row_size(b.ne[0]) + sum((n - 1) * stride for n, stride in zip(b.ne[1:], nb, strict=True))
    if min(offset, *nb) < 0 or max(offset, *nb) >= 1 << 31 or (not b.is_empty and end > a.nbytes):
        refuse(
            op.name.lower(),
            f"strides {list(nb)} and offset {offset} put b outside the {a.nbytes:,} bytes of a",
            a=a,
            b=b,
        )
    return like(op, a, (a, b), (*nb, offset, int(inplace)), inplace)


def _acc(a: Tensor, b: Tensor, nb: tuple[int, int, int], offset: int, inplace: bool) -> Tensor:
    if b.numel > a.numel:
        refuse("acc", "b has more elements than a", a=a, b=b)
    if not a.is_contiguous() or a.type is not Type.F32 or b.type is not Type.F32:
        refuse("acc", "a and b must be f32, a contiguous", a=a, b=b)
    return _into(Op.ACC, a, b, nb, offset, inplace)


def acc(a: Tensor, b: Tensor, nb1: int, nb2: int, nb3: int, offset: int) -> Tensor:
    """Return ``a`` with ``b`` added to the view of it that strides and offset (bytes) describe.

    Raises
    ------
    ShapeError
        ``b`` has more elements or would end past ``a``, either is not f32, or ``a`` is not contiguous.

    Notes
    -----
    Mirrors `ggml_acc`.
    """
    return _acc(a, b, (nb1, nb2, nb3), offset, False)


def acc_inplace(a: Tensor, b: Tensor, nb1: int, nb2: int, nb3: int, offset: int) -> Tensor:
    """`acc` in place: the result is a view of ``a``."""
    return _acc(a, b, (nb1, nb2, nb3), offset, True)


def _set(a: Tensor, b: Tensor, nb: tuple[int, int, int], offset: int, inplace: bool) -> Tensor:
    if b.numel > a.numel:
        refuse("set", "b has more elements than a", a=a, b=b)
    if not 0 <= offset < 1 << 30:
        refuse("set", f"offset {offset} is not in 0..2^30", a=a, b=b)
    return _into(Op.SET, a, b, nb, offset, inplace)


def set(a: Tensor, b: Tensor, nb1: int, nb2: int, nb3: int, offset: int) -> Tensor:
    """Return ``a`` with ``b`` written to the view of it that strides and offset (bytes) describe.

    Raises
    ------
    ShapeError
        ``b`` has more elements or would end past ``a``, or the offset is 2^30 or more.

    Notes
    -----
    Mirrors `ggml_set`.
    """
    return _set(a, b, (nb1, nb2, nb3), offset, False)


def set_inplace(a: Tensor, b: Tensor, nb1: int, nb2: int, nb3: int, offset: int) -> Tensor:
    """`set` in place: the result is a view of ``a``."""
    return _set(a, b, (nb1, nb2, nb3), offset, True)


def set_1d(a: Tensor, b: Tensor, offset: int) -> Tensor:
    """`set` with all strides of ``a``. Mirrors `ggml_set_1d`."""
    return _set(a, b, a.nb[1:], offset, False)


def set_1d_inplace(a: Tensor, b: Tensor, offset: int) -> Tensor:
    """`set_1d` in place: the result is a view of ``a``."""
    return _set(a, b, a.nb[1:], offset, True)


def set_2d(a: Tensor, b: Tensor, nb1: int, offset: int) -> Tensor:
    """`set` with the upper strides of ``a``. Mirrors `ggml_set_2d`."""
    return _set(a, b, (nb1, a.nb[2], a.nb[3]), offset, False)


def set_2d_inplace(a: Tensor, b: Tensor, nb1: int, offset: int) -> Tensor:
    """`set_2d` in place: the result is a view of ``a``."""
    return _set(a, b, (nb1, a.nb[2], a.nb[3]), offset, True)


# -- functions of one element ----------------------------------------------------


def sqr(a: Tensor) -> Tensor:
    """Return the squares. Mirrors `ggml_sqr`."""
    return like(Op.SQR, a, (a,))


def sqr_inplace(a: Tensor) -> Tensor:
    """`sqr` in place: the result is a view of ``a``."""
    return like(Op.SQR, a, (a,), (), True)


def sqrt(a: Tensor) -> Tensor:
    """Return the square roots. Mirrors `ggml_sqrt`."""
    return like(Op.SQRT, a, (a,))


def sqrt_inplace(a: Tensor) -> Tensor:
    """`sqrt` in place: the result is a view of ``a``."""
    return like(Op.SQRT, a, (a,), (), True)


def log(a: Tensor) -> Tensor:
    """Return the natural logarithms. Mirrors `ggml_log`."""
    return like(Op.LOG, a, (a,))


def log_inplace(a: Tensor) -> Tensor:
    """`log` in place: the result is a view of ``a``."""
    return like(Op.LOG, a, (a,), (), True)


def sin(a: Tensor) -> Tensor:
    """Return the sines. Mirrors `ggml_sin`."""
    return like(Op.SIN, a, (a,))


def sin_inplace(a: Tensor) -> Tensor:
    """`sin` in place: the result is a view of ``a``."""
    return like(Op.SIN, a, (a,), (), True)


def cos(a: Tensor) -> Tensor:
    """Return the cosines. Mirrors `ggml_cos`."""
    return like(Op.COS, a, (a,))


def cos_inplace(a: Tensor) -> Tensor:
    """`cos` in place: the result is a view of ``a``."""
    return like(Op.COS, a, (a,), (), True)


def _scale(a: Tensor, s: float, b: float, inplace: bool) -> Tensor:
    if not is_padded_1d(a):
        refuse("scale", "a's rows do not lie at one distance", a=a)
    return like(Op.SCALE, a, (a,), (f32(s), f32(b)), inplace)


def scale(a: Tensor, s: float) -> Tensor:
    """Return ``a * s``.

    Raises
    ------
    ShapeError
        a's rows do not lie at one distance.

    Notes
    -----
    Mirrors `ggml_scale`.
    """
    return _scale(a, s, 0.0, False)


def scale_inplace(a: Tensor, s: float) -> Tensor:
    """`scale` in place: the result is a view of ``a``."""
    return _scale(a, s, 0.0, True)


def scale_bias(a: Tensor, s: float, b: float) -> Tensor:
    """Return ``a * s + b``; refuses as `scale`. Mirrors `ggml_scale_bias`."""
    return _scale(a, s, b, False)


def scale_bias_inplace(a: Tensor, s: float, b: float) -> Tensor:
    """`scale_bias` in place: the result is a view of ``a``."""
    return _scale(a, s, b, True)


def clamp(a: Tensor, min: float, max: float) -> Tensor:
    """Return ``a`` limited to ``min .. max``.

    Notes
    -----
    Mirrors `ggml_clamp` since ggml 0.26; earlier, upstream's was in place, as `clamp_inplace` is.
    """
    return like(Op.CLAMP, a, (a,), (f32(min), f32(max)))


def clamp_inplace(a: Tensor, min: float, max: float) -> Tensor:
    """`clamp` in place: the result is a view of ``a``."""
    return like(Op.CLAMP, a, (a,), (f32(min), f32(max)), True)


def leaky_relu(a: Tensor, negative_slope: float, inplace: bool) -> Tensor:
    """Return ``a`` where positive, else ``a * negative_slope``. Mirrors `ggml_leaky_relu`."""
    return like(Op.LEAKY_RELU, a, (a,), (f32(negative_slope),), inplace)


def _fill(a: Tensor, c: float, inplace: bool) -> Tensor:
    if (a.type is not Type.F32 and a.type is not Type.F16) or not a.is_contiguous():
        refuse("fill", "a must be contiguous f32 or f16", a=a)
    return like(Op.FILL, a, (a,), (f32(c),), inplace)


def fill(a: Tensor, c: float) -> Tensor:
    """Return a tensor of the shape of ``a`` filled with ``c``.

    Raises
    ------
    ShapeError
        ``a`` is not contiguous, or neither f32 nor f16.

    Notes
    -----
    Mirrors `ggml_fill`.
    """
    return _fill(a, c, False)


def fill_inplace(a: Tensor, c: float) -> Tensor:
    """`fill` in place: the result is a view of ``a``."""
    return _fill(a, c, True)


def tri(a: Tensor, type: TriType | int) -> Tensor:
    """Return ``a`` with zeros outside one triangle of each matrix.

    Raises
    ------
    ShapeError
        ``a`` is not square, contiguous f32.

    Notes
    -----
    Mirrors `ggml_tri`.
    """
    if a.type is not Type.F32 or not a.is_contiguous() or a.ne[0] != a.ne[1]:
        refuse("tri", "a must be square, contiguous f32", a=a)
    return like(Op.TRI, a, (a,), (int(member(TriType, type)),))
