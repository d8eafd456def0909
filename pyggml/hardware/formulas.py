"""The cost model: seconds of work on a card or a host, for virtual time, `splits`, `plan` and foresight.

`Work` is that of a node (`pyggml.opset`) or of a layer (`pyggml.foresight.counts`). The fitted shares of data sheets are
in `rates`.
"""

from __future__ import annotations

import math
from enum import Enum, auto
from typing import NamedTuple

from ..types import Type
from .cards import Card
from .hosts import Host
from .rates import CPU_PLAIN, FEW_COLUMNS, Family, Rates

__all__ = [
    "Kind",
    "Work",
    "backend_family",
    "card_s",
    "family_of",
    "host_read",
    "host_s",
    "overlapped",
    "pageable_rate",
]

#: Types whose weights ggml's CPU backend repacks (`ggml_repack_get_optimal_repack_type`).
_REPACKED = {Type.Q4_0, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.Q8_0, Type.IQ4_NL, Type.Q2_K}
#: Most bytes/s that a driver stages from pageable memory: 13.6 to 14 GB/s measured on Windows, 21 implied on Linux.
_STAGING_BYTES_PER_S = 20e9
#: Tokens per block of ROCm's attention (`fattn-tile.cuh`); each block reads K and V again.
_QUERIES = 32


class Kind(Enum):
    """The kind of kernels that do the work."""

    __hash__ = object.__hash__  # members are single objects; an enum's own hash is a call in Python

    PASS = auto()  #: small ops: memory alone
    PRODUCT = auto()
    ATTENTION = auto()
    STATE = auto()  #: recurrent states


class Work(NamedTuple):
    """Operations and bytes, independent of the device.

    Attributes
    ----------
    flops : float
        Operations; a multiply-add counts as two.
    read_bytes : float
        Bytes of weights, K and V, or states, each read once.
    moved_bytes : float
        Bytes of activations that small ops read and write.
    n_kernels : float
        Launches.
    type : Type
        Type of a product's weight.
    columns, matrices : float
        Of a product: columns over all matrices, and the number of matrices that are read.
    n_tokens : int
        Of a product or of attention; up to `FEW_COLUMNS`, other kernels run.
    heads_bytes : float
        Of attention over a quantised KV cache: bytes of K and V if each head reads them.
    is_expert : bool
        Whether it is a product with experts, whose activations are gathered, weighted and added.
    """

    kind: Kind = Kind.PASS
    flops: float = 0.0
    read_bytes: float = 0.0
    moved_bytes: float = 0.0
    n_kernels: float = 1.0
    type: Type = Type.F32
    columns: float = 1.0
    matrices: float = 1.0
    n_tokens: int = 1
    is_expert: bool = False
    heads_bytes: float = 0.0


def backend_family(card: Card, backend: str = "") -> str:
    """Return the family of kernels of the requested backend, or of the card."""
    return "vulkan" if backend and "vulkan" in backend.lower() else card.family


def family_of(rates: Rates, kind: str) -> Family:
    """Return the fitted numbers of a family of kernels."""
    family: Family = getattr(rates, kind.partition("-")[0])
    return family


def card_s(work: Work, card: Card, rates: Rates, *, backend: str = "", slow_host: bool = False) -> float:
    """Return the seconds of work on a card.

    Parameters
    ----------
    backend : str
        ``"vulkan"``, or empty for the card's default kernels.
    slow_host : bool
        Whether the host's cores are so slow that they delay launches.
    """
    kind = backend_family(card, backend)
    f = family_of(rates, kind)
    memory = card.bytes_per_s * f.memory
    passes = rates.expert_passes if work.is_expert else rates.passes
    slow = 1.0 if not slow_host else rates.slow_host / (3.0 if f is rates.cuda else 1.0)
    seconds = work.n_kernels * f.launch_s * slow + passes * work.moved_bytes / memory
    if work.kind is Kind.PRODUCT:
        seconds += _product_s(work, card, rates, kind, f)
    elif work.kind is Kind.ATTENTION:
        n_reads = max(1.0, work.n_tokens / _QUERIES) if f is rates.rocm else 1.0
        read_s = n_reads * work.read_bytes / (card.bytes_per_s * rates.kv)
        if (
            f is rates.cuda and work.n_tokens <= FEW_COLUMNS
        ):  # each head reads for itself (`fattn-vec.cuh`), but the cache is shared
            read_s = max(read_s, work.heads_bytes / card.bytes_per_s)
        seconds += max(read_s, work.flops / (card.f16_per_s * f.attention))
    elif work.kind is Kind.STATE:
        seconds += work.flops / (card.f32_per_s * rates.state) + work.read_bytes / memory
    else:
        seconds += work.read_bytes / memory
    return seconds


def _product_s(work: Work, card: Card, rates: Rates, kind: str, f: Family) -> float:
    read_s = work.read_bytes / (card.bytes_per_s * f.memory)
    if work.n_tokens <= FEW_COLUMNS:
        per_weight = rates.few if work.type.is_quantized else rates.few_half
        return read_s + 0.5 * per_weight * work.flops / card.f32_per_s
    padded = work.flops * (1.0 + f.pad * work.matrices / work.columns)
    return max(read_s, padded / _peak(work.type, card, rates, kind, f))


def _peak(type: Type, card: Card, rates: Rates, kind: str, f: Family) -> float:
    """Return the operations/s of products with weights of a type, for whole tiles."""
    if not type.is_quantized:
        half = rates.half_metal if kind == "metal" else rates.half
        return (card.f16_per_s if type is not Type.F32 else card.f32_per_s) * half
    if kind.endswith("dp4a"):
        return card.int8_per_s * rates.dp4a
    if kind == "cuda":
        return 1.0 / (1.0 / (card.int8_per_s * f.quantized) + 1.0 / (card.f32_per_s * rates.scalar))
    if kind == "rocm":  # matrix units wait for the scales, which are in 32 bits
        return card.f32_per_s * f.quantized
    return card.f16_per_s * f.quantized


def host_read(host: Host, rates: Rates) -> float:
    """Return the bytes/s that the host's threads read: the memory's rate, less for fast memory."""
    return host.read_bytes_per_s / math.hypot(1.0, host.read_bytes_per_s / rates.cpu_read)


def host_s(work: Work, host: Host, rates: Rates) -> float:
    """Return the seconds of work on the CPU."""
    read_s = (work.read_bytes + (work.moved_bytes if work.kind is Kind.PASS else 0.0)) / host_read(host, rates)
    if work.kind is Kind.PRODUCT:
        if work.n_tokens <= FEW_COLUMNS:
            return read_s + work.flops / (host.int8_per_s * rates.cpu_few)
        rate = host.int8_per_s * rates.cpu_product * (1.0 if work.type in _REPACKED else CPU_PLAIN)
        return max(read_s, work.flops / rate)
    if work.kind is Kind.ATTENTION:
        share = rates.cpu_attention_few if work.n_tokens <= FEW_COLUMNS else rates.cpu_attention
        return max(read_s, work.flops / (host.int8_per_s * share))
    if work.kind is Kind.STATE:
        return work.flops / (host.int8_per_s * _CPU_STATE)
    return read_s


#: Share of the host's 8-bit peak that recurrent states reach, in 32 bits with one thread per head.
_CPU_STATE = 0.1


def overlapped(n: int, k: int, rates: Rates) -> float:
    """Return the fraction of the time that remains when ``k`` cards compute ``n`` micro-batches, several of them at once."""
    ideal = (n + k - 1) / (n * k)
    return 1.0 / (1.0 + rates.pipeline * (1.0 / ideal - 1.0))


def pageable_rate(host: Host, rates: Rates) -> float:
    """Return the most bytes/s of copies from pageable memory over any link."""
    return min(rates.pageable * host.read_bytes_per_s, _STAGING_BYTES_PER_S)
