"""PTX of every kernel, by name and compute capability, kept in the user's cache.

The text that the tests execute is the text that a driver loads.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..cpu.cache import user_cache_dir
from . import copies, float_tile, mmvq, reduce, rope, rows, tile
from .formats import FORMATS
from .source import Kernel

FLOATS = ("f32", "f16", "bf16")
#: compute capabilities to compile for; other cards run the PTX of the highest that is not above theirs
TARGETS = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))


def _kernels() -> dict[str, Callable[[], Kernel]]:
    table: dict[str, Callable[[], Kernel]] = {}
    for fmt in FORMATS.values():
        table[f"mmvq_{fmt.name}"] = lambda fmt=fmt: mmvq.quantized(fmt)
        table[f"tile_{fmt.name}"] = lambda fmt=fmt: tile.quantized(fmt)
        if fmt.is_steady(tile.STAGE) and not fmt.is_steady(1):
            table[f"tile_{fmt.name}_odd"] = lambda fmt=fmt: tile.quantized(fmt, odd=True)
    for wide in (True, False):
        tail = "" if wide else "_any"
        for type in FLOATS:
            table[f"mmv_{type}{tail}"] = lambda type=type, wide=wide: mmvq.floating(type, wide=wide)
            table[f"tile_{type}{tail}"] = lambda type=type, wide=wide: float_tile.floating(type, wide=wide)
        table[f"quantize_q8_1{tail}"] = lambda wide=wide: rows.quantize_q8_1(wide=wide)
        table[f"add_id{tail}"] = lambda wide=wide: rows.add_id(wide=wide)
        table[f"scale{tail}"] = lambda wide=wide: rows.scale(wide=wide)
        for name, sign in (("add", "+"), ("sub", "-"), ("mul", "*"), ("div", "/")):
            table[f"{name}{tail}"] = lambda name=name, sign=sign, wide=wide: rows.binary(name, sign, wide=wide)
    for name in rows.GATES:
        table[name] = lambda name=name: rows.glu(name)
    table["group_ids"] = lambda: rows.group_ids(tile.COLUMNS)
    table["fill_ids"] = rows.fill_ids
    for name in rows.UNARY:
        table[name] = lambda name=name: rows.unary(name)
    for src, dst in copies.COPIES:
        table[f"copy_{src}_{dst}"] = lambda src=src, dst=dst: copies.copy(src, dst)
    for type in copies.SETS:
        table[f"set_rows_{type}"] = lambda type=type: copies.set_rows(type)
    for type in copies.GETS:
        table[f"get_rows_{type}"] = lambda type=type: copies.get_rows(type)
    for kind in reduce.MASKS:
        table[f"soft_max_{kind}"] = lambda kind=kind: reduce.soft_max(kind)
    for type in rope.TYPES:
        table[f"rope_{type}"] = lambda type=type: rope.rope(type)
    return table | {k.__name__: k for k in (reduce.rms_norm, reduce.sum_rows, reduce.argsort)}


#: the modules that determine the compiled code
SOURCES = ("copies", "float_tile", "formats", "intrinsics", "mmvq", "reduce", "rope", "rows", "source", "tile")

#: every kernel by name
KERNELS = _kernels()


@cache
def kernel(name: str) -> Kernel:
    """Return the source of a kernel."""
    return KERNELS[name]()


@dataclass(frozen=True)
class Ptx:
    """A compiled kernel: PTX text, and the name of its entry."""

    text: str
    entry: str


def target_for(cc: tuple[int, int]) -> tuple[int, int]:
    """Return the compute capability to compile for, for a card of compute capability ``cc``.

    Raises
    ------
    ValueError
        The card is older than all targets.
    """
    fitting = [t for t in TARGETS if t <= cc]
    if not fitting:
        raise ValueError(f"compute capability {cc[0]}.{cc[1]} is below {TARGETS[0][0]}.{TARGETS[0][1]}")
    return fitting[-1]


@cache
def cache_dir() -> Path | None:
    """Return the folder for compiled kernels, named after sources and compiler; None if there is no writable one."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    for package in ("numba-cuda", "nvidia-nvvm"):
        try:
            digest.update(version(package).encode())
        except ImportError:  # a system-wide toolkit
            digest.update(b"?")
    try:
        folder = user_cache_dir() / "ptx" / digest.hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a read-only home, or none
        return None
    return folder


@cache
def _library(name: str) -> Any:
    """Return numba's intermediate form of a kernel, before it is compiled for a target: by far the longest part.

    Notes
    -----
    Like `numba.cuda.compile_ptx`, which returns the text for one target and drops the intermediate form. No kernel
    depends on the target, so the lowest is used here.
    """
    from numba.cuda import compiler
    from numba.cuda.core.compiler_lock import global_compiler_lock

    source = kernel(name)
    function, signature = source.function()
    options = {"device": False, "abi": "numba", "cc": TARGETS[0], "launch_bounds": source.bounds}
    with global_compiler_lock:
        return compiler._compile_pyfunc_with_fixup(function, signature, **options)[0]


def _compile(name: str, cc: tuple[int, int]) -> str:
    (text,) = _library(name).get_asm_strs(cc=cc)
    return text


@cache
def ptx(name: str, cc: tuple[int, int]) -> Ptx:
    """Return a kernel compiled for one of `TARGETS`."""
    folder = cache_dir()
    path = None if folder is None else folder / f"{name}.sm_{cc[0]}{cc[1]}.ptx"
    if path is not None and path.exists():
        text = path.read_text()
    else:
        text = _compile(name, cc)
        if path is not None:
            _write(path, text)
    entry = re.search(r"\.entry\s+([\w$]+)", text)
    assert entry is not None
    return Ptx(text, entry.group(1))


def _write(path: Path, text: str) -> None:
    """Write a file atomically."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(name).replace(path)
    except OSError:
        return  # with a full disk, kernels are compiled again at the next start
