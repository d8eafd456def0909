"""A model whose layers have experts of two types, so that llama.cpp's expert cache has two groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from edited_models import write_retyped

from pyggml.gguf import TensorInfo
from pyggml.types import Type

__all__ = ["write_mixed"]


def write_mixed(path: Path, plain: Path) -> Path:
    """Write an F32 model again with the experts of layer 1 in F16."""
    return write_retyped(path, plain, _mixed)


def _mixed(info: TensorInfo, raw: np.ndarray) -> tuple[Type, np.ndarray]:
    if info.name.startswith("blk.1.ffn_") and "_exps.weight" in info.name:
        return Type.F16, raw.view(np.float32).astype(np.float16)
    return info.type, raw
