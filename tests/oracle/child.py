"""A child process that answers requests about the real ggml library, and the parent's end of it.

``python -m oracle.child MODULE [LIBRARY]`` serves the functions in MODULE's ``HANDLERS``: one JSON object a line in, one
out. Each request runs in a fork of its own, so that a failed assertion or a crash costs an answer and not the child;
the child itself never computes, as a process with threads does not survive a fork.

Run as a program, this is the child; `Child` is the parent's end.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .libggml import Library

# requests and answers are JSON objects
Message = dict[str, Any]
Handler = Callable[[Library, Message], Message]


class Child:
    """A running child.

    Parameters
    ----------
    module : str
        What it serves: a module with ``HANDLERS``, a dict of name to handler, and ``FUNCTIONS``, the library's
        functions that they call; its ``prepare(library)``, if it has one, is called once before any request.
    library : str, optional
        Path of the library; see `Library`.

    Examples
    --------
    >>> with Child("oracle.programs") as child:  # doctest: +SKIP
    ...     child.ask("build", steps=[["new", "f32", [2, 3], "x"]])
    """

    def __init__(self, module: str, library: str | None = None) -> None:
        paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "oracle.child", module, *([] if library is None else [library])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self._n_asked = 0

    def ask(self, do: str, **request: object) -> Message:
        """Return the answer to a request.

        Returns
        -------
        dict
            The handler's answer; or ``{"refused": message}`` if an assertion failed, ``{"died": signal}`` if the
            library crashed, ``{"error": text}`` if the handler itself failed.

        Raises
        ------
        RuntimeError
            The child is gone, or the handler failed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._n_asked += 1
        self._process.stdin.write(json.dumps({"do": do, "i_request": self._n_asked, **request}) + "\n")
        self._process.stdin.flush()
        answer: Message = {}
        while (
            answer.pop("i_request", None) != self._n_asked
        ):  # before it, answers that nobody read: a time limit came first
            line = self._process.stdout.readline()
            if not line:
                raise RuntimeError(f"the child has ended with status {self._process.wait()}")
            answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        """End the child."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _answer_and_exit(out: int, answer: Message) -> None:
    data = json.dumps(answer).encode() + b"\n"
    while data:
        data = data[os.write(out, data) :]
    os._exit(0)


def _serve_one(library: Library, handlers: dict[str, Handler], request: Message, out: int) -> None:
    """Answer in this process, a fork, and end it."""
    i_request = request.pop("i_request")
    library.on_abort(lambda message: _answer_and_exit(out, {"refused": message, "i_request": i_request}))
    try:
        answer = handlers[request.pop("do")](library, request)
    except Exception as error:  # noqa: BLE001  the parent must hear of it, whatever it is
        import traceback

        answer = {"error": f"{error!r}\n{traceback.format_exc()}"}
    _answer_and_exit(out, {**answer, "i_request": i_request})


def main(module_name: str, path: str | None = None) -> None:
    """Serve requests until standard input ends."""
    module = importlib.import_module(module_name)
    library = Library(module.FUNCTIONS, path)
    handlers: dict[str, Handler] = module.HANDLERS
    if hasattr(module, "prepare"):
        module.prepare(library)
    out = os.dup(1)
    os.dup2(2, 1)  # what the library prints must not stand between answers
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _serve_one(library, handlers, request, out)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status < 0:
            os.write(
                out,
                json.dumps({"died": signal.Signals(-status).name, "i_request": request["i_request"]}).encode() + b"\n",
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
