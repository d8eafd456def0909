"""The `Work` of a layer, counted from its tensors: products, attention, states and small ops."""

from __future__ import annotations

from functools import lru_cache

from ..hardware.formulas import Kind, Work
from ..hardware.rates import FEW_COLUMNS, Rates
from ..routing import BIASED_ROUTING, LogNormal, Routing
from .shape import Attention, Layer, ModelShape, Product

__all__ = ["attention_work", "layer_works", "product_work", "routing_in", "used_experts"]


def routing_in(model: ModelShape, rates: Rates) -> Routing:
    """Return how a model's tokens choose experts: as stated, or by its router."""
    if model.routing is not None:
        return model.routing
    return BIASED_ROUTING if model.has_router_bias else LogNormal(rates.spread)


@lru_cache(maxsize=4096)
def used_experts(routing: Routing, n_expert: int, n_used: int, n_tokens: int) -> float:
    """Return the expected number of distinct experts that ``n_tokens`` tokens choose in a layer; it is kept."""
    return routing.used(n_expert, n_used, n_tokens)


def product_work(p: Product, m: int, n_used: int, routing: Routing | None = None) -> Work:
    """Return the work of a product with ``m`` tokens, with the bytes of the small ops around it; experts need a routing."""
    used = 1.0
    if p.is_expert:
        assert routing is not None
        used = used_experts(routing, p.n_matrix, n_used, m)
    columns = m * n_used if p.is_expert else m
    return Work(
        Kind.PRODUCT, 2.0 * p.n_in * p.n_out * columns, p.nbytes * used / p.n_matrix,
        4.0 * columns * (0.75 * p.n_in + 1.5 * p.n_out), 0, p.type, columns, used, m, p.is_expert,
    )  # fmt: skip


def attention_work(a: Attention, m: int, n_kv: float, kv_bytes: float) -> Work:
    """Return the work of attention of ``m`` tokens over ``n_kv`` positions; K and V have ``kv_bytes`` per element."""
    n = min(n_kv, a.window + m) if a.window else n_kv
    flops = 2.0 * m * n * a.n_head * (a.head_k + a.head_v)
    read = n * a.n_cached * kv_bytes
    heads = read * a.n_head / a.n_head_kv if kv_bytes < 2 and not a.is_latent else 0.0
    return Work(Kind.ATTENTION, flops, read, n_kernels=0, n_tokens=m, heads_bytes=heads)


def scores_bytes(a: Attention, m: int, n_kv: float) -> float:
    """Return the bytes of scores that attention without flash attention reads and writes."""
    n = min(n_kv, a.window + m) if a.window else n_kv
    return 20.0 * m * n * a.n_head if m > FEW_COLUMNS else 0.0


def n_kernels(layer: Layer, model: ModelShape) -> int:
    """Return the number of kernels of a layer, after fusion of norms, gates and routers."""
    n = 4 * model.n_streams**2 + (30 if layer.state is not None else 9)
    n_dense = sum(not p.is_expert for p in layer.products)
    if not layer.has_experts:
        return n + 4
    return n + 8 + (5 if n_dense > 6 else 0)


def layer_works(
    layer: Layer,
    m: int,
    n_kv: float,
    model: ModelShape,
    routing: Routing,
    *,
    experts: bool,
    attention: bool,
    kv_bytes: float,
) -> list[Work]:
    """Return the work of a layer on a card, with or without its experts and its attention."""
    works = [product_work(p, m, model.n_used, routing) for p in layer.products if experts or not p.is_expert]
    moved = 4.0 * m * model.n_embd * 10 * model.n_streams
    if layer.attention is not None and attention:
        works.append(attention_work(layer.attention, m, n_kv, kv_bytes))
    if layer.state is not None:
        s = layer.state
        works.append(Work(Kind.STATE, m * 8.0 * s.n_head * s.size * s.size, 2.0 * s.nbytes, n_kernels=0))
        moved += 4.0 * m * s.n_head * s.size * 12
    works.append(Work(moved_bytes=moved, n_kernels=n_kernels(layer, model)))
    return works
