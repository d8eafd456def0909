"""Finds settings that fill cards: shares of several ones, and feed-forward weights of a dense model on the host."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf

from ..foresight import Setting
from ..models.placement import DENSE_FFN
from .search import Search
from .settings import DEFAULT_BATCH, last_experts, last_ffn

__all__ = ["filling", "with_cache"]

#: What a first guess leaves on each card for compute buffers.
_GUESS_BYTES = 1 << 30
#: Guesses that the scheduler is asked about, each corrected by what it says of the one before.
_MOST_GUESSES = 4
#: What attention on the card must gain to be planned at all.
_GAIN = 1.01


def filling(search: Search, like: Setting, *, limit: float = inf) -> Iterator[Setting]:
    """Yield settings like one with weights on the host, whose cards are as full as their margin allows.

    With experts on the host either the first card takes the rest of the layers, with the experts of the first ones on the host
    (``-ncmoe``), or the last card, with those of the last ones (``-ot``). Of a model that is on cards alone, the slower ones
    are left out. Of a dense model a card has attention and KV cache of as many layers as it can, and the host feed-forward
    weights: with a long prompt in the cache the CPU's attention costs more than what it reads of weights. ``limit``: seconds of
    the best setting that is known, which a dense model's must beat.
    """
    n_cards, is_dense = len(search.machine.cards), not search.shape.n_expert
    if n_cards == 1 and like.n_gpu_layers >= 0 and is_dense:
        yield from _with_attention_on_card(search, like, limit)
    if n_cards < 2 or (like.n_gpu_layers >= 0 and not is_dense):
        return
    if not (like.n_cpu_moe or like.overrides or like.n_gpu_layers >= 0):
        yield from _on_fewer(search, like)
        return
    for n_ubatch in {like.n_ubatch, DEFAULT_BATCH}:
        for rest, others in _divisions(search):
            found = _fill(
                search,
                replace(like, n_ubatch=n_ubatch, n_gpu_layers=-1),
                rest,
                others,
                limit=limit if is_dense else inf,
            )
            if found is not None:
                yield found


def with_cache(search: Search, like: Setting) -> Iterator[Setting]:
    """Yield settings like one with experts on the host, in which an expert cache takes what is left of one card.

    That card has all layers with host experts, and the others whole ones or none.
    """
    memory = search.memory
    if len(search.machine.cards) < 2 or not (like.n_cpu_moe or like.overrides) or like.n_gpu_layers >= 0:
        return
    for rest, others in _divisions(search):
        full = _fill(search, like, rest, others)
        if full is None:
            continue
        shares = full.tensor_split
        most = int(shares[rest]) - (not any(shares[rest + 1 :]))  # the last card has the output
        if memory.exact(_on_host(search, like, shares, rest, most)) is None:
            continue
        found: list[Setting] = []
        for n_host in range(1, most + 1):
            setting = _on_host(search, like, shares, rest, n_host)
            taken = memory.estimate(setting)
            if taken is not None and (left := memory.spare_for_slots(setting, taken) >> 20) > 0:
                found.append(replace(setting, moe_cache_mib=left))
        yield from sorted(found, key=lambda s: search.score(s).seconds)[:1]


def _divisions(search: Search) -> Iterator[tuple[int, list[int]]]:
    """Yield the card that takes layers with host experts, the first or the last of those in use, and the others that take whole layers."""
    cards = search.machine.cards
    for slowest in [0.0, *sorted({card.bytes_per_s for card in cards})[:-1]]:
        kept = [i for i, card in enumerate(cards) if card.bytes_per_s > slowest]
        for rest in dict.fromkeys((kept[0], kept[-1])):
            yield rest, [i for i in kept if i != rest]


def _on_host(search: Search, like: Setting, shares: Sequence[float], rest: int, n_host: int) -> Setting:
    """Return a setting with shares in layers, and experts or feed-forward weights of so many layers of one card on the host."""
    at_end, is_dense = any(shares[:rest]), not search.shape.n_expert
    n_layer = search.memory.n_layer
    overrides: tuple[str, ...] = ()
    if n_host and (at_end or is_dense):
        at_last = (last_ffn if is_dense else last_experts)(n_host, n_layer)
        overrides = (at_last if at_end else f"--n-cpu-ffn {n_host}",)
    return replace(
        like, tensor_split=tuple(map(float, shares)), n_cpu_moe=0 if at_end or is_dense else n_host, overrides=overrides
    )  # fmt: skip


def _on_fewer(search: Search, like: Setting) -> Iterator[Setting]:
    """Yield settings without the slowest card, without the two slowest, and so on; cards of one speed stay together."""
    cards = search.machine.cards
    for slowest in sorted({card.bytes_per_s for card in cards})[:-1]:
        kept = [card.memory_bytes / 2**30 if card.bytes_per_s > slowest else 0.0 for card in cards]
        for n_ubatch in {like.n_ubatch, DEFAULT_BATCH}:
            yield replace(like, n_ubatch=n_ubatch, tensor_split=tuple(kept))


def _ffn_bytes(search: Search) -> int:
    """Return the most bytes of dense feed-forward weights of a layer."""
    layers = search.shape.layers
    return max(sum(x.nbytes for x in layer.products if re.match(DENSE_FFN, f".{x.name}")) for layer in layers)


def _with_attention_on_card(search: Search, like: Setting, limit: float) -> Iterator[Setting]:
    """Yield the fastest setting whose card has attention of as many layers as fit, if it takes noteworthily less than so many seconds."""
    memory, n_layer = search.memory, search.memory.n_layer
    layers = search.shape.layers
    ffn = _ffn_bytes(search)
    kv = memory.kv_bytes(like) // n_layer if like.kv_offload else 0
    other = max(layer.other_bytes for layer in layers) - ffn + kv
    taken = memory.exact(like)
    if not ffn or taken is None:
        return
    now = taken[0]
    compute = now.bytes - memory.weights(like)[0] - max(like.n_gpu_layers - 1, 0) * kv
    found: list[Setting] = []
    for n_ubatch in {like.n_ubatch, DEFAULT_BATCH}:
        room = (
            now.of_bytes - now.margin_bytes - compute * max(1, n_ubatch // like.n_ubatch) - search.shape.output.nbytes
        )
        seen: set[Setting] = set()
        while len(seen) < _MOST_GUESSES:
            n_on = min(max(room, 0) // other, n_layer)
            n_host = max(n_layer - max(room - n_layer * other, 0) // ffn, 1)
            guess = replace(
                like, n_gpu_layers=-1 if n_on == n_layer else n_on + 1, n_ubatch=n_ubatch, overrides=(f"--n-cpu-ffn {n_host}",)
            )  # fmt: skip
            if guess in seen or search.score(guess).seconds > limit / _GAIN:
                break
            seen.add(guess)
            taken = memory.exact(guess)
            if taken is None:
                break
            if all(d.fits for d in taken):
                found.append(guess)
            room += taken[0].of_bytes - taken[0].margin_bytes - taken[0].bytes
    yield from sorted(found, key=lambda s: search.score(s).seconds)[:1]


def _fill(search: Search, like: Setting, rest: int, others: list[int], *, limit: float = inf) -> Setting | None:
    """Return the fastest guess that fits; None if none does.

    Parameters
    ----------
    rest : int
        The card that takes the layers that have no place on the others, which are all before it or all behind it.
    limit : float
        Seconds from which on guesses are given up.
    """
    memory, n_layer = search.memory, search.memory.n_layer
    cards = [card.memory_bytes for card in search.machine.cards]
    shape = search.shape.layers
    expert = max(layer.expert_bytes for layer in shape) or _ffn_bytes(search)
    other = max(layer.other_bytes + layer.expert_bytes for layer in shape) - expert + memory.kv_bytes(like) // n_layer
    whole = expert + other
    if not expert:
        return None

    room = [size - memory.margin_bytes - _GUESS_BYTES for size in cards]
    shares = [max(n // whole, 0) if i in others else 0 for i, n in enumerate(room)]
    shares[rest] = n_layer + 1 - sum(shares[i] for i in others)
    n_host = shares[rest] - max(room[rest] - shares[rest] * other, 0) // expert
    fitting: list[Setting] = []
    seen: set[Setting] = set()
    for _ in range(_MOST_GUESSES):
        n_host = min(max(n_host, 0), n_layer)
        if shares[rest] < 1:
            break
        guess = _on_host(search, like, shares, rest, n_host)
        taken = None if guess in seen or search.score(guess).seconds > limit else memory.exact(guess)
        if taken is None:
            break
        seen.add(guess)
        if all(d.fits for d in taken):
            fitting.append(guess)
        spare = [d.of_bytes - d.margin_bytes - d.bytes for d in taken[:-1]]
        moved = 0
        for i in others:
            more = max(spare[i] // whole, -shares[i])
            shares[i] += more
            moved += more
        shares[rest] -= moved
        # a layer that moves had its experts on the host
        n_host -= moved + (spare[rest] + moved * other) // expert
    return min(fitting, key=lambda s: search.score(s).seconds, default=None)
