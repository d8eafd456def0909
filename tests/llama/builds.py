"""Further builds of llama.cpp, on which slow tests run, too: the folders that ``PYGGML_TEST_LIBRARIES`` names."""

from __future__ import annotations

import os
from pathlib import Path

from pyggml.llama.library import find_llama

__all__ = ["BUILDS"]

#: Their libllama, with the libraries of ggml in the same folder.
BUILDS: list[Path] = [find_llama(p) for p in os.environ.get("PYGGML_TEST_LIBRARIES", "").split(os.pathsep) if p]
