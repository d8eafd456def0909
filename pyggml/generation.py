"""`Generator`: generates tokens one by one with anything that returns logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from .models.kv_cache import CacheFullError
from .sampling import Sampler, greedy

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .models.batch import Outputs

__all__ = ["Generator"]


class Generator(ABC):
    """An object that evaluates tokens and keeps them in a cache, such as `Session` and `LlamaModel`."""

    @abstractmethod
    def decode(self, tokens: Sequence[int], *, outputs: Outputs = "last", seq: int = 0) -> npt.NDArray[np.float32]:
        """Evaluate the next tokens of a sequence and return logits, float32 ``(n_outputs, n_vocab)``."""

    def generate(
        self,
        prompt: Sequence[int],
        n_predict: int,
        sampler: Sampler = greedy,
        *,
        stop: Collection[int] = (),
        seq: int = 0,
    ) -> Iterator[int]:
        """Evaluate a prompt and yield the tokens that follow, one by one.

        Parameters
        ----------
        prompt : sequence of int
            Ids that follow the tokens in the cache.
        n_predict : int
            The maximum number of yielded tokens.
        sampler : callable
            Takes logits, float32 ``(n_vocab,)``, and returns an id.
        stop : collection of int
            Ids that end the generation, such as ``Tokenizer.eog_ids``; they are not yielded.

        Yields
        ------
        int
            Ends early at a token of ``stop``, and when the context is full.

        Raises
        ------
        GraphError, CacheFullError
            As `decode`, before the first token.
        """
        logits = self.decode(prompt, outputs="last", seq=seq)
        return self.continue_from(logits[-1], n_predict, sampler, stop=stop, seq=seq)

    def continue_from(
        self,
        logits: npt.NDArray[np.float32],
        n_predict: int,
        sampler: Sampler = greedy,
        *,
        stop: Collection[int] = (),
        seq: int = 0,
    ) -> Iterator[int]:
        """Yield the tokens that follow a decode, one by one; see `generate`.

        Parameters
        ----------
        logits : float32, (n_vocab,)
            The logits of the last decoded token.
        """
        for i in range(n_predict):
            token = sampler(logits)
            if token in stop:
                return
            yield token
            if i + 1 < n_predict:
                try:
                    logits = self.decode([token], outputs="last", seq=seq)[-1]
                except CacheFullError:
                    return
