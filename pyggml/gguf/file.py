"""A model's file or files: headers, and tensors mapped into memory.

::

    with GGUFFile.open("model.gguf") as file:
        file.metadata["llama.block_count"]          # decoded on access
        file.tensors["token_embd.weight"].ne        # ggml order
        file.data("token_embd.weight")              # read-only bytes, in place
        file.address("token_embd.weight")           # their address, for a buffer over existing memory

To open a split model (``NAME-00001-of-00003.gguf``), open its first file.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from ..errors import FormatError
from ..files import check_regular
from .header import AGAIN, Header, TensorInfo, ValueType, read_header

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["GGUFFile"]

_T = TypeVar("_T", int, float, bool, str)
_MISSING: Any = object()  # no default was given

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
            with contextlib.suppress(BufferError):  # a view still uses the memory
                self.map.close()
            self.map = None


class GGUFFile:
    """An open model, mapped read-only. It is closed by `close`, at the end of a ``with`` block, or when nothing refers to it.

    Attributes
    ----------
    path : str
        The path that was opened; for a split model, the first file.
    paths : tuple of str
        The paths of all files, in order.
    size : int
        The size of all files in bytes.
    version, alignment, data_offset : int
        For the first file: the version of the format, the alignment of tensor data in bytes, the start of tensor data.
    metadata : Metadata
        The keys and values of the first file, which describes the model.
    tensors : Mapping[str, TensorInfo]
        All tensors, in the order of the files.
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
            A little-endian GGUF file of version 2 or 3: a whole model, or the first file of a split model in the
            same folder as the others.

        Raises
        ------
        FormatError
            A file is missing, unreadable, damaged, of an unsupported kind, or not the expected file of a split model.

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
        """Unmap the file now, or when the last view from `data` is gone."""
        for part in self._parts:
            part.close()

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """Return a read-only view of a tensor's bytes, uint8, ``(nbytes,)``; it keeps the file mapped."""
        info = self.tensor(name)
        return self._parts[info.part].whole()[info.offset : info.offset + info.nbytes]

    def address(self, name: str) -> int:
        """Return the address of a tensor's first byte; valid while the file is open or a view from `data` exists."""
        info = self.tensor(name)
        return int(self._parts[info.part].whole().ctypes.data) + info.offset

    def tensor(self, name: str) -> TensorInfo:
        """Return the description of a tensor: its type, shape and place.

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
            hint = f"did you mean {', '.join(near)}?" if near else "the model is incomplete: convert or fetch it again"
            raise FormatError(self.path, f"there is no tensor '{name}'", hint=hint) from None

    @overload
    def require(self, key: str, kind: type[_T]) -> _T: ...
    @overload
    def require(self, key: str, kind: type[_T], default: _T) -> _T: ...
    @overload
    def require(self, key: str, kind: type[_T], default: None) -> _T | None: ...
    def require(self, key: str, kind: type[_T], default: _T | None = _MISSING) -> _T | None:
        """Return a single value of one kind, or the default if the key is missing.

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
        """Map one more file and add its tensors."""
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
                raise FormatError(path, f"tensor '{name}' is also in {other}", hint=AGAIN)
            tensors[name] = info

    def _check_count(self, header: Header, n: int) -> None:
        expected = self._number(header, _N_TENSORS, None)
        if n != expected:
            raise FormatError(
                self.path,
                f"its files contain {n:,} tensors instead of {expected:,}",
                hint="download all files again, from one model",
            )

    def _number(self, header: Header, key: str, default: int | None, path: str | None = None) -> int:
        """Return a count from a key of a split model, which may be signed or unsigned and of any size."""
        path = path or self.path
        if key not in header.metadata:
            if default is None:
                raise FormatError(path, f"is a file of a split model but has no key '{key}'", hint=AGAIN)
            return default
        entry, value = header.metadata.entry(key), header.metadata[key]
        if entry.length is not None or entry.type in (ValueType.BOOL, ValueType.STRING) or not isinstance(value, int):
            raise FormatError(path, f"'{key}' is not a whole number", offset=entry.offset, hint=AGAIN)
        return value


def _part_paths(path: str, count: int, number: int) -> list[str]:
    """Return the paths of a split model's files, given the first.

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
        raise FormatError(
            path, f"this is file {number + 1} of {count} of a split model", hint=f"open the first file: {name}"
        )
    if match is None or int(match["number"]) != 1 or int(match["count"]) != count:
        hint = f"name it as it was, NAME-{1:05d}-of-{count:05d}.gguf: the other parts are found by that"
        raise FormatError(
            path, f"this is the first of a model's {count} parts, under a name that does not say so", hint=hint
        )
    return [f"{match['name']}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]


def _map(path: str) -> mmap.mmap:
    """Map a file read-only."""
    try:
        check_regular(path, most_bytes=None)
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise FormatError(path, "the file is empty", offset=0, hint=AGAIN)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        hint = "check the path; a name from `pyggml models` has no weights: `plan`, `splits` and `savings` take it"
        if path.startswith(("hf:", "http:/", "https:/")):
            hint = "download it; `plan` and `splits` read a header with -hf USER/MODEL:QUANT"
        raise FormatError(path, "no such file", hint=hint) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        if isinstance(error, FormatError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FormatError(path, f"cannot open: {reason}", hint="check the path and its permissions") from None
