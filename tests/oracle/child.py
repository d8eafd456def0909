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
from collections.abc import Callable, Sequence
from functools import partial
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
        answer = self._answer({"do": do, **request})
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def ask_each(self, do: str, requests: Sequence[Message]) -> list[Message]:
        """Return the answers to many requests, which share a process until one ends it; raises as `ask`."""
        answers: list[Message] = self._answer({"do": do, "each": list(requests)})["answers"]
        for answer in answers:
            if "error" in answer:
                raise RuntimeError(answer["error"])
        return answers

    def _answer(self, request: Message) -> Message:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._n_asked += 1
        self._process.stdin.write(json.dumps({"i_request": self._n_asked, **request}) + "\n")
        self._process.stdin.flush()
        answer: Message = {}
        while (
            answer.pop("i_request", None) != self._n_asked
        ):  # before it, answers that nobody read: a time limit came first
            line = self._process.stdout.readline()
            if not line:
                raise RuntimeError(f"the child has ended with status {self._process.wait()}")
            answer = json.loads(line)
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


def _write(out: int, answer: Message) -> None:
    data = json.dumps(answer).encode() + b"\n"
    while data:
        data = data[os.write(out, data) :]


def _refuse(out: int, message: str) -> None:
    _write(out, {"refused": message})
    os._exit(0)


def _serve(library: Library, handler: Handler, requests: Sequence[Message], out: int) -> None:
    """Answer in this process, a fork, and end it; an assertion that fails ends it, too."""
    library.on_abort(partial(_refuse, out))
    for request in requests:
        try:
            answer = handler(library, request)
        except Exception as error:  # noqa: BLE001  the parent must hear of it, whatever it is
            import traceback

            answer = {"error": f"{error!r}\n{traceback.format_exc()}"}
        _write(out, answer)
    os._exit(0)


def _answers(library: Library, handler: Handler, requests: Sequence[Message]) -> list[Message]:
    """Have forks answer, a new one after each request that ends one."""
    answers: list[Message] = []
    while len(answers) < len(requests):
        end, out = os.pipe()
        pid = os.fork()
        if pid == 0:
            _serve(library, handler, requests[len(answers) :], out)
        os.close(out)
        with os.fdopen(end) as lines:
            answers += map(json.loads, lines)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status < 0:
            answers.append({"died": signal.Signals(-status).name})
    return answers


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
        i_request, handler, each = request.pop("i_request"), handlers[request.pop("do")], request.pop("each", None)
        answers = _answers(library, handler, [request] if each is None else each)
        _write(out, {"i_request": i_request, **(answers[0] if each is None else {"answers": answers})})


if __name__ == "__main__":
    main(*sys.argv[1:])
