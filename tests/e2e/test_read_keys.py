"""Keys that llama.cpp reads are honoured, refused by name, or cannot matter: each is changed and compared with live llama.cpp."""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from edited_models import write_edited
from families import FAMILIES
from gguf import constants
from read_keys import EVERY, READ_KEYS, ReadKey, Values

from pyggml.errors import FormatError
from pyggml.gguf import GGUFFile
from pyggml.models.architectures import ARCHITECTURES, read_hparams
from pyggml.session import ContextFlags, Session
from pyggml.types import Type

TOKENS = [(i * 37 + 11) % 300 for i in range(16)]
#: Of these every key is tried in `make test`, of the others those that few families read and no family before; the soak tries all.
QUICK = ("llama",)
Logits = npt.NDArray[np.float32]


@dataclass
class Tried:
    """What llama.cpp and pyggml make of one file: logits, or None and an error where they refuse it."""

    key: ReadKey
    values: Values
    plain: Logits
    theirs: Logits | None
    ours: Logits | FormatError

    @property
    def changes(self) -> bool:
        """Whether llama.cpp computes other numbers than without the change."""
        return self.theirs is not None and not same(self.theirs, self.plain)


def same(a: Logits, b: Logits) -> bool:
    """Return whether logits are those of the same model."""
    most = max(1e-3, 1e-3 * float(np.abs(b).max()))  # some activations are looked up in tables of F16
    return bool(np.abs(a - b).max() < most) or bool(np.isnan(a).any() and np.isnan(b).any())


def decode(path: Path) -> Logits | FormatError:
    """Return pyggml's logits, or its refusal."""
    context = ContextFlags(n_ctx=256, n_batch=64, type_k=Type.F32, type_v=Type.F32, flash_attn="off")
    try:
        with Session.open(path, context=context) as s:
            return s.decode(TOKENS, outputs="all")
    except FormatError as error:
        return error


def edited(path: Path, family: str, values: Values) -> Path:
    """Write a family's model with other keys."""
    arch, how = FAMILIES[family]
    return write_edited(path, arch, **(how | {"keys": how.get("keys", {}) | values}))


def try_keys(family: str, wanted: list[ReadKey], folder: Path) -> list[Tried]:
    """Give llama.cpp and pyggml every file of some keys of one family."""
    folder.mkdir()
    cases = [(key, values) for key in wanted for values in key.values]
    paths = [edited(folder / "plain.gguf", family, {})]
    paths += [edited(folder / f"{i}.gguf", family, values) for i, (_, values) in enumerate(cases)]
    theirs = llama_cpp.outcomes([llama_cpp.Job(str(path), TOKENS, 16) for path in paths], folder)
    plain = theirs[0]
    assert plain is not None
    tried = [
        Tried(*case, plain, logits, decode(path))
        for case, path, logits in zip(cases, paths[1:], theirs[1:], strict=True)
    ]
    shutil.rmtree(folder)
    return tried


def wrong(tried: Tried) -> str:
    """Return what is not as the table says; nothing if all is."""
    ours, theirs = tried.ours, tried.theirs
    if isinstance(ours, FormatError):
        if theirs is None or (tried.key.verdict == "refused" and (tried.changes or not tried.key.counts)):
            return "" if theirs is None or tried.key.name in str(ours) else f"the refusal does not name it: {ours}"
        if any(isinstance(v, list) and len(set(v)) > 1 for v in tried.values.values()) and "differs" in str(ours):
            return ""  # layers of several sizes are refused by name, whatever the key
        return f"pyggml refuses what llama.cpp runs: {ours}"
    if theirs is None:
        return "" if same(ours, tried.plain) or tried.key.verdict != "cannot matter" else "llama.cpp refuses"
    return "" if same(ours, theirs) else f"logits differ by {np.abs(ours - theirs).max():.3g}"


def check(family: str, wanted: list[ReadKey], folder: Path) -> None:
    """Compare all files of some keys, and that the table is no empty promise."""
    tried = try_keys(family, wanted, folder)
    assert not [(t.key.name, t.values, w) for t in tried if (w := wrong(t))]
    changed = defaultdict(bool)
    for t in tried:
        changed[t.key.name, t.key.counts] |= t.changes
    assert not [name for (name, counts), found in changed.items() if counts and not found]
    assert not [t.key.name for t in tried if t.key.verdict == "cannot matter" and t.changes]


@pytest.mark.parametrize("family", EVERY)
def test_keys_are_honoured_refused_or_cannot_matter(family, tmp_path):
    """Logits with another value of a key are llama.cpp's, or the file is refused with the key's name."""
    wanted = [
        k
        for k in READ_KEYS
        if family in k.families and (family in QUICK or (len(k.families) < 10 and family == k.families[0]))
    ]
    check(family, wanted or [k for k in READ_KEYS if k.name == "rope.freq_base"], tmp_path / "f")


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in EVERY if f not in QUICK])
def test_keys_of_all_families(family, tmp_path):
    """The same of every key in every family that reads it."""
    check(family, [k for k in READ_KEYS if family in k.families], tmp_path / "f")


@pytest.mark.slow
@pytest.mark.parametrize("family", EVERY)
def test_no_other_key_changes_llama_cpps_numbers(family, tmp_path):
    """Of all keys that GGUF has, llama.cpp reads none for a family that is not in the table."""
    names = {
        value.removeprefix("{arch}.")
        for group in vars(constants.Keys).values() if isinstance(group, type)
        for value in vars(group).values() if isinstance(value, str) and value.startswith("{arch}.")
    }  # fmt: skip
    known = {k.name for k in READ_KEYS if family in k.families}
    required = {"context_length", "embedding_length", "block_count", "attention.kv_lora_rank"}
    others = sorted(names - known - required)
    assert len(others) > 60
    guesses = (1, 3, True, 0.5)
    wanted = [ReadKey(name, EVERY, "cannot matter", tuple({name: v} for v in guesses), False) for name in others]
    tried = try_keys(family, wanted, tmp_path / "f")
    assert not [(t.key.name, t.values) for t in tried if t.theirs is None or t.changes]


def test_the_page_has_the_table():
    """docs/upstream.md lists each key with its families and what becomes of it, and no other."""
    page = (Path(__file__).parents[2] / "docs" / "upstream.md").read_text(encoding="utf-8")
    section = page.split("## Keys of the hyper-parameters")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.split("\n") if line.startswith("| `")
    ]
    found = {(name.strip("`"), frozenset(families.split(", ")), verdict) for name, families, verdict, _ in rows}
    every = frozenset(["all"])
    assert found == {(k.name, every if k.families == EVERY else frozenset(k.families), k.verdict) for k in READ_KEYS}
    assert {how.get("renamed_arch", arch.removesuffix("-dense")) for arch, how in (FAMILIES[f] for f in EVERY)} | {
        "qwen3"
    } >= set(ARCHITECTURES)


#: Right numbers in types that are not those of llama.cpp's own files, and whether llama.cpp takes them.
SPELLED: list[tuple[Values, bool]] = [
    ({"block_count": np.uint64(3)}, False),
    ({"embedding_length": np.int32(64)}, False),
    ({"attention.layer_norm_rms_epsilon": np.float64(1e-5)}, False),
    ({"rope.freq_base": 10000}, False),
    ({"attention.head_count_kv": [np.int32(2)] * 3}, True),
    ({"expert_used_count": [3, 3, 3]}, True),
    ({"expert_used_count": [np.int32(3)] * 3}, True),
]


def test_numbers_may_be_of_other_types(tmp_path):
    """The model is the same with a key in another type or as an array; llama.cpp's logits are those, where it takes the file."""
    wanted = [ReadKey(next(iter(values)), EVERY, "honoured", (values,)) for values, _ in SPELLED]
    tried = try_keys("llama", wanted, tmp_path / "f")
    assert [t.theirs is not None for t in tried] == [takes for _, takes in SPELLED]
    assert not [(t.values, t.ours) for t in tried if isinstance(t.ours, FormatError) or not same(t.ours, t.plain)]
    assert not [t.values for t in tried if t.changes]


GLM_FLASH = {"block_count": 47, "expert_gating_func": None}


@pytest.mark.parametrize(
    ("keys", "gating"),
    [
        ({"vocab_size": 154880, "nextn_predict_layers": 0}, "sigmoid"),
        ({"vocab_size": 154880, "block_count": 48}, "sigmoid"),
        ({"vocab_size": 154880, "block_count": 48, "nextn_predict_layers": 1}, "sigmoid"),
        ({"vocab_size": 154880, "block_count": 46}, "softmax"),
        ({"vocab_size": 154881}, "softmax"),
        ({"vocab_size": 154880, "expert_gating_func": 1}, "softmax"),
    ],
)
def test_what_follows_from_a_models_size(keys, gating, tmp_path):
    """GLM-4.7-Flash without its key is known by layers and tokens, as in llama.cpp: its experts are chosen by sigmoids."""
    arch, how = FAMILIES["deepseek2"]
    path = write_edited(tmp_path / "m.gguf", arch, **(how | {"keys": GLM_FLASH | keys}))
    with GGUFFile.open(path) as file:
        assert read_hparams(file).expert_gating == gating


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention.head_count": ["4"]}, "array of strings"),
        ({"embedding_length": [0.5]}, "not of whole numbers"),
        ({"rope.dimension_sections": 3}, "several positions"),
        ({"rope.freq_base": 0.0}, "above 0"),
        ({"rope.freq_base": -1.0}, "above 0"),
        ({"rope.scaling.factor": 1e-45}, "above 0"),
        ({"expert_group_count": [0.5]}, "not of whole numbers"),
        ({"expert_used_count": [2, 3, 1]}, "differs between layers"),
        ({"attention.layer_norm_rms_epsilon": float("inf")}, "no number"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "no number"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(keys, message, tmp_path):
    """A number of the wrong kind, zero, infinite or not a number gives one line that names the key."""
    path = edited(tmp_path / "m.gguf", "glm4moe", keys)
    with pytest.raises(FormatError, match=message) as caught:
        Session.open(path, data=False)
    assert next(iter(keys)) in str(caught.value)
