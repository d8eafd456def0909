"""Plans carried out without data: the splits, sizes, bytes and times of a run that has data."""

from __future__ import annotations

import time

import numpy as np
import pytest

import pyggml as ggml
from pyggml.backends.host.dataless import FIRST_ADDRESS, DatalessCPU
from pyggml.commands.make_moe import command as make_moe
from pyggml.errors import BackendError, FormatError, GraphError, OutOfMemoryError, SchedError
from pyggml.plan_report import plan_batches
from pyggml.planning import Planner, virtual_clock
from pyggml.record import AllocRecord, ComputeRecord, CopyRecord, ReadRecord, Recording
from pyggml.routing import LogNormal, RecordedRouting, Zipf, parse_routing
from pyggml.sched.debug import assignments_text
from pyggml.session import ContextFlags, PlacementFlags, Session, TopK
from pyggml.simulation import simulate_batch

SIM = "sim:rtx4090-pcie4"
ON_HOST = PlacementFlags(cpu_moe=True)
TOKENS = [(i * 53 + 32) % 259 for i in range(70)]


def _context(n_ubatch: int = 48) -> ContextFlags:
    return ContextFlags(n_ctx=256, n_ubatch=n_ubatch)


def _plan(path, recorder=None, *, devices=(SIM,), policy="used", n_ubatch=48, placement=ON_HOST) -> Planner:
    planner = Planner.open(
        path, devices=devices, placement=placement, context=_context(n_ubatch), data=False, strict=True,
        policy=policy, recorder=recorder,
    )  # fmt: skip
    planner.sched.clock = virtual_clock(planner.backends)
    return planner


def _routing(path) -> RecordedRouting:
    topk = TopK()
    with Session.open(path, cpu=ggml.CPU(1), context=_context()) as session:
        session.decode(TOKENS, outputs="all", topk=topk)
    return RecordedRouting(topk.ids, "test")


def _happened(recording: Recording) -> list[tuple]:
    """Return all copies, reads and launches, wall times out."""
    found: list[tuple] = []
    for r in recording.records:
        if isinstance(r, CopyRecord):
            found.append((r.split, r.tensor, r.src, r.dst, r.offset_bytes, r.size_bytes, r.reason, r.virtual))
        elif isinstance(r, ReadRecord):
            found.append((r.tensor, r.backend, r.size_bytes, r.virtual))
        elif isinstance(r, ComputeRecord):
            found.append((r.split, r.backend, r.n_nodes, r.first, r.virtual))
    return found


@pytest.mark.parametrize(("n_tokens", "n_ubatch"), [(40, 48), (1, 48), (70, 48)])
@pytest.mark.parametrize("outputs", ["last", "all"])
def test_plan_with_recorded_routing_does_what_the_run_did(model, n_tokens, n_ubatch, outputs):
    """Every copy, read and launch is the same, with the same virtual times where all ids are read; split text and buffer sizes are too."""
    _, path = model
    routing = _routing(path)
    planned, ran = Recording(), Recording()
    with Session.open(
        path, devices=[SIM], cpu=ggml.CPU(1), placement=ON_HOST, context=_context(n_ubatch), strict=True, recorder=ran,
        clock=virtual_clock([ggml.Sim("rtx4090-pcie4"), ggml.CPU(1)]),
    ) as run, _plan(path, planned, n_ubatch=n_ubatch) as plan:  # fmt: skip
        ran.clear()
        run.sched.clock.reset()
        run.decode(TOKENS[:n_tokens], outputs=outputs)
        planned.clear()
        result = simulate_batch(plan, n_tokens, outputs=outputs, routing=routing)
        if n_tokens == 70:  # the rest of 22 stays on the CPU: a run does not know how many experts it reads there
            assert [h[:-1] for h in _happened(planned)] == [h[:-1] for h in _happened(ran)]
        else:
            assert _happened(planned) == _happened(ran)
            assert result.seconds == run.sched.clock.host_s > 0
        assert result.bytes_copied == run.sched.stats.bytes_copied
        assert result.bytes_full == run.sched.stats.bytes_full
        if n_tokens == 40:
            assert plan.memory() == run.memory()
            (graph,) = plan.plan_batch(n_tokens, outputs=outputs)
            assert assignments_text(graph.plan, level=2) == assignments_text(run.sched.plan, level=2)


class _OneCallIfSmall(ggml.UsedExpertCopier):
    """README's policy; counts how often it is asked."""

    n_asked = 0

    def copy(self, transfer):
        type(self).n_asked += 1
        if transfer.source.name.endswith("down_exps.weight"):
            return False
        return super().copy(transfer)


def test_a_plan_a_simulation_and_a_run_obey_the_users_policy(llama):
    """Each calls it, and all report the same bytes, which are neither the default's nor those of whole copies."""
    routing = _routing(llama)
    n_bytes = {}
    for name, policy in (("own", _OneCallIfSmall()), ("used", "used"), ("full", ggml.FullCopier())):
        _OneCallIfSmall.n_asked = 0
        with _plan(llama, policy=policy) as plan:
            planned = simulate_batch(plan, 40, routing=routing)
            n_planned = _OneCallIfSmall.n_asked
        with _plan(llama, policy=policy) as plan:
            (reported,) = plan_batches(plan, [40], routing=routing)
            assert reported.simulated.bytes_by_reason == planned.bytes_by_reason
            assert _OneCallIfSmall.n_asked == 2 * n_planned
        with Session.open(
            llama, devices=[SIM], cpu=ggml.CPU(1), placement=ON_HOST, context=_context(), strict=True, policy=policy
        ) as run:
            run.decode(TOKENS[:40])
            assert run.sched.stats.bytes_by_reason == planned.bytes_by_reason
        assert _OneCallIfSmall.n_asked == 3 * n_planned
        assert (n_planned > 0) is (name == "own")
        n_bytes[name] = planned.bytes_by_reason
    used, own, full = n_bytes["used"], n_bytes["own"], n_bytes["full"]
    assert used["weight"] < own["weight"] < full["weight"]
    assert used["experts"] > own["experts"] > full["experts"] == 0


class _Holds(ggml.FullCopier):
    """Asks for a megabyte of the device."""

    def reserve(self, plan):
        plan.memory(plan.backends[0], 1 << 20, "mine")


def test_memory_of_a_policy_is_planned_as_it_is_held(llama):
    """A plan's memory has it, as a session's has."""
    with _plan(llama, policy=_Holds()) as plan, Session.open(
        llama, devices=[SIM], cpu=ggml.CPU(1), placement=ON_HOST, context=_context(), strict=True, policy=_Holds()
    ) as run:  # fmt: skip
        assert [m.policy for m in plan.memory() if m.buft == "SIM0"] == [1 << 20]
        assert plan.memory() == run.memory()
        assert "copy policy" in plan.memory()._repr_html_()


def test_records_hold_the_memory_that_reports_tell(llama):
    """Weights, KV cache and compute buffers by buffer type, to the byte; of a plan those of the run; in the end nothing."""

    def held(recording: Recording, purpose: str) -> dict[str, int]:
        by_buft: dict[tuple[str, str], int] = {}
        for r in recording.records:
            if isinstance(r, AllocRecord) and r.purpose == purpose:
                by_buft[r.backend, r.buft] = r.size_bytes
                assert r.backend == ("SIM0" if r.buft == "SIM0" else "CPU")
        return {buft: n for (_, buft), n in by_buft.items() if n}

    planned, ran = Recording(), Recording()
    with Session.open(
        llama, devices=[SIM], cpu=ggml.CPU(1), placement=ON_HOST, context=_context(), strict=True, recorder=ran
    ) as run, _plan(llama, planned) as plan:  # fmt: skip
        for recording, opened in ((planned, plan), (ran, run)):
            memory = opened.memory()
            assert held(recording, "weights") == {m.buft: m.weights for m in memory if m.weights}
            assert held(recording, "kv_cache") == {m.buft: m.cache for m in memory if m.cache}
        assert len(held(ran, "weights")) > 1
        assert held(ran, "compute") == {m.buft: m.compute for m in run.memory() if m.compute}
        simulate_batch(plan, 40)
        assert held(planned, "compute") == {m.buft: m.compute for m in plan.memory() if m.compute}
    for recording in (planned, ran):
        assert not any(held(recording, purpose) for purpose in ("weights", "kv_cache", "compute"))


def test_plan_over_two_devices_with_pipeline_copies_is_carried_out(llama):
    """All layers on two devices: events and pipeline copies go the same way without data."""
    with _plan(llama, devices=(SIM, SIM), placement=PlacementFlags()) as plan:
        assert plan.sched.n_copies > 1
        result = simulate_batch(plan, 40)
        assert result.seconds > 0
        assert result.compute_s["SIM1"] > 0


def test_batches_follow_each_other_in_virtual_time(llama):
    """What is carried out next starts where the last ended, and takes what it takes alone."""

    def spans(recording: Recording) -> list[tuple[float, float]]:
        found = [(r.virtual.start_s, r.virtual.end_s) for r in recording.records if isinstance(r, ComputeRecord)]
        recording.clear()
        return found

    recording = Recording()
    with _plan(llama, recording) as plan, _plan(llama) as other:
        first = simulate_batch(plan, 40)
        before = spans(recording)
        second = simulate_batch(plan, 5)
        after = spans(recording)
        assert max(end for _, end in before) <= first.seconds <= min(start for start, _ in after)
        assert max(end for _, end in after) <= first.seconds + second.seconds
        alone = simulate_batch(other, 5)
        assert second.seconds == pytest.approx(alone.seconds)
        assert second.compute_s == pytest.approx(alone.compute_s)
        assert second.copy_to_s == pytest.approx(alone.copy_to_s)


def test_a_device_too_small_for_the_largest_graph_may_do_for_a_small_one(llama):
    """A plan holds what a session would reserve; where that does not fit, what the batch takes."""
    with _plan(llama) as plan:
        largest = {m.buft: m for m in plan.memory()}["SIM0"].compute
    recording = Recording()
    with _plan(llama, recording, devices=(f"sim:custom:{(largest - 4096) / 2**20:.6f}MiB,100GB/s,10GB/s",)) as plan:
        assert simulate_batch(plan, 2).n_micro_batches == 1
        held = [r.size_bytes for r in recording.records if isinstance(r, AllocRecord) and r.buft == "SIM0"]
        assert 0 < held[-1] < largest
        with pytest.raises(OutOfMemoryError):
            simulate_batch(plan, 48)


def test_whole_copies_move_what_whole_copies_would(llama):
    """With the full policy nothing is left out, and no ids are asked for."""
    with _plan(llama, policy=ggml.FullCopier()) as plan:
        result = simulate_batch(plan, 40)
        assert result.bytes_copied == result.bytes_full
        assert result.bytes_by_reason["experts"] == 0


def test_numbers_cannot_be_read_where_there_are_none(llama):
    """A tensor of a plan says that it has no data."""
    with _plan(llama) as plan:
        graph = next(iter(plan.micro_batches(40)))[1]()
        plan.sched.alloc_graph(graph.graph)
        for tensor in (graph.logits, graph.inputs.tokens):
            with pytest.raises(BackendError, match="no data"):
                tensor.numpy()


def test_a_plan_on_devices_with_data_is_refused(llama):
    """Nothing is computed on addresses that are not there."""
    with (
        Planner.open(llama, devices=[ggml.Sim()], cpu=ggml.CPU(1), context=_context(), data=False) as plan,
        pytest.raises(SchedError, match="data"),
    ):
        simulate_batch(plan, 4)


def test_a_model_of_235_billion_parameters_is_planned_in_seconds():
    """94 layers of 128 experts, from a header without data: bytes by the routing, and their time on the link."""
    start_s = time.perf_counter()
    planner = Planner.open(
        "qwen3-235b-a22b", devices=[SIM], placement=ON_HOST, context=ContextFlags(n_ctx=4096), data=False, strict=True
    )
    with planner as plan:
        plan.sched.clock = virtual_clock(plan.backends)
        result = simulate_batch(plan, 512, routing=LogNormal(2.4))
    assert time.perf_counter() - start_s < 60  # a second on a machine that has nothing else to do
    assert 0.7 < result.bytes_copied / result.bytes_full < 0.85
    link = plan.backends[0].device.profile.link
    assert result.seconds > link.seconds(result.bytes_copied)


def test_used_experts_gain_what_was_published():
    """Of gpt-oss-20b, by micro-batch: the spread is fitted to the first speed-up alone; all but the last come out."""
    published = {128: 1.63, 256: 1.47, 512: 1.36, 1024: 1.16, 2048: 1.28}
    ratios = []
    for n_ubatch in published:
        seconds = []
        for policy in (ggml.FullCopier(), "used"):
            with Planner.open(
                "gpt-oss-20b", devices=["sim:custom:24GiB,1008GB/s,10.05GB/s"], placement=ON_HOST, data=False, strict=True,
                context=ContextFlags(n_ctx=2048, n_ubatch=n_ubatch), policy=policy,
            ) as plan:  # fmt: skip
                plan.sched.clock = virtual_clock(plan.backends)
                seconds.append(simulate_batch(plan, 2048, routing=LogNormal(3.2)).seconds)
        ratios.append(seconds[0] / seconds[1])
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[:-1] == pytest.approx(list(published.values())[:-1], abs=0.07)
    assert 1.1 < ratios[-1] < published[2048]  # the full copy is too fast there, the other too slow: docs/accuracy.md


# -- routing -----------------------------------------------------------------


@pytest.mark.parametrize(("law", "number"), [(Zipf, 1.9), (LogNormal, 2.4)])
def test_drawn_experts_are_the_same_at_every_call_and_in_any_batch(law, number):
    """A token chooses the same experts alone as in a batch; layers and seeds differ."""
    routing = law(number)
    alone = [routing.experts(3, [t], 64, 6) for t in range(20)]
    assert all(len(experts) == 6 for experts in alone)
    assert law(number).experts(3, range(20), 64, 6) == set.union(*alone)
    assert routing.experts(4, range(20), 64, 6) != set.union(*alone)
    assert law(number, seed=1).experts(3, range(20), 64, 6) != set.union(*alone)


@pytest.mark.parametrize(
    "law", [Zipf(0.0), Zipf(1.0), Zipf(1.9), LogNormal(0.0), LogNormal(1.0), LogNormal(2.4)], ids=str
)
@pytest.mark.parametrize(
    ("n_expert", "n_used", "n_token", "within"), [(128, 8, 64, 0.05), (32, 4, 512, 0.05), (8, 2, 5, 0.15)]
)
def test_drawn_experts_are_as_many_as_expected(law, n_expert, n_used, n_token, within):
    """The mean over layers of what is drawn is near the formula that plans state; of few experts less so."""
    drawn = np.mean([len(law.experts(layer, range(n_token), n_expert, n_used)) for layer in range(60)])
    assert drawn == pytest.approx(law.used(n_expert, n_used, n_token), rel=within)


def test_recorded_routing_goes_through_a_file(tmp_path):
    """What was written is read, and what the recording lacks is an error that says so."""
    ids = np.array([[[0, 1], [1, 2]], [[3, 1], [-1, -1]]], np.int32)
    path = tmp_path / "r.npz"
    np.savez(path, topk=ids)
    routing = parse_routing(f"trace:{path}")
    assert routing.experts(0, [0, 1], 4, 2) == {0, 1, 2}
    assert routing.experts(1, [0], 4, 2) == {1, 3}
    for layer, tokens, n_expert, n_used in (
        (2, [0], 4, 2),
        (0, [2], 4, 2),
        (1, [1], 4, 2),
        (1, [0], 3, 2),
        (0, [0], 4, 3),
    ):
        with pytest.raises(GraphError):
            routing.experts(layer, tokens, n_expert, n_used)
    with pytest.raises(FormatError):
        parse_routing(f"trace:{tmp_path / 'none.npz'}")


@pytest.mark.parametrize("usage", ["weights", "any"])
@pytest.mark.parametrize("user", range(3))
@pytest.mark.parametrize("home", range(3))
def test_what_a_plan_places_nowhere_is_copied_between_all_devices(home: int, user: int, usage: str) -> None:
    """A view of a cache or weight of a plan, which has no memory, can be an input of a split on any other backend."""
    backends = [ggml.Sim(index=0, data=False), ggml.Sim(index=1, data=False), DatalessCPU().backend()]
    cache = ggml.Tensor("f32", (64, 32), name="cache_v")
    cache.buffer, cache.data = backends[home].buffer_type.alloc_buffer(0), FIRST_ADDRESS
    cache.buffer.set_usage(usage)
    graph = ggml.Graph()
    with graph:
        view = ggml.view_2d(cache, 64, 16, 256, 0)
        y = ggml.mul(graph.input("f32", (64, 16), name="x"), view)
    graph.expand(y)
    sched = ggml.Scheduler(backends)
    sched.set_tensor_backend(y, backends[user])
    sched.alloc_graph(graph)
    sched.compute(graph)
    copied = {t.source.name for split in sched.plan.transfers for t in split} - {"x"}
    assert copied == ({view.name} if home != user else set())


def test_a_plan_is_simulated_again_with_inputs_set_again(tmp_path) -> None:
    """A second simulation of the same batch sets the inputs, of which the first one has reused the memory."""
    path = tmp_path / "tiny.gguf"
    make_moe.main([str(path), "--layers", "2", "--embd", "64", "--vocab", "320"], standalone_mode=False)
    context = ContextFlags(n_ctx=512, n_seq_max=4, offload_kqv=False)
    with Planner.open(
        path, devices=["sim", "sim"], placement=PlacementFlags(n_gpu_layers=0), context=context, data=False
    ) as planner:
        first = simulate_batch(planner, 64)
        assert simulate_batch(planner, 64) == first
