"""`plan`: the best settings for a model and a machine, their speed and memory, the bottleneck, and what would help most."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..backend import REGISTRY, Backend, split_devices
from ..catalog import header_path
from ..collector import rare_collections
from ..errors import DeviceUnavailableError, GraphError
from ..foresight import Machine, ModelShape, Setting, Speed
from ..gguf import GGUFFile
from ..hardware.hosts import DEFAULT_HOST, Host, parse_host
from ..hardware.measure import measure_host
from ..hardware.pci import found_cards
from ..simulation import simulate_batch
from ..types import Type
from .limits import Help, bottleneck, helps
from .memory import DeviceMemory, MemoryModel, ask_llama, fit_setting
from .search import Goal, Scored, Search, pays_from, plain_first
from .settings import Space, command, flags_of, ik_flags_of

__all__ = ["Advice", "Help", "Recommendation", "open_machine", "plan", "this_machine"]

#: What llama.cpp's ``--fit`` keeps free of each device.
MARGIN_BYTES = 1 << 30
#: A plan that gives something up must gain this much.
_NOTEWORTHY = 1.03
#: Times closer than this are equal.
_NOTEWORTHY_TIME = 1.01
#: Of a prompt that is computed on the simulated machine; each takes a tenth of a second.
_MOST_MICRO_BATCHES = 8


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One recommended setting, with its speed, memory and bottleneck.

    Attributes
    ----------
    title : str
        The respect in which it is best.
    flags : list of str
        The flags for `llama-server`, `llama-cli` and `pyggml splits`.
    command : str
        A complete command line.
    ik_command : str
        The same for ik_llama.cpp, whose flags differ (`ik_flags_of`).
    pp_tps, tg_tps : Speed
        Tokens per second of the prompt and of the answer.
    seconds : float
        The time of the goal's prompt and answer together.
    memory : list of DeviceMemory
        The memory on each device, then on the host.
    link_bytes_per_token : float
        Bytes copied between devices per token of the prompt; `link_bytes_per_generated`: per token of the answer.
    bottleneck : str
        One sentence.
    """

    title: str
    setting: Setting
    flags: list[str]
    command: str
    ik_command: str
    pp_tps: Speed
    tg_tps: Speed
    seconds: float
    memory: list[DeviceMemory]
    link_bytes_per_token: float
    link_bytes_per_generated: float
    bottleneck: str

    @property
    def device_bytes(self) -> int:
        """The sum of the memory on all devices."""
        return sum(device.bytes for device in self.memory[:-1])

    @property
    def fits(self) -> bool:
        """Whether the margin stays free on all devices and the host."""
        return all(device.fits for device in self.memory)


@dataclass(slots=True)
class Advice:
    """The result of `plan`.

    Attributes
    ----------
    plans : list of Recommendation
        The recommendations, best first; empty if nothing fits.
    compared : list of Recommendation
        The user's own settings.
    pays_from : int or None
        The size of a micro-batch, in tokens, from which offloading pays with the best setting.
    missing_bytes : int
        If nothing fits: the bytes that the smallest setting lacks; `smaller` names a quantisation that would fit.
    tried : int
        The number of settings with predicted times; `n_planned` of them were planned by the scheduler.
    fit : Recommendation or None
        What llama.cpp's ``--fit`` chooses with its own margin of 1 GiB and default flags; None without a card. `fit_note`: what it
        could not reach; `fit_by`: whether llama.cpp itself answered, or pyggml's rule.
    points : list of tuple
        For the page, for each setting that fits: device bytes, tokens/s of prompt and answer, flags.
    """

    model: str
    goal: Goal
    machine: str
    assumed: list[str]
    plans: list[Recommendation] = field(default_factory=list)
    compared: list[Recommendation] = field(default_factory=list)
    fit: Recommendation | None = None
    fit_note: str = ""
    fit_by: str = ""
    helps: list[Help] = field(default_factory=list)
    pays_from: int | None = None
    missing_bytes: int = 0
    smaller: str = ""
    tried: int = 0
    n_planned: int = 0
    seconds: float = 0.0
    points: list[tuple[int, float, float, str]] = field(default_factory=list)

    @property
    def shown(self) -> list[Recommendation]:
        """The plans, then what they are compared with: the user's settings and what ``--fit`` chooses."""
        return [*self.plans, *self.compared, *([] if self.fit is None else [self.fit])]


@rare_collections
def plan(
    model: str | os.PathLike[str],
    *,
    devices: str | Sequence[str] | None = None,
    host: str | Host = "",
    prompt: int = 2048,
    generate: int = 256,
    context: int = 8192,
    margin_bytes: int = MARGIN_BYTES,
    kv_types: Sequence[str] = ("f16", "q8_0"),
    n_plans: int = 4,
    compare: Sequence[Setting] = (),
    on_progress: Callable[[str], None] | None = None,
) -> Advice:
    """Recommend llama.cpp's flags for a model on a machine.

    Parameters
    ----------
    model : path or str
        A GGUF file (only its header is read), or ``NAME[:QUANT]`` from `pyggml models`.
    devices : str or sequence of str
        Names of cards, such as ``"rtx3090"`` or ``"rtx3090,rtx3090"``; ``"cpu"``: only the CPU; None: those of this machine.
    host : str or Host
        ``"ddr4-3200x2,cores=8,64GiB"``; empty: a desktop with 8 cores and two channels of DDR5-5600.
    prompt, generate : int
        The number of tokens of prompt and answer for which settings are ranked.
    context : int
        Cells of the KV cache.
    margin_bytes : int
        Memory to keep free on each device, and on a host of known size.
    kv_types : sequence of str
        Allowed types of the KV cache; at equal speed the first is preferred.
    n_plans : int
        The maximum number of recommendations.
    compare : sequence of Setting
        Your own settings, for comparison.
    on_progress : callable, optional
        Called with the current work.

    Raises
    ------
    FormatError
        The file or model does not exist.
    DeviceUnavailableError
        A card, or a part of the host's description, is unknown.
    GraphError
        A number of tokens is below 1, or the context is too small for them.
    """
    begin = time.perf_counter()
    goal = _goal(prompt, generate, context)
    tell = on_progress or (lambda what: None)
    name = os.fspath(model)
    path = name if os.path.lexists(name) else os.fspath(header_path(name))
    machine_notes: list[str] = []
    if devices is None:
        tell("looking at this machine")
        devices, host, machine_notes = this_machine(host)
    backends, machine = open_machine(devices, host)
    tell("reading the header")
    with GGUFFile.open(path) as file, ExitStack() as held:
        shape = ModelShape.from_header(file.metadata, file.tensors, Path(name).name)
        memory = held.enter_context(
            closing(MemoryModel(file, backends, context, host=machine.host, margin_bytes=margin_bytes))
        )
        threads = held.enter_context(ThreadPoolExecutor(1))
        asked = threads.submit(ask_llama, file, backends, context)  # llama.cpp answers in a process of its own
        search = Search(shape, machine, goal, memory)
        space = _space(shape, machine, goal, kv_types)
        shown = name if os.path.lexists(name) or name.startswith("hf:") else f"{name.replace(':', '-')}.gguf"
        advice = Advice(name, goal, _describe(machine), [*machine_notes, *_assumptions(machine, host, shape, context)])
        maker = _Maker(search, shown, advice)
        tell(f"timing {len(space)} settings")
        settings = list(space.settings(machine.host.n_cores))
        search.ranked(settings, lambda s: s.seconds)  # meanwhile
        chosen = None
        if machine.cards:
            tell("what llama.cpp's --fit chooses")
            choice = fit_setting(memory, machine.host.n_cores, asked.result)
            chosen, advice.fit_note, advice.fit_by = choice.setting, choice.note, choice.by
            if not chosen.overrides:  # shares that no grid has
                settings += [s for s in space.around(chosen) if s not in settings]
        settings.sort(key=plain_first)
        advice.plans = maker.best_plans(settings, n_plans, Type.of(kv_types[0]), tell)
        if chosen is not None and memory.exact(chosen) is not None:
            advice.fit = maker.make("what llama.cpp's --fit chooses", search.score(chosen))
        advice.compared = [maker.make("yours", search.score(setting)) for setting in compare]
        if advice.plans:
            maker.best_first()
            best = advice.plans[0]
            advice.pays_from = pays_from(search, best.setting)
            tell("what would help")
            advice.helps = helps(search, settings, best.setting)
        else:
            _nothing_fits(advice, search, settings)
        advice.tried, advice.n_planned = search.n_timed, memory.n_opened
    advice.seconds = time.perf_counter() - begin
    return advice


def this_machine(host: str | Host = "") -> tuple[list[str], str | Host, list[str]]:
    """Return the devices of this machine as `plan` takes them, its host, and what was assumed.

    Parameters
    ----------
    host : str or Host
        What was said of the host; empty: it is found, and how fast its memory is read is measured in a second.

    Notes
    -----
    Cards come from the system (`found_cards`); what is no card of the table cannot be planned with and is named.
    """
    cards = found_cards()
    names = [card.profile for card in cards if card.profile]
    notes = [f"found {card.title} in slot {card.address}, planned as {card.profile}" for card in cards if card.profile]
    notes += [
        f"{card.title} in slot {card.address} is left out: it is no card of the table"
        for card in cards
        if not card.profile
    ]
    if not cards:
        notes.append("no card was found in this machine: the CPU alone (--device names one)")
    if not host:
        host = measure_host(n_bytes=1 << 28, n_times=3)
        notes.append(f"this machine's memory is read at {host.read_bytes_per_s / 1e9:.1f} GB/s, measured now")
    return names, host, notes


def _goal(prompt: int, generate: int, context: int) -> Goal:
    for what, n in (("prompt", prompt), ("generate", generate), ("context", context)):
        if n < 1:
            raise GraphError(f"{what} is {n}; it counts tokens, from 1 up")
    if prompt + generate > context:
        raise GraphError(
            f"a prompt of {prompt} tokens and an answer of {generate} do not fit in a context of {context}",
            hint=f"use a context of at least {prompt + generate}",
        )
    return Goal(prompt, generate, context)


def open_machine(devices: str | Sequence[str], host: str | Host) -> tuple[list[Backend], Machine]:
    """Return devices that only plan, then the CPU; and the machine that they are."""
    names = split_devices(devices, REGISTRY.kinds()) if isinstance(devices, str) else list(devices)
    opened = REGISTRY.open_all([*(n for n in names if n != "cpu"), "cpu"], data=False)
    profiles = [d.profile for d in opened[:-1]]
    known = [p for p in profiles if p is not None]
    if len(known) < len(profiles):
        other = next(d for d in opened if d.profile is None)
        raise DeviceUnavailableError(
            other.name,
            "`pyggml plan` takes cards by name or simulated devices",
            hint="such as rtx3090 or sim:rtx4090-pcie4",
        )
    around = host if isinstance(host, Host) else parse_host(host) if host else DEFAULT_HOST
    return [d.backend() for d in opened], Machine.of_profiles(known, around)


def _space(shape: ModelShape, machine: Machine, goal: Goal, kv_types: Sequence[str]) -> Space:
    space = Space.of(
        shape,
        n_ctx=goal.context,
        n_devices=len(machine.cards),
        has_unified=any(card.is_unified for card in machine.cards),
    )
    return replace(space, kv_types=tuple(Type.of(t) for t in kv_types))


def _describe(machine: Machine) -> str:
    cards = ", ".join(f"{c.name} ({c.memory_bytes / 2**30:.0f} GiB)" for c in machine.cards) or "no card"
    size = f", {machine.host.memory_bytes / 2**30:.0f} GiB" if machine.host.memory_bytes else ""
    return f"{cards}; host: {machine.host.n_cores} cores, reads {machine.host.read_bytes_per_s / 1e9:.0f} GB/s{size}"


def _assumptions(machine: Machine, host: str | Host, shape: ModelShape, context: int) -> list[str]:
    said = [
        f"link of {card.name}: {link.bytes_per_s / 1e9:.1f} GB/s from pinned memory"
        for card, link in zip(machine.cards, machine.links, strict=True)
        if not card.is_unified
    ]
    if not host:
        said.append(f"host: {machine.host.description} (set it with --host)")
    elif not machine.host.memory_bytes:
        said.append("the host's memory is large enough (its size was not given)")
    if shape.n_expert:
        said.append("tokens choose experts as in published runs")
    return said


class _Maker:
    """Makes plans of settings, each distinct from those before."""

    def __init__(self, search: Search, model: str, advice: Advice) -> None:
        self.search, self.model, self.advice = search, model, advice

    def best_plans(
        self, settings: list[Setting], n_plans: int, kv_type: Type, tell: Callable[[str], None]
    ) -> list[Recommendation]:
        """Return the best setting for the goal, and others that are better in one respect."""
        search = self.search
        by_goal = search.ranked(settings, lambda s: _step(s.seconds))
        plain = [s for s in by_goal if s.setting.type_k is kv_type]
        tell("planning the best")
        best = next(search.best(plain), None) or next(search.best(by_goal), None)
        if best is None:
            return []
        plans = [self.make("best for this prompt and answer", best)]
        first = plans[0]
        wanted: list[tuple[str, list[Scored], Callable[[Recommendation], bool]]] = [
            ("fastest prompt", sorted(plain, key=lambda s: (_step(s.prompt_s), s.generate_s)), _any),
            ("fastest generation", sorted(plain, key=lambda s: (_step(s.generate_s), s.prompt_s)), _any),
            (
                "the same with a KV cache in q8_0",
                [s for s in by_goal if s.setting.type_k is not kv_type],
                lambda made: made.seconds * _NOTEWORTHY <= first.seconds,  # else worse results for nothing
            ),
            (
                "less memory on the device",
                self._small(plain, best),
                lambda made: made.device_bytes * _NOTEWORTHY <= first.device_bytes,
            ),
            ("mapped file, as llama.cpp's default", [s for s in plain if not s.setting.is_pinned], _any),
            ("micro-batches of 512, as llama.cpp's default", [s for s in plain if s.setting.n_ubatch == 512], _any),
            ("one step less on the device", self._next(plain, best), _any),
        ]
        for title, ranked, is_wanted in wanted:
            if len(plans) >= n_plans:
                break
            tell(f"planning: {title}")
            found = next(search.best(ranked), None)
            if found is not None and not any(_is_same(found.setting, p.setting) for p in plans):
                made = self.make(title, found)
                if is_wanted(made):
                    plans.append(made)
        self._points(by_goal)
        return plans

    def best_first(self) -> None:
        """Put first what the simulated machine finds fastest; formulas ranked before, and may be a few per cent off.

        What the user's flags or ``--fit`` came to counts too. A plan with another KV type than the first never moves up.
        """
        advice = self.advice
        first = advice.plans[0]
        rivals = [p for p in advice.shown if p.fits and p.setting.type_k is first.setting.type_k]
        best = min(rivals, key=lambda p: p.seconds)
        if best.seconds * _NOTEWORTHY_TIME >= first.seconds:
            return
        others = [p for p in advice.plans[1:] if p is not best]
        moved = [replace(best, title=first.title), replace(first, title="nearly as fast"), *others]
        advice.plans = moved[: max(len(advice.plans), 1)]

    def _small(self, ranked: list[Scored], best: Scored) -> list[Scored]:
        """Return settings that are at most 10 % slower, those with the least on the devices first."""
        memory = self.search.memory

        def on_devices(scored: Scored) -> tuple[int, int]:
            taken = memory.estimate(scored.setting) or memory.devices(memory.weights(scored.setting))
            return sum(d.bytes for d in taken[:-1]), scored.setting.n_ubatch

        return sorted((s for s in ranked if s.seconds <= 1.1 * best.seconds), key=on_devices)

    def _next(self, ranked: list[Scored], best: Scored) -> list[Scored]:
        """Return settings with the best one's micro-batch and fewer weights on the devices."""
        on_devices = {s.setting: sum(self.search.memory.weights(s.setting)[:-1]) for s in [best, *ranked]}
        limit, n_ubatch = on_devices[best.setting], best.setting.n_ubatch
        return [s for s in ranked if on_devices[s.setting] < limit and s.setting.n_ubatch == n_ubatch]

    def make(self, title: str, scored: Scored) -> Recommendation:
        """Return the recommendation of a setting."""
        search, setting = self.search, scored.setting
        flags = flags_of(setting, search.goal.context, has_devices=bool(search.machine.cards))
        memory = search.memory.exact(setting) or []
        names = [card.name for card in search.machine.cards]
        if len(set(names)) < len(names):
            names = [f"{name} #{i}" for i, name in enumerate(names)]
        memory = [replace(m, device=name) for m, name in zip(memory, [*names, "host"], strict=False)]
        times = _times(search, setting) if memory else _Times(*_formulas(search, setting))
        goal = search.goal
        exact = Scored(setting, goal.prompt / times.pp.mid, goal.generate / times.tg.mid)
        return Recommendation(
            title, setting, flags, command("llama-server", self.model, flags),
            command("llama-server", self.model, ik_flags_of(flags)), times.pp, times.tg, exact.seconds, memory, times.link_prompt,
            times.link_generated, bottleneck(search, scored, exact),
        )  # fmt: skip

    def _points(self, ranked: list[Scored]) -> None:
        """Keep what the page draws: settings that fit by what is known."""
        goal, memory = self.search.goal, self.search.memory
        for scored in ranked:
            taken = memory.estimate(scored.setting)
            if taken is None or not all(d.fits for d in taken):
                continue
            flags = " ".join(flags_of(scored.setting, goal.context))
            n_bytes = sum(d.bytes for d in taken[:-1])
            prompt, answer = goal.prompt / scored.prompt_s, goal.generate / scored.generate_s
            self.advice.points.append((n_bytes, prompt, answer, flags))


def _step(seconds: float) -> int:
    """Return a time in steps of half a per cent: at smaller differences the plainer setting wins."""
    return round(200 * math.log(seconds))


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


def _formulas(search: Search, setting: Setting) -> tuple[Speed, Speed]:
    return search.speed(setting, is_prompt=True), search.speed(setting, is_prompt=False)


def _times(search: Search, setting: Setting) -> _Times:
    """Return speeds by the scheduler on the simulated machine, as `splits` prints them; the search goes by formulas.

    Notes
    -----
    A prompt of more than `_MOST_MICRO_BATCHES` micro-batches has the speed of the formulas, as a machine without cards has.
    """
    goal = search.goal
    pp, tg = _formulas(search, setting)
    if not search.machine.cards:
        return _Times(pp, tg)
    planner, n = search.memory.planner(setting), goal.prompt
    if -(-n // setting.n_ubatch) > _MOST_MICRO_BATCHES:
        n = setting.n_ubatch
    prompt = simulate_batch(planner, n)
    key = search.generation_key(setting)
    if key not in search.generated:
        search.generated[key] = simulate_batch(planner, 1, depth=goal.depth)
    one = search.generated[key]
    if n == goal.prompt:
        pp = prompt.speed or pp
    return _Times(pp, one.speed or tg, prompt.bytes_copied / n, float(one.bytes_copied))


def _nothing_fits(advice: Advice, search: Search, settings: list[Setting]) -> None:
    """Return the minimum of missing bytes, and a smaller quantisation that would fit."""
    from ..catalog import QUANTS, find_model

    least: int | None = None
    for setting in settings:
        if setting.n_ubatch == settings[0].n_ubatch and not setting.is_pinned:
            weights = search.memory.weights(setting)
            taken = search.memory.estimate(setting) or search.memory.devices(weights)
            missing = sum(d.missing_bytes for d in taken)
            least = missing if least is None else min(least, missing)
    advice.missing_bytes = least or 0
    name, _, _ = advice.model.partition(":")
    sizes = find_model(name)
    if sizes is None:
        return
    room = sum(d.of_bytes - d.margin_bytes for d in search.memory.devices([0] * len(search.memory.backends)))
    by_size = sorted(((ModelShape.from_sizes(sizes, q).total_bytes, q) for q in QUANTS), reverse=True)
    fitting = next((q for size, q in by_size if size < 0.9 * room), "")
    advice.smaller = f"{name}:{fitting}" if fitting else ""
