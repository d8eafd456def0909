"""Hyper-connections of DeepSeek V4, which keep several residual streams: DSV4_HC_COMB, DSV4_HC_PRE, DSV4_HC_POST."""

from __future__ import annotations

from ..tensor import Tensor
from ..types import Op, Type
from ._make import f32, i32, is_matrix, is_vector, new, refuse

__all__ = ["dsv4_hc_comb", "dsv4_hc_post", "dsv4_hc_pre", "dsv4_hc_pre_gated"]

_N_STREAM = 4


def _require_f32(op: str, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.type is not Type.F32:
            refuse(op, f"{name} is not f32", **{name: t})


def dsv4_hc_comb(mixes: Tensor, scale: Tensor, base: Tensor, eps: float, n_iter: int) -> Tensor:
    """Make the matrices that mix 4 streams: a softmax of each row, then columns and rows divided by their sums in turn.

    Parameters
    ----------
    mixes : Tensor, f32, [24, n_token]
        The last 16 of each row are read.
    scale : Tensor, f32, [at least 3]
        The third is read.
    base : Tensor, f32, [24]
    eps : float
        Added to the softmax and to each sum.
    n_iter : int
        How often columns are divided.

    Returns
    -------
    Tensor
        f32, [4 (to), 4 (from), n_token]

    Raises
    ------
    ShapeError
        Shapes or types do not fit, or ``n_iter`` is below 1.

    Notes
    -----
    Mirrors `ggml_dsv4_hc_comb`.
    """
    _require_f32("dsv4_hc_comb", mixes=mixes, scale=scale, base=base)
    if i32(n_iter) < 1:
        refuse("dsv4_hc_comb", f"columns cannot be divided {n_iter} times", mixes=mixes)
    n = (2 + _N_STREAM) * _N_STREAM
    if mixes.ne[0] != n or not is_matrix(mixes):
        refuse("dsv4_hc_comb", f"mixes has not {n} for each token", mixes=mixes)
    if scale.ne[0] < 3 or base.ne[0] != n or not is_vector(scale) or not is_vector(base):
        refuse("dsv4_hc_comb", f"scale has fewer than 3, or base not {n} elements", scale=scale, base=base)
    ne = (_N_STREAM, _N_STREAM, mixes.ne[1])
    return new(Op.DSV4_HC_COMB, Type.F32, ne, (mixes, scale, base), (f32(eps), i32(n_iter)))


def dsv4_hc_pre(x: Tensor, weights: Tensor) -> Tensor:
    """Add up the streams of x, each weighted.

    Parameters
    ----------
    x : Tensor, f32, [n, n_stream, n_token]
    weights : Tensor, f32, [n_stream, n_token]

    Returns
    -------
    Tensor
        f32, [n, n_token]

    Raises
    ------
    ShapeError
        Shapes or types do not fit.

    Notes
    -----
    Mirrors `ggml_dsv4_hc_pre`.
    """
    return _pre("dsv4_hc_pre", x, weights, 1.0, (*x.ne[1:3], 1, 1), is_gated=False)


def dsv4_hc_pre_gated(x: Tensor, gate: Tensor, scale: float) -> Tensor:
    """Add up the streams of x, each element weighted by the sigmoid of its gate, and scale the sum.

    Parameters
    ----------
    x, gate : Tensor, f32, [n, n_stream, n_token]
    scale : float

    Returns
    -------
    Tensor
        f32, [n, n_token]

    Raises
    ------
    ShapeError
        Shapes or types do not fit.

    Notes
    -----
    Mirrors `ggml_dsv4_hc_pre_gated`.
    """
    return _pre("dsv4_hc_pre_gated", x, gate, scale, (*x.ne[:3], 1), is_gated=True)


def _pre(op: str, x: Tensor, weights: Tensor, scale: float, ne: tuple[int, ...], *, is_gated: bool) -> Tensor:
    _require_f32(op, x=x, weights=weights)
    if x.ne[1] < 1 or x.ne[3] != 1 or weights.ne != ne:
        refuse(op, "x has no streams, or the weights do not fit them", x=x, weights=weights)
    params = (f32(scale), int(is_gated))
    return new(Op.DSV4_HC_PRE, Type.F32, (x.ne[0], x.ne[2]), (x, weights), params)


def dsv4_hc_post(x: Tensor, residual: Tensor, post: Tensor, comb: Tensor | None) -> Tensor:
    """Add a block's result, weighted, to each stream, and mix the streams.

    Parameters
    ----------
    x : Tensor, f32, [n, n_token]
    residual : Tensor, f32, [n, n_stream, n_token]
    post : Tensor, f32, [n_stream, n_token]
        The weight of x for each stream.
    comb : Tensor, f32, [n_stream (to), n_stream (from), n_token], optional
        If absent, each stream keeps its own residual.

    Returns
    -------
    Tensor
        f32, [n, n_stream, n_token]

    Raises
    ------
    ShapeError
        Shapes or types do not fit.

    Notes
    -----
    Mirrors `ggml_dsv4_hc_post`.
    """
    _require_f32("dsv4_hc_post", x=x, residual=residual, post=post, comb=comb)
    n, n_token = x.ne[:2]
    n_stream = residual.ne[1]
    if not is_matrix(x) or n_stream < 1 or residual.ne != (n, n_stream, n_token, 1):
        refuse("dsv4_hc_post", "the residual has not some streams of x's shape", x=x, residual=residual)
    if post.ne != (n_stream, n_token, 1, 1):
        refuse("dsv4_hc_post", "post has not one for each stream and token", post=post, residual=residual)
    if comb is not None and comb.ne != (n_stream, n_stream, n_token, 1):
        refuse("dsv4_hc_post", "comb has not one for each pair of streams and token", comb=comb, residual=residual)
    return new(Op.DSV4_HC_POST, Type.F32, residual.ne, (x, residual, post, comb))
