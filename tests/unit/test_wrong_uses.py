"""Wrong uses of the Python API: each is one error of pyggml's that says what was wrong and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import pyggml as ggml
from pyggml.commands.make_moe import command as make_moe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small random model."""
    path = tmp_path_factory.mktemp("model") / "small.gguf"
    make_moe.main([str(path), "--layers", "1", "--embd", "64", "--vocab", "320"], standalone_mode=False)
    return path


def _alloc_with_usage(usage: str) -> None:
    context = ggml.Context()
    context.new_tensor("f32", (4,))
    context.alloc(ggml.CPU(threads=1), usage=usage)


WRONG: dict[str, tuple[Callable[[], object], type[ggml.PyggmlError], str]] = {
    "a type that is none": (lambda: ggml.Tensor("f33", (4,)), ggml.GraphError, r"no type is called 'f33' \(there are f32,"),
    "a usage that is none": (lambda: _alloc_with_usage("wieghts"), ggml.GraphError, r"'wieghts' \(there are any, weights"),
    "elements below none": (lambda: ggml.Tensor("f32", (-4, 3)), ggml.ShapeError, "cannot have -4 elements"),
    "rows of broken blocks": (lambda: ggml.Tensor("q4_0", (33, 2)), ggml.ShapeError, "33 elements are no whole blocks of 32"),
    "a name for a backend": (lambda: ggml.Scheduler(["cpu"]), ggml.SchedError, r"'cpu' is no backend \(pyggml.CPU\(\)"),
    "no backend": (lambda: ggml.Scheduler([]), ggml.SchedError, "needs at least one backend"),
    "a device that is none": (lambda: ggml.Sim("rtx9999"), ggml.DeviceUnavailableError, "no such profile"),
    "no thread": (lambda: ggml.CPU(threads=0), ggml.DeviceUnavailableError, "0 threads cannot compute"),
    "no file": (lambda: ggml.Session.open("nowhere.gguf"), ggml.FormatError, r"no such file \(check the path\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_uses_are_told(name: str) -> None:
    """The error is of pyggml's own kinds, in one line."""
    use, kind, text = WRONG[name]
    with pytest.raises(kind, match=text) as caught:
        use()
    assert "\n" not in str(caught.value)


def test_the_cpu_is_no_device_beside_itself(model: Path) -> None:
    """`devices` are those beside the CPU: naming it there would give it a device's share of the layers."""
    with pytest.raises(ggml.DeviceUnavailableError, match="leave it out of the devices"):
        ggml.Session.open(model, devices=["sim", "cpu"])


def test_one_device_may_be_named_without_a_list(model: Path) -> None:
    """A text is one device's name, not a list of letters."""
    with ggml.Session.open(model, devices="sim") as session:
        assert [b.name for b in session.backends] == ["SIM0", "CPU"]


def test_a_closed_file_is_told(model: Path) -> None:
    """A file that was closed cannot be opened as a session."""
    file = ggml.GGUFFile.open(model)
    file.close()
    with pytest.raises(ggml.FormatError, match=r"was closed \(open it again\)"):
        ggml.Session.open(file)
