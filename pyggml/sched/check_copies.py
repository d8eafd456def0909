"""Copies of split inputs, verified before each launch when ``PYGGML_CHECK`` is set.

It verifies two properties from the graph, the ids and the memory, without the functions that policies use:

- *Copies cover what is read.* `CopyCheck` receives each range that is sent, and knows what the nodes of a split read.
  Of a weight from which a node chooses experts, these are the experts that the ids name now, with the padding that kernels may
  read; of other inputs every byte. Bytes that a node wrote in the source after the copy are not covered.
- *Results equal those of a full copy.* The bytes to be copied are compared with the source. With ``PYGGML_CHECK=2`` a
  split with partly copied experts is computed again with full copies, and each result is compared bit for bit.

Memory is read with `Buffer.peek`, which devices do not count: traces, counts, faults and virtual time are the same with
and without the check. Memory without `peek` (a plan without data, a late or remote device) is not compared. Its ids are
unknown, so only inputs that are read whole must be covered.

A scheduler with ``strict=True`` is not checked: like upstream, it ignores later readers of a copy and rewritten ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import config
from ..errors import SchedError
from ..opset import ids_of
from ..record import Observer
from ..tensor import Tensor
from ..types import BufferUsage
from .check_results import Rerun
from .experts import EXPERT_PAD_BYTES, layer_of
from .ranges import Ranges
from .state import is_computed

if TYPE_CHECKING:
    from .compute import SplitRun
    from .plan import Plan
    from .transfer import Transfer

__all__ = ["CopyCheck"]


@dataclass(frozen=True, slots=True)
class _Read:
    """A read of an input copy by a node."""

    node: Tensor
    source: Tensor
    copy: Tensor
    #: the ids of the experts that are read; None: every byte is read
    ids: Tensor | None


class CopyCheck(Observer):
    """Follows the copies of an allocated graph, and verifies them before each launch.

    Parameters
    ----------
    plan : Plan
        Of the graph.
    """

    def __init__(self, plan: Plan) -> None:
        self._asg = plan.assignment
        self._copies: dict[tuple[Tensor, int], Tensor] = {}  # source and backend -> copy
        for source, by_backend in plan.copies.items():
            for backend_id, made in by_backend.items():
                if made[plan.cur_copy] is not source:
                    self._copies[source, backend_id] = made[plan.cur_copy]
        self._reads: list[list[_Read]] = []
        self._writes: list[list[tuple[Tensor, Tensor]]] = []  # by split: node, and copy whose source it writes
        self._find_users(plan)
        self._present: dict[Tensor, Ranges] = {}
        self._fresh: set[Tensor] = set()  # copies made since the last launch
        self._stale: dict[Tensor, tuple[Tensor, int]] = {}  # copy -> the node that wrote to its source, and its split
        self._rerun: Rerun | None = None

    def _find_users(self, plan: Plan) -> None:
        sources = {copy: source for (source, _), copy in self._copies.items()}
        by_root: dict[Tensor, list[Tensor]] = {}
        for copy, source in sources.items():
            by_root.setdefault(source.view_src or source, []).append(copy)
        for split in plan.splits:
            reads: dict[tuple[Tensor, Tensor | None], _Read] = {}
            writes: list[tuple[Tensor, Tensor]] = []
            written: set[Tensor] = set()
            for node in split.graph.nodes:
                if not is_computed(node) or node.is_empty:
                    continue
                for j, src in enumerate(node.src):
                    if src is not None and src in sources:
                        ids = ids_of(node, j)
                        if ids is not None and (ids.view_src or ids) in written:
                            ids = None  # unknown before the launch
                        reads.setdefault((src, ids), _Read(node, sources[src], src, ids))
                root = node.view_src or node
                written.add(root)
                writes += [(node, c) for c in by_root.get(root, ()) if _overlap(node, sources[c])]
            self._reads.append(list(reads.values()))
            self._writes.append(writes)

    # -- what happens --------------------------------------------------------

    def on_begin(self, run: SplitRun) -> None:
        """Forget all copies, because a compute starts."""
        self._present.clear()
        self._fresh.clear()
        self._stale.clear()

    def on_sent(self, transfer: Transfer, offset: int, size: int) -> None:
        """Record that bytes of a split's input were copied to its backend."""
        copy = transfer.copy
        if copy in self._stale:
            del self._stale[copy]
            del self._present[copy]
        self._present.setdefault(copy, Ranges()).add(offset, offset + size)
        self._fresh.add(copy)

    def before_launch(self, run: SplitRun, i_split: int) -> None:
        """Verify the copies that the nodes of a split read.

        Raises
        ------
        SchedError
            Bytes were not copied, or differ from the source. The text names node, input, layer and backend, and the
            missing experts.
        """
        is_partial = False
        for read in self._reads[i_split]:
            experts = self._experts(read)
            if read.copy in self._stale:
                writer, i_writer = self._stale[read.copy]
                raise self._error(run, i_split, read, f"is older than what '{writer.name}' wrote in split {i_writer}")
            self._verify_cover(run, i_split, read, experts)
            if read.copy in self._fresh or _is_weight(read.source):
                self._verify_bytes(run, i_split, read, experts)
            is_partial |= experts is not None
        if config.check() > 1 and is_partial and run.eval_callback is None:
            copies = {r.copy: r.source for r in self._reads[i_split] if r.ids is not None and _is_weight(r.source)}
            self._rerun = Rerun.prepare(run.plan.splits[i_split].graph, copies)

    def after_launch(self, run: SplitRun, i_split: int) -> None:
        """Compare results with those of full copies if requested, and record what the split wrote.

        Raises
        ------
        SchedError
            A result differs from that with full copies.
        """
        rerun, self._rerun = self._rerun, None
        if rerun is not None:
            backend = run.machine.backends[run.plan.splits[i_split].backend_id]
            node = rerun.first_difference(backend)
            if node is not None:
                read = next(r for r in self._reads[i_split] if r.ids is not None)
                raise self._error(
                    run, i_split, read, f"is partial, and if it were whole '{node.name}' would be another"
                )
        self._fresh.clear()
        for node, copy in self._writes[i_split]:
            if copy in self._present:
                self._stale[copy] = node, i_split

    # -- what must hold ------------------------------------------------------

    def _experts(self, read: _Read) -> list[int] | None:
        """Return the experts that a node reads by its current ids; None: all bytes, or unknown."""
        ids = read.ids
        if ids is None or ids.storage is None:
            return None
        if ids.is_empty:
            return []
        seen = ids.storage.peek(ids, 0, ids.nbytes)
        if seen is None:
            return None
        import numpy as np

        rows = np.ndarray((ids.ne[1], ids.ne[0]), np.int32, seen, strides=(ids.nb[1], ids.nb[0]))
        # the run or the backend refuses ids out of range
        return [int(e) for e in np.unique(rows) if 0 <= e < read.source.ne[2]]

    def _verify_cover(self, run: SplitRun, i_split: int, read: _Read, experts: list[int] | None) -> None:
        if experts is None and read.ids is not None:
            return  # the ids cannot be seen
        present = self._present.get(read.copy) or Ranges()
        if experts is None:
            hole = present.first_hole(0, read.source.nbytes)
            if hole is not None:
                raise self._error(run, i_split, read, f"lacks bytes {hole:,}..{read.source.nbytes - 1:,}")
            return
        padded: list[int] = []
        lacking: list[int] = []
        for expert, start, end in _bytes_of(read.source, experts):
            hole = present.first_hole(start, end)
            if hole is not None:
                (lacking if hole < start + _expert_bytes(read.source) else padded).append(expert)
        if lacking:
            raise self._error(run, i_split, read, f"lacks {_experts_text(lacking)}")
        if padded:
            raise self._error(run, i_split, read, f"lacks the padding after {_experts_text(padded)}")

    def _verify_bytes(self, run: SplitRun, i_split: int, read: _Read, experts: list[int] | None) -> None:
        """Compare the bytes to be copied with the source, if both can be read."""
        import numpy as np

        source, copy = read.source, read.copy
        if (experts is None and read.ids is not None) or source.storage is None or copy.storage is None:
            return
        if experts is None:
            wanted: Iterable[tuple[int, int, int]] = [(-1, 0, source.nbytes)]
        else:
            wanted = _bytes_of(source, experts)
        wrong: list[int] = []
        for expert, start, end in wanted:
            theirs, ours = source.storage.peek(source, start, end - start), copy.storage.peek(copy, start, end - start)
            if theirs is None or ours is None:
                return
            if not np.array_equal(np.frombuffer(theirs, np.uint8), np.frombuffer(ours, np.uint8)):
                wrong.append(expert)
        if wrong:
            where = "" if experts is None else f" in {_experts_text(wrong)}"
            raise self._error(run, i_split, read, f"is not as the source{where}")

    def _error(self, run: SplitRun, i_split: int, read: _Read, what: str) -> SchedError:
        where = run.machine.backends[run.plan.splits[i_split].backend_id].name
        layer = layer_of(read.source.name)
        name = f"'{read.source.name}'" + ("" if layer is None else f" (layer {layer})")
        by = "" if read.ids is None else f" by '{read.ids.name}'"
        cause = self._asg.cause(read.node)
        return SchedError(
            f"check: {read.node.op_desc} '{read.node.name}' in split {i_split} on {where} reads {name}{by}, but its copy {what}",
            causes=() if cause is None else (cause.value,),
            hint=f"the copy policy ({type(run.policy).__name__}) sent too little, or a wait is missing",
        )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors with the same memory owner overlap."""
    return a.view_offs < b.view_offs + b.nbytes and b.view_offs < a.view_offs + a.nbytes


def _is_weight(tensor: Tensor) -> bool:
    return tensor.storage is not None and tensor.storage.usage is BufferUsage.WEIGHTS


def _expert_bytes(weight: Tensor) -> int:
    """Return the bytes of one expert; in a strided view less than the distance to the next."""
    return weight.nbytes - (weight.ne[2] - 1) * weight.nb[2]


def _bytes_of(weight: Tensor, experts: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """Yield each expert with the range of bytes that must be copied, including padding."""
    size = _expert_bytes(weight)
    for expert in experts:
        start = expert * weight.nb[2]
        is_last = expert == weight.ne[2] - 1
        yield expert, start, min(start + size + (0 if is_last else min(size, EXPERT_PAD_BYTES)), weight.nbytes)


def _experts_text(experts: list[int]) -> str:
    return f"expert{'s' if len(experts) > 1 else ''} {', '.join(map(str, experts))}"
