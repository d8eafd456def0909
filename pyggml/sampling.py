"""Choosing the next token from logits: greedy, or with temperature, top-k, top-p, min-p and a seed.

A sampler is a callable that takes logits, float32 ``(n_vocab,)``, and returns a token id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import GraphError

__all__ = ["Sampler", "SamplerFlags", "greedy", "make_sampler"]

Sampler = Callable[[npt.NDArray[np.float32]], int]


def greedy(logits: npt.NDArray[np.float32]) -> int:
    """Return the most likely token, or the first of several.

    Raises
    ------
    GraphError
        A logit is NaN.
    """
    token = int(logits.argmax())  # the index of NaN, if there is one
    if np.isnan(logits[token]):
        raise GraphError("no token can be chosen: the logits contain NaN")
    return token


@dataclass(frozen=True, slots=True)
class SamplerFlags:
    """How tokens are sampled.

    Notes
    -----
    Names and meaning are llama.cpp's. Differs: ``temperature`` is 0, greedy, by default.
    """

    temperature: float = 0.0
    top_k: int = 40  #: sample only from the k most likely; 0: all
    top_p: float = 0.95  #: sample only from the most likely whose probabilities sum to p; 1: all
    min_p: float = 0.05  #: sample only from those at least p times as likely as the most likely; 0: all
    seed: int | None = None  #: None: a different result each time

    def check(self) -> None:
        """Check that the numbers are in range.

        Raises
        ------
        GraphError
            A number is out of range.
        """
        if not self.temperature >= 0.0:
            raise GraphError(f"the temperature is {self.temperature}; it must be at least 0")
        if self.top_k < 0:
            raise GraphError(f"top-k is {self.top_k}; it must be at least 0", hint="0 means all tokens")
        for name, p in (("top-p", self.top_p), ("min-p", self.min_p)):
            if not 0.0 <= p <= 1.0:
                raise GraphError(f"{name} is {p}; it must be from 0 to 1")


def make_sampler(flags: SamplerFlags) -> Sampler:
    """Return a sampler; `greedy` at temperature 0.

    Raises
    ------
    GraphError
        A flag is out of range.
    """
    flags.check()
    return greedy if flags.temperature == 0.0 else _Random(flags)


class _Random:
    """Draws a token at random.

    Notes
    -----
    Mirrors the order of `common_sampler`'s default chain: top-k, top-p, min-p, then the temperature.
    """

    def __init__(self, flags: SamplerFlags) -> None:
        self.flags = flags
        self.rng = np.random.Generator(np.random.PCG64(flags.seed))

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        if not np.isfinite(largest := logits.max()):
            raise GraphError(f"no token can be drawn: the largest logit is {largest}")
        order = self._candidates(logits)
        values = logits[order].astype(np.float64)
        scaled = _softmax(values / self.flags.temperature)
        return int(order[np.searchsorted(np.cumsum(scaled), self.rng.random(), side="right").clip(max=len(order) - 1)])

    def _candidates(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Return the ids of likely tokens, most likely first, then by id."""
        flags, n = self.flags, len(logits)
        if 0 < flags.top_k < n:
            part = np.argpartition(-logits, flags.top_k - 1)[: flags.top_k]
            order = part[np.lexsort((part, -logits[part]))]
        else:
            order = np.argsort(-logits, kind="stable")
        probs = _softmax(logits[order].astype(np.float64))
        if flags.top_p < 1.0:
            n_kept = int(np.searchsorted(np.cumsum(probs), flags.top_p)) + 1
            order, probs = order[:n_kept], probs[:n_kept]
        if flags.min_p > 0.0:
            order = order[probs >= flags.min_p * probs[0]]
        kept: npt.NDArray[np.int64] = order
        return kept


def _softmax(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    powers = np.exp(values - values.max())
    probs: npt.NDArray[np.float64] = powers / powers.sum()
    return probs
