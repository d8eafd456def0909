"""A Mac is planned as what macOS says of it, and what is assumed is said; no machine is shown as another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner

from pyggml.advisor import advice, plan
from pyggml.cli import group
from pyggml.foresight import machine_of
from pyggml.hardware import measure
from pyggml.hardware.apple import found_mac
from pyggml.hardware.cards import CARDS, find_card
from pyggml.hardware.hosts import DEFAULT_HOST, Host, assumed_host

GIB = 1 << 30
M2 = {
    "machdep.cpu.brand_string": "Apple M2 Max", "hw.memsize": str(64 * GIB), "hw.physicalcpu": "12",
    "hw.perflevel0.physicalcpu": "8", "iogpu.wired_limit_mb": "0", "AGXAccelerator": '  "gpu-core-count" = 30\n',
}  # fmt: skip
INTEL = {
    "machdep.cpu.brand_string": "Intel(R) Core(TM) i9-9900K CPU @ 3.60GHz", "hw.memsize": str(32 * GIB), "hw.physicalcpu": "8",
}  # fmt: skip


def says(told: dict[str, str]) -> Callable[..., str]:
    """Return programs that print what a Mac says; nothing for unknown names."""
    return lambda program, *arguments: told.get(arguments[-1], "")


@pytest.mark.parametrize(
    ("more", "profile", "part"),
    [
        ({}, "m2max30-48GiB", "macOS gives it three quarters"),
        ({"iogpu.wired_limit_mb": "57344"}, "m2max30-56GiB", "56 GiB: iogpu.wired_limit_mb"),
        ({"AGXAccelerator": ""}, "m2max-48GiB", "its GPU cores were not told"),
        ({"hw.memsize": str(24 * GIB)}, "m2max30-16GiB", "two thirds"),
        ({"machdep.cpu.brand_string": "Apple M99 Max"}, "", "not in the table of cards"),
    ],
)
def test_a_mac_is_what_macos_says(more: dict[str, str], profile: str, part: str) -> None:
    """Chip, cores and memory are named with the name by which macOS tells them; the GPU's share is stated."""
    mac = found_mac(says(M2 | more), "darwin")
    assert mac is not None
    assert mac.profile == profile
    told = "; ".join(mac.notes)
    assert part in told
    assert "8 performance cores (hw.perflevel0.physicalcpu)" in told
    assert "unified memory (hw.memsize)" in told
    assert (mac.host.n_cores, mac.host.isa, mac.host.memory_bytes) == (8, "dotprod", mac.memory_bytes)


def test_an_intel_mac_has_no_unified_memory_and_other_systems_are_no_macs() -> None:
    """Its graphics are not planned, and that is said; without answers there is nothing to say."""
    mac = found_mac(says(INTEL), "darwin")
    assert mac is not None
    assert (mac.profile, mac.host.isa, mac.n_cores) == ("", "avx2", 8)
    assert any("not planned" in note for note in mac.notes)
    assert not any("unified" in note for note in mac.notes)
    assert found_mac(says({}), "darwin") is None
    assert found_mac(says(M2), "linux") is None


def faked(monkeypatch: pytest.MonkeyPatch, told: dict[str, str], platform: str = "darwin") -> None:
    """Let this machine be one that says something."""
    mac = found_mac(says(told), platform)
    monkeypatch.setattr(advice, "found_mac", lambda: mac)
    monkeypatch.setattr(measure, "found_mac", lambda: mac)
    monkeypatch.setattr(advice, "found_cards", list)


def test_a_plan_on_a_mac_shares_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card is the chip's GPU, and what it takes and the host takes is not more than there is; nothing speaks of DDR5."""
    faked(monkeypatch, M2)
    made = plan("gpt-oss-20b", context=4096, n_plans=1)
    assert "m2max30 (48 GiB)" in made.machine
    text = " ".join([made.machine, *made.assumed])
    assert "DDR" not in text
    assert "hw.memsize" in text
    assert "GB/s, measured now" in text
    gpu, host = made.plans[0].memory
    assert host.of_bytes == 64 * GIB - gpu.bytes
    assert made.plans[0].fits
    faked(monkeypatch, M2 | {"hw.memsize": str(16 * GIB)})
    small = plan("gpt-oss-20b", context=4096, n_plans=1)
    assert all(m.bytes + m.margin_bytes <= m.of_bytes for p in small.plans for m in p.memory)
    assert not small.plans or sum(m.bytes for m in small.plans[0].memory) <= 15 * GIB


def test_a_named_mac_is_no_desktop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --host a card with unified memory has the host that it is in; the line says which, as --host takes it."""
    made = plan("gpt-oss-20b", devices="m2max-48GiB", context=4096, n_plans=1)
    (line,) = [line for line in made.assumed if line.startswith("host:")]
    assert "the CPU beside m2max" in line
    assert "--host read=224GB/s,cores=8,isa=dotprod,48GiB" in line
    assert not any("DDR" in line for line in made.assumed)
    assert made.plans[0].flags[-2:] == ["-t", "8"]


def test_what_a_shared_memory_cannot_give_is_told_and_not_proposed() -> None:
    """Moving weights to the host frees nothing of a memory that is shared; that macOS keeps a quarter from the GPU is said."""
    made = plan("gpt-oss-20b", devices="m2max-64GiB", context=4096, n_plans=20)
    assert not any("on the device" in p.title for p in made.plans)
    (line,) = [line for line in made.assumed if "iogpu.wired_limit_mb" in line]
    assert "--device m2max-48GiB --host read=224GB/s,cores=8,isa=dotprod,64GiB" in line
    again = plan(
        "gpt-oss-20b", devices="m2max-48GiB", host=line.split("--host ")[1].strip(")"), context=4096, n_plans=1
    )
    assert not any("iogpu" in line for line in again.assumed)
    assert next(m.of_bytes for m in again.plans[0].memory) == 48 * GIB


def test_splits_have_the_cpu_beside_a_mac() -> None:
    """Without --host `splits` assumes the host that `plan` does: the cores of the chip, not a desktop."""
    line = ["splits", "qwen3-0.6b", "-dev", "m2max,cpu", "--batches", "1"]
    assert "the CPU beside m2max, 8 cores" in CliRunner().invoke(group, line).stdout
    assert CliRunner().invoke(group, [*line, "-o", "json"]).exit_code == 0
    assert assumed_host([None, CARDS["rtx3090"]]) is DEFAULT_HOST
    assert machine_of("m2max").host == assumed_host([CARDS["m2max"]])


def test_a_system_that_says_nothing_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither cores nor memory are known, what was counted instead is named."""
    faked(monkeypatch, {}, "win32")
    monkeypatch.setattr(measure, "found_host", lambda: None)
    _, host, notes = advice.this_machine()
    assert isinstance(host, Host)
    assert host.memory_bytes == 0
    assert any("logical processors were counted as cores" in note for note in notes)


@pytest.mark.parametrize(("text", "gib"), [("m2max-48GiB", 48), ("m2max", 96), ("rtx3080-20GiB", 20)])
def test_a_card_may_have_another_size(text: str, gib: Any) -> None:
    """A size behind a card's name replaces that of the table."""
    card = find_card(text)
    assert card is not None
    assert card.memory_bytes == gib * GIB
