"""`run` and `splits` tell what a simulated machine would take, and agree."""

from __future__ import annotations

import json

import pytest

from pyggml import cli

TOKENS = ",".join(str((i * 53 + 32) % 259) for i in range(40))
PLACEMENT = ["--cpu-moe", "-c", "64", "-dev", "sim:rtx4090-pcie4,cpu", "--json"]


@pytest.fixture
def ran(llama, tmp_path, capsys):
    """Run a prompt and three tokens; give the report, the timeline and the recorded routing."""
    timeline, routing = tmp_path / "t.json", tmp_path / "r.npz"
    outputs = ["--timeline", str(timeline), "--record-routing", str(routing)]
    assert cli.run(["run", str(llama), "--tokens", TOKENS, "-n", "4", "--ignore-eos", *outputs, *PLACEMENT]) == 0
    return json.loads(capsys.readouterr().out), json.loads(timeline.read_text())["traceEvents"], routing


def test_run_tells_virtual_times_and_what_they_rest_on(ran):
    """Rates, busy shares and copies by phase; no share is above the whole."""
    virtual = ran[0]["virtual"]
    assert set(virtual["assumed"]["backends"]) == {"SIM0", "CPU"}
    for phase, n in (("prompt", 40), ("generate", 3)):
        told = virtual["phases"][phase]
        assert told["n_tokens"] == n
        assert told["tokens_per_s"] == pytest.approx(n / told["seconds"], rel=1e-3)
        assert 0 < told["busy_share"]["SIM0"] < 1
        assert 0 < told["copy_to_s"]["SIM0"] < told["seconds"]


def test_timeline_and_report_agree_to_the_byte(ran):
    """Both processes of the timeline show the bytes of the report, and the virtual one ends when the clock does."""
    report, events, _ = ran
    told = sum(n for by_reason in report["bytes_by_device"].values() for n in by_reason.values())
    for pid in (1, 2):
        assert sum(e["args"]["bytes"] for e in events if e.get("cat") == "copy" and e["pid"] == pid) == told
    end_s = max(e["ts"] + e["dur"] for e in events if e["ph"] == "X" and e["pid"] == 2) * 1e-6
    seconds = sum(phase["seconds"] for phase in report["virtual"]["phases"].values())
    assert end_s == pytest.approx(seconds, rel=1e-3)


def test_splits_with_the_recorded_routing_copies_what_the_run_copied(ran, llama, capsys):
    """The bytes of experts are those of the run's prompt; the report names the recording."""
    report, _, routing = ran
    given = ["--routing", f"trace:{routing}", "--batches", "40", "--outputs", "all"]
    assert cli.run(["splits", str(llama), *given, *PLACEMENT]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert "43 tokens" in plan["virtual"]["assumed"]["routing"]
    virtual = plan["batches"][0]["virtual"]
    copied = virtual["bytes_by_reason"]["experts"] + virtual["bytes_by_reason"]["weight"]
    assert copied == report["experts"]["prompt"]["bytes_copied"] > 0


def test_splits_with_used_counts_copies_so_many_experts(llama, capsys):
    """Stated counts give their share of the experts' bytes, and the report names them."""

    def planned(routing: str) -> dict:
        given = ["--routing", routing, "--batches", "40", "--outputs", "all"]
        assert cli.run(["splits", str(llama), *given, *PLACEMENT]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["routing"] == routing
        return plan

    n_expert = planned("uniform")["model"]["n_expert"]
    few, many = (
        planned(f"counts:{n}")["batches"][0]["virtual"]["bytes_by_reason"]["experts"]
        for n in (n_expert // 4, n_expert // 2)
    )
    assert 0 < few * 2 == pytest.approx(many, rel=0.01)


def test_devices_that_are_not_simulated_have_no_virtual_time(llama, capsys):
    """Without a simulated device there is no clock, and the report says null."""
    assert cli.run(["run", str(llama), "--tokens", "1,2", "-dev", "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["virtual"] is None
