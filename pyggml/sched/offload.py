"""`CostOffload`: offloads an op if copying its weights and computing on the device takes less time than on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

from ..backend import Backend
from ..clock import VirtualClock
from ..opset import Role, ids_of, role_of
from ..routing import Routing
from ..tensor import Tensor
from ..types import Op

__all__ = ["CostOffload"]


class CostOffload:
    """An offload rule that compares times instead of tokens; give it to `Scheduler` or `Planner.open` as ``offload_rule``.

    Parameters
    ----------
    backends : sequence of Backend
        The scheduler's backends, the CPU last.
    clock : VirtualClock
        The clock, with the backends' profiles.
    routing : Routing
        Gives the number of experts that a micro-batch uses.

    Notes
    -----
    Upstream offloads every op with at least 32 rows (`GGML_OP_OFFLOAD_MIN_BATCH`), whatever the link. Here the copy of
    the used experts and the product on the device are compared with the product on the CPU; copies of activations are
    not counted. A bias of experts follows its product; other ops follow the device's own rule.
    """

    def __init__(self, backends: Sequence[Backend], clock: VirtualClock, routing: Routing) -> None:
        self.clock, self.routing = clock, routing
        self._index = {backend: i for i, backend in enumerate(backends)}
        self._cpu = backends[-1]

    def __call__(self, backend: Backend, op: Tensor) -> bool:
        """Return whether a device should run an op with a host weight."""
        first = op.src[0] if op.src else None
        if first is not None and role_of(first.op) is Role.PRODUCT and op.op is Op.ADD_ID:
            return self(backend, first)
        if role_of(op.op) is not Role.PRODUCT:
            return backend.offload_op(op)
        on_device, on_cpu = self.seconds(backend, op)
        return on_device < on_cpu

    def seconds(self, backend: Backend, op: Tensor) -> tuple[float, float]:
        """Return the seconds of a product on a device, including the copy of its weight, and on the CPU."""
        weight = op.src[0]
        assert weight is not None
        n_used, n_bytes = 0.0, weight.nbytes
        ids = ids_of(op, 0)
        if ids is not None:
            n_used = self.routing.used(weight.ne[2], ids.ne[0], ids.ne[1])
            n_bytes = round(n_bytes * n_used / weight.ne[2])

        def count(_: Tensor) -> float:
            return n_used

        i, cpu = self._index[backend], len(self.clock.profiles) - 1
        storage = weight.storage
        is_pinned = storage is not None and storage.buft.device is not self._cpu.device
        copy_s = self.clock.copy_seconds(i, n_bytes, is_pinned=is_pinned)
        return copy_s + self.clock.seconds(i, (op,), count), self.clock.seconds(cpu, (op,), count)
