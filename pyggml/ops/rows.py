"""Ops that combine elements of a row or dimension: reduce, sort, extend, repeat, normalise."""

from __future__ import annotations

from math import ceil, isfinite

from ..tensor import Tensor
from ..types import MAX_DIMS, Op, Type
from ._make import (
    can_repeat,
    divides,
    f32,
    in_place,
    is_matrix,
    like,
    member,
    new,
    refuse,
    require_sizes,
    round_f32,
    set_param,
)  # fmt: skip
from .layout import view_4d
from .modes import SortOrder

__all__ = [
    "arange", "argmax", "argsort", "argsort_top_k", "concat", "count_equal", "cumsum", "diag", "group_norm",
    "group_norm_inplace", "l2_norm", "l2_norm_inplace", "mean", "norm", "norm_inplace", "pad", "pad_circular",
    "pad_ext", "pad_ext_circular", "repeat", "repeat_4d", "rms_norm", "rms_norm_inplace", "roll", "sum", "sum_rows",
    "top_k",
]  # fmt: skip

INT32_MAX = 2**31 - 1


# -- along rows ------------------------------------------------------------------


def sum(a: Tensor) -> Tensor:
    """Return the sum of all elements: one element of a's type. Mirrors `ggml_sum`."""
    return new(Op.SUM, a.type, (1,), (a,))


def sum_rows(a: Tensor) -> Tensor:
    """Return the sum of each row, [1, ne1, ne2, ne3]. Mirrors `ggml_sum_rows`."""
    return new(Op.SUM_ROWS, a.type, (1, *a.ne[1:]), (a,))


def mean(a: Tensor) -> Tensor:
    """Return the mean of each row: f32, [1, ne1, ne2, ne3]. Mirrors `ggml_mean`."""
    return new(Op.MEAN, Type.F32, (1, *a.ne[1:]), (a,))


def cumsum(a: Tensor) -> Tensor:
    """Return the running sums of each row.

    Raises
    ------
    ShapeError
        ``a`` is not f32.

    Notes
    -----
    Mirrors `ggml_cumsum`.
    """
    if a.type is not Type.F32:
        refuse("cumsum", "a must be f32", a=a)
    return like(Op.CUMSUM, a, (a,))


def argmax(a: Tensor) -> Tensor:
    """Return the index of the largest element of each row: i32, [ne1].

    Raises
    ------
    ShapeError
        ``a`` is not a matrix.

    Notes
    -----
    Mirrors `ggml_argmax`.
    """
    if not is_matrix(a) or a.ne[0] > INT32_MAX:
        refuse("argmax", "a must have two dimensions, with rows of at most 2^31 - 1", a=a)
    return new(Op.ARGMAX, Type.I32, (a.ne[1],), (a,))


def count_equal(a: Tensor, b: Tensor) -> Tensor:
    """Return how many elements of ``a`` and ``b`` are equal: one i64.

    Raises
    ------
    ShapeError
        The shapes differ.

    Notes
    -----
    Mirrors `ggml_count_equal`.
    """
    if a.ne != b.ne:
        refuse("count_equal", "the shapes differ", a=a, b=b)
    return new(Op.COUNT_EQUAL, Type.I64, (1,), (a, b))


def argsort(a: Tensor, order: SortOrder | int) -> Tensor:
    """Return the indices that sort each row: i32, the shape of ``a``; refuse an order that is none. Mirrors `ggml_argsort`."""
    if a.ne[0] > INT32_MAX:
        refuse("argsort", "indices do not fit in i32", a=a)
    return new(Op.ARGSORT, Type.I32, a.ne, (a,), (int(member(SortOrder, order)),))


def argsort_top_k(a: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest of each row, descending: a view of `argsort`.

    Raises
    ------
    ShapeError
        A row has fewer than k elements.

    Notes
    -----
    Mirrors `ggml_argsort_top_k`.
    """
    require_sizes("argsort_top_k", k)
    if a.ne[0] < k:
        refuse("argsort_top_k", f"no {k} of {a.ne[0]}", a=a)
    s = argsort(a, SortOrder.DESC)
    return view_4d(s, k, s.ne[1], s.ne[2], s.ne[3], s.nb[1], s.nb[2], s.nb[3], 0)


def top_k(a: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest of each row, in any order: i32, [k, ne1, ne2, ne3].

    Raises
    ------
    ShapeError
        A row has fewer than k elements.

    Notes
    -----
    Mirrors `ggml_top_k`.
    """
    require_sizes("top_k", k)
    if a.ne[0] < k:
        refuse("top_k", f"no {k} of {a.ne[0]}", a=a)
    return new(Op.TOP_K, Type.I32, (k, *a.ne[1:]), (a,))


def arange(start: float, stop: float, step: float) -> Tensor:
    """Return ``start, start + step, ...`` below ``stop``: f32, one dimension.

    Raises
    ------
    ShapeError
        There would be no element, or at least 2^31.

    Notes
    -----
    Mirrors `ggml_arange`, whose arithmetic is in float32.
    """
    start, stop, step = round_f32(start), round_f32(stop), round_f32(step)
    if not stop > start or not step > 0:
        refuse("arange", f"there is no element from {start} to {stop} with step {step}")
    if not isfinite(stop - start) or (stop - start) / step >= 1 << 31:
        refuse("arange", f"there are too many elements from {start} to {stop} with step {step}")
    n_step = ceil(round_f32(round_f32(stop - start) / step))
    return new(Op.ARANGE, Type.F32, (n_step,), (), (f32(start), f32(stop), f32(step)))


# -- shape -----------------------------------------------------------------------


def repeat(a: Tensor, b: Tensor) -> Tensor:
    """Repeat ``a`` to the shape of ``b``.

    Raises
    ------
    ShapeError
        The shape of ``b`` is not a multiple of that of ``a``.

    Notes
    -----
    Mirrors `ggml_repeat`: only the shape of ``b`` is used; ``b`` is not a source.
    """
    if not can_repeat(a, b):
        refuse("repeat", "a does not repeat to the shape of b", a=a, b=b)
    return new(Op.REPEAT, a.type, b.ne, (a,))


def repeat_4d(a: Tensor, ne0: int, ne1: int, ne2: int, ne3: int) -> Tensor:
    """Repeat ``a`` to a shape; refuses as `repeat`. Mirrors `ggml_repeat_4d`."""
    ne = (ne0, ne1, ne2, ne3)
    require_sizes("repeat", *ne)
    if not a.is_empty and not all(divides(n, m) for n, m in zip(a.ne, ne, strict=True)):
        refuse("repeat", f"a does not repeat to {list(ne)}", a=a)
    return new(Op.REPEAT, a.type, ne, (a,))


def concat(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Append ``b`` to ``a`` along dimension ``dim``.

    Raises
    ------
    ShapeError
        The types differ, or another dimension does, or there is no such dimension.

    Notes
    -----
    Mirrors `ggml_concat`.
    """
    if not 0 <= dim < MAX_DIMS:
        refuse("concat", f"there is no dimension {dim}", a=a, b=b)
    if a.type is not b.type:
        refuse("concat", "the types differ", a=a, b=b)
    ne = list(b.ne)
    ne[dim] = a.ne[dim]
    if tuple(ne) != a.ne:
        refuse("concat", f"the shapes differ in more than dimension {dim}", a=a, b=b)
    ne[dim] += b.ne[dim]
    return new(Op.CONCAT, a.type, ne, (a, b), (int(dim),))


def diag(a: Tensor) -> Tensor:
    """Put each row on the diagonal of a matrix of zeros.

    Raises
    ------
    ShapeError
        A matrix of ``a`` has more than one row.

    Notes
    -----
    Mirrors `ggml_diag`.
    """
    if a.ne[1] != 1:
        refuse("diag", "dimension 1 of a must be 1", a=a)
    return new(Op.DIAG, a.type, (a.ne[0], a.ne[0], a.ne[2], a.ne[3]), (a,))


def pad_ext(a: Tensor, lp0: int, rp0: int, lp1: int, rp1: int, lp2: int, rp2: int, lp3: int, rp3: int) -> Tensor:
    """Add zeros before (``lp``) and after (``rp``) each dimension. Mirrors `ggml_pad_ext`.

    Raises
    ------
    ShapeError
        A dimension would get fewer than 0 elements.
    """
    ne = (a.ne[0] + lp0 + rp0, a.ne[1] + lp1 + rp1, a.ne[2] + lp2 + rp2, a.ne[3] + lp3 + rp3)
    require_sizes("pad", *ne)
    return new(Op.PAD, a.type, ne, (a,), (lp0, rp0, lp1, rp1, lp2, rp2, lp3, rp3, 0))


def pad(a: Tensor, p0: int, p1: int, p2: int, p3: int) -> Tensor:
    """Add zeros after each dimension. Mirrors `ggml_pad`."""
    return pad_ext(a, 0, p0, 0, p1, 0, p2, 0, p3)


def pad_ext_circular(
    a: Tensor, lp0: int, rp0: int, lp1: int, rp1: int, lp2: int, rp2: int, lp3: int, rp3: int
) -> Tensor:
    """`pad_ext` with elements from the other end instead of zeros. Mirrors `ggml_pad_ext_circular`."""
    result = pad_ext(a, lp0, rp0, lp1, rp1, lp2, rp2, lp3, rp3)
    set_param(result, 8, 1)
    return result


def pad_circular(a: Tensor, p0: int, p1: int, p2: int, p3: int) -> Tensor:
    """`pad` with elements from the other end instead of zeros. Mirrors `ggml_pad_circular`."""
    return pad_ext_circular(a, 0, p0, 0, p1, 0, p2, 0, p3)


def roll(a: Tensor, shift0: int, shift1: int, shift2: int, shift3: int) -> Tensor:
    """Shift each dimension cyclically.

    Raises
    ------
    ShapeError
        A shift is as long as its dimension, or rows have gaps.

    Notes
    -----
    Mirrors `ggml_roll`.
    """
    shifts = (shift0, shift1, shift2, shift3)
    if a.nb[0] != a.type.type_size:
        refuse("roll", "a's rows must be dense", a=a)
    if any(not -n < shift < n for shift, n in zip(shifts, a.ne, strict=True)):
        refuse("roll", f"shifts {list(shifts)} must be shorter than the dimensions", a=a)
    return like(Op.ROLL, a, (a,), shifts)


# -- norms -----------------------------------------------------------------------


def norm(a: Tensor, eps: float) -> Tensor:
    """Normalise each row to mean 0 and variance 1. Mirrors `ggml_norm`."""
    return like(Op.NORM, a, (a,), (f32(eps),))


norm_inplace = in_place(norm)


def rms_norm(a: Tensor, eps: float) -> Tensor:
    """Divide each row by the root of its mean square plus ``eps``. Mirrors `ggml_rms_norm`."""
    return like(Op.RMS_NORM, a, (a,), (f32(eps),))


rms_norm_inplace = in_place(rms_norm)


def l2_norm(a: Tensor, eps: float) -> Tensor:
    """Divide each row by its length, or by ``eps`` if that is larger. Mirrors `ggml_l2_norm`."""
    return like(Op.L2_NORM, a, (a,), (f32(eps),))


l2_norm_inplace = in_place(l2_norm)


def group_norm(a: Tensor, n_groups: int, eps: float) -> Tensor:
    """Normalise each of ``n_groups`` groups of channels (dimension 2) to mean 0 and variance 1. Mirrors `ggml_group_norm`."""
    return like(Op.GROUP_NORM, a, (a,), (int(n_groups), f32(eps)))


group_norm_inplace = in_place(group_norm)
