"""ROPE and ROPE_BACK."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pyggml.kernels.cpu import words

from ..hardware.formulas import Work
from ..ops.modes import RopeType
from ..tensor import Tensor
from ..types import Op, Type
from . import kernels
from .calls import ELEMENTS_PER_S, SERIAL_ELEMENTS, bits, by_rows
from .checks import F16_F32, F32, I32, gaps, like_source, optional, source, wrong_type
from .declaration import UsedExperts, declare
from .work import made_by

if TYPE_CHECKING:
    from ..backends.host.plan import HostPlan

_MODES = frozenset(int(mode) for mode in RopeType)


def _refuses(t: Tensor) -> str:
    mode, n_dims, first, n = t.param_i32(2), t.param_i32(1), t.param_i32(15), t.ne[0]
    if mode not in _MODES:
        return f"rope mode {mode} is none of {', '.join(f'{m.value} ({m.name})' for m in RopeType)}"
    if n_dims <= 0 or n_dims % 2 or first < 0 or first % 2 or first + n_dims > n:
        return f"rope cannot turn {n_dims} of {n} elements from {first} on: all must be even, and fit"
    base, scale, extrapolated, *rest = (t.param_f32(i) for i in range(5, 11))
    if not (base > 0 and all(map(math.isfinite, (base, scale, extrapolated, *rest)))):
        return f"rope needs a base frequency above 0 and finite numbers, not {base:g}, {scale:g}, {extrapolated:g}"
    if extrapolated and not (t.param_i32(4) > 0 and scale > 0 and min(rest[1:]) > 0 and base != 1):
        return f"YaRN needs a trained context ({t.param_i32(4)}), a scale ({scale:g}) and betas above 0"
    if mode & RopeType.MROPE:
        sections = [t.param_i32(11 + i) for i in range(4)]
        if min(sections) < 0 or not any(sections[:3]) or sum(sections) > n:
            return f"rope sections {sections} do not divide {n // 2} pairs"
    if mode == RopeType.VISION and (2 * n_dims != n or first):
        return f"rope mode 24 (VISION) turns whole rows: n_dims {n_dims} is not half of {n}, or an offset is set"
    factors = optional(t, 2)
    if factors is not None and mode == RopeType.VISION and factors.ne[0] < n_dims:
        return f"rope mode 24 (VISION) needs a frequency factor for each of {n_dims} pairs, src2 has {factors.ne[0]}"
    return wrong_type(t, F16_F32, {t.type}, I32, F32) or gaps(t, 0, 1)


def _yarn_range(n_dims: int, n_ctx_orig: int, base: float, beta_fast: float, beta_slow: float) -> tuple[float, float]:
    """Return the pairs between which YaRN mixes interpolated and extrapolated angles.

    Notes
    -----
    Mirrors `ggml_rope_yarn_corr_dims`.
    """

    def pair(n_rotations: float) -> float:
        return n_dims * math.log(n_ctx_orig / (n_rotations * 2 * math.pi)) / (2 * math.log(base))

    return max(0.0, math.floor(pair(beta_fast))), min(n_dims - 1.0, math.ceil(pair(beta_slow)))


def _axes(mode: int) -> int:
    """Return how pairs choose among several positions; other modes have one position."""
    rope = kernels.rope
    axes: dict[int, int] = {
        RopeType.MROPE: rope.IN_SECTIONS,
        RopeType.IMROPE: rope.IN_TURNS,
        RopeType.VISION: rope.IN_NEW_SECTIONS,
    }
    one: int = rope.ONE
    return axes.get(mode, one)


def _angles(plan: HostPlan, t: Tensor, n_pair: int) -> tuple[str, int]:
    positions, divisors, axes = source(t, 1), optional(t, 2), _axes(t.param_i32(2))
    sections = (0, 0, 0, 0) if axes == kernels.rope.ONE else tuple(t.param_i32(11 + i) for i in range(4))
    key = ("angles", plan.address_of(positions), positions.ne, positions.nb, t.op_params[1:2] + t.op_params[4:11],
           axes, sections, None if divisors is None else plan.address_of(divisors))  # fmt: skip
    slot = plan.prepared(key)
    if slot is not None:
        return slot
    n_dims, n_token = t.param_i32(1), t.ne[2]
    base, freq_scale, ext_factor, magnitude, beta_fast, beta_slow = (t.param_f32(i) for i in range(5, 11))
    low = high = 0.0
    if ext_factor:
        low, high = _yarn_range(n_dims, t.param_i32(4), base, beta_fast, beta_slow)
        magnitude *= 1.0 + 0.1 * math.log(1.0 / freq_scale)
    slot = plan.new_table(8 * n_pair * n_token, key, positions)
    factors = (base ** (-2.0 / n_dims), freq_scale, ext_factor, magnitude, low, high)
    start = plan.add(
        kernels.rope.rope_angles.address,
        t,
        (None, positions, divisors),
        (n_pair, *(bits(f) for f in factors), axes, *sections),
        serial=n_token * n_pair < SERIAL_ELEMENTS // 16,
        cost=40 * n_token * n_pair / ELEMENTS_PER_S,
        writes=(plan.slot_range(slot),),
    )
    plan.fix(start + words.SCRATCH, slot)
    return slot


def _call(plan: HostPlan, t: Tensor) -> None:
    mode, sine_sign = t.param_i32(2), -1.0 if t.op is Op.ROPE_BACK else 1.0
    n_turned = t.ne[0] if mode == RopeType.VISION else t.param_i32(1)
    slot = _angles(plan, t, n_turned // 2)
    plan.need_thread_bytes(0 if t.type is Type.F32 else 4 * t.ne[0])
    params = (n_turned, mode != RopeType.NORMAL, t.param_i32(15), bits(sine_sign))
    address, reads = kernels.rope.rope_rows.address, (plan.slot_range(slot),)
    start = plan.add(address, t, (t, source(t, 0)), params, reads=reads, **by_rows(t))
    plan.fix(start + words.SCRATCH, slot)


def _work(node: Tensor, used_experts: UsedExperts) -> Work:
    """Rotate what a product has just written, whose work has the bytes; after a norm it is part of its kernel."""
    is_normed = made_by(source(node, 0)).op is Op.MUL
    return Work(flops=4.0 * node.numel, n_kernels=0 if is_normed else 1)


declare(Op.ROPE, refuses=_refuses, call=_call, n_sources=2, work=_work, fits=like_source)
declare(Op.ROPE_BACK, refuses=_refuses, call=_call, n_sources=2, fits=like_source)
