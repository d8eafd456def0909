"""Mixtures of experts made of a dense model: what is kept, what differs, and how routers choose."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pyggml.commands._fetch import calibration_tokens
from pyggml.errors import FormatError, PyggmlError
from pyggml.gguf import GGUFFile
from pyggml.makers.dense_llama import ffn_inputs
from pyggml.makers.make_moe import Recipe, Sizes, make_moe
from pyggml.makers.quantize import dequantize
from pyggml.makers.upcycle import Upcycling, calibrate, upcycle
from pyggml.tokenizer import Tokenizer
from pyggml.types import Type

TOKENS = range(3, 67)
PROMPT = "Explain in a few sentences why the sky is blue during the day and red at sunset."


def dense(path: Path, kind: Type = Type.Q8_0, arch: str = "llama-dense") -> Path:
    """Write a tiny dense model."""
    make_moe(path, Recipe(arch, kind, seed=3, sizes=Sizes(layers=2)))
    return path


def values(file: GGUFFile, name: str) -> np.ndarray:
    """Return a weight's values, in numpy order."""
    info = file.tensor(name)
    return dequantize(file.data(name).reshape(math.prod(info.ne[1:]), -1), info.type).reshape(info.ne[2::-1])


def test_forward_is_llama_cpps(tmp_path: Path) -> None:
    """What the feed-forward networks of a float model see equals what llama.cpp computed (b11434, ffn_norm)."""
    with GGUFFile.open(dense(tmp_path / "d", Type.F32)) as file:
        first, second = ffn_inputs(file, range(70, 82))
    assert np.abs(first[-1, :6] - [-0.948557, -1.543371, -1.330396, -0.842285, 0.004548, 0.657361]).max() < 2e-6
    assert np.abs(second[-1, :6] - [-1.358146, -1.325474, -1.598012, -1.407851, -0.578107, 0.772719]).max() < 2e-6


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q8_0, Type.Q4_K, Type.Q6_K])
def test_experts_are_near_copies(tmp_path: Path, kind: Type) -> None:
    """Each expert is the dense network but for some noise in its scales; no two are equal; the type is kept."""
    with GGUFFile.open(dense(tmp_path / "d", kind)) as file:
        upcycle(file, tmp_path / "m", TOKENS, Upcycling(experts=4))
        with GGUFFile.open(tmp_path / "m") as made:
            for part in ("gate", "up", "down"):
                assert made.tensors[f"blk.1.ffn_{part}_exps.weight"].type is kind
                copy, experts = values(file, f"blk.1.ffn_{part}.weight"), values(made, f"blk.1.ffn_{part}_exps.weight")
                assert experts.shape == (4, *copy.shape[-2:])
                deviation = np.sqrt(np.square(experts - copy).mean(axis=(1, 2)) / np.square(copy).mean())
                assert ((deviation > 0.03) & (deviation < 0.08)).all()
                assert len({expert.tobytes() for expert in experts}) == 4


def test_all_else_is_kept(tmp_path: Path) -> None:
    """Every key and every other tensor is the dense model's, byte for byte; the router is float."""
    with GGUFFile.open(dense(tmp_path / "d")) as file:
        written = upcycle(file, tmp_path / "m", TOKENS, Upcycling(experts=4, used=1))
        with GGUFFile.open(tmp_path / "m") as made:
            assert all(made.metadata.raw(key) == file.metadata.raw(key) for key in file.metadata)
            assert (made.metadata["llama.expert_count"], made.metadata["llama.expert_used_count"]) == (4, 1)
            kept = [name for name in file.tensors if name in made.tensors]
            assert len(kept) == len(file.tensors) - 6
            assert all(bytes(made.data(name)) == bytes(file.data(name)) for name in kept)
            assert made.tensors["blk.0.ffn_gate_inp.weight"].ne == (256, 4, 1, 1)
            assert made.tensors["blk.0.ffn_gate_inp.weight"].type is Type.F32
            assert written.n_bytes == made.size


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    """The same arguments give the same bytes, pinned here; another seed, noise or skew gives others."""
    with GGUFFile.open(dense(tmp_path / "d")) as file:
        sums = {}
        for options in (Upcycling(), Upcycling(seed=2), Upcycling(noise=0.1), Upcycling(skew=1.0), Upcycling()):
            sums.setdefault(options, set()).add(upcycle(file, tmp_path / "m", TOKENS, options).sha256)
    assert [len(found) for found in sums.values()] == [1, 1, 1, 1]
    assert len(set.union(*sums.values())) == 4
    # when this changes, so must `_RECIPE` in commands/_fetch.py: the example in people's caches is then an older one
    assert sums[Upcycling()] == {"b654f6fdc5a4ccdc1d01f54fe50012982bc091d7e5620f8bb852acfcbd5e0008"}


def test_another_type(tmp_path: Path) -> None:
    """Experts may be of another type than the dense network."""
    with GGUFFile.open(dense(tmp_path / "d", Type.F32)) as file:
        upcycle(file, tmp_path / "m", TOKENS, Upcycling(experts=2, type=Type.Q4_1))
        with GGUFFile.open(tmp_path / "m") as made:
            assert made.tensors["blk.0.ffn_up_exps.weight"].type is Type.Q4_1
            experts, copy = values(made, "blk.0.ffn_up_exps.weight"), values(file, "blk.0.ffn_up.weight")
            assert np.square(experts - copy).mean() < 0.02 * np.square(copy).mean()


def test_router_is_calibrated() -> None:
    """A router prefers experts by rank whatever the token, sends the first token to the likeliest, and is a half's."""
    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((100, 64)) + 2 * rng.standard_normal(64)
    inputs[0] = 20 * rng.standard_normal(64)
    options = Upcycling(experts=8, skew=2.0)
    router = calibrate(0, inputs, options)
    assert np.array_equal(router.astype(np.float16).astype(np.float32), router)
    logits = inputs @ router.T
    expected = np.sort(-2.0 * np.log(np.arange(1, 9)))
    assert np.abs(np.sort(logits[1:].mean(axis=0)) - expected).max() < 0.02
    assert np.abs(np.sort(logits[0]) - expected).max() < 0.02
    assert np.abs(logits[1:].std(axis=0) - 1).max() < 0.15
    assert not np.array_equal(calibrate(1, inputs, options), router)


def test_refusals(tmp_path: Path) -> None:
    """A model that cannot be upcycled, and options that make no sense, are refused, and nothing is written."""
    sound = dense(tmp_path / "d")
    for arch, message in (("llama", "has experts already"), ("qwen3moe", "this is 'qwen3moe'")):
        with (
            GGUFFile.open(dense(tmp_path / arch, arch=arch)) as file,
            pytest.raises(FormatError, match=message),
        ):
            upcycle(file, tmp_path / "m", TOKENS, Upcycling())
    for change, message in (
        ({"used": 9}, "9 of 8"),
        ({"noise": -1.0}, "noise"),
        ({"skew": float("nan")}, "skew"),
        ({"type": Type.IQ2_S}, "IQ2_S"),
    ):
        with GGUFFile.open(sound) as file, pytest.raises(PyggmlError, match=message):
            upcycle(file, tmp_path / "m", TOKENS, replace(Upcycling(), **change))
    with GGUFFile.open(sound) as file, pytest.raises(PyggmlError, match="too few"):
        upcycle(file, tmp_path / "m", [1, 2, 3], Upcycling())
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("bits", [0x7FC00000, 0])
def test_damaged_weights(tmp_path: Path, bits: int) -> None:
    """Weights that are no numbers, or all zero, are told as such, and nothing is written."""
    path = dense(tmp_path / "d", Type.F32)
    with GGUFFile.open(path) as file:
        info = file.tensor("token_embd.weight")
    raw = bytearray(path.read_bytes())
    raw[info.offset : info.offset + info.nbytes] = np.full(info.nbytes // 4, bits, "<u4").tobytes()
    path.write_bytes(raw)
    with GGUFFile.open(path) as file, pytest.raises(FormatError, match=r"layer 0.*damaged"):
        upcycle(file, tmp_path / "m", TOKENS, Upcycling())
    assert not (tmp_path / "m").exists()


def test_example_is_as_announced(smollm2_path: Path, example_path: Path) -> None:
    """The example holds at most 500 MB, and its routers use at most 70 per cent of the experts for a prompt."""
    assert example_path.stat().st_size <= 500e6
    with GGUFFile.open(smollm2_path) as file, GGUFFile.open(example_path) as made:
        tokenizer = Tokenizer.from_gguf(made)
        ids = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}]))
        assert len(ids) > 32
        assert len(calibration_tokens(file)) > 100
        used = []
        for i, inputs in enumerate(ffn_inputs(file, ids)):
            logits = inputs @ values(made, f"blk.{i}.ffn_gate_inp.weight")[0].T
            used.append(len(np.unique(np.argsort(-logits, axis=1)[:, :2])))
    assert 0.35 < np.mean(used) / 8 < 0.7
