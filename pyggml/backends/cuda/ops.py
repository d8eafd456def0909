"""The ops that have CUDA kernels: for each, what its kernel refuses, and the launches of a node.

Declared as the host's are in `pyggml.opset`: by a `Kernel`, which needs no Numba until it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, NamedTuple

from ...ops.modes import RopeType, SortOrder, skips_ids
from ...opset import Kernel, reason_unsupported
from ...opset.checks import F16_F32, F32, FLOATS, I32, source, wrong_type
from ...tensor import Tensor
from ...types import GluOp, Op, Type, UnaryOp

if TYPE_CHECKING:
    from ...kernels.cuda.launch import Launch, Operand, Workspace

__all__ = ["KERNELS", "WEIGHT_TYPES", "launches_of", "reason_refused"]

#: types of weights that the matrix products take
WEIGHT_TYPES = FLOATS | {
    *(Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q8_0),
    *(Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.MXFP4),
}
_GETS = FLOATS | I32
_ROPE_MODES = (RopeType.NORMAL, RopeType.NEOX)
_UNARY = {
    UnaryOp[name]: name.lower()
    for name in ("SILU", "SIGMOID", "RELU", "GELU", "GELU_ERF", "GELU_QUICK", "TANH", "EXP", "NEG")
}
#: columns of a tile, the largest grid beside x, the longest row that is sorted; a test compares them with the kernels'
_COLUMNS, _MAX_GRID, _MAX_SORTED = 32, 65535, 1024
_TOO_LARGE = "the grid would be too large"

KERNELS: dict[Op, Kernel[Workspace, list[Launch]]] = {}


class _Node(NamedTuple):
    """A node whose launches are made: `kernels.cuda.launch`, operands (sources None if missing), the stream's workspace."""

    launch: Any
    t: Tensor
    dst: Operand
    a: Any
    b: Any
    c: Any
    work: Workspace


def _declare(
    *ops: Op, refuses: Callable[[Tensor], str], make: Callable[[_Node], list[Launch]], n_sources: int = 1
) -> None:
    def call(work: Workspace, t: Tensor) -> list[Launch]:
        from ...kernels.cuda import launch

        def operand(x: Tensor) -> Operand:
            assert x.data is not None
            return launch.Operand(x.data, x.type.ggml_name, x.ne, x.nb)

        a, b, c = (None if x is None else operand(x) for x in (*t.src, None, None, None)[:3])
        return make(_Node(launch, t, operand(t), a, b, c, work))

    KERNELS.update(dict.fromkeys(ops, Kernel(refuses=refuses, call=call, n_sources=n_sources)))


def reason_refused(t: Tensor) -> str:
    """Return why there is no kernel for a node, its types and its strides; empty if there is one."""
    return reason_unsupported(t, KERNELS)


def launches_of(t: Tensor, work: Workspace) -> list[Launch]:
    """Return the launches of a node that is not refused, and let the workspace forget what the node writes over."""
    assert t.data is not None
    made = KERNELS[t.op].call(work, t)
    work.forget(t.data, t.data + t.nbytes)
    return made


# -- what declarations share ---------------------------------------------------------------


def _not_rows(t: Tensor, *kinds: AbstractSet[Type]) -> str:
    """Require rows of these types in dst and sources, with elements side by side. Missing sources are ignored."""
    for x in (t, *t.src)[: len(kinds)]:
        if x is not None and x.nb[0] != x.type.type_size:
            return f"'{x.name}' has gaps within its rows (nb {x.nb})"
    return wrong_type(t, *kinds)


def _not_one_row(t: Tensor) -> str:
    """Require a dst and a source that can be taken as one row; elements are counted in 32 bits."""
    if not t.is_contiguous() or not source(t, 0).is_contiguous():
        return "dst or src0 has gaps"
    return _not_rows(t, F32, F32) or (_TOO_LARGE if t.numel >= 2**31 else "")


def _too_many(t: Tensor) -> str:
    """Require the grids of kernels that take one value a thread to reach so far."""
    return "" if t.ne[0] * t.ne[1] < 2**31 and t.ne[2] * t.ne[3] <= _MAX_GRID else _TOO_LARGE


# -- products ------------------------------------------------------------------------------


def _refuses_product(t: Tensor) -> str:
    weight = source(t, 0)
    if skips_ids(t):
        return "negative ids are to be skipped"
    if weight.is_transposed or weight.ne[3] != 1 or (t.op is Op.MUL_MAT and source(t, 1).ne[3] != 1):
        return "a source is transposed or has four dimensions"
    if not t.is_contiguous():
        return "dst has gaps"
    # rows of one block go the few-token way, however many there are
    is_short = weight.type.is_quantized and weight.ne[0] < 64
    if is_short and max(t.ne[1], t.ne[2]) > _MAX_GRID:
        return _TOO_LARGE
    if t.ne[1] * t.ne[2] // _COLUMNS + weight.ne[2] > _MAX_GRID:
        return _TOO_LARGE
    return _not_rows(t, F32, WEIGHT_TYPES, F32, *(I32,) * (t.op is Op.MUL_MAT_ID))


_declare(Op.MUL_MAT, refuses=_refuses_product, make=lambda n: n.launch.mul_mat(n.a, n.b, n.dst, n.work), n_sources=2)
_declare(
    Op.MUL_MAT_ID,
    refuses=_refuses_product,
    make=lambda n: n.launch.mul_mat_id(n.a, n.b, n.c, n.dst, n.work),
    n_sources=3,
)

# -- element by element --------------------------------------------------------------------


def _refuses_unary(t: Tensor) -> str:
    if t.param_i32(0) not in _UNARY:
        return f"there is no kernel for {t.op_desc}"
    return _not_one_row(t)


def _refuses_glu(t: Tensor) -> str:
    if not all(x.is_contiguous(1) for x in (t, *t.src) if x is not None):
        return "rows are not evenly apart"
    return _not_rows(t, F32, F32, F32)


def _glu(n: _Node) -> list[Launch]:
    t, gate, a, b = n.t, GluOp(n.t.param_i32(0)), n.a, n.b
    if b is None:  # the halves of one tensor's rows
        half = n.launch.Operand(a.address + t.ne[0] * t.type.type_size, a.type, a.ne, a.nb)
        a, b = (half, a) if t.param_i32(1) else (a, half)
    alpha = t.param_f32(2) if gate is GluOp.SWIGLU_OAI else 0.0
    made: list[Launch] = n.launch.glu(gate.name.lower(), a, b, n.dst, alpha, t.param_f32(3))
    return made


_declare(
    *(Op.ADD, Op.SUB, Op.MUL, Op.DIV),
    refuses=lambda t: _not_rows(t, F32, F32, F32),
    make=lambda n: n.launch.binary(n.t.op.name.lower(), n.a, n.b, n.dst),
    n_sources=2,
)
_declare(
    Op.ADD_ID,
    refuses=lambda t: "dst has four dimensions" if t.ne[3] != 1 else _not_rows(t, F32, F32, F32, I32),
    make=lambda n: n.launch.add_id(n.a, n.b, n.c, n.dst),
    n_sources=3,
)
_declare(
    Op.SCALE,
    refuses=_not_one_row,
    make=lambda n: n.launch.scale(n.a, n.dst, n.t.param_f32(0), n.t.param_f32(1)),
)
_declare(
    Op.CLAMP,
    refuses=_not_one_row,
    make=lambda n: n.launch.unary("clamp", n.a, n.dst, n.t.param_f32(0), n.t.param_f32(1)),
)
_declare(
    Op.UNARY,
    refuses=_refuses_unary,
    make=lambda n: n.launch.unary(_UNARY[UnaryOp(n.t.param_i32(0))], n.a, n.dst),
)
_declare(Op.GLU, refuses=_refuses_glu, make=_glu)

# -- rows ----------------------------------------------------------------------------------


def _refuses_order(t: Tensor) -> str:
    n = source(t, 0).ne[0]
    return f"rows of {n} elements: at most {_MAX_SORTED} are sorted" if n > _MAX_SORTED else _not_rows(t, I32, F32)


def _argsort(n: _Node) -> list[Launch]:
    is_descending = n.t.op is Op.TOP_K or n.t.param_i32(0) == SortOrder.DESC
    made: list[Launch] = n.launch.argsort(n.a, n.dst, descending=is_descending)
    return made


def _refuses_rope(t: Tensor) -> str:
    n_dims, mode = t.param_i32(1), t.param_i32(2)
    if mode not in _ROPE_MODES or t.param_i32(15):
        return f"rope mode {mode} with offset {t.param_i32(15)}"
    if not 0 < n_dims <= t.ne[0] or n_dims % 2 or t.ne[0] % 2:
        return f"rope cannot turn {n_dims} of {t.ne[0]} elements"
    return _not_rows(t, F16_F32, {t.type}, I32, F32)


def _rope(n: _Node) -> list[Launch]:
    n_dims, is_neox, n_ctx_orig = n.t.param_i32(1), n.t.param_i32(2) == RopeType.NEOX, n.t.param_i32(4)
    how = n.launch.Rope(n_dims, is_neox, n_ctx_orig, *(n.t.param_f32(i) for i in range(5, 11)))
    made: list[Launch] = n.launch.rope(n.a, n.b, n.c, n.dst, how)
    return made


_declare(
    Op.RMS_NORM,
    refuses=lambda t: _not_rows(t, F32, F32),
    make=lambda n: n.launch.rms_norm(n.a, n.dst, n.t.param_f32(0)),
)
_declare(Op.SUM_ROWS, refuses=lambda t: _not_rows(t, F32, F32), make=lambda n: n.launch.sum_rows(n.a, n.dst))
_declare(Op.ARGSORT, Op.TOP_K, refuses=_refuses_order, make=_argsort)
_declare(
    Op.SOFT_MAX,
    refuses=lambda t: _not_rows(t, F32, F32, F16_F32, F32),
    make=lambda n: n.launch.soft_max(n.a, n.b, n.c, n.dst, n.t.param_f32(0), n.t.param_f32(1)),
)
_declare(Op.ROPE, refuses=_refuses_rope, make=_rope, n_sources=2)

# -- copies --------------------------------------------------------------------------------


def _refuses_copy(t: Tensor) -> str:
    a, is_dense = source(t, 0), t.is_contiguous()
    if a.ne != t.ne and not is_dense and not a.is_contiguous():
        return "of two shapes one must have no gaps, to be taken for the other"
    return wrong_type(t, F16_F32, F16_F32) or _too_many(a if is_dense else t)


_declare(
    *(Op.CPY, Op.CONT, Op.DUP),
    refuses=_refuses_copy,
    make=lambda n: n.launch.copy(n.a, n.dst, is_dst_dense=n.t.is_contiguous()),
)
_declare(
    Op.SET_ROWS,
    refuses=lambda t: _not_rows(t, FLOATS, F32) or _too_many(source(t, 0)),
    make=lambda n: n.launch.set_rows(n.a, n.b, n.dst),
    n_sources=2,
)
_declare(
    Op.GET_ROWS,
    refuses=lambda t: wrong_type(t, _GETS, _GETS, I32) or _not_rows(t, _GETS, _GETS) or _too_many(t),
    make=lambda n: n.launch.get_rows(n.a, n.b, n.dst),
    n_sources=2,
)
