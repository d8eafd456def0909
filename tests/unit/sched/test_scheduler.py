"""The scheduler's own manners: one thread, one graph, again and again; over mock devices, so that nothing is computed."""

from __future__ import annotations

import threading

import pytest

import pyggml as ggml
from pyggml.backends.mock import (
    BackendAbilities,
    BufferTypeAbilities,
    Capabilities,
    MockBackend,
    MockBufferType,
    MockDevice,
    MockMemory,
    OffloadWish,
)


def machine(*, offload: int | None = None, events: bool = False, alloc_limit: int = 0):
    """Return a mock GPU and a mock CPU with memory of their own, and the calls made on them."""
    calls: list[list[object]] = []
    memory = MockMemory()
    host = MockBufferType(BufferTypeAbilities("CPU", is_host=True, alignment=32), memory, calls.append)
    gpu = MockBufferType(BufferTypeAbilities("GPU0", alignment=128, alloc_limit=alloc_limit), memory, calls.append)
    bufts = {"CPU": host, "GPU0": gpu}
    wish = None if offload is None else OffloadWish(ops=None, min_batch=offload)
    backends: list[MockBackend] = []
    for i, (name, kind) in enumerate((("GPU0", ggml.DeviceType.GPU), ("CPU", ggml.DeviceType.CPU))):
        abilities = BackendAbilities(
            name, kind, name, (name,), offload=wish if i == 0 else None, caps=Capabilities(events=events)
        )
        backends.append(MockDevice(abilities, bufts, index=i, note=calls.append).backend())
    return backends[0], backends[1], calls


def moe(cpu: ggml.Backend, *, n_token: int = 4) -> tuple[ggml.Graph, ggml.Tensor, ggml.Tensor]:
    """Return a graph of one expert product whose weight is in host memory; its ids and its result."""
    weights = ggml.Context()
    w = weights.new_tensor("f32", (32, 16, 8), name="blk.0.ffn_up_exps.weight")
    weights.alloc(cpu, usage="weights")
    with ggml.Graph() as graph:
        x = graph.input("f32", (32, 1, n_token), name="x")
        ids = graph.input("i32", (2, n_token), name="ids")
        y = ggml.mul_mat_id(w, ggml.scale(x, 2.0), ids).named("y")
    graph.expand(y)
    return graph, ids, y


def test_graph_is_split_where_the_weight_is():
    """Without offload the op runs where its weight is, with offload where it is wanted; the cause says so."""
    for offload, where, cause in ((None, "CPU", ggml.Cause.WEIGHT0), (1, "GPU0", ggml.Cause.OFFLOADED)):
        gpu, cpu, _ = machine(offload=offload)
        graph, _, y = moe(cpu)
        sched = ggml.Scheduler([gpu, cpu])
        sched.alloc_graph(graph)
        backend = sched.tensor_backend(y)
        assert backend is not None
        assert (backend.name, sched.cause(y)) == (where, cause)


def test_second_thread_is_refused():
    """A scheduler that computes refuses a call from another thread and goes on."""
    gpu, cpu, _ = machine(offload=1)
    graph, _, _ = moe(cpu)
    seen: list[BaseException] = []

    def intrude() -> None:
        try:
            sched.reset()
        except ggml.errors.SchedError as error:
            seen.append(error)

    def callback(tensor: ggml.Tensor, ask: bool) -> bool:
        if not seen:
            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()
        return False

    sched = ggml.Scheduler([gpu, cpu], eval_callback=callback)
    sched.compute(graph)
    assert "another thread" in str(seen[0])
    sched.set_eval_callback(None)
    sched.compute(graph)


def test_unchanged_graph_keeps_its_allocation():
    """After a reset the same graph is taken up again: same splits, no call on any backend."""
    gpu, cpu, calls = machine(offload=1)
    graph, _, y = moe(cpu)
    sched = ggml.Scheduler([gpu, cpu])
    sched.alloc_graph(graph)
    splits, data = sched.splits, y.data
    sched.reset()
    calls.clear()
    sched.alloc_graph(graph)
    assert (sched.splits, y.data, calls) == (splits, data, [])
    backend = sched.tensor_backend(y)
    assert backend is gpu


def test_a_plan_does_not_change():
    """Pins, a reset, another plan of the same graph and the end of the scheduler leave a plan as it was."""
    gpu, cpu, _ = machine(offload=1)
    graph, _, y = moe(cpu)
    sched = ggml.Scheduler([gpu, cpu])
    sched.split_graph(graph)
    plan = sched.plan

    def facts(plan: ggml.Plan) -> list[object]:
        places = [(plan.assignment.get(n), plan.assignment.cause(n)) for n in graph.nodes]
        splits = [(s.backend_id, s.i_start, s.i_end, s.inputs) for s in plan.splits]
        transfers = [[(t.source, t.copy, t.kind, t.node) for t in own] for own in plan.transfers]
        return [places, splits, transfers, dict(plan.copies)]

    before = facts(plan)
    sched.set_tensor_backend(y, cpu)
    assert facts(plan) == before
    sched.split_graph(graph)
    assert sched.tensor_backend(y) is cpu
    assert facts(plan) == before
    sched.reset()
    sched.alloc_graph(graph)
    assert facts(sched.plan) != before  # copies are other tensors
    sched.close()
    assert facts(plan) == before
    for name in ggml.Split._fields:
        with pytest.raises(AttributeError):
            setattr(plan.splits[0], name, ())


def test_changed_graph_is_laid_out_anew():
    """A flag, a pin, another node: each is seen, and sources are what they were before."""
    gpu, cpu, _ = machine(offload=1)
    graph, _, y = moe(cpu)
    source = y.src[0]
    sched = ggml.Scheduler([gpu, cpu])
    sched.alloc_graph(graph)
    before = sched.splits
    assert y.src[0] is not source  # the split's copy
    sched.reset()
    y.set_output()
    sched.alloc_graph(graph)
    assert sched.splits is not before
    sched.reset()
    sched.set_tensor_backend(y, cpu)
    sched.alloc_graph(graph)
    assert sched.tensor_backend(y) is cpu
    assert y.src[0] is source  # on the CPU no copy is needed
    sched.reset()
    graph.expand(ggml.scale(y, 2.0).named("z"))
    sched.alloc_graph(graph)
    assert sched.tensor_backend(y) is gpu
    assert graph["z"].data is not None


def test_graphs_take_turns():
    """Two graphs are allocated in turn by one scheduler, and each time from the beginning."""
    gpu, cpu, _ = machine(offload=1)
    graphs = [moe(cpu, n_token=n) for n in (4, 40)]
    sched = ggml.Scheduler([gpu, cpu])
    for _ in range(2):
        for graph, _, y in graphs:
            sched.reset()
            sched.compute(graph)
            assert y.data is not None
    assert sched.stats.n_launches == 4 * sched.n_splits


def test_schedulers_live_side_by_side():
    """Two schedulers over the same backends do not touch each other's graphs."""
    gpu, cpu, _ = machine(offload=1)
    first, second = ggml.Scheduler([gpu, cpu]), ggml.Scheduler([gpu, cpu])
    (a, _, ya), (b, _, yb) = moe(cpu), moe(cpu)
    first.alloc_graph(a)
    second.alloc_graph(b)
    first.compute(a)
    second.compute(b)
    assert ya.buffer is not yb.buffer
    first.close()
    second.compute(b)


def test_another_graph_than_the_allocated_one_is_refused():
    """Computing another graph names both; strict replays upstream, which computes the allocated one."""
    gpu, cpu, _ = machine(offload=1)
    (a, _, _), (b, _, _) = moe(cpu), moe(cpu)
    sched = ggml.Scheduler([gpu, cpu])
    sched.alloc_graph(a)
    with pytest.raises(ggml.errors.SchedError, match="is allocated"):
        sched.compute(b)
    with pytest.raises(ggml.errors.SchedError, match="allocated already"):
        sched.alloc_graph(b)
    sched.compute(a)
    strict = ggml.Scheduler([gpu, cpu], strict=True)
    strict.alloc_graph(moe(cpu)[0])
    strict.compute(b)


def test_backends_are_checked():
    """No backend, no CPU at the end, a buffer type that a backend cannot use: each has its own words."""
    gpu, cpu, _ = machine()
    with pytest.raises(ggml.errors.SchedError, match="at least one"):
        ggml.Scheduler([])
    with pytest.raises(ggml.errors.SchedError, match="last backend must be a CPU"):
        ggml.Scheduler([cpu, gpu])
    with pytest.raises(ggml.errors.SchedError, match="cannot use memory"):
        ggml.Scheduler([gpu, cpu], bufts=[cpu.buffer_type, cpu.buffer_type])
    stranger, _, _ = machine()
    with pytest.raises(ggml.errors.SchedError, match="not a backend of this scheduler"):
        ggml.Scheduler([gpu, cpu]).buffer_size(stranger)


def test_failed_allocation_leaves_the_scheduler_usable():
    """A graph too large for the device is an error with its size; a smaller one is computed afterwards."""
    gpu, cpu, _ = machine(offload=1, alloc_limit=40_000)
    (big, _, _), (small, _, y) = moe(cpu, n_token=400), moe(cpu)
    sched = ggml.Scheduler([gpu, cpu])
    with pytest.raises(ggml.errors.OutOfMemoryError) as caught:
        sched.alloc_graph(big)
    assert caught.value.requested_bytes > 40_000
    sched.reset()
    sched.compute(small)
    assert y.data is not None


def test_debug_text_goes_to_stderr(capsys, monkeypatch):
    """Level 2 prints a line for each node, level 3 the causes too; nothing goes to stdout."""
    gpu, cpu, _ = machine(offload=1)
    for level, cause in (("2", "        ]"), ("3", "   1.off]")):
        monkeypatch.setenv("GGML_SCHED_DEBUG", level)
        graph, _, _ = moe(cpu)
        ggml.Scheduler([gpu, cpu]).split_graph(graph)
        out, err = capsys.readouterr()
        assert out == ""
        assert "## SPLIT #0: " in err
        assert f"[ GPU0 {cause}" in err


def test_pipeline_copies_rotate():
    """With pipeline copies each allocation uses the next copy, and a synchronization starts over."""
    gpu, cpu, _ = machine(offload=1, events=True)
    sched = ggml.Scheduler([gpu, cpu], parallel=True)
    seen = []
    for _ in range(5):
        sched.reset()
        sched.compute_async(moe(cpu)[0])
        seen.append(sched.cur_copy)
    assert seen == [0, 1, 2, 3, 0]
    sched.reset()
    sched.synchronize()
    assert sched.next_copy == 0
