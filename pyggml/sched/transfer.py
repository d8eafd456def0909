"""`Transfer`: one input of a split, to be copied to the split's backend. It reports what it sends.

A policy (`CopyPolicy`) decides how a transfer is made. The transfer makes the copy and reports each part of it to
statistics, observers and the virtual clock, so a policy need not count. A `Feed` does the same for a tensor in host
memory that is not an input of a split: a policy sends it to its own memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import index
from typing import TYPE_CHECKING

from ..backend import Backend
from ..buffer import tensor_copy
from ..errors import SchedError
from ..graph import GraphView
from ..record import CopyReason
from ..tensor import Tensor
from ..types import BufferUsage, Type
from .experts import expert_copy_ranges
from .resources import CopyQueue

if TYPE_CHECKING:
    from .compute import SplitRun
    from .state import Machine

__all__ = ["Feed", "RunSlot", "Transfer", "is_host_weight"]


def is_host_weight(tensor: Tensor) -> bool:
    """Return whether a tensor is a host weight, for which ggml's copy callback is called.

    Notes
    -----
    Mirrors `ggml_backend_sched_is_host_weight`.
    """
    buffer = tensor.buffer
    return buffer is not None and buffer.usage is BufferUsage.WEIGHTS and buffer.is_host


class RunSlot:
    """Holds the compute in progress for the transfers of a plan; empty between computes."""

    __slots__ = ("run",)

    def __init__(self) -> None:
        self.run: SplitRun | None = None


class Feed:
    """A tensor in host memory that a policy can send to its own memory on a backend; made by `Plan.feed`.

    Attributes
    ----------
    source : Tensor
        What is sent, where it is.
    source_backend, backend : Backend
        Of source and target.
    backend_id : int
        Index of ``backend`` among the scheduler's.
    kind : str
        What the bytes count as: ``"experts"`` or ``"weight"``.
    """

    __slots__ = ("_slot", "_source_id", "backend", "backend_id", "kind", "source", "source_backend")

    def __init__(
        self, slot: RunSlot, machine: Machine, source: Tensor, *, source_id: int, backend_id: int, kind: CopyReason
    ) -> None:
        self.source = source
        self.source_backend: Backend = machine.backends[source_id]
        self.backend: Backend = machine.backends[backend_id]
        self.backend_id, self.kind = backend_id, kind
        self._slot, self._source_id = slot, source_id

    def __repr__(self) -> str:
        return f"<Feed of '{self.source.name}' from {self.source_backend.name} to {self.backend.name}>"

    @property
    def source_id(self) -> int:
        """Index of the source's backend among the scheduler's."""
        return self._source_id

    @property
    def n_expert(self) -> int:
        """Experts of an expert weight."""
        return self.source.ne[2]

    @property
    def expert_bytes(self) -> int:
        """Bytes from one expert to the next."""
        return self.source.nb[2]

    def now(self) -> float:
        """Return the host's time in seconds; 0 without observers."""
        return self._running("ask").log.now()

    def virtual_s(self) -> float | None:
        """Return the host's virtual time in seconds; None without a virtual clock."""
        clock = self._running("ask").log.clock
        return None if clock is None else clock.host_s

    def arrives_s(self, memory: Tensor) -> float:
        """Return when the latest send to memory of the policy's own arrives, in virtual seconds; 0 without a virtual clock."""
        return self._running("ask").resources.owned[memory].written.virtual_s

    def copy_seconds(self, src_id: int, n_bytes: int) -> float | None:
        """Return how long a copy of bytes from another backend's memory takes on idle links; None without a virtual clock."""
        run = self._running("ask")
        return run.log.copy_seconds(self.source, src_id, self.backend_id, n_bytes)

    def synchronize(self) -> None:
        """Make the host wait for all work of the backend."""
        run = self._running("wait for")
        run.synchronize(run.i_split, self.backend_id, "policy")

    def announce(self, ids: Tensor, experts: set[int]) -> None:
        """Report which experts of the source a split needs, whether they are sent or already there."""
        run = self._running("report")
        run.log.experts(run.i_split, self.source, ids, experts, is_added=False)

    def await_sent(self, memory: Tensor, parts: Sequence[tuple[int, int]]) -> None:
        """Make the backend's stream wait for what queues have sent to memory of the policy's own, which a split reads next.

        Parameters
        ----------
        memory : Tensor
            What nodes of the split read.
        parts : sequence of (int, int)
            Offset and size of the bytes that they read. Queues may write others meanwhile.
        """
        run = self._running("wait for")
        run.mark_wait(self.backend_id, None, run.resources.owned[memory].written, "own_written")
        self.backend.will_read(memory, parts)

    def send(
        self, offset: int = 0, size: int | None = None, *, into: Tensor, at: int = 0, queue: CopyQueue | None = None
    ) -> None:
        """Send bytes of the source to the policy's own memory; see `Transfer.send`."""
        n = self.source.nbytes - offset if size is None else size
        self._send(self._running("send"), offset, n, into, at, into, queue)

    def send_within(self, other: Tensor, at: int, size: int, *, into: Tensor, to: int) -> None:
        """Copy bytes from one memory of the policy's own to another, within the device.

        Parameters
        ----------
        other, into : Tensor
            Memory of the policy's own on the backend's device.
        at, to : int
            The first byte in each.
        size : int
            Bytes.
        """
        run = self._running("send")
        if min(at, size, to) < 0 or at + size > other.nbytes or to + size > into.nbytes:
            raise SchedError(
                f"{self!r}: {size:,} bytes from {at:,} of '{other.name}' do not fit '{into.name}' at {to:,}"
            )
        run.before_send(self, into, None)
        stream = run.before_send(self, other, None, is_read=True)
        start_s = run.log.now()
        src, dst = _bytes_of(other, at, size), _bytes_of(into, to, size)
        is_async = stream.cpy_tensor_async(stream, src, dst)
        if not is_async:
            stream.synchronize()
            tensor_copy(src, dst)
        self._report(run, at, size, start_s, self.backend_id, None, is_async=is_async, is_own=True)
        run.after_send(self, other, None, is_read=True)
        run.after_send(self, into, None)

    def _send(
        self, run: SplitRun, offset: int, n: int, target: Tensor, at: int, own: Tensor | None, queue: CopyQueue | None
    ) -> None:
        storage = self.source.storage
        if storage is None or not storage.is_host or self.source.data is None:
            raise SchedError(f"{self!r} cannot be sent in parts: the source is not in host memory", hint="send_all()")
        try:
            offset, n, at = index(offset), index(n), index(at)  # numpy's integers, too
        except TypeError as error:
            raise SchedError(f"{self!r}: a number of bytes is no integer: {error}") from None
        if offset < 0 or n < 0 or offset + n > self.source.nbytes:
            raise SchedError(f"{self!r}: it has {self.source.nbytes:,} bytes, not {n:,} from byte {offset:,}")
        if own is None:
            self._announce(run)
        stream = run.before_send(self, own, queue)
        start_s = run.log.now()
        stream.set_tensor_async(target, self.source.data + offset, at, n)
        self._report(run, offset, n, start_s, self._source_id, queue, is_own=own is not None)
        run.after_send(self, own, queue)

    def _announce(self, run: SplitRun) -> None:
        """Report which experts are about to be sent to a copy."""

    def _report(
        self, run: SplitRun, offset: int, size: int, start_s: float, src: int, queue: CopyQueue | None,
        *, is_async: bool = True, is_own: bool = False,
    ) -> None:  # fmt: skip
        run.report(self, run.i_split, src, self.kind, start_s, offset, size, 0,
                   is_async=is_async, queue=queue, is_own=is_own)  # fmt: skip

    def _running(self, what: str) -> SplitRun:
        run = self._slot.run
        if run is None:
            raise SchedError(f"{self!r}: nothing is computed now, so there is nothing to {what}")
        return run


class Transfer(Feed):
    """One input of a split, to be copied to the split's backend; made once per plan.

    Attributes
    ----------
    source : Tensor
        What is copied, where it is.
    copy : Tensor
        The input copy in the memory of the split's backend, with the same type and layout.
    source_backend, backend : Backend
        Of source and split.
    backend_id : int
        Index of ``backend`` among the scheduler's.
    split : int
        The index of the split.
    node : Tensor or None
        The first node of the split's backend that reads the input copy.
    kind : str
        ``"input"``, ``"activation"``, ``"weight"``, or ``"experts"``: a weight of which the used experts are enough.
    is_further : bool
        Whether it adds experts to an input copy that an earlier split made, for a later reader.

    Notes
    -----
    The memory of the input copy is free, and its ids are known, only while the transfer is offered to a policy. Sending
    to ``copy`` at any other time is an error, because the allocator gives the same memory to earlier tensors of the
    graph. To send ahead, send to the policy's own memory (`Plan.memory`), and later use `send_from`.
    """

    __slots__ = (
        "_announced", "_is_offered", "_missing", "_n_sent", "_position", "_reader", "_used", "copy", "has_later_readers",
        "ids_tensor", "is_further", "is_host_weight", "is_written", "node", "split",
    )  # fmt: skip

    def __init__(
        self,
        slot: RunSlot,
        machine: Machine,
        source: Tensor,
        copy: Tensor,
        *,
        source_id: int,
        backend_id: int,
        split: int,
        position: int,
        node: Tensor | None,
        kind: CopyReason,
        is_further: bool = False,
        ids_tensor: Tensor | None = None,
    ) -> None:
        super().__init__(slot, machine, source, source_id=source_id, backend_id=backend_id, kind=kind)
        self.copy, self.split, self.node = copy, split, node
        self.is_further = is_further
        self.is_host_weight = is_host_weight(source)
        self.ids_tensor = ids_tensor  #: what names the experts that the node reads
        self.is_written = False  #: whether a node of the graph writes the source
        self.has_later_readers = False  #: whether other nodes than ``node`` read the copy of an expert weight
        self._position = position
        self._missing: set[int] | None = None
        self._used: set[int] | None = None
        self._reader: Tensor | None = None
        self._announced = self._is_offered = False
        self._n_sent = 0

    def __repr__(self) -> str:
        return (
            f"<Transfer of {self.kind} '{self.source.name}' from {self.source_backend.name} to {self.backend.name} "
            f"for split {self.split}>"
        )

    # -- questions -----------------------------------------------------------

    def expert_range(self, expert: int) -> tuple[int, int]:
        """Return the first byte of an expert and the number of bytes to send: its own, and padding that kernels read."""
        (r,) = expert_copy_ranges((expert,), self.n_expert, self.expert_bytes, tensor_bytes=self.source.nbytes)
        return r.offset_bytes, r.size_bytes

    @property
    def graph(self) -> GraphView:
        """The nodes of the split."""
        return self._running("ask").plan.splits[self.split].graph

    def ids(self) -> set[int]:
        """Return the needed experts: those that the ids name or, for a further transfer, the missing ones.

        The first call reads the ids with exactly the calls of the dialect. Weights that share an ids tensor share the
        result.

        Raises
        ------
        ExpertIdError
            An id is no expert.
        SchedError
            The transfer is not of kind "experts", or not offered now.
        """
        run = self._offered("read the ids of")
        if self._missing is not None:
            return self._missing
        if self._used is None:
            if self.kind != "experts" or self.ids_tensor is None:
                raise SchedError(f"{self!r} has no ids", hint='only transfers of kind "experts" have')
            self._used = self._read_ids(run, self.ids_tensor)
        return self._used

    def read_ids(self, ids: Tensor, weight: Tensor, n_used: int) -> list[int]:
        """Read ids that a node of the split uses, row by row, including repeats.

        Afterwards all earlier work of the backend is done.

        Parameters
        ----------
        ids : Tensor
            A contiguous tensor of any shape.
        weight : Tensor
            The weight whose experts they name.
        n_used : int
            The number of ids per row.

        Raises
        ------
        ExpertIdError
            An id is no expert of the weight.
        """
        run = self._offered("read the ids of")
        original, there = self._original(run, ids)
        if there != self.backend_id:
            run.synchronize(self.split, self.backend_id, "policy")
        return run.ids.rows(run, self.split, original, there, weight, n_used)

    def note_count(self, ids: Tensor, n_experts: int) -> None:
        """Report to the clock how many experts the products with these ids read."""
        self._running("tell").ids.note_count(ids, n_experts)

    def _original(self, run: SplitRun, ids: Tensor) -> tuple[Tensor, int]:
        """Return the tensor from which ids are read, and its backend: the source if the input copy is not made yet."""
        if run.machine.dialect.ids_from == "original" or run.repairs.host_weight_ids:
            root = ids.view_src or ids
            for later in run.plan.transfers[self.split][self._position + 1 :]:
                if later.copy is ids or (later.copy is root and ids.nbytes == root.nbytes):
                    return later.source, later._source_id
        return ids, self.backend_id

    def _read_ids(self, run: SplitRun, ids: Tensor) -> set[int]:
        dialect = run.machine.dialect
        if dialect.wait_weight_backend or (self.is_written and run.repairs.written_weights):
            run.synchronize(self.split, self._source_id, "weight")
        if ids.is_empty and dialect.skip_empty_ids:
            return set()
        original, there = self._original(run, ids)
        used = run.ids.used(run, self.split, original, there, self.source)
        run.ids.note_count(ids, len(used))
        self._reader = original
        return used

    # -- effects -------------------------------------------------------------

    def send(
        self,
        offset: int = 0,
        size: int | None = None,
        *,
        into: Tensor | None = None,
        at: int = 0,
        queue: CopyQueue | None = None,
    ) -> None:
        """Send bytes of the source in the backend's stream; the source must be in host memory.

        Parameters
        ----------
        offset, size : int
            Bytes of the source and of the input copy; by default to the end.
        into : Tensor, optional
            The policy's own memory (`Plan.memory`), from byte ``at``, instead of the input copy. This is allowed at any
            time.
        queue : CopyQueue, optional
            Send in this queue (`Plan.queue`). The queue is made to wait for users of the target, and the reader for
            the queue.

        Raises
        ------
        SchedError
            The source is not in host memory, the bytes are outside it, or the transfer is not offered now.
        """
        n = self.source.nbytes - offset if size is None else size
        if into is None:
            self._send(self._offered("send into the copy of"), offset, n, self.copy, offset, None, queue)
        else:
            self._send(self._running("send"), offset, n, into, at, into, queue)

    def send_experts(self, experts: Iterable[int], *, queue: CopyQueue | None = None) -> None:
        """Send experts of the source, one call for each range of neighbours, with the padding that kernels may read.

        Notes
        -----
        Mirrors the copies of the used-expert path in `ggml_backend_sched_compute_splits`.
        """
        for r in expert_copy_ranges(experts, self.n_expert, self.expert_bytes, tensor_bytes=self.source.nbytes):
            self.send(r.offset_bytes, r.size_bytes, queue=queue)

    def send_from(
        self,
        other: Tensor,
        at: int = 0,
        offset: int = 0,
        size: int | None = None,
        *,
        queue: CopyQueue | None = None,
    ) -> None:
        """Fill bytes of the input copy from another tensor with the same contents, usually the policy's own memory.

        Parameters
        ----------
        other : Tensor
            A tensor on the backend's device, or the policy's own memory on another device. That device then copies, after its
            own work so far and that of the receiving stream.
        at : int
            The first byte of ``other``.
        offset, size : int
            Bytes of the input copy; by default all bytes of ``other``, at most to the end.
        queue : CopyQueue, optional
            See `send`.

        Raises
        ------
        SchedError
            The memory of ``other`` is not the device's, or too small, or the transfer is not offered now.
        """
        run = self._offered("send into the copy of")
        n = min(other.nbytes - at, self.source.nbytes - offset) if size is None else size
        if min(at, offset, n) < 0 or at + n > other.nbytes or offset + n > self.source.nbytes:
            raise SchedError(f"{self!r}: {n:,} bytes from byte {at:,} of '{other.name}' do not fit byte {offset:,}")
        storage, own = other.storage, run.resources.owned.get(other)
        src_id = self.backend_id if own is None else own.backend_id
        if storage is None or storage.buft.device is not run.machine.backends[src_id].device:
            raise SchedError(
                f"{self!r}: '{other.name}' is not in memory of {self.backend.name}", hint="use Plan.memory"
            )
        self._announce(run)
        stream = run.before_send(self, other, queue, is_read=True)
        sender = stream if src_id == self.backend_id else run.send_for(src_id, self.backend_id, queue)
        src, dst = _bytes_of(other, at, n), _bytes_of(self.copy, offset, n)
        start_s = run.log.now()
        is_async = stream.cpy_tensor_async(sender, src, dst)
        if not is_async:
            sender.synchronize()
            stream.synchronize()
            tensor_copy(src, dst)
        self._report(run, offset, n, start_s, src_id, queue, is_async=is_async)
        run.after_send(self, other, queue, is_read=True)

    def fetch(self, into: Tensor) -> None:
        """Read the source from its device into host memory of the policy's own, and wait for it; allowed at any time.

        `send_from` that memory later fills the input copy without waiting for work that the device was given after this.

        Parameters
        ----------
        into : Tensor
            Memory of the policy's own on the transfer's backend (`Plan.memory`), whose device is the host.

        Raises
        ------
        SchedError
            The memory is not the host's, or smaller than the source.
        """
        run = self._running("fetch")
        storage, n = into.storage, self.source.nbytes
        if storage is None or not storage.is_host or into.data is None or into.nbytes < n:
            raise SchedError(f"{self!r}: '{into.name}' is not host memory of {n:,} bytes", hint="use Plan.memory")
        run.before_send(self, into, None)
        start_s = run.log.now()
        self.source_backend.get_tensor_async(self.source, into.data, 0, n)
        run.synchronize(run.i_split, self._source_id, "fetch")
        run.report(
            self, run.i_split, self._source_id, self.kind, start_s, 0, n, 0, is_async=False, queue=None, is_own=True
        )
        run.after_send(self, into, None)

    def send_all(self) -> None:
        """Send everything that is needed: the missing experts for a further transfer, otherwise the whole source.

        Notes
        -----
        Mirrors the copy of a split's input in `ggml_backend_sched_compute_splits`: `cpy_tensor_async`; if that is not
        possible, the host waits for the source's backend and for the last use of the input copy, and copies.
        """
        run = self._slot.run
        if run is None or not self._is_offered:
            run = self._offered("send into the copy of")  # raises
        if self._missing is not None:
            self.send_experts(self._missing)
            return
        now, source, copy = run.log.now, self.source, self.copy
        start_s = now()
        is_async = self.backend.cpy_tensor_async(self.source_backend, source, copy)
        if not is_async:
            run.synchronize(self.split, self._source_id, "source")
            run.host_wait(self.split, self.backend_id, "fallback")
            start_s = now()
            run.copy(source, copy)
        run.report_whole(
            self, self.split, "weight" if self.kind == "experts" else self.kind, start_s, is_async=is_async
        )

    # -- for the run ---------------------------------------------------------

    def offer(self, policy_copies: Callable[[Transfer], bool], missing: set[int] | None = None) -> None:
        """Offer the transfer to a policy's ``copy``; if it returns False, copy everything."""
        self._used = self._reader = None
        self._missing = missing
        self._announced = False
        self._n_sent = 0
        self._is_offered = True
        try:
            copied = policy_copies(self)
            if copied is None:
                raise SchedError(
                    f"{self!r}: the policy's copy() returned nothing",
                    hint="return True after sending what is needed, or False: then everything is copied",
                )
            if not copied:
                self.send_all()
        finally:
            self._is_offered = False

    def report_sent(self, offset: int, size: int, start_s: float) -> None:
        """Report bytes that ggml's copy callback sent from the source to the input copy."""
        run = self._offered("report on")
        self._announce(run)
        self._report(run, offset, size, start_s, self._source_id, None)

    def _offered(self, what: str) -> SplitRun:
        run = self._slot.run
        if run is None or not self._is_offered:
            raise SchedError(
                f"cannot {what} {self!r}: it is not offered now",
                hint="its ids and the memory of its copy are valid within copy(); send ahead with `into=`",
            )
        return run

    def _announce(self, run: SplitRun) -> None:
        """Report once which experts are about to be sent."""
        if self._announced or self.kind != "experts":
            return
        self._announced = True
        used = self._missing if self._missing is not None else self._used
        reader = self.ids_tensor if self._missing is not None else self._reader
        experts = set(range(self.n_expert)) if used is None else used
        run.log.experts(self.split, self.source, reader, experts, is_added=self.is_further)

    def _report(
        self, run: SplitRun, offset: int, size: int, start_s: float, src: int, queue: CopyQueue | None,
        *, is_async: bool = True, is_own: bool = False,
    ) -> None:  # fmt: skip
        # parts of an expert weight count as one whole copy, and so do those of another
        whole = self.source.nbytes if self.kind == "experts" or (self._n_sent == 0 and not is_own) else 0
        self._n_sent += not is_own
        run.report(self, run.i_split, src, self.kind, start_s, offset, size, whole,
                   is_async=is_async, queue=queue, is_own=is_own)  # fmt: skip


def _bytes_of(tensor: Tensor, at: int, size: int) -> Tensor:
    """Return a view of bytes of a tensor, of any type."""
    root = tensor if tensor.view_src is None else tensor.view_src
    view = Tensor(Type.I8, (size,), name=tensor.name, view_src=root, view_offs=tensor.view_offs + at)
    assert root.data is not None
    view.buffer, view.data = root.buffer, root.data + view.view_offs
    return view
