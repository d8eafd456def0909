"""`plan`: the best settings for a model and a machine, their speed and memory, the bottleneck, and what would help most."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from heapq import heapify, heappop, heappush
from numbers import Integral
from pathlib import Path

from ..backend import REGISTRY, Backend, split_devices
from ..catalog import header_path
from ..collector import rare_collections
from ..errors import DeviceUnavailableError, GraphError, check_kind
from ..foresight import Machine, ModelShape, Setting
from ..gguf import GGUFFile
from ..hardware.apple import found_mac, usable_bytes
from ..hardware.cards import llama_names
from ..hardware.hosts import Host, assumed_host, host_spec, parse_host
from ..hardware.measure import UNKNOWN, measure_host
from ..hardware.pci import found_cards
from ..models.context import cache_type
from ..models.placement import check_shares, warn_of_unmatched
from ..routing import Routing, parse_routing, routing_of
from .answer import Advice
from .explain import explain as explain_flag
from .explain import flag_name
from .limits import helps
from .maker import Maker
from .memory import MemoryModel, ask_llama, fit_setting
from .offload import pays_from
from .search import Goal, Search, plain_first
from .settings import EXPLAIN, Space, placement_flags

__all__ = ["open_machine", "plan", "this_machine"]

#: What llama.cpp's ``--fit`` keeps free of each device.
MARGIN_BYTES = 1 << 30


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
    routing: Routing | str | None = None,
    compare: Sequence[Setting] = (),
    explain: str = "",
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
        ``"ddr4-3200x2,cores=8,64GiB"``; empty: that of a card with unified memory, else a desktop with 8 cores and two
        channels of DDR5-5600.
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
    routing : Routing or str, optional
        How tokens choose experts, or a text for `parse_routing`; by default by the model's router (`routing_of`).
    compare : sequence of Setting
        Your own settings, for comparison.
    explain : str
        A flag, such as ``"-ub"``: what its other values come to (`Advice.explained`).
    on_progress : callable, optional
        Called with the current work.

    Raises
    ------
    FormatError
        The file or model does not exist.
    DeviceUnavailableError
        A card, or a part of the host's description, is unknown.
    ModelError
        pyggml does not build the model's graph, and llama.cpp refuses the model.
    GraphError
        A number of tokens or plans is below 1, or the context is too small; no KV cache has a type; a flag to explain is none that is chosen; or
        ``compare`` has what is no `Setting`, or shares that the cards do not have.
    """
    begin = time.perf_counter()
    for what, n in (("n_plans", n_plans), ("margin_bytes", margin_bytes)):
        check_kind(what, n, Integral, hint="a whole number")
    if n_plans < 1 or margin_bytes < 0:
        raise GraphError(f"{n_plans} plans with {margin_bytes:,} bytes free: at least 1 plan and 0 bytes are needed")
    if isinstance(routing, str):
        routing = parse_routing(routing)
    for own in compare:
        check_kind("a setting to compare", own, Setting, hint="such as pyggml.foresight.Setting(n_cpu_moe=30)")
    goal = _goal(prompt, generate, context)
    flag = flag_name(explain) if explain else ""
    if flag is None:
        raise GraphError(f"a plan does not choose {explain}", hint=f"it chooses {', '.join(EXPLAIN)}")
    tell = on_progress or (lambda what: None)
    name = os.fspath(model)
    path = name if os.path.lexists(name) else os.fspath(header_path(name))
    machine_notes: list[str] = []
    if devices is None:
        tell("looking at this machine")
        devices, host, machine_notes = this_machine(host)
    backends, machine = open_machine(devices, host)
    for card in machine.cards:
        if margin_bytes >= card.memory_bytes:
            raise GraphError(
                f"a margin of {margin_bytes / 2**30:.1f} GiB leaves nothing of {card.name}", hint="ask for less"
            )
    tell("reading the header")
    with GGUFFile.open(path) as file, ExitStack() as held:
        shape = ModelShape.from_header(file.metadata, file.tensors, Path(name).name)
        if shape.n_expert:
            shape = replace(shape, routing=_checked(routing or routing_of(file.tensors), goal))
        memory = held.enter_context(
            closing(MemoryModel(file, backends, context, host=machine.host, margin_bytes=margin_bytes))
        )
        for own in compare:
            check_shares(placement_flags(own), [b.device for b in backends[:-1]])
            warn_of_unmatched(placement_flags(own), [b.device for b in backends], list(file.tensors))
        threads = held.enter_context(ThreadPoolExecutor(1))
        asked = threads.submit(ask_llama, file, backends, context)  # llama.cpp answers in a process of its own
        search = Search(shape, machine, goal, memory)
        space = _space(shape, machine, goal, kv_types)
        shown = name if os.path.lexists(name) or name.startswith("hf:") else f"{name.replace(':', '-')}.gguf"
        advice = Advice(
            name,
            goal,
            _describe(machine),
            [
                *machine_notes,
                *_assumptions(machine, host, shape, is_stated=routing is not None),
                *_beyond_training(file, context),
            ],
        )
        maker = Maker(search, shown, [name, *_where(devices, host)], advice)
        tell(f"timing {len(space)} settings")
        settings = list(space.settings(machine.host.n_cores))

        def around_fit() -> list[Setting]:
            """Ask what --fit chooses, and return the settings around it."""
            choice = fit_setting(memory, machine.host.n_cores, asked.result)
            chosen, advice.fit_note, advice.fit_by = choice.setting, choice.note, choice.by
            if memory.exact(chosen) is not None:
                advice.fit = maker.make("what llama.cpp's --fit chooses", search.score(chosen))
            return [s for s in space.around(chosen) if s != chosen]

        settings.sort(key=plain_first)
        ask_fit = around_fit if machine.cards else list[Setting]
        advice.plans = maker.best_plans(settings, ask_fit, n_plans, space.kv_types[0], tell)
        if not advice.plans:
            ask_fit()
        advice.compared = [
            maker.make("yours" if len(compare) < 2 else f"yours, {i}", search.score(setting))
            for i, setting in enumerate(compare, 1)
        ]
        if advice.plans:
            maker.best_first()
            advice.beyond = maker.beyond_llama(settings, tell)
            best = advice.plans[0]
            advice.assumed += order_of_cards(machine, best.setting)
            tell("from when copying pays")
            advice.pays_from = pays_from(search, best.setting)
            tell("what would help")
            advice.helps = helps(search, settings, best.setting)
            if flag:
                advice.explained = explain_flag(maker, space, settings, best, flag)
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
    Cards come from the system (`found_cards`, on macOS `found_mac`); what is no card of the table cannot be planned with and
    is named.
    """
    cards, mac = found_cards(), found_mac()
    names = [card.profile for card in cards if card.profile]
    notes = [f"found {card.title} in slot {card.address}, planned as {card.profile}" for card in cards if card.profile]
    notes += [
        f"{card.title} in slot {card.address} is left out: it is no card of the table"
        for card in cards
        if not card.profile
    ]
    if mac is not None:
        names += [mac.profile] if mac.profile else []
        notes += mac.notes
    elif not cards:
        notes.append("no card was found in this machine: the CPU alone (--device names one)")
    if not host:
        host = measure_host(n_bytes=1 << 28, n_times=3)
        notes.append(f"this machine's memory is read at {host.read_bytes_per_s / 1e9:.1f} GB/s, measured now")
        if host.description == UNKNOWN:
            notes.append(
                f"{host.n_cores} logical processors were counted as cores, as this system does not tell more (set --host)"
            )
    return names, host, notes


def _goal(prompt: int, generate: int, context: int) -> Goal:
    for what, n in (("prompt", prompt), ("generate", generate), ("context", context)):
        check_kind(what, n, Integral, hint="a whole number of tokens")
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
    stated = host if isinstance(host, Host) else parse_host(host) if host else None
    around = stated or assumed_host(p.sheet for p in known)
    return [d.backend() for d in opened], Machine.of_profiles(known, around)


def _where(devices: str | Sequence[str], host: str | Host) -> list[str]:
    """Return a machine as `pyggml splits` takes it."""
    names = devices if isinstance(devices, str) else ",".join(devices)
    if isinstance(host, Host):
        host = host_spec(host)
    cpu = [] if "cpu" in names.split(",") else ["cpu"]
    return ["-dev", ",".join([*filter(None, [names]), *cpu]), *(["--host", host] if host else [])]


def _checked(routing: Routing, goal: Goal) -> Routing:
    """Return a routing that knows of all tokens, or raise `GraphError`."""
    n, needed = routing.n_tokens, goal.prompt + goal.generate
    if n is not None and n < needed:
        raise GraphError(
            f"{routing} has {n} tokens, prompt and answer have {needed}",
            hint=f"plan for shorter ones (--prompt {max(n // 2, 1)} --generate {max(n - n // 2, 1)}), or record more",
        )
    return routing


def _space(shape: ModelShape, machine: Machine, goal: Goal, kv_types: Sequence[str]) -> Space:
    types = tuple(cache_type(t, "a type of the KV cache") for t in kv_types)
    if not types:
        raise GraphError("no type of the KV cache is allowed", hint="such as f16")
    space = Space.of(
        shape,
        n_ctx=goal.context,
        n_devices=len(machine.cards),
        has_unified=any(card.is_unified for card in machine.cards),
        device_bytes=sum(card.memory_bytes for card in machine.cards),
    )
    return replace(space, kv_types=types)


def _describe(machine: Machine) -> str:
    cards = ", ".join(f"{c.name} ({c.memory_bytes / 2**30:.0f} GiB)" for c in machine.cards) or "no card"
    size = f", {machine.host.memory_bytes / 2**30:.0f} GiB" if machine.host.memory_bytes else ""
    return f"{cards}; host: {machine.host.n_cores} cores, reads {machine.host.read_bytes_per_s / 1e9:.0f} GB/s{size}"


def _assumptions(machine: Machine, host: str | Host, shape: ModelShape, *, is_stated: bool) -> list[str]:
    links = [
        f"link of {card.name}: {link.bytes_per_s / 1e9:.1f} GB/s from pinned memory"
        for card, link in zip(machine.cards, machine.links, strict=True)
        if not card.is_unified
    ]
    said = list(dict.fromkeys(links))
    if not host:
        is_shared = any(card.is_unified for card in machine.cards)
        as_said = f"--host {host_spec(machine.host)}" if is_shared else "set it with --host"
        said.append(f"host: {machine.host.description} ({as_said})")
    elif machine.host.is_memory_assumed:
        said.append("the host's memory is 2 channels of DDR5-5600 (its type was not given: --host ddr4-3200x2,...)")
    for card in machine.cards:
        if card.family == "metal" and 0 < machine.host.memory_bytes <= card.memory_bytes:
            gib, whole = usable_bytes(machine.host.memory_bytes) / 2**30, host_spec(machine.host)
            said.append(
                f"{card.name}'s GPU may use all of the memory; macOS gives it {gib:g} GiB unless iogpu.wired_limit_mb is set "
                f"(--device {card.name}-{gib:g}GiB --host {whole})"
            )
    if host and not machine.host.memory_bytes:
        said.append("the host's memory is large enough (its size was not given)")
    if shape.n_expert:
        said.append(
            f"tokens choose experts as in {shape.routing}"
            if is_stated
            else "tokens choose experts as in published runs"
        )
    return said


def order_of_cards(machine: Machine, best: Setting) -> list[str]:
    """Return what is said where a faster card than the first one would compute the prompt's copied weights, if it were the first."""
    cards = machine.cards
    if len(cards) < 2 or not (best.n_cpu_moe or best.overrides or best.n_gpu_layers >= 0) or not best.op_offload:
        return []
    order = sorted(range(len(cards)), key=lambda i: -cards[i].f16_per_s)
    if cards[order[0]].f16_per_s < 1.2 * cards[0].f16_per_s:
        return []
    names = llama_names(cards)
    own, first = ",".join(cards[i].name for i in order), cards[order[0]].name
    said = f"{cards[0].name} is llama.cpp's first device, which computes what a prompt copies from host memory"
    flag = ",".join(names[i] for i in order)
    return [f"{said}; with {first} first prompts are faster (--device {flag}: plan with --device {own})"]


def _beyond_training(file: GGUFFile, context: int) -> list[str]:
    """Return what is said of a context that is longer than the model's own."""
    trained = file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length")
    if not isinstance(trained, int) or context <= trained:
        return []
    return [f"memory for {context} tokens; the model was trained with {trained}, and llama-server uses no more"]


def _nothing_fits(advice: Advice, search: Search, settings: list[Setting]) -> None:
    """Find the minimum of missing bytes, and the largest quantisation that would fit."""
    from ..catalog import QUANTS, find_model, shapes, type_tensors

    memory = search.memory
    queue = [(memory.least_missing(setting), i) for i, setting in enumerate(settings)]
    heapify(queue)
    least: int | None = None
    while queue and (least is None or queue[0][0] < least):
        bound, i = heappop(queue)
        now = memory.least_missing(settings[i])
        if now > bound:  # more is known of such settings than when it was put there
            heappush(queue, (now, i))
        elif taken := memory.exact(settings[i]):
            missing = sum(d.missing_bytes for d in taken)
            least = missing if least is None else min(least, missing)
    advice.missing_bytes = least or 0
    name, _, _ = advice.model.partition(":")
    sizes = find_model(name)
    if sizes is None:
        return
    room = search.shape.total_bytes - advice.missing_bytes
    rows = shapes(sizes)
    by_size = sorted(((sum(t.nbytes for t in type_tensors(sizes, rows, q)), q) for q in QUANTS), reverse=True)
    fitting = next((q for size, q in by_size if size < 0.97 * room), "")
    advice.smaller = f"{name}:{fitting}" if fitting else ""
