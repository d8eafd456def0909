"""Finds the best setting: predicts the time of every setting with formulas, and calculates memory with the scheduler where it decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from ..foresight import Machine, ModelShape, Setting, Speed, speed_of
from ..foresight.estimate import LayerTimes, Placed, place, place_key, predict
from ..simulation import SimulatedBatch
from ..types import Type
from .memory import MemoryModel

__all__ = ["Goal", "Scored", "Search", "plain_first", "without_cache"]


@dataclass(frozen=True, slots=True)
class Goal:
    """The user's work: tokens per prompt, tokens per answer, and cells of the cache."""

    prompt: int = 2048
    generate: int = 256
    context: int = 8192

    @property
    def depth(self) -> int:
        """Tokens in the cache when half of the answer is there: generation is as fast as this token."""
        return self.prompt + self.generate // 2


@dataclass(frozen=True, slots=True)
class Scored:
    """A setting with its times.

    Attributes
    ----------
    prompt_s, generate_s : float
        The time of the goal's prompt and of its answer.
    """

    setting: Setting
    prompt_s: float
    generate_s: float

    @property
    def seconds(self) -> float:
        """Of both."""
        return self.prompt_s + self.generate_s


class Search:
    """Times of settings, and the best ones that fit.

    Parameters
    ----------
    memory : MemoryModel
        Calculates what fits.
    """

    def __init__(self, shape: ModelShape, machine: Machine, goal: Goal, memory: MemoryModel) -> None:
        self.shape, self.machine, self.goal, self.memory = shape, machine, goal, memory
        self.n_timed = 0
        self._generation: dict[tuple[object, ...], float] = {}
        self._prompt: dict[Setting, float] = {}
        self._scored: dict[Setting, Scored] = {}
        #: The answer on the simulated machine and its hits in the expert cache, by `generation_key` and more.
        self.generated: dict[tuple[object, ...], tuple[SimulatedBatch, float | None]] = {}
        self._places: dict[tuple[object, ...], list[Placed]] = {}
        self._layer_s: LayerTimes = {}

    def on(self, machine: Machine) -> Search:
        """Return the search with another machine, whose cards have the same memory."""
        made = Search(self.shape, machine, self.goal, self.memory)
        made._places = self._places
        return made

    def score(self, setting: Setting) -> Scored:
        """Return the times of a setting."""
        known = self._scored.get(setting)
        if known is None:
            known = self._scored[setting] = self._score(setting)
        return known

    def _score(self, setting: Setting) -> Scored:
        self.n_timed += 1
        return Scored(setting, self.prompt_s(setting), self.generate_s(setting))

    def prompt_s(self, setting: Setting) -> float:
        """Return the time of the prompt; large micro-batches do not use an expert cache."""
        key = without_cache(setting)
        if key not in self._prompt:
            n = self.goal.prompt
            one = predict(
                self.shape, self.machine, key, n, 0, is_prompt=True, placed=self._placed(key), known=self._layer_s
            )
            self._prompt[key] = one * n
        return self._prompt[key]

    def _placed(self, setting: Setting) -> list[Placed]:
        """Return where the layers of a setting are."""
        key = place_key(setting)
        if key not in self._places:
            self._places[key] = place(self.shape, setting, [c.memory_bytes for c in self.machine.cards])
        return self._places[key]

    @staticmethod
    def generation_key(s: Setting) -> tuple[object, ...]:
        """Return what of a setting changes the time of the answer: no micro-batch and no offloading does.

        The load mode does with an expert cache, to which experts are sent.
        """
        return (
            s.n_gpu_layers, s.n_cpu_moe, s.overrides, s.tensor_split, s.split_mode, s.threads, s.type_k, s.type_v,
            s.kv_offload, s.flash_attn, s.moe_cache_mib, s.moe_cache_misses, s.is_pinned and s.moe_cache_mib > 0,
        )  # fmt: skip

    def generate_s(self, setting: Setting) -> float:
        """Return the time of the answer."""
        key = self.generation_key(setting)
        if key not in self._generation:
            goal = self.goal
            one = predict(
                self.shape,
                self.machine,
                setting,
                goal.generate,
                goal.prompt,
                is_prompt=False,
                placed=self._placed(setting),
                known=self._layer_s,
            )
            self._generation[key] = one * goal.generate
        return self._generation[key]

    def speed(self, setting: Setting, *, is_prompt: bool) -> Speed:
        """Return tokens a second of the prompt or of the answer, with the range of the estimate."""
        goal = self.goal
        n, depth = (goal.prompt, 0) if is_prompt else (goal.generate, goal.prompt)
        return speed_of(self.shape, self.machine, setting, n, depth, is_prompt=is_prompt)

    def ranked(self, settings: Iterable[Setting], key: Callable[[Scored], float]) -> list[Scored]:
        """Return the settings whose weights alone have room, best first; ties go to the plainer one, as it comes first."""
        return sorted((self.score(s) for s in settings if self.memory.may_fit(s)), key=key)

    def best(self, ranked: Iterable[Scored]) -> Iterator[Scored]:
        """Yield those of a ranked list that fit, by the scheduler's own reserve."""
        memory = self.memory
        for scored in ranked:
            setting = scored.setting
            if setting.moe_cache_mib and memory.may_fit(setting) and memory.estimate(setting) is None:
                memory.exact(without_cache(setting))  # tells the rest, and is planned without another planner
            if not memory.may_fit(setting) or memory.least_missing(setting):
                continue
            taken = memory.exact(setting)
            if taken is not None and all(device.fits for device in taken):
                yield scored

    def filled(self, scored: Scored) -> Scored:
        """Return a setting with an expert cache that takes what is left of the devices' memory, if that is faster."""
        setting, taken = scored.setting, self.memory.exact(scored.setting)
        if taken is None:
            return scored
        left = self.memory.spare_for_slots(setting, taken)
        more = self.score(replace(setting, moe_cache_mib=setting.moe_cache_mib + (left >> 20)))
        filled = self.memory.exact(more.setting) if more.seconds < scored.seconds else None
        return more if filled is not None and all(d.fits for d in filled) else scored


def without_cache(setting: Setting) -> Setting:
    """Return a setting without its expert cache."""
    return replace(setting, moe_cache_mib=0, moe_cache_misses="copy") if setting.moe_cache_mib else setting


def plain_first(setting: Setting) -> tuple[bool, bool, bool, int]:
    """Return what orders settings of equal speed: fewer flags first."""
    return setting.type_k is not Type.F16, not setting.kv_offload, setting.is_pinned, setting.n_ubatch
