"""Results over [sim, cpu] are those of the CPU alone, whatever is shared, rewritten, pinned or copied in part.

The device's memory is full of NaN before it is written to, so a byte that was needed and not copied shows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyggml as ggml

N_EMBD, N_EXPERT, N_USED, N_TOKEN = 32, 8, 2, 40
ALWAYS = settings(
    max_examples=80, derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

#: What, then three numbers that choose sources; and where the result is pinned: 0, 1 nowhere, 2 device, 3 CPU.
Instruction = tuple[str, int, int, int, int]
KINDS = ("mul_mat_id", "mul_mat_id", "mul_mat_id", "mul_mat", "rewrite", "add", "scale", "id_rows")
PROGRAMS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.sampled_from([0, 0, 1, 3]), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)),
    min_size=1,
    max_size=12,
)  # fmt: skip
ROUTINGS = st.lists(st.lists(st.integers(0, N_EXPERT - 1), min_size=2, max_size=4), min_size=4, max_size=4)


class _Run:
    """A program over some backends."""

    def __init__(self, backends: Sequence[ggml.Backend], routings: list[list[int]], **options: object) -> None:
        self.backends = backends
        self.sched = ggml.Scheduler(backends, **options)  # type: ignore[arg-type]
        rng = np.random.default_rng(0)
        cpu = backends[-1]
        weights, state = ggml.Context(), ggml.Context()
        self.experts = [weights.new_tensor("f32", (N_EMBD, N_EMBD, N_EXPERT), name=f"exps{i}") for i in range(3)]
        self.tables = [weights.new_tensor("i32", (N_USED, N_TOKEN), name=f"table{i}") for i in range(2)]
        weights.alloc(cpu, usage="weights")
        for w in self.experts:
            w.set_array(rng.standard_normal((N_EXPERT, N_EMBD, N_EMBD)) / N_EMBD**0.5)
        ids = [np.resize(r, (N_TOKEN, N_USED)).astype("i4") for r in routings]
        for table, values in zip(self.tables, ids[2:], strict=True):
            table.set_array(values)
        self.kept = state.new_tensor("i32", (N_USED, N_TOKEN), name="kept_ids")  # lives on the first backend
        state.alloc(backends[0])
        self.graph = ggml.Graph()
        x = self.graph.input("f32", (N_EMBD, N_USED, N_TOKEN), name="x")
        inputs = [self.graph.input("i32", (N_USED, N_TOKEN), name=f"ids{i}") for i in range(2)]
        self.values = dict(zip([x, *inputs], [rng.standard_normal((N_TOKEN, N_USED, N_EMBD)), *ids[:2]], strict=True))
        self.acts, self.ids, self.initial = [x], [*inputs, self.kept], ids[0]
        self.pins: list[tuple[ggml.Tensor, ggml.Backend]] = []

    def build(self, program: list[Instruction]) -> None:
        with self.graph:
            for i, instruction in enumerate(program):
                self._add(i, instruction)
        self.graph.expand(self.acts[-1].set_output())

    def _add(self, i: int, instruction: Instruction) -> None:
        kind, a, j, k, where = instruction
        x = self.acts[-1 - a % len(self.acts)]
        w, ids = self.experts[j % 3], self.ids[k % len(self.ids)]
        if kind == "rewrite":
            y = ggml.cpy(self.tables[j % 2], self.kept)
            self.graph.expand(self.acts[-1], y)  # in the order of the program
            return
        if kind == "id_rows":  # ids that a node makes
            rows = self.graph.input("i32", (N_TOKEN,), name=f"rows{i}")
            self.values[rows] = np.arange(N_TOKEN)[::-1]
            y = ggml.get_rows(ids, rows)
            self.ids.append(y.named(f"made_ids{i}"))
        else:
            if kind == "mul_mat_id":
                y = ggml.mul_mat_id(w, x, ids)
            elif kind == "mul_mat":
                y = ggml.mul_mat(w, x)
            elif kind == "add":
                y = ggml.add(x, self.acts[-1 - j % len(self.acts)])
            else:
                y = ggml.scale(x, 0.5)
            self.acts.append(y.named(f"act{i}"))
        if where >= 2:
            self.pins.append((y, self.backends[0 if where == 2 else -1]))

    def compute(self) -> npt.NDArray[np.float32]:
        self.sched.reset()
        for tensor, backend in self.pins:
            self.sched.set_tensor_backend(tensor, backend)
        self.sched.alloc_graph(self.graph)
        self.kept.set_array(self.initial)
        for tensor, values in self.values.items():
            if tensor.buffer is not None:
                tensor.set_array(values)
        self.sched.compute(self.graph)
        return self.acts[-1].numpy()


def _on_cpu(program: list[Instruction], routings: list[list[int]]) -> npt.NDArray[np.float32]:
    run = _Run([ggml.CPU(threads=1)], routings)
    run.build(program)
    return run.compute()


@pytest.mark.parametrize("parallel", [False, True])
@ALWAYS
@given(program=PROGRAMS, routings=ROUTINGS)
def test_results_are_the_cpus(parallel: bool, program: list[Instruction], routings: list[list[int]]) -> None:
    """Over a device and the CPU each computing of a graph gives the CPU's numbers, bit for bit."""
    expected = _on_cpu(program, routings)
    run = _Run([ggml.Sim(threads=1), ggml.CPU(threads=1)], routings, parallel=parallel)
    run.build(program)
    for _ in range(2):
        np.testing.assert_array_equal(run.compute(), expected)


@ALWAYS
@given(program=PROGRAMS, routings=ROUTINGS)
def test_results_are_those_of_full_copies(program: list[Instruction], routings: list[list[int]]) -> None:
    """Copying the used experts gives what copying whole weights gives, and never moves more bytes, padding aside."""
    results, moved = [], []
    for policy in ("used", ggml.FullCopier()):
        run = _Run([ggml.Sim(threads=1), ggml.CPU(threads=1)], routings, policy=policy)
        run.build(program)
        results.append(run.compute())
        moved.append(run.sched.stats.bytes_copied)
    np.testing.assert_array_equal(*results)
    assert moved[0] <= moved[1] + 512 * N_EXPERT * len(program)


@ALWAYS
@given(program=PROGRAMS, routings=ROUTINGS)
def test_two_devices(program: list[Instruction], routings: list[list[int]]) -> None:
    """Over two devices and the CPU the numbers are the CPU's, too."""
    backends = [ggml.Sim(threads=1), ggml.Sim(index=1, threads=1), ggml.CPU(threads=1)]
    run = _Run(backends, routings)
    run.build(program)
    pins = [(t, b if b is backends[-1] else backends[i % 2]) for i, (t, b) in enumerate(run.pins)]
    run.pins = pins
    np.testing.assert_array_equal(run.compute(), _on_cpu(program, routings))
