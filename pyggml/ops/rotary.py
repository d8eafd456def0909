"""Rotary positions: all kinds of ROPE, with one or four positions per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec

from ..tensor import Tensor
from ..types import Op, Type
from ._make import f32, in_place, is_vector, like, refuse, set_param
from .modes import RopeType

__all__ = [
    "rope", "rope_ext", "rope_ext_back", "rope_ext_inplace", "rope_inplace", "rope_multi", "rope_multi_back",
    "rope_multi_inplace", "rope_set_offset",
]  # fmt: skip

_P = ParamSpec("_P")


def _back(build: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """Return the builder that rotates by the negated angles."""

    @wraps(build)
    def build_back(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        result = build(*args, **kwargs)
        result.op = Op.ROPE_BACK
        return result

    name = build_back.__name__ = build_back.__qualname__ = f"{build.__name__}_back"
    build_back.__doc__ = f"Rotate pairs back: `{build.__name__}` with negated angles. Mirrors `ggml_{name}`."
    return build_back


def rope(a: Tensor, b: Tensor, n_dims: int, mode: int) -> Tensor:
    """Rotate pairs of each row by its token's position, with base frequency 10000 and no scaling.

    Parameters
    ----------
    a : Tensor, [n_embd_head, n_head, n_token, ne3]
    b : Tensor, i32, [n_token]
        Positions; four per token with ``RopeType.MROPE``.
    n_dims : int
        Elements of a row that rotate.
    mode : int
        A `RopeType`.

    Raises
    ------
    ShapeError
        Positions do not fit.

    Notes
    -----
    Mirrors `ggml_rope`.
    """
    return rope_ext(a, b, None, n_dims, mode, 0, 10000.0, 1.0, 0.0, 1.0, 0.0, 0.0)


rope_inplace = in_place(rope)


def rope_ext(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    n_dims: int,
    mode: int,
    n_ctx_orig: int,
    freq_base: float,
    freq_scale: float,
    ext_factor: float,
    attn_factor: float,
    beta_fast: float,
    beta_slow: float,
) -> Tensor:
    """Rotate pairs of each row by its token's position, with YaRN scaling.

    Parameters
    ----------
    a, b, n_dims, mode
        As in `rope`.
    c : Tensor or None, f32, [at least n_dims / 2]
        Factors by which frequencies are divided.
    n_ctx_orig, freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow
        Trained context, base frequency, and YaRN's parameters.

    Raises
    ------
    ShapeError
        Positions or factors do not fit.

    Notes
    -----
    Mirrors `ggml_rope_ext`.
    """
    return rope_multi(
        a, b, c, n_dims, None, mode, n_ctx_orig,
        freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow,
    )  # fmt: skip


rope_ext_inplace = in_place(rope_ext)


def rope_multi(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    n_dims: int,
    sections: Sequence[int] | None,
    mode: int,
    n_ctx_orig: int,
    freq_base: float,
    freq_scale: float,
    ext_factor: float,
    attn_factor: float,
    beta_fast: float,
    beta_slow: float,
) -> Tensor:
    """Rotate pairs by one of a token's four positions; ``sections`` has the number of pairs for each, None with one position.

    Raises
    ------
    ShapeError
        Positions or factors do not fit.

    Notes
    -----
    Mirrors `ggml_rope_multi`.
    """
    if mode & 1:
        refuse("rope", f"mode {mode} is no longer supported", a=a)
    if not is_vector(b) or b.type is not Type.I32:
        refuse("rope", "positions must be i32 in one dimension", a=a, b=b)
    is_mrope = bool(mode & RopeType.MROPE)
    if b.ne[0] != a.ne[2] * (4 if is_mrope else 1):
        refuse("rope", f"{a.ne[2]} tokens need {'4 positions each' if is_mrope else 'a position each'}", a=a, b=b)
    if c is not None and (c.type is not Type.F32 or c.ne[0] < n_dims // 2):
        refuse("rope", f"frequency factors must be f32, at least {n_dims // 2}", c=c)
    params: tuple[int, ...] = (
        0,
        int(n_dims),
        int(mode),
        0,
        int(n_ctx_orig),
        f32(freq_base),
        f32(freq_scale),
        f32(ext_factor),
        f32(attn_factor),
        f32(beta_fast),
        f32(beta_slow),
    )
    if is_mrope and sections is not None:
        if not isinstance(sections, Sequence) or len(sections) != 4:
            refuse("rope", f"sections must be 4 numbers of pairs, not {sections!r}", a=a)
        params += tuple(int(n) for n in sections)
    return like(Op.ROPE, a, (a, b, c), params)


rope_multi_inplace = in_place(rope_multi)


rope_ext_back, rope_multi_back = _back(rope_ext), _back(rope_multi)


def rope_set_offset(a: Tensor, n_offs: int) -> Tensor:
    """Make a ROPE start at element ``n_offs`` of each row, and return it.

    Raises
    ------
    ShapeError
        ``a`` is another op, the offset is negative, or the mode is VISION.

    Notes
    -----
    Mirrors `ggml_rope_set_offset` (since ggml 0.26).
    """
    if a.op is not Op.ROPE and a.op is not Op.ROPE_BACK:
        refuse("rope_set_offset", f"a is made by {a.op.name}, not ROPE", a=a)
    if n_offs < 0 or a.param_i32(2) == RopeType.VISION:
        refuse("rope_set_offset", f"offset {n_offs} is invalid, or the mode is VISION", a=a)
    set_param(a, 15, int(n_offs))
    return a
