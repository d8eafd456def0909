"""Models with a sliding window in some layers (gpt-oss), beyond the window: against real llama.cpp, and going back."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from recorded_models import write_recorded_model

from pyggml.commands._conversation import Conversation
from pyggml.errors import AllocError
from pyggml.makers.make_moe import Recipe, Sizes, make_moe
from pyggml.models.batch import Batch
from pyggml.sampling import greedy
from pyggml.session import ContextFlags, PlacementFlags, Session, TopK
from pyggml.tokenizer import Tokenizer
from pyggml.types import Type

DATA = Path(__file__).parents[1] / "data" / "logits"
TOKENS = [(i * 37 + 11) % 300 for i in range(600)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Give a small model of two layers in F32, of which the first has a window of 16."""
    path = tmp_path_factory.mktemp("sliding") / "gpt-oss.gguf"
    make_moe(path, Recipe("gpt-oss", Type.F32, seed=3, sizes=Sizes(layers=2, embd=128, ff_exp=64, ctx=1024)))
    return path


def session(path: Path, *, n_ctx: int = 768, kv: Type = Type.F32, flash: str = "off", **options) -> Session:
    """Return a session with micro-batches of 64."""
    more = options.pop("flags", {})
    context = ContextFlags(n_ctx=n_ctx, n_batch=64, n_ubatch=64, type_k=kv, type_v=kv, flash_attn=flash, **more)
    return Session.open(path, context=context, **options)


def decode(s: Session, tokens: list[int], batch: int = 64, topk: TopK | None = None) -> np.ndarray:
    """Return the logits of each token."""
    parts = [tokens[i : i + batch] for i in range(0, len(tokens), batch)]
    return np.concatenate([s.decode(part, outputs="all", topk=topk) for part in parts])


@pytest.mark.parametrize("batch", [1, 8, 40])
def test_logits_are_the_recorded_ones(batch, tmp_path):
    """The same experts wherever the choice is clear, and logits as near as quantised activations allow.

    Llama.cpp rounds activations to the weights' type, we do not for few tokens.
    """
    with np.load(DATA / "gpt-oss-MXFP4.npz") as data:
        tokens, expected = data["tokens"].tolist(), data["bs1" if batch == 1 else "bs40"]
        chosen, is_clear = data["topk"], data["margin"] > 0.1
    topk = TopK()
    with session(write_recorded_model("gpt-oss", tmp_path / "m.gguf", "MXFP4"), n_ctx=256) as s:
        found = decode(s, tokens, batch, topk)
    assert (np.square(found - expected).sum(1) / np.square(expected).sum(1)).max() < 1e-3
    assert is_clear.mean() > 0.7
    np.testing.assert_array_equal(np.sort(topk.ids, axis=2)[is_clear], np.sort(chosen, axis=2)[is_clear])


def test_logits_beyond_the_window_equal_live_llama_cpp(model, tmp_path):
    """600 tokens through a window cache of 256 cells give llama.cpp's logits, with softmax and flash attention."""
    plain, flash = llama_cpp.run_jobs(
        [llama_cpp.Job(str(model), TOKENS, 64), llama_cpp.Job(str(model), TOKENS, 50, "F16", flash=True)], tmp_path
    )
    with session(model) as s:
        assert np.abs(decode(s, TOKENS) - plain).max() < 1e-3
        assert (s.cache.n_used, s.cache.swa.n_cells) == (600, 256)
    with session(model, kv=Type.F16, flash="on") as s:
        error = np.square(decode(s, TOKENS, 50) - flash).sum(1) / np.square(flash).sum(1)
    assert np.mean(error < 1e-4) > 0.95
    assert error.max() < 2e-2


def test_a_full_window_cache_gives_the_same(model):
    """With swa_full no cell is written again, and logits are those of the small cache."""
    with session(model) as small, session(model, flags={"swa_full": True}) as full:
        assert (small.cache.swa.n_cells, full.cache.swa.n_cells) == (256, 768)
        np.testing.assert_allclose(decode(small, TOKENS), decode(full, TOKENS), atol=1e-4)


def test_experts_on_the_host_give_the_same_bits(model):
    """Over [sim, cpu] with --cpu-moe logits equal those of the CPU alone bit for bit, past the window and token by token."""
    with session(model) as s:
        expected = [decode(s, TOKENS[:300]), decode(s, TOKENS[300:303], 1)]
    with session(model, devices=["sim:rtx4090-pcie4"], placement=PlacementFlags(cpu_moe=True)) as s:
        found = [decode(s, TOKENS[:300]), decode(s, TOKENS[300:303], 1)]
        assert s.sched.n_splits > 1
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_going_back_too_far_is_an_error(model):
    """Where tokens of the window are given up a rewind is refused and nothing is lost; within the window it works."""
    with session(model) as s:
        decode(s, TOKENS[:500])
        expected = s.decode([5])
        assert not s.can_rewind(100)
        with pytest.raises(AllocError, match="sliding window"):
            s.rewind(100)
        assert s.n_past == 501
        s.rewind(500)
        np.testing.assert_allclose(s.decode([5]), expected, atol=1e-4)
        s.rewind(0)
        assert s.n_past == 0
    with session(model, flags={"swa_full": True}) as s:
        decode(s, TOKENS[:500])
        assert s.can_rewind(100)


def test_a_conversation_that_forks_far_back_is_evaluated_anew(model, monkeypatch):
    """Where the next turn shares too little with the cache for its windows, nothing is reused, and the answer is right."""
    said = ["".join(chr(65 + i * i % 50) for i in range(n)) for n in (600, 100)]
    said = [said[0], said[1] + "!" * 100, said[1] + "!" * 100 + "???"]
    turns = iter(said)
    monkeypatch.setattr(Tokenizer, "apply_chat_template", lambda self, messages, **_: next(turns))
    with session(model, n_ctx=1024) as s, session(model, n_ctx=1024) as fresh:
        talk = Conversation(s, Tokenizer.from_gguf(s.file), greedy)
        reused = []
        for _ in said:
            answer = talk.turn("", 3, lambda piece: None)
            reused.append(talk.n_reused)
        ids = talk.tokenizer.encode(said[-1], add_special=False)
        expected = list(fresh.generate(ids, 3))
    assert reused == [0, 0, 200]
    assert answer == talk.tokenizer.decode(expected)


def test_several_sequences_have_their_own_windows(model):
    """Two sequences decoded together give what each gives alone, in streams of their own and in one."""
    with session(model) as s:
        alone = [decode(s, TOKENS[:100])[-1]]
        s.reset()
        alone.append(decode(s, TOKENS[50:150])[-1])
    for kv_unified in (False, True):
        with session(model, flags={"n_seq_max": 2, "kv_unified": kv_unified}) as s:
            for i in range(0, 100, 25):
                tokens = np.asarray(TOKENS[i : i + 25] + TOKENS[50 + i : 75 + i], np.int32)
                seqs = np.repeat(np.arange(2, dtype=np.int32), 25)
                pos = np.tile(np.arange(i, i + 25, dtype=np.int32), 2)
                found = s.decode_batch(Batch(tokens, pos, seqs, np.ones(50, bool)))
        np.testing.assert_allclose(found[24], alone[0], atol=2e-4)
        np.testing.assert_allclose(found[49], alone[1], atol=2e-4)


def test_a_model_of_one_layer_has_an_idle_cache(tmp_path):
    """With one layer, which has a window, nothing reads the other cache and its inputs are left out."""
    path = tmp_path / "m.gguf"
    make_moe(path, Recipe("gpt-oss", Type.F32, sizes=Sizes(layers=1, embd=128, ff_exp=64)))
    with session(path, n_ctx=256) as s:
        assert not s.cache.k
        assert np.isfinite(s.decode(TOKENS[:20])).all()
