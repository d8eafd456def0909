"""Parameters of ops that are one of a few; the values stand in ``op_params`` as upstream's."""

from __future__ import annotations

from enum import IntEnum


class Prec(IntEnum):
    """Least precision of accumulation, or of a converted source."""

    DEFAULT = 0
    F32 = 10
    BF16 = 15
    F16 = 20
    Q8 = 30
    Q4 = 40


class OpHint(IntEnum):
    """What a matrix multiplication may presume of its first source."""

    NONE = 0
    SRC0_IS_HADAMARD = 1


class RopeType(IntEnum):
    """Which elements of a row rotate together, and by how many positions a token has."""

    NORMAL = 0
    NEOX = 2
    MROPE = 8
    VISION = 24
    IMROPE = 40


class SortOrder(IntEnum):
    """Order of ARGSORT."""

    ASC = 0
    DESC = 1


class TriType(IntEnum):
    """Which triangle TRI keeps; with DIAG, its diagonal too."""

    UPPER_DIAG = 0
    UPPER = 1
    LOWER_DIAG = 2
    LOWER = 3
