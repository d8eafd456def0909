"""Pieces of text to ids: byte pairs merged by rank, and pieces merged by score."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

from .pretokenizers import PRETOKENIZERS

__all__ = ["SPACE", "BytePairs", "ScoredPieces", "Words", "as_bytes", "byte_of", "bytes_of"]

SPACE = "\u2581"  #: how a piece with a score spells a space


class Words(Protocol):
    """Encodes a piece of text without special tokens."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a piece of text."""


class BytePairs:
    """Words merged by rank, with the `tokenizers` library, which is set up on first use.

    Parameters
    ----------
    ids : dict of str to int
    merges : list of str
        Pairs of tokens separated by a space, in the order of merging.
    pre : str
        The rule by which text is split into words.

    Notes
    -----
    Mirrors `llm_tokenizer_bpe_session`: the result of a merge need not be a token, as in pruned vocabularies. A final
    piece that is not a token is spelled by its ASCII characters, each of which may be a token. Differs: with
    `ignore_merges`, results of merges that are not tokens are also kept whole, like words that are tokens.
    """

    def __init__(self, ids: dict[str, int], merges: list[str], pre: str) -> None:
        self._ids, self._merges, self._rule = ids, merges, PRETOKENIZERS[pre]
        self._spelled: dict[int, list[int]] = {}  # pieces that are not tokens

    def encode(self, text: str) -> list[int]:
        """Return the ids of a piece of text."""
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        if not self._spelled:
            return ids
        return [token for id in ids for token in self._spelled.get(id, (id,))]

    @cached_property
    def _library(self) -> Any:  # the library has no types
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        merges: dict[tuple[str, str], None] = {}
        # text is UTF-8, and the library accepts no other pieces
        pieces = {text: id for text, id in self._ids.items() if text.isascii() or _is_utf8(text)}
        n_tokens = max(self._ids.values(), default=-1) + 1
        for merge in self._merges:
            left, _, right = merge[1:].partition(" ")
            if not right or not _is_utf8(merge):
                continue
            left = merge[:1] + left
            merges[left, right] = None
            for piece in (left, right, left + right):
                if pieces.setdefault(piece, n_tokens + len(pieces)) >= n_tokens:
                    self._spelled[pieces[piece]] = [self._ids[c] for c in piece if c.isascii() and c in self._ids]
        library = Tokenizer(models.BPE(pieces, list(merges), ignore_merges=self._rule.ignore_merges))
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self._rule.patterns]
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        return library


class ScoredPieces:
    """Merges neighbours with the best score first while the result is a token; the rest is encoded as bytes.

    Notes
    -----
    Mirrors `llm_tokenizer_spm_session`. Differs: a byte without a token is omitted, or becomes the unknown token;
    upstream throws an exception.
    """

    def __init__(self, ids: dict[str, int], scores: Sequence[float]) -> None:
        self._ids, self._scores = ids, scores
        unknown = ids.get("<unk>")
        self._bytes = [
            ids.get(f"<0x{byte:02X}>", ids.get(chr(byte), unknown) if byte < 128 else unknown) for byte in range(256)
        ]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a piece of text."""
        ids: list[int] = []
        for piece in self._merge(text.replace(" ", SPACE)):
            id = self._ids.get(piece)
            ids += [id] if id is not None else [b for byte in piece.encode() if (b := self._bytes[byte]) is not None]
        return ids

    def _merge(self, text: str) -> list[str]:
        pieces = list(text)  # a merged piece becomes empty
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
                continue  # one of them was merged in the meantime
            pieces[left] += pieces[right]
            pieces[right] = ""
            following[left] = following[right]
            if following[right] < last:
                before[following[right]] = left
            consider(before[left], left)
            consider(left, following[left])
        return [piece for piece in pieces if piece]


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def as_bytes(text: str) -> bytes:
    """Return the bytes of a token in the file, which may not be UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def byte_of(text: str) -> bytes:
    """Return the byte that a text such as ``<0x0A>`` spells, or else the text."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes([int(text[3:5], 16)])
        except ValueError:
            pass
    return as_bytes(text)


def _spell_bytes() -> dict[str, int]:
    """Return the byte of each character in a byte-pair vocabulary.

    Printable bytes are their own characters; the others have, in order, the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _spell_bytes()


def bytes_of(text: str) -> bytes:
    """Return the bytes of a token in a byte-pair vocabulary; a character that spells no byte is kept."""
    return b"".join(bytes([byte]) if (byte := _BYTES.get(char)) is not None else as_bytes(char) for char in text)
