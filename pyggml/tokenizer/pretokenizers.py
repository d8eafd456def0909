"""How a byte-pair vocabulary splits text into words before it merges, by the name in ``tokenizer.ggml.pre``.

A file contains only the name of its rule, so every reader needs this table. The patterns are llama.cpp's, with
case-insensitive groups and letter classes that its own engine lacks.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PRETOKENIZERS", "Pretokenizer"]


@dataclass(frozen=True, slots=True)
class Pretokenizer:
    """One rule: patterns, each applied to the pieces of the pattern before."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  #: a word that is a token is not split
    add_bos: bool = False  #: default, if the file does not say


_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_TAIL = r"\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _TAIL
_NEWLINES = r"\s*[\r\n]+|" + _TAIL


def _words(digits: str, *, letters: str = r"\p{L}", contractions: str = _CONTRACTIONS + "|") -> str:
    """Return the pattern that most models since 2023 share."""
    others = letters + r"\p{N}"
    return contractions + rf"[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{digits}| ?[^\s{others}]+[\r\n]*|" + _NEWLINES


# a letter except small ASCII letters, and a letter except capital ASCII letters
_BIG, _SMALL = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"


def _cased(digits: str, *, contractions: str = "") -> str:
    """Return the pattern that also splits before a capital letter."""
    word = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{word}{_BIG}*{_SMALL}+{contractions}|{word}{_BIG}+{_SMALL}*{contractions}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _NEWLINES
    )


#: Letters with upper and lower case, as DeepSeek's first tokenizer lists them.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_WIDE_MARKS = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _NEWLINES
)

_LLAMA3 = _words(r"\p{N}{1,3}")
_QWEN2 = _words(r"\p{N}")

_DEFAULT = Pretokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
_BY_RULE = {
    ("default",): _DEFAULT,
    (
        "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum", "modern-bert",
        "jina-v1-en", "jina-v2-code", "roberta-bpe", "exaone4", "mpt", "olmo", "jais", "trillion", "granite-docling",
    ): Pretokenizer((_GPT2,)),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"):
        Pretokenizer((r"\p{N}", _GPT2)),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"):
        Pretokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    ("dbrx", "smaug-bpe"): Pretokenizer((_LLAMA3,)),
    ("glm4", "glm5"): Pretokenizer((_LLAMA3,), ignore_merges=True),
    (
        "qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2",
    ): Pretokenizer((_QWEN2,)),
    ("qwen35",): Pretokenizer((_words(r"\p{N}", letters=r"\p{L}\p{M}"),)),
    ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"):
        Pretokenizer((_cased(r"\p{N}{1,3}", contractions=_CONTRACTIONS + "?"),)),
    ("tekken",): Pretokenizer((_cased(r"\p{N}"),), ignore_merges=True, add_bos=True),
    ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"): Pretokenizer((r"\p{N}{1,3}", _KANA, _DEEPSEEK3)),
    ("deepseek-coder",): Pretokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}")),
    ("deepseek-llm",):
        Pretokenizer(("[\r\n]", rf"\s?[{_CASED_LETTERS}]+", rf"\s?[{_WIDE_MARKS}]+", r"\s+$", _HAN, r"\p{N}+")),
    ("falcon",): Pretokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
}  # fmt: skip

#: Rules by name; several names can mean the same rule.
PRETOKENIZERS = {name: rule for names, rule in _BY_RULE.items() for name in names}
