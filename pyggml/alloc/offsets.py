"""`DynTallocr`: allocates and frees offsets by best fit, without memory or tensors."""

from __future__ import annotations

from bisect import bisect_left

from ..types import SIZE_MAX

__all__ = ["DynTallocr", "pad"]

#: Most chunks of one compute buffer; the last one has no limit of size.
VBUFFER_MAX_CHUNKS = 16


def pad(n: int, alignment: int) -> int:
    """Return a size, rounded up to a multiple of the alignment, a power of 2."""
    return (n + alignment - 1) & -alignment


class _Chunk:
    """Free ranges of one future buffer as ``[offset, size]``, in upstream's order.

    They ascend and are never adjacent, unless empty tensors left blocks of no bytes among them.
    """

    __slots__ = ("free", "max_size")

    def __init__(self, size: int) -> None:
        self.free: list[list[int]] = [[0, size]]
        self.max_size = 0  #: end of the furthest tensor so far


class DynTallocr:
    """Allocates and frees offsets by best fit.

    Notes
    -----
    Mirrors `ggml_dyn_tallocr`. Differs: any number of free blocks; upstream aborts above 256.
    """

    __slots__ = ("alignment", "chunks", "max_chunk_size")

    def __init__(self, alignment: int, max_buffer_size: int) -> None:
        self.alignment = alignment
        self.max_chunk_size = min(max_buffer_size, SIZE_MAX // 2)
        self.chunks: list[_Chunk] = []

    def reset(self) -> None:
        """Free everything."""
        self.chunks = []

    def alloc(self, size: int) -> tuple[int, int]:
        """Allocate ``size`` bytes and return chunk and offset."""
        size = (size + self.alignment - 1) & -self.alignment
        i_chunk = i_block = -1
        # the last block of a chunk is its open end: it is taken only if no hole fits
        for c, chunk in enumerate(self.chunks):
            best_size, last = SIZE_MAX, len(chunk.free) - 1
            for i, (_, room) in enumerate(chunk.free):
                if size <= room <= best_size and i < last:
                    i_chunk, i_block, best_size = c, i, room
        if i_block == -1:
            i_chunk, i_block = self._best_open_end(size)
        if i_block == -1:
            i_chunk, i_block = self._new_chunk(size), 0
        chunk = self.chunks[i_chunk]
        block = chunk.free[i_block]
        offset = block[0]
        block[0] += size
        block[1] -= size
        if block[1] == 0:
            del chunk.free[i_block]
        chunk.max_size = max(chunk.max_size, offset + size)
        return i_chunk, offset

    def _best_open_end(self, size: int) -> tuple[int, int]:
        """Return the chunk whose last block wastes least or must grow least."""
        i_chunk = i_block = -1
        best: int | None = None
        for c, chunk in enumerate(self.chunks):
            if not chunk.free or chunk.free[-1][1] < size:
                continue
            unused = chunk.max_size - chunk.free[-1][0] - size  # negative: bytes that the chunk would grow by
            better = best is None or (unused > best if best < 0 else 0 <= unused < best)
            if better:
                i_chunk, i_block, best = c, len(chunk.free) - 1, unused
        return i_chunk, i_block

    def _new_chunk(self, min_size: int) -> int:
        size = max(min_size, self.max_chunk_size)
        if len(self.chunks) == VBUFFER_MAX_CHUNKS - 1:
            size = SIZE_MAX // 2
        self.chunks.append(_Chunk(size))
        return len(self.chunks) - 1

    def free_bytes(self, i_chunk: int, offset: int, size: int) -> None:
        """Free bytes.

        Notes
        -----
        Mirrors `ggml_dyn_tallocr_free_bytes`.
        """
        size = (size + self.alignment - 1) & -self.alignment
        free = self.chunks[i_chunk].free
        for i, block in enumerate(free):
            start, length = block
            if start + length == offset:
                block[1] += size
                if i + 1 < len(free) and start + block[1] == free[i + 1][0]:
                    block[1] += free[i + 1][1]
                    del free[i + 1]
                return
            if offset + size == start:
                block[0] = offset
                block[1] += size
                if i > 0 and free[i - 1][0] + free[i - 1][1] == offset:
                    free[i - 1][1] += block[1]
                    del free[i]
                return
        # a block of no bytes, left by an empty tensor, may be inside the range: later blocks can still touch it
        free.insert(bisect_left(free, [offset]), [offset, size])
