"""Text to token ids and back, with the vocabulary in the model's file.

::

    tokenizer = Tokenizer.from_gguf(file)
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    stream = StreamDecoder(tokenizer)
    for id in generated:
        print(stream.feed(id), end="")

There are three kinds of vocabularies: ``gpt2`` (byte pairs, merged by rank, with the `tokenizers` library), ``llama``
(pieces with scores, merged by score; the library lacks this, so the loop is here), and ``none``.

Special tokens: `encode` adds BOS before a text and EOS after it if the file requests them (`add_bos`, `add_eos`), and for
``llama`` a space before each piece of text that begins the text or follows a special token (``add_space_prefix``). A chat
template may also write BOS and EOS. `apply_chat_template` removes a BOS at the start and an EOS at the end of its text if
`encode` adds them, so that the encoded text has each once. `encode_chat` does both, and is the only way to evaluate a
conversation.
"""

from __future__ import annotations

import codecs
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from ..errors import FormatError, PyggmlError
from ..gguf import GGUFFile, ValueType
from .chat_template import ChatTemplate
from .pretokenizers import PRETOKENIZERS
from .special import TokenKind, find_special
from .words import SPACE, BytePairs, ScoredPieces, Words, as_bytes, byte_of, bytes_of

__all__ = ["StreamDecoder", "Tokenizer"]

_log = logging.getLogger(__name__)

_KEY = "tokenizer.ggml."


class Tokenizer:
    """The vocabulary of a file.

    Attributes
    ----------
    model : str
        ``"gpt2"``, ``"llama"`` or ``"none"``.
    pre : str
        The rule by which a ``gpt2`` vocabulary splits words; empty for others.
    bos_id, eos_id, eot_id, unk_id : int or None
        The tokens that begin a text, end a text, end a turn, and replace text outside the vocabulary.
    eog_ids : frozenset of int
        All tokens after which generation stops.
    add_bos, add_eos : bool
        Whether `encode` adds BOS before and EOS after a text.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.path = file.path
        self.model = file.require(_KEY + "model", str)
        self.pre = ""
        #: Why no text can be encoded; ids can still be evaluated.
        self._unreadable: FormatError | None = None
        if self.model not in ("gpt2", "llama", "none", "no_vocab"):
            self._unreadable = FormatError(
                file.path,
                f"the tokenizer '{self.model}' is not supported",
                offset=file.metadata.entry(_KEY + "model").offset,
                hint="pyggml supports gpt2, llama and none; `--tokens 1,2,3` needs no tokenizer",
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
        special = find_special(file, self.model, self._ids, self._kinds, self._n_vocab)
        self.bos_id, self.eos_id, self.eot_id, self.unk_id = special.bos, special.eos, special.eot, special.unknown
        self.eog_ids = special.ends
        self._special = self._names_to_parse()
        self._template_source = file.require("tokenizer.chat_template", str, None)

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """Read a file's vocabulary.

        A vocabulary of an unsupported kind or pre-tokenizer is also read, but cannot encode text.

        Raises
        ------
        FormatError
            The vocabulary is damaged.

        Notes
        -----
        Mirrors `llama_vocab::impl::load`. Differs: tokens of the phi-3 family do not swallow the spaces after them.
        """
        return cls(file)

    def __repr__(self) -> str:
        return f"<Tokenizer of {self.path}: {self.model}{self.pre and '/' + self.pre}, {self.n_vocab:,} tokens>"

    @property
    def n_vocab(self) -> int:
        """The number of tokens."""
        return self._n_vocab

    @property
    def has_vocabulary(self) -> bool:
        """Whether tokens have texts; without texts, only ids can be evaluated."""
        return self._has_vocabulary

    @property
    def can_encode(self) -> bool:
        """Whether texts can be encoded: the vocabulary has texts, and its kind is supported."""
        return self._has_vocabulary and self._unreadable is None

    # text to ids

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the ids of a text.

        Parameters
        ----------
        text : str
        add_special : bool
            Add BOS and EOS if the file requests them.
        parse_special : bool
            Encode names of control tokens in the text as these tokens. Do not use this for untrusted text.

        Raises
        ------
        PyggmlError
            The file has no vocabulary, or one of an unsupported kind.

        Notes
        -----
        Mirrors `llama_vocab::impl::tokenize`.
        """
        if self._unreadable is not None and (text or not self._has_vocabulary):
            raise self._unreadable
        if not self._has_vocabulary:
            raise PyggmlError(
                f"{self.path}: the file has no vocabulary",
                hint="give token ids: `run --tokens 1,2,3`; `savings --routing uniform` and plans need none",
            )
        text = text.encode("utf-8", "replace").decode()  # lone surrogates, which a terminal may send
        ids: list[int] = [self.bos_id] if add_special and self.add_bos and self.bos_id is not None else []
        after_special = True
        for part in self._partition(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
                after_special = True
                continue
            if self.model == "llama" and self._add_space_prefix and after_special:
                part = " " + part
            ids += self._words.encode(part)
            after_special = False
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def _partition(self, text: str, parse_special: bool) -> list[str | int]:
        """Split a text at special tokens, longest names first."""
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
        """Return the text of a token in the vocabulary.

        Raises
        ------
        PyggmlError
            There is no such token.
        """
        self._check(id)
        return self._texts[id] if self._has_vocabulary else f"[{id}]"

    def token_bytes(self, id: int, *, skip_special: bool = False) -> bytes:
        """Return the bytes that a token adds to a text; a character can consist of several tokens.

        Notes
        -----
        Mirrors `llama_vocab::impl::token_to_piece`. Differs: a character that spells no byte is kept.
        """
        self._check(id)
        if not self._has_vocabulary:
            return f"[{id}]".encode()
        kind, text = self._kinds[id], self._texts[id]
        if kind in (TokenKind.CONTROL, TokenKind.UNKNOWN):
            return b"" if skip_special else as_bytes(text)
        if kind == TokenKind.USER_DEFINED:
            return as_bytes(text)
        if kind == TokenKind.BYTE:
            return byte_of(text)
        if kind != TokenKind.NORMAL:
            return b""
        if self.model == "llama":
            return as_bytes(text.replace(SPACE, " "))
        return bytes_of(text)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD.

        A space that `encode` added before the text is removed.
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
        """Return a conversation in the model's format, without the tokens that `encode` adds; see `encode_chat`.

        Parameters
        ----------
        messages : sequence of mappings
            ``{"role": "user", "content": "..."}`` and so on.
        add_generation_prompt : bool
            End with the beginning of the model's turn.
        **values
            More names that the template can use.

        Raises
        ------
        FormatError
            The file has no template, or it cannot be rendered.
        """
        if self._template is None:
            raise FormatError(self.path, "the file has no chat template", hint="give the prompt without --chat")
        bos, eos = (self._texts[id] if id is not None and self._texts else "" for id in (self.bos_id, self.eos_id))
        text = self._template.render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            bos_token=bos,
            eos_token=eos,
            **values,
        )
        if bos and self.add_bos:
            text = text.removeprefix(bos)
        return text.removesuffix(eos) if eos and self.add_eos else text

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **values: Any
    ) -> list[int]:
        """Return the ids of a conversation, with BOS and EOS once each if the file requests them.

        Parameters and errors are those of `apply_chat_template`.

        Notes
        -----
        Mirrors `common_chat_template_direct_apply` and how llama.cpp's server tokenizes its result.
        """
        return self.encode(self.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, **values))

    @cached_property
    def _template(self) -> ChatTemplate | None:
        return ChatTemplate(self._template_source, self.path) if self._template_source else None

    # reading the file

    def _numbers(self, file: GGUFFile, name: str, missing: float) -> list[Any]:
        """Return an array with a number for each token."""
        key = _KEY + name
        if key not in file.metadata:
            return [missing] * len(self._texts)
        entry = file.metadata.entry(key)
        if entry.length is None or entry.type is ValueType.STRING or entry.length < len(self._texts):
            raise FormatError(
                file.path,
                f"'{key}' does not have a number for each of {len(self._texts):,} tokens",
                offset=entry.offset,
                hint="convert the model again",
            )
        numbers: list[Any] = file.metadata[key].tolist()
        return numbers[: len(self._texts)]

    def _make_words(self, file: GGUFFile) -> Words:
        self.add_bos, self.add_eos, self._add_space_prefix = False, False, False
        if self.model == "gpt2":
            self.pre = file.require(_KEY + "pre", str, "")
            if not self.pre:
                _log.warning(
                    "%s: the file names no pre-tokenizer; 'default' is used and may split text wrongly", file.path
                )
            rule = self.pre or "default"
            if rule not in PRETOKENIZERS:
                self._unreadable = FormatError(
                    file.path,
                    f"the pre-tokenizer '{self.pre}' is not supported",
                    offset=file.metadata.entry(_KEY + "pre").offset,
                    hint=f"pyggml supports {', '.join(sorted(PRETOKENIZERS))}; `--tokens 1,2,3` needs no tokenizer",
                )
                rule = "default"
            self.add_bos = PRETOKENIZERS[rule].add_bos
            merges = [] if self._unreadable else _strings(file, _KEY + "merges")
            words: Words = BytePairs(self._ids, merges, rule)
        else:
            self.add_bos = self._add_space_prefix = self.model == "llama"
            words = ScoredPieces(self._ids, self._numbers(file, "scores", 0.0))
        self.add_bos = file.require(_KEY + "add_bos_token", bool, self.add_bos)
        self.add_eos = file.require(_KEY + "add_eos_token", bool, self.add_eos)
        self._add_space_prefix = file.require(_KEY + "add_space_prefix", bool, self._add_space_prefix)
        return words

    def _names_to_parse(self) -> list[tuple[str, int]]:
        """Return the names that are tokens anywhere in a text, the longest first."""
        parsed = (TokenKind.CONTROL, TokenKind.USER_DEFINED, TokenKind.UNKNOWN)
        kinds = zip(self._texts, self._kinds, strict=True)
        return sorted(
            ((text, id) for id, (text, kind) in enumerate(kinds) if kind in parsed),
            key=lambda pair: -len(as_bytes(pair[0])),
        )


class StreamDecoder:
    """Text from ids one by one, never split within a character.

    Parameters
    ----------
    tokenizer : Tokenizer
    skip_special : bool
        Omit control tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """Return the text that a token completes; empty while a character is incomplete."""
        return self._decoder.decode(self._tokenizer.token_bytes(id, skip_special=self._skip_special))

    def flush(self) -> str:
        """Return the rest: U+FFFD for an incomplete character."""
        return self._decoder.decode(b"", True)


def _strings(file: GGUFFile, key: str) -> list[str]:
    if key not in file.metadata:
        raise FormatError(file.path, f"no key '{key}'", hint="the file has no vocabulary: convert the model again")
    entry = file.metadata.entry(key)
    if entry.type is not ValueType.STRING or entry.length is None:
        raise FormatError(
            file.path, f"'{key}' is not an array of strings", offset=entry.offset, hint="convert it again"
        )
    return list(file.metadata[key])


def _vocab_size(file: GGUFFile) -> int:
    """Return the number of tokens of a file without a vocabulary."""
    arch = file.require("general.architecture", str, "")
    size = file.require(f"{arch}.vocab_size", int, None)
    if size is None:
        size = file.tensors["token_embd.weight"].ne[1] if "token_embd.weight" in file.tensors else 0
    return size
