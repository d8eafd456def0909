"""`TwoLinkExperts`: used experts travel over two links at once, from the host and from another device that holds some."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from ..buffer import tensor_set
from ..dialect import Repairs
from ..errors import SchedError
from .experts import expert_copy_ranges
from .policies import UsedExpertCopier
from .resources import CopyQueue

if TYPE_CHECKING:
    from ..backend import Backend
    from ..tensor import Tensor
    from .plan import Plan
    from .transfer import Transfer

__all__ = ["TwoLinkExperts"]

#: Share of experts that another device holds if neither states the rate of its links.
_HALF = 0.5


class TwoLinkExperts(UsedExpertCopier):
    """Copies used experts from the host and, at the same time, from another device by the link between both.

    The other device holds a share of each weight's experts: as many as its link carries while the host's carries the rest. Of
    the used experts that it holds, so many are copied from there that both copies end together.

    Parameters
    ----------
    limit_bytes : int, optional
        Most memory for experts on each other device; by default what the share takes.
    repairs : Repairs, optional
        See `CopyPolicy`.

    Attributes
    ----------
    shares : dict of int to float
        By backend, the share of experts that another device holds for it.

    Raises
    ------
    SchedError
        From `reserve`: there is no second device, or no link between the two.

    Notes
    -----
    Upstream copies experts from host memory only. The other device is loaded when memory is reserved, as with weights; that is
    not part of a compute. The weights must not change afterwards. Copies between devices by way of the host would share the
    link that they are to relieve, so the devices need a link of their own (`DeviceProfile.peer`). Devices without a profile are
    assumed to have one as fast as that to the host.
    """

    def __init__(self, limit_bytes: int | None = None, repairs: Repairs | None = None) -> None:
        super().__init__(repairs)
        self.limit_bytes = limit_bytes
        self.shares: dict[int, float] = {}
        self._held: dict[Transfer, _Held] = {}
        self._memory: dict[tuple[str, int], tuple[Tensor, tuple[int, ...]]] = {}  # what is loaded, by weight and device

    def reserve(self, plan: Plan) -> None:
        """Find another device for each weight, and load its share of the experts."""
        self._held.clear()
        transfers = plan.expert_transfers()
        if not transfers:
            return
        backends = list(plan.backends[:-1])
        sources: dict[int, int] = {}
        for b in {t.backend_id for t in transfers}:
            others = [i for i, other in enumerate(backends) if other.device is not backends[b].device]
            rates = {i: rate for i in others if (rate := _peer_share(backends[b], backends[i])) > 0.0}
            if not rates:
                raise SchedError(
                    f"no other device has a link to {backends[b].name} beside the host's",
                    hint="two devices, such as -dev rtx3090-nvlink,rtx3090-nvlink,cpu -ts 1,0, or peer=50GB/s of custom ones",
                )
            sources[b] = max(rates, key=lambda i: rates[i])
            self.shares[b] = rates[sources[b]]
        for b, peer in sources.items():
            mine = {t.source.name: t for t in reversed(transfers) if t.backend_id == b}
            wanted = sum(t.source.nbytes for t in mine.values()) * self.shares[b]
            if self.limit_bytes is not None and wanted > self.limit_bytes:
                self.shares[b] *= self.limit_bytes / wanted
            for transfer in transfers:
                if transfer.backend_id == b:
                    self._hold(plan, transfer, peer)

    def _hold(self, plan: Plan, transfer: Transfer, peer: int) -> None:
        """Give another device its share of a weight's experts, evenly spread over them."""
        weight, share, backend = transfer.source, self.shares[transfer.backend_id], plan.backends[peer]
        n = weight.ne[2]
        experts = tuple(e for e in range(n) if int((e + 1) * share) > int(e * share))
        if not experts:
            return
        size, padded = weight.nb[2], transfer.expert_range(0)[1]  # the first has padding, if any has
        known = self._memory.get((weight.name, peer))
        memory = plan.memory(backend, len(experts) * padded, f"experts of {weight.name}")
        if known is None or known != (memory, experts):
            self._memory[weight.name, peer] = memory, experts
            if backend.device.has_data and weight.data is not None:
                for i, expert in enumerate(experts):
                    tensor_set(memory, weight.data + expert * size, i * padded, transfer.expert_range(expert)[1])
        queues = plan.queue(transfer.backend), plan.queue(transfer.backend, 2)
        self._held[transfer] = _Held(memory, peer, {e: i * padded for i, e in enumerate(experts)}, queues)

    def copy(self, transfer: Transfer) -> bool:
        """Send used experts over both links."""
        if transfer.kind != "experts":
            return False
        used, held = transfer.ids(), self._held.get(transfer)
        if held is None or transfer.is_further:
            transfer.send_experts(used)
            return True
        there = self._from_peer(transfer, held, used)
        for expert in there:
            ((offset, size),) = _ranges(transfer, (expert,), used)
            transfer.send_from(held.memory, held.at[expert], offset, size, queue=held.queues[1])
        for offset, size in _ranges(transfer, used.difference(there), used):
            transfer.send(offset, size, queue=held.queues[0])
        return True

    def _from_peer(self, transfer: Transfer, held: _Held, used: set[int]) -> list[int]:
        """Return the experts to take from the other device, so that both links end together."""
        there = sorted(used & held.at.keys())

        def ends_s(n: int) -> float | None:
            rest = _ranges(transfer, used.difference(there[:n]), used)
            host = [transfer.copy_seconds(transfer.source_id, size) for _, size in rest]
            peer = [transfer.copy_seconds(held.peer, transfer.expert_bytes)] * n
            if None in host or None in peer:
                return None
            return max(sum(s for s in host if s), sum(s for s in peer if s))

        if ends_s(0) is None:  # without a clock the share that it holds is what fits the links
            return there
        low, high = 0, len(there)
        while low < high:  # the end comes sooner with each expert until the other link is the later one
            middle = (low + high) // 2
            if (ends_s(middle) or 0.0) <= (ends_s(middle + 1) or 0.0):
                high = middle
            else:
                low = middle + 1
        return there[:low]


class _Held:
    """Experts of a weight on another device.

    Attributes
    ----------
    memory : Tensor
        Its memory there.
    peer : int
        The backend of that device.
    at : dict of int to int
        By expert, its first byte in the memory.
    queues : (CopyQueue, CopyQueue)
        Of the receiving device: for copies from the host, and from there.
    """

    __slots__ = ("at", "memory", "peer", "queues")

    def __init__(self, memory: Tensor, peer: int, at: dict[int, int], queues: tuple[CopyQueue, CopyQueue]) -> None:
        self.memory, self.peer, self.at, self.queues = memory, peer, at, queues


def _ranges(transfer: Transfer, experts: Collection[int], used: set[int]) -> list[tuple[int, int]]:
    """Return the bytes of experts, neighbours merged, with padding only where the next expert is not used.

    So the two links never write the same bytes.
    """
    n_bytes, size = transfer.source.nbytes, transfer.expert_bytes
    found = []
    for r in expert_copy_ranges(experts, transfer.n_expert, size, tensor_bytes=n_bytes, pad_bytes=0):
        end = r.offset_bytes + r.size_bytes
        last = (end - 1) // size
        if last + 1 not in used:
            end = sum(transfer.expert_range(last))
        found.append((r.offset_bytes, end - r.offset_bytes))
    return found


def _peer_share(backend: Backend, other: Backend) -> float:
    """Return what share of bytes the link between two devices carries while the host's carries the rest; 0: there is none."""
    own, theirs = backend.device.profile, other.device.profile
    if own is None or theirs is None:
        return _HALF
    if own.peer is None or theirs.peer is None:
        return 0.0
    rate = min(own.peer.bytes_per_s, theirs.peer.bytes_per_s)
    return rate / (rate + own.link.bytes_per_s)
