"""Seconds of a micro-batch: each layer's products, attention, states and small ops on the device that has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from ..hardware.cards import Card
from ..hardware.hosts import Host
from ..hardware.rates import CPU_PLAIN, FEW_COLUMNS, Family, Rates
from ..types import Type
from .shape import Attention, Layer, ModelShape, Product

__all__ = ["Clock", "Link", "backend_family", "used_experts"]


@dataclass(frozen=True, slots=True)
class Link:
    """From host memory to a card: bytes a second of pinned memory, seconds before the first byte."""

    pinned: float
    latency_s: float = 10e-6


#: Types whose weights the CPU keeps in an order of its own (`ggml_repack_get_optimal_repack_type`).
_REPACKED = {Type.Q4_0, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.Q8_0, Type.IQ4_NL, Type.Q2_K}


@lru_cache(maxsize=4096)
def used_experts(spread: float, n_expert: int, n_used: int, n_tokens: int) -> float:
    """Return how many experts of a layer so many tokens choose; the mean over texts."""
    if n_tokens <= 1 or n_expert <= n_used:
        return float(min(n_expert, n_used * max(n_tokens, 0)))
    import numpy as np

    logits = np.random.default_rng(1).normal(0.0, spread, (8, n_expert))
    # by which share of choices an expert is taken: a soft maximum of logits and Gumbel noise, n_used times
    share = np.exp(logits)
    share = np.minimum(n_used * share / share.sum(axis=1, keepdims=True), 1.0)
    return float((1.0 - (1.0 - share) ** n_tokens).sum(axis=1).mean())


class Clock:
    """The formulas for one card or host and one set of rates."""

    def __init__(self, rates: Rates) -> None:
        self.rates = rates

    def family(self, card: Card, backend: str = "") -> Family:
        """Return the numbers of the kernels that run on a card."""
        kind = backend_family(card, backend)
        r = self.rates
        return {"cuda": r.cuda, "rocm": r.rocm, "vulkan": r.vulkan, "metal": r.metal}[kind.partition("-")[0]]

    # -- one layer on a card -------------------------------------------------

    def product_s(self, p: Product, m: int, n_used: int, card: Card, backend: str = "") -> float:
        """Return the time of a product with ``m`` tokens."""
        f, r = self.family(card, backend), self.rates
        used = used_experts(r.spread, p.n_matrix, n_used, m) if p.is_expert else 1.0
        columns = m * n_used if p.is_expert else m
        read = p.nbytes * used / p.n_matrix
        memory_s = read / (card.bytes_per_s * f.memory)
        if m <= FEW_COLUMNS:
            per_weight = r.few if p.type.is_quantized else r.few_half
            return memory_s + per_weight * p.n_in * p.n_out * columns / card.f32_per_s
        flops = 2.0 * p.n_in * p.n_out * (columns + f.pad * used)
        return max(memory_s, flops / self._peak(p.type, card, f, backend))

    def _peak(self, type: Type, card: Card, f: Family, backend: str) -> float:
        kind = backend_family(card, backend)
        if not type.is_quantized:
            half = self.rates.half_metal if kind == "metal" else self.rates.half
            return (card.f16_per_s if type is not Type.F32 else card.f32_per_s) * half
        if kind == "cuda":
            return 1.0 / (1.0 / (card.int8_per_s * f.quantized) + 1.0 / (card.f32_per_s * self.rates.scalar))
        if kind.endswith("dp4a"):
            return card.int8_per_s * self.rates.dp4a
        if kind == "rocm":
            return card.int8_per_s * f.quantized
        return card.f16_per_s * f.quantized

    def kernels(self, layer: Layer, model: ModelShape) -> int:
        """Return how many kernels a layer launches, after fusion of norms, gates and routers."""
        n = 4 * model.n_streams**2 + (30 if layer.state is not None else 9)
        n_dense = sum(not p.is_expert for p in layer.products)
        if not layer.has_experts:
            return n + 4
        return n + 8 + (5 if n_dense > 6 else 0)

    def attention_s(
        self, a: Attention, m: int, n_kv: float, card: Card, kv_bytes: float, flash: bool, backend: str = ""
    ) -> float:
        """Return the time of attention of ``m`` tokens over ``n_kv`` positions."""
        f, r = self.family(card, backend), self.rates
        if a.window:
            n_kv = min(n_kv, a.window + m)
        read_s = n_kv * a.n_cached * kv_bytes / (card.bytes_per_s * r.kv)
        flops = 2.0 * m * n_kv * a.n_head * (a.head_k + a.head_v)
        done = flops / (card.f16_per_s * f.attention)
        if not flash and m > FEW_COLUMNS:
            done += 20.0 * m * n_kv * a.n_head / (card.bytes_per_s * f.memory)
        return max(read_s, done)

    def layer_s(
        self, layer: Layer, m: int, n_kv: float, model: ModelShape, card: Card, *, experts: bool, kv_bytes: float,
        flash: bool, attention: bool = True, backend: str = "", slow_host: bool = False,
    ) -> float:  # fmt: skip
        """Return the time of a layer on a card, with or without its experts."""
        f, r = self.family(card, backend), self.rates
        total, moved = 0.0, 0.0
        e = model.n_embd
        for p in layer.products:
            if p.is_expert and not experts:
                continue
            total += self.product_s(p, m, model.n_used, card, backend)
            n = model.n_used if p.is_expert else 1
            passes = r.expert_passes if p.is_expert else r.passes
            moved += passes * 4.0 * m * n * (p.n_in * 0.75 + p.n_out * 1.5)
        moved += r.passes * 4.0 * m * e * 10 * model.n_streams
        if layer.attention is not None and attention:
            total += self.attention_s(layer.attention, m, n_kv, card, kv_bytes, flash, backend)
        if layer.state is not None:
            s = layer.state
            total += m * 8.0 * s.n_head * s.size * s.size / (card.f32_per_s * r.state)
            total += 2.0 * s.nbytes / (card.bytes_per_s * f.memory)
            moved += r.passes * 4.0 * m * s.n_head * s.size * 12
        n_kernels = self.kernels(layer, model)
        slow = 1.0 if not slow_host else r.slow_host / (3.0 if f is r.cuda else 1.0)
        return total + n_kernels * f.launch_s * slow + moved / (card.bytes_per_s * f.memory)

    # -- the same on the CPU -------------------------------------------------

    def cpu_read(self, host: Host) -> float:
        """Return what the host's threads read a second: that of its memory, and of fast memory less."""
        return host.read_bytes_per_s / math.hypot(1.0, host.read_bytes_per_s / self.rates.cpu_read)

    def cpu_product_s(self, p: Product, m: int, n_used: int, host: Host) -> float:
        """Return the time of a product on the CPU."""
        r = self.rates
        used = used_experts(r.spread, p.n_matrix, n_used, m) if p.is_expert else 1.0
        columns = m * n_used if p.is_expert else m
        read_s = p.nbytes * used / p.n_matrix / self.cpu_read(host)
        flops = 2.0 * p.n_in * p.n_out * columns
        if m <= FEW_COLUMNS:
            return read_s + flops / (host.int8_per_s * r.cpu_few)
        rate = host.int8_per_s * r.cpu_product
        if p.type not in _REPACKED:
            rate *= CPU_PLAIN
        return max(read_s, flops / rate)

    def cpu_layer_s(
        self,
        layer: Layer,
        m: int,
        n_kv: float,
        model: ModelShape,
        host: Host,
        kv_bytes: float,
        wanted: Callable[[Product], bool],
    ) -> float:
        """Return the time of those products of a layer that are wanted, on the CPU."""
        total = sum(self.cpu_product_s(p, m, model.n_used, host) for p in layer.products if wanted(p))
        a = layer.attention
        if a is not None and wanted(layer.products[0]) and not layer.products[0].is_expert:
            total += self.cpu_attention_s(a, m, n_kv, host, kv_bytes)
        if layer.state is not None and wanted(layer.products[0]):
            total += m * 8.0 * layer.state.n_head * layer.state.size**2 / (host.int8_per_s * 0.1)
        return total

    def cpu_attention_s(self, a: Attention, m: int, n_kv: float, host: Host, kv_bytes: float) -> float:
        """Return the time of attention on the CPU."""
        n = min(n_kv, a.window + m) if a.window else n_kv
        flops = 2.0 * m * n * a.n_head * (a.head_k + a.head_v)
        read_s = n * a.n_cached * kv_bytes / self.cpu_read(host)
        return max(read_s, flops / (host.int8_per_s * self.rates.cpu_attention))


def backend_family(card: Card, backend: str) -> str:
    """Return the family of kernels, by the card or by the backend that is asked for."""
    low = backend.lower()
    if "vulkan" in low:
        return "vulkan"
    return card.family
