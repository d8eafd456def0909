"""GGUF, the file: a lazy, bounds-checked header and tensors mapped into memory. Nothing here knows a model."""

from .file import GGUFFile
from .header import DEFAULT_ALIGNMENT, MAGIC, Entry, Metadata, TensorInfo, ValueType
from .mistaken import require_model

__all__ = ["DEFAULT_ALIGNMENT", "MAGIC", "Entry", "GGUFFile", "Metadata", "TensorInfo", "ValueType", "require_model"]
