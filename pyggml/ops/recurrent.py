"""Ops of layers with a state from token to token: SSM_CONV, SSM_SCAN, GATED_DELTA_NET, RWKV's and gated linear attention, and SOLVE_TRI, which some use."""

from __future__ import annotations

from ..tensor import Tensor
from ..types import Op, Type
from ._make import f32, is_contiguous_rows, is_matrix, is_vector, new, refuse
from .rows import INT32_MAX

__all__ = [
    "gated_delta_net", "gated_linear_attn", "rwkv_wkv6", "rwkv_wkv7", "solve_tri", "ssm_conv", "ssm_scan",
]  # fmt: skip


def ssm_conv(sx: Tensor, c: Tensor) -> Tensor:
    """Slide each channel's weights over its row.

    Parameters
    ----------
    sx : Tensor, [n_tap - 1 + n_token, n_channel, n_seq]
        Earlier tokens, then the tokens of the batch.
    c : Tensor, [n_tap, n_channel]

    Returns
    -------
    Tensor
        f32, [n_channel, n_token, n_seq]

    Raises
    ------
    ShapeError
        Shapes do not fit.

    Notes
    -----
    Mirrors `ggml_ssm_conv`.
    """
    if sx.ne[3] != 1 or not is_matrix(c):
        refuse("ssm_conv", "sx has at most 3 dimensions, c at most 2", sx=sx, c=c)
    n_token = sx.ne[0] - c.ne[0] + 1
    if sx.ne[1] != c.ne[1] or n_token < 0:
        refuse("ssm_conv", "sx and c differ in channels, or rows of sx are shorter than those of c", sx=sx, c=c)
    return new(Op.SSM_CONV, Type.F32, (c.ne[1], n_token, sx.ne[2]), (sx, c))


def ssm_scan(
    s: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    ids: Tensor,
    K: int,
) -> Tensor:
    """Scan tokens with a state for each head: Mamba-1 if rows of ``A`` have ``d_state`` elements, otherwise Mamba-2.

    Parameters
    ----------
    s : Tensor, [d_state, head_dim, n_head, n_slot]
        States; ``ids`` names the one from which a sequence starts.
    x : Tensor, [head_dim, n_head, n_token, n_seq]
    dt : Tensor, [n_head, n_token, n_seq]
    A : Tensor, [1 or d_state, n_head]
    B, C : Tensor, [d_state, n_group, n_token, n_seq]
    ids : Tensor, i32, [n_seq]
    K : int
        Number of last tokens whose states are returned.

    Returns
    -------
    Tensor
        f32, one row: outputs of the shape of x, then K times the states of all sequences, the latest first.

    Raises
    ------
    ShapeError
        Shapes do not fit, or what must have no gaps has some.

    Notes
    -----
    Mirrors `ggml_ssm_scan`.
    """
    if not 1 <= K <= INT32_MAX:
        refuse("ssm_scan", f"cannot return {K} states", s=s)
    for name, t in (("s", s), ("dt", dt), ("A", A)):
        if not t.is_contiguous():
            refuse("ssm_scan", f"{name} is not contiguous", **{name: t})
    for name, t in (("x", x), ("B", B), ("C", C)):
        if t.nb[0] != t.type.type_size or t.nb[1] != t.ne[0] * t.nb[0]:
            refuse("ssm_scan", f"{name} has gaps within a token", **{name: t})
    if B.ne != C.ne or ids.type is not Type.I32:
        refuse("ssm_scan", "B and C differ in shape, or ids is not i32", B=B, C=C, ids=ids)
    d_state, (head_dim, n_head, n_token, n_seq) = s.ne[0], x.ne
    if dt.ne != (n_head, n_token, n_seq, 1) or s.ne[1:3] != (head_dim, n_head):
        refuse("ssm_scan", "dt or s does not fit x", x=x, dt=dt, s=s)
    if (B.ne[0], *B.ne[2:]) != (d_state, n_token, n_seq):
        refuse("ssm_scan", "B does not fit s and x", B=B, s=s, x=x)
    if ids.ne[0] != n_seq or not is_vector(ids):
        refuse("ssm_scan", f"ids is not one for each of {n_seq} sequences", ids=ids)
    if A.ne[1] != n_head or not is_matrix(A):
        refuse("ssm_scan", f"A has not one row for each of {n_head} heads", A=A)
    if A.ne[0] != 1 and (A.ne[0] != d_state or K != 1):
        refuse("ssm_scan", f"rows of A have neither 1 nor {d_state} elements, or K is not 1", A=A)
    n = x.numel + K * d_state * head_dim * n_head * ids.ne[0]
    return new(Op.SSM_SCAN, Type.F32, (n,), (s, x, dt, A, B, C, ids), (int(K),))


def gated_delta_net(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    K: int,
) -> Tensor:
    """Update a state token by token: forget by g, learn v at k by beta, read with q.

    Parameters
    ----------
    q, k : Tensor, f32, [n, n_head_k, n_token, n_seq]
        Heads repeat to those of v.
    v : Tensor, f32, [n, n_head, n_token, n_seq]
    g : Tensor, f32, [1 or n, n_head, n_token, n_seq]
        Logarithms of the kept share, for a head or for each element.
    beta : Tensor, f32, [1, n_head, n_token, n_seq]
    state : Tensor, f32, [n, n, n_head, n_seq]
    K : int
        Number of last tokens whose states are returned.

    Returns
    -------
    Tensor
        f32, [n * n_head, n_token * n_seq + K * n * n_seq]: outputs, then states, the latest first.

    Raises
    ------
    ShapeError
        Shapes or types do not fit, or what must have no gaps has some.

    Notes
    -----
    Mirrors `ggml_gated_delta_net`.
    """
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state}
    for name, t in tensors.items():
        dense = is_contiguous_rows(t) if name in "qkv" else t.is_contiguous()
        if not dense or t.type is not Type.F32:
            refuse("gated_delta_net", f"{name} is not f32, or has gaps", **{name: t})
    n, n_head, n_token, n_seq = v.ne
    if g.ne[0] not in (1, n) or beta.ne[0] != 1:
        refuse("gated_delta_net", f"g is not one or {n} for each head, or beta not one", g=g, beta=beta)
    if state.ne != (n, n, n_head, n_seq) or K < 1:
        refuse("gated_delta_net", f"the state does not fit v, or {K} states cannot be returned", state=state, v=v)
    ne = (n * n_head, n_token * n_seq + K * n * n_seq)
    return new(Op.GATED_DELTA_NET, Type.F32, ne, (q, k, v, g, beta, state), (int(K),))


def rwkv_wkv6(k: Tensor, v: Tensor, r: Tensor, tf: Tensor, td: Tensor, state: Tensor) -> Tensor:
    """Update a state token by token, as RWKV 6 does: forget by td, learn v at k, read with r; tf weighs the token itself.

    Parameters
    ----------
    k, v, r, td : Tensor, [n, n_head, n_token]
        Tokens of a sequence side by side, as many of each sequence.
    tf : Tensor, [n, n_head]
    state : Tensor, [n * n * n_head, n_seq]

    Returns
    -------
    Tensor
        f32, [n * n_head, n_token + n * n_seq]: outputs, then states.

    Raises
    ------
    ShapeError
        Shapes do not fit, or a source has gaps.

    Notes
    -----
    Mirrors `ggml_rwkv_wkv6`.
    """
    return _linear("rwkv_wkv6", Op.RWKV_WKV6, {"k": k, "v": v, "r": r, "tf": tf, "td": td, "state": state})


def gated_linear_attn(k: Tensor, v: Tensor, q: Tensor, g: Tensor, state: Tensor, scale: float) -> Tensor:
    """Update a state token by token: forget by g, learn v at k, read with q times ``scale``.

    Parameters
    ----------
    k, v, q, g : Tensor, [n, n_head, n_token]
        Tokens of a sequence side by side, as many of each sequence.
    state : Tensor, [n * n * n_head, n_seq]
    scale : float

    Returns
    -------
    Tensor
        f32, [n * n_head, n_token + n * n_seq]: outputs, then states.

    Raises
    ------
    ShapeError
        Shapes do not fit, or a source has gaps.

    Notes
    -----
    Mirrors `ggml_gated_linear_attn`.
    """
    tensors = {"k": k, "v": v, "q": q, "g": g, "state": state}
    return _linear("gated_linear_attn", Op.GATED_LINEAR_ATTN, tensors, (f32(scale),))


def rwkv_wkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """Update a state token by token, as RWKV 7 does: forget by w, move what a reads to b, learn v at k, read with r.

    Parameters
    ----------
    r, w, k, v, a, b : Tensor, [n, n_head, n_token]
        Tokens of a sequence side by side, as many of each sequence.
    state : Tensor, [n * n * n_head, n_seq]

    Returns
    -------
    Tensor
        f32, [n * n_head, n_token + n * n_seq]: outputs, then states.

    Raises
    ------
    ShapeError
        Shapes do not fit, or a source has gaps.

    Notes
    -----
    Mirrors `ggml_rwkv_wkv7`, which does not look at the shape of r.
    """
    tensors = {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b, "state": state}
    return _linear("rwkv_wkv7", Op.RWKV_WKV7, tensors)


def _linear(name: str, op: Op, tensors: dict[str, Tensor], params: tuple[int, ...] = ()) -> Tensor:
    """Check what the three have in common and make the node."""
    for key, t in tensors.items():
        if not t.is_contiguous():
            refuse(name, f"{key} is not contiguous", **{key: t})
    k, state = tensors["k"], tensors["state"]
    n, n_head, n_token, _ = k.ne
    unchecked = ("state", "tf", "r" if op is Op.RWKV_WKV7 else "")
    for key, t in tensors.items():
        if key not in unchecked and t.ne[:3] != k.ne[:3]:
            refuse(name, f"{key} and k differ in shape", k=k, **{key: t})
    if state.numel != n * n * n_head * state.ne[1]:
        refuse(name, f"there is not a state of {n} times {n} for each of {n_head} heads and sequences", state=state)
    ne = (n * n_head, n_token + n * state.ne[1])
    return new(op, Type.F32, ne, tuple(tensors.values()), params)


def solve_tri(a: Tensor, b: Tensor, left: bool, lower: bool, uni: bool) -> Tensor:
    """Solve ``a x = b`` for each lower triangular matrix of ``a``.

    Parameters
    ----------
    a : Tensor, f32, [n, n, ne2, ne3]
    b : Tensor, f32, [m, n, ne2, ne3]
    left, lower, uni : bool
        Only True, True, False is supported.

    Returns
    -------
    Tensor
        f32, of b's shape.

    Raises
    ------
    ShapeError
        Shapes or types do not fit, there are gaps, or another kind is requested.

    Notes
    -----
    Mirrors `ggml_solve_tri`.
    """
    if a.type is not Type.F32 or b.type is not Type.F32 or not a.is_contiguous() or not b.is_contiguous():
        refuse("solve_tri", "a and b must be contiguous f32", a=a, b=b)
    if a.ne[0] != a.ne[1] or a.ne[1:] != b.ne[1:]:
        refuse("solve_tri", "a is not square, or does not fit b", a=a, b=b)
    if not left or not lower or uni:
        refuse("solve_tri", "only left, lower, not uni is supported", a=a)
    return new(Op.SOLVE_TRI, Type.F32, b.ne, (a, b))
