"""Files of routing traces: each format is a module with ``sniff``, ``read`` and, if pyggml writes it, ``write``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...errors import FormatError
from ..trace import Trace
from ..validate import validated
from . import bigmoeonedge, expertflow, fingerprint, jsonl, llama_cpp, moe_cache_eval, onnx_genai
from ._text import read_start

__all__ = ["FORMATS", "open_trace", "save_trace"]

#: ``sniff`` and ``read`` by name, in the order in which a file is tried.
FORMATS: dict[str, tuple[Callable[[bytes], bool], Callable[[Path], Trace]]] = {
    "jsonl": (jsonl.sniff, jsonl.read),
    "bigmoeonedge": (bigmoeonedge.sniff, bigmoeonedge.read),
    "moe-cache-eval": (moe_cache_eval.sniff, moe_cache_eval.read),
    "llama.cpp": (llama_cpp.sniff, llama_cpp.read),
    "expertflow": (expertflow.sniff, expertflow.read),
    "fingerprint": (fingerprint.sniff, fingerprint.read),
    "onnx-genai": (onnx_genai.sniff, onnx_genai.read),
}
_START = 1 << 16


def open_trace(path: Path | str, *, format: str = "") -> Trace:
    """Read the trace of a file, with what may mislead in `Trace.findings`.

    Parameters
    ----------
    path : Path or str
        May be compressed with gzip.
    format : str
        A key of `FORMATS`; if empty, found from the file's first bytes.

    Raises
    ------
    FormatError
        The file does not exist, has an unknown format, or contradicts its format.
    """
    path = Path(path)
    start = read_start(path, _START)
    if format:
        if format not in FORMATS:
            raise FormatError(str(path), f"there is no format '{format}'", hint=f"one of {', '.join(FORMATS)}")
        return validated(FORMATS[format][1](path))
    for sniff, read in FORMATS.values():
        if sniff(start):
            return validated(read(path))
    raise FormatError(
        str(path),
        "of no known format",
        hint=f"{', '.join(FORMATS)}; any JSON lines are read with a first line that describes them",
    )


def save_trace(trace: Trace, path: Path) -> None:
    """Write a trace: as moe-cache-eval's NPZ if ``path`` ends in ``.npz``, otherwise as JSON lines."""
    (moe_cache_eval.write if path.suffix == ".npz" else jsonl.write)(trace, path)
