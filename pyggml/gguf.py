"""GGUF, the file: a lazy, bounds-checked header and tensors mapped into memory. Nothing here knows a model.

::

    with GGUFFile.open("model.gguf") as file:
        file.metadata["llama.block_count"]          # decoded when asked for
        file.tensors["token_embd.weight"].ne        # ggml order
        file.data("token_embd.weight")              # read-only bytes, in place
        file.address("token_embd.weight")           # the same as an integer, for a buffer over existing memory

Opening walks the header once and decodes nothing but keys, tensor names and lengths, so that a vocabulary of 150,000
strings costs milliseconds until somebody reads it. Whatever is wrong with a file is a `FormatError` that names the file,
the thing, the byte and what to try.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from .errors import FormatError
from .types import MAX_DIMS, Type

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["GGUFFile", "Metadata", "TensorInfo", "ValueType"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

_AGAIN = "the file is damaged or its download was cut short: fetch it again"
_INT64_MAX = 2**63 - 1
_HEADER_BYTES = 24  # magic, version, tensor count, key count

#: First bytes of what people hand over by mistake, and what to tell them.
_MISTAKEN = {
    b"vers": "this looks like a Git LFS pointer: run `git lfs pull`, or download the file itself",
    b"PK\x03\x04": "this is a zip archive (a wheel, a PyTorch checkpoint): extract or convert it first",
    b"<!DO": "this is a web page, not a model: check the download link",
    b"<htm": "this is a web page, not a model: check the download link",
    b"ggml": "this is an old ggml file: convert it with llama.cpp's convert_llama_ggml_to_gguf.py",
    b"tjgg": "this is an old ggjt file: convert it with llama.cpp's convert_llama_ggml_to_gguf.py",
    b"FUGG": "this is a big-endian file: convert it with gguf-py's gguf-convert-endian",
}


class ValueType(IntEnum):
    """Types of metadata values; the numbers are GGUF's."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


#: Little-endian `struct` letters of the types of fixed size; numpy reads the same letters.
_LETTERS = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
_SCALARS = {kind: struct.Struct("<" + letter) for kind, letter in _LETTERS.items()}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a metadata value lies."""

    type: ValueType  #: of the value, or of an array's elements
    length: int | None  #: elements of an array; None for a single value
    offset: int  #: in the file, of the value's or the array's first byte
    end: int  #: in the file, of the first byte after it


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies."""

    name: str
    type: Type
    ne: tuple[int, int, int, int]  #: elements by dimension, ggml order
    offset: int  #: bytes, in the file
    nbytes: int


class _Walk:
    """A position in the header that cannot leave it."""

    __slots__ = ("at", "end", "map", "path")

    def __init__(self, path: str, mapped: mmap.mmap) -> None:
        self.path, self.map, self.at, self.end = path, mapped, 0, len(mapped)

    def error(self, message: str, *, hint: str = _AGAIN, offset: int | None = None) -> FormatError:
        return FormatError(self.path, message, offset=self.at if offset is None else offset, hint=hint)

    def need(self, n_bytes: int, what: str) -> None:
        if n_bytes > self.end - self.at:
            left = self.end - self.at
            raise self.error(f"{what} wants {n_bytes:,} bytes, the file has {left:,} left")

    def number(self, form: struct.Struct, what: str) -> int:
        self.need(form.size, what)
        (value,) = form.unpack_from(self.map, self.at)
        self.at += form.size
        return int(value)

    def text(self, what: str) -> str:
        length = self.number(_U64, what)
        self.need(length, what)
        raw = self.map[self.at : self.at + length]
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8", offset=self.at + error.start) from None
        self.at += length
        return text

    def skip_strings(self, n: int, what: str) -> None:
        """Step over n strings; the one loop whose length a vocabulary sets."""
        at, last, mapped, unpack = self.at, self.end - 8, self.map, _U64.unpack_from
        for _ in range(n):
            if at > last:
                break
            at += 8 + unpack(mapped, at)[0]
        else:
            if at <= self.end:
                self.at = at
                return
        raise self.error(f"{what} runs past the end of the file", offset=self.end)


class Metadata(Mapping[str, Any]):  # Any: a value's type is the file's to say; `require` checks it
    """The keys and values of a file, decoded when asked for.

    A value is an int, float, bool or str; an array is a read-only numpy array, or a list of str.
    """

    def __init__(self, path: str, mapped: mmap.mmap, entries: dict[str, Entry]) -> None:
        self._path, self._map, self._entries = path, mapped, entries
        self._decoded: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"<Metadata of {self._path}: {len(self)} keys>"

    def __getitem__(self, key: str) -> Any:
        entry = self._entries[key]
        if key not in self._decoded:
            self._decoded[key] = self._decode(key, entry)
        return self._decoded[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def entry(self, key: str) -> Entry:
        """Return where a value lies: its type, and an array's length, without decoding it."""
        return self._entries[key]

    def raw(self, key: str) -> bytes:
        """Return a value as it stands in the file, after its type (and an array's length)."""
        entry = self._entries[key]
        return self._map[entry.offset : entry.end]

    def _decode(self, key: str, entry: Entry) -> Any:
        if entry.type is ValueType.STRING:
            walk = _Walk(self._path, self._map)
            walk.at = entry.offset
            if entry.length is None:
                return walk.text(f"the value of '{key}'")
            return self._strings(key, entry, entry.length)
        if entry.length is None:
            return _SCALARS[entry.type].unpack_from(self._map, entry.offset)[0]
        import numpy as np

        values: npt.NDArray[Any] = np.frombuffer(self.raw(key), dtype="<" + _LETTERS[entry.type])
        return values

    def _strings(self, key: str, entry: Entry, n: int) -> list[str]:
        """Decode an array of strings, whose lengths were checked when the file was opened."""
        raw, at, unpack = self.raw(key), 0, _U64.unpack_from
        strings: list[str] = []
        try:
            for _ in range(n):
                end = at + 8 + unpack(raw, at)[0]
                strings.append(raw[at + 8 : end].decode())
                at = end
        except UnicodeDecodeError as error:
            offset = entry.offset + at + 8 + error.start
            message = f"'{key}'[{len(strings):,}] is not UTF-8"
            raise FormatError(self._path, message, offset=offset, hint=_AGAIN) from None
        return strings


_T = TypeVar("_T", int, float, bool, str)
_MISSING: Any = object()  # a default that no caller can mean


class GGUFFile:
    """An opened GGUF file, mapped read-only. Use as a context manager, or `close` it, or let it go.

    Attributes
    ----------
    path : str
        As it was opened.
    version, alignment, data_offset, size : int
        Of the format; of tensor data, in bytes; where tensor data begins; of the file, in bytes.
    metadata : Metadata
        The keys and values.
    tensors : Mapping[str, TensorInfo]
        In the file's order.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._map: mmap.mmap | None = _map(self.path)
        self._bytes: npt.NDArray[np.uint8] | None = None
        try:
            self._read(self._map)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Map a file and check its header.

        Parameters
        ----------
        path : str or os.PathLike
            A GGUF file of version 2 or 3, little-endian, in one part.

        Raises
        ------
        FormatError
            The file is missing, unreadable, damaged, or of a kind that is not supported.
        """
        return cls(path)

    def __repr__(self) -> str:
        state = f"{len(self.tensors)} tensors, {len(self.metadata)} keys" if self._map is not None else "closed"
        return f"<GGUFFile {self.path}: {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._map is None

    def close(self) -> None:
        """Let the mapping go: at once, or with the last view of `data` and this object."""
        self._bytes = None
        if self._map is not None:
            with contextlib.suppress(BufferError):  # a view is alive and keeps the memory
                self._map.close()
            self._map = None

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes in place: uint8, ``(nbytes,)``, read-only. The view keeps the mapping alive."""
        info = self.tensor(name)
        return self._whole()[info.offset : info.offset + info.nbytes]

    def address(self, name: str) -> int:
        """Return the address of a tensor's first byte; valid while this file is open or a view of `data` lives."""
        return int(self._whole().ctypes.data) + self.tensor(name).offset

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

    def _whole(self) -> npt.NDArray[np.uint8]:
        if self._map is None:
            raise ValueError(f"{self.path} is closed")
        if self._bytes is None:
            import numpy as np

            self._bytes = np.frombuffer(self._map, np.uint8)
        return self._bytes

    def _read(self, mapped: mmap.mmap) -> None:
        walk = _Walk(self.path, mapped)
        self.size = len(mapped)
        self.version, n_tensors, n_keys = _read_counts(walk)
        self.metadata = Metadata(self.path, mapped, _read_keys(walk, n_keys))
        self.alignment = self._read_alignment()
        self._refuse_parts()
        infos = _read_infos(walk, n_tensors)
        self.data_offset = _align(walk.at, self.alignment)
        tensors = {info.name: _place(walk, info, at, self) for info, at in infos}
        _check_overlaps(walk, tensors)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)

    def _read_alignment(self) -> int:
        key = "general.alignment"
        if key not in self.metadata:
            return DEFAULT_ALIGNMENT
        entry = self.metadata.entry(key)
        if entry.type is not ValueType.UINT32 or entry.length is not None:
            raise FormatError(self.path, f"'{key}' is not a uint32", offset=entry.offset, hint=_AGAIN)
        value = int(self.metadata[key])
        if value == 0 or value & (value - 1):
            raise FormatError(self.path, f"'{key}' is {value}, not a power of two", offset=entry.offset, hint=_AGAIN)
        return value

    def _refuse_parts(self) -> None:
        count = self.metadata.get("split.count", 0)
        if isinstance(count, int) and count > 1:
            raise FormatError(
                self.path,
                f"this is one of {count} parts of a split model",
                offset=self.metadata.entry("split.count").offset,
                hint="join them with `llama-gguf-split --merge FIRST-PART OUT.gguf`",
            )


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
                raise FormatError(path, "the file is empty", offset=0, hint=_AGAIN)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise FormatError(path, "no such file", hint="check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        if isinstance(error, FormatError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FormatError(path, f"cannot open: {reason}", hint="check the path and its permissions") from None


def _read_counts(walk: _Walk) -> tuple[int, int, int]:
    """Read magic, version, tensor count and key count."""
    magic = walk.map[:4]
    if magic != MAGIC:
        hint = _MISTAKEN.get(bytes(magic), "this is not a GGUF file: convert the model with llama.cpp's converters")
        raise walk.error(f"starts with {bytes(magic)!r}, not {MAGIC!r}", hint=hint)
    walk.need(_HEADER_BYTES, "the header")
    walk.at = 4
    version = walk.number(_U32, "the version")
    if version not in VERSIONS:
        walk.at = 4
        if version & 0xFFFF == 0 and version:
            raise walk.error("big-endian file", hint="convert it with gguf-py's gguf-convert-endian")
        hint = "convert the model again" if version < 2 else "a newer pyggml may read it"
        raise walk.error(f"GGUF version {version} is not supported, only {' and '.join(map(str, VERSIONS))}", hint=hint)
    n_tensors, n_keys = walk.number(_U64, "the tensor count"), walk.number(_U64, "the key count")
    # the least a key and a tensor can take: name length, type, value; name length, dimensions, type, offset
    for n, least, what, at in ((n_tensors, 24, "tensors", 8), (n_keys, 13, "keys", 16)):
        if n * least > walk.end - walk.at:
            raise walk.error(f"{n:,} {what} cannot be in a file of {walk.end:,} bytes", offset=at)
    return version, n_tensors, n_keys


def _read_keys(walk: _Walk, n: int) -> dict[str, Entry]:
    """Find every value, decode none."""
    entries: dict[str, Entry] = {}
    for i in range(n):
        start = walk.at
        key = walk.text(f"key {i} of {n}")
        if not key or key in entries:
            raise walk.error(f"key {i} of {n} is {'empty' if not key else f'a second {key!r}'}", offset=start)
        kind = _value_type(walk, key)
        length = None
        if kind is ValueType.ARRAY:
            kind = _value_type(walk, key)
            length = walk.number(_U64, f"the length of '{key}'")
            if kind is ValueType.ARRAY:
                raise walk.error(f"'{key}' is an array of arrays, which is not supported", hint="convert it again")
        start = walk.at
        if kind is ValueType.STRING:
            count = 1 if length is None else length
            if length is not None:
                walk.need(8 * count, f"'{key}', an array of {count:,} strings,")
            walk.skip_strings(count, f"'{key}'")
        else:
            n_bytes = _SCALARS[kind].size * (1 if length is None else length)
            walk.need(n_bytes, f"the value of '{key}'")
            walk.at += n_bytes
        entries[key] = Entry(kind, length, start, walk.at)
    return entries


def _value_type(walk: _Walk, key: str) -> ValueType:
    at = walk.at
    number = walk.number(_U32, f"the type of '{key}'")
    try:
        return ValueType(number)
    except ValueError:
        raise walk.error(f"'{key}' has the unknown value type {number}", offset=at) from None


def _read_infos(walk: _Walk, n: int) -> list[tuple[TensorInfo, int]]:
    """Read each tensor's name, shape, type and offset in the data, with the byte that the record starts at."""
    infos: list[tuple[TensorInfo, int]] = []
    seen: set[str] = set()
    for i in range(n):
        start = walk.at
        name = walk.text(f"the name of tensor {i} of {n}")
        if not name or name in seen:
            raise walk.error(f"tensor {i} of {n} is {'nameless' if not name else f'a second {name!r}'}", offset=start)
        seen.add(name)
        at = walk.at
        n_dims = walk.number(_U32, f"the dimensions of '{name}'")
        if n_dims > MAX_DIMS:
            raise walk.error(f"tensor '{name}' has {n_dims:,} dimensions, more than {MAX_DIMS}", offset=at)
        ne = [walk.number(_U64, f"the shape of '{name}'") for _ in range(n_dims)] + [1] * (MAX_DIMS - n_dims)
        if any(n_elements > _INT64_MAX for n_elements in ne) or ne[0] * ne[1] * ne[2] * ne[3] > _INT64_MAX:
            raise walk.error(f"tensor '{name}' of shape {ne} has too many elements", offset=at)
        kind = _tensor_type(walk, name)
        if ne[0] % kind.block_size:
            raise walk.error(
                f"tensor '{name}': rows of {ne[0]:,} elements are no multiple of {kind.ggml_name}'s {kind.block_size}",
                offset=at,
            )
        nbytes = kind.row_size(ne[0]) * ne[1] * ne[2] * ne[3]
        offset = walk.number(_U64, f"the offset of '{name}'")
        infos.append((TensorInfo(name, kind, (ne[0], ne[1], ne[2], ne[3]), offset, nbytes), start))
    return infos


def _tensor_type(walk: _Walk, name: str) -> Type:
    at = walk.at
    number = walk.number(_U32, f"the type of '{name}'")
    try:
        return Type(number)
    except ValueError:
        hint = f"pyggml knows the types {', '.join(kind.ggml_name for kind in Type)}"
        raise walk.error(f"tensor '{name}' has the unknown type {number}", offset=at, hint=hint) from None


def _align(n_bytes: int, alignment: int) -> int:
    return (n_bytes + alignment - 1) & ~(alignment - 1)


def _place(walk: _Walk, info: TensorInfo, record_at: int, file: GGUFFile) -> TensorInfo:
    """Turn an offset in the data into one in the file, and check that it is there."""
    if info.offset % file.alignment:
        raise walk.error(
            f"tensor '{info.name}' lies at {info.offset:,} of the data, which is not aligned to {file.alignment}",
            offset=record_at,
        )
    offset = file.data_offset + info.offset
    end = offset + info.nbytes
    if end > file.size:
        raise walk.error(
            f"tensor '{info.name}' ({info.nbytes:,} bytes at {offset:,}) ends {end - file.size:,} bytes past the end of "
            f"the file, which has {file.size:,}",
            offset=record_at,
        )
    return TensorInfo(info.name, info.type, info.ne, offset, info.nbytes)


def _check_overlaps(walk: _Walk, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse two tensors that share bytes.

    Notes
    -----
    Differs: `gguf_init_from_reader` wants tensors in order and without gaps; readers elsewhere do not, nor do we.
    """
    before: TensorInfo | None = None
    for info in sorted((info for info in tensors.values() if info.nbytes), key=lambda info: info.offset):
        if before is not None and info.offset < before.offset + before.nbytes:
            raise walk.error(f"tensors '{before.name}' and '{info.name}' overlap", offset=info.offset)
        before = info
