"""A model in several files computes and plans as the same model in one."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from pyggml.models.placement import PlacementFlags
from pyggml.session import ContextFlags, Session
from pyggml.types import Type

TOKENS = [(i * 53 + 32) % 259 for i in range(24)]


def split(path: Path, folder: Path, n_tensors: int) -> Path:
    """Write a model again in parts of some tensors, and return the first part."""
    reader = GGUFReader(path)
    writer = GGUFWriter(
        str(folder / "parts.gguf"), reader.get_field("general.architecture").contents(), split_max_tensors=n_tensors
    )
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    for t in reader.tensors:
        is_plain = t.tensor_type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
        writer.add_tensor(t.name, t.data, raw_dtype=None if is_plain else t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(folder.glob("parts-00001-of-*.gguf"))


def session(path: Path, **options) -> Session:
    """Return a session with a small context and an F32 cache."""
    context = ContextFlags(n_ctx=256, type_k=Type.F32, type_v=Type.F32, flash_attn="off")
    return Session.open(path, context=context, **options)


@pytest.fixture
def parts(recorded_models, tmp_path) -> tuple[Path, Path]:
    """Give the recorded qwen3moe in one file and in several."""
    whole = recorded_models["qwen3moe"]
    first = split(whole, tmp_path, 9)
    assert len(list(tmp_path.iterdir())) > 2
    return whole, first


@pytest.mark.parametrize("device", [None, "sim:rtx4090-pcie4"])
def test_parts_compute_what_the_whole_computes(parts, device):
    """Logits are equal bit for bit, on the CPU with weights used in place and over a device that copies experts."""
    found = []
    for path in parts:
        flags = PlacementFlags(cpu_moe=True)
        with session(path, placement=flags, devices=[device] if device else []) as s:
            found.append(s.decode(TOKENS, outputs="all"))
            assert s.loaded.mapped_bytes > 0
    np.testing.assert_array_equal(*found)


def test_each_part_has_a_buffer_of_its_own(parts):
    """Weights used in place lie in one buffer for each part, as upstream has it, and what a plan says they take they take."""
    with session(parts[1], devices=[]) as s:
        assert len(s.loaded.buffers) == len(s.file.paths)
        assert sum(b.size for b in s.loaded.buffers) == sum(s.placement.weight_bytes().values())


def test_parts_are_those_that_llama_cpp_loads(parts, tmp_path):
    """Real llama.cpp loads the same parts and gives the same logits."""
    expected = llama_cpp.logits(parts[1], TOKENS, tmp_path, batch=24)
    with session(parts[1]) as s:
        found = s.decode(TOKENS, outputs="all")
    assert np.abs(found - expected).max() < 1e-3
