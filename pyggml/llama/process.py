"""`LlamaProcess`: a child process with llama.cpp, seen from the parent.

A child is ended when its work is done or anything fails: it has its own process group, which is killed as a whole. Its
last lines on standard error become the text of a `ModelError`.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, Self

from ..errors import DeviceUnavailableError, ModelError, PyggmlError, SchedError

__all__ = ["TIMEOUT_S", "LlamaProcess", "shared_process"]

Message = dict[str, Any]  # what a request or an answer holds

#: Most seconds for one answer; a plan of 94 layers needs less than one.
TIMEOUT_S = 60.0
_TAIL_BYTES = 16_384
_HEAD = struct.Struct("<Q")


def _end(process: subprocess.Popen[bytes], words: IO[bytes]) -> None:
    """Kill the child and all processes that it started, and wait for it."""
    words.close()
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.wait()


class LlamaProcess:
    """A child with llama.cpp; it is started by the first request, and again after a failure.

    Parameters
    ----------
    library : Path
        The shared object of llama.cpp.
    kind : str
        ``"capture"``: graphs; ``"compute"``: run a model.
    prints : bool
        Let its scheduler print splits (``GGML_SCHED_DEBUG=2``).
    timeout_s : float or None
        Most seconds for one answer; None: no limit.

    Attributes
    ----------
    chores : list of callable
        Called while the next answer is waited for, or when a user of the child is done.
    """

    def __init__(
        self,
        library: Path,
        *,
        kind: Literal["capture", "compute"] = "capture",
        prints: bool = False,
        timeout_s: float | None = TIMEOUT_S,
    ) -> None:
        self.library, self.kind, self.prints, self.timeout_s = library, kind, prints, timeout_s
        self.n_started = 0
        self.chores: list[Callable[[], None]] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._words: IO[bytes] | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {
            k: v for k, v in os.environ.items() if k not in ("GGML_SCHED_DEBUG", "GGML_OP_OFFLOAD_MIN_BATCH")
        }
        environment["GGML_NO_BACKTRACE"] = "1"  # otherwise a failed assertion starts a debugger
        if self.prints:
            environment["GGML_SCHED_DEBUG"] = "2"
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the child
        process = subprocess.Popen(
            [sys.executable, "-m", "pyggml.llama.child", str(self.library), self.kind],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._words, env=environment, start_new_session=True,
        )  # fmt: skip
        self.n_started += 1
        self._process = process
        self._finalizer = weakref.finalize(self, _end, process, self._words)
        return process

    @property
    def is_alive(self) -> bool:
        """Whether a child was started and has not been seen to end."""
        return self._process is not None

    def ask(self, request: Message) -> Any:
        """Return the answer to a request about a model.

        Raises
        ------
        ModelError
            llama.cpp refused the model or the flags, one of its assertions failed, it crashed, or took too long. The
            next request starts a new child.
        DeviceUnavailableError
            The library cannot be used.
        SchedError
            Another thread closed it.
        PyggmlError
            Any other error that the child raised; the child is still running.
        """
        path = str(request["model"])
        process = self._process or self._start()
        body = pickle.dumps({**request, "timeout_s": self.timeout_s}, protocol=5)
        deadline = None if self.timeout_s is None else time.monotonic() + self.timeout_s
        try:
            assert process.stdin is not None
            process.stdin.write(_HEAD.pack(len(body)) + body)
            process.stdin.flush()
            self.do_chores()
            head = self._read(process, _HEAD.size, deadline)
            answer = pickle.loads(self._read(process, _HEAD.unpack(head)[0], deadline))
        except TimeoutError:
            words = self._last_words()
            self.close()
            raise ModelError(
                path, f"llama.cpp gave no answer in {self.timeout_s:g} s", words=words, hint="the child was ended"
            ) from None
        except (EOFError, OSError, ValueError):  # ValueError: of a closed pipe
            if self._process is not process:
                raise SchedError("the model was closed while another thread used it") from None
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5.0)
            words, how = self._last_words(), _ending(process.poll())
            self.close()
            raise ModelError(path, f"llama.cpp {how}", words=words) from None
        except BaseException:
            self.close()
            raise
        if isinstance(answer, DeviceUnavailableError) and self.kind == "capture":
            self.close()
        if isinstance(answer, PyggmlError):
            raise answer
        return answer

    def do_chores(self) -> None:
        """Do what waits for a pause."""
        while self.chores:
            self.chores.pop(0)()

    def _read(self, process: subprocess.Popen[bytes], n: int, deadline: float | None) -> bytes:
        assert process.stdout is not None
        fd = process.stdout.fileno()
        parts, left = [], n
        while left:
            rest = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if not select.select([fd], [], [], rest)[0]:
                raise TimeoutError
            part = os.read(fd, min(left, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def _last_words(self) -> str:
        """Return the last line about an error, or else the last line."""
        if self._words is None:
            return ""
        self._words.seek(0, os.SEEK_END)
        self._words.seek(max(self._words.tell() - _TAIL_BYTES, 0))
        lines = [line.strip() for line in self._words.read().decode(errors="replace").splitlines() if line.strip()]
        telling = [
            line for line in lines if any(w in line for w in ("GGML_ASSERT", "error", "Error", "what():", "abort"))
        ]
        return (telling or lines or [""])[-1]

    def close(self) -> None:
        """End the child, if there is one."""
        self.do_chores()
        end = self._finalizer
        self._process = self._words = self._finalizer = None  # first, for a thread that waits for an answer
        if end is not None:
            end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_shared: dict[tuple[Path, bool], tuple[LlamaProcess, int]] = {}


@contextlib.contextmanager
def shared_process(library: Path, *, prints: bool = False) -> Iterator[LlamaProcess]:
    """Provide the child of a library that all planners of this process share; it ends with the last of them.

    A program that plans repeatedly can hold it, so that llama.cpp is loaded once.
    """
    key = (library, prints)
    process, n_users = _shared.get(key) or (LlamaProcess(library, prints=prints), 0)
    _shared[key] = (process, n_users + 1)
    try:
        yield process
    finally:
        process, n_users = _shared[key]
        process.do_chores()
        if n_users > 1:
            _shared[key] = (process, n_users - 1)
        else:
            del _shared[key]
            process.close()


def _ending(status: int | None) -> str:
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        return {"SIGABRT": "failed an assertion", "SIGSEGV": "read memory that it does not have"}.get(
            name, f"was ended by {name}"
        )
    return f"ended with status {status}"
