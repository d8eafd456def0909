"""Models that the real llama.cpp runs on simulated devices, beside pyggml's own session."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builds import BUILDS

import pyggml as ggml
from pyggml.backend import REGISTRY, Backend
from pyggml.dialect import DIALECTS
from pyggml.errors import (
    ComputeError,
    DeviceUnavailableError,
    GraphError,
    ModelError,
    OutOfMemoryError,
    PyggmlError,
    SchedError,
)
from pyggml.lab.recording import RoutingRecorder
from pyggml.llama import LlamaModel
from pyggml.llama.library import find_llama
from pyggml.models.context import ContextFlags
from pyggml.models.kv_cache import CacheFullError
from pyggml.models.placement import PlacementFlags
from pyggml.models.topk import TopK
from pyggml.planning import virtual_clock
from pyggml.record import (
    AssignRecord,
    ComputeRecord,
    CopyRecord,
    MicroBatchRecord,
    Recording,
    SplitRecord,
    UsedExpertsRecord,
)
from pyggml.session import Session

#: What a recorder asks of a model.
_FACTS: Any = SimpleNamespace(n_layer=3, n_expert=16, n_expert_used=4, name="random")
CONTEXT = ContextFlags(n_ctx=256, n_batch=256, n_ubatch=64, flash_attn="on")
#: With experts on the host a prompt of at least 32 tokens has used experts copied.
PROMPT = [(32 + 53 * i) % 250 for i in range(40)]
EXPERTS_ON_HOST = PlacementFlags(cpu_moe=True)


def _llamas_cpu(library: str = "") -> Backend:
    """Return the kernels of llama.cpp's own CPU under pyggml's scheduler."""
    return REGISTRY.open(f"libggml:{find_llama(library)}#CPU").backend(threads=1)


def _greedy(model: Session | LlamaModel, n: int = 3) -> list[np.ndarray]:
    """Return the logits of a prompt, and of so many tokens after it."""
    logits = [model.decode(PROMPT, outputs="all")]
    for _ in range(n):
        logits.append(model.decode([int(logits[-1][-1].argmax())]))
    return logits


def _compare(
    path: Path, placement: PlacementFlags, cpu: Backend, context: ContextFlags = CONTEXT, library: str = ""
) -> None:
    """Let both schedulers decode over the same kernels: bits, bytes and causes of copies, splits and times are equal."""
    sim, recorders = ggml.Sim(threads=1), (Recording(), Recording())
    with (
        LlamaModel(
            path, context=context, placement=placement, threads=1, recorder=recorders[1], library=library
        ) as model,
        Session.open(
            path, devices=[sim], cpu=cpu, context=context, placement=placement, clock=virtual_clock([sim, cpu]),
            recorder=recorders[0], dialect=model.dialect,
        ) as session,
    ):  # fmt: skip
        for got, expected in zip(_greedy(model), _greedy(session), strict=True):
            assert np.array_equal(got, expected)
        splits, stats, clock = session.count_splits(), session.sched.stats, session.clock
        assert list(model.count_splits()[0].values()) == list(splits[0].values())
        assert model.count_splits()[1] == splits[1]
        assert model.stats.bytes_by_reason == stats.bytes_by_reason
        assert (model.stats.n_copies, model.stats.n_launches) == (stats.n_copies, stats.n_launches)
        assert model.clock is not None
        assert clock is not None
        assert model.clock.host_s == pytest.approx(clock.host_s, rel=0.02)
    if "gpt" in path.name and model.dialect != DIALECTS["0.26"]:
        return  # b11549 drops unneeded rows one step earlier than b11434, whose graphs pyggml builds: less work
    work, copies = (
        [[_seconds(r) for r in recorder.records if isinstance(r, kind)] for recorder in recorders]
        for kind in (ComputeRecord, CopyRecord)
    )
    assert work[1] == pytest.approx(work[0], rel=1e-9)
    # with ggml's kernels the session's inputs are in pageable memory, llama.cpp's are in pinned memory of the device
    slower = sum(abs(a - b) for a, b in zip(*copies, strict=True))
    assert slower == 0 if not placement.cpu_moe else slower < 0.01 * clock.host_s
    assert model.clock.host_s == pytest.approx(clock.host_s, rel=0, abs=slower + 1e-9 * clock.host_s)


def _seconds(record: ComputeRecord | CopyRecord) -> float:
    assert record.virtual is not None
    return record.virtual.end_s - record.virtual.start_s


@pytest.mark.parametrize(("arch", "flash"), [("qwen3moe", "off"), ("gpt-oss", "on")])
def test_logits_of_whole_models_are_equal(random_model: Callable[[str], Path], arch: str, flash: str) -> None:
    """With everything on the device, llama.cpp gives the bits of pyggml's session, and takes its time."""
    context = ContextFlags(n_ctx=256, n_batch=256, n_ubatch=64, flash_attn=flash)
    _compare(random_model(arch), PlacementFlags(), ggml.CPU(threads=1), context)


def test_logits_with_experts_on_the_host_are_equal(random_model: Callable[[str], Path]) -> None:
    """With used experts copied and ggml's own kernels on the CPU, too."""
    _compare(random_model("deepseek2"), EXPERTS_ON_HOST, _llamas_cpu())


@pytest.mark.slow
@pytest.mark.parametrize("library", ["", *map(str, BUILDS)])
@pytest.mark.parametrize("flash", ["on", "off"])
@pytest.mark.parametrize(
    "arch", ["llama", "llama-dense", "qwen3moe", "gpt-oss", "olmoe", "granitemoe", "qwen2moe", "glm4moe", "deepseek2"]
)
def test_logits_of_every_family_are_equal(
    random_model: Callable[[str], Path], arch: str, flash: str, library: str
) -> None:
    """Every family that can be made here, whole and with experts on the host."""
    context = ContextFlags(n_ctx=256, n_batch=256, n_ubatch=64, flash_attn=flash)
    _compare(random_model(arch), PlacementFlags(), ggml.CPU(threads=1), context, library)
    if arch != "llama-dense":
        _compare(random_model(arch), EXPERTS_ON_HOST, _llamas_cpu(library), context, library)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["", *map(str, BUILDS)])
def test_the_upcycled_model_is_equal(example_path: Path, library: str) -> None:
    """The model that `make run` answers with, in Q8_0 and real: text and bits are those of the session."""
    _compare(example_path, PlacementFlags(), ggml.CPU(threads=1), library=library)
    _compare(example_path, EXPERTS_ON_HOST, _llamas_cpu(library), library=library)


def test_records_tell_of_copies_splits_and_experts(random_model: Callable[[str], Path]) -> None:
    """What llama.cpp's scheduler does is recorded as pyggml's own is: the same copies of the same splits, in order."""
    path, cpu, sim = random_model("qwen3moe"), _llamas_cpu(), ggml.Sim(threads=1)
    own, seen = Recording(), Recording()
    with LlamaModel(path, context=CONTEXT, placement=EXPERTS_ON_HOST, recorder=seen, threads=1) as model:
        model.decode(PROMPT)
    with Session.open(
        path, devices=[sim], cpu=cpu, context=CONTEXT, placement=EXPERTS_ON_HOST, recorder=own, dialect=model.dialect
    ) as session:
        session.decode(PROMPT)

    def facts(recording: Recording) -> list[tuple[object, ...]]:
        found: list[tuple[object, ...]] = []
        for r in recording.records:
            if isinstance(r, CopyRecord):
                found.append((r.split, r.tensor, r.offset_bytes, r.size_bytes, r.tensor_bytes, r.reason))
            elif isinstance(r, UsedExpertsRecord):
                found.append((r.split, r.tensor, r.ids, r.used, r.n_expert, r.expert_bytes))
            elif isinstance(r, ComputeRecord):
                found.append((r.split, r.backend.removeprefix("libggml:"), r.n_nodes, r.first))
            elif isinstance(r, MicroBatchRecord):
                found.append((r.n_tokens, r.n_past, r.n_outputs))
        return found

    assert (
        sum(isinstance(r, UsedExpertsRecord) for r in seen.records) == 6
    )  # of two layers; the last runs for one token
    assert facts(seen) == facts(own)
    causes = [
        {(r.tensor, r.cause) for r in recording.records if isinstance(r, AssignRecord)} for recording in (seen, own)
    ]
    assert len(causes[0]) > 50
    assert causes[0] <= causes[1]
    inputs = [[(i.tensor, i.kind, i.n_users) for i in r.inputs] for r in seen.records if isinstance(r, SplitRecord)]
    of_session = [[(i.tensor, i.kind, i.n_users) for i in r.inputs] for r in own.records if isinstance(r, SplitRecord)]
    assert [sorted(split) for split in inputs] == [sorted(split) for split in of_session[-len(inputs) :]]


def test_memory_is_what_llama_cpp_holds(random_model: Callable[[str], Path]) -> None:
    """Weights, cache and compute buffers are those of pyggml's session, to the byte."""
    path, cpu = random_model("qwen3moe"), ggml.CPU(threads=1)
    with (
        Session.open(path, devices=[ggml.Sim(threads=1)], cpu=cpu, context=CONTEXT) as session,
        LlamaModel(path, context=CONTEXT, threads=1) as model,
    ):
        sums = [
            {m.buft.removesuffix("_Mapped"): (m.weights, m.cache) for m in who.memory() if m.weights}
            for who in (session, model)
        ]
        assert sums[0] == sums[1]
        assert [m.compute for m in model.memory() if m.compute] == [m.compute for m in session.memory() if m.compute]


def test_chosen_experts_are_taken(random_model: Callable[[str], Path], tmp_path: Path) -> None:
    """llama.cpp's eval callback gives the experts of each layer and token: those that a session records."""
    path = random_model("qwen3moe")
    taken = []
    with LlamaModel(path, context=CONTEXT, threads=1, watches_experts=True) as model:
        model.watcher, topk = RoutingRecorder("x", _FACTS), TopK()
        model.decode(PROMPT, outputs="all", topk=topk)
        taken.append(topk.ids)
        trace = model.watcher.trace()
    with Session.open(path, devices=[ggml.Sim(threads=1)], cpu=ggml.CPU(threads=1), context=CONTEXT) as session:
        session.watcher, topk = RoutingRecorder("x", _FACTS), TopK()
        session.decode(PROMPT, outputs="all", topk=topk)
        taken.append(topk.ids)
        assert np.array_equal(session.watcher.trace().ids, trace.ids)
    assert np.array_equal(*taken)


def test_layers_that_fit_are_found(random_model: Callable[[str], Path]) -> None:
    """With ``-ngl auto``, llama.cpp gets the flags that a plan finds: here a part of the layers."""
    small = "sim:custom:1040MiB,100GB/s,10GB/s"
    with LlamaModel(
        random_model("qwen3moe"), devices=small, placement=PlacementFlags(fit=True), context=CONTEXT, threads=1
    ) as model:
        weights = {m.buft: m.weights for m in model.memory()}
        assert 0 < weights["SIM0"] < 16 << 20
        model.decode([1])
        assert model.count_splits()[0]["CPU"] > 1


def test_late_devices_show_no_hazard(random_model: Callable[[str], Path]) -> None:
    """With a seed, devices work late; llama.cpp's scheduler waits for all that it needs, and gives the same bits."""
    path = random_model("qwen3moe")
    with LlamaModel(path, context=CONTEXT, placement=EXPERTS_ON_HOST, threads=1) as model:
        expected = _greedy(model)
    with LlamaModel(path, context=CONTEXT, placement=EXPERTS_ON_HOST, threads=1, seed=7) as model:
        assert all(np.array_equal(a, b) for a, b in zip(_greedy(model), expected, strict=True))
        assert model.hazards() == []


@pytest.mark.parametrize(
    ("kind", "words", "flags"),
    [
        (DeviceUnavailableError, "0 threads", {"threads": 0}),
        (DeviceUnavailableError, "100000 threads", {"threads": 100_000}),
        (DeviceUnavailableError, "at most 16 devices", {"devices": ["sim"] * 16}),
        (DeviceUnavailableError, "no such device", {"faults": [(1, "alloc", 0)]}),
        (GraphError, "nothing fails at 'x'", {"faults": [(0, "x", 0)]}),
        (GraphError, "-5 bytes", {"moe_cache_bytes": -5}),
        (GraphError, "-1,1 does not fit", {"placement": PlacementFlags(tensor_split=(-1.0, 1.0))}),
        (GraphError, "n_ctx is -4", {"context": ContextFlags(n_ctx=-4)}),
        (GraphError, "n_batch is 0", {"context": ContextFlags(n_batch=0)}),
        (GraphError, "257 sequences", {"context": ContextFlags(n_seq_max=257)}),
    ],
)
def test_wrong_openings_are_typed_errors(
    random_model: Callable[[str], Path], kind: type[PyggmlError], words: str, flags: dict[str, Any]
) -> None:
    """Arguments out of range are refused before llama.cpp sees them."""
    with pytest.raises(kind, match=words):
        LlamaModel(random_model("qwen3moe"), **{"threads": 1, **flags})


def test_wrong_uses_are_typed_errors(random_model: Callable[[str], Path]) -> None:
    """Each is told as what it is, and the model goes on."""
    path = random_model("qwen3moe")
    wrong_outputs: Any = "x"
    wrong: list[Any] = ["cpu", "mock:CUDA0", ggml.Sim().device]
    for device in wrong:
        with pytest.raises(DeviceUnavailableError):
            LlamaModel(path, devices=[device])
    with pytest.raises(OutOfMemoryError, match="SIM0: out of memory"):
        LlamaModel(path, devices=["sim:custom:1MiB,100GB/s,10GB/s"])
    with LlamaModel(path, context=CONTEXT, threads=1) as model:
        first = model.decode(PROMPT)
        for tokens, seq, kind in (([-1], 0, GraphError), ([], 0, GraphError), ([1], 3, GraphError)):
            with pytest.raises(kind):
                model.decode(tokens, seq=seq)
        with pytest.raises(CacheFullError):
            model.decode([1] * 500)
        with pytest.raises(DeviceUnavailableError, match="no such device"):
            model.hazards(2)
        calls: list[tuple[str, Callable[[], object]]] = [
            ("sequence 1 is not in", lambda: model.rewind(0, seq=1)),
            ("-1 is no position", lambda: model.rewind(-1)),
            ("sequence -1", lambda: model.n_past_of(-1)),
            ("no outputs are called 'x'", lambda: model.decode([1], outputs=wrong_outputs)),
            ("is not an integer", lambda: model.decode([0.5])),
            ("is not a text", lambda: model.tokenize(5)),
            ("no wait is called", lambda: model.decode_late([[1]], seed=1, dropped=["x"])),
            ("calls ago", lambda: model.fail_at("copy", after=-1)),
        ]
        for words, call in calls:
            with pytest.raises(GraphError, match=words):
                call()
        assert model.tokenize("\ud800") == model.tokenize("?")
        model.fail_at("compute")
        with pytest.raises(ComputeError, match="a fault that was asked for"):
            model.decode([1])
        assert model.n_past == len(PROMPT)
        model.rewind(0)
        assert np.array_equal(model.decode(PROMPT), first)
        failures: list[BaseException] = []

        def decode() -> None:
            try:
                for _ in range(20):
                    model.decode([1])
            except SchedError as error:
                failures.append(error)

        threads = [threading.Thread(target=decode) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures
        assert "another thread" in str(failures[0])
        failures.clear()
        thread = threading.Thread(target=decode)
        thread.start()
        model.close()
        thread.join()
        assert "closed" in str(failures[0])
    with pytest.raises(SchedError, match="closed"):
        model.decode([1])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_random_wrong_uses(random_model: Callable[[str], Path], tmp_path: Path, seed: int) -> None:
    """A hundred uses in a row, most of them wrong: each is told as an error of the tree, and the model computes right after it or is closed."""
    from wrong_uses import MAY_PASS, USES

    script, out = Path(__file__).with_name("wrong_uses.py"), tmp_path / "found.json"
    command = [sys.executable, str(script), str(random_model("qwen3moe")), str(seed), "100", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert {f["use"] for f in found} == set(USES)
    assert [f for f in found if not f["is_right"]] == []
    assert [f["use"] for f in found if not f["error"] and f["use"] not in MAY_PASS] == []


def test_a_crash_of_the_child_is_an_error(random_model: Callable[[str], Path]) -> None:
    """A child that dies ends as ModelError, and what comes after says why the model is closed."""
    with LlamaModel(random_model("qwen3moe"), context=CONTEXT, threads=1) as model:
        process = model._process._process
        assert process is not None
        process.kill()
        with pytest.raises(ModelError, match="SIGKILL"):
            model.decode([1])
        with pytest.raises(SchedError, match=r"closed.*SIGKILL"):
            model.decode([1])


def test_a_slow_decode_is_ended(random_model: Callable[[str], Path]) -> None:
    """The timeout is the model's own."""
    with LlamaModel(random_model("qwen3moe"), context=CONTEXT, threads=1, timeout_s=30.0) as model:
        model._process.timeout_s = 0.0
        with pytest.raises(ModelError, match="no answer in 0 s"):
            model.decode(PROMPT)
        assert model.is_closed


_HOLDER = """
import functools, os, subprocess, sys
kept = os.dup(1)  # the caller's pipe, which the child holds open as long as it lives
subprocess.Popen = functools.partial(subprocess.Popen, pass_fds=(kept,))
from pyggml.llama import LlamaModel
from pyggml.models.context import ContextFlags
model = LlamaModel(sys.argv[1], context=ContextFlags(n_ctx=1 << 16), threads=1)
print("computing", flush=True)
model.decode_late([[1] * 500] * 120, seed=None)  # takes minutes
"""


def test_the_child_ends_with_its_parent(random_model: Callable[[str], Path]) -> None:
    """A caller that is killed while llama.cpp computes leaves no process behind."""
    command = [sys.executable, "-c", _HOLDER, str(random_model("qwen3moe"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "computing\n"
        time.sleep(0.3)
        holder.kill()
        holder.communicate(timeout=10)  # returns when no process has the pipe
