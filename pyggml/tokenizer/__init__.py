"""Text to token ids and back, by the vocabulary of the model's own file."""

from .special import TokenKind
from .tokenizer import StreamDecoder, Tokenizer

__all__ = ["StreamDecoder", "TokenKind", "Tokenizer"]
