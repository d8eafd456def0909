"""Costs of the kernels: none gets dearer by more than 5 per cent unseen, and the page says what is kept."""

from __future__ import annotations

import costs as kept
import numpy as np
import pytest
from pyggml.kernels.cuda import compiler

#: above it a cost has grown
TOLERANCE = 1.05
COUNTS = ("instructions", "load_sectors", "sectors_per_useful", "wavefronts_per_request", "barriers")


def check_resources(name, cc):
    """Fail on a stack, on spills, on calls, and on more registers or shared memory than are kept."""
    have, budget = kept.resources(name, cc), kept.load()[name]
    assert have["stack"] == have["spilled"] == have["external"] == 0
    assert have["registers"] <= budget["registers"][f"{cc[0]}.{cc[1]}"] * TOLERANCE
    assert have["shared"] <= budget["shared"]


@pytest.fixture(autouse=True)
def _assembler():
    if kept.find_ptxas() is None:
        pytest.skip("ptxas is not installed (pip install nvidia-cuda-nvcc==13.0.88)")


def test_every_kernel_is_kept():
    """The table has every kernel, and no other."""
    assert list(kept.load()) == list(compiler.KERNELS)


@pytest.mark.parametrize("name", compiler.KERNELS)
def test_no_kernel_gets_dearer(name):
    """Counts on the fixed work, and resources on every target, are at most what is kept, and 5 per cent."""
    for cc in compiler.TARGETS:
        check_resources(name, cc)
    have, budget = kept.counts(name), kept.load()[name]
    for what in COUNTS:
        assert have[what] <= budget[what] * TOLERANCE, what
    assert have["multiply_add"] >= budget["multiply_add"] / TOLERANCE


def test_the_example_tile():
    """The example tile reaches the ratio that tiles are held to."""
    import fast_tile
    from emulator_kernels import mmid_case

    w, x, _, plan = mmid_case(8, 256, 256, 64, 2, seed=0)
    dst = np.zeros((128, 256), "f4")
    stats = fast_tile.kernel(kept.CC)[plan.grid, 128](w, x, dst, plan.row_src, plan.row_dst, plan.bounds, 256, 256)
    assert stats.by_opcode["fma"] / stats.warp_instructions == pytest.approx(kept.EXAMPLE_RATIO, abs=0.0005)


@pytest.mark.parametrize("name", kept.GGML)
def test_no_worse_than_ggml(name):
    """The few-token kernels need at most 1.2 times ggml's instructions and sectors on the same work."""
    instructions, sectors = kept.GGML[name]
    cost = kept.load()[name]
    assert cost["instructions"] <= 1.2 * instructions
    assert cost["load_sectors"] <= 1.2 * sectors


@pytest.mark.parametrize("name", [name for name in compiler.KERNELS if name.startswith("tile_")])
def test_tiles_multiply(name):
    """Every tile reaches 0.8 of the multiply-adds (dp4a or fma) per instruction that the example tile reaches."""
    assert kept.load()[name]["multiply_add"] >= 0.8 * kept.EXAMPLE_RATIO


def test_the_page_has_these_numbers():
    """The tables in docs/cuda.md are made from what is kept."""
    page = kept.PAGE.read_text()
    for rows in kept.tables(kept.load()).values():
        assert rows in page
