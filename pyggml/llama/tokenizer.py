"""`LlamaTokenizer`: text and ids by the vocabulary that llama.cpp has loaded, of every kind that it knows."""

from __future__ import annotations

from collections.abc import Iterable

from ..gguf import GGUFFile
from ..tokenizer import Tokenizer
from .model import LlamaModel

__all__ = ["LlamaTokenizer"]


class LlamaTokenizer(Tokenizer):
    """A file's vocabulary, of which llama.cpp reads texts; chat templates are rendered by pyggml.

    Parameters
    ----------
    model : LlamaModel
        An open model of the file.

    Raises
    ------
    FormatError
        The vocabulary is damaged.
    """

    def __init__(self, model: LlamaModel, file: GGUFFile) -> None:
        super().__init__(file)
        self._llama = model
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self._n_vocab, self.eog_ids = model.n_vocab, model.eog_ids
        self._has_vocabulary = self.model not in ("none", "no_vocab")
        self._unreadable = None

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return llama.cpp's ids of a text; see `Tokenizer.encode`."""
        if not self._has_vocabulary:
            return super().encode(text)  # raises
        return self._llama.tokenize(text, add_special=add_special, parse_special=parse_special)

    def token_text(self, id: int) -> str:
        """Return the text of a token."""
        return self.token_bytes(id).decode("utf-8", "replace")

    def token_bytes(self, id: int, *, skip_special: bool = False) -> bytes:
        """Return the bytes that a token adds to a text."""
        self._check(id)
        if not self._has_vocabulary:
            return super().token_bytes(id)
        key = id, skip_special
        if key not in self._pieces:
            (self._pieces[key],) = self._llama.pieces([id], special=not skip_special)
        return self._pieces[key]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return llama.cpp's text of ids; bytes that are not UTF-8 become U+FFFD."""
        if not self._has_vocabulary:
            return super().decode(ids, skip_special=skip_special)
        return self._llama.detokenize(list(ids), special=not skip_special)
