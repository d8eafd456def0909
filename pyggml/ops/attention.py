"""Ops of attention: masks, softmax, and the fused FLASH_ATTN_EXT."""

from __future__ import annotations

from ..tensor import Tensor
from ..types import Op, Type
from ._make import can_mul_mat, divides, f32, in_place, like, new, refuse, set_param
from .modes import Prec

__all__ = [
    "diag_mask_inf", "diag_mask_inf_inplace", "diag_mask_zero", "diag_mask_zero_inplace", "flash_attn_ext",
    "flash_attn_ext_add_sinks", "flash_attn_ext_get_prec", "flash_attn_ext_set_n_kv_max", "flash_attn_ext_set_prec",
    "lightning_indexer", "soft_max", "soft_max_add_sinks", "soft_max_ext", "soft_max_ext_inplace", "soft_max_inplace",
]  # fmt: skip


def diag_mask_inf(a: Tensor, n_past: int) -> Tensor:
    """Set elements right of the diagonal, shifted by ``n_past``, to minus infinity. Mirrors `ggml_diag_mask_inf`."""
    return like(Op.DIAG_MASK_INF, a, (a,), (int(n_past),))


diag_mask_inf_inplace = in_place(diag_mask_inf)


def diag_mask_zero(a: Tensor, n_past: int) -> Tensor:
    """Set elements right of the diagonal, shifted by ``n_past``, to zero. Mirrors `ggml_diag_mask_zero`."""
    return like(Op.DIAG_MASK_ZERO, a, (a,), (int(n_past),))


diag_mask_zero_inplace = in_place(diag_mask_zero)


# -- softmax ---------------------------------------------------------------------


def soft_max(a: Tensor) -> Tensor:
    """Return the softmax of each row.

    Raises
    ------
    ShapeError
        ``a`` is not contiguous.

    Notes
    -----
    Mirrors `ggml_soft_max`. The slots of mask and sinks are None.
    """
    return soft_max_ext(a, None, 1.0, 0.0)


soft_max_inplace = in_place(soft_max)


def soft_max_ext(a: Tensor, mask: Tensor | None, scale: float, max_bias: float) -> Tensor:
    """Return the softmax of each row of ``a * scale + slope * mask``.

    Parameters
    ----------
    a : Tensor, [n_kv, n_token, n_head, n_stream]
    mask : Tensor or None, f16 or f32, [n_kv, at least n_token, divisor of n_head, divisor of n_stream]
    max_bias : float
        Largest ALiBi slope exponent; 0 leaves the slope at 1.

    Raises
    ------
    ShapeError
        ``a`` or the mask is not contiguous, or the mask does not fit, or is missing where ``max_bias`` needs it.

    Notes
    -----
    Mirrors `ggml_soft_max_ext`.
    """
    if not a.is_contiguous():
        refuse("soft_max", "a is not contiguous", a=a)
    if mask is not None:
        if mask.type is not Type.F16 and mask.type is not Type.F32:
            refuse("soft_max", "the mask must be f16 or f32", mask=mask)
        if not mask.is_contiguous():
            refuse("soft_max", "the mask is not contiguous", mask=mask)
        if mask.ne[0] != a.ne[0] or mask.ne[1] < a.ne[1]:
            refuse("soft_max", "the mask's rows are of another length, or too few", a=a, mask=mask)
        if not divides(mask.ne[2], a.ne[2]) or not divides(mask.ne[3], a.ne[3]):
            refuse("soft_max", "the mask does not broadcast to a", a=a, mask=mask)
    elif max_bias > 0.0:
        refuse("soft_max", f"max_bias {max_bias} needs a mask, whose values it scales by head", a=a)
    return like(Op.SOFT_MAX, a, (a, mask, None), (f32(scale), f32(max_bias)))


soft_max_ext_inplace = in_place(soft_max_ext)


def _add_sinks(builder: str, op: Op, slot: int, a: Tensor, sinks: Tensor | None) -> None:
    if sinks is None:
        if len(a.src) > slot:
            a.src[slot] = None
        return
    if a.op is not op:
        refuse(builder, f"a is made by {a.op.name}, not {op.name}", a=a)
    a.src.extend([None] * (slot + 1 - len(a.src)))
    if a.src[slot] is not None:
        refuse(builder, "a already has sinks", a=a, sinks=a.src[slot])
    scores = a.src[0]
    assert scores is not None
    if scores.ne[2] != sinks.ne[0]:
        refuse(builder, f"there is not one sink for each of {scores.ne[2]} heads", a=a, sinks=sinks)
    if sinks.type is not Type.F32:
        refuse(builder, "sinks must be f32", sinks=sinks)
    a.src[slot] = sinks


def soft_max_add_sinks(a: Tensor, sinks: Tensor | None) -> None:
    """Give each head of a SOFT_MAX a sink: one more score that counts only in the sum.

    Parameters
    ----------
    a : Tensor
        Made by `soft_max` or `soft_max_ext`; changed in place.
    sinks : Tensor or None, f32, [n_head]
        None removes the sinks.

    Raises
    ------
    ShapeError
        ``a`` is another op or has sinks, or they do not fit.

    Notes
    -----
    Mirrors `ggml_soft_max_add_sinks`.
    """
    _add_sinks("soft_max_add_sinks", Op.SOFT_MAX, 2, a, sinks)


# -- flash attention -------------------------------------------------------------


def flash_attn_ext(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, max_bias: float, logit_softcap: float
) -> Tensor:
    """Return ``softmax(q kᵀ * scale + slope * mask) v`` for each head, in one op.

    Parameters
    ----------
    q : Tensor, [n_embd_k, n_token, n_head, n_stream]
    k : Tensor, [n_embd_k, n_kv, n_head_kv, n_stream]
    v : Tensor, [n_embd_v, n_kv, n_head_kv, n_stream]
        Not transposed.
    mask : Tensor or None, f16, [n_kv, n_token, divisor of n_head, divisor of n_stream]
    logit_softcap : float
        Scores become ``cap * tanh(score / cap)``; 0 for none.

    Returns
    -------
    Tensor
        f32, [n_embd_v, n_head, n_token, n_stream]: already permuted back.

    Raises
    ------
    ShapeError
        Shapes do not fit, the mask is not contiguous f16, or is missing where ``max_bias`` needs it.

    Notes
    -----
    Mirrors `ggml_flash_attn_ext`. The slot of the sinks is None.
    """
    if not can_mul_mat(k, q):
        refuse("flash_attn_ext", "the rows of q and k differ, or k's heads do not broadcast to q's", q=q, k=k)
    if q.ne[3] != k.ne[3] or q.ne[3] != v.ne[3]:
        refuse("flash_attn_ext", "q, k and v differ in streams", q=q, k=k, v=v)
    if mask is not None:
        if mask.type is not Type.F16 or not mask.is_contiguous():
            refuse("flash_attn_ext", "the mask must be contiguous f16", mask=mask)
        if not divides(mask.ne[2], q.ne[2]) or not divides(mask.ne[3], q.ne[3]):
            refuse("flash_attn_ext", "the mask does not broadcast to q", q=q, mask=mask)
    elif max_bias > 0.0:
        refuse("flash_attn_ext", f"max_bias {max_bias} needs a mask, whose values it scales by head", q=q)
    ne = (v.ne[0], q.ne[2], q.ne[1], q.ne[3])
    params = (f32(scale), f32(max_bias), f32(logit_softcap))
    return new(Op.FLASH_ATTN_EXT, Type.F32, ne, (q, k, v, mask, None), params)


def _require_flash(builder: str, a: Tensor) -> None:
    if a.op is not Op.FLASH_ATTN_EXT:
        refuse(builder, f"a is made by {a.op.name}, not FLASH_ATTN_EXT", a=a)


def flash_attn_ext_set_prec(a: Tensor, prec: Prec | int) -> None:
    """Set the minimum precision of its sums. Mirrors `ggml_flash_attn_ext_set_prec`; ShapeError for another op."""
    _require_flash("flash_attn_ext_set_prec", a)
    set_param(a, 3, int(prec))


def flash_attn_ext_get_prec(a: Tensor) -> Prec:
    """Return the precision set by `flash_attn_ext_set_prec`. Mirrors `ggml_flash_attn_ext_get_prec`."""
    _require_flash("flash_attn_ext_get_prec", a)
    return Prec(a.param_i32(3))


def flash_attn_ext_set_n_kv_max(a: Tensor, n_kv_max: int) -> None:
    """Promise at most ``n`` finite mask entries per row; 0 promises nothing.

    Notes
    -----
    Mirrors `ggml_flash_attn_ext_set_n_kv_max`, new in ggml 0.26.
    """
    _require_flash("flash_attn_ext_set_n_kv_max", a)
    if n_kv_max < 0:
        refuse("flash_attn_ext_set_n_kv_max", f"{n_kv_max} entries cannot be", a=a)
    set_param(a, 4, int(n_kv_max))


def flash_attn_ext_add_sinks(a: Tensor, sinks: Tensor | None) -> None:
    """Give each head a sink, as `soft_max_add_sinks`. Mirrors `ggml_flash_attn_ext_add_sinks`."""
    _add_sinks("flash_attn_ext_add_sinks", Op.FLASH_ATTN_EXT, 4, a, sinks)


def lightning_indexer(q: Tensor, k: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Score each key for each token: the sum of heads' positive products, weighed by head, and the mask.

    Parameters
    ----------
    q : Tensor, f32, [n_embd, n_head, n_token, n_stream]
    k : Tensor, [n_embd, 1, n_kv, n_stream]
    weights : Tensor, f32, [n_head, n_token, 1, n_stream]
    mask : Tensor, f16, [n_kv, n_token, 1, divisor of n_stream]

    Returns
    -------
    Tensor
        f32, [n_kv, n_token, 1, n_stream]

    Raises
    ------
    ShapeError
        Shapes or types do not fit.

    Notes
    -----
    Mirrors `ggml_lightning_indexer`.
    """
    if q.type is not Type.F32 or weights.type is not Type.F32 or mask.type is not Type.F16:
        refuse("lightning_indexer", "q and weights must be f32, the mask f16", q=q, weights=weights, mask=mask)
    if q.ne[0] != k.ne[0] or k.ne[1] != 1 or q.ne[3] != k.ne[3]:
        refuse("lightning_indexer", "the keys are not one row of q's length for each stream", q=q, k=k)
    if weights.ne != (q.ne[1], q.ne[2], 1, q.ne[3]):
        refuse("lightning_indexer", "there is not one weight for each head and token", q=q, weights=weights)
    if mask.ne[:3] != (k.ne[2], q.ne[2], 1) or not divides(mask.ne[3], q.ne[3]):
        refuse("lightning_indexer", "the mask does not fit keys and tokens", q=q, k=k, mask=mask)
    return new(Op.LIGHTNING_INDEXER, Type.F32, (k.ne[2], q.ne[2], 1, q.ne[3]), (q, k, weights, mask))
