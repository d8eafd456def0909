"""`pyggml selftest`: a wrong result, a missing device and a slow one are told apart; nothing is lost on Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import pyggml as ggml
from pyggml.backend import REGISTRY, Backend, Device
from pyggml.commands.selftest import command
from pyggml.graph import GraphView
from pyggml.selftest import STAGES, Outcome, Report, Result, Verdict, run
from pyggml.selftest.models import check_copies, check_models
from pyggml.selftest.page import page_html
from pyggml.selftest.report import Rate
from pyggml.selftest.times import Sizes, copy_rates, kernel_rates, slow_kernels, with_shares
from pyggml.testing import conformance
from pyggml.testing.conformance import Status
from pyggml.testing.op_cases import COMPUTED
from pyggml.types import Op


class Broken:
    """The CPU, whose SQR is off by one per cent and whose SIN fails."""

    def __init__(self) -> None:
        self.cpu = ggml.CPU(threads=1)
        self.compute = self.cpu.graph_compute
        self.cpu.graph_compute = self.graph_compute  # type: ignore[method-assign]

    def graph_compute(self, graph: GraphView) -> None:
        """Compute, then spoil SQR."""
        if any(node.op is Op.SIN for node in graph.nodes):
            raise ggml.errors.ComputeError("CPU", "the card fell off the bus")
        self.compute(graph)
        for node in graph.nodes:
            if node.op is Op.SQR:
                node.set_array(node.numpy() * 1.01)


def statuses(backend: Backend, *ops: str) -> list[Status]:
    """Return what came of one case an op."""
    return [r.status for r in conformance.run(backend, ops=ops, n_case=1, with_products=False)]


def test_right_wrong_and_failing_ops_are_told_apart() -> None:
    """A result outside the bound is wrong, an error is a failure, and the rest passes."""
    broken = Broken()
    assert statuses(broken.cpu, "sqr", "sin", "cos") == [Status.WRONG, Status.FAILED, Status.PASSED]
    broken.cpu.close()


def test_an_unsupported_op_is_never_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device says it cannot run is counted as that."""
    cpu = ggml.CPU(threads=1)
    monkeypatch.setattr(cpu.device, "supports_op", lambda op: op.op is not Op.SQR)
    assert statuses(cpu, "sqr", "cos") == [Status.UNSUPPORTED, Status.PASSED]
    cpu.close()


def test_every_case_is_computed_by_the_cpu() -> None:
    """A case of each op, and all types of weights at one, eight and 33 tokens, are within the bound."""
    cpu = ggml.CPU(threads=1)
    results = conformance.run(cpu, n_case=1)
    assert [r for r in results if r.status is not Status.PASSED] == []
    assert len(results) > 2 * len(conformance.PRODUCT_TYPES) * len(conformance.PRODUCT_TOKENS) + len(COMPUTED)
    cpu.close()


def test_models_copies_and_races_pass_on_a_simulated_device() -> None:
    """Whole models over `sim` have the CPU's logits; used experts give what whole copies give; late work does no harm."""
    report = run("sim:rtx4090-pcie4", stages=("models", "copies", "races", "times"))
    assert report.verdict is Verdict.PASSED, report.wrong
    found = {(o.stage, o.result) for o in report.outcomes}
    assert found == {(s, Result.PASSED) for s in ("models", "copies", "races")} | {("times", Result.SKIPPED)}
    copies = next(o for o in report.outcomes if o.stage == "copies")
    assert "equal" in copies.detail
    share = int(copies.detail.partition("experts: ")[2].partition("%")[0])
    assert 20 < share < 95, "what a prompt leaves out must be left out"
    assert not report.rates


def test_a_small_device_skips_what_does_not_fit(tmp_path: Path) -> None:
    """A model that is too large for the device is skipped with a line that says so."""
    device = REGISTRY.open("sim:custom:1MiB,100GB/s,10GB/s")
    outcomes = [*check_models(device, tmp_path), *check_copies(device, tmp_path)]
    skipped = [o for o in outcomes if o.result is Result.SKIPPED]
    assert skipped
    assert all("too small" in o.detail for o in skipped)
    assert not [o for o in outcomes if o.result in (Result.WRONG, Result.FAILED)]


def test_a_missing_device_is_no_wrong_result() -> None:
    """A device that is not here has an exit status of its own, and the reason in one line."""
    result = CliRunner().invoke(command, ["--device", "cuda:17", "--json"])
    assert result.exit_code == Verdict.MISSING.value
    found = json.loads(result.stdout)
    assert found["verdict"] == "missing"
    assert found["missing"]
    assert not found["outcomes"]


def test_ctrl_c_keeps_what_was_done() -> None:
    """Kernels that ran before an interrupt are in the report, which says that it was interrupted."""
    done = 0

    def stop(stage: str, what: str, n: int, total: int | None) -> None:
        nonlocal done
        done += bool(what)
        if done > 5:
            raise KeyboardInterrupt

    report = run("cpu", on_progress=stop)
    assert report.was_interrupted
    assert report.verdict is Verdict.INTERRUPTED
    assert report.outcomes


def test_time_that_is_up_is_said() -> None:
    """Kernel cases that were not begun in time are counted in a note."""
    report = run("cpu", stages=("kernels",), budget_s=0.0)
    assert not report.outcomes
    assert "were not run: time is up" in report.notes[0]


def test_the_emulated_card_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our CUDA kernels pass in the emulator of PTX, and ops without a kernel are counted as the CPU's."""
    monkeypatch.setattr(conformance, "cases", lambda **options: _cases("add", "clamp_inplace", "mul_mat_id", "sin"))
    monkeypatch.setattr(conformance, "n_cases", lambda **options: 4)
    report = run("emulator", stages=("kernels", "times"))
    assert report.verdict is Verdict.PASSED, report.wrong
    found = {o.name: o.result for o in report.outcomes if o.stage == "kernels"}
    assert found["ADD"] is found["CLAMP"] is found["MUL_MAT_ID"] is Result.PASSED
    assert found["SIN"] is Result.UNSUPPORTED


def _cases(*ops: str) -> object:
    from pyggml.testing import op_cases

    for op in ops:
        make = (lambda: op_cases.product("mul_mat_id", ggml.Type.Q8_0, 1)) if op == "mul_mat_id" else None
        yield op, make or (lambda op=op: op_cases.of_op(op, 0))


def test_rates_are_those_of_this_run() -> None:
    """Times of kernels and copies are above zero, and the best kernel of each unit has the share 1."""
    cpu = ggml.CPU(threads=1)
    sizes = Sizes(memory_bytes=1 << 16, row=256, n_row=32, n_expert=4, n_used=2, tokens=(1, 8), copy_bytes=(4096,))
    rates, peaks = with_shares(list(kernel_rates(cpu, sizes)))
    assert {r.unit for r in rates} == set(peaks) == {"B/s", "op/s"}
    assert all(max(r.share or 0 for r in rates if r.unit == unit) == 1 for unit in peaks)
    copies = list(copy_rates(cpu, sizes))
    assert all(r.seconds > 0 and r.per_s > 0 for r in [*rates, *copies])
    assert [r.what for r in copies if "experts" in r.what] == ["copy 2 used of 4 experts, pageable, 18 KiB"]
    cpu.close()


def test_a_slow_kernel_is_named() -> None:
    """A kernel far below the device's best is slow; the verdict says so, but a wrong result counts for more."""
    rates, _ = with_shares([Rate("fast", 1.0, 100.0, "B/s"), Rate("slow", 1.0, 1.0, "B/s")])
    report = Report("cuda:0", outcomes=[Outcome("kernels", "ADD", Result.PASSED)], slow=slow_kernels(rates))
    assert report.slow == ["slow"]
    assert report.verdict is Verdict.SLOW
    report.outcomes.append(Outcome("kernels", "MUL", Result.WRONG, error=float("nan")))
    assert report.verdict is Verdict.WRONG
    assert json.loads(json.dumps(report.as_json(), allow_nan=False))["outcomes"][1]["error"] is None


def test_page_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command writes JSON and a page beside it, and the page shows every check, hostile names escaped."""
    path = tmp_path / "report.json"
    result = CliRunner().invoke(command, ["--device", "cpu", "--stages", "copies", "-o", str(path)])
    assert result.exit_code == 0, result.output
    assert json.loads(path.read_text())["verdict"] == "passed"
    assert "qwen3moe Q8_0" in path.with_suffix(".html").read_text()
    page = page_html(Report("cpu", outcomes=[Outcome("kernels", "<script>", Result.WRONG, "a & b")]))
    assert "<script>" not in page
    assert "a &amp; b" in page


def test_stages_have_titles() -> None:
    """Each stage has a section on the page."""
    outcomes = [Outcome(stage, f"check of {stage}", Result.PASSED) for stage in STAGES]
    page = page_html(Report("cpu", outcomes=outcomes, rates=[Rate("ADD", 1e-3, 2e9, "B/s", 1.0)], peaks={"B/s": 2e9}))
    assert all(f"check of {stage}" in page for stage in STAGES)
    assert "2.00 GB/s" in page


def test_a_device_may_be_given_as_an_object() -> None:
    """A device of one's own is tested without a name in the registry."""
    device: Device = ggml.CPU(threads=1).device
    report = run(device, stages=("races",))
    assert report.verdict is Verdict.PASSED
    assert np.isfinite(report.seconds)
