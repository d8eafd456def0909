"""Small graphs over simulated devices that do their work late, for tests of waits and faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import pyggml as ggml
from pyggml.backend import Backend
from pyggml.backends.sim import SimBackend, SimDevice
from pyggml.cost import parse_profile
from pyggml.dialect import DEFAULT_DIALECT, Dialect
from pyggml.sched.compute import SplitRun
from pyggml.types import Op

N, T, N_EXPERT = 16, 3, 6
PROFILE = "custom:64MiB,100GB/s,10GB/s"
Array = npt.NDArray[np.float32]
_rng = np.random.default_rng(11)
W1, W2 = (_rng.standard_normal((N, N)).astype("f4") * 0.3 for _ in range(2))
EXPERTS = _rng.standard_normal((N_EXPERT, N, N)).astype("f4") * 0.3


@dataclass(eq=False)
class World:
    """A graph over devices, whose result adds to a sum that a device keeps."""

    backends: list[Backend]
    sched: ggml.Scheduler
    graph: ggml.Graph
    weights: dict[str, ggml.Tensor]
    inputs: dict[str, ggml.Tensor]
    pins: dict[ggml.Tensor, int]
    contexts: list[ggml.Context]
    seen: list[Array]

    def restore(self) -> None:
        """Write the weights, and zeros into the sum."""
        values = {"w1": W1, "w2": W2, "experts": EXPERTS}
        for name, tensor in self.weights.items():
            tensor.set_array(values.get(name, np.zeros(tensor.shape, "f4")))

    def start(self, i: int) -> None:
        """Start one computing with the i-th inputs; waits for nothing."""
        rng = np.random.default_rng(i)
        self.sched.reset()
        for tensor, backend in self.pins.items():
            self.sched.set_tensor_backend(tensor, self.backends[backend])
        self.sched.alloc_graph(self.graph)
        for name, tensor in self.inputs.items():
            value = (
                rng.integers(0, N_EXPERT, tensor.shape, np.int32) if name == "ids" else rng.random(tensor.shape, "f4")
            )
            tensor.set_array(value)
        self.sched.compute_async(self.graph)

    def run(self, n: int) -> list[Array]:
        """Compute n times without waiting between, and return the sum and what was seen on the way."""
        for i in range(n):
            self.start(i)
        self.sched.synchronize()
        return [*self.seen, self.weights["sum"].numpy()]

    def close(self) -> None:
        """Give all memory back."""
        self.sched.close()


def _make(
    backends: list[Backend],
    places: dict[str, tuple[int, tuple[int, ...]]],
    describe: Callable[[dict[str, ggml.Tensor], ggml.Graph], tuple[dict, dict]],
    *,
    parallel: bool,
    dialect: Dialect,
    watch: str = "",
) -> World:
    contexts: list[ggml.Context] = []
    weights: dict[str, ggml.Tensor] = {}
    for name, (at, ne) in places.items():
        contexts.append(ggml.Context())
        weights[name] = contexts[-1].new_tensor("f32", ne, name=name)
        contexts[-1].alloc(backends[at], usage="weights")
    graph = ggml.Graph()
    with graph:
        inputs, pins = describe(weights, graph)
    seen: list[Array] = []

    def callback(tensor: ggml.Tensor, ask: bool) -> bool:
        if tensor.name == watch and not ask:
            seen.append(tensor.numpy())
        return tensor.name == watch or not ask

    sched = ggml.Scheduler(
        backends, parallel=parallel, dialect=dialect, debug=0, offload_rule=lambda b, op: op.op is Op.MUL_MAT_ID,
        eval_callback=callback if watch else None,
    )  # fmt: skip
    sched.run_type = Saboteur
    world = World(backends, sched, graph, weights, inputs, pins, contexts, seen)
    world.restore()
    return world


def _sims(seed: int | None, n: int) -> list[Backend]:
    return [ggml.Sim(PROFILE, index=i, threads=1, seed=seed) for i in range(n)]


def two_devices(
    seed: int | None, *, parallel: bool = False, dialect: Dialect = DEFAULT_DIALECT, watch: str = ""
) -> World:
    """Give results to and fro between two devices and the host, and experts to the first; each reads an input."""

    def describe(w, graph):
        x, ids = graph.input("f32", (N, T), name="x"), graph.input("i32", (2, T), name="ids")
        pins = {}

        def on(backend: int, node):
            pins[node] = backend
            return node

        first = on(2, ggml.scale(x, 2.0))
        h1 = on(0, ggml.mul_mat(w["w1"], first)).named("h1")
        h2 = on(1, ggml.add(on(1, ggml.mul_mat(w["w2"], h1)), x))
        h3 = on(0, ggml.add(on(0, ggml.mul_mat(w["w1"], h2)), x)).named("h3")
        h4 = on(1, ggml.mul_mat(w["w2"], h3))
        h5 = on(0, ggml.sqr(h4))
        own_ids = on(0, ggml.cont(ids))
        moe = on(0, ggml.mul_mat_id(w["experts"], ggml.reshape_3d(h5, N, 1, T), own_ids))
        host = on(2, ggml.scale(moe, 0.5))
        last = on(1, ggml.mul_mat(w["w2"], host))
        graph.expand(on(1, ggml.cpy(on(1, ggml.add(w["sum"], last)), w["sum"])))
        return {"x": x, "ids": ids}, pins

    places = {"w1": (0, (N, N)), "w2": (1, (N, N)), "experts": (2, (N, N, N_EXPERT)), "sum": (1, (N, 2, T))}
    return _make([*_sims(seed, 2), ggml.CPU(1)], places, describe, parallel=parallel, dialect=dialect, watch=watch)


def one_device(seed: int | None, *, parallel: bool = False, dialect: Dialect = DEFAULT_DIALECT) -> World:
    """Give an input to a device."""

    def describe(w, graph):
        x = graph.input("f32", (N, T), name="x")
        graph.expand(ggml.cpy(ggml.add(w["sum"], ggml.mul_mat(w["w1"], x)), w["sum"]))
        return {"x": x}, {}

    places = {"w1": (0, (N, N)), "sum": (0, (N, T))}
    return _make([*_sims(seed, 1), ggml.CPU(1)], places, describe, parallel=parallel, dialect=dialect)


def host_then_device(seed: int | None, *, parallel: bool = False, dialect: Dialect = DEFAULT_DIALECT) -> World:
    """Give results of the host to a device that has no input of its own: only the wait for its last use holds the host."""

    def describe(w, graph):
        x = graph.input("f32", (N, T), name="x")
        first = ggml.scale(x, 2.0)
        h = ggml.mul_mat(w["w1"], first)
        total = ggml.add(w["sum"], h)
        last = ggml.cpy(total, w["sum"])
        graph.expand(last)
        return {"x": x}, {first: 1, h: 0, total: 0, last: 0}

    places = {"w1": (0, (N, N)), "sum": (0, (N, T))}
    return _make([*_sims(seed, 1), ggml.CPU(1)], places, describe, parallel=parallel, dialect=dialect)


class Unified(SimDevice):
    """A simulated device that computes in the host's memory, too, as a processor's own graphics does; late, with a seed."""

    def supports_buft(self, buft: ggml.BufferType) -> bool:
        """Whether it is its own or the host's."""
        return buft.is_host or SimDevice.supports_buft(self, buft)

    def backend(self, *, threads: int | None = None) -> SimBackend:
        """Return a stream of work that knows where the host's memory is."""
        backend = SimDevice.backend(self, threads=threads)
        own = backend._arena_address
        backend._arena_address = lambda t: t.data if t.storage is not None and t.storage.is_host else own(t)  # type: ignore[method-assign]
        return backend


def rewritten_experts(seed: int | None, *, dialect: Dialect = DEFAULT_DIALECT) -> World:
    """Let a device that shares the host's memory write experts there, and another copy those it uses and multiply with them."""

    def describe(w, graph):
        x, ids = graph.input("f32", (N, T), name="x"), graph.input("i32", (2, T), name="ids")
        h, own_ids = ggml.mul_mat(w["w1"], x), ggml.cont(ids)
        graph.expand(h)  # first, so that the last computing is over before experts are written
        graph.expand(own_ids)
        shrunk = ggml.scale(w["experts"], 0.75)
        written = ggml.cpy(shrunk, w["experts"])
        graph.expand(written)
        moe = ggml.mul_mat_id(w["experts"], ggml.reshape_3d(h, N, 1, T), own_ids)
        total = ggml.add(w["sum"], moe)
        last = ggml.cpy(total, w["sum"])
        graph.expand(last)
        return {"x": x, "ids": ids}, {h: 0, own_ids: 0, shrunk: 1, written: 1, moe: 0, total: 0, last: 0}

    unified = Unified(parse_profile(PROFILE), index=1, seed=seed).backend(threads=1)
    places = {"w1": (0, (N, N)), "experts": (2, (N, N, N_EXPERT)), "sum": (0, (N, 2, T))}
    backends = [*_sims(seed, 1), unified, ggml.CPU(1)]
    return _make(backends, places, describe, parallel=False, dialect=dialect)


def chain(seed: int | None, *, parallel: bool = False, dialect: Dialect = DEFAULT_DIALECT) -> World:
    """Give results from the host to a device and on to another, neither of which has an input of its own."""

    def describe(w, graph):
        x = graph.input("f32", (N, T), name="x")
        first = ggml.scale(x, 2.0)
        h1 = ggml.mul_mat(w["w1"], first)
        h2 = ggml.mul_mat(w["w2"], h1)
        total = ggml.add(w["sum"], h2)
        last = ggml.cpy(total, w["sum"])
        graph.expand(last)
        return {"x": x}, {first: 2, h1: 0, h2: 1, total: 1, last: 1}

    places = {"w1": (0, (N, N)), "w2": (1, (N, N)), "sum": (1, (N, T))}
    return _make([*_sims(seed, 2), ggml.CPU(1)], places, describe, parallel=parallel, dialect=dialect)


def two_streams(seed: int | None, *, parallel: bool = False, dialect: Dialect = DEFAULT_DIALECT) -> World:
    """Take turns on two streams of one device: nothing is copied between them, so their splits have no inputs.

    The first cannot square.
    """
    device = ggml.Sim(PROFILE, threads=1, seed=seed).device
    streams: list[Backend] = [device.backend(threads=1), device.backend(threads=1)]
    streams[0].supports_op = lambda op: op.op is not Op.SQR and device.supports_op(op)  # type: ignore[method-assign]

    def describe(w, graph):
        x = graph.input("f32", (N, T), name="x")
        h1 = ggml.mul_mat(w["w1"], x)
        total = ggml.add(w["sum"], ggml.sqr(h1))
        graph.expand(ggml.cpy(total, w["sum"]))
        return {"x": x}, {}

    places = {"w1": (0, (N, N)), "sum": (0, (N, T))}
    return _make([*streams, ggml.CPU(1)], places, describe, parallel=parallel, dialect=dialect)


# -- taking waits out --------------------------------------------------------


class Saboteur(SplitRun):
    """A run that leaves out the waits of one place."""

    __slots__ = ()
    skip: str = ""
    met: set[str] = set()  # noqa: RUF012  # of the class: a scheduler makes the runs
    kept: list[object] = []  # noqa: RUF012  # memory that a read still writes which nobody waits for

    def _is_left_out(self, method: str, place: str) -> bool:
        name = f"{method}:{place}"
        self.met.add(name)
        return name == self.skip

    def synchronize(self, i_split: int, backend_id: int, place: str) -> None:
        """Wait, or not."""
        if not self._is_left_out("synchronize", place):
            SplitRun.synchronize(self, i_split, backend_id, place)

    def host_wait(self, i_split: int, backend_id: int, place: str) -> None:
        """Wait, or not."""
        if not self._is_left_out("host_wait", place):
            SplitRun.host_wait(self, i_split, backend_id, place)

    def stream_wait(self, i_split: int, backend_id: int, place: str) -> None:
        """Wait, or not."""
        if not self._is_left_out("stream_wait", place):
            SplitRun.stream_wait(self, i_split, backend_id, place)

    def read_wait(self, backend_id: int) -> None:
        """Wait, or not."""
        self.kept.append(self.ids._words)
        if not self._is_left_out("read_wait", "ids"):
            SplitRun.read_wait(self, backend_id)

    def mark_wait(self, backend_id, queue, mark, place: str) -> None:
        """Wait, or not."""
        if not self._is_left_out("mark_wait", place):
            SplitRun.mark_wait(self, backend_id, queue, mark, place)


@contextmanager
def without(place: str) -> Iterator[None]:
    """Let the runs of `World` leave out the waits of one place; an empty name leaves out none."""
    Saboteur.skip = place
    Saboteur.met.clear()
    try:
        yield
    finally:
        Saboteur.skip = ""
