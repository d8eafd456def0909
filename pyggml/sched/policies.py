"""What a user may replace: which ops are offloaded, and how the inputs of a split are copied.

An offload rule is a function ``(backend, tensor) -> bool``. An input copier is an object with the methods of
`InputCopier`; three come with pyggml: `FullCopier`, upstream's `UpstreamCopier`, and the default `UsedExpertCopier`,
which mends what upstream gets wrong.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from ..dialect import Repairs
from ..errors import ExpertIdError, SchedError
from ..tensor import Tensor
from ..types import BufferUsage, Op
from .experts import expert_copy_ranges, find_bad_id, layer_of, used_experts

if TYPE_CHECKING:
    from ..backend import Backend
    from .compute import SplitRun
    from .split import Cutter
    from .state import Split

__all__ = ["FullCopier", "InputCopier", "UpstreamCopier", "UsedExpertCopier", "default_offload"]


def default_offload(backend: Backend, op: Tensor) -> bool:
    """Offload what the device asks for."""
    return backend.offload_op(op)


class InputCopier(Protocol):
    """Copies what it knows better than a whole copy.

    Upstream has such a hook since 0.27 (`ggml_backend_sched_set_copy_callback`).
    """

    def prepare(self, cutter: Cutter) -> None:
        """Look at the splits of a graph that was just allocated."""

    def begin(self) -> None:
        """Start anew: nothing that was copied before is on the devices any more."""

    def copy_input(self, run: SplitRun, i_split: int, i_input: int) -> bool:
        """Copy one input to the split's backend, which was waited for; False to have it copied whole."""

    def before_compute(self, run: SplitRun, i_split: int) -> None:
        """Do what is left to do before a split is computed, all its inputs copied."""

    def after_compute(self, run: SplitRun, i_split: int) -> None:
        """Take note that a split was given to its backend."""


class FullCopier:
    """Copies every input whole: what upstream did before the used-expert copy."""

    def prepare(self, cutter: Cutter) -> None:
        """Do nothing."""

    def begin(self) -> None:
        """Do nothing."""

    def copy_input(self, run: SplitRun, i_split: int, i_input: int) -> bool:
        """Leave it to the scheduler."""
        return False

    def before_compute(self, run: SplitRun, i_split: int) -> None:
        """Do nothing."""

    def after_compute(self, run: SplitRun, i_split: int) -> None:
        """Do nothing."""


def takes_used_experts(split: Split, tensor: Tensor, copy: Tensor) -> bool:
    """Whether an input of a split is an expert weight in host memory that the split's first node multiplies with.

    Notes
    -----
    Mirrors the condition in `ggml_backend_sched_compute_splits`: only the first node is looked at.
    """
    buffer = tensor.buffer
    if buffer is None or buffer.usage is not BufferUsage.WEIGHTS or not buffer.is_host or not len(split.graph):
        return False
    node = split.graph.graph.nodes[split.graph.i_start]
    return node.op is Op.MUL_MAT_ID and node.src[0] is copy


class _IdsRead:
    """Ids that were read from a device."""

    __slots__ = ("backend", "tensor", "used", "words")

    def __init__(self, run: SplitRun, i_split: int, tensor: Tensor, backend_id: int) -> None:
        self.tensor = tensor
        self.backend = backend = run.machine.backends[backend_id]
        self.words = array("i", bytes(tensor.nbytes))
        start_s = run.log.now()
        backend.get_tensor_async(tensor, self.words.buffer_info()[0], 0, tensor.nbytes)
        backend.synchronize()
        run.log.was_read(i_split, tensor, backend_id, start_s)
        ne, nb = tensor.ne, tensor.nb
        self.used = used_experts(self.words, n_used=ne[0], n_token=ne[1], strides=(nb[0] // 4, nb[1] // 4))

    def check(self, weight: Tensor, n_expert: int, causes: tuple[str, ...]) -> None:
        """Raise `ExpertIdError` for the first id that is no expert of a weight."""
        if not self.used or (min(self.used) >= 0 and max(self.used) < n_expert):
            return
        ne, nb = self.tensor.ne, self.tensor.nb
        strides = (nb[0] // 4, nb[1] // 4)
        bad = find_bad_id(self.words, n_used=ne[0], n_token=ne[1], strides=strides, n_expert=n_expert)
        assert bad is not None
        raise ExpertIdError(
            weight.name, layer_of(weight.name), self.tensor.name, self.backend.name, *bad, n_expert, causes=causes
        )


class UpstreamCopier(FullCopier):
    """Copies only the used experts of a host weight, as upstream does and nothing more.

    The ids are read once for all weights that share their tensor.

    Notes
    -----
    Mirrors the used-expert path of `ggml_backend_sched_compute_splits`.
    Differs: an id that is no expert raises `ExpertIdError` and nothing is computed after it; upstream aborts.
    """

    def __init__(self) -> None:
        self._ids: _IdsRead | None = None

    def begin(self) -> None:
        """Forget the ids that were read."""
        self._ids = None

    def copy_input(self, run: SplitRun, i_split: int, i_input: int) -> bool:
        """Copy the used experts, if the input is an expert weight of the split's first node."""
        split = run.splits[i_split]
        weight = split.inputs[i_input]
        copy = run.copy_of(weight, split.backend_id)
        if not takes_used_experts(split, weight, copy):
            return False
        run.synchronize(i_split, run.asg.ids[weight])
        ids = split.graph.graph.nodes[split.graph.i_start].src[2]
        assert ids is not None
        if ids.is_empty and run.machine.dialect.skip_empty_ids:
            self._copied(copy, set())
            return True
        there = split.backend_id
        original = ids
        for later in split.inputs[i_input + 1 :]:
            if run.copy_of(later, split.backend_id) is ids:  # not copied yet: the original is what will be there
                original, there = later, run.asg.ids[later]
                break
        used = self._used(run, i_split, original, there, weight)
        run.log.experts(i_split, weight, original, used, is_added=False)
        run.log.used[ids] = len(used)
        self._send(run, i_split, weight, copy, used)
        self._copied(copy, used)
        return True

    def _used(self, run: SplitRun, i_split: int, ids: Tensor, backend_id: int, weight: Tensor) -> set[int]:
        """Return the experts that ids name, as read before or read now."""
        if self._ids is None or self._ids.tensor is not ids:
            self._ids = None  # a read that fails leaves nothing behind
            self._ids = _IdsRead(run, i_split, ids, backend_id)
        self._ids.check(weight, weight.ne[2], run.causes_of(ids))
        return self._ids.used

    def _copied(self, copy: Tensor, used: set[int]) -> None:
        """Take note of what is on the device; upstream does not."""

    @staticmethod
    def _send(run: SplitRun, i_split: int, weight: Tensor, copy: Tensor, experts: set[int]) -> None:
        """Copy experts in stream order, one call for each run of neighbours."""
        src, dst = run.asg.ids[weight], run.splits[i_split].backend_id
        backend = run.machine.backends[dst]
        assert weight.data is not None
        for r in expert_copy_ranges(experts, weight.ne[2], weight.nb[2], tensor_bytes=weight.nbytes):
            start_s = run.log.now()
            backend.set_tensor_async(copy, weight.data + r.offset_bytes, r.offset_bytes, r.size_bytes)
            run.log.copied(
                i_split, weight, src, dst, "experts", start_s,
                offset=r.offset_bytes, size=r.size_bytes, is_async=True,
            )  # fmt: skip


class _LaterUse:
    """A node that reads the copy of an expert weight which an earlier split had copied in part."""

    __slots__ = ("copy", "ids", "weight")

    def __init__(self, weight: Tensor, copy: Tensor, ids: Tensor | None) -> None:
        self.weight = weight
        self.copy = copy
        self.ids = ids  #: None: all experts are needed


class UsedExpertCopier(UpstreamCopier):
    """The default: copies the used experts, and keeps account of what is on the device.

    Parameters
    ----------
    repairs : Repairs
        `shared_experts`: a later user of the same copy gets the experts that it lacks.
        `stale_ids`: ids that were rewritten since they were read are read again.
    """

    def __init__(self, repairs: Repairs | None = None) -> None:
        super().__init__()
        self.repairs = Repairs() if repairs is None else repairs
        self._on_device: dict[Tensor, set[int]] = {}
        self._later: dict[int, list[_LaterUse]] = {}  # by split
        self._writes: dict[int, set[Tensor]] = {}  # by split: ids memory that its nodes write

    def prepare(self, cutter: Cutter) -> None:
        """Find the later users of expert copies, and the splits that write ids."""
        self._later, self._writes = {}, {}
        firsts: dict[Tensor, int] = {}  # copy of an expert weight -> the split that lists it
        for i, split in enumerate(cutter.splits):
            for weight in split.inputs:
                copy = cutter.copies[weight][split.backend_id][cutter.cur_copy]
                if takes_used_experts(split, weight, copy):
                    firsts[copy] = i
        if not firsts:
            return
        users = [(node, j, src) for node, j, src in cutter.rewritten if node.src[j] in firsts]
        ids_roots = {_root(node.src[2]) for node, _, _ in users if node.op is Op.MUL_MAT_ID and node.src[2] is not None}
        # ids that are copies change when their source is written, too (`Repairs.stale_copies`)
        copied_from: dict[Tensor, list[Tensor]] = {}
        for source, by_backend in cutter.copies.items():
            for made in by_backend.values():
                copy = made[cutter.cur_copy]
                if copy in ids_roots and copy is not source:
                    copied_from.setdefault(_root(source), []).append(copy)
        watched = ids_roots | copied_from.keys()
        starts = [split.i_start for split in cutter.splits]
        nodes = cutter.splits[0].graph.graph.nodes
        for i_node in [i for i, n in enumerate(nodes) if (n.view_src or n) in watched]:
            root = nodes[i_node].view_src or nodes[i_node]
            if not nodes[i_node].op.is_empty:
                written = self._writes.setdefault(bisect_right(starts, i_node) - 1, set())
                written.update((root, *copied_from.get(root, ())))
        if len(users) > len(firsts):  # else nobody shares a copy
            self._find_later(cutter, users, firsts)

    def _find_later(
        self, cutter: Cutter, users: Sequence[tuple[Tensor, int, Tensor]], firsts: Mapping[Tensor, int]
    ) -> None:
        """Find the users of expert copies other than those that they were made for, and what they go by."""
        for i, split in enumerate(cutter.splits):
            nodes = split.graph.nodes
            inside = set(nodes)
            for node, j, weight in users:
                shared = node.src[j]
                if node not in inside or shared is None or (firsts[shared] == i and node is nodes[0]):
                    continue
                ids = node.src[2] if node.op is Op.MUL_MAT_ID and j == 0 else None
                known = ids is not None and _root(ids) not in self._writes.get(i, ())
                self._later.setdefault(i, []).append(_LaterUse(weight, shared, ids if known else None))

    def begin(self) -> None:
        """Forget ids and what is on the devices."""
        super().begin()
        self._on_device.clear()

    def _copied(self, copy: Tensor, used: set[int]) -> None:
        self._on_device[copy] = set(used)

    def before_compute(self, run: SplitRun, i_split: int) -> None:
        """Add the experts that a later user of a copy needs and that are not on the device."""
        if not self.repairs.shared_experts:
            return
        for use in self._later.get(i_split, ()):
            present = self._on_device.get(use.copy)
            if present is None:
                continue
            if use.ids is None:
                needed = set(range(use.weight.ne[2]))
            elif use.ids.is_empty:
                continue
            else:
                needed = self._used(run, i_split, use.ids, run.splits[i_split].backend_id, use.weight)
            missing = needed - present
            if missing:
                present |= missing
                run.log.experts(i_split, use.weight, use.ids, missing, is_added=True)
                self._send(run, i_split, use.weight, use.copy, missing)

    def after_compute(self, run: SplitRun, i_split: int) -> None:
        """Forget ids whose memory the split wrote."""
        if (
            self.repairs.stale_ids
            and self._ids is not None
            and _root(self._ids.tensor) in self._writes.get(i_split, ())
        ):
            self._ids = None


def _root(tensor: Tensor | None) -> Tensor:
    """Return the tensor that owns the memory."""
    if tensor is None:
        raise SchedError("MUL_MAT_ID without ids")
    return tensor if tensor.view_src is None else tensor.view_src
