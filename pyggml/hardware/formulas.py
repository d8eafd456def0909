"""How long work takes on a card or a host: the one cost model, behind virtual time, `splits`, `plan` and foresight.

`Work` says what is asked of a device: of a node of a graph (`pyggml.work`) or of a layer of a model (`pyggml.foresight.counts`). What kernels
reach of a data sheet is in `rates`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum, auto

from ..types import Type
from .cards import Card
from .hosts import Host
from .rates import CPU_PLAIN, FEW_COLUMNS, Family, Rates

__all__ = ["Kind", "Work", "backend_family", "card_s", "family_of", "host_read", "host_s", "pageable_rate"]

#: Types whose weights the CPU keeps in an order of its own (`ggml_repack_get_optimal_repack_type`).
_REPACKED = {Type.Q4_0, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.Q8_0, Type.IQ4_NL, Type.Q2_K}
#: What a driver stages of pageable memory at most: 13.6 to 14 GB/s measured on Windows, 21 by what a run on Linux implies.
_STAGING_BYTES_PER_S = 20e9
#: Tokens that a block of ROCm's attention works on (`fattn-tile.cuh`); each block reads K and V again, from memory unless caches have them.
_QUERIES = 32


class Kind(Enum):
    """Which kernels do the work."""

    PASS = auto()  #: small ops: memory alone
    PRODUCT = auto()
    ATTENTION = auto()
    STATE = auto()  #: recurrent states


@dataclass(frozen=True, slots=True)
class Work:
    """What is asked of a device, whatever it is.

    Attributes
    ----------
    flops : float
        Operations; a multiplication with addition is two.
    read_bytes : float
        Weights, K and V, or states that are read once.
    moved_bytes : float
        Activations that small ops read and write.
    n_kernels : float
        Launches.
    type : Type
        Of a product's weight.
    columns, matrices : float
        Of a product: columns of all matrices together, and matrices that are read.
    n_tokens : int
        Of a product or of attention: up to `FEW_COLUMNS` take other kernels.
    heads_bytes : float
        Of attention over a quantised cache: K and V, read by each head for itself.
    is_expert : bool
        Whether the activations are those of experts, which are gathered, weighted and added.
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
    """Return the family of kernels, by the card or by the backend that is asked for."""
    return "vulkan" if "vulkan" in backend.lower() else card.family


def family_of(rates: Rates, kind: str) -> Family:
    """Return the numbers of a family of kernels."""
    return {"cuda": rates.cuda, "rocm": rates.rocm, "vulkan": rates.vulkan, "metal": rates.metal}[
        kind.partition("-")[0]
    ]


def card_s(work: Work, card: Card, rates: Rates, *, backend: str = "", slow_host: bool = False) -> float:
    """Return the seconds of work on a card.

    Parameters
    ----------
    backend : str
        ``"vulkan"`` for kernels other than the card's usual ones.
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
        ):  # heads share no reads (`fattn-vec.cuh`), but the cache does
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
    """Return the operations a second that products with weights of a type come to, of whole tiles."""
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
    """Return what the host's threads read a second: that of its memory, and of fast memory less."""
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
        return max(read_s, work.flops / (host.int8_per_s * rates.cpu_attention))
    if work.kind is Kind.STATE:
        return work.flops / (host.int8_per_s * _CPU_STATE)
    return read_s


#: Of the host's 8-bit peak, by recurrent states, which are in 32 bits and of one thread a head.
_CPU_STATE = 0.1


def pageable_rate(host: Host, rates: Rates) -> float:
    """Return what copies from pageable memory carry a second at most, however wide the link."""
    return min(rates.pageable * host.read_bytes_per_s, _STAGING_BYTES_PER_S)
