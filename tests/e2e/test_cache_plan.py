"""`pyggml splits --moe-cache-mib N`: slots, memory, hits by the routing, errors and warnings."""

from __future__ import annotations

import json

import pytest

from pyggml import Type, cli
from pyggml.makers.make_moe import Recipe, Sizes, make_moe

LAYERS, EXPERTS, USED = 3, 16, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Give a small mixture of experts."""
    path = tmp_path_factory.mktemp("cache-plan") / "moe.gguf"
    make_moe(path, Recipe("qwen3moe", Type.Q8_0, seed=7, sizes=Sizes(layers=LAYERS, experts=EXPERTS, used=USED)))
    return path


DEVICE = ("-dev", "sim:rtx4090-pcie4,cpu", "--batches", "1")


def _run(model, capsys, *words):
    status = cli.run(["splits", str(model), *words])
    said = capsys.readouterr()
    return status, said.out, said.err


def _plan(model, capsys, n_mib, *words):
    status, out, err = _run(model, capsys, *DEVICE, "--cpu-moe", "--moe-cache-mib", str(n_mib), "--json", *words)
    assert status == 0
    plan = json.loads(out)
    return plan, plan["moe_cache"], err


def test_a_large_cache_holds_all(model, capsys) -> None:
    """No more slots than experts; after each came once, all are found. The memory is that of slots and a spare one."""
    plan, cache, err = _plan(model, capsys, 1000)
    (group,) = cache["groups"]
    assert (group["n_slots"], group["share"]) == (LAYERS * EXPERTS, 1.0)
    assert group["bank_bytes"] * LAYERS * EXPERTS == group["host_bytes"] * (LAYERS * EXPERTS + 1)
    assert group["misses"] <= LAYERS * EXPERTS
    assert group["hits"] + group["misses"] == group["n_tokens"] * LAYERS * USED
    assert "never hit" not in err
    status, out, _ = _run(model, capsys, *DEVICE, "--cpu-moe", "--json")
    assert status == 0
    before = {m["buft"]: m for m in json.loads(out)["memory"]}
    after = {m["buft"]: m for m in plan["memory"]}
    assert after["SIM0"]["cache"] - before["SIM0"]["cache"] == group["bank_bytes"]
    assert after["CPU"]["cache"] - before["CPU"]["cache"] == cache["map_bytes"] == LAYERS * EXPERTS * 4


@pytest.mark.parametrize("eviction", ["lru", "slru"])
def test_too_few_slots_never_hit_and_a_warning_says_from_where_on(model, capsys, eviction) -> None:
    """At most (layers - 1) * used slots: exactly no hit; at the size that the warning names there are hits."""
    _, cache, err = _plan(model, capsys, 1, "--moe-cache-eviction", eviction)
    (group,) = cache["groups"]
    assert USED <= group["n_slots"] <= (LAYERS - 1) * USED
    assert (group["hits"], group["hit_rate"]) == (0, 0.0)
    assert "(layers - 1) * used = 2 * 4 = 8 slots" in " ".join(err.split())
    mib = group["hits_from_mib"]
    assert f"--moe-cache-mib {mib}" in " ".join(err.split())
    _, enough, err = _plan(model, capsys, mib, "--moe-cache-eviction", eviction)
    assert enough["groups"][0]["hits"] > 0
    assert "never hit" not in err
    _, less, _ = _plan(model, capsys, mib - 1, "--moe-cache-eviction", eviction)
    assert less["groups"][0]["hits"] == 0


def test_the_table_has_it(model, capsys) -> None:
    """People get a line for each group, and what it does not tell."""
    status, out, _ = _run(model, capsys, *DEVICE, "--cpu-moe", "--moe-cache-mib", "4")
    assert status == 0
    assert "llama.cpp's expert cache, 4.0 MiB, slru" in out
    assert "those without the cache" in out


def test_without_host_experts_it_is_off(model, capsys) -> None:
    """All experts on the device: a warning, as llama.cpp has it, and a plan all the same."""
    status, out, err = _run(model, capsys, *DEVICE, "--moe-cache-mib", "100", "--json")
    assert status == 0
    assert json.loads(out)["moe_cache"]["groups"] == []
    assert "no layer has all of its experts in host memory" in " ".join(err.split())


@pytest.mark.parametrize(
    ("name", "words", "text"),
    [
        ("qwen3-30b-a3b", ("-dev", "cpu"), "needs a GPU"),
        ("qwen3-0.6b", DEVICE, "needs a model with experts"),
        ("qwen3-30b-a3b", (*DEVICE, "--cpu-moe"), "too small to hold the experts of one token"),
    ],
)
def test_what_llama_cpp_refuses_is_refused(capsys, name, words, text) -> None:
    """No GPU, no experts, or less than one token needs: an error that says so."""
    status, _, err = _run(name, capsys, *words, "--moe-cache-mib", "1")
    assert status == 1
    assert text in " ".join(err.split())
