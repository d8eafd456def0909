"""What tests of every folder share."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Generator
from pathlib import Path

import pytest

from pyggml.commands._fetch import cache_folder, example_model, fetch_smollm2

# a shell that starts tests in the background makes them, and all their children, deaf to Ctrl-C, which some send
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep modules and tests out of the garbage collector's sight: they live to the end, and looking at them takes a tenth of a run."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()
        gc.set_threshold(5000, 20, 20)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Give SmolLM2-135M-Instruct (dense, Q4_1), fetched once into the cache that `make run` uses."""
    return fetch_smollm2(cache_folder())


@pytest.fixture(scope="session")
def example_path(smollm2_path: Path) -> Path:
    """Give the mixture of experts that `make run` answers with, made once in the same cache."""
    return example_model(smollm2_path.parent)
