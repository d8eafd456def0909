"""Builders of graph nodes: ``mul_mat_id(as_, b, ids)`` makes a tensor with its op, sources and shape.

Functions have upstream's names without the prefix, and its shapes, strides, parameters and checks. None touches data.
Sources have upstream's slots, with None for an absent one: SOFT_MAX has (a, mask, sinks), ROPE (a, positions, factors),
GLU (a, b), FLASH_ATTN_EXT (q, k, v, mask, sinks). Inside ``with graph:`` the graph collects all new tensors.
"""

from __future__ import annotations

from inspect import isfunction

from . import activation, arith, attention, hyper_connections, layout, matmul, modes, recurrent, rotary, rows
from ._make import naming
from .activation import *
from .arith import *
from .attention import *
from .hyper_connections import *
from .layout import *
from .matmul import *
from .modes import *
from .recurrent import *
from .rotary import *
from .rows import *

__all__: list[str] = []
__all__ += activation.__all__
__all__ += arith.__all__
__all__ += attention.__all__
__all__ += hyper_connections.__all__
__all__ += layout.__all__
__all__ += matmul.__all__
__all__ += modes.__all__
__all__ += recurrent.__all__
__all__ += rotary.__all__
__all__ += rows.__all__

for _name in __all__:
    if isfunction(globals()[_name]):
        globals()[_name] = naming(globals()[_name])
