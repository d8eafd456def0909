"""Layers with a state from token to token: SSM_CONV, SSM_SCAN, GATED_DELTA_NET, SOLVE_TRI, WKV and gated linear attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..hardware.formulas import Kind, Work
from ..tensor import Tensor
from ..types import Op
from . import kernels
from .calls import by_products, by_steps, with_sources
from .checks import F32, I32, gaps, not_all_f32, not_dense_f32, source, wrong_type
from .declaration import OPS, Choice, Rule, UsedExperts, declare
from .work import moved_bytes

if TYPE_CHECKING:
    from ..backends.host.plan import HostPlan


def _refuses(t: Tensor) -> str:
    """Require F32 and contiguous rows."""
    return not_all_f32(t) or gaps(t, *range(len(t.src) + 1))


# -- SSM_CONV, SSM_SCAN --------------------------------------------------------------------


def _call_conv(plan: HostPlan, t: Tensor) -> None:
    n = t.numel * source(t, 1).ne[0]
    plan.add(kernels.recurrent.ssm_conv.address, t, with_sources(t, 2), **by_steps(n))


declare(Op.SSM_CONV, refuses=_refuses, call=_call_conv, n_sources=2)


def _refuses_scan(t: Tensor) -> str:
    n = len(t.src) + 1
    kinds = [F32] * n
    kinds[7] = I32
    groups, heads, rates = source(t, 4), source(t, 1), source(t, 3)
    if not groups.ne[1] or heads.ne[1] % groups.ne[1] or (rates.ne[0] != 1 and t.param_i32(0) != 1):
        return f"{heads.ne[1]} heads do not divide into {groups.ne[1]} groups, or Mamba-1 keeps several states"
    return wrong_type(t, *kinds) or gaps(t, *range(n))


def _call_scan(plan: HostPlan, t: Tensor) -> None:
    n = source(t, 0).ne[0] * source(t, 1).numel
    plan.add(kernels.recurrent.ssm_scan.address, t, with_sources(t, 7), (t.param_i32(0),), **by_steps(n))


def _work_of_scan(node: Tensor, used_experts: UsedExperts) -> Work:
    """For each token and element of the state: decay, an exponential, what is added, what is read."""
    s, x = source(node, 0), source(node, 1)
    return Work(Kind.STATE, 7.0 * s.ne[0] * x.numel, moved_bytes(node))


declare(
    Op.SSM_SCAN,
    refuses=_refuses_scan,
    call=_call_scan,
    n_sources=7,
    work=_work_of_scan,
    chooses=Choice(indices=6, chosen=0, dim=3),
)


# -- linear attention ----------------------------------------------------------------------


def _call_delta(plan: HostPlan, t: Tensor) -> None:
    v = source(t, 2)
    n = v.ne[0] * v.numel
    plan.need_thread_bytes(4 * v.ne[0] * (v.ne[0] + 1))
    plan.add(kernels.recurrent.gated_delta_net.address, t, with_sources(t, 6), (t.param_i32(0),), **by_steps(n, 3))


def _work_of_delta(node: Tensor, used_experts: UsedExperts) -> Work:
    """For each token and element of the state: forget, read with k, learn, read with q; two operations each."""
    v, state = source(node, 2), source(node, 5)
    return Work(Kind.STATE, 8.0 * v.ne[0] * v.numel, 2.0 * state.nbytes)


declare(Op.GATED_DELTA_NET, refuses=_refuses, call=_call_delta, n_sources=6, work=_work_of_delta)


def _call_linear(plan: HostPlan, t: Tensor) -> None:
    n_source = OPS[t.op].n_sources
    n = source(t, 1).ne[0] * source(t, 1).numel
    kernel = getattr(kernels.linear_attention, t.op.name.lower())
    params = (source(t, n_source - 1).ne[1], t.param_i32(0))
    plan.add(kernel.address, t, with_sources(t, n_source), params, **by_steps(n, 3))


def _refuses_linear(t: Tensor) -> str:
    """Require contiguous F32, and equally many tokens of each sequence."""
    *tokens, state = [x for x in t.src if x is not None]
    n, n_head, n_token, _ = tokens[1].ne
    if t.op is Op.RWKV_WKV6 and tokens.pop(3).numel < n * n_head:
        return f"src3 has not a bonus for each of {n * n_head} channels"
    if any(x.ne != (n, n_head, n_token, 1) for x in tokens):
        return f"sources have not the shape of src1, {list(tokens[1].ne)}"
    if not state.ne[1] or n_token % state.ne[1] or state.numel != n * n * n_head * state.ne[1]:
        return f"{n_token} tokens do not divide into the {state.ne[1]} sequences of the states {list(state.ne)}"
    want = (n * n_head, n_token + n * state.ne[1], 1, 1)
    return not_dense_f32(t) if t.ne == want else f"dst is {list(t.ne)}, not {list(want)}"


def _work_of_linear(n_flop: float) -> Rule:
    """Return the rule of an op that takes so many operations for each token and element of the state."""

    def work(node: Tensor, used_experts: UsedExperts) -> Work:
        v = source(node, 1)
        return Work(Kind.STATE, n_flop * v.ne[0] * v.numel, moved_bytes(node))

    return work


# forget, learn, read; RWKV 6 has a bonus, RWKV 7 moves what it reads
declare(Op.GATED_LINEAR_ATTN, refuses=_refuses_linear, call=_call_linear, n_sources=5, work=_work_of_linear(5.0))
declare(Op.RWKV_WKV6, refuses=_refuses_linear, call=_call_linear, n_sources=6, work=_work_of_linear(7.0))
declare(Op.RWKV_WKV7, refuses=_refuses_linear, call=_call_linear, n_sources=7, work=_work_of_linear(9.0))


# -- SOLVE_TRI -----------------------------------------------------------------------------


def _call_solve(plan: HostPlan, t: Tensor) -> None:
    n_products = t.numel * t.ne[1] // 2
    plan.add(kernels.recurrent.solve_tri.address, t, with_sources(t, 2), **by_products(n_products, 4))


def _work_of_solve(node: Tensor, used_experts: UsedExperts) -> Work:
    """Forward substitution: half of a product with the matrix."""
    return Work(Kind.STATE, float(source(node, 0).ne[0] * node.numel), moved_bytes(node))


declare(Op.SOLVE_TRI, refuses=not_dense_f32, call=_call_solve, n_sources=2, work=_work_of_solve)
