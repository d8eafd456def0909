"""The whole story in six tests: read this first.

A graph is described, then placed, cut into splits, given memory and computed. Each test shows one step.
"""

from __future__ import annotations

import numpy as np
import pytest

import pyggml as ggml
from pyggml.record import CopyRecord, UsedExpertsRecord

N_EXPERT, N_EMBD, N_FF, N_TOKEN = 8, 64, 32, 40


class Moe:
    """One expert multiplication: the weight in host memory, routing ids as an input."""

    def __init__(self) -> None:
        self.cpu, self.gpu = ggml.CPU(threads=1), ggml.Sim("rtx4090-pcie4")
        self.rng = np.random.default_rng(0)
        self.weights = ggml.Context()
        self.up = self.weights.new_tensor("f32", (N_EMBD, N_FF, N_EXPERT), name="blk.0.ffn_up_exps.weight")
        self.weights.alloc(self.cpu, usage="weights")
        self.up.set_array(self.rng.standard_normal((N_EXPERT, N_FF, N_EMBD)))
        self.graph = ggml.Graph()
        with self.graph:
            self.x = self.graph.input("f32", (N_EMBD, 1, N_TOKEN), name="x")
            self.ids = self.graph.input("i32", (2, N_TOKEN), name="ids")
            self.y = ggml.mul_mat_id(self.up, self.x, self.ids).named("y")
        self.graph.expand(self.y)

    def compute(self, sched: ggml.Scheduler, experts: tuple[int, ...]) -> np.ndarray:
        """Compute with ids drawn from some experts, and return the result."""
        sched.reset()
        sched.alloc_graph(self.graph)
        self.x.set_array(np.random.default_rng(1).standard_normal((N_TOKEN, 1, N_EMBD)))
        self.ids.set_array(np.resize(experts, (N_TOKEN, 2)))
        sched.compute(self.graph)
        return self.y.numpy()


@pytest.fixture
def moe() -> Moe:
    """Return the multiplication, set up anew."""
    return Moe()


def test_graph_on_the_cpu() -> None:
    """Ops describe, `expand` orders, the scheduler allocates and computes; arrays go in and come out."""
    graph = ggml.Graph()
    with graph:
        a = graph.input("f32", (4, 3), name="a")  # ne order: rows of 4
        b = graph.input("f32", (4, 2), name="b")
        y = ggml.relu(ggml.mul_mat(a, b))
    graph.expand(y)
    assert [node.op.name for node in graph.nodes] == ["MUL_MAT", "UNARY"]
    sched = ggml.Scheduler([ggml.CPU(threads=1)])
    sched.alloc_graph(graph)
    a_values, b_values = np.arange(12, dtype="f4").reshape(3, 4), np.array([[1, 0, 0, 0], [0, -1, 0, 0]], "f4")
    a.set_array(a_values)
    b.set_array(b_values)
    sched.compute(graph)
    np.testing.assert_array_equal(y.numpy(), np.maximum(b_values @ a_values.T, 0))


def test_views_share_memory() -> None:
    """A view has its own `ne` and `nb` and no memory; a view of a view points at the owner."""
    context = ggml.Context()
    a = context.new_tensor("f32", (4, 3), name="a")
    context.alloc(ggml.CPU())
    a.set_array(np.arange(12).reshape(3, 4))
    row = ggml.view_1d(a, 4, offset=a.nb[1])
    half = ggml.view_1d(row, 2, offset=2 * row.nb[0])
    turned = ggml.transpose(a)
    assert half.view_src is a
    assert half.view_offs == 4 * 4 + 2 * 4
    assert half.numpy().tolist() == [6, 7]
    assert (turned.shape, turned.is_contiguous()) == ((4, 3), False)
    np.testing.assert_array_equal(turned.numpy(), a.numpy().T)


def test_only_used_experts_are_copied(moe: Moe) -> None:
    """Over a device and the CPU, the device takes the large batch, and only the experts that ids name are moved."""
    sched = ggml.Scheduler([moe.gpu, moe.cpu])
    y = moe.compute(sched, experts=(1, 2, 6))
    (split,) = sched.splits
    assert sched.backends[split.backend_id] is moe.gpu
    assert split.inputs == (moe.up, moe.x, moe.ids)
    assert sched.cause(moe.y) is ggml.Cause.OFFLOADED
    expert = N_EMBD * N_FF * 4
    padding = 2 * 512  # after expert 2, and after expert 6
    assert sched.stats.bytes_by_reason["experts"] == 3 * expert + padding
    on_cpu = Moe()  # the same numbers
    np.testing.assert_array_equal(y, on_cpu.compute(ggml.Scheduler([on_cpu.cpu]), experts=(1, 2, 6)))


def test_plan_without_data(moe: Moe) -> None:
    """Splits, causes and sizes are known before anything is allocated, for weights larger than this machine."""
    gpu = ggml.Sim("custom:24GiB,1000GB/s,25GB/s", data=False)
    huge = ggml.Tensor("f16", (1 << 20, 1 << 20), name="huge.weight")  # 2 TiB that nobody has
    huge.buffer = moe.cpu.buffer_type.alloc_buffer(0)  # of no bytes: enough to plan with
    huge.buffer.set_usage(ggml.BufferUsage.WEIGHTS)
    with ggml.Graph() as graph:
        y = ggml.mul_mat(huge, graph.input("f32", (1 << 20, 64), name="x"))
    graph.expand(y)
    sched = ggml.Scheduler([gpu, moe.cpu])
    gpu_bytes, cpu_bytes = sched.reserve_size(graph)
    (split,) = sched.splits
    assert sched.cause(y) is ggml.Cause.OFFLOADED
    assert [tensor.name for tensor in split.inputs] == ["huge.weight", "x"]
    assert gpu_bytes > huge.nbytes > cpu_bytes
    assert gpu.device.used_bytes == 0


def test_error_then_on(moe: Moe) -> None:
    """An id that is no expert is an error with the facts in fields, and the scheduler goes on."""
    sched = ggml.Scheduler([moe.gpu, moe.cpu])
    with pytest.raises(ggml.errors.ExpertIdError) as caught:
        moe.compute(sched, experts=(0, 8))
    error = caught.value
    assert (error.layer, error.ids, error.token, error.slot, error.id, error.n_expert) == (0, "ids", 0, 1, 8, 8)
    assert np.isfinite(moe.compute(sched, experts=(0, 7))).all()


def test_records_tell_everything(moe: Moe) -> None:
    """A recorder gets each copy and each computing, in order; statistics are counted from the same records."""
    recording = ggml.Recording()
    sched = ggml.Scheduler([moe.gpu, moe.cpu], recorder=recording)
    moe.compute(sched, experts=(3, 5))
    (used,) = (r for r in recording.records if isinstance(r, UsedExpertsRecord))
    copies = [r for r in recording.records if isinstance(r, CopyRecord)]
    assert used.used == (3, 5)
    assert [(r.tensor, r.reason) for r in copies] == [
        ("x", "input"),
        ("ids", "input"),
        ("blk.0.ffn_up_exps.weight", "experts"),
        ("blk.0.ffn_up_exps.weight", "experts"),
    ]
    assert sum(r.size_bytes for r in copies) == sched.stats.bytes_copied == moe.gpu.device.traffic.bytes_in
