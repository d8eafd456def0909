"""A graph whose repeated layers are copied equals one that is built whole, tensor by tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from edited_models import SIZES
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pyggml import ops
from pyggml.backend import REGISTRY
from pyggml.catalog import MODELS, write_header
from pyggml.gguf import GGUFFile
from pyggml.makers.make_moe import Recipe, make_moe
from pyggml.models import repeats
from pyggml.models.architectures import ARCHITECTURES, build_graph
from pyggml.models.batch import MicroBatch
from pyggml.models.blocks import Builder
from pyggml.models.context import ContextFlags
from pyggml.models.graph import GraphParams, ModelGraph
from pyggml.models.placement import PlacementFlags
from pyggml.models.source import BuiltSource
from pyggml.models.weights import LayerWeights
from pyggml.tensor import Tensor
from pyggml.types import Op, Type

contexts = st.builds(
    lambda attention, **flags: ContextFlags(
        n_ctx=1024, flash_attn=attention[0], type_k=attention[1], type_v=attention[1], **flags
    ),
    attention=st.sampled_from([("on", Type.F16), ("on", Type.Q8_0), ("off", Type.F16), ("off", Type.F32)]),
    n_ubatch=st.sampled_from([128, 512]),
    n_seq_max=st.sampled_from([1, 2]),
    kv_unified=st.booleans(),
    swa_full=st.booleans(),
)
#: what is asked for in order: graphs for reserving memory, or of a decode
asked = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), st.sampled_from([1, 2, 30, 256]), st.sampled_from([0, 1, 2])),
        st.tuples(st.just("decode"), st.sampled_from([1, 300]), st.sampled_from(["all", "last"])),
    ),
    min_size=2,
    max_size=5,
)


def of_catalog(arch: str, path: Path) -> bool:
    """Write the header of a published model of an architecture, the one with the fewest layers; False: none is known."""
    known = [model for model in MODELS.values() if model.arch == arch]
    if known:
        write_header(min(known, key=lambda model: model.n_layer), "Q4_K_M", path)
    return bool(known)


def opened(path: Path, context: ContextFlags) -> BuiltSource:
    """Return a source of a model, loaded for plans."""
    gpu, cpu = REGISTRY.open_all(["sim:rtx4090-pcie4", "cpu"], data=False)
    source = BuiltSource(GGUFFile.open(path), [gpu], cpu, placement=PlacementFlags(), context=context)
    source.load(data=False, progress=None)
    source.make_cache(data=False)
    return source


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_copied_layers_equal_built_ones(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All graphs of a plan equal those built whole: every tensor, the order, the lists (compared with ``PYGGML_CHECK``)."""
    path = tmp_path / "model.gguf"
    if not of_catalog(arch, path):
        make_moe(path, Recipe(arch, Type.F32, seed=1, sizes=replace(SIZES, layers=9, head_dim=32)))
    monkeypatch.setenv("PYGGML_CHECK", "1")
    n_compared = 0

    def counted(made: ModelGraph, whole: ModelGraph) -> None:
        nonlocal n_compared
        n_compared += 1
        verify(made, whole)

    verify = repeats._verify
    monkeypatch.setattr(repeats, "_verify", counted)

    @settings(
        max_examples=4, phases=(Phase.generate,), derandomize=True, database=None, deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )  # fmt: skip
    @given(context=contexts, asked=asked)
    def check(context: ContextFlags, asked: list[tuple[str, int, Any]]) -> None:
        source = opened(path, context)
        for what, n_tokens, outputs in asked:
            if what == "reserve":
                source.reserved(n_tokens * context.n_seq_max, context.n_seq_max, min(outputs, n_tokens))
            else:
                for _, build in source.parts(n_tokens, outputs):
                    if build is not None:
                        build()
        (patterns,) = source._patterns.values()
        assert any(stage.is_copied for stage in patterns[0].stages)

    check()
    assert n_compared


def params_of(source: BuiltSource, n_tokens: int, n_kv: int) -> GraphParams:
    """Return the parameters of a graph."""
    part = MicroBatch.reserve(n_tokens, 1, 1)
    return GraphParams(source.hparams, source.params, part, 1, replace(source.cache.full_view(), n_kv=n_kv))


@pytest.fixture
def llama(tmp_path: Path) -> BuiltSource:
    """A dense model of many layers."""
    of_catalog("llama", tmp_path / "model.gguf")
    return opened(tmp_path / "model.gguf", ContextFlags(n_ctx=1024))


def test_most_layers_are_copied(llama: BuiltSource) -> None:
    """Of a dense model the first and the last layer are built; the last one is cropped."""
    patterns: list[repeats.Pattern] = []
    repeats.build_repeated(build_graph, params_of(llama, 64, 256), llama.loaded.weights, patterns)
    built = [i for i, stage in enumerate(patterns[0].stages[1:-1]) if not stage.is_copied]
    assert built == [0, llama.hparams.n_layer - 1]


@pytest.mark.parametrize("what", ["nodes", "leafs", "src", "name", "flags", "like"])
def test_a_wrong_copy_is_found(llama: BuiltSource, what: str) -> None:
    """With ``PYGGML_CHECK`` an error in the order or in one copied tensor stops the build."""
    patterns: list[repeats.Pattern] = []
    repeats.build_repeated(build_graph, params_of(llama, 64, 256), llama.loaded.weights, patterns)
    if what in ("nodes", "leafs"):
        order = getattr(patterns[0], what)
        order[40], order[41] = order[41], order[40]
    else:
        rows = patterns[0].stages[9].rows
        like, op, name, flags, src, root = rows[3]
        rows[3] = {
            "like": (rows[0][0], op, name, flags, src, root),
            "name": (like, op, "another", flags, src, root),
            "flags": (like, op, name, 0, src, root),
            "src": (like, op, name, flags, src[::-1], root),
        }[what]
    with pytest.raises(AssertionError):
        repeats.build_repeated(build_graph, params_of(llama, 32, 512), llama.loaded.weights, patterns)


@pytest.mark.parametrize("odd", ["always", "of one token"])
def test_layers_that_do_not_repeat_are_built(llama: BuiltSource, odd: str) -> None:
    """One layer has a node more; or some have one with their numbers if there is one token: two structures are learnt."""
    arch = ARCHITECTURES["llama"]

    def layer(b: Builder, w: LayerWeights, cur: Tensor) -> Tensor:
        cur = arch.layer(b, w, cur)
        if w.layer == 5 and odd == "always":
            cur = ops.tanh(cur)
        if w.layer >= 7 and odd == "of one token" and b.n_tokens == 1:
            cur = ops.scale(cur, float(w.layer))
        return cur

    build = replace(arch, layer=layer).build_graph
    patterns: list[repeats.Pattern] = []
    for n_tokens, n_kv in [(64, 256), (64, 512), (1, 256), (1, 512), (32, 256)]:
        p = params_of(llama, n_tokens, n_kv)
        ops_made = [node.op for node in repeats.build_repeated(build, p, llama.loaded.weights, patterns).graph.nodes]
        n_scaled = llama.hparams.n_layer - 7 if odd == "of one token" and n_tokens == 1 else 0
        assert (ops_made.count(Op.UNARY), ops_made.count(Op.SCALE)) == (odd == "always", n_scaled)
    assert len(patterns) == (1 if odd == "always" else 2)
