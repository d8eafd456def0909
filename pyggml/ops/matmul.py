"""Matrix multiplication: MUL_MAT, MUL_MAT_ID, OUT_PROD, and their precision."""

from __future__ import annotations

from ..tensor import Tensor
from ..types import MAX_SRC, Op, Type
from ._make import can_mul_mat, divides, new, refuse, set_param
from .modes import SKIP_PARAM, OpHint, Prec

__all__ = [
    "mul_mat", "mul_mat_id", "mul_mat_set_hint", "mul_mat_set_prec", "out_prod", "prec_set_acc", "prec_set_src",
]  # fmt: skip


def mul_mat(a: Tensor, b: Tensor) -> Tensor:
    """Multiply each row of ``b`` by the matrix ``a``: row i of the result has the dot products with b's row i.

    Parameters
    ----------
    a : Tensor, [k, n, na2, na3]
        Broadcast over dimensions 2 and 3.
    b : Tensor, [k, m, nb2, nb3]

    Returns
    -------
    Tensor
        f32, [n, m, nb2, nb3]

    Raises
    ------
    ShapeError
        The rows differ in length, ``a`` does not broadcast to ``b``, or ``a`` is transposed.

    Notes
    -----
    Mirrors `ggml_mul_mat`.
    """
    if not can_mul_mat(a, b):
        refuse("mul_mat", "a's rows do not fit b's, or its matrices do not broadcast to b's", a=a, b=b)
    if a.is_transposed:
        refuse("mul_mat", "a is transposed; make it contiguous first", a=a, b=b)
    ne = (a.ne[1], b.ne[1], b.ne[2], b.ne[3])
    return new(Op.MUL_MAT, Type.F32, ne, (a, b))


def mul_mat_id(as_: Tensor, b: Tensor, ids: Tensor, *, skip_negative: bool = False) -> Tensor:
    """Multiply each token's rows of ``b`` by the matrices of the experts that its ids name.

    Parameters
    ----------
    as_ : Tensor, [k, n, n_expert]
    b : Tensor, [k, n_used or a divisor of it, n_token]
    ids : Tensor, i32, [n_used, n_token]
    skip_negative : bool
        Allow negative ids: their rows of the result are 0, and no expert is read for them.

    Returns
    -------
    Tensor
        f32, [n, n_used, n_token]

    Raises
    ------
    ShapeError
        Shapes do not fit, ``ids`` is not i32, or ``as_`` is transposed.

    Notes
    -----
    Mirrors `ggml_mul_mat_id`. Differs: upstream has no ``skip_negative``; only the host's kernels compute it.
    """
    if as_.is_transposed:
        refuse("mul_mat_id", "as is transposed; make it contiguous first", **{"as": as_})
    ne_a, ne_b, ne_i = as_.ne, b.ne, ids.ne
    if ids.type is not Type.I32:
        refuse("mul_mat_id", "ids must be i32", ids=ids)
    if ne_a[3] != 1 or ne_b[3] != 1 or ne_i[2] != 1 or ne_i[3] != 1:
        refuse("mul_mat_id", "as and b have 3 dimensions, ids 2", **{"as": as_}, b=b, ids=ids)
    if ne_i[1] != ne_b[2]:
        refuse("mul_mat_id", f"ids are for {ne_i[1]} tokens, b has {ne_b[2]}", b=b, ids=ids)
    if ne_a[0] != ne_b[0]:
        refuse("mul_mat_id", "the rows of as and b differ in length", **{"as": as_}, b=b)
    if not divides(ne_b[1], ne_i[0]):
        refuse("mul_mat_id", f"{ne_b[1]} rows per token do not broadcast to {ne_i[0]} ids", b=b, ids=ids)
    made = new(Op.MUL_MAT_ID, Type.F32, (ne_a[1], ne_i[0], ne_b[2], 1), (as_, b, ids))
    if skip_negative:
        set_param(made, SKIP_PARAM, 1)
    return made


def out_prod(a: Tensor, b: Tensor) -> Tensor:
    """Add up the outer products of the rows of ``a`` and ``b``.

    Parameters
    ----------
    a : Tensor, [m, n, na2, na3]
        Broadcast over dimensions 2 and 3.
    b : Tensor, [p, n, nb2, nb3]

    Returns
    -------
    Tensor
        f32, [m, p, nb2, nb3]

    Raises
    ------
    ShapeError
        Shapes do not fit, or ``a`` is transposed.

    Notes
    -----
    Mirrors `ggml_out_prod`.
    """
    if a.ne[1] != b.ne[1] or not divides(a.ne[2], b.ne[2]) or not divides(a.ne[3], b.ne[3]):
        refuse("out_prod", "a and b differ in rows, or a does not broadcast to b", a=a, b=b)
    if a.is_transposed:
        refuse("out_prod", "a is transposed; make it contiguous first", a=a, b=b)
    return new(Op.OUT_PROD, Type.F32, (a.ne[0], b.ne[0], b.ne[2], b.ne[3]), (a, b))


def prec_set_acc(a: Tensor, prec: Prec | int) -> bool:
    """Set the minimum precision of the sums of a MUL_MAT, MUL_MAT_ID or FLASH_ATTN_EXT; return False for another op.

    Notes
    -----
    Mirrors `ggml_prec_set_acc`.
    """
    if a.op is Op.MUL_MAT or a.op is Op.MUL_MAT_ID:
        set_param(a, 0, int(prec))
    elif a.op is Op.FLASH_ATTN_EXT:
        set_param(a, 3, int(prec))
    else:
        return False
    return True


def prec_set_src(a: Tensor, prec: Prec | int, idx: int) -> bool:
    """Set the minimum precision to which source ``idx`` of a product is converted; return False if that is not possible.

    Raises
    ------
    ShapeError
        No tensor has a source ``idx``.

    Notes
    -----
    Mirrors `ggml_prec_set_src`: only source 1 of MUL_MAT and MUL_MAT_ID is converted.
    """
    if not 0 <= idx < MAX_SRC:
        refuse("prec_set_src", f"no op has a source {idx}", a=a)
    if (a.op is not Op.MUL_MAT and a.op is not Op.MUL_MAT_ID) or idx != 1:
        return False
    set_param(a, 2 + idx, int(prec))
    return True


def mul_mat_set_prec(a: Tensor, prec: Prec | int) -> None:
    """Set the minimum precision of a MUL_MAT's sums.

    Raises
    ------
    ShapeError
        ``a`` is another op.

    Notes
    -----
    Mirrors `ggml_mul_mat_set_prec`.
    """
    if a.op is not Op.MUL_MAT:
        refuse("mul_mat_set_prec", f"a is made by {a.op.name}, not MUL_MAT", a=a)
    set_param(a, 0, int(prec))


def mul_mat_set_hint(a: Tensor, hint: OpHint | int) -> None:
    """Set what a MUL_MAT may assume about its first source.

    Raises
    ------
    ShapeError
        ``a`` is another op.

    Notes
    -----
    Mirrors `ggml_mul_mat_set_hint`.
    """
    if a.op is not Op.MUL_MAT:
        refuse("mul_mat_set_hint", f"a is made by {a.op.name}, not MUL_MAT", a=a)
    set_param(a, 1, int(hint))
