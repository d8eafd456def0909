"""Every architecture of llama.cpp, by the smallest header that it takes: captured, and split as the real scheduler does."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from headers import known, write_known

from pyggml.backends.host.dataless import DatalessCPU
from pyggml.errors import ModelError
from pyggml.llama.source import CapturedSource
from pyggml.llama.verify import DEVICE, verify
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags
from pyggml.planning import Planner

#: Names, devices and flags: what is offloaded, where experts and caches are.
PLACES: dict[str, tuple[str, PlacementFlags, bool]] = {
    "all": ("mock:CUDA0", PlacementFlags(), True),
    "one layer": ("mock:CUDA0", PlacementFlags(n_gpu_layers=1), True),
    "experts on the host": ("mock:CUDA0", PlacementFlags(cpu_moe=True), True),
    "experts offered": (DEVICE, PlacementFlags(cpu_moe=True), True),
    "cache on the host": ("mock:CUDA0", PlacementFlags(), False),
}
SIZES = (40, 1)
#: One of each kind: dense, with experts, hybrid, recurrent, encoders, latent attention, sliding windows, several inputs.
FEW = (
    *("gemma3", "gemma4", "qwen3next", "qwen35moe", "llama4", "deepseek32", "glm4moe", "gpt-oss", "mamba2", "jamba"),
    *("falcon-h1", "nemotron_h_moe", "phi3", "bert", "t5", "lfm2moe", "hunyuan-moe", "kimi-linear", "minimax-m2"),
    *("granitehybrid", "cohere2", "exaone4", "clef"),
)
#: What llama.cpp of the tests does not take at all.
REFUSED = {name: about["why_not"] for name, about in known().items() if "why_not" in about}


def _differences(path: Path, cases: list[tuple[str, str]]) -> list[str]:
    out = []
    for flash, name in cases:
        device, placement, offload_kqv = PLACES[name]
        context = ContextFlags(n_ctx=512, n_batch=64, n_ubatch=64, flash_attn=flash, offload_kqv=offload_kqv)
        found = verify(path, SIZES, devices=[device], placement=placement, context=context, outputs="all")
        out += [f"{flash}, {name}, {p.n_tokens}: {p.first_difference}" for p in found.plans if not p.equal]
        assert len(found.plans) == len(SIZES)
    return out


@pytest.mark.parametrize("arch", FEW)
def test_plans_equal_llama_cpps(arch: str, tmp_path: Path) -> None:
    """A few plans of one architecture of each kind equal what the real scheduler prints, line by line."""
    cases = [("on", "experts offered"), ("off", "one layer"), ("off", "cache on the host")]
    assert not _differences(write_known(arch, tmp_path), cases)


#: Headers that llama.cpp loads and then fails on whatever the flags, or with flash attention, with its words.
FAILS = {"gemma4-assistant": "Gemma4Assistant requires ctx_other to be set"}
FAILS_WITH_FLASH = {"plm": r"GGML_ASSERT\(a->ne\[0\] == b->ne\[0\]\)"}
CAPTURED = sorted(set(known()) - set(REFUSED) - set(FAILS))


def _flash(arch: str) -> tuple[str, ...]:
    return ("off",) if arch in FAILS_WITH_FLASH else ("on", "off")


def test_all_names_but_two_are_captured() -> None:
    """Of 155 names llama.cpp has no model for one, and does not plan another without the model that it drafts for."""
    assert (len(known()), len(CAPTURED)) == (155, 153)
    assert REFUSED == {"gptj": "RuntimeError: unsupported model architecture: 'gptj'"}


@pytest.mark.slow
@pytest.mark.parametrize("arch", CAPTURED)
def test_twenty_plans_of_every_architecture(arch: str, tmp_path: Path) -> None:
    """Flash attention on and off, five placements, two sizes: every plan equals the real scheduler's."""
    assert not _differences(write_known(arch, tmp_path), list(product(_flash(arch), PLACES)))


@pytest.mark.parametrize(("arch", "words"), (FAILS | FAILS_WITH_FLASH).items())
def test_what_llama_cpp_fails_on(arch: str, words: str, tmp_path: Path) -> None:
    """Headers on which llama.cpp fails are refused with its words."""
    with pytest.raises(ModelError, match=words):
        _differences(write_known(arch, tmp_path), [("on", "all")])


def test_a_decode_that_llama_cpp_does_not_go_through(tmp_path: Path) -> None:
    """The decoder of T5 asks for an encoder first, and ends the child: a batch has the graph of a full cache."""
    context = ContextFlags(n_ctx=512, n_batch=64, n_ubatch=64)
    with Planner.open(write_known("t5", tmp_path), devices=[DEVICE], context=context, data=False) as planner:
        (planned,) = planner.plan_batch(40)
        masks = [t for t in planned.graph.graph.leafs if t.name == "attn_inp_kq_mask"]
        assert [t.ne[:2] for t in masks] == [(512, 40)]


def test_caches_that_are_cleared_before_a_decode(tmp_path: Path) -> None:
    """DeepSeek 4 clears rows of its caches before each batch, which have no bytes here: its batches are decoded, too."""
    context = ContextFlags(n_ctx=512, n_batch=64, n_ubatch=64)
    path = write_known("deepseek4", tmp_path)
    with Planner.open(path, devices=[DEVICE], context=context, graph="llama", data=False) as planner:
        assert isinstance(planner.source, CapturedSource)
        decoded = planner.source.captures.ask("decode", n_tokens=40, outputs="last", depth=0, is_full=False)
        assert not decoded["is_full"]


def test_a_batch_sees_the_cells_that_it_needs(tmp_path: Path) -> None:
    """Batches from an empty cache see 256 cells more at a time, and layers with a window no more than that."""
    context = ContextFlags(n_ctx=2048, n_batch=512, n_ubatch=256)
    path = write_known("gemma3", tmp_path)
    with Planner.open(path, devices=[DEVICE], context=context, graph="llama", data=False) as planner:
        seen = [
            [t.ne[0] for t in planned.graph.graph.leafs if t.name == "attn_inp_kq_mask"]
            for planned in planner.plan_batch(700)
        ]
    assert [max(cells) for cells in seen] == [256, 512, 768]


@pytest.mark.parametrize("arch", ["jamba", "falcon-h1"])
def test_batches_of_one_of_several_sequences(arch: str, tmp_path: Path) -> None:
    """A batch of few tokens has the same nodes and inputs whether one or two sequences have caches, of attention and recurrent layers."""
    path = write_known(arch, tmp_path)

    def seen(n_seq_max: int) -> list[object]:
        context = ContextFlags(n_ctx=512 * n_seq_max, n_batch=64, n_ubatch=64, n_seq_max=n_seq_max)
        with Planner.open(path, devices=[DEVICE], context=context, graph="llama", data=False) as planner:
            graphs = [p.graph.graph for n in (1, 3) for p in planner.plan_batch(n)]
            nodes = [[n.op_desc for n in g.nodes if not n.op.is_view] for g in graphs]
            return [nodes, [[(t.name, t.ne, t.nb) for t in g.leafs if t.buffer is None] for g in graphs]]

    assert seen(1) == seen(2)


def test_a_batch_that_caches_of_several_sequences_cannot_share(tmp_path: Path) -> None:
    """Over whole caches each sequence has as many tokens: other numbers are refused, and planning goes on."""
    context = ContextFlags(n_ctx=512, n_batch=64, n_ubatch=64, n_seq_max=2)
    with Planner.open(
        write_known("phi3", tmp_path), devices=[DEVICE], context=context, graph="llama", data=False
    ) as planner:
        assert isinstance(planner.source, CapturedSource)
        with pytest.raises(ModelError, match="3 cannot be divided among them; plan with -np 1"):
            planner.source.captures.ask("decode", n_tokens=3, outputs="last", depth=0, is_full=True)
        assert planner.plan_batch(3)


def test_reserved_batches_are_rounded_up_to_sequences(tmp_path: Path) -> None:
    """31 tokens of two sequences are 32: with so many llama.cpp pins no norm, and pyggml does not either."""
    context = ContextFlags(n_ctx=512, n_batch=64, n_ubatch=64, n_seq_max=2)
    found = verify(write_known("llama", tmp_path), (31, 1), placement=PlacementFlags(n_gpu_layers=1), context=context)
    assert [p.first_difference for p in found.plans] == [None, None]


def _other_answers(arch: str, folder: Path) -> list[str]:
    """Return the nodes of an architecture's graphs for which a plan's CPU answers otherwise than llama.cpp's."""
    path, cpu, out = write_known(arch, folder), DatalessCPU(), []
    for flash in _flash(arch):
        context = ContextFlags(n_ctx=512, n_batch=64, n_ubatch=64, flash_attn=flash)
        with Planner.open(path, devices=["mock:CUDA0"], context=context, graph="llama", data=False) as planner:
            source = planner.source
            assert isinstance(source, CapturedSource)
            for n in (40, 1):
                captured = source.captures.ask("reserve", size=[n, 1, n])
                lacks = set(captured["cpu_lacks"])
                for i, node in enumerate(source.reserved(n, 1, n).graph.nodes):
                    if cpu.supports_op(node) == (i in lacks):
                        out.append(f"{node.op_desc} '{node.name}' {node.type.ggml_name}")
    return out


@pytest.mark.parametrize("arch", ["qwen35moe", "deepseek32", "deepseek4", "rwkv7", "wavtokenizer-dec"])
def test_the_cpu_answers_as_llama_cpps(arch: str, tmp_path: Path) -> None:
    """The CPU of a plan says yes and no to the nodes of captured graphs as llama.cpp's CPU does."""
    assert not _other_answers(arch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", CAPTURED)
def test_the_cpu_answers_as_llama_cpps_for_every_architecture(arch: str, tmp_path: Path) -> None:
    """Likewise for every architecture."""
    assert not _other_answers(arch, tmp_path)
