"""Text in and out by llama.cpp's own vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from edited_models import MERGES, SPELLED, WORDS, byte_pairs, write_edited

from pyggml.cli import group
from pyggml.errors import GraphError
from pyggml.gguf import GGUFFile
from pyggml.llama import LlamaModel
from pyggml.llama.tokenizer import LlamaTokenizer
from pyggml.models.context import ContextFlags
from pyggml.tokenizer import StreamDecoder, Tokenizer

CONTEXT = ContextFlags(n_ctx=256)
TEXTS = ["Once upon a time", " two  spaces", "", "ünïcödé 🦙 中文", "a\nb\t", "x" * 300]


@pytest.fixture(scope="module")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a model whose pre-tokenizer llama.cpp knows and pyggml does not."""
    path = tmp_path_factory.mktemp("text") / "unknown.gguf"
    chat = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    keys = byte_pairs([*SPELLED, *WORDS], MERGES, "viking") | {"tokenizer.chat_template": chat}
    write_edited(path, "qwen3moe", full_keys=keys)
    with GGUFFile.open(path) as file:
        assert not Tokenizer.from_gguf(file).can_encode
    return path


def test_ids_and_texts_are_those_of_pyggmls_tokenizer(random_model: Callable[[str], Path]) -> None:
    """Where both read the vocabulary, ids, texts, bytes of tokens and ends of generation are equal."""
    path = random_model("qwen3moe")
    with GGUFFile.open(path) as file, LlamaModel(path, context=CONTEXT, threads=1) as model:
        own, llamas = Tokenizer.from_gguf(file), LlamaTokenizer(model, file)
        for text in TEXTS:
            for options in ({}, {"add_special": False}, {"parse_special": False}):
                assert llamas.encode(text, **options) == own.encode(text, **options)
            assert llamas.decode(llamas.encode(text)) == own.decode(own.encode(text))
        assert (llamas.n_vocab, llamas.eog_ids) == (own.n_vocab, own.eog_ids)
        for id in range(0, own.n_vocab, 7):
            assert llamas.token_bytes(id, skip_special=True) == own.token_bytes(id, skip_special=True)


def test_text_follows_text(random_model: Callable[[str], Path]) -> None:
    """`generate` of a text yields the text of the ids that it yields for the text's ids; characters are whole."""
    path = random_model("qwen3moe")
    with GGUFFile.open(path) as file, LlamaModel(path, context=CONTEXT, threads=1) as model:
        texts = list(model.generate("Once upon a time", 12))
        model.rewind(0)
        decoder = StreamDecoder(Tokenizer.from_gguf(file))
        ids = list(model.generate(model.tokenize("Once upon a time"), 12, stop=model.eog_ids))
        assert "".join(texts) == "".join(map(decoder.feed, ids)) + decoder.flush()
        for call in (model.pieces, model.detokenize):
            with pytest.raises(GraphError, match="token 100000 is not in"):
                call([100000])


@pytest.mark.parametrize("more", [[], ["--chat"]], ids=["plain", "chat"])
def test_unknown_pretokenizers_take_text(unknown: Path, more: list[str]) -> None:
    """`run --engine llama` takes a text where pyggml's session refuses it, and tells the ids that llama.cpp made."""
    options = [str(unknown), "-p", "hello world, in 1999", "-n", "3", "--json", *more]
    refused = CliRunner().invoke(group, ["run", *options])
    assert refused.exit_code != 0
    assert "the pre-tokenizer 'viking' is not supported" in " ".join((refused.output + str(refused.exception)).split())
    done = CliRunner().invoke(group, ["run", *options, "--engine", "llama"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    with LlamaModel(unknown, context=CONTEXT, threads=1) as model, GGUFFile.open(unknown) as file:
        if more:
            messages = [{"role": "user", "content": "hello world, in 1999"}]
            expected = LlamaTokenizer(model, file).encode_chat(messages)
        else:
            expected = model.tokenize("hello world, in 1999")
        assert told["prompt_tokens"] == expected
        ids = list(model.generate(expected, 3, stop=model.eog_ids))
        assert told["tokens"] == ids
        assert told["text"] == b"".join(model.pieces(ids)).decode("utf-8", "replace")
