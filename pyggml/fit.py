"""`fit_flags`: flags with which a model fits into the free memory of its devices, as llama.cpp's ``--fit`` finds them.

Memory is the scheduler's own reserve, asked of one planner whose flags change (`Planner.change`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .models.context import ContextFlags
from .models.placement import PlacementFlags

if TYPE_CHECKING:
    from .planning import Planner

__all__ = ["Fit", "fit_flags"]

#: ``--fit-target`` and ``--fit-ctx`` of llama.cpp.
MARGIN_BYTES = 1 << 30
N_CTX_MIN = 4096
#: What of the first layer that is on a device in part stays elsewhere, by what stays on the device.
_OVERFLOW = {
    "attn": "ffn_(gate|up|gate_up|down).*",
    "up": "ffn_(gate|gate_up|down).*",
    "gate": "ffn_down.*",
    "moe": "ffn_(up|down|gate_up|gate)_(ch|)exps",
}


@dataclass(frozen=True, slots=True)
class Fit:
    """What was found.

    Attributes
    ----------
    placement, context
        The flags.
    note : str
        Why nothing better was found, in llama.cpp's terms; empty if the margins hold.
    n_tried : int
        How many settings were planned.
    """

    placement: PlacementFlags
    context: ContextFlags
    note: str
    n_tried: int

    @property
    def text(self) -> str:
        """The flags that were set, as a command line has them."""
        p = self.placement
        words = [] if p.n_gpu_layers < 0 else [f"-ngl {p.n_gpu_layers}"]
        words += [f"-c {self.context.n_ctx}"] if self.context.n_ctx else []
        if p.tensor_split:
            words.append(f"-ts {','.join(f'{s:g}' for s in p.tensor_split)}")
        return " ".join([*words, *(f"-ot '{o}'" if "=" in o else o for o in p.overrides)])

    @property
    def line(self) -> str:
        """A line for people: what became of ``-ngl auto``."""
        return f"-ngl auto: {self.text or 'all layers'}{f' ({self.note})' if self.note else ''}"


@dataclass(slots=True)
class _Share:
    """The layers of one device, the output among them on the last."""

    n_layer: int = 0
    n_part: int = 0  #: of them those whose experts, or more, are elsewhere
    overflow: str = "moe"  #: of the first of these
    to: str = "CPU"  #: where that one's rest goes

    @property
    def n_full(self) -> int:
        """Layers that are on the device whole."""
        return self.n_layer - self.n_part


def fit_flags(planner: Planner, placement: PlacementFlags, context: ContextFlags) -> Fit:
    """Return flags with which a model leaves `MARGIN_BYTES` of each device's memory free.

    The context gets smaller first, if its size was not given; then layers go to the host, or, of a mixture of experts,
    experts.

    Parameters
    ----------
    planner : Planner
        Without data. Its flags change; give it the result, or close it.
    placement, context
        The flags that the user gave, ``-ngl`` being auto.

    Notes
    -----
    Mirrors `common_fit_params`. Differs: a device whose memory is unknown counts as one without.
    """
    return _Fitter(planner, placement, context).run()


@dataclass(slots=True)
class _Fitter:
    planner: Planner
    placement: PlacementFlags
    context: ContextFlags
    n_tried: int = 0
    shares: list[_Share] = field(default_factory=list)
    mem: list[int] = field(default_factory=list)
    start: int = 0  #: first of the devices whose layers are there in part

    def run(self) -> Fit:
        """Find the flags."""
        devices = self.planner.backends[:-1]
        n_dev = len(devices)
        free = [b.device.memory()[0] for b in devices] or [self.planner.backends[-1].device.memory()[1]]
        targets = [n - MARGIN_BYTES for n in free]
        n_ctx_auto = self.context.n_ctx == 0
        if n_ctx_auto:  # as much for each sequence as the model was trained with
            self.context = replace(self.context, n_ctx=self._n_ctx_max)
        full = self._measure(self.placement)
        if all(used <= target for used, target in zip(full, targets, strict=True)):
            return self._found("")
        if sum(targets) < sum(full) and n_ctx_auto and self._shrink_context(full, free) and n_dev <= 1:
            return self._found("")
        if not n_dev:
            return self._found("the model does not fit into the host's memory, however small the context")
        given = (
            "-ot, --cpu-moe or --n-cpu-moe"
            if self._has_overrides
            else "-ts"
            if any(self.placement.tensor_split)
            else ""
        )
        if given:
            return self._found(f"{given} was given, so that nothing else is changed")
        surplus = 0
        if self.planner.hparams.n_expert:
            surplus = sum(targets) - sum(self._measure(replace(self.placement, overrides=("--cpu-moe",))))
        self.shares = [_Share() for _ in devices]
        self.mem = self._measure_shares(self.shares)
        self._fill(targets)
        if surplus > 0:
            self._convert(targets)
        self.placement = self._flags(self.shares)
        fits = all(used <= target for used, target in zip(self.mem, targets, strict=True))
        return self._found("" if fits else "not even a smaller context without any layer leaves the margin")

    # -- what is asked -------------------------------------------------------

    @property
    def _n_layer(self) -> int:
        return self.planner.hparams.n_layer

    @property
    def _n_streams(self) -> int:
        return 1 if self.context.kv_unified else max(1, self.context.n_seq_max)

    @property
    def _n_ctx_max(self) -> int:
        return self.planner.hparams.n_ctx_train * self._n_streams

    @property
    def _has_overrides(self) -> bool:
        p = self.placement
        return bool(p.overrides or p.cpu_moe or p.n_cpu_moe)

    def _found(self, note: str) -> Fit:
        return Fit(replace(self.placement, fit=False), self.context, note, self.n_tried)

    def _measure(self, placement: PlacementFlags) -> list[int]:
        """Return the bytes of each device, or of the host if there is none."""
        self.n_tried += 1
        self.planner.change(replace(placement, fit=False), self.context)
        backends = self.planner.backends[:-1]
        own = {b.buffer_type.name: i for i, b in enumerate(backends)}
        used = [0] * max(1, len(backends))
        for m in self.planner.memory():
            i = own.get(m.buft, -1 if backends else 0)
            if i >= 0:
                used[i] += m.total - m.compute
        for i, size in enumerate(self._compute_bytes()[: len(used)]):
            used[i] += size
        return used

    def _compute_bytes(self) -> list[int]:
        """Return the compute memory of each device, then of the host, as ``--fit`` sees it.

        Notes
        -----
        Mirrors `ggml_backend_sched_reserve_size`, which resets the scheduler and thereby drops the pins of norms. With
        several devices it measures more than a context then takes: where a device's first layer begins, two tensors are
        copied instead of one.
        """
        planner, p = self.planner, self.planner.params
        if len(planner.backends) < 3 and p.offload_kqv:  # a pin to the only device changes nothing
            return [m.compute for m in planner.memory()]
        planner.sched.reset()
        n_tokens = min(p.n_ctx, p.n_ubatch)
        n_outputs = min(n_tokens, p.n_outputs_max or p.n_batch)
        planner.sched.split_graph(planner.source.reserved(n_tokens, p.n_seq_max, n_outputs).graph)
        return planner.size_of_split()

    def _measure_shares(self, shares: Sequence[_Share]) -> list[int]:
        return self._measure(self._flags(shares))

    def _flags(self, shares: Sequence[_Share]) -> PlacementFlags:
        """Return the flags of shares.

        Notes
        -----
        Mirrors `set_ngl_tensor_split_tbo`. Differs: its pattern for the layer after the last, which matches no weight,
        is left out.
        """
        n_layers = sum(s.n_layer for s in shares)
        first = self._n_layer + 1 - n_layers
        overrides: list[str] = []
        for share in shares:
            first += share.n_full
            for i in range(share.n_part):
                kind, where = (share.overflow, share.to) if i == 0 else ("moe", "CPU")
                if first + i < self._n_layer:
                    overrides.append(rf"blk\.{first + i}\.{_OVERFLOW[kind]}={where}")
            first += share.n_part
        split = tuple(float(s.n_layer) for s in shares) if len(shares) > 1 else ()
        return replace(self.placement, n_gpu_layers=n_layers, tensor_split=split, overrides=tuple(overrides))

    # -- the steps -----------------------------------------------------------

    def _shrink_context(self, full: Sequence[int], free: Sequence[int]) -> bool:
        """Make the context smaller; return whether the whole model then fits."""
        largest, smallest = self._n_ctx_max, N_CTX_MIN * self._n_streams
        if largest <= smallest:
            return False
        target = sum(free) - MARGIN_BYTES * len(free)
        if len(free) > 1:
            weights = self.planner.placement.weight_bytes()
            on_devices = sum(weights.get(b.buffer_type, 0) for b in self.planner.backends[:-1])
            target -= (len(free) + 1) * (on_devices // self._n_layer) // (6 if self.planner.hparams.n_expert else 2)
        self.context = replace(self.context, n_ctx=smallest)
        least = sum(self._measure(self.placement))
        if target <= least:
            return False
        n_ctx = smallest + (largest - smallest) * (target - least) // max(sum(full) - least, 1)
        step = 256 * self._n_streams
        self.context = replace(self.context, n_ctx=max(n_ctx - n_ctx % step, smallest))
        return True

    def _between(
        self,
        i: int,
        targets: Sequence[int],
        high: list[_Share],
        count: Callable[[_Share], int],
        step: Callable[[int], list[_Share]],
    ) -> None:
        """Move a device's share up to what just fits, by false position, where ``high`` does not fit."""
        mem_high = self._measure_shares(high)
        if mem_high[i] <= targets[i]:
            self.shares, self.mem = high, mem_high
            return
        delta = count(high[i]) - count(self.shares[i])
        while delta > 1:
            n = delta * (targets[i] - self.mem[i]) // (mem_high[i] - self.mem[i]) if mem_high[i] > self.mem[i] else 1
            tried = step(min(max(n, 1), delta - 1))
            mem = self._measure_shares(tried)
            if mem[i] <= targets[i]:
                self.shares, self.mem = tried, mem
            else:
                high, mem_high = tried, mem
            delta = count(high[i]) - count(self.shares[i])

    def _fill(self, targets: Sequence[int]) -> None:
        """Give devices layers from the last to the first; of a mixture of experts without the experts."""
        is_moe, last = self.planner.hparams.n_expert > 0, len(targets) - 1
        for i in range(last, -1, -1):
            left = self._n_layer + 1 - sum(s.n_layer for s in self.shares[i + 1 :])
            high = _copied(self.shares)
            high[i].n_layer = left
            if is_moe:
                high[i].n_part = left - (i == last)
            if not left:
                continue

            def step(n: int, i: int = i) -> list[_Share]:
                tried = _copied(self.shares)
                tried[i].n_layer += n
                if is_moe:  # the output is the first that a device gets, and always whole
                    tried[i].n_part += n - 1 if i == last and tried[i].n_part == 0 else n
                return tried

            self._between(i, targets, high, lambda s: s.n_layer, step)

    def _convert(self, targets: Sequence[int]) -> None:
        """Make layers whole, from the first on, until the devices are full; of one more a part."""
        last = len(targets) - 1
        if not any(share.n_layer for share in self.shares):
            return
        self.start = next(i for i, share in enumerate(self.shares) if share.n_layer)
        for i in range(last + 1):
            if i > self.start:
                break
            high = _copied(self.shares)
            for j in range(self.start, last + 1):
                moved = high[j].n_layer - (j == last)
                high[i].n_layer += moved
                high[j].n_layer -= moved
                high[j].n_part = 0

            def step(n: int, i: int = i) -> list[_Share]:
                tried = _copied(self.shares)
                for share in tried[self.start :]:
                    moved = min(n, share.n_part)
                    share.n_layer -= moved
                    share.n_part -= moved
                    tried[i].n_layer += moved
                    n -= moved
                    if share.n_part:
                        break
                return tried

            self._between(i, targets, high, lambda s: s.n_full, step)
            self.start = next((j for j in range(self.start, last + 1) if self.shares[j].n_part), last)
            self._convert_part(i, targets)

    def _convert_part(self, i: int, targets: Sequence[int]) -> None:
        """Try to fit a part of one more layer; its rest goes to the next device, or to the host."""
        last = len(targets) - 1
        if self.shares[self.start].n_layer <= (i == last) or not self.shares[self.start].n_part:
            return
        to = self.planner.backends[i + 1].buffer_type.name if i < last else "CPU"
        part = _copied(self.shares)
        part[self.start].n_layer -= 1
        part[self.start].n_part -= 1
        part[i].n_layer += 1
        part[i].n_part += 1
        start = self.start if part[self.start].n_part else min(self.start + 1, last)
        for kind in ("up", "gate"):
            if not self._try(part, i, kind, to, targets, start):
                if kind == "up":
                    self._try(part, i, "attn", to, targets, start)
                return

    def _try(self, part: list[_Share], i: int, kind: str, to: str, targets: Sequence[int], start: int) -> bool:
        tried = _copied(part)
        tried[i].overflow, tried[i].to = kind, to
        mem = self._measure_shares(tried)
        fits = mem[i] < targets[i] and (i + 1 == len(targets) or mem[i + 1] < targets[i + 1])
        if fits:
            self.shares, self.mem, self.start = tried, mem, start
        return fits


def _copied(shares: Sequence[_Share]) -> list[_Share]:
    return [replace(share) for share in shares]
