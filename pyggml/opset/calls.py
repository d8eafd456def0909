"""Helpers of the calls that ops add to a `HostPlan`: layouts, and when a single thread runs an op."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from ..tensor import Tensor
from . import kernels
from .checks import source

if TYPE_CHECKING:
    from ..backends.host.plan import HostPlan

#: Elements below which one thread is as fast as all, because of the cost of synchronising threads.
SERIAL_ELEMENTS = 4096
SERIAL_PRODUCTS = 40_000
#: The same for additions and products of elements, which take about 0.1 ns each.
SERIAL_JOINS = 16_384
#: Cost of starting a row, in elements; measured for softmax.
ROW_ELEMENTS = 64
#: Approximate speeds, for `HostPlan._cut`.
PRODUCTS_PER_S = 5e10
ELEMENTS_PER_S = 5e8


class Layout(NamedTuple):
    """A tensor's memory in another shape, for `HostPlan.add`."""

    address: int
    type: int
    ne: tuple[int, int, int, int]
    nb: tuple[int, int, int, int]
    nbytes: int


@lru_cache(maxsize=1024)
def bits(value: float) -> int:
    """Return a float's bits as a parameter word."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def flat(plan: HostPlan, *tensors: Tensor) -> tuple[Tensor | Layout, ...]:
    """Return contiguous tensors as single rows; unchanged if one has gaps."""
    if not all(t.is_contiguous() for t in tensors):
        return tensors
    return tuple(
        Layout(
            plan.address_of(t),
            t.type,
            (t.numel, 1, 1, 1),
            (t.type.type_size, t.nbytes, t.nbytes, t.nbytes),
            t.nbytes,
        )
        for t in tensors
    )


class CallOptions(TypedDict):
    """Arguments of `HostPlan.add` that say how an op is run."""

    serial: bool
    cost: float


def by_steps(n: int, times: int = 1) -> CallOptions:
    """Return how an op of n steps is run, each of which takes ``times`` as long as an element of a simple op."""
    return {"serial": n < SERIAL_ELEMENTS, "cost": times * n / ELEMENTS_PER_S}


def by_products(n: int, times: int = 1) -> CallOptions:
    """Return how an op of n multiplications is run, each of which takes ``times`` as long as one of a matrix product."""
    return {"serial": n < SERIAL_PRODUCTS, "cost": times * n / PRODUCTS_PER_S}


def by_elements(t: Tensor) -> CallOptions:
    """Return how an element-wise op is run."""
    return by_steps(t.numel)


def by_rows(t: Tensor) -> CallOptions:
    """Return how an op is run that has a cost per row in addition to that of elements."""
    return by_steps(t.numel + ROW_ELEMENTS * t.nrows)


def with_sources(t: Tensor, n: int) -> tuple[Tensor, ...]:
    """Return a node and its first n sources."""
    return t, *(source(t, i) for i in range(n))


def dequantiser(t: Tensor) -> int:
    """Return the address of the function that dequantises a tensor's rows; 0 if the type is not quantised."""
    coded = kernels.coded
    known = kernels.dequantise.DEQUANTISE
    if t.type in coded.TYPES:
        return int(coded.dequantise_kernel(t.type).address)
    return int(known[t.type].address) if t.type in known else 0
