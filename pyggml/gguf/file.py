"""A model's file, or its files: what the headers say, and tensors mapped into memory.

::

    with GGUFFile.open("model.gguf") as file:
        file.metadata["llama.block_count"]          # decoded when asked for
        file.tensors["token_embd.weight"].ne        # ggml order
        file.data("token_embd.weight")              # read-only bytes, in place
        file.address("token_embd.weight")           # the same as an integer, for a buffer over existing memory

A model that was cut into parts (``NAME-00001-of-00003.gguf``) is opened by its first part.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import stat
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from ..errors import FormatError
from .header import AGAIN, Header, TensorInfo, ValueType, read_header

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["GGUFFile"]

_T = TypeVar("_T", int, float, bool, str)
_MISSING: Any = object()  # a default that no caller can mean

_COUNT, _NUMBER, _N_TENSORS = "split.count", "split.no", "split.tensors.count"
_PART_NAME = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class _Mapped:
    """One file in memory, read-only."""

    __slots__ = ("_bytes", "map", "path", "size")

    def __init__(self, path: str) -> None:
        self.path = path
        self.map: mmap.mmap | None = _map(path)
        self.size = len(self.map)
        self._bytes: npt.NDArray[np.uint8] | None = None

    def header(self, part: int = 0) -> Header:
        assert self.map is not None
        return read_header(self.path, self.map, part)

    def whole(self) -> npt.NDArray[np.uint8]:
        if self.map is None:
            raise FormatError(self.path, "the file was closed", hint="open it again")
        if self._bytes is None:
            import numpy as np

            self._bytes = np.frombuffer(self.map, np.uint8)
        return self._bytes

    def close(self) -> None:
        self._bytes = None
        if self.map is not None:
            with contextlib.suppress(BufferError):  # a view is alive and keeps the memory
                self.map.close()
            self.map = None


class GGUFFile:
    """An opened model, mapped read-only. Use as a context manager, or `close` it, or let it go.

    Attributes
    ----------
    path : str
        As it was opened; of several parts, the first.
    paths : tuple of str
        Of all parts, in their order.
    size : int
        Bytes of all parts.
    version, alignment, data_offset : int
        Of the first part: of the format; of tensor data, in bytes; where tensor data begins.
    metadata : Metadata
        The keys and values of the first part, which has those of the model.
    tensors : Mapping[str, TensorInfo]
        In the parts' order, of each in the file's.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._parts: list[_Mapped] = []
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Map a model and check its headers.

        Parameters
        ----------
        path : str or os.PathLike
            A GGUF file of version 2 or 3, little-endian: the only one of a model, or the first of its parts, beside the
            others.

        Raises
        ------
        FormatError
            A file is missing, unreadable, damaged, of a kind that is not supported, or not the part that it should be.

        Notes
        -----
        Mirrors `llama_model_loader::llama_model_loader`.
        """
        return cls(path)

    def __repr__(self) -> str:
        of = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        state = "closed" if self.closed else f"{len(self.tensors)} tensors, {len(self.metadata)} keys"
        return f"<GGUFFile {self.path}{of}: {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._parts[0].map is None

    def close(self) -> None:
        """Let the mapping go: at once, or with the last view of `data` and this object."""
        for part in self._parts:
            part.close()

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes in place: uint8, ``(nbytes,)``, read-only. The view keeps the mapping alive."""
        info = self.tensor(name)
        return self._parts[info.part].whole()[info.offset : info.offset + info.nbytes]

    def address(self, name: str) -> int:
        """Return the address of a tensor's first byte; valid while this file is open or a view of `data` lives."""
        info = self.tensor(name)
        return int(self._parts[info.part].whole().ctypes.data) + info.offset

    def tensor(self, name: str) -> TensorInfo:
        """Return a tensor's place.

        Raises
        ------
        FormatError
            There is no such tensor.
        """
        try:
            return self.tensors[name]
        except KeyError:
            import difflib

            near = difflib.get_close_matches(name, self.tensors, 3)
            hint = f"it has {', '.join(near)}" if near else "the model is incomplete: convert or fetch it again"
            raise FormatError(self.path, f"no tensor is called '{name}'", hint=hint) from None

    @overload
    def require(self, key: str, kind: type[_T]) -> _T: ...
    @overload
    def require(self, key: str, kind: type[_T], default: _T) -> _T: ...
    @overload
    def require(self, key: str, kind: type[_T], default: None) -> _T | None: ...
    def require(self, key: str, kind: type[_T], default: _T | None = _MISSING) -> _T | None:
        """Return a single value of one kind, or the default where the key is missing.

        Raises
        ------
        FormatError
            The key is missing and there is no default, or its value is of another kind.
        """
        if key not in self.metadata:
            if default is not _MISSING:
                return default
            raise FormatError(self.path, f"no key '{key}'", hint="the model is incomplete: convert or fetch it again")
        value = self.metadata[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            found = type(value).__name__
            entry = self.metadata.entry(key)
            raise FormatError(
                self.path, f"'{key}' is a {found}, not a {kind.__name__}", offset=entry.offset, hint="convert it again"
            )
        return value

    def _open(self) -> None:
        first = _Mapped(self.path)
        self._parts.append(first)
        header = first.header()
        self.version, self.metadata = header.version, header.metadata
        self.alignment, self.data_offset = header.alignment, header.data_offset
        tensors = header.tensors
        count = self._number(header, _COUNT, 1)
        for i, path in enumerate(_part_paths(self.path, count, self._number(header, _NUMBER, 0))):
            if i:
                self._add_part(path, i, tensors)
        if count > 1:
            self._check_count(header, len(tensors))
        self.paths = tuple(part.path for part in self._parts)
        self.size = sum(part.size for part in self._parts)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)

    def _add_part(self, path: str, i: int, tensors: dict[str, TensorInfo]) -> None:
        """Map one more part and take its tensors in."""
        if not os.path.exists(path):
            raise FormatError(self.path, f"its part {path} is missing", hint="put all parts into one folder")
        part = _Mapped(path)
        self._parts.append(part)
        header = part.header(i)
        number = self._number(header, _NUMBER, None, path)
        if number != i:
            raise FormatError(path, f"says that it is part {number + 1}, not {i + 1}", hint=AGAIN)
        for name, info in header.tensors.items():
            if name in tensors:
                other = self._parts[tensors[name].part].path
                raise FormatError(path, f"tensor '{name}' is in {other}, too", hint=AGAIN)
            tensors[name] = info

    def _check_count(self, header: Header, n: int) -> None:
        expected = self._number(header, _N_TENSORS, None)
        if n != expected:
            raise FormatError(
                self.path, f"its parts hold {n:,} tensors, not {expected:,}", hint="fetch all parts again, of one model"
            )

    def _number(self, header: Header, key: str, default: int | None, path: str | None = None) -> int:
        """Return a count of the parts' keys, which are unsigned or signed numbers of some size."""
        path = path or self.path
        if key not in header.metadata:
            if default is None:
                raise FormatError(path, f"is one of several parts and has no key '{key}'", hint=AGAIN)
            return default
        entry, value = header.metadata.entry(key), header.metadata[key]
        if entry.length is not None or entry.type in (ValueType.BOOL, ValueType.STRING) or not isinstance(value, int):
            raise FormatError(path, f"'{key}' is not a whole number", offset=entry.offset, hint=AGAIN)
        return value


def _part_paths(path: str, count: int, number: int) -> list[str]:
    """Return the paths of a model's parts, given the first.

    Notes
    -----
    Mirrors `llama_split_prefix` and `llama_split_path`.
    """
    if count <= 1:
        return [path]
    match = _PART_NAME.fullmatch(path)
    if number != 0:
        name = (
            f"{match['name']}-{1:05d}-of-{count:05d}.gguf"
            if match
            else f"the one that ends in -{1:05d}-of-{count:05d}.gguf"
        )
        raise FormatError(path, f"this is part {number + 1} of a model's {count}", hint=f"open the first: {name}")
    if match is None or int(match["number"]) != 1 or int(match["count"]) != count:
        hint = f"name it as it was, NAME-{1:05d}-of-{count:05d}.gguf: the other parts are found by that"
        raise FormatError(
            path, f"this is the first of a model's {count} parts, under a name that does not say so", hint=hint
        )
    return [f"{match['name']}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]


def _map(path: str) -> mmap.mmap:
    """Map a file read-only; what cannot be mapped is told apart without opening it (a pipe would block)."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise FormatError(path, "this is a folder", hint="name the .gguf file in it")
        if not stat.S_ISREG(mode):
            raise FormatError(path, "this is not a regular file", hint="copy it to a file first: it has to be mapped")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise FormatError(path, "the file is empty", offset=0, hint=AGAIN)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise FormatError(path, "no such file", hint="check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        if isinstance(error, FormatError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FormatError(path, f"cannot open: {reason}", hint="check the path and its permissions") from None
