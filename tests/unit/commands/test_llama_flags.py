"""Command lines of llama.cpp, pasted: understood, named as without effect, or refused with what to do."""

from __future__ import annotations

import csv
import json
from io import StringIO

import click
import pytest

from pyggml import cli
from pyggml.advisor import plan
from pyggml.commands._llama_flags import WITHOUT_EFFECT, translate
from pyggml.commands.plan import _setting

MODEL = "qwen3-0.6b"
OWN = {
    "-ngl": True,
    "-fa": True,
    "-n": True,
    "--seed": True,
    "--no-kv-offload": False,
    "--mmap": False,
    "--no-mmap": False,
}


def words(*args: str) -> list[str]:
    """Return what a pasted line comes to."""
    return translate(args, OWN).words


def test_flags_with_llama_cpps_meaning() -> None:
    """Other names and other values of an option become the command's own; the model comes last."""
    assert words("-m", "a.gguf", "-ngl", "99") == ["-ngl", "99", "a.gguf"]
    assert words("-hf", "unsloth/gpt-oss-20b-GGUF:Q8_0") == ["hf:unsloth/gpt-oss-20b-GGUF:Q8_0"]
    assert words("-nkvo", "-s", "3", "-n8") == ["--no-kv-offload", "--seed", "3", "-n", "8"]
    assert words("-fa", "1") == ["-fa", "on"]
    assert words("-fa", "0", "-ngl", "1") == ["-fa", "off", "-ngl", "1"]
    assert words("-fa", "-ngl", "1") == ["-fa", "on", "-ngl", "1"]
    assert words("-lm", "none") == ["--no-mmap"]
    assert words("-lm", "auto") == ["--mmap"]


def test_a_draft_model_on_the_hub_is_one() -> None:
    """Where a command counts a draft model, -hfd names one as -hf does; elsewhere it has no effect."""
    assert translate(["-hfd", "a/b:Q4_K_M"], {"-md": True}).words == ["-md", "hf:a/b:Q4_K_M"]
    assert translate(["--hf-repo-draft=a/b"], {"-md": True}).words == ["-md", "hf:a/b"]
    assert translate(["-hfd", "a/b"], {}).ignored == ["-hfd a/b"]


def test_sizes_of_llama_bench_come_in_any_order() -> None:
    """-n before -p means the same as after it; -p 0 leaves the answer; a -n without a -p is llama-cli's."""
    own = {"--batches": True}
    for line in ("-p 64 -n 32", "-n 32 -p 64"):
        found = translate(line.split(), own)
        assert (found.words, found.ignored) == (["--batches", "64,1"], [])
    assert translate(["-n", "32", "-p", "0"], own).words == ["--batches", "1"]
    assert translate(["-n", "32"], own).ignored == ["-n 32"]
    assert translate(["-p", "64", "-n", "0"], own).words == ["--batches", "64"]


def test_flags_without_effect_are_named_with_their_values() -> None:
    """A flag of the server, of sampling or of threads is left out with its value, and told."""
    found = translate(["--port", "80", "-tb", "8", "--mlock", "--temp=0.5", "-ngl", "1"], OWN)
    assert found.words == ["-ngl", "1"]
    assert found.ignored == ["--port 80", "-tb 8", "--mlock", "--temp 0.5"]
    for flag, has_value in WITHOUT_EFFECT.items():
        if flag not in OWN:
            assert translate([flag, "-ngl", "5"], OWN).words == (["5"] if has_value else ["-ngl", "5"])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--lora", "x"], "it changes the result"),
        (["--rpc", "a:1"], "name the servers as devices"),
        (["-ngll", "1"], "Did you mean"),
        (["-ngl"], "its value is missing"),
        (["-lm", "fast"], "the modes are"),
    ],
)
def test_what_is_refused(args: list[str], says: str) -> None:
    """What would change the result, is unknown or lacks its value is refused in a line."""
    with pytest.raises(click.UsageError) as caught:
        translate(args, OWN)
    assert says in caught.value.format_message()


def test_a_server_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A whole line of llama-server plans; one warning names what has no effect."""
    line = f"splits -m {MODEL} -c 512 -ngl 20 -fa on -np 2 -kvu -sm none -mg 0 --no-mmap --host 0.0.0.0 --jinja --json"
    assert cli.run(line.split()) == 0
    seen = capsys.readouterr()
    assert json.loads(seen.out)["context"]["n_ctx"] == 512
    assert " ".join(seen.err.split()) == "Warning: no effect in pyggml: --host 0.0.0.0, --jinja"


def test_a_plans_own_line_can_be_compared() -> None:
    """Each llama-server line that a plan prints is read back as the setting that it was made from."""
    advice = plan("gpt-oss-20b", devices="rtx3060", host="ddr4-3200x2,cores=8,64GiB", context=4096, n_plans=3)
    assert any(made.setting.n_cpu_moe for made in advice.shown)
    assert any(made.setting.overrides for made in advice.shown)
    for made in advice.shown:
        if made.is_of_llama:
            assert _setting(made.command, n_ctx=4096) == made.setting


def test_a_stated_host_that_is_too_small(capsys: pytest.CaptureFixture[str]) -> None:
    """A host whose size is stated must hold what stays in host memory, else the status is 3; an address is no host."""
    line = ["splits", "qwen3-30b-a3b", "-c", "512", "--cpu-moe", "--batches", "1"]
    assert cli.run([*line, "--host", "ddr4-3200x2,cores=8,8GiB", "--json"]) == 3
    rows = {m["buft"]: m for m in json.loads(capsys.readouterr().out)["memory"]}
    assert (rows["SIM0"]["fits"], rows["CPU"]["fits"]) == (True, False)
    assert cli.run([*line, "--host", "ddr4-3200x2,cores=8,64GiB", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["fits"] is True


@pytest.mark.parametrize(("flags", "says"), [("-sm row", "by layers only"), ("-sm none -mg 3", "from 0")])
def test_split_modes(flags: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Split modes that are not there, and devices that are not, are refused."""
    assert cli.run(["splits", MODEL, *flags.split()]) == 2
    assert says in capsys.readouterr().err


def test_lists_make_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Each combination of the lists has its rows, in every format, with llama-bench's names of tests."""
    line = ["splits", MODEL, "-c", "256", "-ngl", "4,8", "-ub", "16,32", "-p", "32", "-n", "128"]
    assert cli.run([*line, "-o", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["-ngl"], r["-ub"], r["test"]) for r in rows] == [
        (ngl, ub, test) for ngl in "48" for ub in ("16", "32") for test in ("pp32", "tg128")
    ]
    assert all(r["low"] < r["t/s"] < r["high"] for r in rows)
    assert rows[0]["SIM0_bytes"] < rows[4]["SIM0_bytes"]
    assert cli.run([*line, "-o", "csv"]) == 0
    read = list(csv.DictReader(StringIO(capsys.readouterr().out)))
    assert [float(r["t/s"]) for r in read] == [r["t/s"] for r in rows]
    assert cli.run([*line, "-o", "jsonl"]) == 0
    assert [json.loads(text) for text in capsys.readouterr().out.splitlines()] == rows
    assert cli.run([*line, "-o", "md"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)
    assert cli.run(line) == 0
    assert "tg128" in capsys.readouterr().out
