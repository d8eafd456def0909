"""Models and a cache folder of their own for tests that capture graphs from llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyggml.llama.library import find_llama
from pyggml.llama.process import LlamaProcess, shared_process
from pyggml.makers.make_moe import Recipe, Sizes, make_moe


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep captures in a folder of the test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PYGGML_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give small random models by architecture, each written once."""
    folder = tmp_path_factory.mktemp("models")

    def model(arch: str) -> Path:
        path = folder / f"{arch}.gguf"
        if not path.exists():
            make_moe(path, Recipe(arch=arch, sizes=Sizes(layers=3)))
        return path

    return model


@pytest.fixture(autouse=True, scope="session")
def one_child() -> Iterator[LlamaProcess]:
    """Give the child that all plans of the session share; a second one prints what its scheduler does."""
    with shared_process(find_llama()) as process, shared_process(find_llama(), prints=True):
        yield process


@pytest.fixture
def process() -> Iterator[LlamaProcess]:
    """Give a child that is ended after the test."""
    with LlamaProcess(find_llama()) as made:
        yield made
