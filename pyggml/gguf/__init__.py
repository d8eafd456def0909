"""GGUF files without knowledge of models: a lazy, bounds-checked header, and tensors mapped into memory."""

from .file import GGUFFile
from .header import DEFAULT_ALIGNMENT, MAGIC, Entry, Metadata, TensorInfo, ValueType
from .mistaken import require_model

__all__ = ["DEFAULT_ALIGNMENT", "MAGIC", "Entry", "GGUFFile", "Metadata", "TensorInfo", "ValueType", "require_model"]
