"""Memory of mock devices: made-up addresses, and bytes only where tensors of type I32 were written."""

from __future__ import annotations

import ctypes
from bisect import bisect_right

from ...buffer import Buffer, BufferType
from ...errors import OutOfMemoryError
from ...tensor import Tensor
from ...types import BufferUsage, Type
from .abilities import BufferTypeAbilities, Note, ignore, short_name

__all__ = ["MockBuffer", "MockBufferType", "MockMemory", "copy_ints", "lies_in", "read_ints", "write_ints"]

_PAGE = 1 << 16
#: Above every address of a process (2^57 at most), below 2^63 so that it fits a signed word.
_FIRST_ADDRESS = 1 << 60


class MockMemory:
    """An address space of made-up addresses, of which only pages written to exist.

    Notes
    -----
    Addresses are never given out twice, so bytes of a freed buffer do not come back: fresh memory is zero.
    """

    __slots__ = ("_bases", "_next", "_pages", "_ranges")

    def __init__(self) -> None:
        self._next = _FIRST_ADDRESS
        self._bases: list[int] = []  # ascending, of what is allocated now
        self._ranges: dict[int, tuple[int, str]] = {}  # base: end, label
        self._pages: dict[int, bytearray] = {}

    def alloc(self, size: int, alignment: int, label: str) -> int:
        """Return the address of new memory."""
        alignment = max(alignment, _PAGE)
        base = -(-self._next // alignment) * alignment
        end = base + max(-(-size // _PAGE), 1) * _PAGE
        self._next = end
        self._bases.append(base)
        self._ranges[base] = end, label
        return base

    def free(self, base: int) -> None:
        """Give memory back, and its bytes."""
        end, _ = self._ranges.pop(base)
        self._bases.remove(base)
        for page in [p for p in self._pages if base <= p * _PAGE < end]:
            del self._pages[page]

    def find(self, address: int) -> list[object]:
        """Return label and offset of the buffer at an address, ``[None, 0]`` if it is of none."""
        i = bisect_right(self._bases, address) - 1
        if i >= 0:
            base = self._bases[i]
            end, label = self._ranges[base]
            if address < end:
                return [label, address - base]
        return [None, 0]

    def copy(self, dst: int, src: int, size: int) -> None:
        """Copy bytes between addresses, made up or of the process."""
        self.write(dst, self.read(src, size))

    def read(self, address: int, size: int) -> bytes:
        """Return bytes at an address."""
        if address < _FIRST_ADDRESS:
            return ctypes.string_at(address, size)
        data = bytearray()
        while len(data) < size:
            number, start = divmod(address + len(data), _PAGE)
            n = min(_PAGE - start, size - len(data))
            page = self._pages.get(number)
            data += bytes(n) if page is None else page[start : start + n]
        return bytes(data)

    def write(self, address: int, data: bytes) -> None:
        """Put bytes at an address."""
        if address < _FIRST_ADDRESS:
            ctypes.memmove(address, data, len(data))
            return
        done = 0
        while done < len(data):
            number, start = divmod(address + done, _PAGE)
            n = min(_PAGE - start, len(data) - done)
            page = self._pages.setdefault(number, bytearray(_PAGE))
            page[start : start + n] = data[done : done + n]
            done += n


class MockBufferType(BufferType):
    """A buffer type of given abilities.

    Parameters
    ----------
    abilities : BufferTypeAbilities
    memory : MockMemory
        Shared by the buffer types that exchange addresses.
    note : Note
        Gets the calls.
    """

    __slots__ = ("_pads_all", "abilities", "memory", "note")

    def __init__(self, abilities: BufferTypeAbilities, memory: MockMemory, note: Note = ignore) -> None:
        super().__init__(
            abilities.name, alignment=abilities.alignment, max_size=abilities.max_size, is_host=abilities.is_host
        )
        self.abilities = abilities
        self._pads_all = bool(abilities.extra_bytes or abilities.round_to_bytes > 1)
        self.memory = memory
        self.note = note

    def _alloc(self, size: int) -> MockBuffer:
        limit = self.abilities.alloc_limit
        fails = 0 < limit < size
        self.note(["alloc", self.name, size, not fails])
        if fails:
            raise OutOfMemoryError(self.name, size, limit, "a buffer")
        return MockBuffer(self, size, f"@{self.name}")

    def static_buffer(self, size: int, label: str, usage: BufferUsage) -> MockBuffer:
        """Return a buffer that was there before the scheduler: its allocation is not noted."""
        buffer = MockBuffer(self, size, label)
        buffer.usage = usage
        return buffer

    def alloc_size(self, tensor: Tensor) -> int:
        """Bytes that a tensor takes: ``nbytes`` and the padding asked for."""
        size = tensor.nbytes
        if not self._pads_all and not tensor.type.is_quantized:
            return size
        pad = self.abilities
        if pad.quant_row and tensor.type.is_quantized and (rest := tensor.ne[0] % pad.quant_row):
            size += tensor.type.row_size(pad.quant_row - rest)
        size += pad.extra_bytes
        return -(-size // pad.round_to_bytes) * pad.round_to_bytes


class MockBuffer(Buffer):
    """Memory of a mock buffer type.

    Attributes
    ----------
    label : str
        Its name in a trace: the id of a static buffer, or ``@`` and the buffer type.
    """

    __slots__ = ("label", "memory", "note")

    def __init__(self, buft: MockBufferType, size: int, label: str) -> None:
        super().__init__(buft, size, buft.memory.alloc(size, buft.alignment, label))
        self.label = label
        self.memory = buft.memory
        self.note = buft.note

    def set_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Note a write from host memory."""
        self.note(["buf_set", self.label, short_name(tensor), offset, size, self.memory.find(address)])
        write_ints(self.memory, tensor, address, offset, size)

    def get_tensor(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Note a read to host memory."""
        self.note(["buf_get", self.label, short_name(tensor), offset, size])
        read_ints(self.memory, tensor, address, offset, size)

    def peek(self, tensor: Tensor, offset: int, size: int) -> memoryview | None:
        """Return a copy of the bytes, noting nothing; None for what has none."""
        if tensor.type is not Type.I32 or tensor.data is None:
            return None
        return memoryview(self.memory.read(tensor.data + offset, size))

    def cpy_tensor(self, src: Tensor, dst: Tensor) -> bool:
        """Note a copy from another buffer."""
        assert isinstance(self.buft, MockBufferType)
        sources = self.buft.abilities.cpy_from
        if sources is None:
            return super().cpy_tensor(src, dst)
        done = lies_in(src, sources)
        self.note(["buf_cpy", self.label, short_name(src), short_name(dst), done])
        if done:
            copy_ints(self.memory, src, dst)
        return done

    def memset_tensor(self, tensor: Tensor, value: int, offset: int, size: int) -> None:
        """Note that bytes of a tensor were set to a value."""
        self.note(["buf_memset", self.label, short_name(tensor), offset, size, value])
        if tensor.type is Type.I32 and tensor.data is not None:
            self.memory.write(tensor.data + offset, bytes([value]) * size)

    def clear(self, value: int) -> None:
        """Note that all bytes were set to a value; they are not."""
        self.note(["buf_clear", self.label, value])

    def close(self) -> None:
        """Record that the memory was freed."""
        self.note(["free", self.label, self.size])
        self.memory.free(self.base)


def write_ints(memory: MockMemory, tensor: Tensor, address: int, offset: int, size: int) -> None:
    """Put bytes into a tensor, if it has any."""
    if tensor.type is Type.I32 and tensor.data is not None:
        memory.copy(tensor.data + offset, address, size)


def read_ints(memory: MockMemory, tensor: Tensor, address: int, offset: int, size: int) -> None:
    """Give bytes of a tensor to an address, if it has any."""
    if tensor.type is Type.I32 and tensor.data is not None:
        memory.copy(address, tensor.data + offset, size)


def copy_ints(memory: MockMemory, src: Tensor, dst: Tensor) -> None:
    """Copy the bytes of a tensor, if it has any."""
    if src.type is Type.I32 and src.data is not None and dst.data is not None:
        memory.copy(dst.data, src.data, src.nbytes)


def lies_in(tensor: Tensor, bufts: frozenset[str]) -> bool:
    """Whether the memory of a tensor is of one of some buffer types."""
    buffer = tensor.storage
    return buffer is not None and buffer.buft.name in bufts
