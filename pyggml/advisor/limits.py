"""What a setting waits for, and what would help most: the machine is changed, and times are predicted again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import inf

from ..foresight import Machine, Setting
from ..hardware.formulas import pageable_rate
from .memory import DeviceMemory, MemoryModel
from .search import Scored, Search
from .settings import flags_of

__all__ = ["Help", "bottleneck", "helps", "short_s"]

#: A smaller share of the time is not worth a name.
_NOTEWORTHY_SHARE = 0.04
#: For less the scheduler is not asked whether a setting would have room.
_NOTEWORTHY_GAIN = 1.002


@dataclass(frozen=True, slots=True)
class Help:
    """The effect of a change of the machine, from another search.

    Attributes
    ----------
    change : str
        For example ``"4 GiB more memory on the device"``.
    speedup : float
        Seconds of the best setting now, divided by those of the best setting after the change.
    flags : list of str
        The flags of the best setting after the change.
    """

    change: str
    speedup: float
    flags: list[str]


def bottleneck(search: Search, scored: Scored, exact: Scored) -> str:
    """Return the bottleneck in one sentence: each resource is doubled in turn, host weights are pinned, and what helps most is named."""
    machine = search.machine
    phase = "The prompt" if exact.prompt_s > exact.generate_s else "Generation"
    setting = scored.setting
    if setting.threads == machine.host.n_cores:
        setting = replace(setting, threads=0)  # all cores, however many there are

    def gone(machine: Machine, setting: Setting) -> float:
        """Return the share of the time that goes away on a machine with a setting."""
        then = search.on(machine)
        if phase == "The prompt":
            return 1.0 - then.prompt_s(setting) / scored.prompt_s
        return 1.0 - then.generate_s(setting) / scored.generate_s

    shares = {label: 2.0 * gone(faster, setting) for label, faster in _faster(machine)}  # half of it goes away
    slow = pageable_rate(machine.host, machine.rates)
    if machine.cards and not setting.is_pinned and slow < machine.links[0].bytes_per_s:
        saved = 1.0 - slow / machine.links[0].bytes_per_s  # of each copy's time, with pinned memory
        shares["copies from memory that is not pinned"] = gone(machine, replace(setting, is_pinned=True)) / saved
    what, share = max(shares.items(), key=lambda s: s[1])
    if share <= _NOTEWORTHY_SHARE:
        what, share = "small kernels and their launches", 0.0
    by = f" for {min(share, 1.0):.0%} of its time" if share else ""
    return f"{phase} takes {short_s(max(exact.prompt_s, exact.generate_s))} of {short_s(exact.seconds)} s and waits{by} for {what}."


def short_s(seconds: float) -> str:
    """Return seconds for people: with one decimal, or below one with two digits.

    Examples
    --------
    >>> short_s(12.34), short_s(0.0345)
    ('12.3', '0.035')
    """
    return f"{seconds:.1f}" if seconds >= 1 else f"{seconds:.2g}"


def _faster(machine: Machine) -> list[tuple[str, Machine]]:
    """Return the machine with each of its resources doubled; of host memory what threads read of it, too, however fast it is."""
    host, rates = machine.host, machine.rates
    memory_and_threads = replace(rates, cpu_read=2 * rates.cpu_read)
    made = [
        (
            "host memory",
            replace(machine, host=replace(host, read_bytes_per_s=2 * host.read_bytes_per_s), rates=memory_and_threads),
        ),
        ("the CPU's arithmetic", replace(machine, host=replace(host, n_cores=2 * host.n_cores))),
    ]
    if machine.cards:
        links = [replace(link, bytes_per_s=2 * link.bytes_per_s) for link in machine.links]
        memory = [replace(card, bytes_per_s=2 * card.bytes_per_s) for card in machine.cards]
        fast = [
            replace(c, f32_per_s=2 * c.f32_per_s, f16_per_s=2 * c.f16_per_s, int8_per_s=2 * c.int8_per_s)
            for c in machine.cards
        ]
        made += [
            ("the link to the device", replace(machine, links=links)),
            ("the device's memory", replace(machine, cards=memory)),
            ("the device's arithmetic", replace(machine, cards=fast)),
        ]
    return made


def helps(search: Search, settings: list[Setting], best: Setting) -> list[Help]:
    """Return the effects of changes of the machine, each from another search, the most helpful first."""
    machine, host = search.machine, search.machine.host
    changes: list[tuple[str, Machine, int]] = [
        (
            "twice the memory channels of the host",
            replace(machine, host=replace(host, read_bytes_per_s=2 * host.read_bytes_per_s)),
            0,
        )
    ]
    if machine.cards and not machine.cards[0].is_unified:
        links = [replace(link, bytes_per_s=2 * link.bytes_per_s) for link in machine.links]
        changes.append(("a link twice as fast", replace(machine, links=links), 0))
        where = "each device" if len(machine.cards) > 1 else "the device"
        changes.append((f"4 GiB more memory on {where}", machine, 4 << 30))
    found = []
    memory = search.memory
    missing = {s: _missing_bytes(memory, s) for s in settings if s.type_k is best.type_k}
    least = cache(lambda s: _missing(memory.at_least(s)))
    most = max(more for *_, more in changes)
    now = sorted((search.score(s) for s, n in missing.items() if n <= most), key=lambda s: s.seconds)
    for label, other, more in changes:
        again = search if other is machine else search.on(other)
        then: Scored | None = None
        for scored in now:
            if then is not None and scored.seconds >= 2.0 * then.seconds:
                break  # a resource twice as fast saves half of the time at most
            if missing[scored.setting] <= more:
                made = again.score(scored.setting)
                then = made if then is None or made.seconds < then.seconds else then
        unsure = (s for s, n in missing.items() if more < n < inf and least(s) <= more)
        for made in sorted(map(again.score, unsure), key=lambda s: s.seconds):
            if then is not None and made.seconds * _NOTEWORTHY_GAIN >= then.seconds:
                break
            if memory.estimate(made.setting) is None:
                memory.exact(made.setting)
            if _missing_bytes(memory, made.setting) <= more:
                then = made
                break
        if again is not search:
            search.n_timed += again.n_timed
        if then is not None:
            flags = flags_of(then.setting, search.goal.context)
            found.append(Help(label, search.score(best).seconds / then.seconds, flags))
    return sorted(found, key=lambda h: -h.speedup)


def _missing_bytes(memory: MemoryModel, setting: Setting) -> float:
    """Return how much more memory each device must have for a setting, by what is known of settings like it."""
    taken = memory.estimate(setting) or memory.at_most(setting)
    return inf if taken is None else _missing(taken)


def _missing(taken: list[DeviceMemory]) -> float:
    return max((d.missing_bytes for d in taken[:-1]), default=0) if taken[-1].fits else inf
