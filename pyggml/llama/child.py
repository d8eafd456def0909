"""The child: ``python -m pyggml.llama.child LIBRARY`` answers requests about llama.cpp until its input ends.

A request is a length of 8 bytes and so many bytes of JSON, an answer likewise. The process ends itself if a request
takes longer than it may: an alarm ends even code that is stuck in C.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DeviceUnavailableError
from .capture import Capture, CaptureFailed, Host

__all__ = ["main", "read_message", "write_message"]

Message = dict[str, Any]  # what goes through JSON


def read_message(stream: BinaryIO) -> Message | None:
    """Return the next message; None at the end."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    body = stream.read(struct.unpack("<Q", head)[0])
    message: Message = json.loads(body)
    return message


def write_message(stream: BinaryIO, message: Message) -> None:
    """Write a message."""
    body = json.dumps(message, separators=(",", ":")).encode()
    stream.write(struct.pack("<Q", len(body)) + body)
    stream.flush()


class _Server:
    """Keeps the last model and context open: the next request may be about the same."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._capture: Capture | None = None
        self._about: Message | None = None

    def answer(self, request: Message) -> Message:
        """Return the answer to a request."""
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
            return capture.facts() | {"graph": capture.reserve(*self._largest(capture))}
        if request["do"] == "reserve":
            return capture.reserve(*request["size"])
        if request["do"] == "printed":
            return {"lines": capture.printed(*request["size"])}
        return capture.decode(request["n_tokens"], request["outputs"], is_full=request["is_full"])

    @staticmethod
    def _largest(capture: Capture) -> tuple[int, int, int]:
        """Mirrors the sizes of `llama_context::sched_reserve`."""
        facts = capture.facts()
        n_tokens = min(facts["n_ctx"], facts["n_ubatch"])
        return n_tokens, facts["n_seq_max"], min(n_tokens, facts["n_batch"])


def main(path: str) -> None:
    """Answer until the input ends."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the library prints must not stand between answers
    try:
        server = _Server(Host(Path(path)))
        failure = None
    except DeviceUnavailableError as error:
        failure = {"unavailable": str(error)}
    while (request := read_message(requests)) is not None:
        if failure is not None:
            write_message(answers, failure)
            continue
        if hasattr(signal, "alarm"):
            signal.alarm(int(request["timeout_s"]) + 1)
        try:
            answer = server.answer(request)
        except CaptureFailed as error:
            answer = {"refused": str(error)}
        write_message(answers, answer)
        if hasattr(signal, "alarm"):
            signal.alarm(0)
    os._exit(0)  # destructors of the library and of Python need not agree on an order


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(sys.argv[1])
