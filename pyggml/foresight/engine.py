"""Seconds of a model's layers: the work of `counts`, by the formulas of `pyggml.hardware.formulas`."""

from __future__ import annotations

from collections.abc import Iterable

from ..hardware.cards import Card
from ..hardware.formulas import Kind, Work, backend_family, card_s, family_of, host_s
from ..hardware.hosts import Host
from ..hardware.rates import Rates
from .counts import attention_work, layer_works, product_work, routing_in, scores_bytes
from .shape import Attention, Layer, ModelShape, Product

__all__ = ["Clock"]


class Clock:
    """Computes the seconds of layers on a card or a host, by one set of rates."""

    def __init__(self, rates: Rates) -> None:
        self.rates = rates

    def dense_s(self, layer: Layer, m: int, model: ModelShape, card: Card, backend: str = "") -> float:
        """Return the seconds of a layer's products with dense weights on a card, without the small ops around them."""
        works = (product_work(p, m, model.n_used) for p in layer.products if not p.is_expert)
        return sum(card_s(w._replace(moved_bytes=0.0), card, self.rates, backend=backend) for w in works)

    def output_s(self, model: ModelShape, card: Card, backend: str = "") -> float:
        """Return the seconds of one token's logits on a card, without the small ops around the product."""
        work = product_work(model.output, 1, 1)._replace(moved_bytes=0.0)
        return card_s(work, card, self.rates, backend=backend)

    def layer_s(
        self, layer: Layer, m: int, n_kv: float, model: ModelShape, card: Card, *, experts: bool, kv_bytes: float,
        flash: bool, attention: bool = True, backend: str = "", slow_host: bool = False,
    ) -> float:  # fmt: skip
        """Return the seconds of a layer on a card, with or without its experts."""
        works = layer_works(
            layer,
            m,
            n_kv,
            model,
            routing_in(model, self.rates),
            experts=experts,
            attention=attention,
            kv_bytes=kv_bytes,
        )
        total = sum(card_s(w, card, self.rates, backend=backend, slow_host=slow_host) for w in works)
        if not flash and layer.attention is not None and attention:
            memory = card.bytes_per_s * family_of(self.rates, backend_family(card, backend)).memory
            total += scores_bytes(layer.attention, m, n_kv) / memory
        return total

    # -- the same on the CPU -------------------------------------------------

    def cpu_output_s(self, model: ModelShape, host: Host) -> float:
        """Return the seconds of one token's logits on the CPU."""
        return host_s(product_work(model.output, 1, 1), host, self.rates)

    def cpu_products_s(self, products: Iterable[Product], m: int, model: ModelShape, host: Host) -> float:
        """Return the seconds of products of a layer on the CPU."""
        routing = routing_in(model, self.rates)
        return sum(host_s(product_work(p, m, model.n_used, routing), host, self.rates) for p in products)

    def cpu_layer_s(
        self, layer: Layer, m: int, n_kv: float, model: ModelShape, host: Host, kv_bytes: float
    ) -> float:  # fmt: skip
        """Return the seconds of a layer on the CPU."""
        total = self.cpu_products_s(layer.products, m, model, host)
        if layer.attention is not None:
            total += self.cpu_attention_s(layer.attention, m, n_kv, host, kv_bytes)
        if layer.state is not None:
            s = layer.state
            total += host_s(Work(Kind.STATE, m * 8.0 * s.n_head * s.size**2), host, self.rates)
        return total

    def cpu_attention_s(self, a: Attention, m: int, n_kv: float, host: Host, kv_bytes: float) -> float:
        """Return the seconds of attention on the CPU."""
        return host_s(attention_work(a, m, n_kv, kv_bytes), host, self.rates)
