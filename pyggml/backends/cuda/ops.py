"""Which nodes have CUDA kernels, and how a node becomes launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ...ops.modes import RopeType, SortOrder
from ...tensor import Tensor
from ...types import GluOp, Op, Type, UnaryOp

if TYPE_CHECKING:
    from ...kernels.cuda.launch import Launch, Operand, Workspace

#: types of weights that the matrix products take
WEIGHT_TYPES = frozenset(
    {
        *(Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q8_0),
        *(Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.MXFP4),
    }
)
_BINARY = {Op.ADD: "add", Op.SUB: "sub", Op.MUL: "mul", Op.DIV: "div"}
_COPIES = {(s, d) for s in (Type.F32, Type.F16) for d in (Type.F32, Type.F16)}
_SETS = {Type.F32, Type.F16, Type.BF16}
_GETS = {Type.F32, Type.F16, Type.BF16, Type.I32}
_ROPED = {Type.F32, Type.F16}
_ROPE_MODES = (RopeType.NORMAL, RopeType.NEOX)
_UNARY = {
    UnaryOp[name]: name.lower()
    for name in ("SILU", "SIGMOID", "RELU", "GELU", "GELU_ERF", "GELU_QUICK", "TANH", "EXP", "NEG")
}
#: columns of a tile, the largest grid beside x, the longest row that is sorted; a test compares them with the kernels'
_COLUMNS, _MAX_GRID, _MAX_SORTED = 32, 65535, 1024


def _is_rows(tensor: Tensor | None, type: Type = Type.F32) -> bool:
    """Whether the rows are dense."""
    return tensor is not None and tensor.type is type and tensor.nb[0] == type.type_size


def _is_weight(tensor: Tensor | None) -> bool:
    return (
        tensor is not None
        and tensor.type in WEIGHT_TYPES
        and tensor.nb[0] == tensor.type.type_size
        and not tensor.is_transposed
        and tensor.ne[3] == 1
    )


def _reaches(op: Tensor, weight: Tensor) -> bool:
    """Whether the grids reach so far; rows of one block go the few-token way, however many there are."""
    if weight.type.is_quantized and weight.ne[0] < 64 and max(op.ne[1], op.ne[2]) > _MAX_GRID:
        return False
    return op.ne[1] * op.ne[2] // _COLUMNS + weight.ne[2] <= _MAX_GRID


def _fits_values(tensor: Tensor) -> bool:
    """Whether the grids of kernels that take one value a thread reach so far."""
    return tensor.ne[0] * tensor.ne[1] < 2**31 and tensor.ne[2] * tensor.ne[3] <= _MAX_GRID


def _is_one_row(op: Tensor) -> bool:
    """Whether op and source can be taken as one row; elements are counted in 32 bits."""
    a = op.src[0]
    return (
        a is not None and _is_rows(op) and _is_rows(a) and a.is_contiguous() and op.is_contiguous() and op.numel < 2**31
    )


def _mul_mat_id(op: Tensor, a: Tensor, b: Tensor | None, c: Tensor | None) -> bool:
    return _is_weight(a) and _is_rows(b) and op.is_contiguous() and _is_rows(c, Type.I32) and _reaches(op, a)


def _mul_mat(op: Tensor, a: Tensor, b: Tensor | None, c: Tensor | None) -> bool:
    return _is_weight(a) and _is_rows(b) and b is not None and b.ne[3] == 1 and op.is_contiguous() and _reaches(op, a)


def _add_id(op: Tensor, a: Tensor, b: Tensor | None, c: Tensor | None) -> bool:
    return _is_rows(op) and _is_rows(a) and _is_rows(b) and _is_rows(c, Type.I32) and op.ne[3] == 1


def _binary(op: Tensor, a: Tensor, b: Tensor | None, c: Tensor | None) -> bool:
    return _is_rows(op) and _is_rows(a) and _is_rows(b)


def _glu(op: Tensor, a: Tensor, b: Tensor | None, c: Tensor | None) -> bool:
    return _is_rows(op) and op.is_contiguous(1) and a.is_contiguous(1) and (b is None or b.is_contiguous(1))


def _unary(op: Tensor, a: Tensor, b: Tensor | None, c: Tensor | None) -> bool:
    return op.param_i32(0) in _UNARY and _is_one_row(op)


def _reduce(op: Tensor, a: Tensor, b: Tensor | None, c: Tensor | None) -> bool:
    return _is_rows(op) and _is_rows(a)


def _sort(op: Tensor, a: Tensor, b: Tensor | None, c: Tensor | None) -> bool:
    return _is_rows(op, Type.I32) and _is_rows(a) and a.ne[0] <= _MAX_SORTED


def _soft_max(op: Tensor, a: Tensor, b: Tensor | None, c: Tensor | None) -> bool:
    is_mask = b is None or _is_rows(b) or _is_rows(b, Type.F16)
    return _is_rows(op) and _is_rows(a) and is_mask and (c is None or _is_rows(c))


def _rope(op: Tensor, a: Tensor, b: Tensor | None, c: Tensor | None) -> bool:
    if op.type not in _ROPED or not _is_rows(op, op.type) or not _is_rows(a, op.type) or not _is_rows(b, Type.I32):
        return False
    n_dims, is_shifted = op.param_i32(1), op.param_i32(15)
    fits = 0 < n_dims <= op.ne[0] and n_dims % 2 == 0 and op.ne[0] % 2 == 0
    return fits and not is_shifted and op.param_i32(2) in _ROPE_MODES and (c is None or _is_rows(c))


def _copy(op: Tensor, a: Tensor, b: Tensor | None, c: Tensor | None) -> bool:
    # of two shapes one must be dense, to be taken for the other
    shape = a if op.is_contiguous() else op
    fits = a.ne == op.ne or op.is_contiguous() or a.is_contiguous()
    return (a.type, op.type) in _COPIES and fits and _fits_values(shape)


def _set_rows(op: Tensor, a: Tensor, b: Tensor | None, c: Tensor | None) -> bool:
    return _is_rows(a) and op.type in _SETS and b is not None and _fits_values(a)


def _get_rows(op: Tensor, a: Tensor, b: Tensor | None, c: Tensor | None) -> bool:
    return a.type in _GETS and _is_rows(a, a.type) and b is not None and b.type is Type.I32 and _fits_values(op)


#: whether there is a kernel for an op with these sources
_CHECKS: dict[Op, Callable[[Tensor, Tensor, Tensor | None, Tensor | None], bool]] = {
    Op.MUL_MAT_ID: _mul_mat_id,
    Op.MUL_MAT: _mul_mat,
    Op.ADD_ID: _add_id,
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys((Op.SCALE, Op.CLAMP), lambda op, a, b, c: _is_one_row(op)),
    Op.UNARY: _unary,
    Op.GLU: _glu,
    **dict.fromkeys((Op.RMS_NORM, Op.SUM_ROWS), _reduce),
    **dict.fromkeys((Op.ARGSORT, Op.TOP_K), _sort),
    Op.SOFT_MAX: _soft_max,
    Op.ROPE: _rope,
    **dict.fromkeys((Op.CPY, Op.CONT, Op.DUP), _copy),
    Op.SET_ROWS: _set_rows,
    Op.GET_ROWS: _get_rows,
}


def supports_op(op: Tensor) -> bool:
    """Whether there is a kernel for the op, its types and its strides."""
    if op.op.is_empty:
        return True
    a, b, c = ([*op.src, None, None, None])[:3]
    check = _CHECKS.get(op.op)
    return check is not None and a is not None and check(op, a, b, c)


def _operand(tensor: Tensor) -> Operand:
    from ...kernels.cuda.launch import Operand

    assert tensor.data is not None
    return Operand(tensor.data, tensor.type.ggml_name, tensor.ne, tensor.nb)


def launches_of(op: Tensor, work: Workspace) -> list[Launch]:
    """Return the launches of a node that `supports_op`, and let the workspace forget what the node writes over."""
    made = _launches(op, work)
    assert op.data is not None
    work.forget(op.data, op.data + op.nbytes)
    return made


def _launches(op: Tensor, work: Workspace) -> list[Launch]:
    dst = _operand(op)
    a, b, c = ([None if s is None else _operand(s) for s in op.src] + [None, None])[:3]
    assert a is not None
    made = _from_one(op, a, dst) or _with_optional(op, a, b, c, dst)
    if not made and b is not None:
        made = _from_two(op, a, b, dst, work) or _from_three(op, a, b, c, dst, work)
    assert made, op.op
    return made


def _from_one(op: Tensor, a: Operand, dst: Operand) -> list[Launch]:
    """Return the launches of an op with one source; none if it is no such op."""
    from ...kernels.cuda import launch

    made: list[Launch] = []
    if op.op is Op.SCALE:
        made = launch.scale(a, dst, op.param_f32(0), op.param_f32(1))
    elif op.op is Op.CLAMP:
        made = launch.unary("clamp", a, dst, op.param_f32(0), op.param_f32(1))
    elif op.op is Op.UNARY:
        made = launch.unary(_UNARY[UnaryOp(op.param_i32(0))], a, dst)
    elif op.op is Op.RMS_NORM:
        made = launch.rms_norm(a, dst, op.param_f32(0))
    elif op.op is Op.SUM_ROWS:
        made = launch.sum_rows(a, dst)
    elif op.op in (Op.ARGSORT, Op.TOP_K):
        made = launch.argsort(a, dst, descending=op.op is Op.TOP_K or op.param_i32(0) == SortOrder.DESC)
    elif op.op in (Op.CPY, Op.CONT, Op.DUP):
        made = launch.copy(a, dst, is_dst_dense=op.is_contiguous())
    return made


def _with_optional(op: Tensor, a: Operand, b: Operand | None, c: Operand | None, dst: Operand) -> list[Launch]:
    """Return the launches of an op that may do without its second source; none if it is no such op."""
    from ...kernels.cuda import launch

    made: list[Launch] = []
    if op.op is Op.GLU:
        gate = GluOp(op.param_i32(0))
        if b is None:  # the halves of one tensor's rows
            half = launch.Operand(a.address + op.ne[0] * op.type.type_size, a.type, a.ne, a.nb)
            a, b = (half, a) if op.param_i32(1) else (a, half)
        alpha = op.param_f32(2) if gate is GluOp.SWIGLU_OAI else 0.0
        made = launch.glu(gate.name.lower(), a, b, dst, alpha, op.param_f32(3))
    elif op.op is Op.SOFT_MAX:
        made = launch.soft_max(a, b, c, dst, op.param_f32(0), op.param_f32(1))
    return made


def _from_two(op: Tensor, a: Operand, b: Operand, dst: Operand, work: Workspace) -> list[Launch]:
    """Return the launches of an op with two sources; none if it is no such op."""
    from ...kernels.cuda import launch

    made: list[Launch] = []
    if op.op in _BINARY:
        made = launch.binary(_BINARY[op.op], a, b, dst)
    elif op.op is Op.MUL_MAT:
        made = launch.mul_mat(a, b, dst, work)
    elif op.op is Op.SET_ROWS:
        made = launch.set_rows(a, b, dst)
    elif op.op is Op.GET_ROWS:
        made = launch.get_rows(a, b, dst)
    return made


def _from_three(op: Tensor, a: Operand, b: Operand, c: Operand | None, dst: Operand, work: Workspace) -> list[Launch]:
    """Return the launches of an op with three sources, of which ROPE's last may lack; none if it is no such op."""
    from ...kernels.cuda import launch

    made: list[Launch] = []
    if op.op is Op.ROPE:
        n_dims, is_neox, n_ctx_orig = op.param_i32(1), op.param_i32(2) == RopeType.NEOX, op.param_i32(4)
        how = launch.Rope(n_dims, is_neox, n_ctx_orig, *(op.param_f32(i) for i in range(5, 11)))
        made = launch.rope(a, b, c, dst, how)
    elif c is not None and op.op is Op.MUL_MAT_ID:
        made = launch.mul_mat_id(a, b, c, dst, work)
    elif c is not None and op.op is Op.ADD_ID:
        made = launch.add_id(a, b, c, dst)
    return made
