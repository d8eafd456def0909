"""The file reader: every value and tensor as gguf's own reader gives them, and every damage one clear error."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from pyggml.errors import FormatError
from pyggml.gguf import GGUFFile, ValueType
from pyggml.types import Type

Kv = tuple[str, int, bytes]


def text(value: str | bytes) -> bytes:
    """Make a string as it stands in a file."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def info(name: str, ne: tuple[int, ...], kind: int, offset: int) -> bytes:
    """Make a tensor's record; the offset counts from the data."""
    return text(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, offset)


def build(
    path: Path, *, keys: list[Kv] | None = None, infos: list[bytes] | None = None, data: int = 256, version: int = 3
) -> Path:
    """Write a file from its parts, sound or not."""
    keys = [("general.architecture", 8, text("llama"))] if keys is None else keys
    infos = [info("a", (32,), 0, 0), info("b", (32, 1), 8, 128)] if infos is None else infos
    head = b"GGUF" + struct.pack("<IQQ", version, len(infos), len(keys))
    head += b"".join(text(name) + struct.pack("<I", kind) + value for name, kind, value in keys) + b"".join(infos)
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(range(256)) * (data // 256 + 1))
    return path


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    """A file with a value of each type, an array of each type, and tensors of several types."""
    path = tmp_path / "rich.gguf"
    writer = GGUFWriter(str(path), "llama")
    for kind in GGUFValueType:
        if kind is GGUFValueType.ARRAY:
            continue
        value = {"STRING": "grüß", "BOOL": True, "FLOAT32": 0.5, "FLOAT64": -2.25}.get(kind.name, 7)
        writer.add_key_value(f"one.{kind.name}", value, kind)
        writer.add_key_value(f"many.{kind.name}", [value] * 3, GGUFValueType.ARRAY, sub_type=kind)
    writer.add_array("names", ["", "a", "ĠĠ", "🙂"])
    rng = np.random.default_rng(1)
    writer.add_tensor("plain", rng.standard_normal((3, 32), np.float32))
    writer.add_tensor("half", rng.standard_normal((2, 3, 4)).astype(np.float16))
    writer.add_tensor("wide", np.arange(5, dtype=np.int64))
    writer.add_tensor("blocks", np.arange(2 * 34, dtype=np.uint8).reshape(2, 34), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_all(path: Path) -> None:
    """Open a file and touch everything in it."""
    with GGUFFile.open(path) as file:
        for key in file.metadata:
            file.metadata[key]
        for name in file.tensors:
            bytes(file.data(name))
            file.address(name)


def refused(path: Path) -> FormatError:
    """Return the error that reading a file gives; it names the file and says what to try."""
    with pytest.raises(FormatError) as caught:
        read_all(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint
    return caught.value


def test_same_as_gguf_reader(rich: Path) -> None:
    """Keys, values, tensor names, types, shapes, offsets and bytes equal those of `gguf.GGUFReader`."""
    theirs = GGUFReader(str(rich))
    with GGUFFile.open(rich) as ours:
        fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
        assert list(ours.metadata) == list(fields)
        for name, field in fields.items():
            value = ours.metadata[name]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()
        assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            found = ours.tensors[tensor.name]
            assert (found.type, found.nbytes, found.offset) == (tensor.tensor_type, tensor.n_bytes, tensor.data_offset)
            assert found.ne == tuple(tensor.shape.tolist()) + (1,) * (4 - len(tensor.shape))
            assert bytes(ours.data(tensor.name)) == tensor.data.tobytes()
        assert ours.data_offset == theirs.data_offset


def test_values_have_python_types(rich: Path) -> None:
    """Single values are int, float, bool and str; arrays are read-only numpy arrays and lists of str."""
    with GGUFFile.open(rich) as file:
        kinds = {"STRING": str, "BOOL": bool, "FLOAT32": float, "FLOAT64": float}
        for kind in ValueType:
            if kind is ValueType.ARRAY:
                continue
            assert type(file.metadata[f"one.{kind.name}"]) is kinds.get(kind.name, int)
            many = file.metadata[f"many.{kind.name}"]
            assert isinstance(many, list if kind is ValueType.STRING else np.ndarray)
        assert file.metadata["many.BOOL"].dtype == bool
        assert not file.metadata["many.INT32"].flags.writeable
        assert file.metadata.entry("names").length == 4
        assert "nothing" not in file.metadata
        with pytest.raises(KeyError):
            file.metadata["nothing"]


def test_data_lies_in_the_map(rich: Path) -> None:
    """A tensor's bytes are seen in place, read-only, at the address that is told, and outlive the file object."""
    file = GGUFFile.open(rich)
    data = file.data("blocks")
    assert data.ctypes.data == file.address("blocks")
    assert not data.flags.writeable
    assert file.address("plain") % 32 == 0
    file.close()
    file.close()
    assert file.closed
    assert bytes(data) == bytes(range(68))
    with pytest.raises(ValueError, match="closed"):
        file.data("blocks")


def test_require_checks_kind(rich: Path) -> None:
    """`require` gives a value of the asked kind, a default for a missing key, and an error that names the key."""
    with GGUFFile.open(rich) as file:
        assert file.require("one.UINT32", int) == 7
        assert file.require("one.UINT32", float) == 7.0
        assert file.require("absent", int, 3) == 3
        assert file.require("absent", str, None) is None
        with pytest.raises(FormatError, match="no key 'absent'"):
            file.require("absent", int)
        for key, kind in (("one.STRING", int), ("one.BOOL", int), ("many.INT32", int), ("one.FLOAT32", str)):
            with pytest.raises(FormatError, match=f"'{key}' is a"):
                file.require(key, kind)


def test_missing_tensor_names_near_ones(rich: Path) -> None:
    """A tensor that is not there is a `FormatError` that offers the nearest names."""
    with GGUFFile.open(rich) as file, pytest.raises(FormatError, match=r"'block'.*blocks"):
        file.data("block")


@pytest.mark.parametrize("version", [2, 3])
def test_versions(tmp_path: Path, version: int) -> None:
    """Versions 2 and 3 open."""
    with GGUFFile.open(build(tmp_path / "m", version=version)) as file:
        assert file.version == version
        assert file.tensors["b"].type is Type.Q8_0


def test_alignment_is_the_files(tmp_path: Path) -> None:
    """`general.alignment` sets where data begins."""
    path = tmp_path / "m"
    writer = GGUFWriter(str(path), "llama")
    writer.add_custom_alignment(256)
    writer.add_tensor("t", np.arange(3, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(path) as file:
        assert (file.alignment, file.data_offset % 256) == (256, 0)
        assert file.data("t").view("<f4").tolist() == [0, 1, 2]


def test_truncated_anywhere(rich: Path, tmp_path: Path) -> None:
    """A file cut at any byte of its header or data is refused."""
    whole = rich.read_bytes()
    with GGUFFile.open(rich) as file:
        header, end = file.data_offset, max(t.offset + t.nbytes for t in file.tensors.values())
    path = tmp_path / "cut.gguf"
    for size in [*range(header), header, header + 1, end - 1]:
        path.write_bytes(whole[:size])
        assert refused(path).offset is not None


def test_flipped_bytes(rich: Path, tmp_path: Path) -> None:
    """A file with damaged header bytes opens or is refused: no other error, no hang."""
    whole = bytearray(rich.read_bytes())
    with GGUFFile.open(rich) as file:
        header = file.data_offset
    rng = random.Random(20261122)
    path = tmp_path / "flipped.gguf"
    n_refused = 0
    for _ in range(1500):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            damaged[rng.randrange(header)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        path.write_bytes(damaged)
        try:
            read_all(path)
        except FormatError:
            n_refused += 1
    assert n_refused > 300


DAMAGES: dict[str, tuple[dict[str, object], str]] = {
    "version 1": ({"version": 1}, "version 1 is not supported"),
    "version 9": ({"version": 9}, "version 9 is not supported"),
    "big-endian": ({"version": 0x03000000}, "big-endian"),
    "empty key": ({"keys": [("", 4, bytes(4))]}, "key 0 of 1 is empty"),
    "second key": ({"keys": [("k", 4, bytes(4)), ("k", 4, bytes(4))]}, "key 1 of 2 is a second 'k'"),
    "value type": ({"keys": [("k", 13, bytes(4))]}, "'k' has the unknown value type 13"),
    "nested array": ({"keys": [("k", 9, struct.pack("<IQ", 9, 0))]}, "array of arrays"),
    "huge array": ({"keys": [("k", 9, struct.pack("<IQ", 12, 2**61))]}, "needs"),
    "huge names": ({"keys": [("k", 9, struct.pack("<IQ", 8, 2**63))]}, "strings, needs"),
    "string past the end": ({"keys": [("k", 8, struct.pack("<Q", 2**64 - 1))]}, "runs past the end"),
    "alignment 0": ({"keys": [("general.alignment", 4, bytes(4))]}, "not a power of two"),
    "alignment 48": ({"keys": [("general.alignment", 4, struct.pack("<I", 48))]}, "not a power of two"),
    "alignment kind": ({"keys": [("general.alignment", 10, struct.pack("<Q", 32))]}, "not a uint32"),
    "nameless": ({"infos": [info("", (32,), 0, 0)]}, "tensor 0 of 1 is nameless"),
    "second tensor": ({"infos": [info("a", (8,), 0, 0), info("a", (8,), 0, 32)]}, "a second 'a'"),
    "dimensions": ({"infos": [info("a", (1,) * 5, 0, 0)]}, "5 dimensions"),
    "overflow": ({"infos": [info("a", (2**32, 2**32), 0, 0)]}, "too many elements"),
    "negative": ({"infos": [info("a", (2**63,), 0, 0)]}, "too many elements"),
    "unknown type": ({"infos": [info("a", (32,), 77, 0)]}, "tensor 'a' has the unknown type 77"),
    "removed type": ({"infos": [info("a", (32,), 4, 0)]}, "tensor 'a' has the unknown type 4"),
    "half a block": ({"infos": [info("a", (33,), 8, 0)]}, "not a multiple of q8_0's block of 32"),
    "misaligned": ({"infos": [info("a", (32,), 0, 4)]}, "not aligned to 32"),
    "outside": ({"infos": [info("a", (32,), 0, 2**62)]}, "past the end"),
    "overlap": (
        {"infos": [info("a", (32,), 0, 0), info("b", (32,), 0, 64)]},
        "'b' is at offset 64 of the data instead of 128",
    ),
    "gap": (
        {"infos": [info("a", (32,), 0, 0), info("b", (32,), 0, 160)]},
        "'b' is at offset 160 of the data instead of 128",
    ),
    "late start": (
        {"infos": [info("a", (32,), 0, 32)]},
        "'a' is at offset 32 of the data instead of 0: it leaves a gap",
    ),
    "order": (
        {"infos": [info("a", (8,), 0, 32), info("b", (8,), 0, 0)]},
        "'a' is at offset 32 of the data instead of 0",
    ),
    "smaller type": (
        {"infos": [info("a", (64,), 2, 0), info("b", (32,), 0, 256)]},
        "'b' is at offset 256 of the data instead of 64",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    """Each kind of damage is refused with a text that says what is wrong and where."""
    parts, message = DAMAGES[damage]
    error = refused(build(tmp_path / "m.gguf", **parts))  # type: ignore[arg-type]
    assert message in str(error)
    assert error.offset is not None


def test_absurd_counts(tmp_path: Path) -> None:
    """Counts that no file of this size can hold are refused before anything is read."""
    for n_tensors, n_keys in ((2**63, 0), (0, 2**63), (10**9, 0)):
        path = tmp_path / "m"
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys) + bytes(64))
        assert "cannot be in a file of" in str(refused(path))


def peak_until_refused(path: Path) -> tuple[int, FormatError]:
    """Return the most bytes that Python held while a file was refused, and the error."""
    tracemalloc.start()
    try:
        error = refused(path)
        return tracemalloc.get_traced_memory()[1], error
    finally:
        tracemalloc.stop()


def test_a_million_tensors_are_only_claimed(tmp_path: Path) -> None:
    """A count without records takes no memory, in a file too short for it and in one that is long enough."""
    path = tmp_path / "m"
    for n, size, says in (
        (10**6, 4096, "1,000,000 tensors cannot be in a file of"),
        (10**5, 25 << 20, "tensor 0 of 100000 is nameless"),
    ):
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, n, 0))
        os.truncate(path, size)
        peak, error = peak_until_refused(path)
        assert says in str(error)
        assert peak < 200_000, peak


@pytest.mark.parametrize(("counts", "what"), [((10**6, 0), "tensors"), ((0, 10**6), "keys")])
def test_more_records_than_a_model_has(tmp_path: Path, counts: tuple[int, int], what: str) -> None:
    """A million records that are all in the file are refused before they are read."""
    path = tmp_path / "m"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts))
    os.truncate(path, 25 << 20)
    peak, error = peak_until_refused(path)
    assert f"1,000,000 {what} are more than the 131,072 that a model can have" in str(error)
    assert error.offset == {"tensors": 8, "keys": 16}[what]
    assert peak < 200_000, peak


def test_records_without_data_take_memory_in_proportion(tmp_path: Path) -> None:
    """Records that are all there, of tensors that are not, are refused; each takes less than 1,000 bytes until then."""
    for n in (1_000, 16_000):
        path = build(tmp_path / "m", infos=[info(f"t{i}", (8,), 0, 32 * i) for i in range(n)])
        peak, error = peak_until_refused(path)
        assert "past the end of the file" in str(error)
        assert peak < 1_000 * n, peak


def test_names_may_be_any_bytes(tmp_path: Path) -> None:
    """Names and texts that are not UTF-8, which are bytes to llama.cpp, are read; no byte is lost."""
    keys = [("k", 8, text(b"\xff\xfe")), ("list", 9, struct.pack("<IQ", 8, 2) + text("a") + text(b"\xc3(b"))]
    with GGUFFile.open(build(tmp_path / "m", keys=keys)) as file:
        assert file.metadata["k"].encode("utf-8", "surrogateescape") == b"\xff\xfe"
        assert file.metadata["list"][1].encode("utf-8", "surrogateescape") == b"\xc3(b"


def test_tensors_without_elements_take_no_room(tmp_path: Path) -> None:
    """An empty tensor is where the next one is; each starts at the alignment."""
    infos = [info("first", (8,), 0, 0), info("none", (0,), 0, 32), info("scalar", (), 0, 32), info("last", (8,), 0, 64)]
    with GGUFFile.open(build(tmp_path / "m", infos=infos)) as file:
        assert list(file.tensors) == ["first", "none", "scalar", "last"]
        assert file.data("none").size == 0
        assert file.tensors["scalar"].ne == (1, 1, 1, 1)


def test_not_a_model_file(tmp_path: Path) -> None:
    """A missing file, a folder, a pipe, an empty file and files of other kinds are told apart."""
    assert "no such file" in str(refused(tmp_path / "absent"))
    assert "folder" in str(refused(tmp_path))
    for name, content, word in (
        ("empty", b"", "empty"),
        ("short", b"GG", "not a GGUF"),
        ("lfs", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("zip", b"PK\x03\x04" + bytes(40), "zip"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert word in str(refused(path))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert "not a regular file" in str(refused(tmp_path / "pipe"))
    with pytest.raises(FormatError, match="cannot open"):
        GGUFFile.open("a\0b")


def test_opening_reads_no_array(tmp_path: Path) -> None:
    """A vocabulary of 100,000 strings is stepped over: nothing of it is decoded, and numba is not imported."""
    words = b"".join(text(f"word{i}") for i in range(100_000))
    path = build(tmp_path / "m", keys=[("tokens", 9, struct.pack("<IQ", 8, 100_000) + words), ("n", 4, bytes(4))])
    code = (
        "import sys; from pyggml.gguf import GGUFFile; f = GGUFFile.open(sys.argv[1]);"
        "assert not f.metadata._decoded and f.metadata.entry('tokens').length == 100000 and f.metadata['n'] == 0;"
        "assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)
    with GGUFFile.open(path) as file:
        assert file.metadata["tokens"][-1] == "word99999"
