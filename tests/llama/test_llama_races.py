"""Races in llama.cpp's scheduler, over simulated devices that work late."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from builds import BUILDS
from click.testing import CliRunner

from pyggml.cli import group
from pyggml.errors import GraphError
from pyggml.gguf import GGUFFile
from pyggml.llama.races import WAITS, World, WorldReport, find_races, worlds_of
from pyggml.llama.source import CapturedFacts
from pyggml.models.placement import PlacementFlags

DEVICE = "sim:rtx4090-pcie4"
PIPELINE = World("pipeline", (DEVICE, DEVICE), PlacementFlags(tensor_split=(1.0, 1.0)))
WHOLE = World("whole", (DEVICE,), PlacementFlags())
EXPERTS = World("experts", (DEVICE,), PlacementFlags(cpu_moe=True))


def _known(world: WorldReport) -> bool:
    """Whether all hazards are the one that upstream has: see docs/upstream.md."""
    return all(
        h.device == "SIM1" and h.later.startswith("SIM0 writes 'SIM1#") and h.missing == "SIM0 does not wait for SIM1"
        for h in world.hazards
    )


def test_the_race_of_pipeline_copies_is_found(random_model: Callable[[str], Path]) -> None:
    """llama.cpp's scheduler lets a device write into a copy that the next device may still read; all else is ordered."""
    report = find_races(random_model("qwen3moe"), seeds=[1], worlds=[EXPERTS, PIPELINE])
    experts, pipeline = report.worlds
    assert (experts.hazards, experts.n_wrong, experts.n_failed) == ([], 0, 0)
    assert pipeline.hazards
    assert _known(pipeline)
    assert "l_out-1" in pipeline.hazards[0].later
    assert pipeline.hazards[0].split == 2
    told = json.loads(json.dumps(report.as_dict()))
    assert told["worlds"][1]["hazards"][0]["missing"] == "SIM0 does not wait for SIM1"


@pytest.mark.parametrize("wait", ["event_synchronize", "event_record", "synchronize"])
def test_a_wait_that_is_left_out_is_noticed(random_model: Callable[[str], Path], wait: str) -> None:
    """An event that is not recorded, or not waited for, alone; and a missing synchronization."""
    world = WHOLE if wait == "synchronize" else PIPELINE
    found = find_races(random_model("qwen3moe"), seeds=[1], worlds=[world], dropped=[wait]).worlds[0]
    host_writes = [h for h in found.hazards if h.later.startswith("the host writes 'SIM0#")]
    assert host_writes
    assert host_writes[0].missing == "the host does not wait for SIM0"


def test_a_stream_that_waits_for_its_own_event_waits_for_nothing(random_model: Callable[[str], Path]) -> None:
    """The scheduler's event_wait is always of the stream that recorded the event: without it nothing changes."""
    path = random_model("qwen3moe")
    plain, without = (
        find_races(path, seeds=[1], worlds=[PIPELINE], dropped=d).worlds[0].hazards for d in ([], ["event_wait"])
    )
    assert without == plain


def test_the_command_lists_hazards(random_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit status 1 where there are some; each with world, split, tensor and missing wait."""
    monkeypatch.setattr("pyggml.llama.races.worlds_of", lambda facts: [PIPELINE])
    path = str(random_model("qwen3moe"))
    result = CliRunner().invoke(group, ["races", path, "--seeds", "1"])
    assert result.exit_code == 1, result.output
    assert "split 2 on SIM1: SIM0 writes 'SIM1#l_out-1#" in " ".join(result.output.split())
    with pytest.raises(GraphError, match="no wait is called 'x'"):
        find_races(path, seeds=[1], dropped=["x"])


def test_worlds_are_of_the_model(random_model: Callable[[str], Path]) -> None:
    """A model without experts has no worlds with experts on the host; names of waits are those of help."""
    from pyggml.commands.races import WAITS as IN_HELP

    with GGUFFile.open(random_model("llama-dense")) as file:
        names = [w.name for w in worlds_of(CapturedFacts.read(file, 0))]
    assert names == ["one device", "half of the layers", "two devices, a pipeline", "the output alone on the second"]
    assert IN_HELP == WAITS


@pytest.mark.slow
@pytest.mark.parametrize("library", ["", *map(str, BUILDS)])
@pytest.mark.parametrize(
    "arch", ["llama", "llama-dense", "qwen3moe", "gpt-oss", "olmoe", "granitemoe", "qwen2moe", "glm4moe", "deepseek2"]
)
def test_no_other_race_in_two_hundred_runs(random_model: Callable[[str], Path], arch: str, library: str) -> None:
    """In every world, 34 orders of work each: the race of pipeline copies, and right results elsewhere."""
    report = find_races(random_model(arch), seeds=range(1, 35 if arch != "llama-dense" else 52), library=library)
    assert sum(w.n_runs for w in report.worlds) == 204
    for world in report.worlds:
        assert world.n_failed == 0
        assert _known(world)
        if not world.hazards:
            assert world.n_wrong == 0
