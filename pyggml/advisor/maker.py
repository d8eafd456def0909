"""Makes recommendations: the best setting for the goal, and others that are better in one respect, carried out on the simulated machine."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter

from ..foresight import Setting, Speed
from ..simulation import simulate_batch, simulate_generation, simulate_prompt
from ..types import Type
from .answer import Advice, Recommendation
from .limits import bottleneck
from .search import Scored, Search, without_cache
from .settings import command, flags_of, ik_flags_of, with_llama_names
from .shares import filling, with_cache

__all__ = ["BEST", "Maker"]

#: The title of the first plan.
BEST = "best for this prompt and answer"
#: A plan that gives something up must gain this much; one with its cache on the host becomes slower as the cache fills.
_NOTEWORTHY = 1.03
#: By so much formulas may be off for a layer of which a part is on the host, for several cards at once, and for an expert cache, which
#: they find slower than it is.
_NEAR = 1.1
#: What formulas find less faster is not carried out: on one card they find as much to gain as the simulated machine, or more.
_WORTH_A_TRY = 1.02
#: So many plans are shown where that many settings fit, also if the others are better in nothing.
_LEAST_PLANS = 3
#: Times closer than this are equal.
_NOTEWORTHY_TIME = 1.01


class Maker:
    """Makes plans of settings, each distinct from those before.

    Parameters
    ----------
    model : str
        The model as a llama-server line names it.
    splits : list of str
        Model and machine as a line of `pyggml splits` names them.
    """

    def __init__(self, search: Search, model: str, splits: list[str], advice: Advice) -> None:
        self.search, self.model, self.splits, self.advice = search, model, splits, advice
        self._times: dict[Setting, _Times] = {}  # of settings that were carried out
        self._cached: list[Scored] = []  # those with an expert cache

    def best_plans(
        self,
        settings: list[Setting],
        around_fit: Callable[[], list[Setting]],
        n_plans: int,
        kv_type: Type,
        tell: Callable[[str], None],
    ) -> list[Recommendation]:
        """Return the best setting for the goal, and others that are better in one respect.

        Parameters
        ----------
        settings : list of Setting
            The grid, the plainer first.
        around_fit : callable
            Returns what ``--fit`` chooses, with other micro-batches, load modes and KV types: its shares and its layer of which a part is
            on the host are in no grid.
        """
        search = self.search
        every = search.ranked(settings, lambda s: _step(_weighed(s, s.seconds)))
        by_goal = [s for s in every if not s.setting.moe_cache_mib]
        plain = [s for s in by_goal if s.setting.type_k is kv_type]
        tell("planning the best")
        best = next(search.best(plain), None) or next(search.best(by_goal), None)
        if best is None:
            return []
        plans = [self.make(BEST, best)]
        tell("what llama.cpp's --fit chooses")
        around = around_fit()
        known = min([best, *(search.score(s) for s in around if search.memory.may_fit(s))], key=lambda s: s.seconds)
        self._with_fit(plans, [*around, *filling(search, best.setting, limit=known.seconds)], tell)
        cached = [s for s in every if s.setting.moe_cache_mib and s.setting.type_k is best.setting.type_k]
        cached += map(search.score, with_cache(search, best.setting))
        self._cached = sorted(cached, key=lambda s: _step(s.seconds))
        self._with_cache(plans, tell)
        first = plans[0]
        of_first = search.score(first.setting)
        is_rough = bool(first.setting.overrides or first.setting.moe_cache_mib or len(search.machine.cards) > 1)
        least = _WORTH_A_TRY / _NEAR if is_rough else _WORTH_A_TRY

        def faster(seconds: Callable[[Scored], float], then: Callable[[Scored], float]) -> list[Scored]:
            """Return settings of which formulas find one time clearly shorter than the first plan's, the shortest first."""
            found = [s for s in plain if least * _weighed(s, seconds(s)) <= seconds(of_first)]
            return sorted(found, key=lambda s: (_step(_weighed(s, seconds(s))), then(s)))

        prompt_s, generate_s = attrgetter("prompt_s"), attrgetter("generate_s")
        wanted: list[tuple[str, Iterable[Scored], Callable[[Recommendation], bool]]] = [
            (
                "fastest prompt",
                faster(prompt_s, generate_s),
                lambda made: made.pp_tps.mid > _NOTEWORTHY * first.pp_tps.mid,
            ),
            (
                "fastest generation",
                faster(generate_s, prompt_s),
                lambda made: made.tg_tps.mid > _NOTEWORTHY * first.tg_tps.mid,
            ),
            (
                "with a KV cache in q8_0",
                # by the formulas, too: the machine that is simulated found less to gain wherever both were asked
                [
                    s
                    for s in by_goal
                    if s.setting.type_k is not kv_type and _weighed(s, s.seconds) * _NOTEWORTHY <= best.seconds
                ],
                lambda made: made.seconds * _NOTEWORTHY <= first.seconds,  # else worse results for nothing
            ),
            (
                "less memory on the device",
                self._small(plain, best),
                lambda made: made.device_bytes * _NOTEWORTHY <= first.device_bytes,
            ),
            ("mapped file, as llama.cpp's default", [s for s in plain if not s.setting.is_pinned], _any),
            ("micro-batches of 512, as llama.cpp's default", [s for s in plain if s.setting.n_ubatch == 512], _any),
            ("fewer weights on the device", self._next(plain, best), _any),
        ]
        if all(card.is_unified for card in search.machine.cards):  # what leaves the device stays in the same memory
            wanted = [w for w in wanted if not w[0].endswith("on the device")]
        for title, ranked, is_wanted in wanted:
            if len(plans) >= n_plans:
                break
            tell(f"planning: {title}")
            found = next(search.best(ranked), None)
            if found is not None and not any(_is_same(found.setting, p.setting) for p in plans):
                made = self.make(title, found)
                if is_wanted(made):
                    plans.append(made)
        for found in search.best([*plain, *by_goal]):
            if len(plans) >= min(_LEAST_PLANS, n_plans):
                break
            if not any(_is_same(found.setting, p.setting) for p in plans):
                plans.append(self.make("another that fits", found))
        self.advice.find_points = partial(self._points, [*(search.score(p.setting) for p in plans[:n_plans]), *every])
        return plans[:n_plans]

    def _with_fit(self, plans: list[Recommendation], around_fit: list[Setting], tell: Callable[[str], None]) -> None:
        """Put first what is faster than the best of the grid: what ``--fit`` chooses, or that with another micro-batch or load mode."""
        best, search = plans[0], self.search
        by_formula = search.score(best.setting).seconds
        rivals = [p for p in [self.advice.fit] if p is not None and p.setting.type_k is best.setting.type_k]
        tell("planning: around --fit")
        for scored in sorted(map(search.score, around_fit), key=lambda s: s.seconds):
            if scored.seconds > _NEAR * by_formula:
                break
            if scored.setting.type_k is best.setting.type_k and next(search.best([scored]), None) is not None:
                rivals.append(self.make(BEST, scored))
        found = min((p for p in rivals if p.fits), key=lambda p: p.seconds, default=best)
        if found.seconds * _NOTEWORTHY_TIME >= best.seconds:  # what gains less stays with its plainer flags
            found = next((p for p in rivals if p is self.advice.fit and p.fits), best)
        if found.seconds < best.seconds:
            second = min((p for p in [best, *rivals] if p.fits and p is not found), key=lambda p: p.seconds)
            shown_below = self.advice.fit is not None and _is_same(self.advice.fit.setting, second.setting)
            plans[:] = [replace(found, title=BEST), *([] if shown_below else [replace(second, title="next best")])]

    def _with_cache(self, plans: list[Recommendation], tell: Callable[[str], None]) -> None:
        """Put the best setting with an expert cache first, if it is noteworthily faster on the simulated machine.

        No other is shown: each takes a second to carry out, and not every llama.cpp has the flag.
        """
        without = plans[0]
        limit = _NEAR * without.seconds
        near = (s for s in self._cached if s.seconds <= _NEAR * limit)  # before it is filled
        found = next(self.search.best(near), None)
        if found is None:
            return
        found = self.search.filled(found)
        if found.seconds > limit:
            return
        tell("planning: an expert cache")
        made = self.make(BEST, found)
        if made.seconds * _NOTEWORTHY <= without.seconds:
            plans[:] = [made, replace(without, title="without an expert cache")]

    def beyond_llama(self, settings: list[Setting], tell: Callable[[str], None]) -> Recommendation | None:
        """Return the best setting whose cache leaves misses to the CPU; None if it is not noteworthily faster than the best plan.

        llama.cpp has no such flag, so it is no plan.
        """
        first, search = self.advice.plans[0], self.search
        every = dict.fromkeys([*settings, *(s.setting for s in self._cached)])
        asked = (s for s in every if s.moe_cache_mib and s.is_pinned and s.type_k is first.setting.type_k)
        ranked = search.ranked((replace(s, moe_cache_misses="cpu") for s in asked), lambda s: _step(s.seconds))
        faster = [s for s in ranked if s.seconds * _NOTEWORTHY <= first.seconds]
        if not faster or search.memory.exact(without_cache(faster[0].setting)) is None:
            return None
        tell("planning: misses on the CPU")
        for scored in faster:
            taken = search.memory.exact(scored.setting) if search.memory.may_fit(scored.setting) else []
            if taken is None:
                return None  # the model's graphs cannot do that
            if taken and all(d.fits for d in taken):
                made = self.make("not in llama.cpp: misses on the CPU", search.filled(scored))
                return made if made.seconds * _NOTEWORTHY <= first.seconds else None
        return None

    def best_first(self) -> None:
        """Put first what the simulated machine finds fastest; formulas ranked before, and may be a few per cent off.

        What the user's flags or ``--fit`` came to counts too. A plan with another KV type than the first never moves up.
        """
        advice = self.advice
        first = advice.plans[0]
        rivals = [p for p in advice.shown if p.fits and p.is_of_llama and p.setting.type_k is first.setting.type_k]
        best = min(rivals, key=lambda p: p.seconds)
        if best.seconds * _NOTEWORTHY_TIME >= first.seconds:
            return
        others = [p for p in advice.plans[1:] if p is not best]
        moved = [replace(best, title=first.title), replace(first, title="next best"), *others]
        advice.plans = moved[: max(len(advice.plans), 1)]

    def _small(self, ranked: list[Scored], best: Scored) -> Iterator[Scored]:
        """Yield settings that are at most 10 % slower, those with the least on the devices first; of about as much the fastest."""
        memory = self.search.memory

        def on_devices(scored: Scored) -> tuple[int, float, int]:
            taken = memory.estimate(scored.setting) or memory.at_least(scored.setting)
            n_bytes = sum(d.bytes for d in taken[:-1])
            return round(math.log(max(n_bytes, 1), _NOTEWORTHY)), scored.seconds, n_bytes

        left = [s for s in ranked if s.seconds <= 1.1 * best.seconds]
        while left:
            found = min(left, key=on_devices)
            is_known = memory.estimate(found.setting) is not None
            if (
                is_known or not memory.may_fit(found.setting) or memory.exact(found.setting) is None
            ):  # else more is known now
                left.remove(found)
                yield found

    def _next(self, ranked: list[Scored], best: Scored) -> list[Scored]:
        """Return settings with the best one's micro-batch and fewer weights on the devices."""
        on_devices = {s.setting: sum(self.search.memory.weights(s.setting)[:-1]) for s in [best, *ranked]}
        limit, n_ubatch = on_devices[best.setting], best.setting.n_ubatch
        return [s for s in ranked if on_devices[s.setting] < limit and s.setting.n_ubatch == n_ubatch]

    def make(self, title: str, scored: Scored) -> Recommendation:
        """Return the recommendation of a setting."""
        search, setting = self.search, scored.setting
        flags = flags_of(setting, search.goal.context, has_devices=bool(search.machine.cards))
        shown = with_llama_names(flags, search.machine.cards)
        memory = search.memory.exact(setting) or []
        names = [card.name for card in search.machine.cards]
        if len(set(names)) < len(names):
            names = [f"{name} #{i}" for i, name in enumerate(names)]
        memory = [replace(m, device=name) for m, name in zip(memory, [*names, "host"], strict=False)]
        times = self._times.get(setting)
        if times is None:
            times = _times(search, setting) if memory else _Times(*_formulas(search, setting))
            self._times[setting] = times
        goal = search.goal
        exact = Scored(setting, goal.prompt / times.pp.mid, goal.generate / times.tg.mid)
        if setting.moe_cache_misses == "copy":
            line, ik_line = (command("llama-server", self.model, f) for f in (shown, ik_flags_of(shown)))
        else:
            asked = ["--batches", "1", "-d", str(goal.prompt), "--generate", str(goal.generate)]
            line, ik_line = shlex.join(["pyggml", "splits", *self.splits, *flags, *asked]), ""
        return Recommendation(
            title, setting, flags, line, ik_line, times.pp, times.tg, exact.seconds, memory, times.link_prompt,
            times.link_generated, bottleneck(search, scored, exact), times.hit_rate,
            search.memory.refused.get(setting, ""),
        )  # fmt: skip

    def _points(self, ranked: list[Scored]) -> list[tuple[int, float, float, str]]:
        """Return what the page draws: settings that fit by what is known, each once; the plans are first."""
        points: list[tuple[int, float, float, str]] = []
        goal, memory = self.search.goal, self.search.memory
        cached: set[Setting] = set()
        for scored in {s.setting: s for s in ranked}.values():
            taken = memory.estimate(scored.setting) or memory.at_most(scored.setting)
            if taken is None or not all(d.fits for d in taken):
                continue
            if scored.setting.moe_cache_mib:  # only the best size
                alike = without_cache(scored.setting)
                if alike in cached:
                    continue
                cached.add(alike)
            flags = " ".join(flags_of(scored.setting, goal.context, has_devices=bool(self.search.machine.cards)))
            n_bytes = sum(d.bytes for d in taken[:-1])
            prompt, answer = goal.prompt / scored.prompt_s, goal.generate / scored.generate_s
            points.append((n_bytes, prompt, answer, flags))
        return points


def _step(seconds: float) -> int:
    """Return a time in steps of half a per cent: at smaller differences the plainer setting wins."""
    return round(200 * math.log(seconds))


def _weighed(scored: Scored, seconds: float) -> float:
    """Return a time of a setting, longer with its cache on the host."""
    return seconds if scored.setting.kv_offload else _NOTEWORTHY * seconds


def _any(made: Recommendation) -> bool:
    return True


def _is_same(a: Setting, b: Setting) -> bool:
    return replace(a, n_batch=0) == replace(b, n_batch=0)


@dataclass(frozen=True, slots=True)
class _Times:
    """Speeds, and bytes over the links per token."""

    pp: Speed
    tg: Speed
    link_prompt: float = 0.0
    link_generated: float = 0.0
    hit_rate: float | None = None


def _formulas(search: Search, setting: Setting) -> tuple[Speed, Speed]:
    return search.speed(setting, is_prompt=True), search.speed(setting, is_prompt=False)


def _times(search: Search, setting: Setting) -> _Times:
    """Return speeds by the scheduler on the simulated machine, as `splits` prints them; the search goes by formulas.

    Notes
    -----
    A machine without cards has the speeds of the formulas.
    """
    goal = search.goal
    pp, tg = _formulas(search, setting)
    if not search.machine.cards:
        return _Times(pp, tg)
    planner = search.memory.planner(setting)
    routing = search.shape.routing
    prompt = simulate_prompt(planner, goal.prompt, routing=routing)
    key = search.generation_key(setting)
    if (
        search.memory.has_window
    ):  # the cache of a sliding window has room for a micro-batch, and generation reads it all
        key += (setting.n_ubatch,)
    if key not in search.generated:
        if setting.moe_cache_mib:
            answer = simulate_generation(planner, goal.generate, depth=goal.prompt, routing=routing)
        else:
            answer = simulate_batch(planner, 1, depth=goal.depth, routing=routing)
        cache = planner.expert_cache
        search.generated[key] = answer, None if cache is None else cache.counters.hit_rate
    answer, hit_rate = search.generated[key]
    return _Times(
        prompt.speed or pp,
        answer.speed or tg,
        prompt.bytes_copied / goal.prompt,
        answer.bytes_copied / answer.n_tokens,
        hit_rate,
    )
