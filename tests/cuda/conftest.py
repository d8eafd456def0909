"""Tests of the CUDA kernels need a compiler for them: the ``cuda`` extra. They need neither a driver nor a card."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(params=["emulator", pytest.param("driver", marks=pytest.mark.gpu)])
def card(request):
    """Give something that runs kernels: the emulator, with the module's options, or the first card of this machine."""
    from emulated_card import Card, DriverBench

    from pyggml.backends import cuda

    if request.param == "emulator":
        yield Card(**getattr(request.module, "CARD_OPTIONS", {}))
        return
    found = cuda.devices()
    if not found:
        pytest.skip(f"no card: {cuda.why_missing()}")
    bench = DriverBench(found[0])
    yield bench
    bench.close()


def pytest_collection_modifyitems(items):
    """Skip this folder's tests where numba-cuda is missing; Numba's own copy of it is not enough."""
    if importlib.util.find_spec("numba_cuda") is not None:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="numba-cuda is not installed (pip install -e '.[cuda]')"))
