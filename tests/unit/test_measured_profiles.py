"""Profiles in files: what is measured here, what a self test reported, and the cards that Linux describes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pyggml.backend import REGISTRY
from pyggml.cli import run
from pyggml.commands import _measure
from pyggml.cost import link_of, parse_profile
from pyggml.errors import DeviceUnavailableError
from pyggml.hardware.cards import CARDS, Card
from pyggml.hardware.files import ProfileFile, card_of_rates, host_of_rates, read_profile, write_profile
from pyggml.hardware.formulas import Kind, Work, card_s, host_s
from pyggml.hardware.hosts import DEFAULT_HOST, parse_host
from pyggml.hardware.pci import found_cards
from pyggml.hardware.rates import RATES
from pyggml.selftest.times import Sizes
from pyggml.types import Type

#: What a self test would measure of a card.
MEASURED = {
    "ADD f32": 600e9, "MUL_MAT_ID f16, 512 tokens": 30e12, "MUL_MAT_ID q4_K, 512 tokens": 20e12,
    "MUL_MAT_ID q8_0, 512 tokens": 24e12, "MUL_MAT_ID q6_K, 512 tokens": 22e12, "copy to the device, pageable, 64 MiB": 9e9,
    "copy to the device, pinned, 1 MiB": 15e9, "copy to the device, pinned, 64 MiB": 24e9, "copy from the device, pinned, 64 MiB": 20e9,
}  # fmt: skip


def report(device: str, description: str, **facts: str) -> dict[str, Any]:
    """Return what `pyggml selftest --json` prints, as far as a profile goes."""
    rates = [{"what": what, "per_s": rate, "unit": "B/s"} for what, rate in MEASURED.items()]
    return {"device": device, "description": description, "facts": facts, "outcomes": [], "rates": rates}


@pytest.mark.parametrize("name", ["rtx3090", "r9700", "b580", "p40"])
def test_a_card_of_measured_rates_gives_these_rates(name: str) -> None:
    """The sheet that is made of measurements predicts what was measured, whatever the kernels' family."""
    card = card_of_rates(MEASURED, name)
    assert card_s(Work(read_bytes=600e9, n_kernels=0), card, RATES) == pytest.approx(1.0)
    # 64 experts of 64 columns each
    work = Work(Kind.PRODUCT, 22e12, type=Type.Q4_K, columns=4096.0, matrices=64.0, n_tokens=512, n_kernels=0)
    assert card_s(work, card, RATES) == pytest.approx(1.0, rel=0.02)
    assert card.memory_bytes == CARDS[name].memory_bytes


def test_a_self_test_is_a_profile(tmp_path: Path) -> None:
    """Its report is taken by --device for a card, by --host for a CPU, and is a simulated card's own profile for `sim`."""
    path = tmp_path / "selftest.json"
    path.write_text(json.dumps(report("cuda:0", "NVIDIA GeForce RTX 3090", memory_bytes=str(24 << 30))))
    profile = parse_profile(str(path))
    assert isinstance(profile.sheet, Card)
    assert (profile.sheet.name, profile.memory_bytes) == ("rtx3090", 24 << 30)
    assert (profile.link.bytes_per_s, profile.from_device.bytes_per_s) == (24e9, 20e9)
    assert REGISTRY.open_all([str(path), "cpu"], data=False)[0].profile == profile
    path.write_text(json.dumps(report("cuda:0", "a card of next year", memory_bytes=str(48 << 30))))
    assert parse_profile(str(path)).memory_bytes == 48 << 30
    path.write_text(json.dumps(report("cuda:0", "a card of next year")))
    with pytest.raises(DeviceUnavailableError, match="no card of the table"):
        parse_profile(str(path))
    path.write_text(json.dumps(report("libggml:CPU", "AMD EPYC")))
    assert parse_host(str(path)).product_per_s == 22e12
    with pytest.raises(DeviceUnavailableError, match="of a host, not of a device"):
        parse_profile(str(path))
    path.write_text(json.dumps({**report("sim:rtx3060", "rtx3060"), "rates": []}))
    assert parse_profile(str(path)) == parse_profile("rtx3060")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """A file holds a host, a device or both; each option names the other where its part is missing."""
    path = tmp_path / "p.json"
    host, card = replace(DEFAULT_HOST, product_per_s=1e12), CARDS["rtx3060"]
    write_profile(path, ProfileFile(host, card, 20e9, 15e9), {})
    assert parse_host(str(path)) == host
    made = parse_profile(str(path))
    assert (made.sheet, made.link.bytes_per_s, made.from_device.bytes_per_s) == (card, 20e9, 15e9)
    write_profile(path, ProfileFile(None, card), {})
    assert parse_profile(str(path)).link == link_of(card)
    with pytest.raises(DeviceUnavailableError, match="of a device, not of a host"):
        parse_host(str(path))
    with pytest.raises(DeviceUnavailableError, match="ends in"):
        write_profile(tmp_path / "p.txt", ProfileFile(host), {})
    with pytest.raises(DeviceUnavailableError, match="cannot be written"):
        write_profile(tmp_path / "no" / "p.json", ProfileFile(host), {})
    with pytest.raises(DeviceUnavailableError, match="is no profile: no such file"):
        read_profile(tmp_path / "missing.json")


@pytest.mark.parametrize("text", ["[]", "{}", "no json", '{"pyggml_profile": 2}', '{"pyggml_profile": 1, "host": {"read_bytes_per_s": -1}, "device": null}',
                                  '{"outcomes": [], "rates": [], "device": "cuda:0", "description": "RTX 3090"}'])  # fmt: skip
def test_what_is_no_profile_is_told(text: str, tmp_path: Path) -> None:
    """Damaged and foreign files end in an error that says what writes profiles."""
    path = tmp_path / "p.json"
    path.write_text(text)
    for read in (lambda: parse_host(str(path)), lambda: parse_profile(str(path))):
        with pytest.raises(DeviceUnavailableError, match="no profile"):
            read()


def test_impossible_cards_are_refused(tmp_path: Path) -> None:
    """A rate of 0, or a generation that is not known, is no card."""
    path = tmp_path / "p.json"
    for change in ({"bytes_per_s": 0.0}, {"generation": "voodoo"}, {"memory_bytes": 0}):
        write_profile(path, ProfileFile(None, CARDS["rtx3060"]), {})
        data = json.loads(path.read_text())
        data["device"]["card"] |= change
        path.write_text(json.dumps(data))
        with pytest.raises(DeviceUnavailableError, match="cannot be"):
            parse_profile(str(path))


def test_measured_products_are_the_hosts_speed() -> None:
    """A host with a measured rate multiplies at that rate."""
    host = host_of_rates(MEASURED, replace(DEFAULT_HOST, read_bytes_per_s=50e9))
    work = Work(Kind.PRODUCT, 22e12, type=Type.Q4_K, columns=512.0, n_tokens=512)
    assert host_s(work, host, RATES) == pytest.approx(1.0)
    assert host.read_bytes_per_s == 50e9


def test_measure_writes_what_host_and_device_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`devices --measure` measures memory and products here, and the link of a simulated card by its clock."""
    monkeypatch.setattr(_measure, "Sizes", lambda tokens: Sizes(1 << 16, 256, 8, 4, 2, tokens, (1 << 12,)))
    path = tmp_path / "here.json"
    assert run(["devices", "--measure", str(path), "-dev", "rtx3060", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    host, profile = parse_host(str(path)), parse_profile(str(path))
    assert asdict(host) == told["host"]
    assert min(host.read_bytes_per_s, host.product_per_s, host.n_cores) > 0
    assert profile.sheet == CARDS["rtx3060"]
    assert profile.link.bytes_per_s == pytest.approx(parse_profile("rtx3060").link.bytes_per_s, rel=0.01)
    assert run(["devices", "--measure", str(tmp_path / "host.txt")]) == 1
    assert "ends in .json" in capsys.readouterr().err
    assert run(["devices", "-dev", "rtx3060"]) == 2


def slot(root: Path, address: str, **files: str) -> None:
    """Write what the kernel says of a device."""
    folder = root / address
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("klass", "class")).write_text(text + "\n")


def test_cards_are_found_as_linux_describes_them(tmp_path: Path) -> None:
    """Name, generation and width come from the slot; an idle card's lowered rate does not mislead; other devices are left out."""
    root, proc = tmp_path / "devices", tmp_path / "nvidia"
    slot(root, "0000:00:02.0", klass="0x030000", vendor="0x8086", device="0x3e92")  # graphics within a processor
    slot(root, "0000:00:1f.3", klass="0x040300", vendor="0x8086", device="0xa348")
    slot(root, "0000:01:00.0", klass="0x030000", vendor="0x10de", device="0x2204", revision="0xa1",
         current_link_speed="2.5 GT/s PCIe", max_link_speed="16.0 GT/s PCIe", current_link_width="8")  # fmt: skip
    slot(root, "0000:03:00.0", klass="0x030000", vendor="0x1002", device="0x744c", revision="0xcc", mem_info_vram_total=str(20 << 30),
         current_link_speed="16.0 GT/s PCIe", max_link_speed="16.0 GT/s PCIe", current_link_width="16")  # fmt: skip
    slot(root, "0000:04:00.0", klass="0x030200", vendor="0x10de", device="0x9999", current_link_width="4")
    (proc / "0000:04:00.0").mkdir(parents=True)
    (proc / "0000:04:00.0" / "information").write_text("Model: \t\t NVIDIA GeForce RTX 5090\nIRQ: 1\n")
    slot(root, "0000:05:00.0", klass="0x038000", vendor="0x1002", device="0x1586")
    slot(root, "0000:06:00.0", klass="0x030000", vendor="0x1002", device="0x0001")
    cards = found_cards(root, proc)
    assert [c.profile for c in cards] == ["rtx3090-pcie4x8", "rx7900xt-pcie4", "rtx5090", "8060s", ""]
    assert (cards[0].pcie, cards[0].lanes) == (4, 8)
    assert cards[4].title == "AMD device 0001"
    assert parse_profile(cards[0].profile).link == link_of(CARDS["rtx3090"], "4.0 x8")
    assert found_cards(tmp_path / "nowhere") == []


def test_a_slow_slot_holds_a_card_back(tmp_path: Path) -> None:
    """The port above says how fast a link can be."""
    root = tmp_path / "devices"
    port = tmp_path / "pci0000:00" / "0000:00:01.0"
    slot(
        port,
        "0000:01:00.0",
        klass="0x030000",
        vendor="0x10de",
        device="0x2684",
        max_link_speed="16.0 GT/s PCIe",
        current_link_width="16",
    )
    (port / "max_link_speed").write_text("8.0 GT/s PCIe\n")
    root.mkdir()
    (root / "0000:01:00.0").symlink_to(port / "0000:01:00.0")
    assert [c.profile for c in found_cards(root)] == ["rtx4090-pcie3"]
