"""The header of one GGUF file, read once with bounds checks.

Only keys, tensor names and lengths are decoded, so that a vocabulary of 150,000 strings costs milliseconds until it is
read. Every error is a `FormatError` that names the file, the item, the byte and what to try.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from ..errors import FormatError
from ..types import MAX_DIMS, Type

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "AGAIN",
    "DEFAULT_ALIGNMENT",
    "MAGIC",
    "Entry",
    "Header",
    "Metadata",
    "TensorInfo",
    "ValueType",
    "read_header",
]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
#: The most tensors and the most keys of a file. llama.cpp refuses more than 512 layers, and no layer has 256 tensors.
MAX_RECORDS = 1 << 17

#: What to try if a file is incomplete.
AGAIN = "the file is damaged or its download is incomplete: download it again"
_INT64_MAX = 2**63 - 1
_HEADER_BYTES = 24  # magic, version, tensor count, key count

#: First bytes of files that are often given by mistake, and the message for each.
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
    """The place of a metadata value."""

    type: ValueType  #: of the value, or of an array's elements
    length: int | None  #: elements of an array; None for a single value
    offset: int  #: offset in the file of the first byte of the value or array
    end: int  #: offset in the file of the first byte after it


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The description of a tensor in a file."""

    name: str
    type: Type
    ne: tuple[int, int, int, int]  #: elements per dimension, in ggml's order
    offset: int  #: offset in the file, in bytes
    nbytes: int
    part: int = 0  #: index of the file of a split model, from 0


@dataclass(frozen=True, slots=True)
class Header:
    """The contents of one header."""

    version: int  #: version of the format
    metadata: Metadata
    alignment: int  #: alignment of tensor data, in bytes
    data_offset: int  #: offset in the file of tensor data
    tensors: dict[str, TensorInfo]  #: in the order of the file


class _Walk:
    """A position in the header that cannot move past its end."""

    __slots__ = ("at", "end", "map", "path")

    def __init__(self, path: str, mapped: mmap.mmap) -> None:
        self.path, self.map, self.at, self.end = path, mapped, 0, len(mapped)

    def error(self, message: str, *, hint: str = AGAIN, offset: int | None = None) -> FormatError:
        return FormatError(self.path, message, offset=self.at if offset is None else offset, hint=hint)

    def need(self, n_bytes: int, what: str) -> None:
        if n_bytes > self.end - self.at:
            left = self.end - self.at
            raise self.error(f"{what} needs {n_bytes:,} bytes, but the file has only {left:,} left")

    def number(self, form: struct.Struct, what: str) -> int:
        self.need(form.size, what)
        (value,) = form.unpack_from(self.map, self.at)
        self.at += form.size
        return int(value)

    def text(self, what: str) -> str:
        length = self.number(_U64, what)
        self.need(length, what)
        raw = self.map[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8", "surrogateescape")  # for llama.cpp names are bytes; this keeps all of them

    def skip_strings(self, n: int, what: str) -> None:
        """Skip n strings. This is the only loop whose length depends on the vocabulary."""
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


class Metadata(Mapping[str, Any]):  # Any: the type of a value depends on the file; `require` checks it
    """The keys and values of a file, decoded on access.

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
        """Return the place and type of a value, and the length of an array, without decoding it."""
        return self._entries[key]

    def raw(self, key: str) -> bytes:
        """Return the bytes of a value, without its type and an array's length."""
        entry = self._entries[key]
        return self._map[entry.offset : entry.end]

    def _decode(self, key: str, entry: Entry) -> Any:
        if entry.type is ValueType.STRING:
            walk = _Walk(self._path, self._map)
            walk.at = entry.offset
            if entry.length is None:
                return walk.text(f"the value of '{key}'")
            return self._strings(key, entry.length)
        if entry.length is None:
            return _SCALARS[entry.type].unpack_from(self._map, entry.offset)[0]
        import numpy as np

        values: npt.NDArray[Any] = np.frombuffer(self.raw(key), dtype="<" + _LETTERS[entry.type])
        return values

    def _strings(self, key: str, n: int) -> list[str]:
        """Decode an array of strings. Their lengths were checked when the file was opened."""
        raw, at, unpack = self.raw(key), 0, _U64.unpack_from
        strings: list[str] = []
        for _ in range(n):
            end = at + 8 + unpack(raw, at)[0]
            strings.append(raw[at + 8 : end].decode("utf-8", "surrogateescape"))
            at = end
        return strings


def header_end(path: str, mapped: mmap.mmap) -> int:
    """Return where the header of a file ends whose tensor data need not be there.

    Raises
    ------
    FormatError
        The header is damaged, or longer than what is mapped.
    """
    walk = _Walk(path, mapped)
    _, n_tensors, n_keys = _read_counts(walk)
    _read_keys(walk, n_keys)
    _read_infos(walk, n_tensors)
    return walk.at


def read_header(path: str, mapped: mmap.mmap, part: int = 0) -> Header:
    """Read a mapped file's header and check that everything it refers to is in the file.

    Parameters
    ----------
    path : str
        The path in errors.
    mapped : mmap.mmap
        The whole file.
    part : int
        The index of this file of a split model.

    Raises
    ------
    FormatError
        The file is damaged or of an unsupported kind.

    Notes
    -----
    Differs: ggml reads any number of tensors and keys. Here more than `MAX_RECORDS` are refused before they are read,
    which bounds the time and memory that a hostile file takes.
    """
    walk = _Walk(path, mapped)
    version, n_tensors, n_keys = _read_counts(walk)
    metadata = Metadata(path, mapped, _read_keys(walk, n_keys))
    alignment = _read_alignment(path, metadata)
    infos = _read_infos(walk, n_tensors)
    data_offset = _align(walk.at, alignment)
    tensors = {info.name: _place(walk, info, at, data_offset, alignment, part) for info, at in infos}
    _check_order(walk, tensors, data_offset, alignment)
    return Header(version, metadata, alignment, data_offset, tensors)


def _read_counts(walk: _Walk) -> tuple[int, int, int]:
    """Read magic, version, tensor count and key count."""
    magic = walk.map[:4]
    if magic != MAGIC:
        hint = _MISTAKEN.get(bytes(magic), "this is not a GGUF file: convert the model with llama.cpp's converters")
        raise walk.error(f"starts with {bytes(magic)!r} instead of {MAGIC!r}", hint=hint)
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
    # minimum size of a key (name length, type, value) and of a tensor (name length, dimensions, type, offset)
    for n, least, what, at in ((n_tensors, 24, "tensors", 8), (n_keys, 13, "keys", 16)):
        if n * least > walk.end - walk.at:
            raise walk.error(f"{n:,} {what} cannot be in a file of {walk.end:,} bytes", offset=at)
        if n > MAX_RECORDS:
            raise walk.error(f"{n:,} {what} are more than the {MAX_RECORDS:,} that a model can have", offset=at)
    return version, n_tensors, n_keys


def _read_keys(walk: _Walk, n: int) -> dict[str, Entry]:
    """Find all values without decoding them."""
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


def _read_alignment(path: str, metadata: Metadata) -> int:
    key = "general.alignment"
    if key not in metadata:
        return DEFAULT_ALIGNMENT
    entry = metadata.entry(key)
    if entry.type is not ValueType.UINT32 or entry.length is not None:
        raise FormatError(path, f"'{key}' is not a uint32", offset=entry.offset, hint=AGAIN)
    value = int(metadata[key])
    if value == 0 or value & (value - 1):
        raise FormatError(path, f"'{key}' is {value}, not a power of two", offset=entry.offset, hint=AGAIN)
    return value


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
                f"tensor '{name}': a row of {ne[0]:,} elements is not a multiple of {kind.ggml_name}'s block of {kind.block_size}",
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


def _place(walk: _Walk, info: TensorInfo, record_at: int, data_offset: int, alignment: int, part: int) -> TensorInfo:
    """Convert an offset in the data to one in the file, and check that the tensor is in the file."""
    if info.offset % alignment:
        raise walk.error(
            f"tensor '{info.name}' is at offset {info.offset:,} of the data, which is not aligned to {alignment}",
            offset=record_at,
        )
    offset = data_offset + info.offset
    end = offset + info.nbytes
    if end > walk.end:
        raise walk.error(
            f"tensor '{info.name}' ({info.nbytes:,} bytes at {offset:,}) ends {end - walk.end:,} bytes past the end of "
            f"the file, which has {walk.end:,} bytes; it is described",
            offset=record_at,
        )
    return TensorInfo(info.name, info.type, info.ne, offset, info.nbytes, part)


def _check_order(walk: _Walk, tensors: Mapping[str, TensorInfo], data_offset: int, alignment: int) -> None:
    """Refuse gaps and overlaps between tensors, which a damaged type, shape or offset causes.

    Notes
    -----
    Mirrors `gguf_init_from_reader`.
    """
    at = data_offset
    for info in tensors.values():
        if info.offset != at:
            how = "overlaps the tensor before it" if info.offset < at else "leaves a gap"
            raise walk.error(
                f"tensor '{info.name}' is at offset {info.offset - data_offset:,} of the data instead of {at - data_offset:,}: it {how}, "
                "so a type, a shape or an offset is wrong",
                offset=info.offset,
            )
        at += _align(info.nbytes, alignment)
