"""Every rule by which text is cut into words, against live llama.cpp: with merges of all neighbours each cut shows."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import llama_cpp
import pytest

from pyggml.gguf import GGUFFile, ValueType
from pyggml.makers.gguf_writer import GGUFWriter
from pyggml.makers.make_moe import Recipe, Sizes, make_moe
from pyggml.tokenizer import Tokenizer
from pyggml.tokenizer.pretokenizers import PRETOKENIZERS

TEXT = (
    "Hello World's 12345 foo_bar(x+=1);\n\n  It'S\tHTTPServer2 I'll  don't…\r\n 3.14 $99^2~|`a`   end\n"
    " 你好，世界 カタカナ ひらがな 한국어 Ünïcödé ÀÉ ß ǅ Ωμέγα Привет мир x\u0301y \u2018q\u2019 \uff21\uff22\uff01 १२३ ٣٤ ½ "
    "a1b2 C3 ++-- <|x|> [y] {z} #tag @me a/b\\c 🙂🙃 e\u0300 🅰 𝐀𝐁 \u3000\u3001 _ __ -x .NET node.js\n \n\n"
)


def _byte_letters() -> list[str]:
    """Return the letter that stands for each byte in vocabularies of this kind."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[dict[str, Path], dict[str, list[int]]]:
    """Give a file for each name of a rule, of the same vocabulary, and llama.cpp's ids of the text."""
    folder = tmp_path_factory.mktemp("pre")
    letters = _byte_letters()
    raw = TEXT.encode()
    pairs = list(dict.fromkeys((letters[a], letters[b]) for a, b in pairwise(raw)))
    tokens = [*letters, *(a + b for a, b in pairs), "<eos>"]
    plain = folder / "plain.gguf"
    sizes = Sizes(layers=1, embd=32, heads=1, kv_heads=1, head_dim=32, ff=32, vocab=len(tokens))
    make_moe(plain, Recipe("llama-dense", sizes=sizes, tokenizer="none"))
    paths = {}
    with GGUFFile.open(plain) as file:
        for name in PRETOKENIZERS:
            writer = GGUFWriter()
            for key in (key for key in file.metadata if not key.startswith("tokenizer.")):
                entry = file.metadata.entry(key)
                writer.add_raw(key, entry.type, entry.length, file.metadata.raw(key))
            writer.add("tokenizer.ggml.model", ValueType.STRING, "gpt2")
            writer.add("tokenizer.ggml.pre", ValueType.STRING, name)
            writer.add_array("tokenizer.ggml.tokens", ValueType.STRING, tokens)
            writer.add_array("tokenizer.ggml.merges", ValueType.STRING, [f"{a} {b}" for a, b in pairs])
            writer.add_array("tokenizer.ggml.token_type", ValueType.INT32, [1] * (len(tokens) - 1) + [3])
            writer.add("tokenizer.ggml.eos_token_id", ValueType.UINT32, len(tokens) - 1)
            for info in file.tensors.values():
                n_dims = max(i + 1 for i in range(4) if i == 0 or info.ne[i] != 1)
                data = file.data(info.name).tobytes()
                writer.add_tensor(info.name, info.type, info.ne[:n_dims], partial(list, [data]))
            paths[name] = folder / f"{name}.gguf"
            writer.write(paths[name])
    jobs = [llama_cpp.Job(str(path), [], 1, text=TEXT) for path in paths.values()]
    found = llama_cpp.run_jobs(jobs, folder)
    return paths, {name: ids.tolist() for name, ids in zip(paths, found, strict=True)}


@pytest.mark.parametrize("name", list(PRETOKENIZERS))
def test_words_are_cut_as_in_llama_cpp(name, models):
    """Text of many scripts, numbers, signs and spaces gives the same ids under every name of a rule."""
    paths, expected = models
    with GGUFFile.open(paths[name]) as file:
        tokenizer = Tokenizer.from_gguf(file)
    assert tokenizer.encode(TEXT, add_special=False) == expected[name]
    assert len(expected[name]) < len(TEXT.encode())
