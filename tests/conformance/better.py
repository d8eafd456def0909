"""The kit of ``test_better_*.py``: small graphs over [sim, cpu] and on the CPU alone, and the cases where upstream breaks."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import pyggml as ggml
from pyggml.dialect import DIALECTS
from pyggml.replay import read_case, replay

CASES = Path(__file__).parent.parent / "replay" / "cases"
BROKEN = {"wrong", "abort", "crash", "undefined"}
#: Recorded case -> the test that shows our answer.
COVERED: dict[str, str] = {}

Array = npt.NDArray[Any]
N_TOKEN = 40  #: above the 32 from which on the simulated device takes ops with host weights


def breaks(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Note that a test answers recorded cases."""

    def note(test: Callable[..., None]) -> Callable[..., None]:
        COVERED.update(dict.fromkeys(names, test.__name__))
        return test

    return note


def case_path(name: str) -> Path:
    """Return the file of a recorded case."""
    return CASES / f"{name}.case.json.gz"


def load(path: Path) -> dict[str, Any]:
    """Return the JSON in a gzip file."""
    loaded: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return loaded


def replayed(name: str, version: str = "0.26") -> list[dict[str, Any]]:
    """Return the records of our replay of a recorded case."""
    records: list[dict[str, Any]] = replay(read_case(case_path(name)), dialect=DIALECTS[version])["steps"]
    return records


class World:
    """Backends, weights on the host, one graph, and the values of its inputs.

    Parameters
    ----------
    on_device : bool
        Over a simulated device and the CPU, or on the CPU alone.
    profile : str
        Of the device.
    options
        Of the scheduler.
    """

    def __init__(self, *, on_device: bool = True, profile: str = "rtx4090-pcie4", **options: Any) -> None:
        self.cpu = ggml.CPU(threads=1)
        self.gpu = ggml.Sim(profile, threads=1) if on_device else None
        self.backends = [self.gpu, self.cpu] if self.gpu is not None else [self.cpu]
        self.sched = ggml.Scheduler(self.backends, **options)
        self.weights = ggml.Context()
        self.new_graph()

    def new_graph(self) -> ggml.Graph:
        """Start another graph."""
        self.graph = ggml.Graph()
        self.values: dict[ggml.Tensor, Array] = {}
        self.pins: list[ggml.Tensor] = []
        return self.graph

    def weight(self, type: str, ne: Sequence[int], name: str, values: Array | None = None) -> ggml.Tensor:
        """Return a weight in host memory; random values if none are given."""
        tensor = self.weights.new_tensor(type, ne, name=name)
        self.weights.alloc(self.cpu, usage="weights")
        if values is None:
            rng = np.random.default_rng(len(self.weights.tensors))
            values = rng.standard_normal(tuple(ne)[::-1]).astype("f4")
        tensor.set_array(values)
        return tensor

    def input(self, type: str, ne: Sequence[int], name: str, values: Array | Sequence[Any]) -> ggml.Tensor:
        """Return an input of the graph that gets these values."""
        tensor = self.graph.input(type, ne, name=name)
        self.values[tensor] = np.asarray(values)
        return tensor

    def activations(self, n_embd: int, n_token: int = N_TOKEN, *, name: str = "x") -> ggml.Tensor:
        """Return an input for `mul_mat_id`: one row a token, random."""
        values = np.random.default_rng(7).standard_normal((n_token, 1, n_embd)).astype("f4")
        return self.input("f32", (n_embd, 1, n_token), name, values)

    def ids(self, rows: Array, *, name: str = "ids") -> ggml.Tensor:
        """Return an input of expert ids, ``(n_token, n_used)``."""
        return self.input("i32", rows.shape[::-1], name, rows)

    def pin(self, *tensors: ggml.Tensor) -> None:
        """Put tensors on the device, where there is one."""
        self.pins += tensors

    def run(self, *outputs: ggml.Tensor) -> list[Array]:
        """Expand the graph to the outputs, allocate, set the inputs, compute, and return the outputs' values."""
        for tensor in outputs:
            tensor.set_output()
        self.graph.expand(*outputs)
        self.allocate()
        self.set_inputs()
        self.sched.compute(self.graph)
        return [tensor.numpy() for tensor in outputs]

    def allocate(self) -> None:
        """Pin what is to be pinned, and allocate the graph."""
        self.sched.reset()
        for tensor in self.pins if self.gpu is not None else ():
            self.sched.set_tensor_backend(tensor, self.backends[0])
        self.sched.alloc_graph(self.graph)

    def set_inputs(self) -> None:
        """Give the inputs that the graph uses their values."""
        for tensor, values in self.values.items():
            if tensor.buffer is not None and tensor.numel:
                tensor.set_array(values)

    def assert_usable(self) -> None:
        """Compute a good graph with the same scheduler: only the used experts move, and the result is right."""
        results = []
        for world in (self, World(on_device=False)):
            world.new_graph()
            with world.graph:
                w = world.weight("f32", (32, 16, 4), "good_exps.weight", np.arange(2048, dtype="f4").reshape(4, 16, 32))
                rows = np.resize([0, 3], (N_TOKEN, 2))
                y = ggml.mul_mat_id(w, world.activations(32), world.ids(rows))
            results += world.run(y)
        np.testing.assert_array_equal(*results)


def device_and_cpu(build: Callable[[World], Sequence[ggml.Tensor]], **options: Any) -> tuple[list[Array], list[Array]]:
    """Return the outputs of a graph over [sim, cpu], and on the CPU alone."""
    results = []
    for on_device in (True, False):
        world = World(on_device=on_device, **(options if on_device else {}))
        with world.graph:
            outputs = build(world)
        results.append(world.run(*outputs))
        if on_device:
            world.assert_usable()
    return results[0], results[1]
