"""What declarations share to refuse nodes: types, gaps, and shapes that no builder makes."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from ..tensor import Tensor
from ..types import Type

FLOATS = frozenset({Type.F32, Type.F16, Type.BF16})
#: Types to which and from which rows of floats can be converted.
QUANTISED = frozenset({
    Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K,
    Type.MXFP4, Type.IQ4_NL,
})  # fmt: skip
#: Types that are read but never written.
CODED = frozenset({
    Type.IQ4_XS, Type.IQ3_S, Type.IQ3_XXS, Type.IQ2_S, Type.IQ2_XS, Type.IQ2_XXS, Type.IQ1_M, Type.IQ1_S, Type.TQ1_0,
    Type.TQ2_0, Type.NVFP4, Type.Q1_0, Type.Q2_0,
})  # fmt: skip
WEIGHTS = FLOATS | QUANTISED | CODED
F32 = frozenset({Type.F32})
F16_F32 = frozenset({Type.F32, Type.F16})
I32 = frozenset({Type.I32})


def source(t: Tensor, i: int) -> Tensor:
    """Return a required source."""
    found = t.src[i]
    assert found is not None, f"{t.op.name} '{t.name}' has no source {i}"
    return found


def optional(t: Tensor, i: int) -> Tensor | None:
    """Return a source, or None if the node does not have it."""
    return t.src[i] if i < len(t.src) else None


def wrong_type(t: Tensor, *allowed: AbstractSet[Type]) -> str:
    """Return why the type of dst or a source is not allowed; empty if all are. Missing sources are ignored."""
    tensors = [t, *t.src]
    for i, types in enumerate(allowed):
        x = tensors[i] if i < len(tensors) else None
        if x is not None and x.type not in types:
            what = "dst" if i == 0 else f"src{i - 1}"
            return f"{what} '{x.name}' is {x.type.ggml_name}, not {' or '.join(sorted(y.ggml_name for y in types))}"
    return ""


def gaps(t: Tensor, *which: int) -> str:
    """Require contiguous rows in dst (0) and sources (1, 2, ...)."""
    tensors = [t, *t.src]
    for i in which:
        x = tensors[i] if i < len(tensors) else None
        if x is not None and x.nb[0] != x.type.type_size and x.ne[0] != 1:
            return f"{'dst' if i == 0 else f'src{i - 1}'} '{x.name}' has gaps within its rows (nb {x.nb})"
    return ""


def not_f32_rows(t: Tensor) -> str:
    """Require F32 and contiguous rows in dst and the first source."""
    return wrong_type(t, F32, F32) or gaps(t, 0, 1)


def not_f32_pair(t: Tensor) -> str:
    """Require F32 in the second source, too."""
    return wrong_type(t, F32, F32, F32) or gaps(t, 0, 1)


def any_gaps(t: Tensor) -> str:
    """Require contiguous tensors."""
    for i, x in enumerate((t, *t.src)):
        if x is not None and not x.is_contiguous():
            return f"{'dst' if i == 0 else f'src{i - 1}'} '{x.name}' has gaps (nb {x.nb})"
    return ""


def not_all_f32(t: Tensor) -> str:
    """Require F32 in dst and all sources."""
    return wrong_type(t, *[F32] * (len(t.src) + 1))


def not_dense_f32(t: Tensor) -> str:
    """Require contiguous F32 tensors."""
    return any_gaps(t) or not_all_f32(t)


def like_source(t: Tensor) -> bool:
    """Whether the result has the shape of its first source."""
    return t.ne == source(t, 0).ne


def is_broadcast(t: Tensor) -> bool:
    """Whether, besides, the second source repeats to that shape."""
    return like_source(t) and all(n and m % n == 0 for n, m in zip(source(t, 1).ne, t.ne, strict=True))


def one_a_row(t: Tensor) -> bool:
    """Whether the result has one element for each row."""
    return t.ne == (1, *source(t, 0).ne[1:])
