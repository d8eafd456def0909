"""What `plan` answers: `Recommendation` is one setting with its speed and memory, `Advice` all of them and what they rest on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..foresight import Setting, Speed
from .limits import Help
from .memory import DeviceMemory
from .search import Goal

if TYPE_CHECKING:
    from .explain import Explanation

__all__ = ["Advice", "Recommendation"]


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
        A complete command line; if llama.cpp cannot run the setting (`is_of_llama`), one of `pyggml splits`, which plans it.
    ik_command : str
        The same for ik_llama.cpp, whose flags differ (`ik_flags_of`); empty if llama.cpp cannot run the setting.
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
    hit_rate : float or None
        With an expert cache: the share of the answer's experts that it has, from an empty cache on.
    refused : str
        Why the setting cannot run at all; its memory is unknown then.
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
    hit_rate: float | None = None
    refused: str = ""

    @property
    def device_bytes(self) -> int:
        """The sum of the memory on all devices."""
        return sum(device.bytes for device in self.memory[:-1])

    @property
    def is_of_llama(self) -> bool:
        """Whether llama.cpp has all flags of the setting."""
        return self.setting.moe_cache_misses == "copy"

    @property
    def ik_note(self) -> str:
        """What ik_llama.cpp's command line lacks."""
        return "which has no expert cache (the plan without one is better there)" if self.setting.moe_cache_mib else ""

    @property
    def cache_line(self) -> str:
        """What the expert cache does, in one sentence; empty without one."""
        if self.hit_rate is None:
            return ""
        others = "" if self.is_of_llama else "; the CPU computes the others, which llama.cpp cannot do"
        return (
            f"Expert cache: of the experts that the answer uses, {self.hit_rate:.0%} are in its {self.setting.moe_cache_mib} MiB, "
            f"from an empty cache on{others}."
        )

    @property
    def fits(self) -> bool:
        """Whether the margin stays free on all devices and the host."""
        return not self.refused and all(device.fits for device in self.memory)


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
        If nothing fits: the bytes that the smallest setting lacks; `smaller` names a quantisation that would fit, and is empty if
        none would, None if that is unknown.
    tried : int
        The number of settings with predicted times; `n_planned` of them were planned by the scheduler.
    beyond : Recommendation or None
        What is noteworthily faster than the best plan, but llama.cpp cannot do: an expert cache whose misses the CPU computes.
    fit : Recommendation or None
        What llama.cpp's ``--fit`` chooses with its own margin of 1 GiB and default flags; None without a card. `fit_note`: what it
        could not reach; `fit_by`: whether llama.cpp itself answered, or pyggml's rule.
    explained : Explanation or None
        What the values of a flag come to, if that was asked for.
    """

    model: str
    goal: Goal
    machine: str
    assumed: list[str]
    plans: list[Recommendation] = field(default_factory=list)
    compared: list[Recommendation] = field(default_factory=list)
    beyond: Recommendation | None = None
    fit: Recommendation | None = None
    fit_note: str = ""
    fit_by: str = ""
    helps: list[Help] = field(default_factory=list)
    pays_from: int | None = None
    missing_bytes: int = 0
    smaller: str | None = None
    tried: int = 0
    n_planned: int = 0
    seconds: float = 0.0
    explained: Explanation | None = None
    find_points: Callable[[], list[tuple[int, float, float, str]]] = list  #: see `points`

    @property
    def nothing_fits(self) -> str:
        """What is missing if nothing fits; empty if something does."""
        if self.plans:
            return ""
        told = {None: "", "": " No other quantisation would fit."}.get(self.smaller, f" {self.smaller} would fit.")
        return f"Nothing fits: the smallest setting lacks {self.missing_bytes / 2**30:.1f} GiB.{told}"

    @property
    def pays_line(self) -> str:
        """From when copying host weights pays; empty if it never does."""
        if self.pays_from is None:
            return ""
        is_same = self.pays_from == 32
        llama = (
            ", where llama.cpp starts to copy"
            if is_same
            else "; llama.cpp copies from 32 on (GGML_OP_OFFLOAD_MIN_BATCH changes that)"
        )
        return f"Copying host weights to the device pays from {self.pays_from} tokens per micro-batch on{llama}."

    @property
    def points(self) -> list[tuple[int, float, float, str]]:
        """For the page, for each setting that fits: device bytes, tokens/s of prompt and answer, flags."""
        return self.find_points()

    @property
    def shown(self) -> list[Recommendation]:
        """The plans, then what they are compared with: the user's settings, what ``--fit`` chooses, and what llama.cpp cannot do."""
        return [*self.plans, *self.compared, *(made for made in (self.fit, self.beyond) if made is not None)]
