"""`Batch`: the tokens of one decode; `MicroBatch`: those of one graph, cut from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import GraphError

__all__ = ["Batch", "MicroBatch", "Outputs", "split_equal", "split_simple"]

Outputs = Literal["last", "all", "none"]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The tokens of one graph.

    Attributes
    ----------
    tokens, pos, seqs : int32, (n_token,)
        Id, position and sequence of each token.
    outputs : bool, (n_token,)
        Whether the logits of a token are wanted.
        idxs : int64, (n_token,)
           Indices of the tokens in the batch.
    n_seqs, n_seq_tokens : int
        Sequences and tokens of each, if cut by `split_equal`; otherwise the number of tokens, and 1.
    seqs_unq : tuple of int
        Its sequences, ascending.
    equal_seqs : bool
        Whether it was cut by `split_equal`.

    Notes
    -----
    Mirrors `llama_ubatch`. Differs: a token belongs to one sequence. Sequences share cells after `KVCache.seq_cp`.
    """

    tokens: npt.NDArray[np.int32]
    pos: npt.NDArray[np.int32]
    seqs: npt.NDArray[np.int32]
    outputs: npt.NDArray[np.bool_]
    idxs: npt.NDArray[np.int64]
    n_seqs: int
    n_seq_tokens: int
    seqs_unq: tuple[int, ...]
    equal_seqs: bool

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def n_outputs(self) -> int:
        """Number of tokens whose logits are wanted."""
        return int(np.count_nonzero(self.outputs))

    @classmethod
    def reserve(cls, n_tokens: int, n_seqs: int, n_outputs: int) -> MicroBatch:
        """Return a micro-batch for reserving memory: its ids and positions are not used.

        Notes
        -----
        Mirrors `llama_batch_allocr::ubatch_reserve` and `ubatch_prepare_reserve`.
        """
        n_seq_tokens = -(-n_tokens // n_seqs)
        n_tokens = n_seq_tokens * n_seqs
        seqs = np.repeat(np.arange(n_seqs, dtype=np.int32), n_seq_tokens)
        outputs = np.zeros(n_tokens, np.bool_)
        by_place = np.arange(n_tokens).reshape(n_seqs, n_seq_tokens).T.reshape(-1)
        outputs[by_place[:n_outputs]] = True
        zeros = np.zeros(n_tokens, np.int32)
        return cls(
            zeros,
            zeros,
            seqs,
            outputs,
            np.arange(n_tokens),
            n_seqs,
            n_seq_tokens,
            tuple(range(n_seqs)),
            equal_seqs=True,
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one decode.

    Attributes
    ----------
    tokens, pos, seqs, outputs
        As in `MicroBatch`.
    """

    tokens: npt.NDArray[np.int32]
    pos: npt.NDArray[np.int32]
    seqs: npt.NDArray[np.int32]
    outputs: npt.NDArray[np.bool_]

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @classmethod
    def of(cls, tokens: Sequence[int], pos: int, *, seq: int = 0, outputs: Outputs = "last") -> Batch:
        """Return the batch of one sequence's next tokens.

        Parameters
        ----------
        tokens : sequence of int
            Ids.
        pos : int
            Position of the first token; the others follow.
        seq : int
            Their sequence.
        outputs : str
            Which tokens' logits are wanted: ``"last"``, ``"all"`` or ``"none"``.
        """
        n = len(tokens)
        flags, seqs = np.zeros(n, np.bool_), np.empty(n, np.int32)
        first = {"all": 0, "last": max(n - 1, 0), "none": n}[outputs]
        flags[first:] = True
        seqs.fill(seq)
        try:
            ids = np.asarray(tokens, np.int64).reshape(n)
        except (OverflowError, TypeError, ValueError) as error:
            raise GraphError(f"the tokens are not ids: {error}") from error
        known = ids.tolist()  # of few tokens, lists are faster than arrays
        if n and not -(1 << 31) <= min(known) <= max(known) < 1 << 31:
            raise GraphError(f"no token has an id of {max(known) if max(known) >= 1 << 31 else min(known)}")
        return cls(
            ids.astype(np.int32),
            np.arange(pos, pos + n, dtype=np.int32),
            seqs,
            flags,
        )

    def check(self, n_vocab: int, n_seq_max: int) -> None:
        """Verify that the vocabulary has all ids and the context all sequences.

        Raises
        ------
        GraphError
            The batch is empty, or an id or a sequence is out of range.
        """
        if not self.n_tokens:
            raise GraphError("a batch without tokens cannot be decoded")
        ids, seqs = self.tokens.tolist(), self.seqs.tolist()
        if min(ids) < 0 or max(ids) >= n_vocab:
            i = int(np.flatnonzero((self.tokens < 0) | (self.tokens >= n_vocab))[0])
            raise GraphError(
                f"token {i} of the batch has the id {int(self.tokens[i])}",
                hint=f"the vocabulary has the ids 0..{n_vocab - 1}",
            )
        if min(seqs) < 0 or max(seqs) >= n_seq_max:
            i = int(np.flatnonzero((self.seqs < 0) | (self.seqs >= n_seq_max))[0])
            raise GraphError(
                f"token {i} of the batch belongs to sequence {int(self.seqs[i])}",
                hint=f"the context has {n_seq_max}: make it with a larger n_seq_max",
            )

    def cut(self, n: int) -> list[Batch]:
        """Return consecutive batches of at most ``n`` tokens."""
        if self.n_tokens <= n:
            return [self]
        parts = [slice(i, i + n) for i in range(0, self.n_tokens, n)]
        return [Batch(self.tokens[p], self.pos[p], self.seqs[p], self.outputs[p]) for p in parts]

    def take(self, idxs: npt.NDArray[np.int64], n_seqs: int, *, equal_seqs: bool) -> MicroBatch:
        """Return the micro-batch of the tokens at indices ``idxs``."""
        seqs = self.seqs[idxs]
        return MicroBatch(
            self.tokens[idxs],
            self.pos[idxs],
            seqs,
            self.outputs[idxs],
            idxs,
            n_seqs,
            len(idxs) // n_seqs,
            tuple(sorted(set(seqs.tolist()))),
            equal_seqs,
        )


def split_simple(batch: Batch, n_ubatch: int) -> list[MicroBatch]:
    """Cut a batch into consecutive micro-batches of at most ``n_ubatch`` tokens.

    Notes
    -----
    Mirrors `llama_batch_allocr::split_simple`.
    """
    idxs = np.arange(batch.n_tokens)
    return [
        MicroBatch(
            part.tokens, part.pos, part.seqs, part.outputs, idxs[i : i + part.n_tokens], part.n_tokens, 1,
            tuple(sorted(set(part.seqs.tolist()))), equal_seqs=False,
        )
        for i, part in zip(range(0, batch.n_tokens, n_ubatch), batch.cut(n_ubatch), strict=True)
    ]  # fmt: skip


def split_equal(batch: Batch, n_ubatch: int, *, is_sequential: bool = True) -> list[MicroBatch]:
    """Cut a batch into micro-batches that have the same number of tokens of each of their sequences.

    Parameters
    ----------
    is_sequential : bool
        A micro-batch takes only sequences with consecutive ids. Caches with one stream per sequence need this.

    Notes
    -----
    Mirrors `llama_batch_allocr::split_equal`: a micro-batch takes sequences in the order of the batch, and as many
    tokens of each as the shortest has left.
    """
    waiting: dict[int, list[int]] = {int(s): np.flatnonzero(batch.seqs == s).tolist() for s in np.unique(batch.seqs)}
    out: list[MicroBatch] = []
    while any(waiting.values()):
        chosen: list[int] = []
        for _, s in sorted((place, s) for s, places in waiting.items() for place in places):
            if s not in chosen and (not is_sequential or not chosen or s == chosen[-1] + 1):
                chosen.append(s)
                if len(chosen) > n_ubatch:
                    break
        n_seqs = len(chosen)
        n_each = min(min(len(waiting[s]) for s in chosen), max(1, n_ubatch // n_seqs))
        idxs: list[int] = []
        for s in chosen:
            idxs += waiting[s][:n_each]
            del waiting[s][:n_each]
        out.append(batch.take(np.asarray(idxs, np.int64), n_seqs, equal_seqs=True))
    return out
