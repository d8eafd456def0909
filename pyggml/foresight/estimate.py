"""Predicts the seconds per token of a model on devices and a host with some flags, in about a millisecond.

Work is counted from the model's tensors and the flags, and turned into seconds by the formulas of virtual time.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate

from ..cost import DeviceProfile, LinkProfile
from ..hardware.cards import Card
from ..hardware.formulas import backend_family, overlapped, pageable_rate
from ..hardware.hosts import DEFAULT_HOST, Host
from ..hardware.rates import RATES, Rates
from ..models.override_patterns import compile_pattern
from ..types import Type
from .caching import misses_of_groups
from .counts import attention_work, routing_in, used_experts
from .engine import Clock
from .shape import Layer, ModelShape, Product

__all__ = [
    "LayerTimes",
    "Machine",
    "Placed",
    "Setting",
    "place",
    "place_key",
    "predict",
]

#: Fewest tokens with which products with host weights are offloaded (`GGML_OP_OFFLOAD_MIN_BATCH`).
_OFFLOAD = 32


@dataclass(frozen=True, slots=True)
class Setting:
    """Flags of llama.cpp that change speeds or memory, with its defaults.

    Attributes
    ----------
    n_gpu_layers : int
        Layers on cards, counted from the last; -1: all, with the output.
    n_cpu_moe : int
        The experts of this many first layers are in host memory.
    overrides : tuple of str
        As in `PlacementFlags`: ``REGEX=BUFT`` of ``-ot``, ``--cpu-moe``, ``--n-cpu-moe N``, ``--n-cpu-ffn N``; the
        first that matches applies.
    tensor_split : tuple of float
        ``-ts``: shares of the cards; by default in proportion to their memory.
    is_pinned : bool
        Whether host weights are in pinned memory (``--no-mmap``, ``--mlock``, ``-lm none``).
    split_mode : str
        How several cards divide the model: by ``"layer"``, ``"row"`` (of products with dense weights) or ``"tensor"``
        (all of a layer).
    moe_cache_mib : int
        Size of llama.cpp's expert cache, over all cards; 0: none.
    moe_cache_misses : str
        ``"copy"``, or ``"cpu"``, which llama.cpp does not have: the CPU computes what the cache lacks.
    """

    n_gpu_layers: int = -1
    n_cpu_moe: int = 0
    overrides: tuple[str, ...] = ()
    n_ubatch: int = 512
    n_batch: int = 2048
    threads: int = 0
    flash_attn: bool = True
    type_k: Type = Type.F16
    type_v: Type = Type.F16
    is_pinned: bool = False
    kv_offload: bool = True
    op_offload: bool = True
    no_gpu: bool = False
    backend: str = ""
    split_mode: str = "layer"
    tensor_split: tuple[float, ...] = ()
    moe_cache_mib: int = 0
    moe_cache_misses: str = "copy"

    def __hash__(self) -> int:
        """Of what settings of a search differ in: they are looked up ten thousand times."""
        return hash(
            (
                self.n_gpu_layers, self.n_cpu_moe, self.overrides, self.n_ubatch, self.type_k, self.is_pinned, self.kv_offload,
                self.op_offload, self.tensor_split, self.moe_cache_mib,
            )
        )  # fmt: skip


@dataclass(slots=True)
class Placed:
    """Equal layers in the same place."""

    layer: Layer
    device: int  #: -1: the CPU
    experts_on_host: bool
    #: of a layer on a card: products that are no experts, with weights in host memory
    others_on_host: tuple[Product, ...] = ()
    count: int = 1

    @property
    def has_host_weights(self) -> bool:
        """Whether any weight is in host memory."""
        return self.device < 0 or self.experts_on_host or bool(self.others_on_host)


@dataclass(slots=True)
class Machine:
    """Cards with their links, and the host."""

    cards: Sequence[Card]
    links: Sequence[LinkProfile]
    host: Host = DEFAULT_HOST
    rates: Rates = field(default=RATES)

    @classmethod
    def of_profiles(cls, profiles: Sequence[DeviceProfile], host: Host) -> Machine:
        """Return the machine of simulated devices and a host."""
        return cls([p.sheet for p in profiles if isinstance(p.sheet, Card)], [p.link for p in profiles], host)


#: Seconds of layers of one model on one machine, by layer, place, tokens and flags; and of its output.
LayerTimes = dict[tuple[object, ...], float]

_EXPERTS = ("ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight")


@lru_cache(maxsize=4096)
def _rules(overrides: tuple[str, ...]) -> tuple[tuple[re.Pattern[str], int, bool], ...]:
    """Return the patterns in order, with the number of first layers of each, and whether it means host memory."""
    found = []
    for text in overrides:
        word, _, value = text.partition(" ")
        if word in ("--cpu-moe", "--n-cpu-moe"):
            found.append((re.compile("_exps"), int(value) if value else 1 << 30, True))
        elif word == "--n-cpu-ffn":
            found.append((re.compile(r"\.ffn_(up|down|gate)\."), int(value), True))
        else:
            for part in text.split(","):
                pattern, _, where = part.partition("=")
                if pattern:
                    found.append((compile_pattern(pattern), 1 << 30, where == "CPU"))
    return tuple(found)


@lru_cache(maxsize=65536)
def overridden(overrides: tuple[str, ...], layer: int, *names: str) -> bool | None:
    """Return if the first pattern that matches any of a layer's weights means host memory; None if none does."""
    for pattern, n_layer, is_host in _rules(overrides):
        if layer < n_layer and any(pattern.search(f"blk.{layer}.{name}") for name in names):
            return is_host
    return None


def devices_of(n_layer: int, s: Setting, sizes: Sequence[float]) -> list[int]:
    """Return the card of each layer, then of the output, by ``-ts`` or the cards' memory; -1: the CPU.

    Notes
    -----
    Mirrors `llama_model_base::load_tensors`, like `pyggml.models.placement`.
    """
    n_on = n_layer + 1 if s.n_gpu_layers < 0 else min(s.n_gpu_layers, n_layer + 1)
    if s.no_gpu or not sizes:
        n_on = 0
    shares = s.tensor_split if any(s.tensor_split) else sizes
    whole = sum(shares)
    ends = [total / whole for total in accumulate(shares)] if n_on else []
    return [-1] * (n_layer + 1 - n_on) + [min(bisect_right(ends, i / n_on), len(sizes) - 1) for i in range(n_on)]


def has_host_experts(layer: int, device: int, s: Setting) -> bool:
    """Return whether the experts of a layer are in host memory."""
    said = overridden(s.overrides, layer, *_EXPERTS) if s.overrides else None
    return (device < 0 or layer < s.n_cpu_moe) if said is None else said


def place(model: ModelShape, s: Setting, sizes: Sequence[float]) -> list[Placed]:
    """Return the places of layers on cards with the given memory sizes; equal layers are grouped."""
    groups: dict[tuple[object, ...], Placed] = {}
    has_experts = {id(layer): layer.has_experts for layer in {id(layer): layer for layer in model.layers}.values()}
    for i, (layer, device) in enumerate(zip(model.layers, devices_of(len(model.layers), s, sizes), strict=False)):
        on_host = has_experts[id(layer)] and has_host_experts(i, device, s)
        others: tuple[Product, ...] = ()
        if s.overrides and device >= 0:
            others = tuple(x for x in layer.products if not x.is_expert and overridden(s.overrides, i, x.name))
        key = (id(layer), device, on_host, others)
        if key in groups:
            groups[key].count += 1
        else:
            groups[key] = Placed(layer, device, on_host, others)
    return list(groups.values())


def place_key(s: Setting) -> tuple[object, ...]:
    """Return the flags that `place` goes by: settings with equal ones have their layers in the same places."""
    return s.n_gpu_layers, s.n_cpu_moe, s.overrides, s.tensor_split, s.no_gpu


def predict(
    model: ModelShape,
    m: Machine,
    s: Setting,
    n_tokens: int,
    depth: int,
    *,
    is_prompt: bool,
    placed: list[Placed] | None = None,
    known: LayerTimes | None = None,
) -> float:
    """Predict the mean seconds per token.

    Parameters
    ----------
    n_tokens : int
        Tokens of the prompt, or tokens to generate.
    depth : int
        Tokens in the KV cache before.
    placed : list of Placed, optional
        The places of layers; by default those of the setting.
    known : dict, optional
        Seconds of layers of this model on this machine, kept by a caller that predicts many settings.
    """
    clock = Clock(m.rates)
    if 0 < s.threads < m.host.n_cores:
        m = replace(m, host=m.host.with_threads(s.threads))
    placed = place(model, s, [c.memory_bytes for c in m.cards]) if placed is None else placed
    known = {} if known is None else known
    if not is_prompt:
        misses = _misses(model, m, s, placed, n_tokens) if s.moe_cache_mib else None
        return _micro_batch_s(clock, model, m, s, placed, 1, depth + n_tokens / 2, known, misses)
    ub = min(s.n_ubatch, s.n_batch, n_tokens)
    n_full, rest = divmod(n_tokens, ub)
    total = 0.0
    if n_full:
        # flash attention skips masked positions, products of K and Q do not
        n_kv = depth + (n_full * ub) / 2 + (0 if s.flash_attn else ub / 2)
        total = n_full * _micro_batch_s(clock, model, m, s, placed, ub, n_kv, known)
        total *= _pipeline(m, s, placed, n_full)
    if rest:
        total += _micro_batch_s(clock, model, m, s, placed, rest, depth + n_tokens, known)
    return total / n_tokens


def _pipeline(m: Machine, s: Setting, placed: list[Placed], n: int) -> float:
    """Return the fraction of the time that remains when several cards compute different micro-batches at once."""
    k = len({p.device for p in placed})  # a card without layers overlaps with nothing
    if k < 2 or n < 2 or _shares_layers(m, s) or any(p.has_host_weights for p in placed) or s.overrides:
        return 1.0
    return overlapped(n, k, m.rates)


def _micro_batch_s(
    clock: Clock,
    model: ModelShape,
    m: Machine,
    s: Setting,
    placed: list[Placed],
    n: int,
    n_kv: float,
    known: LayerTimes,
    misses: list[float] | None = None,
) -> float:
    total = 0.0
    offloads = n >= _OFFLOAD and s.op_offload and bool(m.cards)
    flags = (
        n, n_kv, offloads, s.threads, s.type_k, s.type_v, s.flash_attn, s.kv_offload, s.is_pinned, s.backend, s.split_mode,
        s.moe_cache_misses,
    )  # fmt: skip
    for i, p in enumerate(placed):
        missed = -1.0 if misses is None else misses[i]
        key = (id(p.layer), p.device, p.experts_on_host, p.others_on_host, missed, flags)
        seconds = known.get(key)
        if seconds is None:
            seconds = known[key] = _layer_s(clock, model, m, s, p, n, n_kv, offloads=offloads, missed=missed)
        total += p.count * seconds
    on_host = not m.cards or s.no_gpu or s.n_gpu_layers == 0
    cards = {p.device for p in placed if p.device >= 0}
    output = ("output", on_host, max(cards, default=-1), s.threads, s.backend)
    if output not in known:
        known[output] = (
            clock.cpu_output_s(model, m.host) if on_host else clock.output_s(model, m.cards[output[2]], s.backend)
        )
    total += known[output]
    if len(cards) > 1 and not _shares_layers(m, s):
        total += (len(cards) - 1) * (50e-6 + 4.0 * n * model.n_embd / 10e9)
    return total


def _layer_s(
    clock: Clock, model: ModelShape, m: Machine, s: Setting, p: Placed, n: int, n_kv: float, *, offloads: bool, missed: float
) -> float:  # fmt: skip
    """Return the seconds of one layer; of a setting it reads the flags that `_micro_batch_s` names.

    ``missed``: misses per token in an expert cache; below 0 the layer is not cached.
    """
    kv_bytes = (s.type_k.row_size(256) + s.type_v.row_size(256)) / 512
    i = max(p.device, 0)
    if p.device < 0 and not offloads:
        return clock.cpu_layer_s(p.layer, n, n_kv, model, m.host, kv_bytes)
    card = m.cards[i]

    def on(card: Card, layer: Layer, *, experts: bool) -> float:
        return clock.layer_s(
            layer, n, n_kv, model, card, experts=experts, kv_bytes=kv_bytes, flash=s.flash_attn, backend=s.backend,
            attention=s.kv_offload or s.flash_attn, slow_host=m.host.isa == "neon",
        )  # fmt: skip

    on_cpu = () if offloads else p.others_on_host
    rest = p.layer
    if p.others_on_host:
        rest = replace(rest, products=tuple(x for x in rest.products if x not in p.others_on_host))
    has_experts = not p.experts_on_host or missed >= 0
    if offloads and p.has_host_weights:  # the first card computes what is copied
        full_s = on(m.cards[0], p.layer, experts=True)
        seconds = (
            full_s
            if i == 0
            else on(card, rest, experts=has_experts) + full_s - on(m.cards[0], rest, experts=has_experts)
        )
    else:
        seconds = on(card, rest, experts=has_experts)
    if _shares_layers(m, s):
        dense_s = clock.dense_s(p.layer, n, model, card, s.backend)
        seconds = _sharing_s(m, s, p, n, seconds, dense_s, model.n_embd)
    if p.layer.attention is not None and (p.device < 0 or not s.kv_offload):
        if s.flash_attn:  # it is computed where its layer is, with copies of the host's K and V
            link = m.links[i]
            rate = min(link.bytes_per_s, pageable_rate(m.host, m.rates))
            copied = attention_work(p.layer.attention, n, n_kv + n / 2, kv_bytes).read_bytes
            seconds += m.rates.switch_s + 2 * link.latency_s + copied / rate
        elif not s.kv_offload:
            seconds += m.rates.switch_s + clock.cpu_attention_s(p.layer.attention, n, n_kv, m.host, kv_bytes)
    if missed >= 0 and s.moe_cache_misses == "cpu":
        alone_s = on(card, rest, experts=False)
        seconds = _sides_s(clock, model, m, s, p, missed, alone_s, seconds - alone_s)
    elif missed >= 0:
        seconds += _uploads_s(model, m, s, p, missed)
    elif p.experts_on_host and not offloads:
        on_cpu = (*on_cpu, *(x for x in p.layer.products if x.is_expert))
    if on_cpu:
        seconds += m.rates.switch_s + clock.cpu_products_s(on_cpu, n, model, m.host)
    if missed < 0 and not card.is_unified and offloads:
        seconds += _copies_s(model, m, s, p, n)
    return seconds


def _shares_layers(m: Machine, s: Setting) -> bool:
    """Return whether every card works on every layer; Vulkan and Metal have no row split and use layer instead."""
    if len(m.cards) < 2 or s.split_mode == "layer":
        return False
    return s.split_mode == "tensor" or backend_family(m.cards[0], s.backend).startswith(("cuda", "rocm"))


def _sharing_s(m: Machine, s: Setting, p: Placed, n: int, alone_s: float, products_s: float, n_embd: int) -> float:
    """Return the seconds of a layer that all cards share, given those of one card.

    Parameters
    ----------
    alone_s, products_s : float
        Seconds of the whole layer on one card, and of its products with dense weights.

    Notes
    -----
    Row: `ggml_cuda_op_mul_mat` sends 8-bit activations to each card, which sends its rows of the result to the main
    card. The main card computes everything else. Tensor: each card has a share of the heads and the feed-forward, whose
    results are summed over all cards (`ggml_backend_meta`). Experts in host memory are copied to every card.
    """
    k, link = len(m.cards), m.links[0]
    others = (k - 1) / k
    if s.split_mode == "row":
        dense = [x for x in p.layer.products if not x.is_expert]
        moved = sum(n * (1.125 * x.n_in * (k - 1) + 4.0 * x.n_out * others) for x in dense)
        return alone_s - products_s * others + moved / link.bytes_per_s + 2 * len(dense) * link.latency_s
    return alone_s / k + 2 * (2.0 * others * 4.0 * n * n_embd / link.bytes_per_s + 2 * link.latency_s)


def _copies_s(model: ModelShape, m: Machine, s: Setting, p: Placed, n: int) -> float:
    """Return the seconds of copying a layer's host weights to its device."""
    link = m.links[0]
    rate = link.bytes_per_s if s.is_pinned else min(link.bytes_per_s, pageable_rate(m.host, m.rates))
    n_bytes, n_copies = 0.0, 0
    if p.experts_on_host:
        share = used_experts(routing_in(model, m.rates), model.n_expert, model.n_used, n) / model.n_expert
        n_bytes += p.layer.expert_bytes * share
        n_copies += 6
    if p.device < 0:
        n_bytes += p.layer.other_bytes
        n_copies += 6
    n_bytes += sum(x.nbytes for x in p.others_on_host)
    n_copies += len(p.others_on_host)
    return n_bytes / rate + n_copies * link.latency_s + (m.rates.switch_s if n_copies else 0.0)


def _misses(model: ModelShape, m: Machine, s: Setting, placed: list[Placed], n_tokens: int) -> list[float]:
    """Return the misses per token of each layer in an expert cache; below 0 for layers that it does not serve."""
    groups: dict[tuple[int, tuple[Product, ...]], list[Placed]] = {}
    for p in placed:
        if p.experts_on_host and p.device >= 0:
            groups.setdefault((p.device, tuple(x for x in p.layer.products if x.is_expert)), []).append(p)
    shares = s.tensor_split if any(s.tensor_split) else [c.memory_bytes for c in m.cards]
    told = [
        (device, sum(p.count for p in own), own[0].layer.expert_bytes, model.n_expert)
        for (device, _), own in groups.items()
    ]
    found = misses_of_groups(model, told, s.moe_cache_mib << 20, shares, routing_in(model, m.rates), n_tokens)
    by_place = {id(p): n for own, n in zip(groups.values(), found, strict=True) for p in own}
    return [by_place.get(id(p), -1.0) for p in placed]


def _uploads_s(model: ModelShape, m: Machine, s: Setting, p: Placed, misses: float) -> float:
    """Return the seconds in which a cached layer's ids are read and its missing experts are uploaded.

    Notes
    -----
    Biases of experts stay in host memory: the CPU adds them, after each product.
    """
    link = m.links[p.device]
    rate = link.bytes_per_s if s.is_pinned else min(link.bytes_per_s, pageable_rate(m.host, m.rates))
    n_weights = sum(x.is_expert for x in p.layer.products)
    n_switches = n_weights if model.has_expert_biases else 1
    uploaded = misses * (p.layer.expert_bytes / model.n_expert / rate + n_weights * link.latency_s)
    return n_switches * m.rates.switch_s + link.latency_s + uploaded


def _sides_s(
    clock: Clock, model: ModelShape, m: Machine, s: Setting, p: Placed, misses: float, alone_s: float, experts_s: float
) -> float:
    """Return the seconds of a cached layer whose missing experts the CPU computes, while the device computes the others.

    Parameters
    ----------
    alone_s, experts_s : float
        Seconds of the layer on its device without experts, and of all its chosen experts there.

    Notes
    -----
    What the cache admits is uploaded meanwhile; from a mapped file the host waits for it. From pinned memory the slower of both is
    the limit, and a quarter of the other is not hidden: as much as the simulated machine shows, where tokens miss unevenly.
    """
    share = misses / model.n_used
    link = m.links[p.device]
    cpu_s = clock.cpu_products_s((x for x in p.layer.products if x.is_expert), 1, model, m.host)
    computed = alone_s + max((1.0 - share) * experts_s, share * cpu_s) + m.rates.switch_s + 4.0 * link.latency_s
    uploaded = _uploads_s(model, m, s, p, misses) - m.rates.switch_s
    hidden = 0.75 * min(computed, uploaded) if s.is_pinned else 0.0
    return computed + uploaded - hidden
