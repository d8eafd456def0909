"""The child: ``python -m pyggml.llama.child LIBRARY capture|compute`` answers requests about llama.cpp until its input ends.

A request is a length (8 bytes) and a pickle of that length, and so is an answer: the result, or a `PyggmlError`. Both
ends are pyggml. If a request takes too long, an alarm ends the process, even in C code.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import struct
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..errors import ModelError, PyggmlError

__all__ = ["main", "read_message", "write_message"]

Message = dict[str, Any]  # what a request holds


def read_message(stream: BinaryIO) -> Any:
    """Return the next message; None at the end."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    return pickle.loads(stream.read(struct.unpack("<Q", head)[0]))


def write_message(stream: BinaryIO, message: Any) -> None:
    """Write a message."""
    body = pickle.dumps(message, protocol=5)
    stream.write(struct.pack("<Q", len(body)) + body)
    stream.flush()


class _Server(Protocol):
    """Answers requests."""

    def answer(self, request: Message) -> Any:
        """Return the answer to a request."""


class _Captures:
    """Captures graphs; keeps the last model and context open for the next request."""

    def __init__(self, library: Path) -> None:
        from .capture import Capture, Host

        self.host = Host(library)
        self._capture: Capture | None = None
        self._about: Message | None = None

    def answer(self, request: Message) -> Message:
        """Return the answer to a request.

        Raises
        ------
        ModelError
            llama.cpp refuses.
        """
        from .capture import CaptureFailed

        try:
            answer = self._answer(request)
        except CaptureFailed as error:
            hint = "it drafts tokens for another model, and llama.cpp needs both" if "ctx_other" in str(error) else ""
            raise ModelError(str(request["model"]), str(error), hint=hint) from None
        if self._capture is not None and self._capture.error is not None:
            raise self._capture.error
        return answer

    def _answer(self, request: Message) -> Message:
        from .capture import Capture
        from .fitting import fit

        if request["do"] == "fit":
            if self._capture is not None:
                self._capture.close()
                self._capture = None
            return fit(self.host, request)
        about = {key: request[key] for key in ("model", "placement", "context")}
        with contextlib.suppress(OSError):
            found = os.stat(request["model"])
            about["file"] = (found.st_size, found.st_mtime_ns, found.st_ino)
        if self._capture is None or about != self._about:
            if self._capture is not None:
                self._capture.close()
                self._capture = None
            self._capture, self._about = Capture(self.host, about), about
        capture = self._capture
        if request["do"] == "facts":
            return capture.facts()
        if request["do"] == "reserve":
            return capture.reserve(*(request["size"] or self._largest(capture.facts())))
        if request["do"] == "printed":
            return {"lines": capture.printed(*request["size"])}
        return capture.decode(
            request["n_tokens"], request["outputs"], depth=request["depth"], is_full=request["is_full"]
        )

    @staticmethod
    def _largest(facts: Message) -> tuple[int, int, int]:
        """Mirrors the sizes of `llama_context::sched_reserve`."""
        n_tokens = min(facts["n_ctx"], facts["n_ubatch"])
        return n_tokens, facts["n_seq_max"], min(n_tokens, facts["n_batch"])


def _server(kind: str, library: Path) -> _Server:
    if kind == "capture":
        return _Captures(library)
    from .engine import Engine

    return Engine(library)


def _end_with_parent() -> None:
    """End this process when the parent has ended, even if a request is being answered."""
    hung_up = select.poll()
    hung_up.register(0, 0)  # reports only that no process has the other end
    hung_up.poll()
    os._exit(0)


def main(path: str, kind: str) -> None:
    """Answer requests until the input ends."""
    if hasattr(select, "poll"):
        threading.Thread(target=_end_with_parent, daemon=True).start()
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of the library must not mix with answers
    server: _Server | None = None
    while (request := read_message(requests)) is not None:
        if hasattr(signal, "alarm") and request["timeout_s"] is not None:
            signal.alarm(int(request["timeout_s"]) + 1)
        try:
            server = server or _server(kind, Path(path))
            answer = server.answer(request)
        except PyggmlError as error:
            answer = error
        write_message(answers, answer)
        if hasattr(signal, "alarm"):
            signal.alarm(0)
    os._exit(0)  # skip the destructors of the library and of Python


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(*sys.argv[1:])
