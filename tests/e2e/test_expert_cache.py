"""`--moe-cache-mib N` of `splits` and `run`: slots, memory, hits, times, errors and warnings; and results of models bit for bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from edited_models import write_edited

from pyggml import Type, cli
from pyggml.lab.predict import Online
from pyggml.makers.make_moe import Recipe, Sizes, make_moe
from pyggml.models.placement import PlacementFlags
from pyggml.moe_cache import LlamaCache
from pyggml.session import ContextFlags, Session

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
    return plan, plan["expert_cache"], err


def test_a_large_cache_holds_all(model, capsys) -> None:
    """No more slots than experts; after each came once, all are found. The memory is that of slots and a spare one."""
    plan, cache, err = _plan(model, capsys, 1000)
    (group,) = cache["groups"]
    assert (group["n_slots"], group["share"]) == (LAYERS * EXPERTS, 1.0)
    of_slots = group["host_bytes"] * (LAYERS * EXPERTS + 1) // (LAYERS * EXPERTS)
    assert of_slots <= group["bank_bytes"] < of_slots + 4096  # devices pad rows
    assert group["misses"] <= LAYERS * EXPERTS
    n_tokens = cache["generated"]["n_tokens"]
    assert group["hits"] + group["misses"] == n_tokens * LAYERS * USED
    assert cache["generated"]["seconds"] > 0
    assert cache["generated"]["bytes_by_reason"]["experts"] == group["uploaded_bytes"] == cache["uploaded_bytes"]
    assert "never hit" not in err
    status, out, _ = _run(model, capsys, *DEVICE, "--cpu-moe", "--json")
    assert status == 0
    before = {m["buft"]: m for m in json.loads(out)["memory"]}
    after = {m["buft"]: m for m in plan["memory"]}
    assert before["SIM0"]["policy"] == before["CPU"]["policy"] == 0
    assert after["SIM0"]["policy"] == group["bank_bytes"]
    assert after["CPU"]["policy"] == cache["map_bytes"] == LAYERS * EXPERTS * 4


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
    """People get a line for each group, and a generation with the cache beside one without."""
    status, out, _ = _run(model, capsys, *DEVICE, "--cpu-moe", "--moe-cache-mib", "4")
    assert status == 0
    for text in ("Expert cache, slru", "Generation of 64 tokens, one a step (virtual)", "with the cache", "without"):
        assert text in out


def test_a_recording_shorter_than_the_forecast_ends_it(model, capsys, tmp_path) -> None:
    """A routing that knows 5 tokens gives a generation of 5."""
    np.savez(tmp_path / "r.npz", topk=np.arange(LAYERS * 5 * USED, dtype="i4").reshape(LAYERS, 5, USED) % EXPERTS)
    _, cache, _ = _plan(model, capsys, 4, "--routing", f"trace:{tmp_path / 'r.npz'}")
    assert cache["generated"]["n_tokens"] == 5


def test_without_host_experts_it_is_off(model, capsys) -> None:
    """All experts on the device: a warning, as llama.cpp has it, and a plan all the same."""
    status, out, err = _run(model, capsys, *DEVICE, "--moe-cache-mib", "100", "--json")
    assert status == 0
    assert json.loads(out)["expert_cache"]["groups"] == []
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


# -- run -----------------------------------------------------------------------


def _runs(model, capsys, *words):
    status = cli.run(
        ["run", str(model), "--tokens", "5,9,2", "-n", "12", "--ignore-eos", "--cpu-moe", "--json", *words]
    )
    said = capsys.readouterr()
    assert status == 0, said.err
    return json.loads(said.out), said.err


@pytest.mark.parametrize("eviction", ["lru", "slru"])
def test_a_run_tells_what_the_cache_did(model, capsys, eviction) -> None:
    """The same text; llama.cpp's lines at the end; all bytes of experts are the cache's own, and virtual time has them."""
    plain, _ = _runs(model, capsys)
    cached, err = _runs(model, capsys, "--moe-cache-mib", "4", "--moe-cache-eviction", eviction)
    assert cached["tokens"] == plain["tokens"]
    cache = cached["expert_cache"]
    assert plain["expert_cache"] is None
    assert cache["hits"] + cache["misses"] == sum(layer["n_used"] for layer in cached["layers"]) / 3
    assert cache["uploaded_bytes"] == cached["bytes_by_device"]["SIM0"]["experts"]
    assert cache["log"][-1].startswith("llama_moe_cache: ubatch <= 8: hits = ")
    assert "never hit" not in err
    assert cached["virtual"]["phases"] != plain["virtual"]["phases"]
    status, out, _ = (
        cli.run(["run", str(model), "--tokens", "5,9", "--cpu-moe", "--moe-cache-mib", "4"]),
        *capsys.readouterr(),
    )
    assert status == 0
    assert "llama_moe_cache: ubatch <= 8" in out
    assert f"Expert cache, {'slru'}" in out


def test_a_run_warns_where_nothing_can_hit(model, capsys) -> None:
    """As `splits` does, and names the size where hits begin."""
    told, err = _runs(model, capsys, "--moe-cache-mib", "1", "--moe-cache-eviction", "lru")
    (group,) = told["expert_cache"]["groups"]
    assert "never hit (0 %)" in " ".join(err.split())
    assert f"hits begin at --moe-cache-mib {group['hits_from_mib']}" in " ".join(err.split())


@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss", "glm4moe", "deepseek2", "olmoe", "granitemoe"])
def test_models_give_the_same_logits_with_a_cache(arch, tmp_path, monkeypatch) -> None:
    """Prompt and steps, bit for bit, in families with biases, shared experts, groups and several types; checked copy by copy."""
    monkeypatch.setenv("PYGGML_CHECK", "2")
    path = write_edited(tmp_path / "m.gguf", arch)
    rules = (None, LlamaCache(1 << 20, "lru"), LlamaCache(1 << 18, "slru"), LlamaCache(1 << 18, "lru", "cpu"))
    found = [_logits(path, rule) for rule in rules]
    for logits in found[1:]:
        np.testing.assert_array_equal(logits, found[0])


def _logits(path, rule):
    flags = PlacementFlags(cpu_moe=True)
    with Session.open(
        path, devices="sim:rtx4090-pcie4", placement=flags, context=ContextFlags(n_ctx=256), expert_cache=rule
    ) as s:
        parts = [s.decode([3, 1, 4], outputs="all"), *(s.decode([t]) for t in (7, 9, 7, 2))]
        parts += [s.decode(list(range(10, 50)), outputs="all"), *(s.decode([t]) for t in (7, 9))]
        if rule is not None:
            assert s.expert_cache.counters.hits > 0
            assert s.expert_cache.counters.uploaded_bytes > 0
        return np.concatenate(parts)


def test_a_policy_of_the_lab_runs_and_is_planned_from_its_own_trace(model, capsys, tmp_path) -> None:
    """`--expert-cache POLICY:SIZE`: the same text; a plan of the recorded routing finds the hits that the run had."""
    path = tmp_path / "trace.jsonl"
    plain, _ = _runs(model, capsys)
    words = ("--expert-cache", "lfru:50%")
    told, _ = _runs(model, capsys, *words, "--record-routing", str(path))
    assert told["tokens"] == plain["tokens"]
    assert told["expert_cache"]["rule"] == "lfru, 50%, scope layer"
    assert told["expert_cache"]["hits"] > 0
    status, out, err = _run(model, capsys, *DEVICE, "--cpu-moe", *words, "--routing", f"trace:{path}", "--json")
    assert status == 0, err
    planned = json.loads(out)["expert_cache"]
    assert planned["generated"]["n_tokens"] == 14  # the prompt's 3 one by one, then 11
    assert planned["hits"] + planned["misses"] == 14 * LAYERS * USED
    status, _, err = _run(model, capsys, *DEVICE, "--cpu-moe", *words, "--moe-cache-mib", "4")
    assert status == 2
    assert "either --moe-cache-mib or --expert-cache" in err
    status, _, err = _run(model, capsys, *DEVICE, "--cpu-moe", "--expert-cache", "belady:20%")
    assert status == 1
    assert "knows the future" in err


def test_guesses_of_a_run_and_of_a_plan_are_told(model, capsys, tmp_path) -> None:
    """`--expert-copy prefetch`: the same text; recall, precision and waste in JSON and in the table; options without it are refused."""
    path = tmp_path / "trace.jsonl"
    plain, _ = _runs(model, capsys)
    words = ("--expert-cache", "lru:50%", "--expert-copy", "prefetch")
    told, _ = _runs(model, capsys, *words, "--record-routing", str(path))
    assert told["tokens"] == plain["tokens"]
    assert told["expert_prefetch"]["sent"] > 0
    assert told["expert_prefetch"]["predictor"] == "online"
    fitted = ("--prefetcher", "previous-layer:2", "--prefetch-fit", str(path), "--routing", f"trace:{path}")
    status, out, err = _run(model, capsys, *DEVICE, "--cpu-moe", *words, *fitted, "--json")
    assert status == 0, err
    planned = json.loads(out)["expert_prefetch"]
    assert planned["n_guess"] == 2
    assert 0 < planned["recall"] <= 0.5
    assert planned["late"] is not None
    status, out, err = _run(model, capsys, *DEVICE, "--cpu-moe", *words, *fitted)
    assert "Prefetch: recall" in out
    own = f"{Online.__module__}:{Online.__name__}:2"  # module:Class:N
    status, out, err = _run(model, capsys, *DEVICE, "--cpu-moe", *words, "--prefetcher", own, "--json")
    assert status == 0, err
    assert json.loads(out)["expert_prefetch"]["n_guess"] == 2
    for wrong, text in (
        (("--prefetcher", "average"), "need --expert-copy prefetch"),
        (("--expert-copy", "prefetch", "--prefetcher", "average:x"), "is not a number"),
    ):
        status, _, err = _run(model, capsys, *DEVICE, *wrong)
        assert status == 2
        assert text in err
