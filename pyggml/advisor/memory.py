"""The memory of settings: weights from the file's header, and the scheduler's reserve where it is needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import add
from typing import NamedTuple

from ..backend import Backend
from ..cost import host_profile
from ..errors import DeviceUnavailableError, ModelError, PyggmlError
from ..fit import Fit, fit_flags
from ..foresight.estimate import Setting, devices_of, has_host_experts, overridden, place_key
from ..gguf import GGUFFile
from ..hardware.cards import Card
from ..hardware.hosts import Host
from ..models.architectures import read_hparams
from ..models.caches import make_cache
from ..models.context import ContextFlags, ContextParams
from ..models.hparams import HParams
from ..moe_cache import LlamaCache
from ..planning import Planner, virtual_clock
from ..types import Type
from .settings import context_flags, is_experts_only, numbers_pattern, placement_flags

__all__ = ["DeviceMemory", "FitChoice", "MemoryModel", "ask_llama", "fit_setting"]

#: How far compute buffers of settings that are alike may be apart; another KV type changed them by up to 1.4 times.
_SLACK = 0.7


#: So many refusals with the same words, and nothing else before, are about the model or about the types of the KV cache, not a setting.
_MOST_REFUSALS = 3


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The memory of a setting on one device or on the host.

    Attributes
    ----------
    of_bytes : int
        The size of the memory; 0 if unknown.
    margin_bytes : int
        The bytes to keep free.
    """

    device: str
    bytes: int
    of_bytes: int
    margin_bytes: int = 0

    @property
    def fits(self) -> bool:
        """Whether the margin stays free."""
        return not self.of_bytes or self.bytes + self.margin_bytes <= self.of_bytes

    @property
    def missing_bytes(self) -> int:
        """The bytes that are missing."""
        return 0 if self.fits else self.bytes + self.margin_bytes - self.of_bytes


class _Kind(NamedTuple):
    """What of a setting changes its compute buffers; ``others``: all but micro-batch and KV types."""

    n_ubatch: int
    type_k: Type
    type_v: Type
    others: tuple[object, ...]


class MemoryModel:
    """The memory of any setting of one model on one machine.

    A setting's weights are known from the header. KV cache and compute buffers come from the scheduler's reserve: `exact`
    calculates them for a setting, and `estimate` takes them from the nearest such setting, the cache by the layers on each
    device, because compute buffers hardly depend on the number of layers on the host. Of a mapped file the weights on the host
    count, not the range that llama.cpp reports.

    Parameters
    ----------
    backends : sequence of Backend
        Backends without data; the last is the CPU.
    host : Host
        Of the machine; a planner's virtual clock and the size of the RAM are its.
    margin_bytes : int
        The bytes to keep free on each device and on the host.
    """

    def __init__(
        self, file: GGUFFile, backends: Sequence[Backend], n_ctx: int, *, host: Host, margin_bytes: int
    ) -> None:
        self.file, self.backends, self.n_ctx = file, list(backends), n_ctx
        self.host, self.margin_bytes = host, margin_bytes
        self.n_opened = 0
        self._hparams = hp = _hparams(file)
        found = _weights(file, None if hp is None else hp.n_layer)
        self._others, self._experts, self._input, self._output, self._tied = found
        self._layers = [sum(sizes.values()) for sizes in self._others]
        self.has_window = f"{file.metadata.get('general.architecture')}.attention.sliding_window" in file.metadata
        self._rest: dict[_Kind, list[int]] = {}
        self._bounds: dict[tuple[_Kind, bool], list[int] | None] = {}  #: by what is known now of the rest
        self._has_room: dict[tuple[object, ...], bool] = {}  #: for weights alone
        self._caches: dict[tuple[object, ...], list[int]] = {}  #: bytes of KV caches by layer, or by device
        self._least: dict[_Kind, list[int]] = {}  #: the rest by the devices that are used, whatever their shares
        self._least_of: dict[tuple[_Kind, _Kind], list[int] | None] = {}  #: what follows from that now
        self._has_equal_layers = True  #: whether all layers were seen to have equal parts of the KV cache
        self._exact: dict[Setting, list[DeviceMemory] | None] = {}
        self.refused: dict[Setting, str] = {}  #: why a setting cannot be planned at all
        self._refusals: dict[tuple[Type, Type], list[str] | None] = {}  #: the first by KV types; None: one was planned
        self._sizes = [b.device.memory()[1] for b in self.backends[:-1]]
        self._of_bytes = [*self._sizes, host.memory_bytes]
        profiles = [b.device.profile for b in self.backends[:-1]]
        sheets = [p.sheet if p is not None else None for p in profiles]
        #: devices whose memory is the host's
        self._shared = [
            i for i, s in enumerate(sheets) if isinstance(s, Card) and s.is_unified and host.memory_bytes > 0
        ]
        self._planner: Planner | None = None
        self._at: tuple[object, ...] = ()
        self._weights: dict[tuple[object, ...], list[int]] = {}
        self._devices: dict[tuple[object, ...], list[int]] = {}
        self._cached: dict[tuple[object, ...], list[int]] = {}

    @property
    def n_layer(self) -> int:
        """The number of layers, without the output."""
        return len(self._layers)

    # -- weights -------------------------------------------------------------

    def weights(self, setting: Setting) -> list[int]:
        """Return the bytes of weights on each device, then on the host; what an override moves to another device is not counted there."""
        key = place_key(setting)
        if key not in self._weights:
            self._weights[key] = self._weights_of(setting)
        return self._weights[key]

    def _weights_of(self, setting: Setting) -> list[int]:
        n_dev = len(self.backends) - 1
        out = [0] * (n_dev + 1)
        *devices, last = self._devices_of(setting)
        for i, (device, every, experts) in enumerate(zip(devices, self._layers, self._experts, strict=True)):
            if setting.overrides and device >= 0:
                moved = sum(n for name, n in self._others[i].items() if overridden(setting.overrides, i, name))
                out[n_dev] += moved
                every -= moved
            out[device if device >= 0 else n_dev] += every
            out[n_dev if device < 0 or has_host_experts(i, device, setting) else device] += experts
        out[last] += self._output + (self._tied if last >= 0 else 0)
        out[n_dev] += self._input
        return out

    def estimate(self, setting: Setting) -> list[DeviceMemory] | None:
        """Return the memory of a setting, by the rest of one that is alike; None if no such setting was asked for."""
        known = self._exact.get(setting)
        if known is not None:
            return known
        rest = self._rest.get(self._key(setting))
        return None if rest is None else self.devices(self._with(setting, rest))

    def _with(self, setting: Setting, rest: list[int]) -> list[int]:
        """Return the bytes of a setting on each device, then on the host; ``rest``: of its compute buffers, then of the KV cache."""
        parts = zip(
            self.weights(setting), self._cache_of(setting, rest[-1]), self._slots_of(setting), rest, strict=False
        )
        return list(map(sum, parts))

    def _slots_of(self, setting: Setting) -> list[int]:
        """Return the bytes of the expert cache on each device, then on the host: all of its budget, where layers have host experts."""
        out = [0] * len(self.backends)
        if setting.moe_cache_mib:
            shares = setting.tensor_split if any(setting.tensor_split) else self._sizes
            cached = self._cached_on(setting)
            total = sum(shares[i] for i in cached)
            for i in cached:
                out[i] = int((setting.moe_cache_mib << 20) * shares[i] / total)
        return out

    def _cached_on(self, setting: Setting) -> list[int]:
        """Return the devices with layers whose experts are on the host."""
        key = place_key(setting)
        if key not in self._cached:
            layers = enumerate(zip(self._devices_of(setting), self._experts, strict=False))
            self._cached[key] = sorted({d for i, (d, n) in layers if n and d >= 0 and has_host_experts(i, d, setting)})
        return self._cached[key]

    def spare_for_slots(self, setting: Setting, taken: Sequence[DeviceMemory]) -> int:
        """Return how many more bytes the expert cache of a setting may have, whose memory is ``taken``; below 0 that it has too many."""
        shares = setting.tensor_split if any(setting.tensor_split) else self._sizes
        cached = self._cached_on(setting)
        total = sum(shares[i] for i in cached)
        spare = ((taken[i].of_bytes - taken[i].margin_bytes - taken[i].bytes) * total / shares[i] for i in cached)
        return int(min(spare, default=0))

    def _cache_of(self, setting: Setting, total: int) -> list[int]:
        """Return the bytes of the KV cache on each device, then on the host; without sizes from the header, layers have equal parts."""
        n_dev, hp = len(self.backends) - 1, self._hparams
        size = (
            total if hp is None else 0,
            setting.type_k,
            setting.type_v,
            setting.flash_attn,
            setting.n_ubatch if self.has_window else 0,
        )
        if size not in self._caches:
            n = len(self._layers)
            each = [-(-total // max(n, 1))] * n
            self._caches[size] = each if hp is None else _cache_of_layers(hp, context_flags(setting, self.n_ctx))
        if not setting.kv_offload:
            return [0] * n_dev + [sum(self._caches[size])]
        key = size, self._devices_key(setting)
        if key not in self._caches:
            self._caches[key] = taken = [0] * (n_dev + 1)
            for device, n_bytes in zip(self._devices_of(setting), self._caches[size], strict=False):
                taken[device] += n_bytes
        return self._caches[key]

    @staticmethod
    def _devices_key(setting: Setting) -> tuple[object, ...]:
        return setting.n_gpu_layers, setting.tensor_split, setting.no_gpu

    def _devices_of(self, setting: Setting) -> list[int]:
        """Return the device of each layer, then of the output; -1: the host."""
        key = self._devices_key(setting)
        if key not in self._devices:
            self._devices[key] = devices_of(len(self._layers), setting, self._sizes)
        return self._devices[key]

    def kv_bytes(self, setting: Setting) -> int:
        """Return the bytes of the KV cache of a setting that was planned, or is like one; 0 if none was."""
        return self._rest.get(self._key(setting), [0])[-1]

    def may_fit(self, setting: Setting) -> bool:
        """Return whether nothing known speaks against a setting: what it takes at least, or with the rest of one that is alike."""
        rest = None
        if self._rest:
            known = self._exact.get(setting)
            if known is not None:
                return all(d.fits for d in known)
            rest = self._rest.get(self._key(setting))
        if rest is not None:
            return self._has_room_for(self._with(setting, rest))
        key = place_key(setting)
        if key not in self._has_room:
            self._has_room[key] = self._has_room_for(self.weights(setting))
        return self._has_room[key] and self._has_room_for(self._at_least(setting))

    def _has_room_for(self, taken: list[int]) -> bool:
        margin = self.margin_bytes
        return all(not size or n + margin <= size for n, size in zip(taken, self._room(taken), strict=True))

    def at_least(self, setting: Setting) -> list[DeviceMemory]:
        """Return what a setting takes at least, also if nothing like it was planned."""
        return self.devices(self._at_least(setting))

    def _at_least(self, setting: Setting) -> list[int]:
        """Return the least bytes on each device, then on the host, by the header and by settings of another micro-batch or KV type.

        Notes
        -----
        The logits and the last norm of all tokens of a micro-batch stay in the compute buffer of the output's device to the end.
        """
        taken = list(map(add, self.weights(setting), self._slots_of(setting)))
        if setting.overrides and not is_experts_only(setting):
            return taken
        hp, at = self._hparams, self._devices_of(setting)[-1]
        if hp is not None:
            taken = list(map(add, taken, self._cache_of(setting, 0)))
            if at >= 0:
                taken[at] += 4 * min(setting.n_ubatch, setting.n_batch, self.n_ctx) * (hp.n_vocab + hp.n_embd)
        rest = self._bound_of_rest(setting, is_lower=True)
        return taken if rest is None else list(map(max, taken, self._with(setting, rest)))

    def at_most(self, setting: Setting) -> list[DeviceMemory] | None:
        """Return what a setting takes about at most, by some of another micro-batch or KV type; None if there are none."""
        rest = self._bound_of_rest(setting, is_lower=False)
        return None if rest is None else self.devices(self._with(setting, rest))

    def least_missing(self, setting: Setting) -> int:
        """Return the bytes that a setting lacks at least, by what is known of settings like it and of those with other shares."""
        taken = self.estimate(setting)
        if taken is None:
            key = self._key(setting), self._key(setting, self._used_by(setting))
            if key not in self._least_of:
                self._least_of[key] = self._least_rest(setting)
            rest = self._least_of[key]
            least = self._at_least(setting)
            taken = self.devices(least if rest is None else list(map(max, least, self._with(setting, rest))))
        return sum(d.missing_bytes for d in taken)

    def _least_rest(self, setting: Setting) -> list[int] | None:
        """Return the least rest: other shares of the same devices need the same buffers, a larger micro-batch no smaller ones."""
        rest = self._bound_of_rest(setting, is_lower=True)
        if not self._has_equal_layers or (setting.overrides and not is_experts_only(setting)):
            return rest
        own, bounds = self._key(setting, self._used_by(setting)), [] if rest is None else [rest]
        for kind, (*computed, cache) in self._least.items():
            is_less = kind.n_ubatch <= own.n_ubatch and kind[1:] == own[1:]
            known = computed if is_less else [0] * len(computed)
            bounds.append([*known, self._cache_bound(cache, own, kind, is_lower=True)])
        return list(map(max, zip(*bounds, strict=True))) if bounds else None

    def _bound_of_rest(self, setting: Setting, *, is_lower: bool) -> list[int] | None:
        """Return a bound of the rest by settings of another micro-batch or KV type; None if there are none.

        Notes
        -----
        Compute buffers grow with the micro-batch, at most in proportion, and depend little on the KV type; `_SLACK` is for
        that, and for holes between results.
        """
        if not self._rest or (setting.overrides and not is_experts_only(setting)):
            return None
        own = self._key(setting)
        if (own, is_lower) not in self._bounds:
            self._bounds[own, is_lower] = self._bound_of_kind(own, is_lower=is_lower)
        return self._bounds[own, is_lower]

    def _bound_of_kind(self, own: _Kind, *, is_lower: bool) -> list[int] | None:
        bounds = []
        for kind, (*rest, cache) in self._rest.items():
            if kind.others == own.others:
                ratio = own.n_ubatch / kind.n_ubatch
                scale = min(1.0, ratio) * _SLACK if is_lower else max(1.0, ratio)
                rest = [int(size * scale) if size > 0 else size for size in rest]
                bounds.append([*rest, self._cache_bound(cache, own, kind, is_lower=is_lower)])
        if not bounds:
            return None
        return list(map(max if is_lower else min, zip(*bounds, strict=True)))

    def _cache_bound(self, cache: int, own: _Kind, kind: _Kind, *, is_lower: bool) -> int:
        """Return the bytes of the cache by those of another kind; a cache with a window grows with the micro-batch."""
        pick = min if is_lower else max
        scale = pick(
            now.row_size(256) / then.row_size(256)
            for now, then in ((own.type_k, kind.type_k), (own.type_v, kind.type_v))
        )
        return int(cache * scale * (pick(1.0, own.n_ubatch / kind.n_ubatch) if self.has_window else 1.0))

    def exact(self, setting: Setting) -> list[DeviceMemory] | None:
        """Return the memory of a setting as the scheduler reserves it; None if it cannot be planned at all.

        Raises
        ------
        ModelError
            llama.cpp refused the first settings with the same words: it refuses the model.
        """
        if setting not in self._exact:
            told = self._refusals.get((setting.type_k, setting.type_v))
            if told is not None and len(told) == _MOST_REFUSALS and len(set(told)) == 1:
                self.refused[setting], self._exact[setting] = told[0], None
            else:
                self._exact[setting] = self._open(setting)
        return self._exact[setting]

    def _open(self, setting: Setting) -> list[DeviceMemory] | None:
        self.n_opened += 1
        types = setting.type_k, setting.type_v
        try:
            planner = self.planner(setting)
            rows, gap = planner.memory(), planner.placement.gap_bytes()
        except PyggmlError as error:
            self.refused[setting] = error.message
            told = self._refusals.setdefault(types, [])
            if told is not None and len(told) < _MOST_REFUSALS:
                told.append(error.message)
            first = list(self.refused.values())[:_MOST_REFUSALS]
            if (
                isinstance(error, ModelError)
                and not any(self._exact.values())
                and first == [error.message] * _MOST_REFUSALS
            ):
                raise
            return None
        self._refusals[types] = None
        taken = self._by_device({m.buft: m.total for m in rows})
        cached = self._by_device({m.buft: m.cache for m in rows})
        cache = sum(cached)
        taken[-1] -= gap  # the file's weights between those on the host are read once, for a device
        if setting.moe_cache_mib or (setting.overrides and not is_experts_only(setting)):
            return self.devices(taken)  # what follows from the header is not what was planned
        known = [a + b for a, b in zip(self.weights(setting), self._cache_of(setting, cache), strict=True)]
        rest = [*(a - b for a, b in zip(taken, known, strict=True)), cache]
        kind = self._key(setting)
        kept = self._rest.get(kind)
        self._bounds.clear()
        self._rest[kind] = rest if kept is None else list(map(max, rest, kept))
        self._has_equal_layers &= cached == self._cache_of(setting, cache)
        alike = self._key(setting, self._used_by(setting))
        kept = self._least.get(alike)
        self._least[alike] = rest if kept is None else list(map(min, rest, kept))
        self._least_of.clear()
        return self.devices(taken)

    def close(self) -> None:
        """Close the planner that is kept for the next setting."""
        if self._planner is not None:
            self._planner.close()
            self._planner = None

    def planner(self, setting: Setting) -> Planner:
        """Return a planner of a setting, without data; it is this model's own, and the next setting changes it."""
        placement, context = placement_flags(setting), context_flags(setting, self.n_ctx)
        host = self.host.with_threads(setting.threads)
        mib, misses = setting.moe_cache_mib, setting.moe_cache_misses
        rule = LlamaCache(mib << 20, misses="cpu" if misses == "cpu" else "copy") if mib else None
        at = (placement, context, host, rule)
        if self._planner is not None and not self._planner.is_closed and self._at[2:] == at[2:]:
            if self._at != at:
                self._at = ()
                self._planner.change(placement, context)
        else:
            self.close()  # before the next: both would hold memory of the devices
            # to open with patterns would warn of those that match nothing; a cache needs the experts that they move
            plain = placement if rule is not None else replace(placement, overrides=())
            self._planner = Planner.open(
                self.file,
                devices=self.backends[:-1],
                cpu=self.backends[-1],
                placement=plain,
                context=context,
                data=False,
                strict=True,
                clock=virtual_clock(self.backends, host_profile(host)),
                expert_cache=rule,
            )
            if plain != placement:
                self._planner.change(placement, context)
        self._at = at
        return self._planner

    def _by_device(self, sizes: Mapping[str, int]) -> list[int]:
        own = {b.buffer_type.name: i for i, b in enumerate(self.backends[:-1])}
        out = [0] * len(self.backends)
        for buft, size in sizes.items():
            out[own.get(buft, len(out) - 1)] += size
        return out

    def _room(self, taken: Sequence[int]) -> list[int]:
        """Return the size of each device's memory, then of the host's: without what devices take of it."""
        if not self._shared:
            return self._of_bytes
        return [*self._sizes, max(self._of_bytes[-1] - sum(taken[i] for i in self._shared), 1)]

    def devices(self, taken: Sequence[int]) -> list[DeviceMemory]:
        """Return bytes of each backend beside what its device has; a host that shares its memory has what devices leave."""
        names = [b.name for b in self.backends]
        return [
            DeviceMemory(name, n, size, self.margin_bytes)
            for name, n, size in zip(names, taken, self._room(taken), strict=True)
        ]

    def _key(self, setting: Setting, shares: object = None) -> _Kind:
        """Return the kind of a setting; ``shares``: what stands for ``-ts``."""
        has_host = setting.n_cpu_moe > 0 or setting.n_gpu_layers >= 0 or bool(setting.overrides)
        return _Kind(
            setting.n_ubatch, setting.type_k, setting.type_v,
            (setting.kv_offload, setting.op_offload and has_host, min(setting.n_gpu_layers, 1),
             shares or setting.tensor_split, setting.flash_attn),
        )  # fmt: skip

    def _used_by(self, setting: Setting) -> object:
        """Return which devices have layers, and which the output."""
        *layers, output = self._devices_of(setting)
        return frozenset(layers), output


@dataclass(frozen=True, slots=True)
class FitChoice:
    """The setting that llama.cpp's ``--fit`` chooses for default flags and a context.

    Attributes
    ----------
    note : str
        What it could not reach.
    by : str
        Who answered: llama.cpp itself, or pyggml's rule and why.
    """

    setting: Setting
    note: str
    by: str


def fit_setting(memory: MemoryModel, threads: int, ask: Callable[[], tuple[Fit, str]]) -> FitChoice:
    """Return what llama.cpp's ``--fit`` chooses; where it cannot be asked, by `pyggml.fit`, which is the same rule.

    Parameters
    ----------
    ask : callable
        Returns the answer of `ask_llama`, or raises its error.

    Notes
    -----
    Its margin is that of llama.cpp (``--fit-target``), 1 GiB, not the one of the plans.
    """
    start = Setting(threads=threads)
    try:
        found, build = ask()
        by = f"llama.cpp {build}, asked live (common_fit_params)"
    except (DeviceUnavailableError, ModelError) as error:
        found = fit_flags(memory.planner(start), placement_flags(start), context_flags(start, memory.n_ctx))
        by = f"pyggml's own rule, as llama.cpp was not asked: {error.message}"
    placement = found.placement
    is_all = placement.n_gpu_layers < 0 or placement.n_gpu_layers > memory.n_layer
    setting = replace(
        start, n_gpu_layers=-1 if is_all else placement.n_gpu_layers, overrides=_merged(placement.overrides),
        tensor_split=placement.tensor_split,
    )  # fmt: skip
    return FitChoice(setting, found.note, by)


def ask_llama(file: GGUFFile, backends: Sequence[Backend], n_ctx: int) -> tuple[Fit, str]:
    """Return what llama.cpp's own ``--fit`` chooses with these devices, and its version.

    Raises
    ------
    DeviceUnavailableError, ModelError
        See `live_fit`.
    """
    from ..llama.live_fit import live_fit

    return live_fit(file, [b.device for b in backends[:-1]], context_flags(Setting(), n_ctx))


def _merged(overrides: Sequence[str]) -> tuple[str, ...]:
    """Return overrides of single layers with one for all layers of a pattern: the same weights, a shorter command line."""
    layers: dict[str, list[int]] = {}
    for text in overrides:
        found = re.fullmatch(r"blk\\\.(\d+)(\\\..*)", text)
        assert found is not None
        layers.setdefault(found[2], []).append(int(found[1]))
    return tuple(
        rf"blk\.({numbers_pattern(n)}){rest}" if len(n) > 1 else rf"blk\.{n[0]}{rest}" for rest, n in layers.items()
    )


def _hparams(file: GGUFFile) -> HParams | None:
    """Return the sizes of a model whose graph pyggml builds; None of another."""
    try:
        return read_hparams(file)
    except PyggmlError:
        return None


def _cache_of_layers(hp: HParams, context: ContextFlags) -> list[int]:
    """Return the bytes of each layer's KV cache; none if there can be no such cache."""
    try:
        params = ContextParams.resolve(context, hp)
    except PyggmlError:
        return []
    made = [0] * hp.n_layer
    for layer, tensor in make_cache(hp, params, v_trans=not params.flash_attn).tensors():
        made[layer] += tensor.nbytes
    return made


def _weights(file: GGUFFile, n_layer: int | None) -> tuple[list[dict[str, int]], list[int], int, int, int]:
    """Return the bytes of each layer by weight without experts, of its experts, of the input tables, and of the output.

    Last are those of a table that output and input share: an output on a device reads a copy of its own there. What predicts more
    tokens, in layers from ``n_layer`` on, is not loaded.
    """
    every: dict[int, dict[str, int]] = {}
    experts: dict[int, int] = {}
    table = output = 0
    for name, info in file.tensors.items():
        found = re.match(r"blk\.(\d+)\.(.*)", name)
        if found:
            i = int(found[1])
            n_bytes = info.nbytes if n_layer is None or i < n_layer else 0
            if re.search(r"_(?:ch|)exps(?:\.|$)", name):
                experts[i] = experts.get(i, 0) + n_bytes
            else:
                every.setdefault(i, {})[found[2]] = n_bytes
        elif name.startswith(("token_embd", "per_layer_token_embd")):
            table += info.nbytes
        else:
            output += info.nbytes
    is_tied = "output.weight" not in file.tensors and "token_embd.weight" in file.tensors
    tied = file.tensors["token_embd.weight"].nbytes if is_tied else 0
    n = max([*every, *experts], default=-1) + 1
    return [every.get(i, {}) for i in range(n)], [experts.get(i, 0) for i in range(n)], table, output, tied
