"""Activations: the UNARY family, and the GLU family, in which one half gates the other."""

from __future__ import annotations

from collections.abc import Callable
from math import exp as _exp
from math import log as _log

from ..tensor import Tensor
from ..types import GluOp, Op, UnaryOp
from ._make import f32, in_place, is_contiguous_rows, like, member, new, refuse, round_f32

__all__ = [
    "abs", "abs_inplace", "ceil", "ceil_inplace", "elu", "elu_inplace", "exp", "exp_inplace", "expm1",
    "expm1_inplace", "floor", "floor_inplace", "geglu", "geglu_erf", "geglu_erf_split", "geglu_erf_swapped",
    "geglu_quick", "geglu_quick_split", "geglu_quick_swapped", "geglu_split", "geglu_swapped", "gelu", "gelu_erf",
    "gelu_erf_inplace", "gelu_inplace", "gelu_quick", "gelu_quick_inplace", "glu", "glu_split", "hardsigmoid",
    "hardswish", "neg", "neg_inplace", "reglu", "reglu_split", "reglu_swapped", "relu", "relu_inplace", "round",
    "round_inplace", "sgn", "sgn_inplace", "sigmoid", "sigmoid_inplace", "silu", "silu_inplace", "softplus",
    "softplus_inplace", "step", "step_inplace", "swiglu", "swiglu_clamp", "swiglu_oai", "swiglu_split",
    "swiglu_swapped", "tanh", "tanh_inplace", "trunc", "trunc_inplace", "unary", "unary_inplace", "xielu",
]  # fmt: skip

UnaryBuilder = Callable[[Tensor], Tensor]
GluBuilder = Callable[[Tensor], Tensor]
GluSplitBuilder = Callable[[Tensor, Tensor], Tensor]


# -- UNARY -----------------------------------------------------------------------


def unary(a: Tensor, op: UnaryOp | int) -> Tensor:
    """Apply one function to each element.

    Raises
    ------
    ShapeError
        A row has gaps, or there is no such function.

    Notes
    -----
    Mirrors `ggml_unary`.
    """
    return _unary(a, member(UnaryOp, op))


unary_inplace = in_place(unary)


def _unary(a: Tensor, op: UnaryOp) -> Tensor:
    if not is_contiguous_rows(a):
        refuse(op.name.lower(), "a row of a has gaps", a=a)
    return like(Op.UNARY, a, (a,), (op.value,))


def _unary_pair(op: UnaryOp, what: str) -> tuple[UnaryBuilder, UnaryBuilder]:
    """Return the builder of one function and the one in place."""
    name = op.name.lower()

    def build(a: Tensor) -> Tensor:
        return _unary(a, op)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Return {what} for each element x. Mirrors `ggml_{name}`; refuses as `unary`."
    return build, in_place(build)


abs, abs_inplace = _unary_pair(UnaryOp.ABS, "its absolute value")
sgn, sgn_inplace = _unary_pair(UnaryOp.SGN, "-1, 0 or 1")
neg, neg_inplace = _unary_pair(UnaryOp.NEG, "-x")
step, step_inplace = _unary_pair(UnaryOp.STEP, "1 if positive, else 0")
tanh, tanh_inplace = _unary_pair(UnaryOp.TANH, "tanh(x)")
elu, elu_inplace = _unary_pair(UnaryOp.ELU, "x, or exp(x) - 1 if negative,")
relu, relu_inplace = _unary_pair(UnaryOp.RELU, "max(x, 0)")
sigmoid, sigmoid_inplace = _unary_pair(UnaryOp.SIGMOID, "1 / (1 + exp(-x))")
gelu, gelu_inplace = _unary_pair(UnaryOp.GELU, "GELU by its tanh approximation")
gelu_erf, gelu_erf_inplace = _unary_pair(UnaryOp.GELU_ERF, "GELU, exact")
gelu_quick, gelu_quick_inplace = _unary_pair(UnaryOp.GELU_QUICK, "x * sigmoid(1.702 x)")
silu, silu_inplace = _unary_pair(UnaryOp.SILU, "x * sigmoid(x)")
hardswish, _ = _unary_pair(UnaryOp.HARDSWISH, "x * hardsigmoid(x)")
hardsigmoid, _ = _unary_pair(UnaryOp.HARDSIGMOID, "(x + 3) / 6 limited to 0 .. 1")
exp, exp_inplace = _unary_pair(UnaryOp.EXP, "exp(x)")
expm1, expm1_inplace = _unary_pair(UnaryOp.EXPM1, "exp(x) - 1")
softplus, softplus_inplace = _unary_pair(UnaryOp.SOFTPLUS, "log(1 + exp(x))")
floor, floor_inplace = _unary_pair(UnaryOp.FLOOR, "the next integer below")
ceil, ceil_inplace = _unary_pair(UnaryOp.CEIL, "the next integer above")
round, round_inplace = _unary_pair(UnaryOp.ROUND, "the nearest integer, halves away from 0,")
trunc, trunc_inplace = _unary_pair(UnaryOp.TRUNC, "the next integer towards 0")


def _softplus_f32(x: float) -> float:
    x = round_f32(x)
    if x > 20.0:  # where float32 cannot tell the two apart (`ggml_compute_softplus_f32`)
        return x
    return round_f32(_log(round_f32(1.0 + round_f32(_exp(x)))))


def xielu(a: Tensor, alpha_n: float, alpha_p: float, beta: float, eps: float) -> Tensor:
    """Apply xIELU, an integral of ELU, with its two slopes given before softplus.

    Notes
    -----
    Mirrors `ggml_xielu`: softplus is applied to the parameters when the node is made.
    """
    beta = round_f32(beta)
    params = (
        UnaryOp.XIELU.value,
        f32(beta + _softplus_f32(alpha_n)),
        f32(_softplus_f32(alpha_p)),
        f32(beta),
        f32(eps),
    )
    return like(Op.UNARY, a, (a,), params)


# -- GLU -------------------------------------------------------------------------


def _glu(a: Tensor, b: Tensor | None, op: GluOp, swapped: bool, extra: tuple[int, ...] = ()) -> Tensor:
    if not a.is_contiguous(1):
        refuse(op.name.lower(), "a row of a has gaps, or dimensions 2 and 3 have", a=a)
    ne = a.ne
    if b is None:
        ne = (ne[0] // 2, ne[1], ne[2], ne[3])
    else:
        if not b.is_contiguous(1):
            refuse(op.name.lower(), "a row of b has gaps, or dimensions 2 and 3 have", b=b)
        if a.ne != b.ne or a.type is not b.type:
            refuse(op.name.lower(), "a and b differ in shape or type", a=a, b=b)
    return new(Op.GLU, a.type, ne, (a, b), (op.value, int(swapped), *extra))


def glu(a: Tensor, op: GluOp | int, swapped: bool) -> Tensor:
    """Gate the second half of each row by a function of the first, or with ``swapped`` the first by the second.

    Returns
    -------
    Tensor
        Half as wide as ``a``. Its second source is None.

    Raises
    ------
    ShapeError
        A row has gaps, or there is no such function.

    Notes
    -----
    Mirrors `ggml_glu`.
    """
    return _glu(a, None, member(GluOp, op), swapped)


def glu_split(a: Tensor, b: Tensor, op: GluOp | int) -> Tensor:
    """Gate ``b`` by a function of ``a``.

    Raises
    ------
    ShapeError
        Shape or type differ, or a row has gaps.

    Notes
    -----
    Mirrors `ggml_glu_split`.
    """
    return _glu(a, b, member(GluOp, op), False)


def _glu_family(op: GluOp, what: str) -> tuple[GluBuilder, GluBuilder, GluSplitBuilder]:
    """Return the builders of one gate: halves of one tensor, halves swapped, two tensors."""
    name = op.name.lower()

    def build(a: Tensor) -> Tensor:
        return _glu(a, None, op, False)

    def build_swapped(a: Tensor) -> Tensor:
        return _glu(a, None, op, True)

    def build_split(a: Tensor, b: Tensor) -> Tensor:
        return _glu(a, b, op, False)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Gate the second half of each row by {what} of the first. Mirrors `ggml_{name}`; see `glu`."
    build_swapped.__name__ = build_swapped.__qualname__ = f"{name}_swapped"
    build_swapped.__doc__ = f"Gate the first half of each row by {what} of the second. Mirrors `ggml_{name}_swapped`."
    build_split.__name__ = build_split.__qualname__ = f"{name}_split"
    build_split.__doc__ = f"Gate ``b`` by {what} of ``a``. Mirrors `ggml_{name}_split`; see `glu_split`."
    return build, build_swapped, build_split


reglu, reglu_swapped, reglu_split = _glu_family(GluOp.REGLU, "ReLU")
geglu, geglu_swapped, geglu_split = _glu_family(GluOp.GEGLU, "GELU (tanh approximation)")
swiglu, swiglu_swapped, swiglu_split = _glu_family(GluOp.SWIGLU, "SiLU")
geglu_erf, geglu_erf_swapped, geglu_erf_split = _glu_family(GluOp.GEGLU_ERF, "GELU (exact)")
geglu_quick, geglu_quick_swapped, geglu_quick_split = _glu_family(GluOp.GEGLU_QUICK, "x * sigmoid(1.702 x)")


def swiglu_oai(a: Tensor, b: Tensor, alpha: float, limit: float) -> Tensor:
    """Gate ``b + 1`` by ``a * sigmoid(alpha * a)``, both limited first: gpt-oss's gate.

    Notes
    -----
    Mirrors `ggml_swiglu_oai`; refuses as `glu_split`.
    """
    return _glu(a, b, GluOp.SWIGLU_OAI, False, (f32(alpha), f32(limit)))


def swiglu_clamp(a: Tensor, b: Tensor, limit: float) -> Tensor:
    """Gate ``b`` by the SiLU of ``a``, both limited first.

    Notes
    -----
    Mirrors `ggml_swiglu_clamp` (since ggml 0.26): its parameter is word 3, word 2 is 0.
    """
    return _glu(a, b, GluOp.SWIGLU_CLAMP, False, (0, f32(limit)))
