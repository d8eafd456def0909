"""The lab's policies in a running model: `LabRule` gives `pyggml.moe_cache.MoeCache` the pools of a replay.

Replays and runs use the same objects: an `Eviction` and an `Admission` in a `Cache`. `TraceRouting` lets a plan use the
experts of a trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..errors import GraphError
from ..moe_cache import CacheGroup, HostLayer, Lookup, Misses, SlotTable, Upload, group_layers
from .cache import Cache
from .policies import Policy, parse_policy
from .pools import SCOPES, Capacity, Pools, request_keys
from .predict import FITTED, PREFETCHERS, Prefetcher, best_of, events_of, find_prefetcher
from .trace import Trace

__all__ = ["LabRule", "RunningPredictor", "TraceRouting", "counts_of", "parse_rule"]

#: Uses of each expert by layer, to which static sets are fitted.
Counts = Mapping[int, Mapping[int, int]]


class LabRule:
    """A policy of the lab as a `moe_cache.CacheRule`, the rule of an expert cache.

    Parameters
    ----------
    policy : str or Policy
        As `parse_policy` reads it. One that knows the future cannot run.
    capacity : Capacity
        The size of the cache. A fraction is of the experts in host memory. Bytes are divided as in a replay.
    scope : str
        ``layer``: each layer has its own slots; ``group``: equal layers of a device share; ``global``: all layers.
    counts : mapping, optional
        By layer, the uses of each expert in other requests; required for static sets.
    misses : str
        ``"copy"``, or ``"cpu"``: the CPU computes what is missing; see `CacheRule.misses`.

    Raises
    ------
    GraphError
        The policy or scope is unknown, or the policy cannot run.
    """

    def __init__(
        self,
        policy: str | Policy,
        capacity: Capacity,
        scope: str = "layer",
        *,
        counts: Counts | None = None,
        misses: Misses = "copy",
    ) -> None:
        self.misses: Misses = misses
        self.policy = policy if isinstance(policy, Policy) else parse_policy(policy)
        self.capacity, self.scope, self._counts = capacity, scope, counts
        if scope not in SCOPES:
            raise GraphError(f"there is no scope '{scope}'", hint=f"one of {', '.join(SCOPES)}")
        name = self.policy.name
        if self.policy.make is None and self.policy.llama is None:
            raise GraphError(f"{name} knows the future and cannot run", hint="replay it: `pyggml experts compare`")
        if self.policy.llama is not None and scope == "layer":
            raise GraphError(f"{name} shares slots among layers", hint="use scope group")
        if self.policy.fit and counts is None:
            raise GraphError(f"{name} is fitted on other requests", hint="give a trace of them")
        if self.policy.new_admission().publishes_next_step and scope != "layer":
            raise GraphError(f"{name} fills slots of other layers", hint="use scope layer")
        self._pools: Pools | None = None
        self._slots: list[int] = []

    @property
    def name(self) -> str:
        """The policy, its size and its scope."""
        return f"{self.policy.name}, {self.capacity}, scope {self.scope}"

    def groups(
        self, layers: Sequence[HostLayer], *, n_used: int, alignments: Sequence[int], weights: Sequence[float]
    ) -> list[CacheGroup]:
        """Return groups of equal layers, with the slots of their pools."""
        groups = group_layers(layers)
        if self.scope == "global" and len(groups) > 1:
            raise GraphError(f"the layers form {len(groups)} groups, which cannot share slots", hint="use scope group")
        n_expert = {g.n_expert for g in groups}
        if len(n_expert) > 1:
            raise GraphError("the layers have different numbers of experts")
        pools = self._pools = _pools(groups, self.scope)
        slots = pools.slots(self.capacity)
        assert slots is not None  # the experts of a group have one size
        self._slots = [int(n) for n in slots]
        for group in groups:
            mine = [n for n, members in zip(self._slots, pools.layers, strict=True) if members[0] in group.layers]
            least = n_used if self.policy.must_admit else 1
            if min(mine) < least:
                raise GraphError(
                    f"{self.name}: a pool has {min(mine)} slots, and a token uses {n_used} experts",
                    hint="a larger cache, or an admission that may decline, such as +hotter",
                )
            group.n_slots = sum(mine)
            group.n_transit = 0 if self.policy.must_admit else n_used
        return groups

    def table(self, group: CacheGroup) -> SlotTable:
        """Return the slots of a group, empty; static sets are loaded by the first lookups."""
        if self.policy.llama is not None:
            return self.policy.llama(group.n_slots, group.n_expert)
        assert self._pools is not None
        return _Table(self.policy, group, self._pools, self._slots, self._counts or {})


def parse_rule(text: str, scope: str, trace: Trace | None = None, *, misses: Misses = "copy") -> LabRule:
    """Parse ``POLICY:SIZE``, such as ``lfru:20%``, ``lru+hotter:64:512MiB`` or ``lfu:6``.

    Parameters
    ----------
    trace : Trace, optional
        The trace to which static sets are fitted.

    Raises
    ------
    GraphError
        The policy, size or scope is unknown.
    """
    policy, colon, size = text.rpartition(":")
    if not colon or not policy:
        raise GraphError(f"'{text}' is not POLICY:SIZE", hint="such as lfru:20%, lru+hotter:512MiB or lfu:6")
    counts = None if trace is None else counts_of(trace)
    return LabRule(policy, Capacity.parse(size), scope, counts=counts, misses=misses)


def counts_of(trace: Trace) -> dict[int, dict[int, int]]:
    """Return the uses of each expert by layer in a trace, counted once per event."""
    counts: dict[int, dict[int, int]] = {}
    for event, layer in enumerate(trace.layer.tolist()):
        of_layer = counts.setdefault(layer, {})
        for expert in np.unique(trace.rows(event)).tolist():
            if expert >= 0:
                of_layer[expert] = of_layer.get(expert, 0) + 1
    return counts


def _pools(groups: Sequence[CacheGroup], scope: str) -> Pools:
    of_layer = sorted((il, group) for group in groups for il in group.layers)
    members = [[il] for il, _ in of_layer] if scope == "layer" else [list(group.layers) for group in groups]
    owner = dict(of_layer)
    width = max(map(len, members)) * groups[0].n_expert
    sizes = np.zeros((len(members), width), np.int64)
    for p, layers in enumerate(members):
        sizes[p, : len(layers) * groups[0].n_expert] = owner[layers[0]].expert_bytes
    projections = [np.array([t.expert_bytes for t in owner[layers[0]].experts], np.int64) for layers in members]
    return Pools("group" if scope == "global" else scope, members, groups[0].n_expert, sizes, projections)


class _Table(SlotTable):
    """Pools of one group, one after the other in its bank."""

    def __init__(self, policy: Policy, group: CacheGroup, pools: Pools, slots: Sequence[int], counts: Counts) -> None:
        self.n_slots, self.n_expert, self.n_transit = group.n_slots, group.n_expert, group.n_transit
        self._pool: dict[int, tuple[Cache, int, int]] = {}  # by layer: cache, its first slot, the layer's first key
        self._layer_of: dict[int, list[int]] = {}  # by first slot: the pool's layers
        self._waiting: dict[int, list[Upload]] = {}  # uploads of a static set that are not made yet, by layer
        self._step = -1
        self._least = min(n for n, layers in zip(slots, pools.layers, strict=True) if layers[0] in group.layers)
        first = 0
        for n, layers in zip(slots, pools.layers, strict=True):
            if layers[0] not in group.layers:
                continue
            uses = {
                place * self.n_expert + expert: count
                for place, il in enumerate(layers)
                for expert, count in counts.get(il, {}).items()
            }
            cache = policy.cache(n, pools, uses if policy.fit else None)
            assert isinstance(cache, Cache)  # llama.cpp's own policies have another table
            self._layer_of[first] = layers
            for place, il in enumerate(layers):
                self._pool[il] = cache, first, place * self.n_expert
            for key, slot in cache.prefetch(getattr(cache.eviction, "preload", [])).prefetched:
                il = layers[key // self.n_expert]
                self._waiting.setdefault(il, []).append(Upload(key % self.n_expert, first + slot))
            first += n

    @property
    def most(self) -> int:
        """Most distinct experts of a lookup."""
        return self.n_transit or self._least

    def begin(self) -> None:
        """Count a step."""
        self._step += 1

    def lookup(self, layer: int, ids: Iterable[int]) -> Lookup:
        """Decide an event of one layer: its experts in the order of their last slots, as in a replay."""
        cache, first, base = self._pool[layer]
        experts = list(dict.fromkeys(reversed(list(ids))))[::-1]
        decision = cache.event(self._step, layer, [base + e for e in experts])
        slots: dict[int, int] = {}
        uploads = self._waiting.pop(layer, [])
        passing = set(decision.declined)
        for i, expert in enumerate(experts):
            key = base + expert
            if key in passing:
                slots[expert] = self.n_slots + i
                uploads.append(Upload(expert, slots[expert]))
            else:
                slots[expert] = first + cache.slot_of[key]
        uploads += [Upload(key - base, first + slot) for key, slot in decision.loads]
        layers = self._layer_of[first]
        evicted = tuple((layers[key // self.n_expert], key % self.n_expert) for key in decision.evicted)
        hits = tuple(key - base for key in decision.hits)
        misses = tuple(sorted(e for e in experts if base + e not in decision.hits))
        return Lookup(slots, hits, misses, tuple(sorted(uploads)), evicted)

    def slot_of(self, layer: int, expert: int) -> int | None:
        """Return the slot of an expert; None if it is not in the cache or not loaded yet."""
        cache, first, base = self._pool[layer]
        slot = cache.slot_of.get(base + expert)
        is_waiting = any(upload.expert == expert for upload in self._waiting.get(layer, ()))
        return None if slot is None or is_waiting else first + slot


class RunningPredictor:
    """A prefetcher of the lab for a run: what `pyggml.sched.prefetch.ExpertPrefetch` asks.

    Parameters
    ----------
    name : str or type
        As `find_prefetcher` reads it, except ``oracle``.
    trace : Trace, optional
        Other requests, from which prefetchers learn that need them.

    Raises
    ------
    GraphError
        There is no such prefetcher, it cannot run, or it needs a trace.
    """

    def __init__(self, name: str | type[Prefetcher] = "online", trace: Trace | None = None) -> None:
        self._name, self._trace = name if isinstance(name, str) else name.__name__, trace
        can_run = [known for known in PREFETCHERS if known != "oracle"]
        if isinstance(name, str) and name not in can_run and ":" not in name:
            raise GraphError(
                f"there is no prefetcher '{name}' that can run", hint=f"one of {', '.join(can_run)}; module:Class"
            )
        self._make = find_prefetcher(name)
        if trace is None and name in FITTED:
            raise GraphError(
                f"prefetcher {name} learns from other requests", hint="give a trace of them, or use online"
            )
        self._made: Prefetcher | None = None
        self._place: dict[int, int] = {}

    @property
    def name(self) -> str:
        """What reports call it."""
        return self._name if self._trace is None else f"{self._name}, fitted on {self._trace.source or 'a trace'}"

    def begin(self, layers: Sequence[int], n_expert: int) -> None:
        """Make the prefetcher for these layers; what it knows of the same layers stays.

        Raises
        ------
        GraphError
            The trace is of another model.
        """
        place = {il: i for i, il in enumerate(sorted(layers))}
        if self._made is not None and place == self._place:
            return
        made, trace = self._make(), self._trace
        if trace is None:
            made.fit(made.learn([], len(place), n_expert))
        else:
            known = sorted(set(trace.layer.tolist()))
            offset = 0 if place.keys() <= set(known) else known[0] - min(place)  # some number layers with experts only
            if not {il + offset for il in place} <= set(known) or trace.n_expert != n_expert:
                raise GraphError(
                    f"the trace has {len(known)} layers of {trace.n_expert} experts, the run has layers {min(place)} to {max(place)} of {n_expert}",
                    hint="fit on a trace of this model",
                )
            mine = trace.select(np.isin(trace.layer - offset, list(place)))
            pools = Pools.of(mine, "layer")
            learned = [
                made.learn(events_of(run), pools.n_pool, n_expert) for run in request_keys(mine, pools, phase="all")
            ]
            made.fit(np.sum(learned, axis=0))
        made.start([])
        self._made, self._place, self._n_expert = made, place, n_expert

    def restart(self) -> None:
        """Begin another request."""
        if self._made is not None:
            self._made.start([])

    def saw(self, layer: int, experts: Sequence[int]) -> None:
        """Pass on what a layer chose."""
        assert self._made is not None
        self._made.saw(self._place[layer], experts)

    def best(self, layer: int, n: int) -> list[int]:
        """Return the experts with the highest scores."""
        assert self._made is not None
        return best_of(self._made, self._place[layer], n, self._n_expert)


class TraceRouting:
    """The experts of one request of a trace, as a `Routing` for plans without data.

    Parameters
    ----------
    trace : Trace
        The rows of its steps, in order, are the tokens. Its first layer is the model's first layer with experts.

    Raises
    ------
    GraphError
        Layers of the trace have different numbers of rows.
    """

    def __init__(self, trace: Trace) -> None:
        self._name = trace.source or trace.model or "trace"
        rows: dict[int, list[list[int]]] = {}
        for event, layer in enumerate(trace.layer.tolist()):
            rows.setdefault(layer, []).extend(trace.rows(event).tolist())
        if len({len(r) for r in rows.values()}) > 1:
            raise GraphError(f"{self._name}: layers have different numbers of rows", hint="record with all outputs")
        self._rows = {layer - min(rows): r for layer, r in rows.items()}
        self._n_expert, self._n_used = trace.n_expert, trace.ids.shape[1]

    def __str__(self) -> str:
        return f"trace ({self._name}, {self.n_tokens} tokens)"

    @property
    def n_tokens(self) -> int:
        """Number of tokens of the trace."""
        return len(next(iter(self._rows.values())))

    def rows(self, layer: int, tokens: Sequence[int], n_expert: int, n_used: int) -> list[list[int]]:
        """Return the experts of each token, in slot order.

        Raises
        ------
        GraphError
            The trace has no such layer or token, or is of another model.
        """
        if (n_expert, n_used) != (self._n_expert, self._n_used):
            raise GraphError(
                f"{self} has {self._n_used} of {self._n_expert} experts, the model uses {n_used} of {n_expert}"
            )
        found = self._rows.get(layer)
        if found is None or (len(tokens) and max(tokens) >= len(found)):
            raise GraphError(f"{self} has no layer {layer} or token {max(tokens, default=0)}")
        return [found[token] for token in tokens]

    def experts(self, layer: int, tokens: Sequence[int], n_expert: int, n_used: int) -> set[int]:
        """Return the experts that tokens chose."""
        return {expert for row in self.rows(layer, tokens, n_expert, n_used) for expert in row}

    def used(self, n_expert: int, n_used: int, n_token: int) -> float:
        """Return the number of distinct experts of the first tokens, the mean over layers."""
        tokens = range(min(n_token, self.n_tokens))
        return float(np.mean([len(self.experts(il, tokens, n_expert, n_used)) for il in self._rows]))
