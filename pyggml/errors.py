"""Every error that pyggml raises on purpose.

::

    PyggmlError
    ├── GraphError (ValueError)            an invalid graph or tensor
    │   ├── ShapeError                     shapes, types or strides of sources do not fit
    │   └── UnsupportedOpError             no backend can run the node
    ├── AllocError                         memory cannot be laid out as requested
    │   └── OutOfMemoryError (MemoryError) a device has too little memory
    ├── SchedError (RuntimeError)          wrong use of the scheduler
    │   └── ExpertIdError                  a routing id outside 0 .. n_expert - 1
    ├── BackendError (RuntimeError)        a device failed
    │   ├── DeviceUnavailableError         the device does not exist, or was lost
    │   ├── ComputeError                   the device could not compute a split
    │   └── RPCError                       a remote device is gone or late, or answers wrongly
    ├── ModelError (RuntimeError)          llama.cpp refuses a model or fails on it
    ├── DownloadError (RuntimeError)       a file cannot be downloaded
    └── FormatError (ValueError)           a damaged or unexpected file

Each error has the facts in fields and builds its text from them: programs use the fields, people read the text. All can
be pickled.
"""

from __future__ import annotations

from types import UnionType
from typing import Any

__all__ = [
    "AllocError",
    "BackendError",
    "ComputeError",
    "DeviceUnavailableError",
    "DownloadError",
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
    "check_kind",
    "visible",
]


def visible(text: str) -> str:
    r"""Return a text with control characters spelled out, so that none reaches a terminal; tabs and line ends are kept.

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
    """Root of the tree.

    Attributes
    ----------
    message : str
        What is wrong.
    hint : str
        What to try; part of the text. Empty if there is no advice.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Return the text; control characters in names from files are made visible."""
        return visible(f"{self.message} ({self.hint})" if self.hint else self.message)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, dict(self.__dict__))


def _rebuild(cls: type[PyggmlError], args: tuple[Any, ...], state: dict[str, Any]) -> PyggmlError:
    """Create an unpickled error without calling its constructor."""
    error: PyggmlError = BaseException.__new__(cls, *args)  # MemoryError's own __new__ refuses this class
    error.args = args
    error.__dict__.update(state)
    return error


class GraphError(PyggmlError, ValueError):
    """An invalid graph or tensor."""


class ShapeError(GraphError):
    """Shapes, types or strides of an op's sources do not fit.

    Attributes
    ----------
    op : str
        The builder that raised the error.
    """

    def __init__(self, op: str, message: str, *, hint: str = "") -> None:
        super().__init__(f"{op}: {message}", hint=hint)
        self.op = op


class UnsupportedOpError(GraphError):
    """No backend of the scheduler can run a node, or the node's own backend cannot.

    Attributes
    ----------
    tensor, op : str
        The node and its op.
    backends : tuple of str
        The backends that cannot run it.
    reason : str
        The types, layout or memory that do not fit.
    """

    def __init__(self, tensor: str, op: str, backends: tuple[str, ...], *, reason: str = "", hint: str = "") -> None:
        why = f": {reason}" if reason else ""
        who = f"{backends[0]} cannot" if len(backends) == 1 else f"no backend of {', '.join(backends)} can"
        super().__init__(f"{who} run {op} '{tensor}'{why}", hint=hint)
        self.tensor, self.op, self.backends, self.reason = tensor, op, backends, reason


def check_kind(
    what: str, given: object, kind: type | UnionType, *, hint: str, error: type[PyggmlError] = GraphError
) -> None:
    """Raise an error of pyggml if an argument is not of a kind: a user took one object for another.

    Examples
    --------
    >>> check_kind("the prompt", "2048", int, hint="such as 2048")
    Traceback (most recent call last):
    ...
    pyggml.errors.GraphError: the prompt cannot be '2048' (such as 2048)
    """
    if not isinstance(given, kind):
        raise error(f"{what} cannot be {given!r:.60}", hint=hint)


class AllocError(PyggmlError):
    """Memory cannot be laid out as requested."""


class OutOfMemoryError(AllocError, MemoryError):
    """A device has too little memory.

    Attributes
    ----------
    buft : str
        The buffer type or the device.
    requested_bytes : int
        The size of the request.
    available_bytes : int or None
        The free memory; None if the device does not report it.
    purpose : str
        The use of the memory.
    """

    def __init__(
        self, buft: str, requested_bytes: int, available_bytes: int | None, purpose: str, *, hint: str = ""
    ) -> None:
        left = "" if available_bytes is None else f", {_mib(available_bytes)} available"
        super().__init__(f"{buft}: out of memory: {_mib(requested_bytes)} needed for {purpose}{left}", hint=hint)
        self.buft, self.requested_bytes, self.available_bytes, self.purpose = (
            buft,
            requested_bytes,
            available_bytes,
            purpose,
        )


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 1024**2:,.1f} MiB" if n_bytes >= 1024**2 else f"{n_bytes:,} bytes"


class SchedError(PyggmlError, RuntimeError):
    """Wrong use of the scheduler.

    Attributes
    ----------
    causes : tuple of str
        Why the node is on its backend, oldest cause first; empty if the error is not about a node.
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
        Its layer, if the name contains it.
    ids : str
        The tensor that holds the id.
    backend : str
        The backend from which the ids were read.
    token, slot : int
        The position of the wrong id.
    id, n_expert : int
        The id, and the number of experts.
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
        The name of the backend.
    """

    def __init__(self, backend: str, message: str, *, hint: str = "") -> None:
        super().__init__(f"{backend}: {message}", hint=hint)
        self.backend = backend


class DeviceUnavailableError(BackendError):
    """A device does not exist, or was lost."""


class ComputeError(BackendError):
    """A backend could not compute a split.

    Attributes
    ----------
    status : int
        Upstream's `ggml_status`: -1 failed, -2 allocation failed, 1 aborted.
    node : str
        The node that failed, or the first node of the split; empty if unknown.
    """

    def __init__(self, backend: str, message: str, *, status: int = -1, node: str = "", hint: str = "") -> None:
        at = f" at '{node}'" if node else ""
        super().__init__(backend, f"{message}{at}", hint=hint)
        self.status, self.node = status, node


class RPCError(BackendError):
    """A remote device is gone or late, or its answer is invalid.

    The connection is closed and memory on the server is lost. Open the device again to make a new connection.

    Attributes
    ----------
    host, port : str, int
        The address of the server.
    command : str
        The command that failed, such as ``GET_TENSOR``.
    unanswered : tuple of str
        Earlier commands without an answer: the server may have failed at one of them.
    """

    def __init__(
        self, host: str, port: int, command: str, message: str, *, unanswered: tuple[str, ...] = (), hint: str = ""
    ) -> None:
        after = f" (after {', '.join(unanswered)})" if unanswered else ""
        super().__init__(f"rpc:{host}:{port}", f"{command}{after}: {message}", hint=hint)
        self.host, self.port, self.command, self.unanswered = host, port, command, unanswered


class FormatError(PyggmlError, ValueError):
    """A file is damaged or is not of the expected kind.

    Attributes
    ----------
    path : str
        The file.
    offset : int or None
        The byte at which reading failed.
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
        The last messages of llama.cpp; may be empty.
    """

    def __init__(self, path: str, message: str, *, words: str = "", hint: str = "") -> None:
        super().__init__(f"{path}: {message}{': ' if words else ''}{words}", hint=hint)
        self.path, self.words = path, words


class DownloadError(PyggmlError, RuntimeError):
    """A file cannot be downloaded.

    Attributes
    ----------
    name, source : str
        The file, and its address or the index that it is from; the text has only the host.
    reason : str
        What the network or the host says.
    """

    def __init__(self, name: str, source: str, reason: str, *, hint: str = "") -> None:
        host = source.partition("://")[2].partition("/")[0] or source
        super().__init__(
            f"cannot download {name} from {host}: {reason}", hint=hint or "check the network, then try again"
        )
        self.name, self.source, self.reason = name, source, reason
