"""Every environment variable that pyggml reads, parsed in one place.

The functions read the environment when they are called, so a program or a test can set a variable at any time. A test
keeps ``docs/env_vars.md`` equal to `VARIABLES`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "VARIABLES",
    "Variable",
    "cache_dir",
    "check",
    "install_hint",
    "libggml_path",
    "libllama_path",
    "no_color",
    "op_offload_min_batch",
    "rpc_timeout_s",
    "sched_debug",
    "traceback",
]


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable."""

    name: str
    type: str  #: integer, switch (anything but empty and ``0`` is on), path or address
    default: str
    meaning: str


VARIABLES = (
    Variable(
        "HF_ENDPOINT",
        "address",
        "https://huggingface.co",
        "The hub from which `-hf` reads headers; the same variable as huggingface_hub's.",
    ),
    Variable(
        "GGML_OP_OFFLOAD_MIN_BATCH",
        "integer",
        "32",
        "A device offers to run an op with weights in host memory from this many rows on; read when a device is made.",
    ),
    Variable(
        "GGML_SCHED_DEBUG",
        "integer",
        "0",
        "1 prints the splits of each graph to stderr, 2 also its nodes, both exactly as upstream does; "
        "3 adds why each node is where it is.",
    ),
    Variable(
        "NO_COLOR",
        "text",
        "",
        "Anything but empty: no colours. Bold, dim and italic text stays, as [the convention](https://no-color.org) has it.",
    ),
    Variable(
        "PYGGML_CACHE_DIR",
        "path",
        "pyggml in the platform's cache folder",
        "The folder for models that pyggml makes or downloads.",
    ),
    Variable(
        "PYGGML_CHECK",
        "integer",
        "0",
        "1 verifies the scheduler's and the allocator's invariants after each step, that each copy holds all bytes "
        "that are read, and that copied layers of a plan's graph equal built ones; 2 also computes each split with "
        "used-expert copies a second time with full copies; slow.",
    ),
    Variable(
        "PYGGML_LIBGGML",
        "path",
        "the installed package libggml-python",
        "The ggml library for `libggml:NAME` devices: a shared object such as libggml.so, or the folder of a build.",
    ),
    Variable(
        "PYGGML_LIBLLAMA",
        "path",
        "the installed package xllamacpp",
        "The llama.cpp library from which graphs of other families are captured, and with which `pyggml verify` "
        "compares: a shared object such as libllama.so, or the folder of a build.",
    ),
    Variable(
        "PYGGML_RPC_TIMEOUT",
        "integer",
        "120",
        "Seconds to wait for the answer of an `rpc:HOST:PORT` device; must be longer than its longest split.",
    ),
    Variable(
        "PYGGML_TRACEBACK",
        "switch",
        "0",
        "A failing command prints a traceback instead of one line.",
    ),
    Variable(
        "NUMBA_CACHE_DIR",
        "path",
        "pyggml/kernels in the platform's cache folder",
        "The folder for compiled kernels; each version of the sources has a subfolder named by its hash.",
    ),
)


def _integer(name: str, default: int) -> int:
    """Return a number as C's `atoi` reads it; the default if the variable is not set or empty."""
    text = os.environ.get(name, "")
    if not text.strip():
        return default
    number = re.match(r"\s*([+-]?\d+)", text)
    return int(number[1]) if number else 0


def _switch(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def sched_debug() -> int:
    """Return the level of ``GGML_SCHED_DEBUG``."""
    return _integer("GGML_SCHED_DEBUG", 0)


def op_offload_min_batch() -> int:
    """Return ``GGML_OP_OFFLOAD_MIN_BATCH``."""
    return _integer("GGML_OP_OFFLOAD_MIN_BATCH", 32)


def check() -> int:
    """Return the level of ``PYGGML_CHECK``: 0 is off; text that is not a number counts as 1."""
    text = os.environ.get("PYGGML_CHECK", "")
    if not text:
        return 0
    return _integer("PYGGML_CHECK", 0) if text.strip().isdigit() else int(_switch("PYGGML_CHECK"))


def hub_endpoint() -> str | None:
    """Return ``HF_ENDPOINT``; None if it is not set."""
    return os.environ.get("HF_ENDPOINT") or None


def libggml_path() -> str:
    """Return ``PYGGML_LIBGGML``; empty if it is not set."""
    return os.environ.get("PYGGML_LIBGGML", "")


def libllama_path() -> str:
    """Return ``PYGGML_LIBLLAMA``; empty if it is not set."""
    return os.environ.get("PYGGML_LIBLLAMA", "")


def no_color() -> bool:
    """Return whether ``NO_COLOR`` is set to anything but an empty text."""
    return bool(os.environ.get("NO_COLOR", ""))


def rpc_timeout_s() -> int:
    """Return ``PYGGML_RPC_TIMEOUT``, at least 1."""
    return max(_integer("PYGGML_RPC_TIMEOUT", 120), 1)


def traceback() -> bool:
    """Return whether ``PYGGML_TRACEBACK`` is on."""
    return _switch("PYGGML_TRACEBACK")


def cache_dir() -> Path:
    """Return the folder for files that can be made or downloaded again; it may not exist yet.

    Raises
    ------
    RuntimeError
        There is no home folder.
    """
    given = os.environ.get("PYGGML_CACHE_DIR")
    if given:
        return Path(given)
    from platformdirs import user_cache_path

    folder = user_cache_path("pyggml", appauthor=False, opinion=False)
    if not folder.is_absolute():  # "~" stays where there is no home
        raise RuntimeError("there is no home folder")
    return folder


def install_hint(extra: str) -> str:
    """Return the command that installs the packages of an extra. pyggml itself is not on an index.

    Examples
    --------
    >>> install_hint("libggml")
    "pip install 'libggml-python==0.20.2.post1'"
    """
    from importlib.metadata import requires

    rows = [row.partition(";") for row in requires("pyggml") or ()]
    marker = f'extra == "{extra}"'
    return "pip install " + " ".join(f"'{name.strip()}'" for name, _, of in rows if marker in of.replace("'", '"'))
