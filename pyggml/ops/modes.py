"""Enumerated parameters of ops, with upstream's values in ``op_params``."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["OpHint", "Prec", "RopeType", "SortOrder", "TriType"]


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
