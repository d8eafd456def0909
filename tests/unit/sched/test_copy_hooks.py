"""The hooks of ggml 0.27, what stands in their place in earlier dialects, and ids that are themselves a weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import pyggml as ggml
from pyggml.dialect import DIALECTS, Repairs
from pyggml.record import CopyRecord, ReadRecord, Recording

N, F, E, T = 32, 16, 8, 40
USED = np.resize([3, 5], (T, 2)).astype("i4")


class World:
    """A product with experts in host memory, over a simulated device and the CPU."""

    def __init__(self, *, ids_are_weight: bool = False, **options: Any) -> None:
        self.recording = Recording()
        self.gpu, cpu = ggml.Sim(threads=1), ggml.CPU(threads=1)
        self.sched = ggml.Scheduler([self.gpu, cpu], recorder=self.recording, **options)
        weights = ggml.Context()
        self.experts = weights.new_tensor("f32", (N, F, E), name="blk.0.ffn_up_exps.weight")
        table = weights.new_tensor("i32", (2, T), name="table")
        weights.alloc(cpu, usage="weights")
        rng = np.random.default_rng(3)
        self.values = rng.standard_normal((E, F, N)).astype("f4")
        self.experts.set_array(self.values)
        table.set_array(USED)
        self.graph = ggml.Graph()
        with self.graph:
            x = self.graph.input("f32", (N, 1, T), name="x")
            ids = table if ids_are_weight else self.graph.input("i32", (2, T), name="ids")
            self.y = ggml.mul_mat_id(self.experts, x, ids).named("y").set_output()
        self.graph.expand(self.y)
        self.sched.alloc_graph(self.graph)
        self.x = rng.standard_normal((T, 1, N)).astype("f4")
        x.set_array(self.x)
        if not ids_are_weight:
            ids.set_array(USED)

    def compute(self) -> World:
        """Compute once, from an empty recording."""
        self.recording.records.clear()
        self.sched.compute(self.graph)
        return self

    def is_right(self) -> bool:
        """Whether the product is that of the chosen experts."""
        want = np.einsum("tkfn,tn->tkf", self.values[USED], self.x[:, 0])
        return bool(np.allclose(self.y.numpy(), want, atol=1e-4))

    def copied(self) -> list[tuple[str, str, int, int]]:
        """Tensor, reason, offset and size of each copy to the device."""
        found = [r for r in self.recording.records if isinstance(r, CopyRecord)]
        return [(r.tensor, r.reason, r.offset_bytes, r.size_bytes) for r in found]


EXPERT = 4 * N * F
USED_RANGES = [("blk.0.ffn_up_exps.weight", "experts", e * EXPERT, EXPERT + 512) for e in (3, 5)]


@pytest.mark.parametrize("version", DIALECTS)
def test_used_experts_are_copied_in_every_dialect(version: str) -> None:
    """What llama.cpp's users get does not change with ggml's version: the used experts, and the right product."""
    world = World(dialect=DIALECTS[version]).compute()
    assert [c for c in world.copied() if c[1] == "experts"] == USED_RANGES
    assert world.is_right()


@pytest.mark.parametrize(("version", "reason"), [("0.26", "experts"), ("0.27", "weight")])
def test_ggml_by_itself_copies_experts_whole_since_0_27(version: str, reason: str) -> None:
    """Without a policy ggml 0.26 copies used experts, and 0.27 the whole weight."""
    world = World(dialect=DIALECTS[version], policy=None).compute()
    sizes = [size for name, why, _, size in world.copied() if name.endswith("exps.weight") and why == reason]
    assert sizes == ([EXPERT + 512] * 2 if reason == "experts" else [E * EXPERT])
    assert world.is_right()


def test_weights_in_host_memory_are_copied_last() -> None:
    """The experts come first among the sources of the node, and are copied after its other inputs."""
    world = World(dialect=DIALECTS["0.26"]).compute()
    assert world.copied()[0][1] == "experts"
    world = World().compute()
    assert [c[0] for c in world.copied()] == ["x", "ids", "blk.0.ffn_up_exps.weight", "blk.0.ffn_up_exps.weight"]


def test_ids_are_read_from_where_the_dialect_says() -> None:
    """0.26 reads ids where they are made; 0.27 reads the split's copy of them back from the device."""

    def read(version: str) -> tuple[str, str]:
        records = World(dialect=DIALECTS[version]).compute().recording.records
        (found,) = (r for r in records if isinstance(r, ReadRecord))
        return found.tensor, found.backend

    assert read("0.26") == ("ids", "CPU")
    assert read("0.27") == ("SIM0#ids#0", "SIM0")


@pytest.mark.parametrize("version", ["0.26", "0.27"])
def test_ids_that_are_a_host_weight_choose_the_right_experts(version: str) -> None:
    """An i32 table in host memory is copied after the experts, so it is read where it lies."""
    world = World(ids_are_weight=True, dialect=DIALECTS[version]).compute()
    assert [c for c in world.copied() if c[1] == "experts"] == USED_RANGES
    assert world.is_right()


def test_ids_that_are_a_host_weight_are_read_too_early_upstream() -> None:
    """Without the repair 0.27 reads what the memory of the copy held before: on a simulated device, poison."""
    world = World(ids_are_weight=True, repairs=replace(Repairs(), host_weight_ids=False))
    with pytest.raises(ggml.errors.ExpertIdError) as caught:
        world.compute()
    assert caught.value.ids == "table"


def test_copy_callback_is_asked_about_host_weights_alone() -> None:
    """It gets backend, weight, copy and split as upstream gives them, after all other inputs; True: it has copied."""
    asked = []

    def copy(backend: Any, src: ggml.Tensor, dst: ggml.Tensor, graph: Any) -> bool:
        asked.append((backend.name, src.name, dst.name, [n.name for n in graph.nodes]))
        assert src.data is not None
        for e in (3, 5):
            backend.set_tensor_async(dst, src.data + e * EXPERT, e * EXPERT, EXPERT + 512)
        return True

    world = World(copy_callback=copy).compute()
    assert asked == [("SIM0", "blk.0.ffn_up_exps.weight", "SIM0#blk.0.ffn_up_exps.weight#0", ["y"])]
    assert [c for c in world.copied() if c[1] == "experts"] == USED_RANGES
    assert world.is_right()


def test_copy_callback_may_decline() -> None:
    """False: the weight is copied whole."""
    world = World(copy_callback=lambda *_: False).compute()
    assert [c[3] for c in world.copied() if c[1] == "weight"] == [E * EXPERT]
    assert world.is_right()


def test_realloc_callback_is_told_of_reserves() -> None:
    """It is called when a graph does not fit, with what changed; not by `reserve`, and not when the graph fits."""
    told = []
    gpu, cpu = ggml.Sim(threads=1), ggml.CPU(threads=1)
    sched = ggml.Scheduler([gpu, cpu], realloc_callback=lambda *told_: told.append(told_))

    def graph(n: int, n_ops: int, *, on_device: bool = True) -> ggml.Graph:
        made = ggml.Graph()
        sched.reset()
        with made:
            y = made.input("f32", (n,), name="x")
            for _ in range(n_ops):
                y = ggml.sqr(y)
                sched.set_tensor_backend(y, gpu if on_device else cpu)
        made.expand(y.set_output())
        return made

    sched.reserve(graph(1024, 2))
    assert told == []
    sched.alloc_graph(graph(512, 2))
    assert told == []
    sched.alloc_graph(graph(4096, 2))
    assert [t[2:] for t in told] == [(False, False)]
    assert told[0][0] is sched
    assert [t.name for t in told[0][1].nodes] == [t.name for t in sched.sched_graph.nodes]
    sched.alloc_graph(graph(4096, 5))
    assert [t[2:] for t in told[1:]] == [(False, True)]
    sched.alloc_graph(graph(4096, 5, on_device=False))
    assert told[-1][2] is True


def test_hooks_that_contradict_each_other_are_refused() -> None:
    """A policy beside a copy callback, and a realloc callback in a dialect without one, are named."""
    with pytest.raises(ggml.errors.SchedError, match="a policy and a copy callback"):
        World(policy=ggml.FullCopier(), copy_callback=lambda *_: False)
    with pytest.raises(ggml.errors.SchedError, match=r"0\.26 has no realloc callback"):
        World(dialect=DIALECTS["0.26"], realloc_callback=lambda *_: None)
