"""The fitted numbers of the cost model: which share of a data sheet's rates kernels reach.

A product of a weight with ``m`` columns takes the longer of reading and multiplying. Multiplying reaches a share of the
card's peak, times ``m / (m + pad)`` for each matrix, because kernels compute whole tiles of columns. Experts have few
columns each, so padding matters most for them. Up to 8 columns, kernels read each weight once: memory limits them.

The shares are fitted to published runs (``docs/accuracy.md``), by family of kernels and never by card.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

__all__ = ["RATES", "Family", "Rates", "n_fitted"]

#: Columns up to which llama.cpp multiplies by reading each weight once (`MMVQ_MAX_BATCH_SIZE` and its like).
FEW_COLUMNS = 8


@dataclass(frozen=True, slots=True)
class Family:
    """Fitted numbers of one family of kernels."""

    quantized: float  #: share of the peak for quantised products: in 8 bits (CUDA), 32 (ROCm), 16 (Vulkan, Metal)
    memory: float  #: share of the memory's rate for weights that are read once
    pad: float  #: columns by which each matrix is padded
    launch_s: float  #: seconds from the end of a kernel to the start of the next
    attention: float  #: share of the peak in 16 bits


@dataclass(frozen=True, slots=True)
class Rates:
    """All fitted numbers."""

    cuda: Family = field(default_factory=lambda: Family(0.269, 0.881, 10, 1.07e-06, 0.64))
    rocm: Family = field(default_factory=lambda: Family(0.533, 0.95, 51.0, 4.93e-06, 0.199))
    vulkan: Family = field(default_factory=lambda: Family(0.2, 0.95, 52.6, 4.19e-06, 0.041))
    metal: Family = field(default_factory=lambda: Family(0.626, 0.899, 10, 3.24e-06, 0.296))
    half: float = 0.563  #: share of the peak in 16 bits for 16-bit weights on cards with matrix units
    half_metal: float = 0.772  #: the same on Apple chips
    dp4a: float = 0.345  #: share of the peak in 8 bits on cards without matrix units
    scalar: float = 11.5  #: CUDA: quantised products reach at most this times the peak in 32 bits
    few: float = 9.15  #: 32-bit operations per quantised weight in products of few columns
    few_half: float = 13.2  #: the same per 16-bit weight
    kv: float = 0.435  #: share of the memory's rate for K and V that are read for one token
    state: float = 0.0485  #: share of the peak in 32 bits for recurrent states
    passes: float = 1.17  #: moved bytes of small ops per counted byte
    expert_passes: float = 5.94  #: the same around experts, whose rows are gathered, weighted and added
    cpu_read: float = 181e9  #: most bytes/s that a host's threads read, with any memory
    cpu_few: float = 1.2  #: share of the host's 8-bit peak for products of few columns
    cpu_product: float = 0.502  #: the same for quantised products of many columns
    cpu_attention: float = 0.0126  #: the same for attention of many tokens
    cpu_attention_few: float = 0.0484  #: the same for attention of up to eight tokens
    switch_s: float = 5.59e-05  #: seconds from a device to the CPU and back
    slow_host: float = 16.2  #: factor of launch times with a small ARM host; a third of it if launched as one graph
    pageable: float = 0.458  #: share of the host's read rate for copies from pageable memory
    pipeline: float = 0.382  #: share of the possible gain of several cards that compute several micro-batches at once
    spread: float = 1.16  #: spread of `LogNormal`: how unevenly tokens use experts


#: Share of the CPU's rate for types that ggml does not repack.
CPU_PLAIN = 0.4
RATES = Rates()


def n_fitted(rates: Rates = RATES) -> int:
    """Return the number of fitted numbers."""
    n = 0
    for f in fields(rates):
        value = getattr(rates, f.name)
        n += len(fields(value)) if isinstance(value, Family) else 1
    return n
