"""Random models: the bytes are pinned, the parts fit, and a failed write leaves nothing behind."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from pyggml.errors import PyggmlError
from pyggml.files import aside
from pyggml.gguf import GGUFFile
from pyggml.makers.gguf_writer import GGUFWriter
from pyggml.makers.make_moe import PRESETS, Recipe, Sizes, make_moe
from pyggml.makers.quantize import QUANTIZABLE, dequantize, quantize
from pyggml.makers.random_model import ARCHS, noise
from pyggml.types import Type

SIXTEEN = Sizes(layers=3, experts=16, used=4)
#: Sums of files that logits and split logs of llama.cpp were recorded with.
RECORDED = {
    ("llama", Type.F32): "0c4528df8ba41e0e0d7297f0707c12b1975636941c1802a718c0cc48ea5e68ce",
    ("qwen3moe", Type.F32): "330df5d0d3f9aacfce7cf58f6780ce0b72bd21e9bbe22676f15f00e09edcf97c",
    ("gpt-oss", Type.MXFP4): "bda3cc9d3f387e0005b075b8a9d33a295f3a97d266213b4fbca8c97860e1ea1a",
    ("glm4moe", Type.F32): "b7efb1412a8ee333a98ba454dc167e023a6b39157ae3c8981b53304072e7495a",
    ("deepseek2", Type.F32): "f001f39f50f4c1511c41bdd83c25e842f54500ad8967ba7866f547fee6e92af6",
    ("granitemoe", Type.F32): "a11260531bddf5c6ba2f73e743a17c339781d2f8f7beb59cadfd2ce7eb438240",
    ("glm4moe", Type.Q4_K): "ebb0b75e4c124076c5994a82ffb7e496512925e864c4dd1b143a729f4c807e14",
    ("qwen3moe", Type.Q8_0): "29deddd48a3f1717ffa80fefeb5b6cbd022c0dcd8cf3e33cf47f7a5a418ee556",
}


@pytest.mark.parametrize(("arch", "kind"), RECORDED, ids=lambda value: getattr(value, "ggml_name", value))
def test_recorded_bytes(tmp_path: Path, arch: str, kind: Type) -> None:
    """A recipe gives the very bytes that the recorded logits and split logs belong to."""
    written = make_moe(tmp_path / "m.gguf", Recipe(arch, kind, seed=7, sizes=SIXTEEN))
    assert written.sha256 == RECORDED[arch, kind]
    assert hashlib.sha256((tmp_path / "m.gguf").read_bytes()).hexdigest() == written.sha256


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_is_sound(tmp_path: Path, arch: str) -> None:
    """Each architecture gives a file that opens, names itself, and holds experts as announced."""
    make_moe(tmp_path / "m.gguf", Recipe(arch, Type.Q8_0, sizes=Sizes(layers=2)))
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        name = file.require("general.architecture", str)
        assert name == arch.removesuffix("-dense")
        assert file.require(f"{name}.block_count", int) == 2
        if not arch.endswith("-dense"):
            assert file.tensors["blk.1.ffn_up_exps.weight"].ne == (256, 256, 8, 1)
            assert file.tensors["blk.1.ffn_up_exps.weight"].type is Type.Q8_0


@pytest.mark.parametrize("kind", QUANTIZABLE)
def test_quantize_comes_back(kind: Type) -> None:
    """What is quantised to a type reads back, by gguf's reader, near to what it was; zeros come back exactly."""
    values = noise(5, "rows", 4 * 512)(4 * 512).reshape(2, 2, 512)
    values[1, 1] = 0
    packed = quantize(values, kind)
    assert packed.shape == (2, 2, kind.row_size(512))
    assert packed.dtype == np.uint8
    back = quants.dequantize(packed, GGMLQuantizationType(int(kind)))
    assert np.array_equal(back.reshape(values.shape), dequantize(packed, kind))
    assert not back[1, 1].any()
    error = float(np.square(back - values).mean() / np.square(values).mean())
    coarse = {Type.MXFP4: 3e-2, Type.Q3_K: 4e-2, Type.Q2_K: 0.12, Type.TQ1_0: 0.8, Type.TQ2_0: 0.8}
    assert error < ({Type.F32: 1e-12, Type.F16: 1e-6, Type.Q8_0: 1e-4} | coarse).get(kind, 1.2e-2)


def test_noise_is_one_stream() -> None:
    """Values do not depend on how many are asked for at a time; they are near normal, and streams differ."""
    whole = noise(3, "a", 10_000)(10_000)
    take = noise(3, "a", 10_000)
    assert np.array_equal(np.concatenate([take(1), take(4_999), take(5_000)]), whole)
    assert abs(float(whole.mean())) < 0.03
    assert abs(float(whole.std()) - 1) < 0.03
    assert not np.array_equal(whole, noise(3, "b", 10_000)(10_000))
    assert not np.array_equal(whole, noise(4, "a", 10_000)(10_000))


def test_skew_prefers_experts(tmp_path: Path) -> None:
    """The fine-grained preset's routers prefer some experts for every token; without skew they prefer none."""
    recipe = PRESETS["fine-grained"]
    spread = {}
    for skew in (0.0, recipe.skew):
        make_moe(tmp_path / "m.gguf", replace(recipe, skew=skew, sizes=replace(recipe.sizes, layers=1, ff_exp=32)))
        with GGUFFile.open(tmp_path / "m.gguf") as file:
            router = dequantize(file.data("blk.0.ffn_gate_inp.weight").reshape(32, -1), Type.Q8_0)
            tokens = dequantize(file.data("token_embd.weight").reshape(320, -1), Type.Q8_0)
        tokens /= np.sqrt(np.square(tokens).mean(axis=1, keepdims=True))
        chosen = np.argsort(-(tokens @ router.T), axis=1)[:64, :4]
        spread[skew] = len(np.unique(chosen))
    assert spread[0.0] == 32
    assert spread[recipe.skew] <= 24


def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    """Progress is told in bytes, never goes back, and ends at all of them."""
    seen: list[tuple[int, int]] = []
    written = make_moe(tmp_path / "m", Recipe("llama"), progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (written.n_bytes, written.n_bytes) == ((tmp_path / "m").stat().st_size,) * 2


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe("lama"), "no architecture is called 'lama'"),
        (Recipe("llama", Type.IQ2_XS), "type IQ2_XS cannot be made"),
        (Recipe("llama", tokenizer="words"), "no tokenizer is called"),
        (Recipe("llama", sizes=Sizes(used=9)), "9 of 8 experts"),
        (Recipe("llama", sizes=Sizes(layers=0)), "layers is 0"),
        (Recipe("llama", sizes=Sizes(heads=3)), "3 heads cannot share 2"),
        (Recipe("llama", sizes=Sizes(head_dim=7)), "in pairs"),
        (Recipe("llama", skew=-1.0), "skew"),
    ],
)
def test_senseless_recipes(tmp_path: Path, recipe: Recipe, message: str) -> None:
    """A recipe that makes no sense is refused before a file is begun."""
    with pytest.raises(PyggmlError, match=message):
        make_moe(tmp_path / "m", recipe)
    assert not list(tmp_path.iterdir())


def test_rows_that_blocks_do_not_divide(tmp_path: Path) -> None:
    """Rows that a type's blocks do not divide fall back to Q8_0, or to F16."""
    make_moe(tmp_path / "m", Recipe("llama", Type.Q4_K, sizes=Sizes(layers=1, embd=320, ff_exp=40)))
    with GGUFFile.open(tmp_path / "m") as file:
        assert file.tensors["blk.0.attn_output.weight"].type is Type.Q4_K
        assert file.tensors["blk.0.ffn_up_exps.weight"].type is Type.Q8_0
        assert file.tensors["blk.0.ffn_down_exps.weight"].type is Type.F16


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    """A write that fails keeps the older file, leaves no other, and says why in one line."""
    target = tmp_path / "m.gguf"
    target.write_bytes(b"before")

    def interrupted(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_moe(target, Recipe("llama"), progress=interrupted)
    for code, word in ((errno.ENOSPC, "free some room"), (errno.EACCES, "may write to")):
        with pytest.raises(PyggmlError, match=word) as caught:
            _fail_halfway(target, code)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert target.read_bytes() == b"before"


def _fail_halfway(target: Path, code: int) -> None:
    with aside(target) as part:
        part.write_bytes(b"half")
        raise OSError(code, os.strerror(code))


def test_unwritable_places(tmp_path: Path) -> None:
    """A missing folder, a file in its place, a folder as target and a disk too small are told apart."""
    (tmp_path / "file").touch()
    for path, n_bytes, word in (
        (tmp_path / "absent" / "m", 1, "make the folder first"),
        (tmp_path / "file" / "m", 1, "make the folder first"),
        (tmp_path, 1, "name a file in it"),
        (tmp_path / "m", 10**18, "MB are free"),
    ):
        with pytest.raises(PyggmlError, match=word), aside(path, n_bytes):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_abandoned_parts_are_removed(tmp_path: Path) -> None:
    """What a killed writer left is removed by the next writer of that path, unless it may still be at work."""
    old, young, other = (tmp_path / name for name in (".m.0.part", ".m.1.part", ".n.0.part"))
    for path in (old, young, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (time.time() - 3600,) * 2)
    with aside(tmp_path / "m") as part:
        part.write_bytes(b"x")
    assert {path.name for path in tmp_path.iterdir()} == {"m", young.name, other.name}


def test_writer_keeps_raw_values(tmp_path: Path) -> None:
    """Values copied raw from one file into another read the same."""
    make_moe(tmp_path / "a", Recipe("llama", sizes=Sizes(layers=1)))
    with GGUFFile.open(tmp_path / "a") as first:
        writer = GGUFWriter()
        for key in first.metadata:
            entry = first.metadata.entry(key)
            writer.add_raw(key, entry.type, entry.length, first.metadata.raw(key))
        writer.write(tmp_path / "b")
        with GGUFFile.open(tmp_path / "b") as second:
            assert list(second.metadata) == list(first.metadata)
            assert all(first.metadata.raw(key) == second.metadata.raw(key) for key in first.metadata)
