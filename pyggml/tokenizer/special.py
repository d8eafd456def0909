"""Special tokens: those that the file names, and otherwise those with known texts."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import IntEnum

from ..gguf import GGUFFile

__all__ = ["SpecialTokens", "TokenKind", "find_special"]

_log = logging.getLogger(__name__)


class TokenKind(IntEnum):
    """The kind of a token; the numbers are those in files."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


#: Names of tokens that always end a turn, a message or a text.
_END_OF_GENERATION = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
#: Tokens that a file can name with a key, and their texts if it does not.
_NAMED: dict[str, tuple[str, ...]] = {
    "eot": (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>",
        "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>",
    ),
    "eom": ("<|eom_id|>",),
    "fim_pre": (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
        "<|prefix|>",
    ),
    "fim_suf": (
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>",
        "<|suffix|>",
    ),
    "fim_mid": (
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
        "<|middle|>",
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip
#: End tokens of which some end only a message if the vocabulary also has the others.
_MARKERS = ("<|call|>", "<|calls|>", "<|end|>", "<|return|>", "<|flush|>", "</s>", "<|tool_response>")
#: Tokens of the harmony format that readers see.
_ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of special tokens; None if a vocabulary lacks the token.

    Attributes
    ----------
    bos, eos, eot, unknown : int or None
        The tokens that begin a text, end a text, end a turn, and replace text outside the vocabulary.
    ends : frozenset of int
        All tokens after which generation stops.
    """

    bos: int | None
    eos: int | None
    eot: int | None
    unknown: int | None
    ends: frozenset[int]


def find_special(file: GGUFFile, model: str, ids: dict[str, int], kinds: list[int], n_vocab: int) -> SpecialTokens:
    """Find the special tokens of a vocabulary, and correct kinds that files are known to have wrong.

    Parameters
    ----------
    file : GGUFFile
    model : str
        The kind of vocabulary: ``"gpt2"``, ``"llama"``, ``"none"``.
    ids : dict of str to int
        The vocabulary.
    kinds : list of int
        `TokenKind` of each token; changed in place.
    n_vocab : int
        The number of tokens, with or without texts.

    Notes
    -----
    Mirrors the second half of `llama_vocab::impl::load`.
    """
    finder = _Finder(file, ids, kinds, n_vocab)
    defaults = {"gpt2": (11, 11, None), "llama": (1, 2, 0)}.get(model, (None, None, None))
    bos, eos, unknown = (
        finder.named(name, default)
        for name, default in zip(("bos_token_id", "eos_token_id", "unknown_token_id"), defaults, strict=True)
    )
    by_role = {role: finder.by_role(role, texts) for role, texts in _NAMED.items()}
    ends = {ids[text] for text in _END_OF_GENERATION if text in ids}
    for id in ends:
        kinds[id] = TokenKind.CONTROL
    ends |= {end for role in ("fim_pad", "fim_rep", "fim_sep") if (end := by_role[role]) is not None}
    for text in _ALWAYS_SHOWN:
        if text in ids:
            kinds[ids[text]] = TokenKind.USER_DEFINED
    ends |= {end for end in (eos, by_role["eot"], by_role["eom"]) if end is not None}
    return SpecialTokens(bos, eos, by_role["eot"], unknown, frozenset(finder.without_markers(ends)))


@dataclass(slots=True)
class _Finder:
    file: GGUFFile
    ids: dict[str, int]
    kinds: list[int]
    n_vocab: int

    def named(self, name: str, default: int | None) -> int | None:
        """Return the id that the file gives for a name."""
        key = f"tokenizer.ggml.{name}"
        found = self.file.require(key, int, None)
        if found is not None and 0 <= found < self.n_vocab:
            return found
        if found is not None:
            _log.warning("%s: '%s' is %d, which is not a token", self.file.path, key, found)
        return default if default is not None and default < len(self.ids) else None

    def by_role(self, role: str, texts: tuple[str, ...]) -> int | None:
        """Return the id that the file names, or else that of the first known text, which becomes a control token."""
        id = self.named(f"{role}_token_id", None)
        if id is None:
            id = next((self.ids[text] for text in texts if text in self.ids), None)
            if id is not None:
                self.kinds[id] = TokenKind.CONTROL
        return id

    def without_markers(self, ends: set[int]) -> set[int]:
        """Remove tokens that end a message but not the answer: those of harmony's and solar's formats, and a plain ``</s>``."""
        texts = {text for text in _MARKERS if self.ids.get(text) in ends}
        calls = "<|call|>" in texts or "<|calls|>" in texts
        if "<|end|>" in texts and calls and ("<|return|>" in texts or "<|flush|>" in texts):
            ends = ends - {self.ids["<|end|>"]}
            self.kinds[self.ids["<|end|>"]] = TokenKind.USER_DEFINED
        if "</s>" in texts and "<|tool_response>" in texts:
            ends = ends - {self.ids["</s>"]}
            self.kinds[self.ids["</s>"]] = TokenKind.NORMAL
        return ends
