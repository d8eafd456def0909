"""Well-known models by name: published sizes, tensors, their types for each quantisation, and headers without data."""

from .header import find_model, header_path, write_header
from .quantization import QUANTS, TypedTensor, parse_quant, type_tensors
from .sizes import MODELS, ModelSizes
from .tensors import Shape, shapes

__all__ = [
    "MODELS",
    "QUANTS",
    "ModelSizes",
    "Shape",
    "TypedTensor",
    "find_model",
    "header_path",
    "parse_quant",
    "shapes",
    "type_tensors",
    "write_header",
]
