"""The book of cells: places, masks, sequences, and an end."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from pyggml.models.batch import Batch, split_equal, split_simple
from pyggml.models.caches import make_cache
from pyggml.models.context import ContextFlags, ContextParams
from pyggml.models.kv_cache import CacheFullError, KVCache, hadamard
from pyggml.models.kv_cache_iswa import SlidingKVCache
from pyggml.models.kv_cells import Cells


def cache(n_ctx: int = 512, **flags: object) -> KVCache:
    """Return the cache of a tiny model."""
    hp = tiny.hparams("llama")
    params = ContextParams.resolve(ContextFlags(n_ctx=n_ctx, flash_attn="off", **flags), hp)
    return KVCache(hp, params, v_trans=True)


def sliding(window: int = 16, n_ubatch: int = 64, **flags: object) -> SlidingKVCache:
    """Return the cache of a tiny model with a window in every other layer."""
    hp = tiny.hparams("gpt-oss", n_swa=window)
    params = ContextParams.resolve(ContextFlags(n_ctx=1024, flash_attn="off", n_ubatch=n_ubatch, **flags), hp)
    cache = make_cache(hp, params, v_trans=True)
    assert isinstance(cache, SlidingKVCache)
    return cache


def take(c: KVCache, batch: Batch, n_ubatch: int = 512) -> list:
    """Take cells for a batch; return micro-batches and slots."""
    parts = c.prepare(batch, n_ubatch)
    for part, slot in parts:
        c.apply(part, slot)
    return parts


def test_tokens_take_cells_in_order():
    """A first batch takes the first cells, the next goes on behind."""
    c = cache()
    ((_, slot),) = take(c, Batch.of(range(5), 0))
    assert slot.cells.tolist() == [[0, 1, 2, 3, 4]]
    ((_, slot),) = take(c, Batch.of(range(2), 5))
    assert slot.cells.tolist() == [[5, 6]]
    assert c.seq_pos_max(0) == 6


def test_graphs_see_cells_in_steps_of_256():
    """n_kv is the used cells rounded up to 256, at most all."""
    c = cache(512)
    ((_, slot),) = take(c, Batch.of([0] * 256, 0))
    assert c.view(slot).n_kv == 256
    ((_, slot),) = take(c, Batch.of([0], 256))
    assert c.view(slot).n_kv == 512


def test_preparing_takes_nothing():
    """A batch that does not fit leaves the book as it was."""
    c = cache(256)
    take(c, Batch.of([0] * 250, 0))
    with pytest.raises(CacheFullError) as caught:
        c.prepare(Batch.of([0] * 20, 250), 8)
    assert caught.value.n_cells == 256
    assert c.n_used == 250


def test_removed_cells_are_used_again():
    """After a rewind the next tokens take the freed cells."""
    c = cache()
    take(c, Batch.of(range(10), 0))
    c.seq_rm(0, 4)
    assert c.n_used == 4
    ((_, slot),) = take(c, Batch.of(range(3), 4))
    assert slot.cells.tolist() == [[4, 5, 6]]


def test_a_token_sees_its_past_and_itself():
    """The mask hides later positions and empty cells."""
    c = cache()
    take(c, Batch.of(range(3), 0))
    ((part, _),) = take(c, Batch.of(range(2), 3))
    unseen = c.mask(part, 8)
    assert unseen.tolist() == [[False] * 4 + [True] * 4, [False] * 5 + [True] * 3]


def test_sequences_do_not_see_each_other():
    """In one stream, cells of another sequence are hidden."""
    c = cache(n_seq_max=2, kv_unified=True)
    take(c, Batch.of(range(2), 0, seq=0))
    ((part, _),) = take(c, Batch.of(range(2), 0, seq=1))
    assert c.mask(part, 4).tolist() == [[True, True, False, True], [True, True, False, False]]


def test_a_copied_sequence_shares_cells():
    """seq_cp lets another sequence see tokens without more cells."""
    c = cache(n_seq_max=2, kv_unified=True)
    take(c, Batch.of(range(2), 0, seq=0))
    c.seq_cp(0, 1)
    ((part, _),) = take(c, Batch.of([7], 2, seq=1))
    assert c.n_used == 3
    assert c.mask(part, 4).tolist() == [[False, False, False, True]]
    c.seq_rm(0)
    assert c.n_used == 3


def test_streams_have_their_own_cells():
    """Without a unified cache each sequence has a stream, and indices count through all of them."""
    c = cache(n_ctx=512, n_seq_max=2)
    batch = Batch(
        np.arange(4, dtype=np.int32),
        np.array([0, 1, 0, 1], np.int32),
        np.array([0, 0, 1, 1], np.int32),
        np.ones(4, bool),
    )
    ((part, slot),) = take(c, batch)
    assert slot.streams == (0, 1)
    assert c.k_idxs(slot).tolist() == [0, 1, 256, 257]
    view = c.view(slot)
    assert (view.s0, view.n_stream) == (0, 2)
    assert c.mask(part, 3).tolist() == [[False, True, True], [False, False, True]] * 2


def test_v_indices_are_one_for_each_element():
    """Where V lies transposed each element of a token is a row: element j of cell c is row j * n_cells + c."""
    c = cache()
    ((_, slot),) = take(c, Batch.of([0, 0], 0))
    idxs = c.v_idxs(slot).reshape(2, -1)
    assert idxs.shape == (2, 128)
    assert idxs[1, :3].tolist() == [1, 513, 1025]


def test_simple_splits_are_runs():
    """40 tokens at 16 are 16, 16 and 8; only the last holds the output."""
    parts = split_simple(Batch.of(range(40), 0), 16)
    assert [(p.n_tokens, p.n_outputs) for p in parts] == [(16, 0), (16, 0), (8, 1)]


def test_equal_splits_hold_as_many_of_each_sequence():
    """Sequences of 3 and 1 tokens go as one of each, then what is left."""
    seqs = np.array([0, 0, 0, 1], np.int32)
    batch = Batch(np.arange(4, dtype=np.int32), np.array([0, 1, 2, 0], np.int32), seqs, np.ones(4, bool))
    parts = split_equal(batch, 8)
    assert [p.idxs.tolist() for p in parts] == [[0, 3], [1, 2]]
    assert [p.n_seqs for p in parts] == [2, 1]


@pytest.mark.parametrize("n", [64, 128])
def test_the_rotation_is_its_own_inverse(n):
    """The Hadamard matrix is orthonormal and symmetric."""
    h = hadamard(n)
    assert h.shape == (n, n)
    np.testing.assert_allclose(h @ h, np.eye(n), atol=1e-5)


@pytest.mark.parametrize(
    ("window", "n_ubatch", "flags", "n_cells"),
    [
        (16, 64, {}, 256),
        (200, 64, {}, 512),
        (900, 512, {}, 1024),
        (16, 64, {"swa_full": True}, 1024),
        (128, 64, {"n_seq_max": 4, "kv_unified": True}, 768),
        (128, 64, {"n_seq_max": 4}, 256),
    ],
)
def test_the_window_cache_holds_the_window_and_a_micro_batch(window, n_ubatch, flags, n_cells):
    """Its cells are window and micro-batch rounded up to 256, at most the context; for each sequence if it is unified."""
    c = sliding(window, n_ubatch, **flags)
    assert c.swa.n_cells == n_cells
    assert (sorted(c.k), sorted(c.swa.k)) == ([1], [0, 2])
    assert [(layer, t.ne[1]) for layer, t in c.tensors()] == [(1, c.n_cells)] * 2 + [(0, n_cells)] * 2 + [
        (2, n_cells)
    ] * 2


def test_a_token_sees_its_window():
    """In layers with a window a token sees itself and those before it as far as the window reaches; others see all."""
    c = sliding(window=3)
    take(c, Batch.of(range(4), 0))
    ((part, _),) = take(c, Batch.of(range(2), 4))
    assert np.flatnonzero(~c.swa.mask(part, 8)[0]).tolist() == [2, 3, 4]
    assert np.flatnonzero(~c.swa.mask(part, 8)[1]).tolist() == [3, 4, 5]
    assert np.flatnonzero(~c.mask(part, 8)[1]).tolist() == [0, 1, 2, 3, 4, 5]


def test_cells_out_of_the_window_are_used_again():
    """The window's cache takes any number of tokens; what the last 16 see is always there, without holes."""
    c = sliding(window=16)
    for start in range(0, 960, 48):
        ((part, slot),) = take(c, Batch.of([0] * 48, start))
        assert slot.swa is not None
        assert c.view(slot).n_kv == min(1024, -(-(start + 48) // 256) * 256)
        assert c.view(slot).of_layer(0).n_kv == 256
        assert c.view(slot).of_layer(1).n_kv == c.view(slot).n_kv
        unseen = c.swa.mask(part, 256)
        seen = np.sort(c.swa.streams[0].pos[~unseen[0]])
        assert seen.tolist() == list(range(max(0, start - 15), start + 1))
        held = np.sort(c.swa.streams[0].pos[c.swa.streams[0].pos >= 0])
        assert held.tolist() == list(range(held[0], start + 48))
    assert c.n_used == 960


def test_a_window_limits_how_far_back_a_sequence_can_go():
    """Until cells are written again it can go back to any token; then only to where the window is still held whole."""
    c = sliding(window=16)
    take(c, Batch.of([0] * 64, 0))
    assert c.reaches_back_to(0) == 0
    for start in range(64, 512, 64):
        take(c, Batch.of([0] * 64, start))
    first = c.swa.seq_pos_min(0)
    assert first > 0
    assert c.reaches_back_to(0) == first + 15
    c.seq_rm(0, 400)
    assert (c.seq_pos_max(0), c.swa.seq_pos_max(0)) == (399, 399)
    c.clear()
    assert (c.reaches_back_to(0), c.n_used, c.swa.n_used) == (0, 0, 0)


def test_a_sequence_keeps_what_it_would_see():
    """Where one of two sequences that shared cells goes on, the other keeps the window before its own next token."""
    c = sliding(window=16, n_seq_max=2, kv_unified=True)
    take(c, Batch.of([0] * 20, 0))
    c.seq_cp(0, 1)
    for start in range(20, 20 + 8 * 60, 60):
        take(c, Batch.of([0] * 60, start))
    cells = c.swa.streams[0]
    assert np.sort(cells.pos[(cells.seqs & np.uint64(2)) != 0]).tolist() == list(range(5, 20))


def test_preparing_takes_nothing_in_either_cache():
    """A batch of many micro-batches is planned through to its end, and leaves both books as they were."""
    c = sliding(window=16)
    parts = c.prepare(Batch.of([0] * 600, 0), 64)
    assert len(parts) == 10
    assert (c.n_used, c.swa.n_used) == (0, 0)
    with pytest.raises(CacheFullError):
        c.prepare(Batch.of([0] * 1100, 0), 64)
    assert (c.n_used, c.swa.n_used) == (0, 0)


def test_counts_of_cells_are_those_of_a_count():
    """Whatever tokens are put into cells, shared and removed, cells used, their end and the last position are what a look at all cells finds."""
    rng = np.random.default_rng(5)
    cells = Cells(64)
    for _ in range(400):
        what = rng.integers(6)
        if what < 4:
            n = int(rng.integers(1, 4)) if what == 3 else 1
            first = int(rng.integers(0, 61)) if what == 2 else min(cells.used_end, 60)
            chosen = np.arange(first, first + n)
            seqs = np.full(n, rng.integers(3), np.int32)
            cells.take(chosen, rng.integers(0, 99, n).astype(np.int32), seqs)
        elif what == 4:
            cells.remove(cells.of(1) & (rng.random(len(cells.pos)) < 0.6), 1)
        else:
            cells.share(cells.of(0), 2)
        if rng.random() < 0.7:
            used = np.flatnonzero(cells.pos >= 0)
            assert cells.n_used == len(used)
            assert cells.used_end == (used[-1] + 1 if len(used) else 0)
            for seq in range(3):
                own = cells.pos[(cells.seqs >> np.uint64(seq)) & np.uint64(1) == 1]
                assert cells.last(seq) == (own.max() if len(own) else -1)
