"""Cases through the real `ggml_backend_sched`, behind mock backends that note every call: the live oracle.

`LiveScheduler` gives each case to a child process (`oracle.child`, which serves `oracle.live_run`) that
runs it in a fork of its own, so an assertion or a crash of the library ends a trace and nothing else. The mock backends
are `live_mock.c`, compiled once into the user's cache folder with the machine's C compiler.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from cases.graph import Json

from pyggml import config
from pyggml.dialect import Dialect

from .child import Child

__all__ = ["LiveScheduler", "compile_mock"]

_SOURCE = Path(__file__).with_name("live_mock.c")


def compile_mock(api: int = 2) -> Path:
    """Return the compiled mock backends, compiled now if they are not in the cache folder yet.

    Parameters
    ----------
    api : int
        Version of the tables that backends fill in; see `Library.api`.

    Raises
    ------
    RuntimeError
        There is no C compiler, or it does not compile them.
    """
    import libggml

    include = Path(libggml.__file__).parent / "include"
    key = hashlib.sha256(_SOURCE.read_bytes() + bytes([api])).hexdigest()[:16]
    target = config.cache_dir() / "live_mock" / f"{key}.so"
    if target.exists():
        return target
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError(
            "the live oracle needs a C compiler for its mock backends, and none of $CC, cc, gcc and clang is on the "
            "path: install one (Debian: apt install gcc)"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "mock.so"
        command = [
            compiler,
            "-O2",
            "-shared",
            "-fPIC",
            "-fvisibility=hidden",
            f"-DBACKEND_API={api}",
            f"-I{include}",
            "-o",
            str(made),
            str(_SOURCE),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the live oracle's mock backends do not compile: {' '.join(command)}\n{done.stderr}")
        made.replace(target)
    return target


class LiveScheduler:
    """The real scheduler, in a child process.

    Parameters
    ----------
    library : str, optional
        Path of the library; see `Library`.

    Attributes
    ----------
    dialect : Dialect
        The rules that the library goes by, as found by what it exports.
    says : str
        The version that it gives itself.

    Examples
    --------
    >>> with LiveScheduler() as live:  # doctest: +SKIP
    ...     records = live.trace(case)
    """

    def __init__(self, library: str | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pyggml-live-")
        self._child = Child("oracle.live_run", library)
        about = self._child.ask("about")
        self.dialect, self.says = Dialect(**about["dialect"]), about["version"]
        self._mock = str(compile_mock(about["api"]))

    def trace(self, case: Json) -> list[Json]:
        """Return the records of a case (``FORMAT.md``, section 2); the last may be an abort or a crash."""
        out = Path(self._folder.name) / "records"
        out.write_text("")
        answer = self._child.ask("trace", case=case, mock=self._mock, out=str(out))
        records: list[Json] = [json.loads(line) for line in out.read_text().splitlines()]
        if "done" not in answer:
            step = {"op": "sched_new"} if not records else case["steps"][len(records) - 1]
            kind = "abort" if "refused" in answer else "crash"
            message = answer.get("refused") or answer.get("died")
            graph = {"graph": step["graph"]} if "graph" in step else {}
            records.append({"op": step["op"], **graph, "abort": {"kind": kind, "message": message}, "calls": []})
        return records

    def close(self) -> None:
        """End the child."""
        self._child.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
