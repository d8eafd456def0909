"""Enumerated parameters of ops, with upstream's values in ``op_params``."""

from __future__ import annotations

from enum import IntEnum

from ..tensor import Tensor
from ..types import Op

__all__ = ["OpHint", "Prec", "RopeType", "SortOrder", "TriType"]

#: The parameter of a MUL_MAT_ID that may have negative ids; upstream has none.
SKIP_PARAM = 1


class Prec(IntEnum):
    """Minimum precision of sums, or of a converted source."""

    DEFAULT = 0
    F32 = 10
    BF16 = 15
    F16 = 20
    Q8 = 30
    Q4 = 40


class OpHint(IntEnum):
    """What a matrix multiplication may assume about its first source."""

    NONE = 0
    SRC0_IS_HADAMARD = 1


class RopeType(IntEnum):
    """Which elements of a row rotate together, and how many positions a token has."""

    NORMAL = 0
    NEOX = 2
    MROPE = 8
    VISION = 24
    IMROPE = 40


class SortOrder(IntEnum):
    """The order of ARGSORT."""

    ASC = 0
    DESC = 1


class TriType(IntEnum):
    """The triangle that TRI keeps; with DIAG, including its diagonal."""

    UPPER_DIAG = 0
    UPPER = 1
    LOWER_DIAG = 2
    LOWER = 3


def skips_ids(node: Tensor) -> bool:
    """Return whether a product with experts leaves out pairs of token and slot with a negative id."""
    return node.op is Op.MUL_MAT_ID and node.param_i32(SKIP_PARAM) != 0
