"""Every environment variable that pyggml reads, parsed in one place.

The functions read the environment when called, so that a program, or a test, may set a variable at any time.
``docs/env_vars.md`` is the page for people; a test keeps it equal to `VARIABLES`.
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
    "op_offload_min_batch",
    "rpc_timeout_s",
    "sched_debug",
    "traceback",
]


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable."""

    name: str
    type: str  #: integer, switch (anything but empty and ``0`` is on) or path
    default: str
    meaning: str


VARIABLES = (
    Variable(
        "GGML_OP_OFFLOAD_MIN_BATCH",
        "integer",
        "32",
        "Rows from which on a device offers to run an op whose weights lie in host memory; read when a device is made.",
    ),
    Variable(
        "GGML_SCHED_DEBUG",
        "integer",
        "0",
        "1 prints the splits of each graph to stderr, 2 its nodes too, both exactly as upstream does; "
        "3 adds why each node is where it is.",
    ),
    Variable(
        "PYGGML_CACHE_DIR",
        "path",
        "the platform's cache folder, below it pyggml",
        "Where models that pyggml makes or fetches are kept.",
    ),
    Variable(
        "PYGGML_CHECK",
        "integer",
        "0",
        "1 verifies the scheduler's and the allocator's invariants after each step, and that each copy holds what is "
        "read of it; 2 also computes splits with partly copied experts again with whole copies; slow.",
    ),
    Variable(
        "PYGGML_LIBGGML",
        "path",
        "the installed package libggml-python",
        "The real ggml that `libggml:NAME` devices use: a shared object such as libggml.so, or the folder of a build.",
    ),
    Variable(
        "PYGGML_LIBLLAMA",
        "path",
        "the installed package xllamacpp",
        "The real llama.cpp that graphs of other families are captured from, and that `pyggml verify` compares with: a "
        "shared object such as libllama.so, or the folder of a build.",
    ),
    Variable(
        "PYGGML_RPC_TIMEOUT",
        "integer",
        "120",
        "Seconds after which an `rpc:HOST:PORT` device that does not answer is given up; longer than its longest split.",
    ),
    Variable(
        "PYGGML_TRACEBACK",
        "switch",
        "0",
        "Let a failing command show where in the code it failed, not only one line.",
    ),
    Variable(
        "NUMBA_CACHE_DIR",
        "path",
        "the platform's cache folder, below it pyggml/kernels",
        "Where compiled kernels are kept, in a folder named after a hash of their sources.",
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
    """Return the level of ``PYGGML_CHECK``: 0 is off; anything that is no number is 1."""
    text = os.environ.get("PYGGML_CHECK", "")
    return _integer("PYGGML_CHECK", 0) if text.strip().isdigit() else int(_switch("PYGGML_CHECK"))


def libggml_path() -> str:
    """Return ``PYGGML_LIBGGML``; empty if it is not set."""
    return os.environ.get("PYGGML_LIBGGML", "")


def libllama_path() -> str:
    """Return ``PYGGML_LIBLLAMA``; empty if it is not set."""
    return os.environ.get("PYGGML_LIBLLAMA", "")


def rpc_timeout_s() -> int:
    """Return ``PYGGML_RPC_TIMEOUT``, at least 1."""
    return max(_integer("PYGGML_RPC_TIMEOUT", 120), 1)


def traceback() -> bool:
    """Return whether ``PYGGML_TRACEBACK`` asks for tracebacks."""
    return _switch("PYGGML_TRACEBACK")


def cache_dir() -> Path:
    """Return the folder for what can be made or fetched again; it may not exist yet.

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
    """Return the command that installs the packages of an extra; pyggml itself is on no index.

    Examples
    --------
    >>> install_hint("libggml")
    "pip install 'libggml-python==0.20.2.post1'"
    """
    from importlib.metadata import requires

    rows = [row.partition(";") for row in requires("pyggml") or ()]
    marker = f'extra == "{extra}"'
    return "pip install " + " ".join(f"'{name.strip()}'" for name, _, of in rows if marker in of.replace("'", '"'))
