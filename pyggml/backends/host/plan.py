"""`HostPlan`: the nodes of a split as a plan of kernel calls, made once and run in one call.

Used by every backend that computes on host memory. A plan is an array of int64 words (`pyggml.kernels.cpu.words`),
which ops add to as declared in `pyggml.opset`. This module decides two things that depend on the order of nodes:

- where a stage begins: at a descriptor that reads or writes memory that an earlier one of the stage writes, or writes
  memory that one reads;
- which products move to the shared stage before: those that need nothing of what one thread does in between, such as
  K and V beside Q. If their own memory is still in use, they write to scratch, from where the result is copied;
- what is shared: quantised activations, ids grouped by expert, and ROPE's angles are used again by later nodes until a
  node overwrites their source.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from pyggml.kernels.cpu import words as w

from ...errors import ComputeError, UnsupportedOpError
from ...opset import OPS, Layout, reason_malformed, reason_unsupported
from ...tensor import Tensor
from ...types import TensorFlag
from .indices import bad_index_error

if TYPE_CHECKING:
    from pyggml.kernels.cpu.kernel import Kernel
    from pyggml.kernels.cpu.pool import BadIndex, Pool

__all__ = ["HostPlan", "Moved", "kernels_of"]

#: Seconds of work after which Python may look for signals (Ctrl-C).
PIECE_S = 0.05
#: Scratch slots for prepared activations, groupings, and results of moved products; each is reused only in a later stage.
N_SLOTS = {"rows": 3, "groups": 2, "results": 2}
#: Largest result of a moved product that is copied.
MOVED_BYTES = 1 << 16
_ABSENT = (0, 0, 1, 1, 1, 1, 0, 0, 0, 0)
_PADDING = [(0,) * (w.N_PARAMS - n) for n in range(w.N_PARAMS + 1)]

Range = tuple[int, int]


#: Most ranges of a stage that are compared one by one; most stages have fewer.
_FEW = 48


class _Ranges:
    """Ranges of bytes, merged if they overlap, with fast look-up of overlaps."""

    __slots__ = ("ends", "starts")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []

    def meets(self, first: int, end: int) -> bool:
        """Return whether a range overlaps one of these."""
        i = bisect_right(self.ends, first)
        return i < len(self.starts) and self.starts[i] < end

    def add(self, first: int, end: int) -> None:
        """Add a range."""
        i, j = bisect_left(self.ends, first), bisect_right(self.starts, end)
        if i < j:
            first, end = min(first, self.starts[i]), max(end, self.ends[j - 1])
        self.starts[i:j] = (first,)
        self.ends[i:j] = (end,)


class _Touched:
    """The ranges that a stage's descriptors read and write: a list, or merged ranges if there are many."""

    __slots__ = ("few", "many", "many_parallel")

    def __init__(self) -> None:
        self.few: list[tuple[int, int, bool, bool]] = []  #: first byte, end, whether it is written, whether serially
        self.many: tuple[_Ranges, _Ranges] | None = None  #: read, written
        self.many_parallel: tuple[_Ranges, _Ranges] | None = None  #: by descriptors that all threads run

    def conflicts(self, ranges: Sequence[tuple[int, int, bool]], serial: bool) -> bool:
        """Return whether ranges conflict with the stage's: they overlap, one is written, and not both are serial."""
        many = self.many_parallel if serial else self.many
        if many is not None:
            reads, writes = many
            return any(
                writes.meets(first, end) or (is_write and reads.meets(first, end)) for first, end, is_write in ranges
            )
        for a, b, was_write, was_serial in self.few:
            if was_serial and serial:
                continue
            for first, end, is_write in ranges:
                if first < b and a < end and (is_write or was_write):
                    return True
        return False

    def add(self, ranges: Sequence[tuple[int, int, bool]], serial: bool) -> None:
        """Add the ranges of a descriptor."""
        if self.many is None:
            self.few += [(first, end, is_write, serial) for first, end, is_write in ranges]
            if len(self.few) <= _FEW:
                return
            self.many, self.many_parallel = (_Ranges(), _Ranges()), (_Ranges(), _Ranges())
            noted = self.few
        else:
            noted = [(first, end, is_write, serial) for first, end, is_write in ranges]
        assert self.many_parallel is not None
        for first, end, is_write, is_serial in noted:
            self.many[is_write].add(first, end)
            if not is_serial:
                self.many_parallel[is_write].add(first, end)


class _Stage:
    """The latest stage, or the one before, while descriptors are added."""

    __slots__ = ("can_fail", "cost", "is_shared", "touched")

    def __init__(self) -> None:
        self.touched = _Touched()
        self.cost = 0.0  #: seconds
        self.is_shared = False  #: whether all threads run a descriptor of it
        self.can_fail = False  #: whether an index can end it


class Moved(NamedTuple):
    """Where a product is computed that moves to the stage before the latest."""

    slot: tuple[str, int] | None  #: scratch for its result; None: its own memory


class HostPlan:
    """A plan for nodes whose data is in host memory.

    Parameters
    ----------
    nodes : sequence of Tensor
        Nodes in order. Views, empty tensors, and nodes without the COMPUTE flag are left out.
    address_of : callable
        Host address at which a tensor's ``data`` can be reached.
    backend : str
        Name for errors.
    share : bool
        Whether nodes may use prepared data of earlier ones; `run_node` needs False.

    Raises
    ------
    UnsupportedOpError
        No kernel can run a node.

    Notes
    -----
    A plan contains addresses and is valid until a tensor moves.
    """

    def __init__(
        self,
        nodes: Sequence[Tensor],
        address_of: Callable[[Tensor], int],
        *,
        backend: str = "CPU",
        share: bool = True,
    ) -> None:
        self.backend = backend
        self.in_use: AbstractContextManager[None] = (
            nullcontext()
        )  #: holds the buffers of the tensors, if they are known
        self.address_of = address_of
        self.share = share
        self.times = 0  #: address of counters of cycles, or 0; see `Pool.run`
        self.thread_bytes = 0
        self._words: Any = array("q")  # Any: array's type parameter is not subscriptable at run time
        self._starts: list[int] = []  #: first word of each descriptor
        self._owners: list[Tensor] = []  #: node of each descriptor
        self._costs: list[float] = []  #: seconds, roughly
        self._node_spans: list[tuple[int, int]] = []
        self._stage_of: list[int] = []  #: stage of each descriptor
        self._stages: list[int] = []  #: first descriptor of each stage
        self._n_stages = 0
        self._new_stage = True  #: whether the next descriptor begins a stage in any case
        self._before, self._latest = _Stage(), _Stage()
        self._shared: dict[tuple[Any, ...], tuple[Range, tuple[str, int]]] = {}
        self._fixups: list[tuple[int, str, int]] = []  #: word, slot kind, slot number
        self._slot_bytes = dict.fromkeys(N_SLOTS, 0)
        self._next_slot = dict.fromkeys(N_SLOTS, 0)
        self._table_bytes = 0
        self._build(nodes)

    def _build(self, nodes: Sequence[Tensor]) -> None:
        compute = TensorFlag.COMPUTE
        for node in nodes:
            first = len(self._starts)
            if not node.op.is_empty and node.flags & compute and not node.is_empty:
                reason = reason_unsupported(node) or reason_malformed(node)
                if reason:  # kernels trust their descriptors
                    raise UnsupportedOpError(node.name, node.op_desc, (self.backend,), reason=reason)
                OPS[node.op].call(self, node)
                if self.share:
                    self._forget(node)
                else:
                    self._shared.clear()
                    self._new_stage = True
            self._node_spans.append((first, len(self._starts)))
        self._finish()

    # -- for calls of ops --------------------------------------------------------

    def add(
        self,
        kernel: int,
        node: Tensor,
        tensors: Sequence[Tensor | Layout | None],
        params: Sequence[int] = (),
        *,
        serial: bool,
        cost: float = 0.0,
        reads: Sequence[Range] = (),
        writes: Sequence[Range] = (),
        scratch: int = 0,
        moved: Moved | None = None,
    ) -> int:
        """Append a descriptor and return the index of its first word.

        Parameters
        ----------
        kernel : int
            Address of an op kernel.
        node : Tensor
            The node it belongs to.
        tensors : sequence of Tensor, Layout or None
            dst (None: the op writes scratch), src0, src1, ...
        params : sequence of int
            Parameter words.
        serial : bool
            Whether a single thread runs it.
        cost : float
            Estimated seconds.
        reads, writes : sequence of (int, int)
            Ranges of scratch that it reads and writes, in addition to the tensors; see `slot_range`.
        scratch : int
            Byte offset in the shared scratch.
        moved : Moved, optional
            Run it in the stage before the latest; see `move`.
        """
        words, start = self._words, len(self._words)
        length = w.DST + w.TENSOR * len(tensors)
        words.extend((kernel, length, serial, 0, len(self._starts), 0, scratch, 0))
        words.extend(params)
        words.extend(_PADDING[len(params)])
        address_of = self.address_of
        ranges = [(a, b, False) for a, b in reads] + [(a, b, True) for a, b in writes]
        is_write = True
        if moved is not None and moved.slot is not None:
            ranges.append((*self.slot_range(moved.slot), True))
        for t in tensors:
            if t is None:
                words.extend(_ABSENT)
            else:
                at = t.address if isinstance(t, Layout) else address_of(t)
                words.extend((at, t.type, *t.ne, *t.nb))
                if not is_write or moved is None or moved.slot is None:
                    ranges.append((at, at + t.nbytes, is_write))
            is_write = False
        stage = self._latest
        if moved is not None:
            stage = self._before
        elif self._new_stage or stage.touched.conflicts(ranges, serial):
            self._before, self._latest = stage, _Stage()
            stage = self._latest
            self._new_stage = False
            self._n_stages += 1
        stage.touched.add(ranges, serial)
        stage.cost += cost
        stage.is_shared |= not serial
        stage.can_fail |= OPS[node.op].chooses is not None
        self._new_stage |= stage.cost > PIECE_S
        self._stage_of.append(self._n_stages - (1 if moved is None else 2))
        self._starts.append(start)
        self._owners.append(node)
        self._costs.append(cost)
        return start

    def move(self, node: Tensor, tensors: Sequence[Tensor], reads: Sequence[Range]) -> Moved | None:
        """Return how a shared product can run in the stage before the latest; None if it cannot.

        It can if one thread does the latest stage, the one before is shared, and the product reads nothing that either
        writes. No result is computed before an earlier node that may stop the plan.

        Parameters
        ----------
        node : Tensor
            The result.
        tensors : sequence of Tensor
            What it reads.
        reads : sequence of (int, int)
            Ranges of scratch that it reads.
        """
        before, latest = self._before, self._latest
        if not self.share or self._new_stage or latest.is_shared or latest.can_fail or not before.is_shared:
            return None
        ranges = [(a, b, False) for a, b in reads]
        for t in tensors:
            at = self.address_of(t)
            ranges.append((at, at + t.nbytes, False))
        if self._meets(ranges):
            return None
        at = self.address_of(node)
        if not self._meets([(at, at + node.nbytes, True)]):
            return Moved(None)
        if node.nbytes > MOVED_BYTES or not node.is_contiguous():
            return None
        slot = ("results", self._next_slot["results"])
        if self._meets([(*self.slot_range(slot), True)]):
            return None
        self._next_slot["results"] = (slot[1] + 1) % N_SLOTS["results"]
        self._slot_bytes["results"] = max(self._slot_bytes["results"], node.nbytes)
        return Moved(slot)

    def _meets(self, ranges: Sequence[tuple[int, int, bool]]) -> bool:
        """Return whether ranges conflict with those of the latest two stages."""
        return any(stage.touched.conflicts(ranges, False) for stage in (self._before, self._latest))

    def prepared(self, key: tuple[Any, ...]) -> tuple[str, int] | None:
        """Return the slot of data prepared under a key, or None if it is no longer valid."""
        found = self._shared.get(key)
        return None if found is None else found[1]

    def new_slot(self, kind: str, size: int, key: tuple[Any, ...], source: Tensor) -> tuple[str, int]:
        """Return a slot of scratch for data prepared from a source; the slot's older data is dropped."""
        n = self._next_slot[kind]
        self._next_slot[kind] = (n + 1) % N_SLOTS[kind]
        self._slot_bytes[kind] = max(self._slot_bytes[kind], size)
        slot = (kind, n)
        self._shared = {k: v for k, v in self._shared.items() if v[1] != slot}
        self.remember(key, source, slot)
        return slot

    def new_table(self, size: int, key: tuple[Any, ...], source: Tensor) -> tuple[str, int]:
        """Return scratch that is never reused; its number is its offset."""
        slot = ("table", self._table_bytes)
        self._table_bytes += -(-size // 64) * 64
        self.remember(key, source, slot)
        return slot

    def remember(self, key: tuple[Any, ...], source: Tensor, slot: tuple[str, int]) -> None:
        """Record that a slot has data prepared from a source."""
        at = self.address_of(source)
        self._shared[key] = ((at, at + source.nbytes), slot)

    @staticmethod
    def slot_range(slot: tuple[str, int]) -> Range:
        """Return a range that represents a slot when stages are decided; no tensor has these addresses."""
        kind, n = slot
        at = {"rows": -1000, "groups": -2000, "results": -3000, "table": -(1 << 40)}[kind] - 2 * n
        return at, at + 1

    def fix(self, word: int, slot: tuple[str, int]) -> None:
        """Set a word to the slot's byte offset, once sizes are known."""
        self._fixups.append((word, *slot))

    def need_thread_bytes(self, size: int) -> None:
        """Request scratch for each thread, in bytes."""
        self.thread_bytes = max(self.thread_bytes, -(-size // 64) * 64)

    # -- closing ---------------------------------------------------------------------

    def _forget(self, node: Tensor) -> None:
        """Drop data prepared from memory that a node writes."""
        if self._shared:
            first = self.address_of(node)
            end = first + node.nbytes
            stale = [key for key, ((a, b), _) in self._shared.items() if first < b and a < end]
            for key in stale:
                del self._shared[key]

    def _finish(self) -> None:
        base = {"table": 0, "rows": self._table_bytes}
        size = {kind: -(-n // 64) * 64 for kind, n in self._slot_bytes.items()}
        end = base["rows"]
        for kind, n in N_SLOTS.items():
            base[kind] = end
            end += n * size[kind]
        for word, kind, n in self._fixups:
            self._words[word] = n if kind == "table" else base[kind] + n * size[kind]
        self.shared_bytes = end
        self._sort()
        self._address = self._words.buffer_info()[0]
        self._pieces = self._cut()
        self._before = self._latest = _Stage()
        self._shared.clear()

    def _sort(self) -> None:
        """Put the descriptors in the order of their stages, and note where each stage begins."""
        stages = self._stage_of
        order = sorted(range(len(stages)), key=stages.__getitem__)
        if order != list(range(len(order))):
            words, ends = self._words, [*self._starts[1:], len(self._words)]
            self._words, starts = array("q"), []
            for index, i in enumerate(order):
                start = len(self._words)
                starts.append(start)
                self._words.extend(words[self._starts[i] : ends[i]])
                self._words[start + w.INDEX] = index
            self._starts = starts
            self._owners = [self._owners[i] for i in order]
            self._costs = [self._costs[i] for i in order]
            stages = [stages[i] for i in order]
        self._stages = [i for i, stage in enumerate(stages) if i == 0 or stages[i - 1] != stage]

    def _cut(self) -> list[tuple[int, int]]:
        """Write the headers of stages, and return pieces of whole stages, each with about `PIECE_S` of work."""
        words, starts = self._words, self._starts
        pieces: list[tuple[int, int]] = []
        first, total = 0, 0.0
        for stage, end in pairwise([*self._stages, len(starts)]):
            shared = 0
            for start in starts[stage:end]:
                words[start + w.PARALLEL] = own = 1 - words[start + w.SERIAL]
                shared |= own
            words[starts[stage] + w.STAGE] = end - stage
            words[starts[stage] + w.PARALLEL] = shared
            total += sum(self._costs[stage:end])
            if total > PIECE_S or end == len(starts):
                pieces.append((self._address + 8 * starts[first], end - first))
                first, total = end, 0.0
        return pieces

    # -- running -----------------------------------------------------------------------

    @property
    def pieces(self) -> Sequence[tuple[int, int]]:
        """Address of the first kernel call of each piece, and their number; see `Pool.run`."""
        return self._pieces

    @property
    def n_descriptors(self) -> int:
        """Number of kernel calls."""
        return len(self._starts)

    def run(self, pool: Pool) -> None:
        """Compute all nodes.

        Raises
        ------
        ExpertIdError
            An expert id is out of range. No later node is computed.
        ComputeError
            A row index is out of range, or the pool was stopped.
        """
        bad = pool.run(self._pieces, self.shared_bytes, self.thread_bytes, self.times)
        if bad is not None:
            self.refuse(bad)

    def run_node(self, i: int, pool: Pool) -> None:
        """Compute only node i of a plan made with ``share=False``. Raises as `run`."""
        if self.share:
            raise ValueError("a plan whose nodes share prepared data cannot run them one by one; use share=False")
        first, end = self._node_spans[i]
        if first == end:
            return
        bad = pool.run([(self._address + 8 * self._starts[first], end - first)], self.shared_bytes, self.thread_bytes)
        if bad is not None:
            self.refuse(bad)

    def refuse(self, bad: BadIndex) -> None:
        """Raise the error of a plan that stopped; see `run`."""
        for start in self._starts:  # a stopped op may have left jobs counted
            self._words[start + w.COUNTER] = 0
        if bad.descriptor < 0:
            raise ComputeError(self.backend, "the computation was stopped", status=1)
        raise bad_index_error(self._owners[bad.descriptor], self.backend, bad.position, bad.value, bad.limit)

    def __repr__(self) -> str:
        kib = (self.shared_bytes + self.thread_bytes) / 1024
        return (
            f"<HostPlan of {self.n_descriptors} kernel calls for {len(self._node_spans)} nodes, {kib:,.0f} KiB scratch>"
        )


def kernels_of(nodes: Iterable[Tensor]) -> list[Kernel]:
    """Return the kernels that a plan of nodes would call and that are not loaded yet; nothing is compiled.

    The nodes need no memory. Nodes that the kernels cannot run are left out.
    """
    from pyggml.kernels.cpu import kernel, matmul

    with kernel.collecting() as found:
        for node in nodes:
            with suppress(UnsupportedOpError):
                HostPlan([node], lambda t: 0)
        _ = matmul.place_product.address  # whether a product moves depends on where tensors are
    return list(found.values())
