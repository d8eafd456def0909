"""What a user may replace: which ops are offloaded, and how the inputs of a split are copied.

An offload rule is a function ``(backend, tensor) -> bool``. An input copier is an object with the methods of
`InputCopier`; four come with pyggml: `FullCopier`, upstream's `UpstreamCopier`, the default `UsedExpertCopier`, which
mends what upstream gets wrong, and `CallbackCopier`, which asks a function with the arguments of ggml's copy callback.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..backend import Backend
from ..dialect import Dialect, Repairs
from ..errors import ExpertIdError, SchedError
from ..graph import GraphView
from ..tensor import Tensor
from ..types import BufferUsage, Op
from .experts import expert_copy_ranges, find_bad_id, layer_of, used_experts

if TYPE_CHECKING:
    from .compute import SplitRun
    from .split import Cutter
    from .state import Split

__all__ = [
    "CallbackCopier", "CopyCallback", "FullCopier", "InputCopier", "UpstreamCopier", "UsedExpertCopier",
    "default_offload", "is_host_weight", "plain_copier",
]  # fmt: skip

#: Called with the split's backend, a weight in host memory, its copy there and the split's graph, once the backend was
#: waited for. True: it has copied; False: the weight is copied whole.
CopyCallback = Callable[[Backend, Tensor, Tensor, GraphView], bool]


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


def is_host_weight(tensor: Tensor) -> bool:
    """Whether a tensor is a weight in host memory: what ggml's copy callback is asked about.

    Notes
    -----
    Mirrors `ggml_backend_sched_is_host_weight`.
    """
    buffer = tensor.buffer
    return buffer is not None and buffer.usage is BufferUsage.WEIGHTS and buffer.is_host


def plain_copier(dialect: Dialect) -> InputCopier:
    """Return what a program gets that sets no callback: from 0.27 on every expert is copied (`Dialect.expert_copy`)."""
    return UpstreamCopier() if dialect.expert_copy == "scheduler" else FullCopier()


class _Reporting:
    """A backend as a copy callback sees it: what is written to the weight's copy, and waits, are taken note of."""

    def __init__(self, run: SplitRun, i_split: int, weight: Tensor, copy: Tensor) -> None:
        self._run, self._i_split, self._weight, self._copy = run, i_split, weight, copy
        self._id = run.splits[i_split].backend_id
        self._backend = run.machine.backends[self._id]

    def __getattr__(self, name: str) -> Any:  # whatever the backend has
        return getattr(self._backend, name)

    def set_tensor_async(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Write bytes, in stream order."""
        start_s = self._run.log.now()
        self._backend.set_tensor_async(tensor, address, offset, size)
        if tensor is self._copy:
            self._run.log.copied(
                self._i_split, self._weight, self._run.asg.ids[self._weight], self._id, "experts", start_s,
                offset=offset, size=size, is_async=True,
            )  # fmt: skip

    def synchronize(self) -> None:
        """Wait for all work."""
        self._run.synchronize(self._i_split, self._id)


class CallbackCopier(FullCopier):
    """Asks a function about each weight in host memory, as ggml 0.27 asks its copy callback; all else is copied whole.

    Parameters
    ----------
    callback : callable
        See `CopyCallback`. Its backend is the split's; bytes that it writes to the copy are counted and recorded.

    Notes
    -----
    Mirrors `ggml_backend_sched_set_copy_callback`. Differs: it is asked in every dialect.
    """

    def __init__(self, callback: CopyCallback) -> None:
        self.callback = callback

    def copy_input(self, run: SplitRun, i_split: int, i_input: int) -> bool:
        """Ask the callback, if the input is a weight in host memory."""
        split = run.splits[i_split]
        weight = split.inputs[i_input]
        if not is_host_weight(weight):
            return False
        copy = run.copy_of(weight, split.backend_id)
        backend: Any = _Reporting(run, i_split, weight, copy)  # a Backend in all that it is asked for
        return bool(self.callback(backend, weight, copy, split.graph))


def takes_used_experts(split: Split, tensor: Tensor, copy: Tensor) -> bool:
    """Whether an input of a split is an expert weight in host memory that the split's first node multiplies with.

    Notes
    -----
    Mirrors the condition in `ggml_backend_sched_compute_splits`, since 0.27 in llama.cpp's
    `llama_context::sched_copy_experts`: only the first node is looked at.
    """
    if not is_host_weight(tensor) or not len(split.graph):
        return False
    node = split.graph.graph.nodes[split.graph.i_start]
    return node.op is Op.MUL_MAT_ID and node.src[0] is copy


class _IdsRead:
    """Ids that were read from a device."""

    __slots__ = ("backend", "n_expert", "tensor", "used", "words")

    def __init__(self, run: SplitRun, i_split: int, tensor: Tensor, backend_id: int, n_expert: int) -> None:
        self.tensor = tensor
        self.n_expert = n_expert  #: of the weight that they were read for
        self.backend = backend = run.machine.backends[backend_id]
        self.words = array("i", bytes(tensor.nbytes))
        start_s = run.log.now()
        backend.get_tensor_async(tensor, self.words.buffer_info()[0], 0, tensor.nbytes)
        backend.synchronize()
        run.log.was_read(i_split, tensor, backend_id, start_s)
        ne, nb = tensor.ne, tensor.nb
        self.used = used_experts(self.words, n_used=ne[0], n_token=ne[1], strides=(nb[0] // 4, nb[1] // 4))

    def check(self, run: SplitRun, weight: Tensor) -> None:
        """Raise `ExpertIdError` for the first id that is no expert of a weight."""
        n_expert = weight.ne[2]
        if not self.used or (min(self.used) >= 0 and max(self.used) < n_expert):
            return
        ne, nb = self.tensor.ne, self.tensor.nb
        strides = (nb[0] // 4, nb[1] // 4)
        bad = find_bad_id(self.words, n_used=ne[0], n_token=ne[1], strides=strides, n_expert=n_expert)
        assert bad is not None
        ids = run.original_of(self.tensor)
        where = self.backend.name if ids is self.tensor else run.machine.backends[run.asg.ids[ids]].name
        raise ExpertIdError(
            weight.name, layer_of(weight.name), ids.name, where, *bad, n_expert, causes=run.causes_of(ids)
        )


class UpstreamCopier(FullCopier):
    """Copies only the used experts of a host weight, as upstream does and nothing more.

    The ids are read once for all weights that share their tensor.

    Notes
    -----
    Mirrors the used-expert path of `ggml_backend_sched_compute_splits`, which became llama.cpp's copy callback
    `llama_context::sched_copy_experts` with ggml 0.27.
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
        if run.machine.dialect.wait_weight_backend or self._is_written(weight):
            run.synchronize(i_split, run.asg.ids[weight])
        ids = split.graph.graph.nodes[split.graph.i_start].src[2]
        assert ids is not None
        if ids.is_empty and run.machine.dialect.skip_empty_ids:
            self._copied(copy, set())
            return True
        there = split.backend_id
        original = ids
        if self._reads_original(run.machine.dialect):
            for later in run.not_yet_copied(split, i_input):
                if run.copy_of(later, split.backend_id) is ids:  # the original is what will be there
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
        n_expert = weight.ne[2]
        read = self._ids
        if (
            read is None
            or read.tensor is not ids
            or (run.machine.dialect.ids_by_n_expert and read.n_expert != n_expert)
        ):
            self._ids = None  # a read that fails leaves nothing behind
            self._ids = read = _IdsRead(run, i_split, ids, backend_id, n_expert)
        read.check(run, weight)
        return read.used

    def _reads_original(self, dialect: Dialect) -> bool:
        """Whether ids whose copy is not made yet are read from what will be copied."""
        return dialect.ids_from == "original"

    def _is_written(self, weight: Tensor) -> bool:
        """Whether a weight must be waited for where the dialect would not; upstream does not look."""
        return False

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
        `host_weight_ids`, `written_weights`: see there.
    """

    def __init__(self, repairs: Repairs | None = None) -> None:
        super().__init__()
        self.repairs = Repairs() if repairs is None else repairs
        self._on_device: dict[Tensor, set[int]] = {}
        self._later: dict[int, list[_LaterUse]] = {}  # by split
        self._writes: dict[int, set[Tensor]] = {}  # by split: ids memory that its nodes write
        self._written: set[Tensor] = set()  # expert weights that nodes of the graph write

    def prepare(self, cutter: Cutter) -> None:
        """Find the later users of expert copies, and the splits that write ids."""
        self._later, self._writes, self._written = {}, {}, set()
        firsts: dict[Tensor, int] = {}  # copy of an expert weight -> the split that lists it
        for i, split in enumerate(cutter.splits):
            for weight in split.inputs:
                copy = cutter.copies[weight][split.backend_id][cutter.cur_copy]
                if takes_used_experts(split, weight, copy):
                    firsts[copy] = i
                    self._written.add(weight)
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
        changed = {n.view_src for n in nodes if n.view_src is not None and not n.op.is_empty}
        self._written = {weight for weight in self._written if _root(weight) in changed}
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

    def _reads_original(self, dialect: Dialect) -> bool:
        return self.repairs.host_weight_ids or super()._reads_original(dialect)

    def _is_written(self, weight: Tensor) -> bool:
        return self.repairs.written_weights and weight in self._written

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
