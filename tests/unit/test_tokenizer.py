"""Text to ids and back: the ids are llama.cpp's, and a stream never cuts a character."""

from __future__ import annotations

import gzip
import importlib.util
import json
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pyggml.errors import FormatError, PyggmlError
from pyggml.gguf import GGUFFile, ValueType
from pyggml.makers.gguf_writer import GGUFWriter
from pyggml.makers.make_moe import Recipe, Sizes, make_moe
from pyggml.tokenizer import StreamDecoder, Tokenizer

DATA = Path(__file__).parent / "data"


def _load_recorder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record_tokens", DATA / "record_tokens.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recorder = _load_recorder()
TEXTS: list[str] = recorder.texts()
RECORDED: dict[str, dict[str, Any]] = json.loads(gzip.decompress((DATA / "tokens.json.gz").read_bytes()))
BASE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", "a", "b", "ab", "\u2581ab", "é"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0],
    "tokenizer.ggml.token_type": [2, 3, 3, 6, 1, 1, 1, 1, 1, 1],
}


def make(path: Path, changes: dict[str, Any] | None = None) -> Tokenizer:
    """Write a file with a vocabulary and read it; a value of None drops a key."""
    writer = GGUFWriter()
    for key, value in (BASE | (changes or {})).items():
        kinds = {str: ValueType.STRING, bool: ValueType.BOOL, float: ValueType.FLOAT32, int: ValueType.UINT32}
        if isinstance(value, list):
            kind = kinds[type(value[0])]
            writer.add_array(key, ValueType.INT32 if kind is ValueType.UINT32 else kind, value)
        elif value is not None:
            writer.add(key, kinds[type(value)], value)
    writer.write(path)
    with GGUFFile.open(path) as file:
        return Tokenizer.from_gguf(file)


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    """Give SmolLM2's own vocabulary."""
    with GGUFFile.open(smollm2_path) as file:
        return Tokenizer.from_gguf(file)


@pytest.mark.parametrize("kind", recorder.KINDS)
def test_ids_are_llama_cpps(kind: str, tmp_path: Path, smollm2_path: Path) -> None:
    """For each kind of vocabulary, 234 texts give llama.cpp's ids, special tokens read or not; so do the ends."""
    path = tmp_path / "vocabulary.gguf"
    recorder.vocabulary(path, kind, smollm2_path)
    with GGUFFile.open(path) as file:
        tokenizer = Tokenizer.from_gguf(file)
    recorded = RECORDED[kind]
    assert len(TEXTS) == len(recorded["ids"]) >= 200
    for text, (parsed, plain) in zip(TEXTS, recorded["ids"], strict=True):
        assert tokenizer.encode(text) == parsed, repr(text)
        assert tokenizer.encode(text, add_special=False, parse_special=False) == plain, repr(text)
    assert sorted(tokenizer.eog_ids) == recorded["eog"]
    assert [tokenizer.bos_id, tokenizer.eos_id] == recorded["bos_eos"]
    assert [tokenizer.add_bos, tokenizer.add_eos] == recorded["add"]


def test_decode_gives_the_text_back(smollm2: Tokenizer) -> None:
    """Decoding what was encoded gives every text back, and a stream gives the same, never half a character."""
    for text in TEXTS:
        ids = smollm2.encode(text)
        assert smollm2.decode(ids, skip_special=False) == text
        stream = StreamDecoder(smollm2, skip_special=False)
        pieces = [stream.feed(id) for id in ids]
        assert "\ufffd" not in "".join(pieces).replace("\ufffd", "", text.count("\ufffd"))
        assert "".join([*pieces, stream.flush()]) == text


def test_stream_of_broken_bytes(smollm2: Tokenizer) -> None:
    """A character that is never completed comes out as U+FFFD when the stream is flushed."""
    ids = smollm2.encode("🇩🇪")
    stream = StreamDecoder(smollm2)
    assert stream.feed(ids[0]) == ""
    assert stream.flush() == "\ufffd"


def test_special_tokens(smollm2: Tokenizer) -> None:
    """Control tokens are read in text only where allowed, and left out of text only where asked."""
    ids = smollm2.encode("<|im_start|>hi<|im_end|>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert smollm2.decode(ids) == "hi"
    assert smollm2.decode(ids, skip_special=False) == "<|im_start|>hi<|im_end|>"
    assert not {1, 2} & set(smollm2.encode("<|im_start|>hi<|im_end|>", parse_special=False))
    assert smollm2.token_text(2) == "<|im_end|>"
    assert smollm2.eot_id in smollm2.eog_ids


def test_lone_surrogates_are_no_error(smollm2: Tokenizer) -> None:
    """Text that is no Unicode, as a terminal may hand it over, is read with a replacement."""
    assert smollm2.encode("a\udcffb") == smollm2.encode("a?b")


def test_tokens_that_are_not_utf8(tmp_path: Path) -> None:
    """Tokens whose bytes are not UTF-8 are those bytes in a text, and hinder no other token."""
    tokens = [*BASE["tokenizer.ggml.tokens"][:-1], "\udce9x"]
    tokenizer = make(tmp_path / "m", {"tokenizer.ggml.tokens": tokens})
    assert tokenizer.token_bytes(9) == b"\xe9x"
    assert tokenizer.decode([5, 9]) == "a\ufffdx"
    assert tokenizer.encode("ab") == [1, 8]
    pairs = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.merges": ["a b", "\udce9 x"],
    }
    assert make(tmp_path / "p", {"tokenizer.ggml.tokens": tokens} | pairs).encode("ab", add_special=False) == [7]


def test_chat_template(smollm2: Tokenizer) -> None:
    """The file's own template writes a conversation, with or without the beginning of an answer."""
    text = smollm2.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert text.startswith("<|im_start|>system\n")
    closed = smollm2.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=False)
    assert closed == text.removesuffix("<|im_start|>assistant\n")


def test_scored_pieces(tmp_path: Path) -> None:
    """Pieces merge by score, spaces are spelled, bytes fall back, and a space is put before and taken off again."""
    tokenizer = make(tmp_path / "m")
    assert tokenizer.encode("ab") == [1, 8]  # "ab" first, then "▁ab"; "▁a" is no piece
    assert tokenizer.decode(tokenizer.encode("ab a\n")) == "ab a\n"
    assert tokenizer.encode("ba", add_special=False) == [4, 6, 5]
    assert tokenizer.encode("é", add_special=False) == [4, 9]
    assert tokenizer.encode("\u00ff", add_special=False) == [4, 0, 0]
    assert tokenizer.encode("", add_special=True) == [1]
    plain = make(tmp_path / "p", {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False})
    assert plain.encode("ab") == [7]
    assert plain.decode([4, 7]) == " ab"


def test_without_vocabulary(tmp_path: Path) -> None:
    """A model without vocabulary counts its tokens, shows ids, and says how to go without text."""
    make_moe(tmp_path / "m", Recipe("llama", tokenizer="none", sizes=Sizes(layers=1)))
    with GGUFFile.open(tmp_path / "m") as file:
        tokenizer = Tokenizer.from_gguf(file)
    assert (tokenizer.n_vocab, tokenizer.has_vocabulary, tokenizer.eog_ids) == (320, False, frozenset())
    assert tokenizer.decode([3, 5]) == "[3][5]"
    with pytest.raises(PyggmlError, match="--tokens"):
        tokenizer.encode("hello")
    with pytest.raises(PyggmlError, match=r"320 is not in 0\.\.319"):
        tokenizer.token_text(320)


BAD = {
    "model": ({"tokenizer.ggml.model": "bert"}, "'bert' is not supported"),
    "no model": ({"tokenizer.ggml.model": None}, "no key 'tokenizer.ggml.model'"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "no key 'tokenizer.ggml.tokens'"),
    "tokens are numbers": ({"tokenizer.ggml.tokens": [1, 2]}, "not an array of strings"),
    "few scores": ({"tokenizer.ggml.scores": [0.5]}, "does not have a number for each of 10 tokens"),
    "scores are strings": ({"tokenizer.ggml.scores": ["a"] * 10}, "does not have a number"),
    "twice": ({"tokenizer.ggml.tokens": ["a"] * 10}, "'a' is in the vocabulary twice"),
    "pre": ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "new", "tokenizer.ggml.merges": ["a b"]}, "'new'"),
    "no merges": ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}, "no key 'tokenizer.ggml.merges'"),
    "bos": ({"tokenizer.ggml.bos_token_id": "a"}, "is a str, not a int"),
}


@pytest.mark.parametrize("bad", BAD)
def test_damaged_vocabularies(tmp_path: Path, bad: str) -> None:
    """A vocabulary that cannot be read is refused by name, at the latest at the first text."""
    changes, message = BAD[bad]
    with pytest.raises(FormatError) as caught:
        make(tmp_path / "m", changes).encode("ab")
    assert message in str(caught.value)


def test_ids_out_of_range_are_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A special id that is no token is told about, and the default taken."""
    with caplog.at_level(logging.WARNING):
        tokenizer = make(tmp_path / "m", {"tokenizer.ggml.eos_token_id": 999})
    assert tokenizer.eos_id == 2
    assert "999" in caplog.text


TEMPLATES = {
    "syntax": ("{% if %}", "is not a Jinja template"),
    "undefined": ("{{ messages[0].nothing.at_all }}", "fails: UndefinedError"),
    "refusal": ("{{ raise_exception('roles must alternate') }}", "refuses the conversation: roles must alternate"),
    "escape": ("{{ ''.__class__.__mro__ }}", "fails: SecurityError"),
    "division": ("{{ 1 // 0 }}", "fails: ZeroDivisionError"),
}


@pytest.mark.parametrize("bad", TEMPLATES)
def test_bad_templates(tmp_path: Path, bad: str) -> None:
    """A template that is broken, refuses, or reaches out of its sandbox is a `FormatError` that says which."""
    source, message = TEMPLATES[bad]
    tokenizer = make(tmp_path / "m", {"tokenizer.chat_template": source})
    with pytest.raises(FormatError) as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert message in str(caught.value)


def test_template_helpers(tmp_path: Path) -> None:
    """Templates find tojson without HTML escapes, the date, loop controls, and the names handed in."""
    source = (
        "{{ bos_token }}{{ strftime_now('%Y')|length }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{{ m|tojson }}{% endfor %}{{ tools }}"
    )
    tokenizer = make(tmp_path / "m", {"tokenizer.chat_template": source, "tokenizer.ggml.add_bos_token": False})
    text = tokenizer.apply_chat_template([{"role": "<é>"}, {"role": "b"}], tools="T")
    assert text == '<s>4{"role": "<é>"}T'
    with_bos = make(tmp_path / "n", {"tokenizer.chat_template": source})
    text = with_bos.apply_chat_template([{"role": "a"}])
    assert not text.startswith("<s>")
    assert with_bos.encode(text)[:2].count(1) == 1


def test_no_template(tmp_path: Path) -> None:
    """A file without a template says so."""
    tokenizer = make(tmp_path / "m")
    assert tokenizer.chat_template is None
    with pytest.raises(FormatError, match="no chat template"):
        tokenizer.apply_chat_template([])
