"""Finds races in llama.cpp's scheduler by running it on simulated devices that work late.

A world is a way to run the model: one device or two, experts in host memory or not, with pipeline copies if llama.cpp
uses them. In each world the same chunks of a prompt are decoded once with devices that work at once, then once per seed
with late devices. A hazard is reported whether or not it changed a result.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from ..backends.host.race_watch import Hazard
from ..errors import ModelError
from ..gguf import GGUFFile
from ..models.context import ContextFlags
from ..models.placement import PlacementFlags
from .engine import FoundHazard
from .library import find_llama
from .model import WAITS, LlamaModel, check_waits
from .source import CapturedFacts

__all__ = ["WAITS", "RaceReport", "World", "WorldReport", "find_races", "worlds_of"]

#: Sizes of a prompt's chunks: more than there are pipeline copies, and all different, so that each has its own graph.
_CHUNKS = tuple(range(33, 40))


@dataclass(frozen=True, slots=True)
class World:
    """A way to run a model."""

    name: str
    devices: tuple[str, ...]
    placement: PlacementFlags


@dataclass(frozen=True, slots=True)
class NamedHazard:
    """A hazard, and the number of runs that had it; texts, split and micro-batch are those of the first run."""

    device: str
    split: int
    micro_batch: int
    earlier: str
    later: str
    missing: str
    n_runs: int  #: runs that had it

    def __str__(self) -> str:
        return f"split {self.split} on {self.device}: {self.later}, but {self.earlier}, and {self.missing}"


@dataclass(slots=True)
class WorldReport:
    """The results of a world's runs.

    Attributes
    ----------
    n_wrong, n_failed : int
        Runs whose logits differ from those with devices that work at once, and runs that ended with an error.
    """

    world: World
    n_runs: int = 0
    n_wrong: int = 0
    n_failed: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    hazards: list[NamedHazard] = field(default_factory=list)
    error: str = ""  #: of the first run that failed

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "world": self.world.name, "devices": list(self.world.devices), "runs": self.n_runs, "wrong": self.n_wrong,
            "failed": self.n_failed, "error": self.error, "splits": self.splits, "hazards": [asdict(h) for h in self.hazards],
        }  # fmt: skip


@dataclass(slots=True)
class RaceReport:
    """The results of all worlds."""

    model: str
    build: str  #: llama.cpp's version, which several builds share
    library: str  #: its shared object
    dropped: tuple[str, ...]
    worlds: list[WorldReport] = field(default_factory=list)

    @property
    def n_hazards(self) -> int:
        """Number of hazards in all worlds."""
        return sum(len(w.hazards) for w in self.worlds)

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "model": self.model, "build": self.build, "library": self.library, "dropped": list(self.dropped), "hazards": self.n_hazards,
            "worlds": [w.as_dict() for w in self.worlds],
        }  # fmt: skip


def worlds_of(facts: CapturedFacts, device: str = "sim:rtx4090-pcie4") -> list[World]:
    """Return the worlds for a model: layers on one device and on two, experts there and in host memory."""
    half = max(facts.n_layer // 2, 1)
    two = (device, device)
    worlds = [
        World("one device", (device,), PlacementFlags()),
        World("half of the layers", (device,), PlacementFlags(n_gpu_layers=half)),
        World("two devices, a pipeline", two, PlacementFlags(tensor_split=(1.0, 1.0))),
        World("the output alone on the second", two, PlacementFlags(tensor_split=(float(facts.n_layer), 1.0))),
    ]
    if facts.n_expert:
        on_host = PlacementFlags(cpu_moe=True)
        worlds.insert(1, World("experts on the host", (device,), on_host))
        worlds.append(World("experts on the host, two devices", two, replace(on_host, tensor_split=(1.0, 1.0))))
    return worlds


def find_races(
    model: str | os.PathLike[str],
    *,
    seeds: Sequence[int],
    dropped: Collection[str] = (),
    worlds: Sequence[World] | None = None,
    threads: int | None = 1,
    library: str = "",
    progress: Callable[[str, int, int], None] = lambda world, done, total: None,
) -> RaceReport:
    """Run a model in llama.cpp on late devices, in each world with each seed.

    Parameters
    ----------
    library : str
        As for `LlamaModel`.
    dropped : collection of str
        Waits (of `WAITS`) that devices skip, to test whether the missing wait is found.
    worlds : sequence of World, optional
        By default `worlds_of` the model.
    progress : callable
        Called with a world and the number of its finished runs.

    Raises
    ------
    GraphError
        There is no such wait.
    DeviceUnavailableError
        There is no llama.cpp.
    ModelError
        llama.cpp refuses the model, or fails on it.
    """
    check_waits(dropped)
    with GGUFFile.open(model) as file:
        facts = CapturedFacts.read(file, 0)
    path = os.fspath(find_llama(library))
    report = RaceReport(os.fspath(model), "", path, tuple(sorted(dropped)))
    context = ContextFlags(n_ctx=512, n_ubatch=64)
    for world in worlds_of(facts) if worlds is None else worlds:
        made = WorldReport(world)
        report.worlds.append(made)
        todo = list(seeds)
        while todo:  # repeats only if the child ends in a run without its waits
            with LlamaModel(
                model, devices=world.devices, placement=world.placement, context=context, threads=threads, seed=0,
                host=None, library=path, timeout_s=600.0,
            ) as opened:  # fmt: skip
                report.build = opened.build
                _run(opened, made, todo, dropped, partial(progress, world.name))
    return report


def _run(
    model: LlamaModel,
    report: WorldReport,
    todo: list[int],
    dropped: Collection[str],
    progress: Callable[[int, int], None],
) -> None:
    """Run the seeds until none is left or the child has ended."""
    chunks = list(_chunks(model.n_vocab))
    alone = model.decode_late(chunks, seed=None)
    if alone.error is not None:
        raise alone.error
    report.splits = alone.splits
    n_all = report.n_runs + len(todo)
    while todo and not model.is_closed:
        progress(report.n_runs, n_all)
        report.n_runs += 1
        try:
            run = model.decode_late(chunks, seed=todo.pop(0), dropped=dropped)
        except ModelError as error:
            _failed(report, error)
            continue
        if run.error is not None:
            _failed(report, run.error)
        elif run.logits is None or alone.logits is None or not np.array_equal(run.logits, alone.logits):
            report.n_wrong += 1
        _take(report, run.hazards)


def _failed(report: WorldReport, error: BaseException) -> None:
    report.n_failed += 1
    report.error = report.error or str(error)


def _take(report: WorldReport, found: Sequence[FoundHazard]) -> None:
    """Add the hazards of a run; hazards that differ only in the number of a pipeline copy count as one."""
    known = {_key(h.device, h): i for i, h in enumerate(report.hazards)}
    seen = set()
    for one in found:
        key = _key(one.device, one.hazard)
        if key in seen:
            continue
        seen.add(key)
        if key in known:
            old = report.hazards[known[key]]
            report.hazards[known[key]] = replace(old, n_runs=old.n_runs + 1)
        else:
            hazard = one.hazard
            report.hazards.append(
                NamedHazard(one.device, one.split, one.micro_batch, hazard.earlier, hazard.later, hazard.missing, 1)
            )


def _chunks(n_vocab: int) -> Iterator[list[int]]:
    start = 0
    for n in _CHUNKS:
        yield [(32 + 53 * i) % n_vocab for i in range(start, start + n)]
        start += n


def _key(device: str, hazard: Hazard | NamedHazard) -> tuple[str, ...]:
    """Return the key by which hazards count as one: all fields without the number of a pipeline copy."""
    return device, *(re.sub(r"#\d+'", "'", text) for text in (hazard.earlier, hazard.later, hazard.missing))
