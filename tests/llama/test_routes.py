"""A build that does not export `llama_graph_reserve`: the same plans where llama.cpp reserves or decodes, else one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from headers import write_known
from test_architectures import CAPTURED, PLACES

from pyggml.errors import ModelError
from pyggml.llama.library import find_llama
from pyggml.llama.process import shared_process
from pyggml.llama.source import CapturedSource
from pyggml.llama.verify import verify
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags
from pyggml.plan_report import ggml_text
from pyggml.planning import Planner

#: llama.cpp fails on a decode of these, so that their plans need graphs of any size over a whole cache.
NOT_DECODED = ("chameleon", "plm", "t5")
CONTEXT = ContextFlags(n_ctx=1024, n_batch=256, n_ubatch=64)


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a build whose table of symbols has another name for `llama_graph_reserve`."""
    path = tmp_path_factory.mktemp("build") / "libllama.so"
    name = b"_Z19llama_graph_reserveP13llama_contextjjj\0"
    whole = find_llama().read_bytes()
    assert name in whole
    path.write_bytes(whole.replace(name, name.replace(b"reserve", b"another")))
    with shared_process(path), shared_process(path, prints=True):
        yield path


def _plans(path: Path, place: str, *, n_seq_max: int = 1) -> list[object]:
    """Return what is planned of batches of several sizes and depths, the largest graph, and memory."""
    device, placement, offload_kqv = PLACES[place]
    context = ContextFlags(n_ctx=1024, n_batch=256, n_ubatch=64, offload_kqv=offload_kqv, n_seq_max=n_seq_max)
    with Planner.open(
        path, devices=[device], placement=placement, context=context, graph="llama", data=False
    ) as planner:
        planned = [p for n, depth in ((100, 0), (1, 0), (1, 300)) for p in planner.plan_batch(n, depth=depth)]
        planned += [planner.plan_reserved(64, n_seq_max, 64), planner.plan_reserved(n_seq_max, n_seq_max, n_seq_max)]
        leafs = [[(t.name, t.ne) for t in p.graph.graph.leafs] for p in planned]
        return [[ggml_text(planner, p) for p in planned], leafs, planner.memory(), planner.placement.layers]


def _equal(arch: str, place: str, folder: Path, build: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    path = write_known(arch, folder)
    whole = _plans(path, place)
    monkeypatch.setenv("PYGGML_LIBLLAMA", str(build))
    return repr(_plans(path, place)) == repr(whole)


@pytest.mark.parametrize(
    ("arch", "place"),
    [
        ("qwen3moe", "experts offered"),
        ("gemma3", "one layer"),
        ("falcon-h1", "cache on the host"),
        ("bert", "all"),
        ("minimax-m3", "all"),
    ],
)
def test_plans_are_the_same(
    arch: str, place: str, tmp_path: Path, hidden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches after any depth, the largest graph and the smallest, their leafs and memory do not depend on the route."""
    assert _equal(arch, place, tmp_path, hidden, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [a for a in CAPTURED if a not in NOT_DECODED])
def test_plans_of_every_architecture_are_the_same(
    arch: str, tmp_path: Path, hidden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Likewise for every architecture with experts, one layer or all on the device."""
    for place in ("one layer", "experts offered"):
        assert _equal(arch, place, tmp_path, hidden, monkeypatch)
        monkeypatch.delenv("PYGGML_LIBLLAMA")


def test_several_sequences(tmp_path: Path, hidden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two sequences, too."""
    path = write_known("jamba", tmp_path)
    whole = _plans(path, "all", n_seq_max=2)
    monkeypatch.setenv("PYGGML_LIBLLAMA", str(hidden))
    assert repr(_plans(path, "all", n_seq_max=2)) == repr(whole)


def test_what_it_cannot_give_is_refused(tmp_path: Path, hidden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another size over a whole cache is refused with the sizes that there are; planning goes on."""
    monkeypatch.setenv("PYGGML_LIBLLAMA", str(hidden))
    with Planner.open(
        write_known("t5", tmp_path), devices=["mock:CUDA0"], context=CONTEXT, graph="llama", data=False
    ) as planner:
        assert isinstance(planner.source, CapturedSource)
        line = r"does not export llama_graph_reserve: .* of 64 tokens \(64 outputs\) and 1 tokens \(1 outputs\), not one of 40"
        with pytest.raises(ModelError, match=line):
            planner.plan_batch(40)  # llama.cpp decodes no batch of T5 before it encodes one
        assert planner.plan_reserved(1, 1, 1)


def test_it_is_verified_by_the_sizes_that_it_gives(
    tmp_path: Path, hidden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full micro-batches and single tokens are compared with its scheduler, and no others; a wrong rule is found."""
    monkeypatch.setenv("PYGGML_LIBLLAMA", str(hidden))
    path, host = write_known("qwen3moe", tmp_path), PlacementFlags(cpu_moe=True)
    found = verify(path, (64, 1), placement=host, context=CONTEXT)
    assert [(p.equal, p.n_splits > 1) for p in found.plans] == [(True, True), (True, True)]
    found = verify(path, (64, 1), placement=host, context=CONTEXT, offload_rule=lambda device, node: False)
    assert [p.equal for p in found.plans] == [False, True]
    with pytest.raises(ModelError, match="does not export llama_graph_reserve"):
        verify(path, (40,), placement=host, context=CONTEXT)
