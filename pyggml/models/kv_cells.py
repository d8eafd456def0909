"""`Cells`: which token of which sequences each cell of one stream of a KV cache holds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Cells", "sequence_bit"]


#: Cells that a book has from the beginning.
_N_FIRST = 4096


def sequence_bit(seq: int) -> np.uint64:
    """Return the bit that stands for a sequence in a cell's set of them."""
    return np.uint64(1 << seq)


class Cells:
    """The book of one stream: what its first cells hold; those behind are empty, and take no room until `grow` is asked.

    Notes
    -----
    Mirrors `llama_kv_cells`.
    """

    __slots__ = ("head", "n", "pos", "seqs")

    def __init__(self, n: int) -> None:
        self.n = n  #: cells of the stream
        self.pos = np.full(min(n, _N_FIRST), -1, np.int32)  #: -1: empty
        self.seqs = np.zeros(min(n, _N_FIRST), np.uint64)  #: bit s: the cell belongs to sequence s
        self.head = 0  #: where the search for cells starts

    def grow(self, n: int) -> None:
        """Have at least so many cells in the book, as far as there are so many."""
        n_now, n = len(self.pos), min(n, self.n)
        if n <= n_now:
            return
        n_more = min(max(n, 2 * n_now), self.n) - n_now
        self.pos = np.concatenate([self.pos, np.full(n_more, -1, np.int32)])
        self.seqs = np.concatenate([self.seqs, np.zeros(n_more, np.uint64)])

    @property
    def n_used(self) -> int:
        """Cells in use."""
        return int(np.count_nonzero(self.pos >= 0))

    @property
    def used_end(self) -> int:
        """One past the last cell in use."""
        used = np.flatnonzero(self.pos >= 0)
        return int(used[-1]) + 1 if len(used) else 0

    def of(self, seq: int) -> npt.NDArray[np.bool_]:
        """Return which cells belong to a sequence."""
        own: npt.NDArray[np.bool_] = (self.seqs & sequence_bit(seq)) != 0
        return own

    def first(self, seq: int) -> int:
        """First position of a sequence; -1 if it has none."""
        own = self.pos[self.of(seq)]
        return int(own.min()) if len(own) else -1

    def last(self, seq: int) -> int:
        """Last position of a sequence; -1 if it has none."""
        own = self.pos[self.of(seq)]
        return int(own.max()) if len(own) else -1

    def reusable(self, window: int) -> npt.NDArray[np.bool_]:
        """Return which cells may be written: empty ones, and those that the next token of their sequence cannot see.

        A cell that several sequences share is kept.
        """
        usable = self.pos < 0
        if window:
            seqs = np.unique(self.seqs[~usable])
            for seq in (int(s).bit_length() - 1 for s in seqs if int(s).bit_count() == 1):
                usable |= (self.seqs == sequence_bit(seq)) & (self.last(seq) + 1 - self.pos >= window)
        return usable

    def overwritten(self, chosen: npt.NDArray[np.int64]) -> dict[int, int]:
        """Return the last position that each sequence has in some cells, of one sequence each."""
        lost: dict[int, int] = {}
        for i in chosen[self.pos[chosen] >= 0]:
            seq = int(self.seqs[i]).bit_length() - 1
            lost[seq] = max(lost.get(seq, -1), int(self.pos[i]))
        return lost

    def copy(self) -> Cells:
        """Return a book that may be written without this one changing."""
        other = Cells(0)
        other.n = self.n
        other.pos, other.seqs, other.head = self.pos.copy(), self.seqs.copy(), self.head
        return other
