"""Where upstream computes with wrong or missing data, pyggml computes what the CPU alone does.

Device memory is full of NaN before anything is written to it, so that data that was not copied shows in the result.
`strict=True` replays upstream, and shows its failure.
"""

from __future__ import annotations

import numpy as np
import pytest

import pyggml as ggml

from .better import N_TOKEN, World, breaks, device_and_cpu, replayed

D, F, E = 32, 16, 8
LOW, HIGH = np.resize([0, 1], (N_TOKEN, 2)), np.resize([5, 7, 5], (N_TOKEN, 2))


def _agree(ours: list[np.ndarray], cpu: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(ours, cpu, strict=True))


def _two_users(world: World) -> list[ggml.Tensor]:
    """One expert weight used by two nodes with other ids."""
    w = world.weight("f32", (D, F, E), "blk.3.ffn_up_exps.weight")
    x = world.activations(D)
    return [ggml.mul_mat_id(w, x, world.ids(LOW, name="low")), ggml.mul_mat_id(w, x, world.ids(HIGH, name="high"))]


@breaks("126-special-shared-experts")
def test_shared_experts_are_added_for_the_second_user() -> None:
    """An expert weight with two users of other ids: the second gets the experts that the first did not need."""
    assert _agree(*device_and_cpu(_two_users))


def test_shared_experts_are_lost_if_strict() -> None:
    """`strict=True` copies as upstream: the second user of an expert weight computes with what was never written."""
    ours, cpu = device_and_cpu(_two_users, strict=True)
    assert np.array_equal(ours[0], cpu[0])
    assert np.isnan(ours[1]).any()


def test_only_missing_experts_are_added() -> None:
    """What the first user brought is not copied again for the second."""
    world = World()
    with world.graph:
        outputs = _two_users(world)
    world.run(*outputs)
    expert, padding = D * F * 4, 512
    # 0 and 1 for the first; 5 for the second; 7 is the last and needs no padding
    assert world.sched.stats.bytes_by_reason["experts"] == (2 * expert + padding) + (expert + padding) + expert


def _dense_user(world: World) -> list[ggml.Tensor]:
    w = world.weight("f32", (D, F, E), "exps.weight")
    y = ggml.mul_mat_id(w, world.activations(D), world.ids(LOW))
    dense = np.random.default_rng(3).standard_normal((E, N_TOKEN, D)).astype("f4")
    return [y, ggml.mul_mat(w, world.input("f32", (D, N_TOKEN, E), "dense", dense))]


@breaks("127-special-shared-experts-dense")
def test_a_dense_user_gets_all_experts() -> None:
    """An expert weight used by MUL_MAT_ID, then whole by MUL_MAT: the rest of the experts is added."""
    assert _agree(*device_and_cpu(_dense_user))
    ours, _ = device_and_cpu(_dense_user, strict=True)
    assert np.isnan(ours[1]).any()


def _rewritten_ids(world: World) -> list[ggml.Tensor]:
    """Ids in one buffer: used, overwritten by a CPY, used again."""
    a, b = world.weight("f32", (D, F, E), "a_exps.weight"), world.weight("f32", (D, F, E), "b_exps.weight")
    x = world.activations(D)
    ids = world.weights.new_tensor("i32", LOW.shape[::-1], name="ids")
    where = world.gpu or world.cpu
    world.weights.alloc(where)
    ids.set_array(LOW)
    first = ggml.mul_mat_id(a, x, ids)
    new = ggml.cpy(world.input("i32", HIGH.shape[::-1], "new_ids", HIGH), ids)
    world.graph.expand(first.set_output(), new)
    return [first, ggml.mul_mat_id(b, x, ids)]


@breaks("120-special-ids-stale")
def test_rewritten_ids_are_read_again() -> None:
    """Ids that a node rewrote between two users are read anew for the second."""
    assert _agree(*device_and_cpu(_rewritten_ids))
    ours, _ = device_and_cpu(_rewritten_ids, strict=True)
    assert np.isnan(ours[1]).any()


def _two_sizes(world: World, sizes: tuple[int, int], rows: np.ndarray) -> list[ggml.Tensor]:
    """One ids tensor for weights of another number of experts each."""
    x, ids = world.activations(D), world.ids(rows)
    return [ggml.mul_mat_id(world.weight("f32", (D, F, n), f"blk.{n}.exps"), x, ids) for n in sizes]


@breaks("121-special-ids-cached-8-then-64", "122-special-ids-cached-64-then-8")
@pytest.mark.parametrize("sizes", [(8, 64), (64, 8)])
def test_ids_serve_weights_of_any_number_of_experts(sizes: tuple[int, int]) -> None:
    """Ids that were read for a weight of 8 experts serve one of 64, and the other way round."""
    assert _agree(*device_and_cpu(lambda world: _two_sizes(world, sizes, HIGH)))


@breaks("121-special-ids-cached-8-then-64", "122-special-ids-cached-64-then-8")
def test_cached_ids_are_checked_for_each_weight() -> None:
    """An id that one weight has and the next, smaller one has not is an error that names the smaller one."""
    world = World()
    with world.graph:
        outputs = _two_sizes(world, (64, 8), np.resize([2, 63], (N_TOKEN, 2)))
    with pytest.raises(ggml.errors.ExpertIdError) as caught:
        world.run(*outputs)
    assert (caught.value.tensor, caught.value.id, caught.value.n_expert) == ("blk.8.exps", 63, 8)
    world.assert_usable()


def _strided(world: World) -> list[ggml.Tensor]:
    """Experts that are every second half of a merged weight; the last one is used."""
    merged = world.weight("f32", (D, 2 * F, E), "gate_up_exps.weight")
    up = ggml.view_3d(merged, D, F, E, merged.nb[1], merged.nb[2], F * merged.nb[1]).named("up_exps.weight")
    up.buffer = merged.buffer  # weights that a loader makes views of have their buffer at once
    return [ggml.mul_mat_id(up, world.activations(D), world.ids(np.resize([1, E - 1], (N_TOKEN, 2))))]


@breaks("118-special-weight-view-strided-last")
def test_the_last_expert_of_a_strided_view_is_copied_to_its_end() -> None:
    """The range of the last expert of a strided view ends with the view, where upstream runs past it and aborts."""
    assert _agree(*device_and_cpu(_strided))


@breaks("113-special-no-ids-used", "112-special-no-tokens", "152-special-zero-size")
@pytest.mark.parametrize("version", ["0.20", "0.26", "0.27"])
@pytest.mark.parametrize("n_used", [0, 2])
def test_no_ids_copy_nothing(version: str, n_used: int) -> None:
    """No expert used, or no token: no expert is copied and the result is empty, in every dialect."""
    world = World(dialect=ggml.DIALECTS[version])
    n_token = 0 if n_used else N_TOKEN
    with world.graph:
        w = world.weight("f32", (D, F, E), "exps.weight")
        y = ggml.mul_mat_id(w, world.activations(D, n_token), world.ids(np.zeros((n_token, n_used), "i4")))
    world.pin(y)
    (values,) = world.run(y)
    assert values.size == 0
    assert world.sched.stats.bytes_by_reason.get("experts", 0) == 0
    world.assert_usable()


def _pinned_weight(world: World) -> list[ggml.Tensor]:
    w = world.weight("f32", (D, F), "pinned.weight")
    x = world.input("f32", (D, 4), "x", np.random.default_rng(1).standard_normal((4, D)).astype("f4"))
    y = ggml.mul_mat(w, x)
    world.pin(w, y)
    return [y]


@breaks("159-special-pin-weight")
def test_a_pinned_host_weight_is_copied() -> None:
    """A host weight pinned to the device is copied there as any input; if strict the device finds it missing."""
    assert _agree(*device_and_cpu(_pinned_weight))
    world = World(strict=True)
    with world.graph:
        outputs = _pinned_weight(world)
    with pytest.raises(ggml.errors.BackendError, match=r"'pinned\.weight' is in CPU, not in the device's memory"):
        world.run(*outputs)
    world.assert_usable()


@breaks("101-special-empty-after-cpu", "103-special-views-only-after-cpu")
@pytest.mark.parametrize("views", [0, 2])
def test_empty_graphs_keep_no_backend(views: int) -> None:
    """A graph without computed nodes does not run where an earlier graph ran; if strict it does."""
    backends = {}
    for strict in (False, True):
        world = World(strict=strict)
        with world.graph:
            x = world.input("f32", (D, 4), "x", np.ones((4, D), "f4"))
            y = ggml.relu(x)
        world.sched.set_tensor_backend(y, world.cpu)
        world.graph.expand(y)
        world.sched.alloc_graph(world.graph)
        world.set_inputs()
        world.sched.compute(world.graph)
        assert [world.backends[s.backend_id] for s in world.sched.splits] == [world.cpu]
        world.new_graph()
        with world.graph:
            z = world.input("f32", (D, 4), "z", np.ones((4, D), "f4"))
            world.pin(z)  # to the device, where the earlier graph was not
            for _ in range(views):
                z = ggml.reshape_2d(z, D, 4)
        world.graph.expand(z)
        world.allocate()
        world.sched.compute(world.graph)
        (split,) = world.sched.splits
        backends[strict] = split.backend_id
        assert not split.inputs
        world.assert_usable()
    assert backends[True] == 1
    assert backends[False] == (0 if views else 1)


@breaks("155-special-compute-other-graph")
def test_another_graph_is_not_computed_in_its_place() -> None:
    """Computing a graph while another is allocated is an error; if strict the allocated one is computed."""
    for strict in (False, True):
        world = World(strict=strict)
        with world.graph:
            y = ggml.scale(world.input("f32", (4,), "x", np.arange(4)), 2.0).set_output()
        world.graph.expand(y)
        world.allocate()
        world.set_inputs()
        other = ggml.Graph()
        with other:
            z = ggml.neg(other.input("f32", (4,), name="z"))
        other.expand(z)
        if strict:
            world.sched.compute(other)
        else:
            with pytest.raises(ggml.errors.SchedError, match=r"is allocated, .* was to be computed") as caught:
                world.sched.compute(other)
            assert "reset()" in str(caught.value)
            world.sched.compute(world.graph)
        assert y.numpy().tolist() == [0, 2, 4, 6]
        assert z.buffer is None
        world.assert_usable()


@breaks(
    "191-special-split-without-inputs-plain",
    "192-special-split-without-inputs-pipeline",
    "193-special-split-without-inputs-pipeline-noevents",
)
@pytest.mark.parametrize(
    "case", ["191-special-split-without-inputs-plain", "192-special-split-without-inputs-pipeline"]
)
def test_a_split_without_inputs_waits_for_the_one_before(case: str) -> None:
    """Before a split without inputs the host waits for the split before it, of another backend; 0.20 does not."""
    waits = {}
    for version in ("0.20", "0.26"):
        record = next(r for r in replayed(case, version) if r["op"] == "compute")
        calls = record["calls"]
        state = next(r["state"] for r in replayed(case, version) if "splits" in r.get("state", {}))
        i_split = next(i for i, s in enumerate(state["splits"]) if i and not s["n_inputs"])
        before = state["splits"][i_split - 1]["backend"]
        computes = [i for i, call in enumerate(calls) if call[0] == "compute"]
        between = calls[computes[i_split - 1] + 1 : computes[i_split]]
        waits[version] = [c for c in between if c[:2] in (["sync", before], ["event_sync", before])]
    assert waits["0.20"] == []
    assert len(waits["0.26"]) == 1


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_a_graph_of_the_same_sizes_with_other_sources(
    strict: bool, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 x after 16 x, in as many nodes: the kept layout would overwrite 2 x before it is read; if strict it does, as upstream."""
    monkeypatch.setenv("PYGGML_CHECK", "1")
    world = World(on_device=on_device, strict=strict)
    results = []
    for is_second in (False, True):
        world.new_graph()
        with world.graph:
            double = ggml.add(*[world.input("f32", (D,), "x", np.ones(D))] * 2)
            eightfold = ggml.add(*[ggml.add(double, double)] * 2)
            y = ggml.add(eightfold, double if is_second else eightfold)
        results += world.run(y)
    assert len(world.sched.bufts) == 1 + on_device
    # the library gives 16 and 16 on the CPU: ggml 0.20.2 and llama.cpp b11739, called from C
    assert [y[0] for y in results] == [16, 16 if strict else 10]


@pytest.mark.parametrize("strict", [False, True])
def test_a_source_of_one_row_is_not_overwritten_by_a_result_of_several(strict: bool) -> None:
    """A result takes the place of a source of as many rows; one row that is repeated stays where it is, if not strict."""
    world = World(on_device=False, strict=strict)
    for n_first in (3, 1):
        world.new_graph()
        with world.graph:
            x = world.input("f32", (D, 3), "x", np.ones((3, D))).set_output()
            row = ggml.scale(world.input("f32", (D, n_first), "row", np.ones((n_first, D))), 2.0)
            y = ggml.add(x, row)
        (values,) = world.run(y)
        assert (y.data == row.data) == (strict or n_first == 3)
    assert (values == 3).all() == (not strict)
