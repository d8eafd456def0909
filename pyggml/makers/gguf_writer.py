"""`GGUFWriter`: writes a GGUF file as a stream; the file appears whole or not at all."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..files import aside
from ..gguf import DEFAULT_ALIGNMENT, MAGIC, ValueType
from ..types import Type

__all__ = ["GGUFWriter", "Progress", "Written"]

#: Called after each piece with the bytes written and the total.
Progress = Callable[[int, int], None]

_VERSION = 3
_PIECE_BYTES = 1 << 22
_SCALARS = {
    ValueType.UINT8: "<B",
    ValueType.INT8: "<b",
    ValueType.UINT32: "<I",
    ValueType.INT32: "<i",
    ValueType.FLOAT32: "<f",
    ValueType.BOOL: "<?",
    ValueType.UINT64: "<Q",
    ValueType.INT64: "<q",
    ValueType.FLOAT64: "<d",
}


@dataclass(frozen=True, slots=True)
class Written:
    """A written file."""

    path: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class _Tensor:
    record: bytes  #: without the offset
    nbytes: int
    pieces: Callable[[], Iterable[bytes | memoryview]]


class GGUFWriter:
    """Collects keys and tensors, then writes a GGUF file: version 3, little-endian, one part.

    Tensors are functions that yield their bytes in pieces, so a tensor need not fit in memory, and keys can be copied
    unchanged. gguf 0.19's `GGUFWriter` takes a tensor only as one array (`write_tensor_data`), leaves out empty arrays
    (`add_array`) or refuses them (`add_key_value`), and has no call for a key's bytes: a key must be parsed and packed
    again. It writes in place and computes no checksum.
    """

    def __init__(self, *, alignment: int = DEFAULT_ALIGNMENT) -> None:
        self.alignment = alignment
        self._keys: list[bytes] = []
        self._tensors: list[_Tensor] = []

    def add(self, key: str, kind: ValueType, value: object) -> None:
        """Add a single value."""
        self._keys.append(_string(key) + struct.pack("<I", kind) + _value(kind, value))

    def add_array(self, key: str, kind: ValueType, values: Sequence[object]) -> None:
        """Add an array of single values."""
        packed = b"".join(_value(kind, value) for value in values)
        self.add_raw(key, kind, len(values), packed)

    def add_raw(self, key: str, kind: ValueType, length: int | None, packed: bytes) -> None:
        """Add a value, or an array of ``length`` values, as packed bytes of the file (`Metadata.raw`)."""
        head = struct.pack("<I", kind) if length is None else struct.pack("<IIQ", ValueType.ARRAY, kind, length)
        self._keys.append(_string(key) + head + packed)

    def add_tensor(
        self, name: str, kind: Type, ne: Sequence[int], pieces: Callable[[], Iterable[bytes | memoryview]]
    ) -> None:
        """Add a tensor.

        Parameters
        ----------
        name : str
        kind : Type
        ne : sequence of int
            Elements by dimension, in ggml order; the file has this many dimensions.
        pieces : callable
            Called once while writing; yields the tensor's bytes in order.
        """
        nbytes = kind.row_size(ne[0])
        for n in ne[1:]:
            nbytes *= n
        record = _string(name) + struct.pack(f"<I{len(ne)}QI", len(ne), *ne, kind)
        self._tensors.append(_Tensor(record, nbytes, pieces))

    def write(self, path: str | os.PathLike[str], *, progress: Progress | None = None) -> Written:
        """Write the file. An existing file at ``path`` is replaced only after the last byte is written.

        Raises
        ------
        PyggmlError
            The folder is missing, full, or may not be written to.
        """
        head = self._head()
        total = len(head) + sum(self._padded(tensor.nbytes) for tensor in self._tensors)
        digest, done = hashlib.sha256(), 0
        with aside(path, total) as part, part.open("wb") as file:
            for piece in self._bytes(head):
                file.write(piece)
                digest.update(piece)
                done += len(piece)
                if progress is not None:
                    progress(done, total)
        assert done == total, f"{done} bytes written, {total} announced"
        return Written(os.fspath(path), total, digest.hexdigest())

    def write_header(self, path: str | os.PathLike[str]) -> None:
        """Write only the header, followed by a hole of the data's size, which needs no disk space with sparse files.

        Raises
        ------
        PyggmlError
            The folder is missing, full, or may not be written to.
        """
        head = self._head()
        with aside(path, len(head)) as part, part.open("wb") as file:
            file.write(head)
            file.truncate(len(head) + sum(self._padded(tensor.nbytes) for tensor in self._tensors))

    def _padded(self, n_bytes: int) -> int:
        return -(-n_bytes // self.alignment) * self.alignment

    def _head(self) -> bytes:
        head = bytearray(MAGIC + struct.pack("<IQQ", _VERSION, len(self._tensors), len(self._keys)))
        head += b"".join(self._keys)
        offset = 0
        for tensor in self._tensors:
            head += tensor.record + struct.pack("<Q", offset)
            offset += self._padded(tensor.nbytes)
        return bytes(head) + bytes(self._padded(len(head)) - len(head))

    def _bytes(self, head: bytes) -> Iterator[bytes | memoryview]:
        yield head
        for tensor in self._tensors:
            n_bytes = 0
            for piece in tensor.pieces():
                view = memoryview(piece).cast("B")
                n_bytes += len(view)
                for start in range(0, len(view), _PIECE_BYTES):
                    yield view[start : start + _PIECE_BYTES]
            assert n_bytes == tensor.nbytes, f"{n_bytes} bytes given, {tensor.nbytes} announced"
            if n_bytes % self.alignment:
                yield bytes(self._padded(n_bytes) - n_bytes)


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: ValueType, value: object) -> bytes:
    if kind is ValueType.STRING:
        assert isinstance(value, str)
        return _string(value)
    return struct.pack(_SCALARS[kind], value)
