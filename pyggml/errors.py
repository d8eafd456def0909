"""Every error that pyggml raises on purpose.

::

    PyggmlError
    ├── GraphError (ValueError)            a graph or tensor that cannot be
    │   ├── ShapeError                     sources whose shapes, types or strides do not fit
    │   └── UnsupportedOpError             no backend can run the node
    ├── AllocError                         memory that cannot be laid out as asked
    │   └── OutOfMemoryError (MemoryError) a device has not enough of it
    ├── SchedError (RuntimeError)          the scheduler used in a way that cannot work
    │   └── ExpertIdError                  a routing id outside 0 .. n_expert - 1
    ├── BackendError (RuntimeError)        a device failed
    │   ├── DeviceUnavailableError         it is not there, or lost
    │   ├── ComputeError                   it could not compute a split
    │   └── RPCError                       a remote device is gone, late, or answers what it must not
    ├── ModelError (RuntimeError)          llama.cpp refuses a model or fails on it
    └── FormatError (ValueError)           a file that is not what it says

Each carries the facts in fields and builds its text from them, so that a program can act on the fields and a person can
act on the text. All survive pickling: the arguments of the constructor are kept as given.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "AllocError",
    "BackendError",
    "ComputeError",
    "DeviceUnavailableError",
    "ExpertIdError",
    "FormatError",
    "GraphError",
    "ModelError",
    "OutOfMemoryError",
    "PyggmlError",
    "RPCError",
    "SchedError",
    "ShapeError",
    "UnsupportedOpError",
    "visible",
]


def visible(text: str) -> str:
    r"""Return a text whose control characters are spelled out, so that none reaches a terminal; tabs and line ends stay.

    Examples
    --------
    >>> visible("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\t\n" else _spell(c) for c in text)


def _spell(char: str) -> str:
    return char.encode("unicode_escape").decode() if not 0xD800 <= ord(char) <= 0xDFFF else f"\\u{ord(char):04x}"


class PyggmlError(Exception):
    """Root of the tree. ``hint`` says what to try; it is part of the text."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Return the text; control characters of names that a file brought are made visible."""
        return visible(f"{self.message} ({self.hint})" if self.hint else self.message)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, dict(self.__dict__))


def _rebuild(cls: type[PyggmlError], args: tuple[Any, ...], state: dict[str, Any]) -> PyggmlError:
    """Make an unpickled error without running its constructor again."""
    error: PyggmlError = BaseException.__new__(cls, *args)  # of MemoryError, the one of a class is refused
    error.args = args
    error.__dict__.update(state)
    return error


class GraphError(PyggmlError, ValueError):
    """A graph or tensor that cannot be."""


class ShapeError(GraphError):
    """Sources of an op whose shapes, types or strides do not fit.

    Attributes
    ----------
    op : str
        The builder that refused.
    """

    def __init__(self, op: str, message: str, *, hint: str = "") -> None:
        super().__init__(f"{op}: {message}", hint=hint)
        self.op = op


class UnsupportedOpError(GraphError):
    """No backend of the scheduler can run a node, or the one that it is on cannot.

    Attributes
    ----------
    tensor, op : str
        The node and its op.
    backends : tuple of str
        The backends that were asked.
    reason : str
        Types, layout or memory that do not fit.
    """

    def __init__(self, tensor: str, op: str, backends: tuple[str, ...], *, reason: str = "", hint: str = "") -> None:
        why = f": {reason}" if reason else ""
        who = f"{backends[0]} cannot" if len(backends) == 1 else f"no backend of {', '.join(backends)} can"
        super().__init__(f"{who} run {op} '{tensor}'{why}", hint=hint)
        self.tensor, self.op, self.backends, self.reason = tensor, op, backends, reason


class AllocError(PyggmlError):
    """Memory that cannot be laid out as asked."""


class OutOfMemoryError(AllocError, MemoryError):
    """A device has not enough memory.

    Attributes
    ----------
    buft : str
        The buffer type, or the device, that was asked.
    requested_bytes : int
        What was asked for.
    available_bytes : int or None
        What was free; None if the device does not tell.
    purpose : str
        What the memory was for.
    """

    def __init__(
        self, buft: str, requested_bytes: int, available_bytes: int | None, purpose: str, *, hint: str = ""
    ) -> None:
        left = "" if available_bytes is None else f", {_mib(available_bytes)} available"
        super().__init__(f"{buft}: out of memory: {_mib(requested_bytes)} asked for {purpose}{left}", hint=hint)
        self.buft, self.requested_bytes, self.available_bytes, self.purpose = (
            buft,
            requested_bytes,
            available_bytes,
            purpose,
        )


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 1024**2:,.1f} MiB" if n_bytes >= 1024**2 else f"{n_bytes:,} bytes"


class SchedError(PyggmlError, RuntimeError):
    """The scheduler used in a way that cannot work.

    Attributes
    ----------
    causes : tuple of str
        How the node in question came to its backend, oldest first; empty if no node is in question.
    """

    def __init__(self, message: str, *, causes: tuple[str, ...] = (), hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.causes = causes


class ExpertIdError(SchedError):
    """A routing id outside ``0 .. n_expert - 1``.

    Attributes
    ----------
    tensor : str
        The expert weight that the ids choose from.
    layer : int or None
        Its layer, if the name tells.
    ids : str
        The tensor that holds the id.
    backend : str
        Where the ids were read.
    token, slot : int
        Where in the ids the bad one stands.
    id, n_expert : int
        The id, and how many experts there are.
    """

    def __init__(
        self,
        tensor: str,
        layer: int | None,
        ids: str,
        backend: str,
        token: int,
        slot: int,
        id: int,
        n_expert: int,
        *,
        causes: tuple[str, ...] = (),
        hint: str = "",
    ) -> None:
        where = "" if layer is None else f" (layer {layer})"
        super().__init__(
            f"expert id {id} is not in 0..{n_expert - 1}: '{ids}'[token {token}, slot {slot}] on {backend} "
            f"chooses from '{tensor}'{where}",
            causes=causes,
            hint=hint or "the router's output is damaged: check the node that makes the ids",
        )
        self.tensor, self.layer, self.ids, self.backend = tensor, layer, ids, backend
        self.token, self.slot, self.id, self.n_expert = token, slot, id, n_expert


class BackendError(PyggmlError, RuntimeError):
    """A device failed.

    Attributes
    ----------
    backend : str
        Which one.
    """

    def __init__(self, backend: str, message: str, *, hint: str = "") -> None:
        super().__init__(f"{backend}: {message}", hint=hint)
        self.backend = backend


class DeviceUnavailableError(BackendError):
    """A device is not there, or was lost."""


class ComputeError(BackendError):
    """A backend could not compute a split.

    Attributes
    ----------
    status : int
        Upstream's `ggml_status`: -1 failed, -2 allocation failed, 1 aborted.
    node : str
        The node in question, or the first of the split; empty if unknown.
    """

    def __init__(self, backend: str, message: str, *, status: int = -1, node: str = "", hint: str = "") -> None:
        at = f" at '{node}'" if node else ""
        super().__init__(backend, f"{message}{at}", hint=hint)
        self.status, self.node = status, node


class RPCError(BackendError):
    """A remote device is gone, late, or answers what it must not.

    The connection is closed with it: memory on the remote side is lost. Open the device again to connect anew.

    Attributes
    ----------
    host, port : str, int
        Where the server is, or was.
    command : str
        The command that failed, such as ``GET_TENSOR``.
    unanswered : tuple of str
        Commands before it that have no answer of their own: one of them may be what the server failed at.
    """

    def __init__(
        self, host: str, port: int, command: str, message: str, *, unanswered: tuple[str, ...] = (), hint: str = ""
    ) -> None:
        after = f" (after {', '.join(unanswered)})" if unanswered else ""
        super().__init__(f"rpc:{host}:{port}", f"{command}{after}: {message}", hint=hint)
        self.host, self.port, self.command, self.unanswered = host, port, command, unanswered


class FormatError(PyggmlError, ValueError):
    """A file that is not what it says.

    Attributes
    ----------
    path : str
        The file.
    offset : int or None
        Byte at which reading failed.
    """

    def __init__(self, path: str, message: str, *, offset: int | None = None, hint: str = "") -> None:
        at = "" if offset is None else f" at byte {offset:,}"
        super().__init__(f"{path}: {message}{at}", hint=hint)
        self.path, self.offset = path, offset


class ModelError(PyggmlError, RuntimeError):
    """llama.cpp refuses a model or fails on it.

    Attributes
    ----------
    path : str
        The model's file.
    words : str
        What llama.cpp said last; empty if it said nothing.
    """

    def __init__(self, path: str, message: str, *, words: str = "", hint: str = "") -> None:
        super().__init__(f"{path}: {message}{': ' if words else ''}{words}", hint=hint)
        self.path, self.words = path, words
