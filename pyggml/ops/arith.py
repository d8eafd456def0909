"""Element-wise arithmetic.

The second source of ADD, SUB, MUL and DIV repeats to the shape of the first. The result of ``*_inplace`` is a view of the
first source and uses its memory.
"""

from __future__ import annotations

from ..tensor import Tensor
from ..types import Op, Type
from ._make import can_repeat, f32, in_place, is_padded_1d, like, member, new, refuse
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


dup_inplace = in_place(dup)


# -- two tensors -----------------------------------------------------------------


def _binary(op: Op, a: Tensor, b: Tensor) -> Tensor:
    if not can_repeat(b, a):
        refuse(op.name.lower(), "b does not repeat to the shape of a", a=a, b=b)
    return like(op, a, (a, b))


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


add_inplace = in_place(add)


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
    if b.ne != (1, 1, 1, 1):
        refuse("add1", "b is not a scalar", a=a, b=b)
    if not is_padded_1d(a):
        refuse("add1", "a's rows do not lie at one distance", a=a)
    return like(Op.ADD1, a, (a, b))


add1_inplace = in_place(add1)


def sub(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a - b``; refuses as `add`. Mirrors `ggml_sub`."""
    return _binary(Op.SUB, a, b)


sub_inplace = in_place(sub)


def mul(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a * b``; refuses as `add`. Mirrors `ggml_mul`."""
    return _binary(Op.MUL, a, b)


mul_inplace = in_place(mul)


def div(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a / b``; refuses as `add`. Mirrors `ggml_div`."""
    return _binary(Op.DIV, a, b)


div_inplace = in_place(div)


def _into(op: Op, a: Tensor, b: Tensor, nb: tuple[int, int, int], offset: int) -> Tensor:
    end = offset + b.type.row_size(b.ne[0]) + sum((n - 1) * stride for n, stride in zip(b.ne[1:], nb, strict=True))
    if min(offset, *nb) < 0 or max(offset, *nb) >= 1 << 31 or (not b.is_empty and end > a.nbytes):
        refuse(
            op.name.lower(),
            f"strides {list(nb)} and offset {offset} put b outside the {a.nbytes:,} bytes of a",
            a=a,
            b=b,
        )
    return like(op, a, (a, b), (*nb, offset, 0))


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
    if b.numel > a.numel:
        refuse("acc", "b has more elements than a", a=a, b=b)
    if not a.is_contiguous() or a.type is not Type.F32 or b.type is not Type.F32:
        refuse("acc", "a and b must be f32, a contiguous", a=a, b=b)
    return _into(Op.ACC, a, b, (nb1, nb2, nb3), offset)


acc_inplace = in_place(acc, flag=4)


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
    if b.numel > a.numel:
        refuse("set", "b has more elements than a", a=a, b=b)
    if not 0 <= offset < 1 << 30:
        refuse("set", f"offset {offset} is not in 0..2^30", a=a, b=b)
    return _into(Op.SET, a, b, (nb1, nb2, nb3), offset)


set_inplace = in_place(set, flag=4)


def set_1d(a: Tensor, b: Tensor, offset: int) -> Tensor:
    """`set` with all strides of ``a``. Mirrors `ggml_set_1d`."""
    return set(a, b, *a.nb[1:], offset)


set_1d_inplace = in_place(set_1d, flag=4)


def set_2d(a: Tensor, b: Tensor, nb1: int, offset: int) -> Tensor:
    """`set` with the upper strides of ``a``. Mirrors `ggml_set_2d`."""
    return set(a, b, nb1, *a.nb[2:], offset)


set_2d_inplace = in_place(set_2d, flag=4)


# -- functions of one element ----------------------------------------------------


def sqr(a: Tensor) -> Tensor:
    """Return the squares. Mirrors `ggml_sqr`."""
    return like(Op.SQR, a, (a,))


sqr_inplace = in_place(sqr)


def sqrt(a: Tensor) -> Tensor:
    """Return the square roots. Mirrors `ggml_sqrt`."""
    return like(Op.SQRT, a, (a,))


sqrt_inplace = in_place(sqrt)


def log(a: Tensor) -> Tensor:
    """Return the natural logarithms. Mirrors `ggml_log`."""
    return like(Op.LOG, a, (a,))


log_inplace = in_place(log)


def sin(a: Tensor) -> Tensor:
    """Return the sines. Mirrors `ggml_sin`."""
    return like(Op.SIN, a, (a,))


sin_inplace = in_place(sin)


def cos(a: Tensor) -> Tensor:
    """Return the cosines. Mirrors `ggml_cos`."""
    return like(Op.COS, a, (a,))


cos_inplace = in_place(cos)


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
    return scale_bias(a, s, 0.0)


scale_inplace = in_place(scale)


def scale_bias(a: Tensor, s: float, b: float) -> Tensor:
    """Return ``a * s + b``; refuses as `scale`. Mirrors `ggml_scale_bias`."""
    if not is_padded_1d(a):
        refuse("scale", "a's rows do not lie at one distance", a=a)
    return like(Op.SCALE, a, (a,), (f32(s), f32(b)))


scale_bias_inplace = in_place(scale_bias)


def clamp(a: Tensor, min: float, max: float) -> Tensor:
    """Return ``a`` limited to ``min .. max``.

    Notes
    -----
    Mirrors `ggml_clamp` since ggml 0.26; earlier, upstream's was in place, as `clamp_inplace` is.
    """
    return like(Op.CLAMP, a, (a,), (f32(min), f32(max)))


clamp_inplace = in_place(clamp)


def leaky_relu(a: Tensor, negative_slope: float, inplace: bool) -> Tensor:
    """Return ``a`` where positive, else ``a * negative_slope``. Mirrors `ggml_leaky_relu`."""
    return like(Op.LEAKY_RELU, a, (a,), (f32(negative_slope),), inplace)


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
    if (a.type is not Type.F32 and a.type is not Type.F16) or not a.is_contiguous():
        refuse("fill", "a must be contiguous f32 or f16", a=a)
    return like(Op.FILL, a, (a,), (f32(c),))


fill_inplace = in_place(fill)


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
