"""Which nodes have CUDA kernels, and how a node becomes launches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..tensor import Tensor
from ..types import GluOp, Op, Type

if TYPE_CHECKING:
    from ..kernels.cuda.launch import Launch, Operand, Workspace

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
#: columns of a tile, and the largest grid beside x; a test compares them with the kernels'
_COLUMNS, _MAX_GRID = 32, 65535


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


def supports_op(op: Tensor) -> bool:
    """Whether there is a kernel for the op, its types and its strides."""
    if op.op.is_empty:
        return True
    a, b, c = ([*op.src, None, None, None])[:3]
    if op.op is Op.MUL_MAT_ID:
        if a is None or not _is_weight(a) or not _is_rows(b) or not op.is_contiguous():
            return False
        return _is_rows(c, Type.I32) and _reaches(op, a)
    if op.op is Op.MUL_MAT:
        if a is None or b is None or not _is_weight(a) or not _is_rows(b) or not op.is_contiguous():
            return False
        return b.ne[3] == 1 and _reaches(op, a)
    if op.op is Op.ADD_ID:
        return _is_rows(op) and _is_rows(a) and _is_rows(b) and _is_rows(c, Type.I32) and op.ne[3] == 1
    if op.op in _BINARY:
        return _is_rows(op) and _is_rows(a) and _is_rows(b)
    if op.op is Op.SCALE:
        # elements are counted in 32 bits
        return a is not None and _is_rows(op) and a.is_contiguous() and op.is_contiguous() and op.numel < 2**31
    if op.op is Op.GLU:
        return _is_rows(op) and op.is_contiguous(1) and all(s is None or s.is_contiguous(1) for s in (a, b))
    if op.op is Op.RMS_NORM:
        return _is_rows(op) and _is_rows(a)
    if op.op in (Op.CPY, Op.CONT, Op.DUP):
        return a is not None and (a.type, op.type) in _COPIES and a.ne == op.ne and _fits_values(op)
    if op.op is Op.SET_ROWS:
        return _is_rows(a) and op.type in _SETS and b is not None and a is not None and _fits_values(a)
    return False


def _fits_values(tensor: Tensor) -> bool:
    """Whether the grids of kernels that take one value a thread reach so far."""
    return tensor.ne[0] * tensor.ne[1] < 2**31 and tensor.ne[2] * tensor.ne[3] <= _MAX_GRID


def _operand(tensor: Tensor) -> Operand:
    from ..kernels.cuda.launch import Operand

    assert tensor.data is not None
    return Operand(tensor.data, tensor.type.ggml_name, tensor.ne, tensor.nb)


def launches_of(op: Tensor, work: Workspace) -> list[Launch]:
    """Return the launches of a node that `supports_op`, and let the workspace forget what the node writes over."""
    made = _launches(op, work)
    assert op.data is not None
    work.forget(op.data, op.data + op.nbytes)
    return made


def _launches(op: Tensor, work: Workspace) -> list[Launch]:
    from ..kernels.cuda import launch

    dst = _operand(op)
    a, *others = [_operand(s) for s in op.src if s is not None]
    made: list[Launch]
    if op.op is Op.MUL_MAT_ID:
        made = launch.mul_mat_id(a, others[0], others[1], dst, work)
    elif op.op is Op.MUL_MAT:
        made = launch.mul_mat(a, others[0], dst, work)
    elif op.op is Op.ADD_ID:
        made = launch.add_id(a, others[0], others[1], dst)
    elif op.op in _BINARY:
        made = launch.binary(_BINARY[op.op], a, others[0], dst)
    elif op.op is Op.SCALE:
        made = launch.scale(a, dst, op.param_f32(0), op.param_f32(1))
    elif op.op is Op.RMS_NORM:
        made = launch.rms_norm(a, dst, op.param_f32(0))
    elif op.op is Op.SET_ROWS:
        made = launch.set_rows(a, others[0], dst)
    elif op.op in (Op.CPY, Op.CONT, Op.DUP):
        made = launch.copy(a, dst)
    else:
        assert op.op is Op.GLU
        gate = GluOp(op.param_i32(0))
        if others:
            value = others[0]
        else:
            half = launch.Operand(a.address + op.ne[0] * op.type.type_size, a.type, a.ne, a.nb)
            a, value = (half, a) if op.param_i32(1) else (a, half)
        alpha = op.param_f32(2) if gate is GluOp.SWIGLU_OAI else 0.0
        made = launch.glu(gate.name.lower(), a, value, dst, alpha, op.param_f32(3))
    return made
