"""`run --interactive`: turns with a model, whose cache keeps what stays the same between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..llama import LlamaModel
    from ..sampling import Sampler
    from ..session import Session
    from ..tokenizer import Tokenizer

__all__ = ["Conversation", "common_prefix"]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many leading elements are equal.

    Examples
    --------
    >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


@dataclass(slots=True)
class Conversation:
    """Messages so far, and the ids that the session's cache holds of them."""

    session: Session | LlamaModel
    tokenizer: Tokenizer
    sampler: Sampler
    messages: list[dict[str, str]] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    n_reused: int = 0  #: tokens of the latest turn that were in the cache already

    def turn(self, text: str, n_predict: int, emit: Callable[[str], None]) -> str:
        """Say something and return the answer, which ``emit`` gets piece by piece.

        Raises
        ------
        CacheFullError
            The conversation is longer than the context. The turn is taken back.
        """
        from ..tokenizer import StreamDecoder

        self.messages.append({"role": "user", "content": text})
        try:
            ids = self.tokenizer.encode_chat(self.messages)
            # at least one token must be evaluated to get logits
            self.n_reused = min(common_prefix(self.cached, ids), len(ids) - 1)
            if not self.session.can_rewind(self.n_reused):
                self.n_reused = 0
            self.session.rewind(self.n_reused)
            logits = self.session.decode(ids[self.n_reused :])[-1]
        except BaseException:
            self.messages.pop()
            self.cached = self.cached[: self.session.n_past]
            raise
        decoder = StreamDecoder(self.tokenizer)
        answer, given = "", list(ids)
        for id in self.session.continue_from(logits, n_predict, self.sampler, stop=self.tokenizer.eog_ids):
            given.append(id)
            answer += (piece := decoder.feed(id))
            emit(piece)
        answer += (piece := decoder.flush())
        emit(piece)
        self.cached = given[: self.session.n_past]  # the last token that was drawn is not evaluated
        self.messages.append({"role": "assistant", "content": answer})
        return answer
