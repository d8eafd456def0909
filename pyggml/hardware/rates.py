"""What kernels reach of a data sheet: every fitted number of the clock, and the formulas that they stand in.

A product of a weight with ``m`` columns takes the longer of reading and multiplying. Multiplying reaches a share of the peak of the
card, times ``m / (m + pad)`` for each matrix: a kernel works on whole tiles of columns. Experts get few columns each, so
they pay for padding most. A few columns (up to 8) go through kernels that read each weight once and wait for memory alone.

The shares are fitted to published runs (``docs/accuracy.md``), by families of kernels and never by a card's name.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

__all__ = ["RATES", "Family", "Rates", "n_fitted"]

#: Columns up to which llama.cpp multiplies by reading each weight once (`MMVQ_MAX_BATCH_SIZE` and its like).
FEW_COLUMNS = 8


@dataclass(frozen=True, slots=True)
class Family:
    """What one family of kernels reaches."""

    quantized: float  #: of the peak that quantised products have: in 8 bits (CUDA), 32 (ROCm), 16 (Vulkan, Metal)
    memory: float  #: of the memory's rate, by weights that are read once
    pad: float  #: columns that each matrix is padded by
    launch_s: float  #: from the end of a kernel to the start of the next
    attention: float  #: of the peak in 16 bits


@dataclass(frozen=True, slots=True)
class Rates:
    """All fitted numbers."""

    cuda: Family = field(default_factory=lambda: Family(0.269, 0.881, 10, 1.07e-06, 0.64))
    rocm: Family = field(default_factory=lambda: Family(0.534, 0.95, 51.1, 4.92e-06, 0.199))
    vulkan: Family = field(default_factory=lambda: Family(0.2, 0.95, 52.6, 4.2e-06, 0.041))
    metal: Family = field(default_factory=lambda: Family(0.626, 0.899, 10, 3.24e-06, 0.296))
    half: float = 0.563  #: of the peak in 16 bits, by weights of 16 bits on cards with matrix units
    half_metal: float = 0.772  #: the same on Apple's
    dp4a: float = 0.346  #: of the peak in 8 bits, by cards without matrix units
    scalar: float = 11.5  #: CUDA: quantised products reach no more than this times the peak in 32 bits
    few: float = 9.11  #: operations in 32 bits for each quantised weight, by products of few columns
    few_half: float = 13.2  #: the same for each weight of 16 bits
    kv: float = 0.419  #: of the memory's rate, by K and V that are read for one token
    state: float = 0.0486  #: of the peak in 32 bits, by recurrent states
    passes: float = 1.17  #: times the counted bytes of small ops that are really moved
    expert_passes: float = 5.95  #: the same around experts, whose rows are gathered, weighted and added
    cpu_read: float = 159e9  #: bytes a second that the threads of a host come to, however fast its memory
    cpu_few: float = 1.24  #: of the host's 8-bit peak, by products of few columns
    cpu_product: float = 0.502  #: of it, by quantised products of many columns
    cpu_attention: float = 0.0126  #: of it
    switch_s: float = 5.72e-05  #: from a device to the CPU and back
    slow_host: float = 16.2  #: launches of a small ARM host take so many times longer; a third of that as one graph
    pageable: float = 0.457  #: of the host's read rate, by copies from pageable memory
    pipeline: float = 0.382  #: of what several cards could gain by working on several micro-batches at a time
    spread: float = 1.16  #: how unevenly random tokens use experts (`LogNormal`)


#: Of the CPU's rate, by types that are not kept in an order of its own.
CPU_PLAIN = 0.4
RATES = Rates()


def n_fitted(rates: Rates = RATES) -> int:
    """Return how many numbers are fitted."""
    n = 0
    for f in fields(rates):
        value = getattr(rates, f.name)
        n += len(fields(value)) if isinstance(value, Family) else 1
    return n
