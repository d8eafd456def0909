"""Failures of devices under llama.cpp: what it does is in docs/upstream.md; the caller gets a typed error and goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from pyggml.backends.sim.faults import Moment
from pyggml.errors import (
    BackendError,
    ComputeError,
    DeviceUnavailableError,
    GraphError,
    OutOfMemoryError,
    PyggmlError,
)
from pyggml.llama import LlamaModel
from pyggml.llama.library import find_llama
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags

CONTEXT = ContextFlags(n_ctx=256, n_ubatch=64)
PROMPT = [(32 + 53 * i) % 250 for i in range(40)]
TWO = PlacementFlags(tensor_split=(1.0, 1.0))


def _open(path: Path, *, n: int = 1, placement: PlacementFlags | None = None, **more: Any) -> LlamaModel:
    return LlamaModel(
        path, devices=["sim:rtx4090-pcie4"] * n, placement=placement, context=CONTEXT, threads=1, host=None,
        **more,
    )  # fmt: skip


@pytest.mark.parametrize("after", [0, 1, 2])
def test_no_memory_for_weights_cache_or_graphs(random_model: Callable[[str], Path], after: int) -> None:
    """The model, or its context, is not made: the error has the numbers of the device."""
    with pytest.raises(OutOfMemoryError) as caught:
        _open(random_model("qwen3moe"), faults=[(0, "alloc", after)])
    assert caught.value.buft == "SIM0"
    assert caught.value.requested_bytes > 100_000


def test_a_pipeline_without_memory_is_given_up(random_model: Callable[[str], Path]) -> None:
    """With two devices llama.cpp tries again without pipeline copies, and runs."""
    with _open(random_model("qwen3moe"), n=2, placement=TWO, faults=[(0, "alloc", 2)]) as model:
        assert np.isfinite(model.decode(PROMPT)).all()


@pytest.mark.parametrize(("moment", "kind"), [("copy", BackendError), ("lost", DeviceUnavailableError)])
def test_failures_while_loading(random_model: Callable[[str], Path], moment: str, kind: type[PyggmlError]) -> None:
    """A copy of a weight that fails, which llama.cpp cannot be told of, fails the loading; so does a lost device."""
    with pytest.raises(kind, match=r"copy of '.*\.weight'"):
        _open(random_model("qwen3moe"), faults=[(0, moment, 3)])


def test_failures_while_decoding(random_model: Callable[[str], Path]) -> None:
    """In the prompt and in a token: the tokens are not in the cache, and the same decode succeeds afterwards with the same bits."""
    with _open(random_model("qwen3moe"), placement=PlacementFlags(cpu_moe=True)) as model:
        prompt = model.decode(PROMPT)
        token = model.decode([1])
        faults: list[tuple[Moment, int, type[BackendError]]] = [
            ("compute", 0, ComputeError), ("compute", 3, ComputeError), ("copy", 2, BackendError),
        ]  # fmt: skip
        for moment, after, kind in faults:
            for tokens, expected, n_past in ((PROMPT, prompt, 0), ([1], token, 40)):
                model.rewind(n_past)
                model.fail_at(moment, after=after)
                with pytest.raises(kind, match="a fault that was asked for"):
                    model.decode(tokens)
                assert model.n_past == n_past
                assert np.array_equal(model.decode(tokens), expected)
        with pytest.raises(GraphError, match="nothing fails at 'x'"):
            model.fail_at(cast(Moment, "x"))


def test_a_lost_device(random_model: Callable[[str], Path]) -> None:
    """Everything fails while it is lost; once it is back its memory is empty, which llama.cpp would compute with."""
    with _open(random_model("qwen3moe")) as model:
        model.fail_at("lost")
        for _ in range(2):
            with pytest.raises(DeviceUnavailableError, match="was lost"):
                model.decode([1])
        model.recover()
        with pytest.raises(ComputeError, match="the logits are not numbers"):
            model.decode([1])
        assert not model.is_closed
        assert model.n_past == 0


CALLBACK = """
import pickle, sys
from pathlib import Path
from pyggml.backends.sim.device import SimDevice
from pyggml.errors import BackendError
from pyggml.llama.engine import Engine
def broken(self, op): raise ValueError("asked for")
SimDevice.supports_op = broken
try:
    Engine(Path(sys.argv[1])).open(pickle.loads(Path(sys.argv[2]).read_bytes()))
except BackendError as error:
    print(error, type(error.__cause__).__name__, flush=True)
import os; os._exit(0)
"""


def test_an_exception_in_a_callback(random_model: Callable[[str], Path], tmp_path: Path) -> None:
    """An exception in a function that llama.cpp calls ends neither process, and is the cause of a typed error."""
    import pickle

    with _open(random_model("qwen3moe")) as model:
        (tmp_path / "request").write_bytes(pickle.dumps(model.opened_with))
    done = subprocess.run(
        [sys.executable, "-c", CALLBACK, str(find_llama()), str(tmp_path / "request")],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "llama: a callback raised ValueError: asked for ValueError" in done.stdout


def test_two_models_have_a_child_each(random_model: Callable[[str], Path]) -> None:
    """A second model, or context, is a second LlamaModel: they do not disturb each other; a child takes one only."""
    path = random_model("qwen3moe")
    with _open(path) as one, _open(path) as two:
        assert np.array_equal(one.decode(PROMPT), two.decode(PROMPT))
        with pytest.raises(PyggmlError, match="has a model already"):
            one._process.ask(one.opened_with)
        one.close()
        assert np.isfinite(two.decode([1])).all()
