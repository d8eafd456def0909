"""Headers of models without data, for every architecture name of llama.cpp; see `find_headers`."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

DATA = Path(__file__).parent / "data" / "headers.json.gz"
_ALIGNMENT = 32


@cache
def known() -> dict[str, Any]:
    """Return keys and tensors by architecture; where llama.cpp takes none, ``why_not``."""
    return json.loads(gzip.decompress(DATA.read_bytes()))


def write_known(arch: str, folder: Path) -> Path:
    """Write the header of an architecture, and return its file."""
    about = known()[arch]
    path = folder / f"{arch}.gguf"
    write_header(path, arch, about["keys"], about["tensors"])
    return path


def write_header(path: Path, arch: str, keys: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Write a header with F32 tensors, and a hole for their data."""
    writer = GGUFWriter(str(path), arch)
    for name, value in keys.items():
        full = name if name.startswith(("tokenizer", "general", "xielu")) else f"{arch}.{name}"
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            (writer.add_uint32 if value >= 0 else writer.add_int32)(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
        else:
            writer.add_array(full, value)
    writer.add_tokenizer_model("no_vocab")
    total = 0
    for name, ne in tensors.items():
        size = 4 * int(np.prod(ne))
        writer.add_tensor_info(name, tuple(reversed(ne)), np.dtype(np.float32), size)
        total += -(-size // _ALIGNMENT) * _ALIGNMENT
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // _ALIGNMENT) * _ALIGNMENT + total)
