"""Models in several files: opened by the first, as llama.cpp opens them; what is missing or mixed up is named."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType, GGUFWriter

from pyggml.errors import FormatError
from pyggml.gguf import GGUFFile

SHAPES = {f"blk.{i}.weight": (i + 1, 32) for i in range(7)}


def arrays() -> dict[str, np.ndarray]:
    """Return the tensors of the model in parts."""
    rng = np.random.default_rng(5)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def write(writer: GGUFWriter) -> None:
    """Fill and write a model."""
    writer.add_uint32("llama.block_count", 7)
    for name, array in arrays().items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """The first of four parts, beside the others."""
    write(GGUFWriter(str(tmp_path / "big.gguf"), "llama", split_max_tensors=2))
    return tmp_path / "big-00001-of-00004.gguf"


def part(first: Path, number: int) -> Path:
    """Return the path of another part."""
    return first.with_name(f"big-{number:05d}-of-00004.gguf")


def refused(path: Path) -> FormatError:
    """Open what must be refused, and return the error."""
    with pytest.raises(FormatError) as caught:
        GGUFFile.open(path)
    return caught.value


def test_parts_are_one_model(first: Path) -> None:
    """Tensors of all parts are there, in order, with their data; keys are those of the first."""
    with GGUFFile.open(first) as file:
        assert list(file.tensors) == list(SHAPES)
        assert file.paths == tuple(str(part(first, i)) for i in (1, 2, 3, 4))
        assert file.size == sum(Path(p).stat().st_size for p in file.paths)
        assert file.metadata["llama.block_count"] == 7
        assert "3 more: 7 tensors" in repr(file)
        for i, (name, array) in enumerate(arrays().items()):
            assert file.tensors[name].part == i // 2
            np.testing.assert_array_equal(file.data(name).view(np.float32), array.ravel())
            assert file.address(name) == file.data(name).ctypes.data


def test_a_model_in_one_part_has_no_others(tmp_path: Path) -> None:
    """A file that says that it is the only part is opened whatever its name."""
    writer = GGUFWriter(str(tmp_path / "small.gguf"), "llama")
    writer.add_key_value("split.count", 1, GGUFValueType.UINT16)
    write(writer)
    with GGUFFile.open(tmp_path / "small.gguf") as file:
        assert file.paths == (str(tmp_path / "small.gguf"),)


def test_a_first_part_may_have_no_tensors(tmp_path: Path) -> None:
    """Where the first part holds keys alone, as llama.cpp's tools can leave it, the tensors of the others are there."""
    whole = GGUFWriter(str(tmp_path / "keys.gguf"), "llama", split_max_tensors=3, small_first_shard=True)
    write(whole)
    with GGUFFile.open(tmp_path / "keys-00001-of-00004.gguf") as file:
        assert [file.tensors[name].part for name in SHAPES] == [1, 1, 1, 2, 2, 2, 3]
        assert file.metadata["llama.block_count"] == 7
        for name, array in arrays().items():
            np.testing.assert_array_equal(file.data(name).view(np.float32), array.ravel())


@pytest.mark.parametrize("name", ["joined.gguf", "joined-00001-of-00004.gguf"])
def test_parts_that_were_joined_by_hand_are_refused(first: Path, name: str) -> None:
    """Four parts one after the other are no model; the error says that it has 4 parts, and what to do."""
    joined = first.with_name(name)
    joined.write_bytes(b"".join(part(first, i).read_bytes() for i in (1, 2, 3, 4)))
    error = refused(joined)
    assert error.path == str(joined)
    assert ("-00001-of-00004.gguf" if name == "joined.gguf" else "joined-00002-of-00004.gguf is missing") in str(error)


def test_another_part_names_the_first(first: Path) -> None:
    """Opening the third part is refused with the name of the first."""
    error = refused(part(first, 3))
    assert "file 3 of 4 of a split model" in str(error)
    assert str(first) in str(error)


def test_a_missing_part_is_named(first: Path) -> None:
    """A part that is not there is named; so is the file that wants it."""
    part(first, 2).unlink()
    error = refused(first)
    assert str(part(first, 2)) in str(error)
    assert error.path == str(first)


def test_a_renamed_first_part_is_refused(first: Path) -> None:
    """The other parts are found by the first one's name, so it must have it."""
    error = refused(first.rename(first.with_name("model.gguf")))
    assert "NAME-00001-of-00004.gguf" in str(error)


def _swapped(first: Path) -> None:
    two, three = part(first, 2), part(first, 3)
    content = two.read_bytes()
    two.write_bytes(three.read_bytes())
    three.write_bytes(content)


def _doubled(first: Path) -> None:
    raw = part(first, 2).read_bytes()
    part(first, 2).write_bytes(raw.replace(b"blk.2.weight", b"blk.1.weight"))


def _cut(first: Path) -> None:
    part(first, 4).write_bytes(part(first, 4).read_bytes()[:-40])


def _other_count(first: Path) -> None:
    raw = first.read_bytes()
    key = b"split.tensors.count"
    at = raw.index(key) + len(key) + 4
    first.write_bytes(raw[:at] + struct.pack("<i", 9) + raw[at + 4 :])


def _unnumbered(first: Path) -> None:
    part(first, 3).write_bytes(part(first, 3).read_bytes().replace(b"split.no", b"split.xx"))


MIXED: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "swapped": (_swapped, 2, "says that it is part 3, not 2"),
    "doubled": (_doubled, 2, "tensor 'blk.1.weight' is also in"),
    "cut": (_cut, 4, "past the end of the file"),
    "other count": (_other_count, 1, "its files contain 7 tensors instead of 9"),
    "unnumbered": (_unnumbered, 3, "no key 'split.no'"),
}


@pytest.mark.parametrize("mistake", MIXED)
def test_parts_that_do_not_fit_are_refused(first: Path, mistake: str) -> None:
    """Parts in wrong order, with one tensor twice, cut short or of another model are refused, and the part is named."""
    spoil, number, message = MIXED[mistake]
    spoil(first)
    error = refused(first)
    assert message in str(error)
    assert error.path == str(part(first, number))
