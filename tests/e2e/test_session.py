"""A session: errors before computing, sequences, rewinding, reuse of graphs, plans that come true, weights in place."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml.backend import REGISTRY
from pyggml.errors import ComputeError, FormatError, GraphError, OutOfMemoryError, SchedError
from pyggml.gguf import GGUFFile
from pyggml.models.batch import Batch
from pyggml.models.kv_cache import CacheFullError
from pyggml.sampling import SamplerFlags, make_sampler
from pyggml.session import BatchRecord, ContextFlags, PlacementFlags, Session, TopK
from pyggml.types import BufferUsage, Type

SIM = "sim:rtx4090-pcie4"
TOKENS = [(i * 53 + 32) % 259 for i in range(40)]


def flags(**changes) -> ContextFlags:
    """Return a small context with an F32 cache and without flash attention."""
    return ContextFlags(**({"n_ctx": 256, "type_k": Type.F32, "type_v": Type.F32, "flash_attn": "off"} | changes))


def close(a: np.ndarray, b: np.ndarray) -> None:
    """Compare logits that other shapes of the same computation gave."""
    np.testing.assert_allclose(a, b, atol=2e-4)


# -- errors ------------------------------------------------------------------


def test_ids_outside_the_vocabulary_are_refused(llama):
    """An id out of bounds is an error before anything is computed, and the session goes on."""
    with Session.open(llama, context=flags()) as s:
        for bad in (-1, 320, 2**31 - 1):
            with pytest.raises(GraphError, match=r"0\.\.319"):
                s.decode([1, bad])
        assert s.cache.n_used == 0
        assert s.decode([1]).shape == (1, 320)


def test_a_prompt_longer_than_the_context_is_refused(llama):
    """Too many tokens are an error before the first is computed; a later batch too."""
    with Session.open(llama, context=flags()) as s:
        with pytest.raises(CacheFullError) as caught:
            s.generate([1] * 257, 4)
        assert (caught.value.n_tokens, caught.value.n_cells) == (257, 256)
        s.decode(TOKENS)
        with pytest.raises(CacheFullError, match="40 of 256"):
            s.decode([1] * 217)
        assert s.n_past == 40


def test_a_context_is_a_whole_number_of_256_cells(llama):
    """A size between two is rounded up, and all its cells can be used."""
    with Session.open(llama, context=flags(n_ctx=1000), data=False) as s:
        assert s.params.n_ctx == 1024
        assert s.cache.n_cells == 1024


def test_a_sequence_that_does_not_exist_is_refused(llama):
    """The context says how many sequences it has."""
    with Session.open(llama, context=flags()) as s, pytest.raises(GraphError, match="sequence 3"):
        s.decode([1], seq=3)


def test_a_batch_without_tokens_is_refused(llama):
    """Nothing cannot be decoded, be it a list or an array; the session goes on."""
    with Session.open(llama, context=flags()) as s:
        for nothing in ([], np.array([], np.int32)):
            with pytest.raises(GraphError, match="without tokens"):
                s.decode(nothing)
        assert s.decode([1]).shape == (1, 320)


def test_a_plan_cannot_decode(llama):
    """A session without data says so."""
    with Session.open(llama, context=flags(), data=False) as s, pytest.raises(SchedError, match="no data"):
        s.decode([1])


def test_a_closed_session_says_so(llama):
    """Closing twice is no error; decoding afterwards is."""
    s = Session.open(llama, context=flags())
    s.close()
    s.close()
    with pytest.raises(SchedError, match="closed"):
        s.decode([1])


@pytest.mark.parametrize("what", [{"n_batch": 0}, {"n_seq_max": 0}, {"type_k": Type.Q4_K}, {"type_v": Type.Q8_0}])
def test_impossible_contexts_are_refused(llama, what):
    """Flags of the context are checked before weights are loaded."""
    with pytest.raises(GraphError):
        Session.open(llama, context=flags(**what))


def test_a_device_that_is_too_small_is_an_error_with_numbers(llama):
    """Too little memory names what was asked for and what would help."""
    with pytest.raises(OutOfMemoryError, match="-ngl") as caught:
        Session.open(llama, devices=["sim:custom:8MiB,1000GB/s,25GB/s"], context=flags())
    assert caught.value.requested_bytes > 8 * 2**20


def test_an_abort_leaves_the_session_usable(llama):
    """An aborted micro-batch leaves the cache; what came before stays."""
    with Session.open(llama, context=flags(n_ubatch=16)) as s:
        expected = s.decode(TOKENS)
        s.reset()
        answers = iter([False, False, True])
        s.abort = lambda: next(answers)
        with pytest.raises(ComputeError, match="aborted") as caught:
            s.decode(TOKENS)
        assert caught.value.status == 1
        assert s.n_past == 32
        s.abort = None
        close(s.decode(TOKENS[32:]), expected)


# -- the same in other shapes ------------------------------------------------


@pytest.mark.parametrize("n_ubatch", [1, 7, 16])
def test_micro_batches_give_the_same(llama, n_ubatch):
    """Logits do not depend on how a batch is cut; those without an output cost none."""
    with Session.open(llama, context=flags()) as s:
        whole = s.decode(TOKENS, outputs="all")
    records: list[BatchRecord] = []
    with Session.open(llama, context=flags(n_ubatch=n_ubatch)) as s:
        s.on_batch = records.append
        close(s.decode(TOKENS, outputs="all"), whole)
        s.reset()
        records.clear()
        close(s.decode(TOKENS, outputs="last"), whole[-1:])
    assert [r.n_outputs for r in records] == [0] * (len(records) - 1) + [1]
    assert len(records) == -(-40 // n_ubatch)


def test_batches_longer_than_n_batch_are_cut(llama):
    """A prompt longer than n_batch is decoded in parts."""
    with Session.open(llama, context=flags()) as s:
        whole = s.decode(TOKENS, outputs="all")
    with Session.open(llama, context=flags(n_batch=16)) as s:
        close(s.decode(TOKENS, outputs="all"), whole)


@pytest.mark.parametrize("unified", [True, False])
def test_sequences_in_one_batch_do_not_mix(llama, unified):
    """Two sequences decoded together give what each gives alone, in one stream or two."""
    a, b = TOKENS[:9], TOKENS[20:29]
    with Session.open(llama, context=flags()) as s:
        alone = [s.decode(a, outputs="all")]
        s.reset()
        alone.append(s.decode(b, outputs="all"))
    batch = Batch(
        np.array([t for pair in zip(a, b, strict=True) for t in pair], np.int32),
        np.repeat(np.arange(9, dtype=np.int32), 2),
        np.tile(np.array([0, 1], np.int32), 9),
        np.ones(18, bool),
    )
    with Session.open(llama, context=flags(n_ctx=512, n_seq_max=2, kv_unified=unified)) as s:
        together = s.decode_batch(batch)
        close(together[0::2], alone[0])
        close(together[1::2], alone[1])
        s.cache.seq_rm(0)
        assert s.cache.seq_pos_max(1) == 8


def test_rewinding_forgets(llama):
    """After a rewind the same tokens give the same logits, whatever was decoded in between."""
    with Session.open(llama, context=flags()) as s:
        s.decode(TOKENS[:20])
        first = s.decode(TOKENS[20:], outputs="all")
        s.rewind(20)
        s.decode([7, 8, 9])
        s.rewind(20)
        np.testing.assert_array_equal(s.decode(TOKENS[20:], outputs="all"), first)


@pytest.mark.parametrize("flash", ["on", "off"])
def test_a_cache_on_the_host_gives_the_same(llama, flash):
    """--no-kv-offload keeps the cache on the CPU; logits are those of the CPU."""
    context = flags(type_k=Type.F16, type_v=Type.F16, flash_attn=flash)
    with Session.open(llama, context=context) as s:
        expected = s.decode(TOKENS, outputs="all")
    context = flags(type_k=Type.F16, type_v=Type.F16, flash_attn=flash, offload_kqv=False)
    with Session.open(llama, devices=[SIM], context=context) as s:
        assert s.memory()[0].cache == 0
        np.testing.assert_array_equal(s.decode(TOKENS, outputs="all"), expected)


@pytest.mark.parametrize("ngl", [0, 1, 2, 3, 4])
def test_layers_on_either_side_give_the_same(llama, ngl):
    """However many layers are on the device, the bits are the CPU's."""
    with Session.open(llama, context=flags()) as s:
        expected = s.decode(TOKENS)
    with Session.open(llama, devices=[SIM], placement=PlacementFlags(n_gpu_layers=ngl), context=flags()) as s:
        np.testing.assert_array_equal(s.decode(TOKENS), expected)


def test_two_devices_share_the_layers_and_work_in_a_pipeline(llama):
    """Two simulated devices are numbered, take layers by -ts, keep pipeline copies, and give the CPU's bits."""
    with Session.open(llama, context=flags(n_ubatch=16)) as s:
        expected = [s.decode(TOKENS), s.decode([4]), s.decode([5])]
    options = {"devices": [SIM, SIM], "placement": PlacementFlags(tensor_split=(1.0, 1.0))}
    with Session.open(llama, context=flags(n_ubatch=16), **options) as s:
        assert [d.name for d in (*s.placement.layers, s.placement.output)] == ["SIM0", "SIM0", "SIM1", "SIM1"]
        assert s.sched.n_copies == 4
        for a, b in zip(expected, [s.decode(TOKENS), s.decode([4]), s.decode([5])], strict=True):
            np.testing.assert_array_equal(a, b)


# -- reuse -------------------------------------------------------------------


def test_tokens_use_the_graph_before_again(llama):
    """Decoding token by token builds one graph for each page of 256 cells."""
    records: list[BatchRecord] = []
    with Session.open(llama, context=flags(n_ctx=512)) as s:
        s.on_batch = records.append
        for i in range(258):
            s.decode([i % 256])
    assert [i for i, r in enumerate(records) if not r.is_reused] == [0, 256]


def test_another_number_of_outputs_is_another_graph(llama):
    """A graph is used again only for as many tokens and outputs."""
    with Session.open(llama, context=flags()) as s:
        s.decode(TOKENS[:4])
        s.decode(TOKENS[:4], outputs="all")
        assert s.n_reused == 0
        s.decode(TOKENS[:4], outputs="all")
        assert s.n_reused == 1


# -- generation --------------------------------------------------------------


def test_greedy_generation_is_decode_by_decode(llama):
    """Generation yields the most likely token each time, and stops where told."""
    with Session.open(llama, context=flags()) as s:
        tokens = list(s.generate(TOKENS, 8))
        s.reset()
        logits = s.decode(TOKENS)
        for token in tokens:
            assert int(logits[-1].argmax()) == token
            logits = s.decode([token])
        s.reset()
        assert list(s.generate(TOKENS, 8, stop={tokens[3]})) == tokens[: tokens.index(tokens[3])]


def test_a_seed_repeats_a_text(llama):
    """Sampling with one seed gives one text."""
    texts = []
    for _ in range(2):
        with Session.open(llama, context=flags()) as s:
            texts.append(list(s.generate(TOKENS, 10, make_sampler(SamplerFlags(temperature=1.5, seed=4)))))
    assert texts[0] == texts[1]


def test_generation_ends_with_the_context(llama):
    """When the context is full generation ends without an error."""
    with Session.open(llama, context=flags()) as s:
        assert len(list(s.generate([1] * 250, 50))) == 7
        assert s.n_past == 256


# -- experts -----------------------------------------------------------------


def test_choices_of_all_batches_are_kept(llama):
    """TopK collects over batches; layers that skipped a token say -1."""
    topk = TopK()
    with Session.open(llama, context=flags()) as s:
        s.decode(TOKENS[:5], outputs="all", topk=topk)
        s.decode(TOKENS[5:8], outputs="last", topk=topk)
    assert topk.ids.shape == (3, 8, 4)
    assert (topk.ids[:2] >= 0).all()
    assert (topk.ids[2, 5:7] == -1).all()
    assert (topk.ids[2, 7] >= 0).all()


# -- plans and memory --------------------------------------------------------


@pytest.mark.parametrize("outputs", ["last", "all"])
def test_a_plan_comes_true(llama, outputs):
    """A plan's splits, inputs and memory are those of the run."""
    options = {"devices": [SIM], "placement": PlacementFlags(cpu_moe=True), "context": flags(n_ubatch=64)}
    with Session.open(llama, data=False, **options) as plan, Session.open(llama, **options) as run:
        (planned,) = plan.plan_batch(40, outputs=outputs)
        run.decode(TOKENS, outputs=outputs)
        assert [(s.backend_id, s.i_start, s.i_end, [t.name for t in s.inputs]) for s in planned.plan.splits] == [
            (s.backend_id, s.i_start, s.i_end, [t.name for t in s.inputs]) for s in run.sched.splits
        ]
        assert plan.memory() == run.memory()


def test_no_weight_is_copied_on_the_cpu(llama):
    """Weights in host memory lie in the mapped file: the buffer is over the mapping, each tensor at its place in it."""
    file = GGUFFile.open(llama)
    with Session.open(file, context=flags()) as s:
        (buffer,) = s.loaded.buffers
        assert buffer.usage is BufferUsage.WEIGHTS
        assert s.loaded.copied_bytes == 0
        for tensor in s.loaded.weights.tensors:
            assert tensor.buffer is buffer
            assert tensor.data == file.address(tensor.name)


def test_experts_on_the_host_are_used_in_place(llama):
    """With --cpu-moe experts stay mapped and the rest is copied, with progress."""
    told: list[tuple[int, int]] = []
    with Session.open(
        llama,
        devices=[SIM],
        placement=PlacementFlags(cpu_moe=True),
        context=flags(),
        progress=lambda done, total: told.append((done, total)),
    ) as s:
        sizes = {t.name: t.nbytes for t in s.loaded.weights.tensors}
        experts = sum(n for name, n in sizes.items() if "_exps" in name or name == "token_embd.weight")
        assert s.loaded.mapped_bytes == experts
        assert s.loaded.copied_bytes == sum(sizes.values()) - experts
    assert told[-1] == (s.loaded.copied_bytes,) * 2


def test_flash_attention_is_settled_by_a_probe(llama, monkeypatch):
    """-fa auto stays on where the device runs FLASH_ATTN_EXT, and is off where it does not."""
    context = ContextFlags(n_ctx=256)
    with Session.open(llama, devices=["mock:CUDA0"], context=context, data=False) as s:
        assert s.params.flash_attn
    device = REGISTRY.open("mock:CUDA0")
    supports = type(device).supports_op
    monkeypatch.setattr(
        type(device), "supports_op", lambda self, op: op.op_desc != "FLASH_ATTN_EXT" and supports(self, op)
    )
    with Session.open(llama, devices=[device], context=context, data=False) as s:
        assert not s.params.flash_attn


def test_a_file_without_a_tensor_is_refused(tmp_path, llama):
    """A missing tensor is named."""
    from gguf import GGUFReader, GGUFWriter

    reader, writer = GGUFReader(llama), GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    for field in reader.fields.values():
        if field.name.startswith("llama.") or field.name.startswith("tokenizer.ggml.tok"):
            writer.add_key_value(
                field.name, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None
            )
    for tensor in reader.tensors:
        if tensor.name != "blk.1.attn_k.weight":
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match=r"blk\.1\.attn_k\.weight"):
        Session.open(tmp_path / "m.gguf")


@pytest.mark.parametrize("flash", ["on", "off"])
def test_a_token_alone_has_the_logits_of_a_batch_of_one(llama, flash):
    """What is used again from token to token does not show: after rewinding, for two sequences in turns, and when one shares cells."""
    settings = flags(n_seq_max=2, kv_unified=True, flash_attn=flash, type_v=Type.F16 if flash == "on" else Type.F32)
    with Session.open(llama, context=settings) as s, Session.open(llama, context=settings) as plain:

        def same(token: int, seq: int = 0) -> None:
            want = plain.decode_batch(Batch.of([token], plain.cache.seq_pos_max(seq) + 1, seq=seq))
            np.testing.assert_array_equal(s.decode([token], seq=seq), want)

        for one in (s, plain):
            one.decode(TOKENS[:9])
        for token in TOKENS[9:13]:
            same(token)
        for one in (s, plain):
            one.rewind(7)
        for token, seq in zip(TOKENS[7:15], (0, 0, 1, 1, 0, 1, 1, 0), strict=True):
            same(token, seq)
        for one in (s, plain):
            one.rewind(3, seq=1)
            one.rewind(0, seq=1)
            one.cache.seq_cp(0, 1, 0, 5)
        for token, seq in zip(TOKENS[15:23], (0, 0, 1, 1, 0, 0, 1, 1), strict=True):
            same(token, seq)
        assert s.n_reused > 10
