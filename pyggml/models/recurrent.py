"""`RecurrentStates`: the state of each sequence in recurrent layers; `HybridCache`: with the KV cache of other layers.

A recurrent layer keeps two rows for each sequence: the last inputs of its convolution, and the state of its delta net.
Each sequence has a cell. The sequences of a micro-batch need adjacent cells, so the graph copies rows when it reads
them. A state includes all tokens so far and cannot return to an earlier one.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ..buffer import tensor_memset
from ..errors import AllocError
from ..tensor import Tensor
from ..types import Type
from .batch import Batch, MicroBatch, split_equal
from .cache_view import CacheView, StatesView
from .context import ContextParams
from .hparams import HParams
from .kv_cache import KVCache, Slot

__all__ = ["HybridCache", "RecurrentStates"]


@dataclass(slots=True)
class _Cell:
    """A cell: one row of each state tensor."""

    pos: int = -1  #: of the last token in it; -1: empty
    src: int = -1  #: the cell that holds its rows; -1: none, they start as zeros
    src0: int = -1  #: the same, for the next graph
    seqs: set[int] = field(default_factory=set)


class _Book:
    """Which cell holds the state of which sequences."""

    def __init__(self, n_cells: int) -> None:
        self.cells = [_Cell() for _ in range(n_cells)]
        self.tails: list[int | None] = [None] * n_cells  #: of each sequence, its cell
        self.head = self.n = self.n_used = 0
        self.zero = -1  #: the cell that is zeroed and copied to cells that start; -1: none

    def take(self, part: MicroBatch) -> None:
        """Take adjacent cells for the sequences of a micro-batch.

        Notes
        -----
        Mirrors `llama_memory_recurrent::find_slot`, for tokens of one sequence each.
        """
        seqs = [int(s) for s in part.seqs[:: part.n_seq_tokens]]
        last = part.pos[part.n_seq_tokens - 1 :: part.n_seq_tokens]
        if self.head > self.n_used + 2 * len(seqs):
            self.head = 0
        for seq in seqs:
            self._own_cell(seq)
        places = [self._tail(seq) for seq in seqs]
        low, high = min(places), max(places)
        for i, seq in enumerate(seqs):
            self._swap(low + i, self._tail(seq))
        for i, seq in enumerate(seqs):
            cell = self.cells[low + i]
            cell.pos, cell.seqs = int(last[i]), {seq}
            self.tails[seq] = low + i
        self._stage(low, high)

    def _tail(self, seq: int) -> int:
        tail = self.tails[seq]
        assert tail is not None
        return tail

    def _own_cell(self, seq: int) -> None:
        """Give a sequence a cell of its own, with its state."""
        tail = self.tails[seq]
        if tail is not None and len(self.cells[tail].seqs) == 1:
            return
        order = [(self.head + i) % len(self.cells) for i in range(len(self.cells))]
        free = next(i for i in order if not self.cells[i].seqs)
        if tail is not None:
            shared = self.cells[tail]
            self.cells[free].pos, self.cells[free].src = shared.pos, shared.src
            shared.seqs.discard(seq)
        self.cells[free].seqs = {seq}
        self.tails[seq] = free

    def _swap(self, a: int, b: int) -> None:
        """Swap two cells."""
        if a == b:
            return
        self.cells[a], self.cells[b] = self.cells[b], self.cells[a]
        self.tails = [b if tail == a else a if tail == b else tail for tail in self.tails]

    def _stage(self, low: int, high: int) -> None:
        """Set the cell from which the graph copies the rows of each cell from ``low`` to ``high``."""
        used = {cell.src for cell in self.cells}
        self.zero = next((i for i in range(low, high + 1) if i not in used), -1)
        for i in range(low, high + 1):
            cell = self.cells[i]
            cell.src0 = self.zero if cell.src < 0 else cell.src
            cell.src = i
        self.head, self.n = low, high - low + 1
        self.n_used = sum(bool(cell.seqs) for cell in self.cells)

    def remove(self, seq: int) -> None:
        """Forget a sequence; its cell is empty unless another sequence shares it."""
        tail, self.tails[seq] = self.tails[seq], None
        if tail is not None:
            cell = self.cells[tail]
            cell.seqs.discard(seq)
            if not cell.seqs:
                cell.pos = cell.src = -1
                self.n_used -= 1
                self.head = min(self.head, tail)

    def share(self, src: int, dst: int) -> None:
        """Let a sequence share another's state until one of them continues."""
        self.remove(dst)
        tail = self.tails[src]
        if tail is not None:
            self.cells[tail].seqs.add(dst)
            self.tails[dst] = tail

    def pos(self, seq: int) -> int:
        """Position of a sequence's last token; -1 if it has none."""
        tail = self.tails[seq]
        return -1 if tail is None else self.cells[tail].pos


class RecurrentStates:
    """The rows that recurrent layers keep of each sequence.

    Attributes
    ----------
    r, s : dict of int to Tensor
        By layer: the last inputs of its convolution, f32, [n_embd_r, n_cells], and the state of its delta net, f32,
        [n_embd_s, n_cells].
    book : _Book
        Which cell holds the state of which sequence.

    Notes
    -----
    Mirrors `llama_memory_recurrent`. Differs: no snapshots to roll back to.
    """

    def __init__(self, hparams: HParams, n_cells: int) -> None:
        self.n_cells = n_cells
        layers = sorted(hparams.recurrent_layers)
        self.r = {i: Tensor(Type.F32, (hparams.n_embd_r, n_cells), name=f"cache_r_l{i}") for i in layers}
        self.s = {i: Tensor(Type.F32, (hparams.n_embd_s, n_cells), name=f"cache_s_l{i}") for i in layers}
        self.book = _Book(n_cells)

    def tensors(self) -> list[tuple[int, Tensor]]:
        """Return the tensors with their layers, in the order in which they are allocated."""
        return [(i, own[i]) for i in self.r for own in (self.r, self.s)]

    def sources(self) -> npt.NDArray[np.int32]:
        """Return the cell from which each cell of the micro-batch is copied: int32, (n_cell,)."""
        book = self.book
        return np.array([cell.src0 for cell in book.cells[book.head : book.head + book.n]], np.int32)

    def view(self) -> StatesView:
        """Return the cells that the graph of the last micro-batch reads and writes."""
        return StatesView(self.r, self.s, self.book.n, self.book.head, self.book.zero)

    def full_view(self) -> StatesView:
        """Return a view of all cells, for reserving memory."""
        return StatesView(self.r, self.s, self.n_cells, 0, 0)

    def lost(self, seqs: tuple[int, ...]) -> set[int]:
        """Return the sequences whose states a failed micro-batch may have changed: its own, and those that it moved."""
        book = self.book
        moved = (i for i in range(book.head, book.head + book.n) if book.cells[i].src0 != i)
        return set(seqs).union(*(book.cells[i].seqs for i in moved))

    def wipe(self, seq: int) -> None:
        """Zero the rows of a sequence, because a NaN would remain when multiplied by 0."""
        tail = self.book.tails[seq]
        for _, tensor in self.tensors():
            if tail is not None and tensor.buffer is not None:
                tensor_memset(tensor, 0, tail * tensor.nb[1], tensor.nb[1])


class HybridCache(KVCache):
    """The KV cache of layers with attention, with the states of recurrent layers.

    A sequence can only continue after its last token, or start again: see `reaches_back_to`.

    Notes
    -----
    Mirrors `llama_memory_hybrid`.
    """

    states: RecurrentStates

    def __init__(self, hparams: HParams, params: ContextParams, *, v_trans: bool) -> None:
        layers = (i for i in range(hparams.n_layer) if i not in hparams.recurrent_layers)
        super().__init__(hparams, params, v_trans=v_trans, layers=layers)
        self.states = RecurrentStates(hparams, params.n_seq_max)

    def tensors(self) -> list[tuple[int, Tensor]]:
        """Return the tensors of both, with their layers."""
        return super().tensors() + self.states.tensors()

    # -- sequences -----------------------------------------------------------

    def clear(self) -> None:
        """Forget all tokens; states start as zeros again."""
        super().clear()
        self.states.book = _Book(self.states.n_cells)

    def seq_rm(self, seq: int, p0: int = 0, p1: int | None = None) -> None:
        """Forget a whole sequence; a range without any of its tokens does nothing.

        Raises
        ------
        AllocError
            The range has some of its tokens but not all, and the state includes all. Nothing was forgotten.
        """
        last = self.states.book.pos(seq)
        end = last + 1 if p1 is None else p1
        if p0 <= last and end > 0:
            if p0 > 0 or end <= last:
                raise AllocError(
                    f"sequence {seq} cannot forget some of its {last + 1} tokens: a recurrent state stands for all of them",
                    hint="forget all of the sequence and decode it again",
                )
            self.states.book.remove(seq)
        super().seq_rm(seq, p0, p1)

    def seq_cp(self, src: int, dst: int, p0: int = 0, p1: int | None = None) -> None:
        """Let a sequence share all tokens of another; each has its own state once it continues.

        Raises
        ------
        AllocError
            The sequences are in different streams, or the range does not have all tokens of ``src``.
        """
        last = self.states.book.pos(src)
        if last >= 0 and (p0 > 0 or (p1 is not None and p1 <= last)):
            raise AllocError(
                f"sequence {dst} cannot share some of the {last + 1} tokens of {src}: a recurrent state stands for all",
                hint="share all of the sequence",
            )
        super().seq_cp(src, dst, p0, p1)
        if src != dst:
            self.states.book.share(src, dst)

    def seq_pos_max(self, seq: int) -> int:
        """Last position of a sequence; -1 if it has none."""
        return min(super().seq_pos_max(seq), self.states.book.pos(seq)) if self.k else self.states.book.pos(seq)

    def reaches_back_to(self, seq: int) -> int:
        """Return the first position from which a sequence can continue: the one after its last token."""
        return self.states.book.pos(seq) + 1

    def forget(self, part: MicroBatch) -> None:
        """Forget the whole sequences of a failed micro-batch: their states may be half updated."""
        for seq in self.states.lost(part.seqs_unq):
            self.states.wipe(seq)
            self.seq_rm(seq)

    # -- cells for a batch ---------------------------------------------------

    def prepare(self, batch: Batch, n_ubatch: int) -> list[tuple[MicroBatch, Slot]]:
        """Cut a batch with `split_equal` and find cells for all micro-batches; none is taken yet.

        Notes
        -----
        Mirrors `llama_memory_hybrid::init_batch`. States always fit: each sequence has a cell.
        """
        parts = split_equal(batch, n_ubatch, is_sequential=self.n_stream > 1)
        return list(zip(parts, self.find_slots(parts), strict=True))

    def find_slots(self, parts: list[MicroBatch]) -> list[Slot]:
        """Return cells for all given micro-batches; none is taken yet."""
        kept = self.states.book
        self.states.book = copy.deepcopy(kept)
        try:
            return super().find_slots(parts)
        finally:
            self.states.book = kept

    def next_cell(self) -> int | None:
        """Return None: a token takes more than one cell."""
        return None

    def apply(self, part: MicroBatch, slot: Slot) -> None:
        """Take the cells of a micro-batch."""
        super().apply(part, slot)
        self.states.book.take(part)

    def view(self, slot: Slot) -> CacheView:
        """Return the parts of KV cache and states that a micro-batch's graph reads; call it after `apply`."""
        return replace(super().view(slot), states=self.states.view())

    def full_view(self) -> CacheView:
        """Return a view of the whole KV cache and all states, for reserving memory."""
        return replace(super().full_view(), states=self.states.full_view())
