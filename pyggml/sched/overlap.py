"""`OverlappedExperts`: used-expert copies that overlap with launches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..dialect import Repairs
from ..tensor import Tensor
from .experts import expert_copy_ranges
from .policies import UsedExpertCopier
from .resources import CopyQueue

if TYPE_CHECKING:
    from .plan import Plan
    from .transfer import Transfer

__all__ = ["OverlappedExperts"]


class OverlappedExperts(UsedExpertCopier):
    """Copies the used experts of a layer's later products on a queue while its first product is computed.

    The ids of a layer are known when its first expert weight is copied. The used experts of its other weights are then
    sent on a queue to the policy's own memory, and copied within the device for their split. The bytes over the link
    are those of `UsedExpertCopier`.

    Parameters
    ----------
    repairs : Repairs, optional
        See `CopyPolicy`.

    Notes
    -----
    Upstream copies them in the backend's stream, one product after another (llama.cpp 25859). The policy needs device
    memory for one layer's other expert weights. It gains nothing with pageable weights, as in a mapped file, because
    copies from them block the host. In virtual time on an RTX 4090 with ``--no-mmap``, a prompt of Qwen3-30B-A3B takes
    4 % less time with ``-ub 512`` and 14 % less with ``-ub 2048``; of gpt-oss-120b 2 % more and 0.5 % less.
    """

    def __init__(self, repairs: Repairs | None = None) -> None:
        super().__init__(repairs)
        self._followers: dict[Transfer, list[tuple[Transfer, Tensor]]] = {}
        self._queues: dict[Transfer, CopyQueue] = {}
        self._sent: dict[Transfer, tuple[Tensor, set[int]]] = {}

    def reserve(self, plan: Plan) -> None:
        """Find the weights that share ids with an earlier one, and request memory and a queue for them."""
        self._followers.clear()
        self._queues.clear()
        self._sent.clear()
        leader: Transfer | None = None
        groups: dict[Transfer, list[Transfer]] = {}
        for transfer in plan.expert_transfers():
            if leader is None or transfer.ids_tensor is not leader.ids_tensor or transfer.backend is not leader.backend:
                leader = transfer
                groups[leader] = []
            else:
                groups[leader].append(transfer)
        sizes: dict[tuple[int, int], int] = {}
        for first, others in groups.items():
            for i, other in enumerate(others):
                key = (first.backend_id, i)
                sizes[key] = max(sizes.get(key, 0), other.source.nbytes)
        for first, others in groups.items():
            if others:
                self._queues[first] = plan.queue(first.backend)
                self._followers[first] = [
                    (other, plan.memory(first.backend, sizes[first.backend_id, i], f"overlapped experts {i}"))
                    for i, other in enumerate(others)
                ]

    def copy(self, transfer: Transfer) -> bool:
        """Send the used experts of a first weight and, on the queue, of the others; copy weights sent before."""
        if transfer.kind != "experts":
            return False
        used = transfer.ids()
        ahead = None if transfer.is_further else self._sent.pop(transfer, None)
        if ahead is None or not used <= ahead[1]:
            transfer.send_experts(used)
        else:
            memory, _ = ahead
            for r in _ranges(transfer, used):
                transfer.send_from(memory, r[0], r[0], r[1])
        for other, memory in () if transfer.is_further else self._followers.get(transfer, ()):
            for offset, size in _ranges(other, used):
                other.send(offset, size, into=memory, at=offset, queue=self._queues[transfer])
            self._sent[other] = memory, set(used)
        return True

    def before_split(self, i_split: int) -> None:
        """Forget what a failed compute has sent."""
        if i_split == 0:
            self._sent.clear()


def _ranges(transfer: Transfer, used: set[int]) -> list[tuple[int, int]]:
    source = transfer.source
    found = expert_copy_ranges(used, source.ne[2], source.nb[2], tensor_bytes=source.nbytes)
    return [(r.offset_bytes, r.size_bytes) for r in found]
