"""The time of a token with a cache, as a sum of named terms on a named machine.

``device_s``: the device reads the experts in use and the dense weights, if their size is known. ``copy_s``: misses are
copied over the link, one copy for each expert and projection. ``sync_s``: the host waits for each layer's ids and reads
them. ``cpu_s``: the CPU reads layers that are not on the device. Nothing overlaps, as in llama.cpp, which copies
experts in the device's own stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..cost import CPU_PROFILE, DeviceProfile
from ..hardware.formulas import Work
from .pools import Pools, RequestKeys, request_keys
from .replay import Result, Setting
from .trace import Trace

__all__ = ["Machine", "ResidentLayers", "TokenTime", "Workload", "break_even", "resident_layers"]

#: Launches of a layer's experts, without attention: norm, router, top-k, three products, activation, weighting, sum.
_KERNELS_OF_EXPERTS = 12


@dataclass(frozen=True, slots=True)
class TokenTime:
    """Seconds a token takes, by term."""

    device_s: float
    copy_s: float
    sync_s: float
    cpu_s: float = 0.0

    @property
    def total_s(self) -> float:
        """The sum."""
        return self.device_s + self.copy_s + self.sync_s + self.cpu_s

    def json(self) -> dict[str, float]:
        """Return the terms in ms, and their sum."""
        return {name: round(1e3 * getattr(self, f"{name}_s"), 6) for name in ("device", "copy", "sync", "cpu", "total")}


@dataclass(frozen=True, slots=True)
class Machine:
    """A device, its link, and the host."""

    device: DeviceProfile
    host: DeviceProfile = CPU_PROFILE

    def json(self) -> dict[str, float | str]:
        """Return the rates from which times are computed."""
        return {
            "name": self.device.name,
            "link_gb_per_s": self.device.link.bytes_per_s / 1e9,
            "copy_latency_us": self.device.link.latency_s * 1e6,
            "device_gb_per_s": self.device.memory_bytes_per_s / 1e9,
            "host_gb_per_s": self.host.memory_bytes_per_s / 1e9,
            "launch_us": self.device.launch_s * 1e6,
        }


@dataclass(frozen=True, slots=True)
class Workload:
    """The bytes and waits of a trace's tokens without a cache, summed over tokens.

    Attributes
    ----------
    n_token, n_layer_step : int
        Tokens; computes of a layer with experts.
    expert_bytes : int
        Bytes of the distinct experts of all events.
    by_layer : float64, (n_layer_with_experts,)
        The same, by layer.
    n_projection : int
        Copies per miss.
    """

    n_token: int
    n_layer_step: int
    expert_bytes: int
    by_layer: tuple[int, ...]
    steps_by_layer: tuple[int, ...]
    n_projection: int
    dense_bytes: int = 0

    @classmethod
    def of(cls, trace: Trace, setting: Setting, *, dense_bytes: int = 0) -> Workload:
        """Return the workload of a trace's phase; each step also reads ``dense_bytes`` of other weights."""
        pools = Pools.of(trace, "layer")
        n_token = n_layer_step = 0
        touches = np.zeros(pools.n_pool, np.int64)
        steps = np.zeros(pools.n_pool, np.int64)
        n_step = 0
        for run in request_keys(trace, pools, phase=setting.phase, contract="event"):
            n_token += run.n_token
            n_layer_step += len(run.pool)
            touches += np.bincount(run.touch_pool, minlength=pools.n_pool)
            steps += np.bincount(run.pool, minlength=pools.n_pool)
            n_step += _steps(run)
        by_layer = touches * pools.sizes[:, 0]
        n_projection = (
            3 if trace.expert_bytes is None or trace.expert_bytes.shape[1] == 1 else trace.expert_bytes.shape[1]
        )
        return cls(
            n_token, n_layer_step, int(by_layer.sum()), tuple(by_layer.tolist()), tuple(steps.tolist()), n_projection,
            dense_bytes * n_step,
        )  # fmt: skip

    def seconds(self, machine: Machine, bytes_read: int, n_miss: int) -> TokenTime:
        """Return the mean time of a token with a cache that copied ``bytes_read`` for ``n_miss`` misses."""
        device = machine.device.seconds(
            Work(read_bytes=self.expert_bytes + self.dense_bytes, n_kernels=_KERNELS_OF_EXPERTS * self.n_layer_step)
        )
        copy = machine.device.link.seconds(bytes_read, n_copies=n_miss * self.n_projection)
        sync = self.n_layer_step * machine.device.from_device.latency_s
        n = max(1, self.n_token)
        return TokenTime(device / n, copy / n, sync / n)

    def of_result(self, machine: Machine, result: Result) -> TokenTime | None:
        """Return the mean time of a token with a replayed cache; None if the experts' bytes are unknown."""
        if result.bytes_read is None:
            return None
        return self.seconds(machine, result.bytes_read - result.preload_bytes, result.touches - result.hits)


def _steps(run: RequestKeys) -> int:
    return int((np.diff(run.step) != 0).sum()) + 1


@dataclass(frozen=True, slots=True)
class ResidentLayers:
    """The cache's bytes used for whole layers: their experts are on the device, the CPU computes the other layers'."""

    capacity_bytes: int
    n_resident: int
    n_layer: int
    time: TokenTime


def resident_layers(trace: Trace, work: Workload, machine: Machine, capacity_bytes: int) -> ResidentLayers:
    """Return the layers that fit into a cache's bytes, the last layers first, as with ``--n-cpu-moe``."""
    sizes = [int(n) * trace.n_expert for n in trace.bytes_of_layer[trace.layers]]
    left, resident = capacity_bytes, 0
    while resident < len(sizes) and sizes[-1 - resident] <= left:
        left -= sizes[-1 - resident]
        resident += 1
    on_device = slice(len(sizes) - resident, None)
    host_bytes = work.expert_bytes - sum(work.by_layer[on_device])
    host_steps = work.n_layer_step - sum(work.steps_by_layer[on_device])
    n = max(1, work.n_token)
    device_s = machine.device.seconds(
        Work(
            read_bytes=work.expert_bytes - host_bytes + work.dense_bytes,
            n_kernels=_KERNELS_OF_EXPERTS * work.n_layer_step,
        )
    )
    cpu_s = machine.host.seconds(Work(read_bytes=host_bytes, n_kernels=4 * host_steps)) if host_steps else 0.0
    # activations are copied to the host and back: a wait for each layer that the CPU computes
    sync_s = host_steps * (machine.device.link.latency_s + machine.device.from_device.latency_s)
    return ResidentLayers(capacity_bytes, resident, len(sizes), TokenTime(device_s / n, 0.0, sync_s / n, cpu_s / n))


def break_even(machine: Machine, expert_bytes: float, n_projection: int, hidden_s: float) -> float | None:
    """Return the precision above which prefetching an expert saves time.

    A right guess hides up to ``hidden_s`` of a copy behind a compute. A wrong one occupies the link and delays the next
    copy by the part that is not hidden. None if no precision is enough: a copy ends before anything can be gained.

    Parameters
    ----------
    expert_bytes : float
        Bytes of one expert.
    hidden_s : float
        Seconds of compute between the guess and the use.
    """
    copy_s = machine.device.link.seconds(round(expert_bytes), n_copies=n_projection)
    gain = min(copy_s, hidden_s)
    loss = max(0.0, copy_s - hidden_s)
    if gain <= 0:
        return None
    return loss / (gain + loss)
