"""ggml's element types, ops, flags and usages, and the few limits that influence decisions.

Values of `Type`, `TensorFlag`, `BufferUsage`, `UnaryOp` and `GluOp` equal upstream's, because files and ``op_params``
contain them. Values of `Op` are ours.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import NamedTuple

from .errors import GraphError

MAX_DIMS = 4
#: Bytes of one tensor; sizes and strides are 64-bit integers.
MAX_BYTES = 2**63 - 1
#: Maximum number of sources of an op; also the group size of tensors that a backend keeps alive.
MAX_SRC = 10
#: Bytes of a name in a trace, one less than upstream's array. Names in pyggml have no limit.
MAX_NAME = 63
#: Number of inputs at which a split was cut before ggml 0.26, and by which its list grew.
SCHED_MAX_SPLIT_INPUTS = 30
#: Pipeline copies of a scheduler with ``parallel=True``.
SCHED_MAX_COPIES = 4
SIZE_MAX = 2**64 - 1


class TypeTraits(NamedTuple):
    """The memory layout of an element type."""

    block_size: int  #: elements per block
    type_size: int  #: bytes per block
    is_quantized: bool


class Type(IntEnum):
    """Element types; the values are ggml's and GGUF's."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42

    # instance attributes, filled from the table below
    block_size: int
    type_size: int
    is_quantized: bool

    @property
    def ggml_name(self) -> str:
        """Upstream's name: lower case, except the K of K-quants."""
        name = self.name.lower()
        return name[:-1] + "K" if name.endswith("_k") else name

    @classmethod
    def of(cls, name: str | Type) -> Type:
        """Return the type with a name in any case (``"q4_K"``), or the type itself.

        Raises
        ------
        GraphError
            No type has that name.
        """
        if isinstance(name, Type):
            return name
        try:
            return cls[name.upper()]
        except (KeyError, AttributeError):
            known = ", ".join(t.ggml_name for t in cls)
            raise GraphError(f"no type is called {name!r}", hint=f"there are {known}") from None

    def row_size(self, n: int) -> int:
        """Return the bytes of a row of ``n`` elements; ``n`` must be a multiple of the block size."""
        return self.type_size * n // self.block_size


_TRAITS: dict[Type, TypeTraits] = {
    Type.F32: TypeTraits(1, 4, False),
    Type.F16: TypeTraits(1, 2, False),
    Type.Q4_0: TypeTraits(32, 18, True),
    Type.Q4_1: TypeTraits(32, 20, True),
    Type.Q5_0: TypeTraits(32, 22, True),
    Type.Q5_1: TypeTraits(32, 24, True),
    Type.Q8_0: TypeTraits(32, 34, True),
    Type.Q8_1: TypeTraits(32, 36, True),
    Type.Q2_K: TypeTraits(256, 84, True),
    Type.Q3_K: TypeTraits(256, 110, True),
    Type.Q4_K: TypeTraits(256, 144, True),
    Type.Q5_K: TypeTraits(256, 176, True),
    Type.Q6_K: TypeTraits(256, 210, True),
    Type.Q8_K: TypeTraits(256, 292, True),
    Type.IQ2_XXS: TypeTraits(256, 66, True),
    Type.IQ2_XS: TypeTraits(256, 74, True),
    Type.IQ3_XXS: TypeTraits(256, 98, True),
    Type.IQ1_S: TypeTraits(256, 50, True),
    Type.IQ4_NL: TypeTraits(32, 18, True),
    Type.IQ3_S: TypeTraits(256, 110, True),
    Type.IQ2_S: TypeTraits(256, 82, True),
    Type.IQ4_XS: TypeTraits(256, 136, True),
    Type.I8: TypeTraits(1, 1, False),
    Type.I16: TypeTraits(1, 2, False),
    Type.I32: TypeTraits(1, 4, False),
    Type.I64: TypeTraits(1, 8, False),
    Type.F64: TypeTraits(1, 8, False),
    Type.IQ1_M: TypeTraits(256, 56, True),
    Type.BF16: TypeTraits(1, 2, False),
    Type.TQ1_0: TypeTraits(256, 54, True),
    Type.TQ2_0: TypeTraits(256, 66, True),
    Type.MXFP4: TypeTraits(32, 17, True),
    Type.NVFP4: TypeTraits(64, 36, True),
    Type.Q1_0: TypeTraits(128, 18, True),
    Type.Q2_0: TypeTraits(64, 18, True),
}
for _type in Type:
    _type.block_size, _type.type_size, _type.is_quantized = _TRAITS[_type]


class Op(IntEnum):
    """The ops of ggml 0.26. If ``is_view``, the result is a view of a source and nothing is computed."""

    NONE = 0
    DUP = 1
    ADD = 2
    ADD_ID = 3
    ADD1 = 4
    ACC = 5
    SUB = 6
    MUL = 7
    DIV = 8
    SQR = 9
    SQRT = 10
    LOG = 11
    SIN = 12
    COS = 13
    SUM = 14
    SUM_ROWS = 15
    CUMSUM = 16
    MEAN = 17
    ARGMAX = 18
    COUNT_EQUAL = 19
    REPEAT = 20
    REPEAT_BACK = 21
    CONCAT = 22
    SILU_BACK = 23
    NORM = 24
    RMS_NORM = 25
    RMS_NORM_BACK = 26
    GROUP_NORM = 27
    L2_NORM = 28
    MUL_MAT = 29
    MUL_MAT_ID = 30
    OUT_PROD = 31
    SCALE = 32
    SET = 33
    CPY = 34
    CONT = 35
    RESHAPE = 36
    VIEW = 37
    PERMUTE = 38
    TRANSPOSE = 39
    GET_ROWS = 40
    GET_ROWS_BACK = 41
    SET_ROWS = 42
    DIAG = 43
    DIAG_MASK_INF = 44
    DIAG_MASK_ZERO = 45
    SOFT_MAX = 46
    SOFT_MAX_BACK = 47
    ROPE = 48
    ROPE_BACK = 49
    CLAMP = 50
    CONV_TRANSPOSE_1D = 51
    IM2COL = 52
    IM2COL_BACK = 53
    IM2COL_3D = 54
    COL2IM_1D = 55
    CONV_2D = 56
    CONV_3D = 57
    CONV_2D_DW = 58
    CONV_TRANSPOSE_2D = 59
    POOL_1D = 60
    POOL_2D = 61
    POOL_2D_BACK = 62
    UPSCALE = 63
    PAD = 64
    PAD_REFLECT_1D = 65
    ROLL = 66
    ARANGE = 67
    TIMESTEP_EMBEDDING = 68
    ARGSORT = 69
    TOP_K = 70
    LEAKY_RELU = 71
    TRI = 72
    FILL = 73
    FLASH_ATTN_EXT = 74
    FLASH_ATTN_BACK = 75
    SSM_CONV = 76
    SSM_SCAN = 77
    WIN_PART = 78
    WIN_UNPART = 79
    GET_REL_POS = 80
    ADD_REL_POS = 81
    RWKV_WKV6 = 82
    GATED_LINEAR_ATTN = 83
    RWKV_WKV7 = 84
    SOLVE_TRI = 85
    GATED_DELTA_NET = 86
    LIGHTNING_INDEXER = 87
    DSV4_HC_COMB = 88
    DSV4_HC_PRE = 89
    DSV4_HC_POST = 90
    UNARY = 91
    MAP_CUSTOM1 = 92
    MAP_CUSTOM2 = 93
    MAP_CUSTOM3 = 94
    CUSTOM = 95
    CROSS_ENTROPY_LOSS = 96
    CROSS_ENTROPY_LOSS_BACK = 97
    OPT_STEP_ADAMW = 98
    OPT_STEP_SGD = 99
    GLU = 100

    # instance attributes, filled below
    is_view: bool
    is_empty: bool  #: nothing is computed: a view op or NONE
    can_inplace: bool  #: the allocator may put the result in a source's memory
    may_expand: bool  #: a buffer type may request more than `nbytes` (ggml 0.26)


_VIEWS = {Op.VIEW, Op.RESHAPE, Op.PERMUTE, Op.TRANSPOSE}
#: Mirrors `ggml_op_can_inplace`; contains CLAMP since 0.26 (`Dialect.clamp_inplace`).
_INPLACE = {
    Op.FILL, Op.SCALE, Op.DIAG_MASK_ZERO, Op.DIAG_MASK_INF, Op.ADD, Op.ADD_ID, Op.ADD1, Op.SUB, Op.MUL, Op.DIV, Op.SQR,
    Op.SQRT, Op.LOG, Op.UNARY, Op.ROPE, Op.ROPE_BACK, Op.SILU_BACK, Op.RMS_NORM, Op.RMS_NORM_BACK, Op.CLAMP,
    Op.SOFT_MAX, Op.SOFT_MAX_BACK,
}  # fmt: skip
#: Mirrors `ggml_op_alloc_size_may_expand`.
_MAY_EXPAND = {Op.FLASH_ATTN_EXT, Op.MUL_MAT, Op.MUL_MAT_ID, Op.CUMSUM, Op.ARGSORT, Op.TOP_K}
for _op in Op:
    _op.is_view = _op in _VIEWS
    _op.is_empty = _op in _VIEWS or _op is Op.NONE
    _op.can_inplace = _op in _INPLACE
    _op.may_expand = _op in _MAY_EXPAND


class UnaryOp(IntEnum):
    """Sub-op of UNARY, first word of its ``op_params``."""

    ABS = 0
    SGN = 1
    NEG = 2
    STEP = 3
    TANH = 4
    ELU = 5
    RELU = 6
    SIGMOID = 7
    GELU = 8
    GELU_QUICK = 9
    SILU = 10
    HARDSWISH = 11
    HARDSIGMOID = 12
    EXP = 13
    EXPM1 = 14
    SOFTPLUS = 15
    GELU_ERF = 16
    XIELU = 17
    FLOOR = 18
    CEIL = 19
    ROUND = 20
    TRUNC = 21


class GluOp(IntEnum):
    """Sub-op of GLU, first word of its ``op_params``."""

    REGLU = 0
    GEGLU = 1
    SWIGLU = 2
    SWIGLU_OAI = 3
    GEGLU_ERF = 4
    GEGLU_QUICK = 5
    SWIGLU_CLAMP = 6


class TensorFlag(IntEnum):
    """The role of a tensor in its graph: bits of ``Tensor.flags``, a plain int because it is tested often."""

    NONE = 0
    INPUT = 1
    OUTPUT = 2
    PARAM = 4
    LOSS = 8
    COMPUTE = 16


class BufferUsage(IntEnum):
    """What a buffer holds. Offloading and used-expert copies apply to WEIGHTS."""

    ANY = 0
    WEIGHTS = 1
    COMPUTE = 2

    @classmethod
    def of(cls, name: str | BufferUsage) -> BufferUsage:
        """Return the usage with a name in any case (``"weights"``), or the usage itself.

        Raises
        ------
        GraphError
            No usage has that name.
        """
        if isinstance(name, BufferUsage):
            return name
        try:
            return cls[name.upper()]
        except KeyError:
            known = ", ".join(u.name.lower() for u in cls)
            raise GraphError(f"no usage of buffers is called {name!r}", hint=f"there are {known}") from None


class DeviceType(Enum):
    """Kinds of devices."""

    CPU = "CPU"
    GPU = "GPU"
    IGPU = "IGPU"
    ACCEL = "ACCEL"
