"""What settings are asked for their memory, and what of it counts."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest

from pyggml.advisor import MemoryModel, plan
from pyggml.advisor.advice import open_machine
from pyggml.catalog import header_path
from pyggml.errors import GraphError
from pyggml.foresight import Setting
from pyggml.gguf import GGUFFile
from pyggml.planning import Planner
from pyggml.types import Type


def test_types_of_the_cache_that_a_model_cannot_have_are_tried_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three settings with a KV type are refused with the same words: the others of it are not planned, and those of other types are."""
    planner, asked = MemoryModel.planner, []

    def refusing(memory: MemoryModel, setting: Setting) -> Planner:
        asked.append(setting)
        if setting.type_k is Type.Q8_0:
            raise GraphError("no backend of SIM0, CPU can run CONCAT")
        return planner(memory, setting)

    monkeypatch.setattr(MemoryModel, "planner", refusing)
    with_q8 = [Setting(n_gpu_layers=n, type_k=Type.Q8_0, type_v=Type.Q8_0) for n in range(5)]
    advice = plan("llama-3.1-405b", devices="rtx3060", host="ddr4-3200x2,cores=8,16GiB", compare=with_q8)
    assert advice.nothing_fits
    assert sum(s.type_k is Type.Q8_0 for s in asked) == 3
    assert sum(s.type_k is Type.F16 for s in asked) > 3
    assert all("can run CONCAT" in made.refused for made in advice.compared)


def test_memory_of_a_mapped_file_is_that_of_its_weights_on_the_host() -> None:
    """Weights of devices between those on the host are in the mapped range, but take no memory of the host."""
    backends, machine = open_machine("rtx3060", "ddr4-3200x2,cores=8,64GiB")
    with (
        GGUFFile.open(header_path("qwen3-8b")) as file,
        closing(MemoryModel(file, backends, 4096, host=machine.host, margin_bytes=0)) as memory,
    ):
        ends = Setting(overrides=(r"blk\.(0|35)\.=CPU",))
        mapped, pinned = (memory.exact(replace(ends, is_pinned=is_pinned)) for is_pinned in (False, True))
    assert mapped is not None
    assert pinned is not None
    assert mapped[-1].bytes == pytest.approx(pinned[-1].bytes, rel=1e-3)
