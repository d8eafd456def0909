"""Replay: what a policy with a capacity would have read, by a stated contract.

``event``: an event is all ids of one layer of one step. Hits are counted before anything enters; none of the event's
experts leaves. The last slot is the most recent. Each request starts with an empty cache, unless requests interleave.
``bigmoeonedge``, as in that engine: the prompt warms the cache, all requests share one cache, and a single event may
exceed the budget. ``sequential`` takes the ids one by one, as some tools do; it overstates misses by up to a third.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..errors import GraphError
from ..kernels.lab import sized, stack
from ..kernels.lab import slots as compiled
from . import validate
from .cache import Cache, Events, too_small
from .llama import LlamaCache
from .policies import Batch, Policy, parse_policy
from .pools import Capacity, Ints, Pools, RequestKeys, request_keys
from .trace import Phase, Trace

__all__ = ["Refusal", "Replayer", "RequestResult", "Result", "Setting", "lru_begins", "replay", "replayer"]


Bools = npt.NDArray[np.bool_]
_NOT_ASKED: Bools = np.zeros((0, 0), np.bool_)


@dataclass(frozen=True, slots=True)
class Setting:
    """The setting that all replays of a comparison share."""

    scope: str = "layer"
    phase: str = "decode"
    contract: str = "event"


@dataclass(frozen=True, slots=True)
class RequestResult:
    """The result of one request."""

    request: int
    touches: int
    hits: int
    bytes_read: int
    n_token: int
    first_touches: int  #: misses that no cache avoids

    @property
    def hit_rate(self) -> float:
        """Hits divided by touches."""
        return self.hits / self.touches if self.touches else 0.0


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one policy at one capacity.

    Attributes
    ----------
    slots : int or None
        Slots of all pools; None if the budget is in bytes and experts differ in size.
    capacity_bytes : int
        Size of the cache; 0 if the experts' bytes are unknown.
    touches, hits : int
        Distinct experts of events, and those of them that were resident.
    bytes_read : int or None
        Bytes of misses and of the preload of static sets; None if the experts' bytes are unknown.
    preload_bytes : int
        Part of ``bytes_read``.
    """

    policy: Policy
    setting: Setting
    capacity: Capacity
    slots: int | None
    capacity_bytes: int
    requests: tuple[RequestResult, ...]
    preload_bytes: int = 0
    has_bytes: bool = True

    @property
    def touches(self) -> int:
        """Distinct experts of events."""
        return sum(r.touches for r in self.requests)

    @property
    def hits(self) -> int:
        """Touches of resident experts."""
        return sum(r.hits for r in self.requests)

    @property
    def n_token(self) -> int:
        """Number of tokens."""
        return sum(r.n_token for r in self.requests)

    @property
    def bytes_read(self) -> int | None:
        """Bytes of misses and preloads."""
        return sum(r.bytes_read for r in self.requests) + self.preload_bytes if self.has_bytes else None

    @property
    def hit_rate(self) -> float:
        """Mean hit rate over requests."""
        return float(np.mean([r.hit_rate for r in self.requests]))


@dataclass(frozen=True, slots=True)
class Refusal:
    """A policy that cannot be replayed at a capacity, and why."""

    policy: str
    capacity: Capacity
    reason: str


def replay(
    trace: Trace,
    policies: Sequence[str | Policy],
    capacities: Sequence[Capacity],
    setting: Setting = Setting(),  # frozen
) -> Iterator[Result | Refusal]:
    """Yield the result of each policy at each capacity, policy by policy.

    Raises
    ------
    FormatError
        A finding of the trace forbids replaying the requested phase.
    GraphError
        A policy, scope, phase or contract is unknown.
    """
    chosen = [policy if isinstance(policy, Policy) else parse_policy(policy) for policy in policies]
    ready: dict[bool, Replayer] = {}
    for policy in chosen:
        by_first = policy.llama is not None
        if by_first not in ready:
            ready[by_first] = replayer(trace, setting, by_first=by_first)
        yield from ready[by_first].results(policy, capacities)


def replayer(trace: Trace, setting: Setting, *, by_first: bool = False) -> Replayer:
    """Return what replays a trace's requests.

    Parameters
    ----------
    by_first : bool
        Whether ids come in order of appearance, as llama.cpp takes them, instead of that of their last slot.

    Raises
    ------
    FormatError
        A finding of the trace forbids replaying the requested phase.
    GraphError
        The scope, phase or contract is unknown.
    """
    wanted = (
        np.arange(2)
        if setting.phase == "all"
        else np.array([Phase[setting.phase.upper()]])
        if setting.phase.upper() in Phase.__members__
        else np.arange(0)
    )
    if setting.contract == "bigmoeonedge":
        wanted = np.arange(2)
    validate.refuse(trace, wanted)
    pools = Pools.of(trace, setting.scope)
    runs = request_keys(trace, pools, phase=setting.phase, contract=setting.contract, by_first=by_first)
    return Replayer(pools, list(runs), setting)


class Replayer:
    """The runs of a trace, with values that are computed once for all policies."""

    def __init__(self, pools: Pools, runs: list[RequestKeys], setting: Setting) -> None:
        self.pools, self.runs, self.setting = pools, runs, setting
        self.after = [stack.next_uses(run.offsets, run.keys, run.pool, pools.n_pool, pools.n_key) for run in runs]
        self.order = [np.argsort(run.pool, kind="stable") for run in runs]
        self.starts = [
            np.searchsorted(run.pool, np.arange(pools.n_pool + 1), sorter=o)
            for run, o in zip(runs, self.order, strict=True)
        ]
        self.most = np.zeros(pools.n_pool, np.int64)
        for run in runs:
            most = run.most()
            self.most[: len(most)] = np.maximum(self.most[: len(most)], most)
        self.first = [_first_touches(run, pools) for run in runs]

    @cached_property
    def uses(self) -> Ints:
        """How often each request uses each key: int64, (n_run, n_pool, n_key)."""
        n_pool, n_key = self.pools.n_pool, self.pools.n_key
        return np.stack([stack.count_uses(run.offsets, run.keys, run.pool, n_pool, n_key) for run in self.runs])

    def results(self, policy: Policy, capacities: Sequence[Capacity]) -> Iterator[Result | Refusal]:
        """Yield one policy's results."""
        if policy.fit == "others" and len(self.runs) < 2:
            reason = "needs other requests to be fitted on: give several, or static-same-trace, which misleads"
            yield from (Refusal(policy.name, capacity, reason) for capacity in capacities)
            return
        stacked: list[Ints] | None = None
        for capacity in capacities:
            slots = self.pools.slots(capacity)
            reason = self._refusal(policy, slots, capacity)
            if reason:
                yield Refusal(policy.name, capacity, reason)
                continue
            if self._is_stacked(policy, slots):
                assert slots is not None
                if stacked is None:
                    stacked = [self._stack(policy, i) for i in range(len(self.runs))]
                yield self._result(policy, capacity, slots, [_hits_below(hist, slots) for hist in stacked])
            else:
                yield self._one_size(policy, capacity, slots)

    def _refusal(self, policy: Policy, slots: Ints | None, capacity: Capacity) -> str:
        """Return why a policy cannot be replayed at a capacity; empty if it can."""
        if self.setting.contract == "bigmoeonedge":
            return ""  # there an event may exceed the budget
        if slots is None:
            sizes = self.pools.sizes.max(axis=1) * self.most
            short = np.flatnonzero(self.pools.budgets(capacity) < sizes)
            what = "bytes"
        else:
            short = np.flatnonzero(slots < self.most)
            what = "slots"
        if policy.must_admit and len(short):
            p = int(short[0])
            has = int(self.pools.budgets(capacity)[p]) if slots is None else int(slots[p])
            return f"must admit the {int(self.most[p])} experts of one event, and {_name(self.pools, p)} has {has:,} {what}"
        return ""

    def _is_stacked(self, policy: Policy, slots: Ints | None) -> bool:
        """Return whether one pass gives all capacities correctly and faster: for pools of one layer, or LRU."""
        if slots is None or policy.code is None or not policy.has_stack or self.setting.contract == "bigmoeonedge":
            return False
        one_size = all(self.pools.is_even(p) for p in range(self.pools.n_pool))
        return one_size and (self.setting.scope == "layer" or policy.code == stack.LRU)

    def _stack(self, policy: Policy, i: int) -> Ints:
        run = self.runs[i]
        assert policy.code is not None
        hist: Ints = stack.stack_hits(
            run.offsets,
            run.keys,
            run.pool,
            self.pools.n_pool,
            self.pools.n_key,
            policy.code,
            self.after[i],
            policy.half_life,
        )
        return hist

    def _one_size(self, policy: Policy, capacity: Capacity, slots: Ints | None) -> Result | Refusal:
        """Replay one capacity, touch by touch."""
        in_bytes = slots is None or (self.setting.contract == "bigmoeonedge" and capacity.n_bytes is not None)
        budgets = self.pools.budgets(capacity) if slots is None or in_bytes else slots
        sizes = self.pools.sizes if in_bytes else np.ones_like(self.pools.sizes)
        # lists are 3 times as fast as the heap, but an event must fit
        in_lists = policy.code in (stack.LRU, stack.FIFO) and self.setting.contract != "bigmoeonedge"
        hits, preload = [], 0
        for i, run in enumerate(self.runs):
            hit = np.zeros(len(run.keys), np.bool_)
            if policy.code is not None and policy.code < compiled.SLRU and not policy.admission and not in_lists:
                _, over = sized.sized_hits(
                    run.offsets, run.keys, run.pool, sizes, budgets, self.pools.n_pool, self.pools.n_key, policy.code,
                    self.after[i], policy.half_life, hit,
                )  # fmt: skip
                if over:
                    return Refusal(policy.name, capacity, f"stands {over:,} bytes above the budget after events")
            elif policy.batch is not None and slots is not None and not in_bytes:
                hit[:] = self._batch(policy, policy.batch, run, slots)
            else:
                try:
                    if policy.llama is not None and in_bytes:
                        raise GraphError(f"{policy.name} has slots of one size: --scope group")
                    replayed = self._compiled if policy.code is not None else self._objects
                    preload += replayed(policy, i, budgets, sizes, hit)
                except GraphError as error:
                    return Refusal(policy.name, capacity, error.message)
            hits.append(hit)
        counted = [
            stack.count_hits(run.offsets, run.keys, run.pool, run.is_counted, hit, self.pools.sizes)
            for run, hit in zip(self.runs, hits, strict=True)
        ]
        return self._result(policy, capacity, slots, [c[0] for c in counted], [int(c[1]) for c in counted], preload)

    def resident(self, policy: Policy, slots: Ints) -> list[Bools]:
        """Return which keys of its pool are resident before each event, by request: bool, (n_event, n_key).

        Raises
        ------
        GraphError
            The policy knows the future, or must admit an event that does not fit.
        """
        found = []
        for i, run in enumerate(self.runs):
            held = np.zeros((len(run.pool), self.pools.n_key), np.bool_)
            hit, ones = np.zeros(len(run.keys), np.bool_), np.ones_like(self.pools.sizes)
            replayed = self._objects if policy.code is None or (policy.make or policy.llama) is None else self._compiled
            replayed(policy, i, slots, ones, hit, held)
            found.append(held)
        return found

    def _compiled(
        self, policy: Policy, i: int, budgets: Ints, sizes: Ints, hit: Bools, held: Bools = _NOT_ASKED
    ) -> int:
        """Replay a policy of pyggml's own, and return the bytes of its preload.

        Raises
        ------
        GraphError
            An event does not fit.
        """
        assert policy.code is not None
        pools, run, counts = self.pools, self.runs[i], self._counts(policy, i)
        n_slot = budgets // np.maximum(1, sizes.max(axis=1))
        admission = policy.new_admission()
        preload, failed = 0, len(run.pool)  # the first event that does not fit
        for p in range(pools.n_pool):
            keys: list[int] = []
            n_protected, must_admit = int(n_slot[p]) // 2, True
            if policy.llama is None:
                made = policy.eviction(int(n_slot[p]), pools.n_key, None if counts is None else counts[p])
                keys, n_protected = getattr(made, "preload", []), getattr(made, "n_protected", 0)
                preload += int(pools.sizes[p, keys].sum()) if keys else 0
                must_admit = made.must_admit
            event = compiled.pool_hits(
                run.offsets, run.keys, self.order[i][self.starts[i][p] : self.starts[i][p + 1]], run.step, sizes[p], budgets[p],
                n_slot[p], policy.code, policy.half_life, np.array(keys, np.int64), n_protected,
                must_admit and admission.must_admit, *admission.numbers(), hit, held,
            )  # fmt: skip
            failed = min(failed, event) if event >= 0 else failed
        if failed < len(run.pool):
            raise too_small(int(budgets[run.pool[failed]]), is_bytes=bool((sizes != 1).any()))
        return preload

    def _batch(self, policy: Policy, replay_events: Batch, run: RequestKeys, slots: Ints) -> Bools:
        """Replay a policy that takes all events at once.

        Raises
        ------
        GraphError
            It does not return a bool for each touch.
        """
        hit = np.asarray(
            replay_events(Events(run.offsets, run.keys, run.pool, run.step, run.layer, slots, self.pools.n_key))
        )
        if hit.dtype != np.bool_ or hit.shape != run.keys.shape:
            raise GraphError(
                f"replay_events of {policy.name} returns {hit.dtype} {hit.shape}, and there are {len(run.keys):,} touches",
                hint="return a numpy array of bool, one for each key",
            )
        return hit

    def _objects(self, policy: Policy, i: int, budgets: Ints, sizes: Ints, hit: Bools, held: Bools = _NOT_ASKED) -> int:
        """Replay a policy's own objects, one cache per pool, and return the bytes of its preload.

        Raises
        ------
        GraphError
            An event does not fit.
        """
        pools, run, counts = self.pools, self.runs[i], self._counts(policy, i)
        caches: list[Cache | LlamaCache] = []
        preload, is_bytes = 0, bool((sizes != 1).any())
        for p in range(pools.n_pool):
            n_slot, of_pool = int(budgets[p]) // max(1, int(sizes[p].max())), None if counts is None else counts[p]
            cache = policy.cache(n_slot, pools, of_pool)
            if is_bytes:
                eviction = policy.eviction(n_slot, pools.n_key, of_pool)
                cache = Cache(int(budgets[p]), eviction, policy.new_admission(), sizes=sizes[p].tolist())
            if isinstance(cache, Cache):
                first = getattr(cache.eviction, "preload", [])
                cache.prefetch(first)
                preload += int(pools.sizes[p, [key for key in first if key in cache]].sum()) if first else 0
            caches.append(cache)
        keys, offsets = run.keys.tolist(), run.offsets.tolist()
        for event, (p, step, layer) in enumerate(
            zip(run.pool.tolist(), run.step.tolist(), run.layer.tolist(), strict=True)
        ):
            lo, hi = offsets[event], offsets[event + 1]
            if len(held):
                held[event] = [key in caches[p] for key in range(pools.n_key)]
            hits = set(caches[p].event(step, layer, keys[lo:hi]).hits)
            for j in range(lo, hi):
                hit[j] = keys[j] in hits
        return preload

    def _counts(self, policy: Policy, i: int) -> list[dict[int, int]] | None:
        """Return the uses of each pool's keys, to which a static set is fitted."""
        if not policy.fit:
            return None
        total = self.uses[i] if policy.fit == "same" else self.uses.sum(axis=0) - self.uses[i]
        counts: list[dict[int, int]] = [{} for _ in range(self.pools.n_pool)]
        for p in range(self.pools.n_pool):
            used = np.flatnonzero(total[p])
            counts[p] = dict(zip(used.tolist(), total[p, used].tolist(), strict=True))
        return counts

    def _result(
        self,
        policy: Policy,
        capacity: Capacity,
        slots: Ints | None,
        by_pool: list[Ints],
        missed: list[int] | None = None,
        preload: int = 0,
    ) -> Result:
        """Return the result, from touches and hits by pool of each run: int64, (n_pool, 2)."""
        requests = []
        for i, (run, counts) in enumerate(zip(self.runs, by_pool, strict=True)):
            touches, hits = (int(n) for n in counts.sum(axis=0))
            if missed is None:
                n_bytes = int(((counts[:, 0] - counts[:, 1]) * self.pools.sizes[:, 0]).sum())
            else:
                n_bytes = missed[i]
            requests.append(RequestResult(run.request, touches, hits, n_bytes, run.n_token, self.first[i]))
        has_bytes = self.pools.is_sized
        n_bytes = 0 if not has_bytes else capacity.n_bytes or 0 if slots is None else self.pools.n_bytes(slots)
        n_slot = None if slots is None else int(slots.sum())
        return Result(policy, self.setting, capacity, n_slot, n_bytes, tuple(requests), preload, has_bytes)


def _name(pools: Pools, p: int) -> str:
    return (
        f"layer {pools.layers[p][0]}" if pools.scope == "layer" else "the pool" if pools.n_pool == 1 else f"group {p}"
    )


def _first_touches(run: RequestKeys, pools: Pools) -> int:
    seen = run.touch_pool * pools.n_key + run.keys
    _, first = np.unique(seen, return_index=True)
    return int(run.is_counted[first].sum())


def _hits_below(hist: Ints, slots: Ints) -> Ints:
    """Return touches and hits by pool: int64, (n_pool, 2)."""
    below = np.concatenate((np.zeros((len(hist), 1), np.int64), np.cumsum(hist[:, :-1], axis=1)), axis=1)
    hits = np.take_along_axis(below, slots[:, None], axis=1)[:, 0]
    return np.stack((hist.sum(axis=1), hits), axis=1)


def lru_begins(trace: Trace, setting: Setting = Setting()) -> dict[str, int | None]:  # frozen
    """Return the fewest slots of a pool, and the bytes of all pools, with which LRU has any hit.

    In one pool for all layers, a key is used again after a whole sweep of the layers at the earliest. With fewer slots
    than the experts of a sweep, LRU has no hits.
    """
    pools = Pools.of(trace, setting.scope)
    runs = list(request_keys(trace, pools, phase=setting.phase, contract=setting.contract))
    hist = np.zeros((pools.n_pool, pools.n_key + 1), np.int64)
    most = 1
    for run in runs:
        after = np.zeros(len(run.keys), np.int64)
        hist += stack.stack_hits(run.offsets, run.keys, run.pool, pools.n_pool, pools.n_key, stack.LRU, after, 1.0)
        most = max(most, int(run.most().max()))
    places = np.flatnonzero(hist[:, :-1].sum(axis=0))
    if not len(places):
        return {"slots": None, "bytes": None}
    slots = max(int(places[0]) + 1, most)
    each = np.array([min(slots, len(m) * pools.n_expert) for m in pools.layers], np.int64)
    return {"slots": slots, "bytes": pools.n_bytes(each) if pools.is_sized else None}
