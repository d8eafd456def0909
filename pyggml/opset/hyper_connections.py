"""Hyper-connections of DeepSeek 4: DSV4_HC_COMB, DSV4_HC_PRE, DSV4_HC_POST."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..hardware.formulas import Work
from ..tensor import Tensor
from ..types import Op
from . import kernels
from .calls import bits, by_elements, by_steps, with_sources
from .checks import F32, gaps, optional, source, wrong_type
from .declaration import UsedExperts, declare
from .work import moved_bytes

if TYPE_CHECKING:
    from ..backends.host.plan import HostPlan


def _refuses(t: Tensor, fits: bool, *rows: int) -> str:
    if not fits:
        return "shapes of sources do not fit"
    return wrong_type(t, *[F32] * 5) or gaps(t, *rows)


# -- DSV4_HC_COMB --------------------------------------------------------------------------


def _refuses_comb(t: Tensor) -> str:
    x, y, post, n_token = source(t, 0), source(t, 1), source(t, 2), t.ne[2]
    fits = x.ne == (24, n_token, 1, 1) and y.ne[0] >= 3 and post.ne[0] == 24 and t.param_i32(1) > 0
    return _refuses(t, fits and t.ne == (4, 4, n_token, 1) and t.is_contiguous(), 0)


def _call_comb(plan: HostPlan, t: Tensor) -> None:
    n = t.numel * t.param_i32(1)
    params = (t.param_i32(0), t.param_i32(1))
    plan.add(kernels.hyper_connections.dsv4_hc_comb.address, t, with_sources(t, 3), params, **by_steps(n))


def _work_of_comb(node: Tensor, used_experts: UsedExperts) -> Work:
    """Divide a matrix by sums again and again."""
    return Work(flops=4.0 * node.param_i32(1) * node.numel, moved_bytes=moved_bytes(node))


declare(Op.DSV4_HC_COMB, refuses=_refuses_comb, call=_call_comb, n_sources=3, work=_work_of_comb)


# -- DSV4_HC_PRE ---------------------------------------------------------------------------


def _refuses_pre(t: Tensor) -> str:
    x, y, is_gated = source(t, 0), source(t, 1), bool(t.param_i32(1))
    fits = y.ne == (x.ne if is_gated else (*x.ne[1:3], 1, 1)) and t.ne == (x.ne[0], x.ne[2], 1, 1) and x.ne[3] == 1
    return _refuses(t, fits, 0, 1, *(2,) * is_gated)


def _call_pre(plan: HostPlan, t: Tensor) -> None:
    x = source(t, 0)
    params = (t.param_i32(0), 1) if t.param_i32(1) else (bits(1.0), 0)  # before ggml 0.26 no scale was set
    plan.add(kernels.hyper_connections.dsv4_hc_pre.address, t, (t, x, source(t, 1)), params, **by_elements(x))


def _work_of_pre(node: Tensor, used_experts: UsedExperts) -> Work:
    """Multiply and add for each stream that is summed up."""
    return Work(flops=2.0 * source(node, 0).numel, moved_bytes=moved_bytes(node))


declare(Op.DSV4_HC_PRE, refuses=_refuses_pre, call=_call_pre, n_sources=2, work=_work_of_pre)


# -- DSV4_HC_POST --------------------------------------------------------------------------


def _refuses_post(t: Tensor) -> str:
    x, y, post, comb = source(t, 0), source(t, 1), source(t, 2), optional(t, 3)
    n, n_stream, n_token = x.ne[0], y.ne[1], t.ne[2]
    fits = post.ne == (n_stream, n_token, 1, 1) and t.ne == y.ne == (n, n_stream, n_token, 1)
    fits = fits and x.ne == (n, n_token, 1, 1) and (comb is None or comb.ne == (n_stream, n_stream, n_token, 1))
    return _refuses(t, fits, 0, 1, 2)


def _call_post(plan: HostPlan, t: Tensor) -> None:
    comb = optional(t, 3)
    tensors = with_sources(t, 3 if comb is None else 4)
    plan.add(kernels.hyper_connections.dsv4_hc_post.address, t, tensors, (comb is not None,), **by_elements(t))


def _work_of_post(node: Tensor, used_experts: UsedExperts) -> Work:
    """Multiply and add for each stream that is summed up, and for the one that is spread."""
    n_sum = 1 + (1 if optional(node, 3) is None else node.ne[1])
    return Work(flops=2.0 * n_sum * node.numel, moved_bytes=moved_bytes(node))


declare(Op.DSV4_HC_POST, refuses=_refuses_post, call=_call_post, n_sources=3, work=_work_of_post)
