"""`IdsSource`: the experts that a micro-batch uses, read from ids tensors as upstream reads them."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from ..errors import ExpertIdError
from ..opset import expert_sources
from ..routing import DEFAULT_ROUTING
from ..tensor import Tensor
from .experts import find_bad_id, layer_of, used_experts

if TYPE_CHECKING:
    from .compute import SplitRun

__all__ = ["IdsSource"]


class IdsSource:
    """Returns the experts that ids name: reads the whole tensor, checks it, and keeps the latest ids.

    Each compute has one; policies use it through `Transfer.ids`. A plan without data replaces it.

    Notes
    -----
    Mirrors how the used-expert copy of `ggml_backend_sched_compute_splits`, later llama.cpp's
    `llama_context::sched_copy_experts`, reads ids: once for all weights that share the tensor.
    Differs: an id out of range raises `ExpertIdError`, and nothing is computed after it; upstream aborts.
    """

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._n_expert = 0  # of the weight that the ids were read for
        self._words: array[int] = array("i")
        self._used: set[int] = set()
        self._backend_id = 0
        self._counts: dict[Tensor, int] = {}

    def begin(self) -> None:
        """Start a compute: discard all ids."""
        self._tensor = None
        self._counts.clear()

    def forget(self, roots: set[Tensor]) -> None:
        """Discard the ids if their memory was written; they are read again on the next use."""
        if self._tensor is not None and (self._tensor.view_src or self._tensor) in roots:
            self._tensor = None

    def used(self, run: SplitRun, i_split: int, ids: Tensor, backend_id: int, weight: Tensor) -> set[int]:
        """Return the experts of a weight that ids name; read them from a backend if necessary.

        Raises
        ------
        ExpertIdError
            An id is no expert of the weight.
        """
        n_expert = weight.ne[2]
        if self._tensor is not ids or (run.machine.dialect.ids_by_n_expert and self._n_expert != n_expert):
            self._tensor = None  # a read that fails leaves nothing behind
            self._read(run, i_split, ids, backend_id)
            self._tensor, self._n_expert, self._backend_id = ids, n_expert, backend_id
        if self._used and (min(self._used) < 0 or max(self._used) >= n_expert):
            raise self._error(run, weight)
        return self._used

    def rows(self, run: SplitRun, i_split: int, ids: Tensor, backend_id: int, weight: Tensor, n_used: int) -> list[int]:
        """Read contiguous ids from a backend and return them unchanged.

        Raises
        ------
        ExpertIdError
            An id is no expert of the weight.
        """
        self._tensor = None
        self._read(run, i_split, ids, backend_id)
        self._tensor, self._n_expert, self._backend_id = ids, weight.ne[2], backend_id
        if self._used and (min(self._used) < 0 or max(self._used) >= weight.ne[2]):
            raise self._error(run, weight, n_used)
        return list(self._words)

    def _read(self, run: SplitRun, i_split: int, ids: Tensor, backend_id: int) -> None:
        words = self._words = array("i", bytes(ids.nbytes))
        run.read(i_split, ids, backend_id, words.buffer_info()[0])
        ne, nb = ids.ne, ids.nb
        self._used = used_experts(words, n_used=ne[0], n_token=ne[1], strides=(nb[0] // 4, nb[1] // 4))

    def _error(self, run: SplitRun, weight: Tensor, n_used: int = 0) -> ExpertIdError:
        read = self._tensor
        assert read is not None
        ne, nb = read.ne, read.nb
        strides = (nb[0] // 4, nb[1] // 4)
        if n_used:  # ids in one row
            ne, strides = (n_used, len(self._words) // n_used, 1, 1), (1, n_used)
        bad = find_bad_id(self._words, n_used=ne[0], n_token=ne[1], strides=strides, n_expert=weight.ne[2])
        assert bad is not None
        ids = run.original_of(read)
        at = self._backend_id if ids is read else run.asg.ids[ids]
        return ExpertIdError(
            weight.name, layer_of(weight.name), ids.name, run.machine.backends[at].name, *bad, weight.ne[2],
            causes=run.causes_of(ids),
        )  # fmt: skip

    # -- what a virtual clock asks -------------------------------------------

    def note_count(self, ids: Tensor, n_used: int) -> None:
        """Record how many experts a node's ids name, for its cost."""
        self._counts[ids] = n_used

    def _known(self, ids: Tensor) -> int | None:
        """Return the recorded count of ids, or of the tensor that they show."""
        known = self._counts.get(ids)
        return self._counts.get(ids.view_src) if known is None and ids.view_src is not None else known

    def count(self, node: Tensor) -> float:
        """Return how many experts a node reads: those that were copied, or else those of the default routing."""
        weight, ids = expert_sources(node)
        known = self._known(ids)
        return DEFAULT_ROUTING.used(weight.ne[2], ids.ne[0], ids.ne[1]) if known is None else known
