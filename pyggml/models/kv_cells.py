"""`Cells`: the position and sequences of each cell in one stream of a KV cache."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Cells", "sequence_bit"]


#: Initial length of the arrays.
_N_FIRST = 4096
_ONE = np.uint64(1)


def sequence_bit(seq: int) -> np.uint64:
    """Return the bit of a sequence in `Cells.seqs`."""
    return np.uint64(1 << seq)


class Cells:
    """The cells of one stream. The arrays cover only the first cells, the rest is empty; `grow` extends them.

    Only methods change the arrays: what was counted is kept, and a token after the last used cell only adds to it.

    Notes
    -----
    Mirrors `llama_kv_cells`.
    """

    __slots__ = ("_last", "_n_used", "_used_end", "head", "n", "n_changes", "pos", "seqs")

    def __init__(self, n: int) -> None:
        self.n = n  #: cells of the stream
        self.pos = np.full(min(n, _N_FIRST), -1, np.int32)  #: -1: empty
        self.seqs = np.zeros(min(n, _N_FIRST), np.uint64)  #: bit s: the cell belongs to sequence s
        self.head = 0  #: where the search for cells starts
        self.n_changes = 0  #: 1 more after a token was put behind the last used cell, 2 more after any other change
        self._recount()

    def _recount(self) -> None:
        """Forget what was counted."""
        self.n_changes += 2
        self._n_used = self._used_end = -1
        self._last: dict[int, int] = {}  # by sequence

    def take(self, chosen: npt.NDArray[np.int64], pos: npt.NDArray[np.int32], seqs: npt.NDArray[np.int32]) -> None:
        """Put tokens into cells: one of each position and sequence."""
        first, end = int(chosen[0]), int(chosen[-1]) + 1
        self.grow(end if end - first == len(chosen) else int(chosen.max()) + 1)
        self.pos[chosen] = pos
        self.seqs[chosen] = _ONE << seqs.astype(np.uint64)
        if len(chosen) == 1 and first >= self._used_end >= 0 and self._n_used >= 0:
            seq, at = int(seqs[0]), int(pos[0])
            self.n_changes += 1
            self._n_used += 1
            self._used_end = end
            if seq in self._last:
                self._last[seq] = max(self._last[seq], at)
        else:
            self._recount()

    def remove(self, chosen: npt.NDArray[np.bool_], seq: int) -> None:
        """Remove a sequence from cells; those without another become empty."""
        self.seqs[chosen] &= ~sequence_bit(seq)
        freed = np.flatnonzero(chosen & (self.seqs == 0))
        if len(freed):
            self.pos[freed] = -1
            self.head = min(self.head, int(freed[0]))
        self._recount()

    def share(self, chosen: npt.NDArray[np.bool_], seq: int) -> None:
        """Add a sequence to cells."""
        self.seqs[chosen] |= sequence_bit(seq)
        self._recount()

    def grow(self, n: int) -> None:
        """Extend the arrays to at least ``n`` cells, at most those of the stream."""
        n_now, n = len(self.pos), min(n, self.n)
        if n <= n_now:
            return
        n_more = min(max(n, 2 * n_now), self.n) - n_now
        self.pos = np.concatenate([self.pos, np.full(n_more, -1, np.int32)])
        self.seqs = np.concatenate([self.seqs, np.zeros(n_more, np.uint64)])

    @property
    def n_used(self) -> int:
        """Number of used cells."""
        if self._n_used < 0:
            self._n_used = int(np.count_nonzero(self.pos >= 0))
        return self._n_used

    @property
    def used_end(self) -> int:
        """Index after the last used cell."""
        if self._used_end < 0:
            used = np.flatnonzero(self.pos >= 0)
            self._used_end = int(used[-1]) + 1 if len(used) else 0
        return self._used_end

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
        last = self._last.get(seq)
        if last is None:
            own = self.pos[self.of(seq)]
            last = self._last[seq] = int(own.max()) if len(own) else -1
        return last

    def reusable(self, window: int) -> npt.NDArray[np.bool_]:
        """Return which cells may be written: empty ones, and those of one sequence that its next token cannot see."""
        usable = self.pos < 0
        if window:
            seqs = np.unique(self.seqs[~usable])
            for seq in (int(s).bit_length() - 1 for s in seqs if int(s).bit_count() == 1):
                usable |= (self.seqs == sequence_bit(seq)) & (self.last(seq) + 1 - self.pos >= window)
        return usable

    def overwritten(self, chosen: npt.NDArray[np.int64]) -> dict[int, int]:
        """Return, by sequence, the last position in the chosen cells, each of which belongs to one sequence."""
        lost: dict[int, int] = {}
        self.grow(int(chosen.max()) + 1)
        for i in chosen[self.pos[chosen] >= 0]:
            seq = int(self.seqs[i]).bit_length() - 1
            lost[seq] = max(lost.get(seq, -1), int(self.pos[i]))
        return lost

    def copy(self) -> Cells:
        """Return an independent copy."""
        other = Cells(0)
        other.n = self.n
        other.pos, other.seqs, other.head = self.pos.copy(), self.seqs.copy(), self.head
        return other
