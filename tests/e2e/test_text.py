"""Text to ids with all that a file may say of it, held to live llama.cpp; and files whose vocabulary is not as it should be."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from edited_models import END, MERGES, SPELLED, WORDS, byte_pairs, write_edited

from pyggml import cli
from pyggml.errors import FormatError
from pyggml.gguf import GGUFFile
from pyggml.tokenizer import Tokenizer

KINDS: dict[str, dict[str, Any]] = {"llama": {}, "gpt2": byte_pairs([*SPELLED, *WORDS], MERGES)}
FLAGS = list(itertools.product((None, True, False), repeat=3))
FLAG_NAMES = ("add_bos_token", "add_eos_token", "add_space_prefix")
TEXTS = ("hello world", "", "{bos}hi {eos} hi", " a")


def tokenizer_of(path: Path) -> Tokenizer:
    """Read the tokenizer of a file."""
    with GGUFFile.open(path) as file:
        return Tokenizer.from_gguf(file)


@pytest.fixture(scope="module")
def flagged(tmp_path_factory) -> dict[tuple[str, tuple[bool | None, ...]], Path]:
    """Give a file of each kind of vocabulary with each combination of flags."""
    folder = tmp_path_factory.mktemp("flags")
    made = {}
    for i, (kind, flags) in enumerate(itertools.product(KINDS, FLAGS)):
        full = KINDS[kind] | {f"tokenizer.ggml.{n}": f for n, f in zip(FLAG_NAMES, flags, strict=True) if f is not None}
        made[kind, flags] = write_edited(folder / f"{i}.gguf", "llama", full_keys=full)
    return made


def test_special_tokens_and_spaces_are_llama_cpps(flagged, tmp_path):
    """Of every kind of vocabulary, with and without each flag: BOS, EOS and the space before a text are where llama.cpp has them."""
    jobs, ours = [], []
    for path in flagged.values():
        tokenizer = tokenizer_of(path)
        assert tokenizer.bos_id is not None
        assert tokenizer.eos_id is not None
        names = {"bos": tokenizer.token_text(tokenizer.bos_id), "eos": tokenizer.token_text(tokenizer.eos_id)}
        for text in (t.format(**names) for t in TEXTS):
            jobs.append(llama_cpp.Job(str(path), [], 1, text=text, special=True))
            ours.append(tokenizer.encode(text))
    theirs = llama_cpp.outcomes(jobs, tmp_path)
    wrong = [
        (Path(job.model).name, job.text, mine, yours)
        for job, mine, found in zip(jobs, ours, theirs, strict=True)
        if found is None or mine != (yours := found.tolist())
    ]
    assert not wrong
    assert len(jobs) == 2 * 27 * 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["{bos}{body}", "{body}", "{bos}{body}{eos}", "{body}{eos}"])
def test_a_conversation_has_each_special_token_once(kind, template, flagged):
    """Whether the file adds BOS and EOS or its template writes them or both: a conversation has each once, in its place."""
    body = "{% for m in messages %}{{ m.content }}{% endfor %}"
    source = template.format(bos="{{ bos_token }}", body=body, eos="{{ eos_token }}")
    for (found, flags), path in flagged.items():
        if found != kind:
            continue
        tokenizer = tokenizer_of(path)
        tokenizer._template_source = source
        ids = tokenizer.encode_chat([{"role": "user", "content": "hello"}])
        plain = tokenizer.encode("hello", add_special=False)
        has_bos = tokenizer.add_bos or "{bos}" in template
        has_eos = tokenizer.add_eos or "{eos}" in template
        expected = [*([tokenizer.bos_id] if has_bos else []), *plain, *([tokenizer.eos_id] if has_eos else [])]
        assert ids == expected, (kind, flags)


@pytest.mark.parametrize("words", [["--chat", "-p", "hello"], ["-i"]], ids=["chat", "interactive"])
def test_commands_begin_a_conversation_with_bos(words, flagged, tmp_path, monkeypatch, capsys):
    """`run --chat` and `run -i` evaluate BOS once, at the beginning, with a template that writes it and one that does not."""
    seen: list[list[int]] = []
    encode = Tokenizer.encode_chat

    def noted(self: Tokenizer, *args: Any, **named: Any) -> list[int]:
        seen.append(encode(self, *args, **named))
        return seen[-1]

    monkeypatch.setattr(Tokenizer, "encode_chat", noted)
    monkeypatch.setattr("sys.stdin", _Lines("hello\nagain\n"))
    for start in ("", "{{ bos_token }}"):
        template = start + "{% for m in messages %}{{ m.content }}{% endfor %}"
        path = write_edited(
            tmp_path / "m.gguf",
            "llama",
            full_keys={"tokenizer.chat_template": template, "tokenizer.ggml.add_bos_token": True},
        )
        assert cli.run(["run", str(path), *words, "-n", "2", "--device", "none", "--quiet"]) == 0
    capsys.readouterr()
    assert len(seen) >= 2
    assert all(ids[0] == 1 and ids.count(1) == 1 for ids in seen)


class _Lines:
    """Lines in the place of a terminal's."""

    def __init__(self, text: str) -> None:
        self._lines = text.splitlines(keepends=True) * 2
        self._turn = iter(self._lines)

    def isatty(self) -> bool:
        return False

    def __next__(self) -> str:
        return next(self._turn)


VOCABULARIES: dict[str, dict[str, Any]] = {
    "whole": byte_pairs([*SPELLED, *WORDS], MERGES),
    "a merge makes no token": byte_pairs([*SPELLED, *(w for w in WORDS if w != "hell")], MERGES),
    "the last merge makes no token": byte_pairs([*SPELLED, *(w for w in WORDS if w != "hello")], MERGES),
    "a merge of bytes that are not ASCII makes no token": byte_pairs([*SPELLED, *WORDS], [*MERGES, "Ã ©"]),
    "merges of what is no token": byte_pairs([*SPELLED, *WORDS], ["zz yy", *MERGES, "h zz"]),
    "a merge twice": byte_pairs([*SPELLED, *WORDS], [*MERGES, "o r", "h e"]),
    "merges without a space": byte_pairs([*SPELLED, *WORDS], ["he", *MERGES, ""]),
    "no merges": byte_pairs([*SPELLED, *WORDS], []),
    "a byte without a token": byte_pairs([*(c for c in SPELLED if c != "©"), *WORDS], MERGES),
    "half of the words": byte_pairs([*SPELLED, *WORDS[::2]], MERGES),
    "qwen2": byte_pairs([*SPELLED, *WORDS], MERGES, "qwen2"),
    "llama-bpe": byte_pairs([*SPELLED, *WORDS], MERGES, "llama-bpe"),
    "no rule": byte_pairs([*SPELLED, *WORDS], MERGES, "default"),
}  # fmt: skip


def test_pruned_vocabularies_give_llama_cpps_ids(tmp_path):
    """Merges that name or make what is no token, come twice or are none are read as llama.cpp reads them."""
    jobs, ours = [], []
    for i, keys in enumerate(VOCABULARIES.values()):
        path = write_edited(tmp_path / f"{i}.gguf", "llama", full_keys=keys)
        for text in ("hello world", "Hello  worlds, é!", f"lol {END} hello", "a\n\n b", "hell hellhello world world"):
            jobs.append(llama_cpp.Job(str(path), [], 1, text=text))
            ours.append(tokenizer_of(path).encode(text, add_special=False, parse_special=False))
    found = llama_cpp.outcomes(jobs, tmp_path)
    names = [name for name in VOCABULARIES for _ in range(5)]
    theirs = [None if ids is None else ids.tolist() for ids in found]
    assert not [(n, j.text, a, b) for n, j, a, b in zip(names, jobs, ours, theirs, strict=True) if a != b]


@pytest.mark.parametrize(
    "keys",
    [
        {**byte_pairs(SPELLED, []), "tokenizer.ggml.pre": "kimi-k2", "tokenizer.ggml.merges": None},
        {**byte_pairs(SPELLED, MERGES), "tokenizer.ggml.pre": "a-new-rule"},
        {"tokenizer.ggml.model": "rwkv"},
        {"tokenizer.ggml.model": "a-new-kind"},
    ],
    ids=["kimi-k2", "new rule", "rwkv", "new kind"],
)
def test_ids_do_without_a_tokenizer(keys, tmp_path, capsys):
    """Where a tokenizer is not supported, ids are evaluated and plans made; text is refused, and told how to go without."""
    path = write_edited(tmp_path / "m.gguf", "llama", full_keys=keys)
    common = ["--device", "none", "-n", "2", "--json"]
    assert cli.run(["run", str(path), "--tokens", "1,2,3", *common]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 2
    assert cli.run(["splits", str(path), "--device", "none", "--batches", "4"]) == 0
    capsys.readouterr()
    assert cli.run(["run", str(path), "-p", "hi", *common]) == 1
    assert "`--tokens 1,2,3` needs no tokenizer" in capsys.readouterr().err
    with pytest.raises(FormatError):
        tokenizer_of(path).encode("hi")
