"""Record what llama.cpp makes of 220 texts, for vocabularies of several kinds.

    python record_tokens.py SMOLLM2.gguf        writes tokens.json.gz beside this file

The vocabularies are SmolLM2's own; the same under the names of other pre-tokenizers; the same respelled as scored pieces;
and the bytes of a tiny random model. `test_tokenizer.py` makes them again and compares.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
import tempfile
from pathlib import Path

from pyggml.gguf import GGUFFile, ValueType
from pyggml.makers.gguf_writer import GGUFWriter
from pyggml.makers.make_moe import Recipe, Sizes, make_moe

PRES = ("smollm", "default", "gpt-2", "llama-bpe", "qwen2", "qwen35", "gpt-4o", "tekken", "falcon", "dbrx", "glm4")
KINDS = (*PRES, "scored", "bytes")

_HAND = """
|Hello, world!| leading|trailing |  two  spaces  |\t tab\tand space |a\nb|a\n\nb|a\r\nb|\n|\n\n\n| \n \n |   \n\n   x|x\u00a0y|\u3000z|\u2028|\x0b\x0c
I'm you're he's they'd we'll I've can't|I'M YOU'RE HE'S|'s 't 're|it''s|O'Neil's|don’t won’t|'twas|''|' '
0|42|123|1234|12345|1234567890|3.14159|1,000,000|0x1F|1e-9|²³¹|١٢٣|Ⅷ|½|１２３|10:30pm|v1.2.3-rc4|2026-11-22T10:00:00Z
def f(x):\n    return x ** 2  # square\n|for (int i = 0; i < n; ++i) { a[i] += b[i]; }|<html><body class="x">&amp;</body></html>|SELECT * FROM t WHERE a='b';
{"key": [1, 2.5, null, true], "nested": {"a": "b"}}|\\frac{a}{b} \\alpha_{i}^{2}|print("a\\n")|$HOME/.bashrc|C:\\Users\\x|a@b.example|https://example.org/?q=1&r=2#frag
über straße Ärger|naïve café déjà vu|Ελληνικά κείμενο|Русский текст, да!|עברית|العربية|हिन्दी पाठ|ไทยภาษา|中文文本，测试。|日本語のテキスト|한국어 텍스트
é|e\u0301|Å|a\u0308\u0323|ﬁ|ǅ|ß|ſ|İ|ı|\u00ad|zero\u200bwidth|\u200d|\ufeff|\ufffd|\U0010ffff|\ue000
🙂|👩‍👩‍👧‍👦|🇩🇪|👍🏽|🙂🙂🙂|a🙂b|→←↑↓|∑∫√∞≠|“quotes” ‘single’ «guillemets»|…|—–-|©®™|€£¥₿|♠♥♦♣|█▓▒░
aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa|....................|!!!???!!!|------|======|______|\u0001\u0002\u0003|\x7f|~`^|[]{}()<>|#@$%&*|+=+=|\\\\\\\\
CamelCaseWords|snake_case_words|SCREAMING_CASE|kebab-case-words|mixedUPPERlower|HTTPServer2XML|iPhone14Pro|aB|Ab|AB|ab|ÄbÇd|ÀÉÎ òùñ|ΑΒγδ
<|im_start|>user\nhi<|im_end|>\n|<|im_start|>|x<|endoftext|>y|<|im_end|><|im_end|>|<|im_start|| im_start|><|im|<s>|</s>|<s>hi</s>|<unk>|<0x0A>|a<unk>b|<reponame>x|[INST] hi [/INST]
The quick brown fox jumps over the lazy dog.|She said: "It's 5 o'clock — isn't it?"|Mr. Smith's e-mail (smith@corp.example) bounced; retry!|▁|▁▁a|a▁b| ▁ |Ġ|ĠĊ|\u2581x y
"""


def texts() -> list[str]:
    """Return the texts: chosen ones, then seeded mixtures of everything that cuts words."""
    found = [""]
    for line in _HAND.strip("\n").split("\n"):
        found += line.replace("\\n", "\n").split("|") if "im_start" not in line else [line.replace("\\n", "\n")]
    found += [
        "<|im_start|>user\nhi<|im_end|>\n", "<|im_start|>", "x<|endoftext|>y", "<|im_end|><|im_end|>", "<|im_start|",
        "<s>", "</s>", "<s> hi</s> you", "<unk>", "<0x0A>", "a<unk>b", "<|im_<|im_end|>", "  <|im_end|>  x",
        "\x0b\x0c", "a\tb", "a\r\nb", "x\r\n\r\ny", "\r", "\t\t\tx", " \t x",
    ]  # fmt: skip
    rng = random.Random(11)
    alphabet = "aZé中🙂 \n\t.,'’-_0١½\u0301\u00a0\u3000ßÀ<|>"
    found += ["".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 40))) for _ in range(40)]
    anything = [c for c in range(0x30000) if not 0xD800 <= c < 0xE000]
    found += ["".join(chr(rng.choice(anything)) for _ in range(12)) for _ in range(20)]
    found += ["".join(chr(rng.randrange(0x20, 0x2FF)) for _ in range(20)) for _ in range(10)]
    words = [
        "the",
        "of",
        "and",
        "to",
        "in",
        "a",
        "is",
        "that",
        "it",
        "was",
        "for",
        "on",
        "are",
        "with",
        "as",
        "I",
        "his",
        "they",
        "be",
        "at",
    ]
    found += [(" " * rng.randrange(1, 4)).join(rng.choices(words, k=12)) for _ in range(5)]
    return list(dict.fromkeys(found))


def vocabulary(path: Path, kind: str, smollm2: Path) -> None:
    """Write a file that holds nothing but a vocabulary (and what llama.cpp wants of a model to read it)."""
    if kind == "bytes":
        make_moe(path, Recipe("llama", sizes=Sizes(layers=1)))
        return
    writer = GGUFWriter()
    with GGUFFile.open(smollm2) as file:
        for key in file.metadata:
            entry, raw = file.metadata.entry(key), file.metadata.raw(key)
            if (kind == "scored" and key.startswith("tokenizer.")) or key.endswith(".pre"):
                continue
            writer.add_raw(key, entry.type, entry.length, raw)
        if kind != "scored":
            writer.add("tokenizer.ggml.pre", ValueType.STRING, kind)
        else:
            _add_scored(writer, file.metadata["tokenizer.ggml.tokens"])
    writer.write(path)


def _add_scored(writer: GGUFWriter, tokens: list[str]) -> None:
    """Add the pieces that SmolLM2's tokens spell, the earlier the better, and a token for each byte."""
    pieces = [t.replace("Ġ", "▁") for t in tokens[17:] if not set(t) & set("ĊĉĢ▁")]
    pieces = [
        t for t in dict.fromkeys(pieces) if (t.replace("▁", "").isalnum() and t.isascii()) or len(t) == 1 or "▁" in t
    ]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<|im_start|>", "<|im_end|>"]
    kinds = [2, 3, 3] + [6] * 256 + [3, 4]
    names += [piece for piece in pieces if piece not in names]
    kinds += [1] * (len(names) - len(kinds))
    scores = [0.0] * 261 + [-float(i // 3) for i in range(len(names) - 261)]  # equal scores too
    writer.add("tokenizer.ggml.model", ValueType.STRING, "llama")
    writer.add_array("tokenizer.ggml.tokens", ValueType.STRING, names)
    writer.add_array("tokenizer.ggml.scores", ValueType.FLOAT32, scores)
    writer.add_array("tokenizer.ggml.token_type", ValueType.INT32, kinds)


def _record(path: Path) -> dict[str, object]:
    """Ask llama.cpp, in this process."""
    lib, ffi = _library()
    params = lib.llama_model_default_params()
    params.vocab_only = True
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    if model == ffi.NULL:
        raise SystemExit(f"llama.cpp does not load {path}")
    vocab = lib.llama_model_get_vocab(model)
    n_tokens = lib.llama_vocab_n_tokens(vocab)
    ids = []
    for text in texts():
        raw = text.encode()
        room = ffi.new("int32_t[]", 4 * len(raw) + 16)
        ids.append(
            [
                list(room[0 : lib.llama_tokenize(vocab, raw, len(raw), room, len(room), add, parse)])
                for add, parse in ((True, True), (False, False))
            ]
        )
    return {
        "ids": ids,
        "eog": [i for i in range(n_tokens) if lib.llama_vocab_is_eog(vocab, i)],
        "bos_eos": [lib.llama_vocab_bos(vocab), lib.llama_vocab_eos(vocab)],
        "add": [bool(lib.llama_vocab_get_add_bos(vocab)), bool(lib.llama_vocab_get_add_eos(vocab))],
    }


def _library():
    """Open the library inside xllamacpp; the structure is b11434's."""
    import cffi
    import xllamacpp

    ffi = cffi.FFI()
    ffi.cdef("""
        struct llama_model_params {
            void ** devices; void * tensor_buft_overrides; int32_t n_gpu_layers; int split_mode; int load_mode;
            int lazy_mode; int32_t main_gpu; const float * tensor_split; void * progress; void * progress_data;
            const void * kv_overrides; bool vocab_only, check_tensors, use_extra_bufts, no_host, no_alloc, load_mtp; };
        struct llama_model_params llama_model_default_params(void);
        void * llama_model_load_from_file(const char * path, struct llama_model_params params);
        const void * llama_model_get_vocab(const void * model);
        int32_t llama_vocab_n_tokens(const void * vocab);
        bool llama_vocab_is_eog(const void * vocab, int32_t token);
        int32_t llama_vocab_bos(const void * vocab);
        int32_t llama_vocab_eos(const void * vocab);
        bool llama_vocab_get_add_bos(const void * vocab);
        bool llama_vocab_get_add_eos(const void * vocab);
        int32_t llama_tokenize(const void * vocab, const char * text, int32_t n, int32_t * ids, int32_t max, bool add, bool parse);
    """)
    return ffi.dlopen(next(str(p) for p in Path(xllamacpp.__file__).parent.glob("*.so"))), ffi


def main() -> None:
    """Record all kinds."""
    recorded = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            path = Path(folder) / f"{kind}.gguf"
            vocabulary(path, kind, Path(sys.argv[1]))
            recorded[kind] = _record(path)
    out = Path(__file__).with_name("tokens.json.gz")
    out.write_bytes(gzip.compress(json.dumps(recorded, separators=(",", ":")).encode(), mtime=0))


if __name__ == "__main__":
    main()
