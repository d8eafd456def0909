"""Places tensors in memory: the linear allocator for weights, the graph allocator for results."""

from .graph import GallocGraph, Gallocr
from .linear import Context, HasBufferType, Tallocr, alloc_tensors
from .offsets import DynTallocr

__all__ = ["Context", "DynTallocr", "GallocGraph", "Gallocr", "HasBufferType", "Tallocr", "alloc_tensors"]
