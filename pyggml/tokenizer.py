"""Text to token ids and back, by the vocabulary of the model's own file.

::

    tokenizer = Tokenizer.from_gguf(file)
    ids = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}]))
    stream = StreamDecoder(tokenizer)
    for id in generated:
        print(stream.feed(id), end="")

Vocabularies of three kinds: ``gpt2`` (byte pairs, merged by rank: the `tokenizers` library does it), ``llama`` (pieces
with scores, merged by score: nothing in the library does that, so the loop is here), and ``none``.
"""

from __future__ import annotations

import codecs
import heapq
import logging
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from functools import cached_property
from typing import Any, Protocol

from .chat_template import ChatTemplate
from .errors import FormatError, PyggmlError
from .gguf import GGUFFile, ValueType
from .pretokenizers import PRETOKENIZERS

__all__ = ["StreamDecoder", "TokenKind", "Tokenizer"]

_log = logging.getLogger(__name__)

_KEY = "tokenizer.ggml."
_SPACE = "\u2581"  # how a piece with a score spells a space


class TokenKind(IntEnum):
    """What a token is for; the numbers are the files'."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


#: Names of tokens that end a turn, a message or a text, whatever else the file says.
_END_OF_GENERATION = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
#: Tokens that a file may name by key, and the texts by which they are found where it does not.
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
#: Tokens of the harmony format that are part of what a reader sees.
_ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


class _Words(Protocol):
    """What turns a piece of text without special tokens into ids."""

    def encode(self, text: str) -> list[int]: ...


class Tokenizer:
    """The vocabulary of a file.

    Attributes
    ----------
    model : str
        ``"gpt2"``, ``"llama"`` or ``"none"``.
    pre : str
        The rule by which a ``gpt2`` vocabulary cuts words; empty for others.
    bos_id, eos_id, eot_id, unk_id : int or None
        The tokens that begin and end a text, end a turn, and stand for what the vocabulary lacks.
    eog_ids : frozenset of int
        All tokens after which generation stops.
    add_bos, add_eos : bool
        Whether `encode` puts them around a text.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.path = file.path
        self.model = file.require(_KEY + "model", str)
        self.pre = ""
        if self.model not in ("gpt2", "llama", "none", "no_vocab"):
            raise FormatError(
                file.path,
                f"the tokenizer '{self.model}' is not supported",
                offset=file.metadata.entry(_KEY + "model").offset,
                hint="pyggml knows gpt2, llama and none; `--tokens 1,2,3` does without",
            )
        self._has_vocabulary = self.model in ("gpt2", "llama")
        self._texts = _strings(file, _KEY + "tokens") if self._has_vocabulary else []
        self._n_vocab = len(self._texts) or _vocab_size(file)
        for i, text in enumerate(self._texts):
            if not text:
                self._texts[i] = f"[EMPTY_{i}]"
        self._ids = {text: i for i, text in enumerate(self._texts)}
        if len(self._ids) != len(self._texts):
            twice = next(text for i, text in enumerate(self._texts) if self._ids[text] != i)
            raise FormatError(
                file.path, f"the token {twice!r} is in the vocabulary twice", hint="convert the model again"
            )
        self._kinds: list[int] = self._numbers(file, "token_type", TokenKind.NORMAL)
        self._words = self._make_words(file)
        self._read_special(file)
        self._template_source = file.require("tokenizer.chat_template", str, None)

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """Read a file's vocabulary.

        Raises
        ------
        FormatError
            It is damaged, or of a kind that is not supported.

        Notes
        -----
        Mirrors `llama_vocab::impl::load`. Differs: tokens of the phi-3 family do not swallow the spaces after them.
        """
        return cls(file)

    def __repr__(self) -> str:
        return f"<Tokenizer of {self.path}: {self.model}{self.pre and '/' + self.pre}, {self.n_vocab:,} tokens>"

    @property
    def n_vocab(self) -> int:
        """How many tokens there are."""
        return self._n_vocab

    @property
    def has_vocabulary(self) -> bool:
        """Whether there is text at all; without, only ids can be evaluated."""
        return self._has_vocabulary

    # text to ids

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the ids of a text.

        Parameters
        ----------
        text : str
        add_special : bool
            Put the tokens that begin and end a text around it, if the file wants them.
        parse_special : bool
            Read the names of control tokens in the text as those tokens. Text that strangers wrote must not be
            read so.

        Raises
        ------
        PyggmlError
            The file has no vocabulary.

        Notes
        -----
        Mirrors `llama_vocab::impl::tokenize`.
        """
        if not self._has_vocabulary:
            raise PyggmlError(f"{self.path}: the file has no vocabulary", hint="give token ids: `--tokens 1,2,3`")
        text = text.encode("utf-8", "replace").decode()  # lone surrogates, as a terminal may hand over
        ids: list[int] = [self.bos_id] if add_special and self.add_bos and self.bos_id is not None else []
        after_special = True
        for part in self._partition(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
                after_special = True
                continue
            if self._add_space_prefix and after_special:
                part = " " + part
            ids += self._words.encode(part)
            after_special = False
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def _partition(self, text: str, parse_special: bool) -> list[str | int]:
        """Cut special tokens out of a text, the longest name first wherever it stands."""
        parts: list[str | int] = [text] if text else []
        for name, id in self._special:
            if name not in text or not (parse_special or self._kinds[id] == TokenKind.USER_DEFINED):
                continue
            cut: list[str | int] = []
            for part in parts:
                if isinstance(part, int):
                    cut.append(part)
                    continue
                for i, piece in enumerate(part.split(name)):
                    cut += ([id] if i else []) + ([piece] if piece else [])
            parts = cut
        return parts

    # ids to text

    def token_text(self, id: int) -> str:
        """Return a token as the vocabulary spells it.

        Raises
        ------
        PyggmlError
            There is no such token.
        """
        self._check(id)
        return self._texts[id] if self._has_vocabulary else f"[{id}]"

    def token_bytes(self, id: int, *, skip_special: bool = False) -> bytes:
        """Return what a token adds to a text: bytes, as a character may be spread over several tokens.

        Notes
        -----
        Mirrors `llama_vocab::impl::token_to_piece`. Differs: a character that no byte is spelled by stands for itself.
        """
        self._check(id)
        if not self._has_vocabulary:
            return f"[{id}]".encode()
        kind, text = self._kinds[id], self._texts[id]
        if kind in (TokenKind.CONTROL, TokenKind.UNKNOWN):
            return b"" if skip_special else text.encode()
        if kind == TokenKind.USER_DEFINED:
            return text.encode()
        if kind == TokenKind.BYTE:
            return _byte_of(text)
        if kind != TokenKind.NORMAL:
            return b""
        if self.model == "llama":
            return text.replace(_SPACE, " ").encode()
        return b"".join(bytes([byte]) if (byte := _BYTES.get(char)) is not None else char.encode() for char in text)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD.

        A space that `encode` put before the text is left out again.
        """
        hidden = (TokenKind.CONTROL, TokenKind.UNKNOWN) if skip_special and self._has_vocabulary else ()
        ids = [id for id in ids if not (hidden and 0 <= id < self._n_vocab and self._kinds[id] in hidden)]
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")
        prefixed = self._add_space_prefix and ids and self._kinds[ids[0]] == TokenKind.NORMAL
        return text[1:] if prefixed and text.startswith(" ") else text

    def _check(self, id: int) -> None:
        if not 0 <= id < self._n_vocab:
            raise PyggmlError(f"token {id} is not in 0..{self._n_vocab - 1}")

    # chat

    @property
    def chat_template(self) -> str | None:
        """The file's chat template, a Jinja text."""
        return self._template_source

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **values: Any
    ) -> str:
        """Write a conversation as the model was trained to read it; `encode` the result as it is.

        Parameters
        ----------
        messages : sequence of mappings
            ``{"role": "user", "content": "..."}`` and so on.
        add_generation_prompt : bool
            End with what begins the model's turn.
        **values
            More names for the template to see.

        Raises
        ------
        FormatError
            The file has no template, or it cannot be rendered.
        """
        if self._template is None:
            raise FormatError(self.path, "the file has no chat template", hint="give the prompt as it is")
        bos, eos = (self._texts[id] if id is not None and self._texts else "" for id in (self.bos_id, self.eos_id))
        text = self._template.render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            bos_token=bos,
            eos_token=eos,
            **values,
        )
        # `encode` puts it there
        return text.removeprefix(bos) if bos and self.add_bos else text

    @cached_property
    def _template(self) -> ChatTemplate | None:
        return ChatTemplate(self._template_source, self.path) if self._template_source else None

    # reading the file

    def _numbers(self, file: GGUFFile, name: str, missing: float) -> list[Any]:
        """Return an array of a number for each token."""
        key = _KEY + name
        if key not in file.metadata:
            return [missing] * len(self._texts)
        entry = file.metadata.entry(key)
        if entry.length is None or entry.type is ValueType.STRING or entry.length < len(self._texts):
            raise FormatError(
                file.path,
                f"'{key}' has not a number for each of {len(self._texts):,} tokens",
                offset=entry.offset,
                hint="convert the model again",
            )
        numbers: list[Any] = file.metadata[key].tolist()
        return numbers[: len(self._texts)]

    def _make_words(self, file: GGUFFile) -> _Words:
        self.add_bos, self.add_eos, self._add_space_prefix = False, False, False
        if self.model == "gpt2":
            self.pre = file.require(_KEY + "pre", str, "")
            if not self.pre:
                _log.warning("%s: no pre-tokenizer is named, 'default' is taken: text may be cut wrongly", file.path)
            if (self.pre or "default") not in PRETOKENIZERS:
                raise FormatError(
                    file.path,
                    f"the pre-tokenizer '{self.pre}' is not supported",
                    offset=file.metadata.entry(_KEY + "pre").offset,
                    hint=f"pyggml knows {', '.join(sorted(PRETOKENIZERS))}; `--tokens 1,2,3` does without",
                )
            self.add_bos = PRETOKENIZERS[self.pre or "default"].add_bos
            words: _Words = _BytePairs(file, self._ids, self.pre or "default")
        else:
            self.add_bos = self._add_space_prefix = self.model == "llama"
            words = _ScoredPieces(self._ids, self._numbers(file, "scores", 0.0))
        self.add_bos = file.require(_KEY + "add_bos_token", bool, self.add_bos)
        self.add_eos = file.require(_KEY + "add_eos_token", bool, self.add_eos)
        self._add_space_prefix = file.require(_KEY + "add_space_prefix", bool, self._add_space_prefix)
        return words

    def _read_special(self, file: GGUFFile) -> None:
        """Find the tokens with a meaning, as the file names them and by their texts."""
        defaults = {"gpt2": (11, 11, None), "llama": (1, 2, 0)}.get(self.model, (None, None, None))
        self.bos_id = self._id(file, "bos_token_id", defaults[0])
        self.eos_id = self._id(file, "eos_token_id", defaults[1])
        self.unk_id = self._id(file, "unknown_token_id", defaults[2])
        named: dict[str, int | None] = {}
        for name, texts in _NAMED.items():
            named[name] = self._id(file, f"{name}_token_id", None)
            if named[name] is None:
                named[name] = next((self._ids[text] for text in texts if text in self._ids), None)
                self._make_control(named[name])
        self.eot_id = named["eot"]
        ends = {self._ids[text] for text in _END_OF_GENERATION if text in self._ids}
        for id in ends:
            self._make_control(id)
        ends |= {end for name in ("fim_pad", "fim_rep", "fim_sep") if (end := named[name]) is not None}
        for text in _ALWAYS_SHOWN:
            if text in self._ids:
                self._kinds[self._ids[text]] = TokenKind.USER_DEFINED
        ends |= {end for end in (self.eos_id, self.eot_id, named["eom"]) if end is not None}
        self.eog_ids = frozenset(self._without_markers(ends))
        parsed = (TokenKind.CONTROL, TokenKind.USER_DEFINED, TokenKind.UNKNOWN)
        special = [
            (text, id) for id, (text, kind) in enumerate(zip(self._texts, self._kinds, strict=True)) if kind in parsed
        ]
        self._special = sorted(special, key=lambda pair: -len(pair[0].encode()))

    def _without_markers(self, ends: set[int]) -> set[int]:
        """Drop what ends a message but not the answer: of harmony's and solar's formats, and a plain ``</s>``."""
        texts = {self._texts[id]: id for id in ends if self._texts}
        calls = "<|call|>" in texts or "<|calls|>" in texts
        if "<|end|>" in texts and calls and ("<|return|>" in texts or "<|flush|>" in texts):
            ends = ends - {texts["<|end|>"]}
            self._kinds[texts["<|end|>"]] = TokenKind.USER_DEFINED
        if "</s>" in texts and "<|tool_response>" in texts:
            ends = ends - {texts["</s>"]}
            self._kinds[texts["</s>"]] = TokenKind.NORMAL
        return ends

    def _make_control(self, id: int | None) -> None:
        if id is not None:
            self._kinds[id] = TokenKind.CONTROL

    def _id(self, file: GGUFFile, name: str, default: int | None) -> int | None:
        found = file.require(_KEY + name, int, None)
        if found is not None and 0 <= found < self._n_vocab:
            return found
        if found is not None:
            _log.warning("%s: '%s' is %d, which is no token", file.path, _KEY + name, found)
        return default if default is not None and default < len(self._texts) else None


class StreamDecoder:
    """Text from ids as they come, never cut within a character.

    Parameters
    ----------
    tokenizer : Tokenizer
    skip_special : bool
        Leave control tokens out.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """Return the text that a token completes; empty while a character is still in parts."""
        return self._decoder.decode(self._tokenizer.token_bytes(id, skip_special=self._skip_special))

    def flush(self) -> str:
        """Return what is left: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", True)


class _BytePairs:
    """Words merged by rank; the `tokenizers` library, made when first needed."""

    def __init__(self, file: GGUFFile, ids: dict[str, int], pre: str) -> None:
        self._path, self._ids, self._rule = file.path, ids, PRETOKENIZERS[pre]
        self._merges = _strings(file, _KEY + "merges")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _library(self) -> Any:  # the library has no types
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        merges = []
        for i, merge in enumerate(self._merges):
            left, _, right = merge[1:].partition(" ")
            left = merge[:1] + left
            if not right or not {left, right, left + right} <= self._ids.keys():
                raise FormatError(
                    self._path, f"merge {i:,} ({merge!r}) makes no token of tokens", hint="convert the model again"
                )
            merges.append((left, right))
        library = Tokenizer(models.BPE(self._ids, merges, ignore_merges=self._rule.ignore_merges))
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self._rule.patterns]
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        return library


class _ScoredPieces:
    """Neighbours merged, the best score first, as long as a token comes of it; bytes for what is left.

    Notes
    -----
    Mirrors `llm_tokenizer_spm_session`. Differs: a byte without a token is left out, or becomes the unknown token;
    upstream raises out of its reader.
    """

    def __init__(self, ids: dict[str, int], scores: Sequence[float]) -> None:
        self._ids, self._scores = ids, scores
        unknown = ids.get("<unk>")
        self._bytes = [
            ids.get(f"<0x{byte:02X}>", ids.get(chr(byte), unknown) if byte < 128 else unknown) for byte in range(256)
        ]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self._merge(text.replace(" ", _SPACE)):
            id = self._ids.get(piece)
            ids += [id] if id is not None else [b for byte in piece.encode() if (b := self._bytes[byte]) is not None]
        return ids

    def _merge(self, text: str) -> list[str]:
        pieces = list(text)  # an absorbed piece becomes empty
        last = len(pieces)
        following, before = list(range(1, last + 1)), list(range(-1, last - 1))
        queue: list[tuple[float, int, int, int]] = []

        def consider(left: int, right: int) -> None:
            if left >= 0 and right < last:
                joined = pieces[left] + pieces[right]
                id = self._ids.get(joined)
                if id is not None:
                    heapq.heappush(queue, (-self._scores[id], left, right, len(joined)))

        for i in range(1, last):
            consider(i - 1, i)
        while queue:
            _, left, right, length = heapq.heappop(queue)
            if not pieces[left] or not pieces[right] or len(pieces[left]) + len(pieces[right]) != length:
                continue  # one of them has been merged since
            pieces[left] += pieces[right]
            pieces[right] = ""
            following[left] = following[right]
            if following[right] < last:
                before[following[right]] = left
            consider(before[left], left)
            consider(left, following[left])
        return [piece for piece in pieces if piece]


def _strings(file: GGUFFile, key: str) -> list[str]:
    if key not in file.metadata:
        raise FormatError(file.path, f"no key '{key}'", hint="the file has no vocabulary: convert the model again")
    entry = file.metadata.entry(key)
    if entry.type is not ValueType.STRING or entry.length is None:
        raise FormatError(file.path, f"'{key}' is no array of strings", offset=entry.offset, hint="convert it again")
    return list(file.metadata[key])


def _vocab_size(file: GGUFFile) -> int:
    """Return the number of tokens where no vocabulary tells."""
    arch = file.require("general.architecture", str, "")
    size = file.require(f"{arch}.vocab_size", int, None)
    if size is None:
        size = file.tensors["token_embd.weight"].ne[1] if "token_embd.weight" in file.tensors else 0
    return size


def _byte_of(text: str) -> bytes:
    """Return the byte that ``<0x0A>`` spells; the text itself if it spells none."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes([int(text[3:5], 16)])
        except ValueError:
            pass
    return text.encode()


def _spell_bytes() -> dict[str, int]:
    """Return which byte each character of a byte-pair vocabulary stands for.

    Printable bytes stand for themselves; the others were given, in order, the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _spell_bytes()
