"""The public names: what `pyggml.__all__` lists exists, is documented, and changes only on purpose."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyggml
from pyggml import errors, ops

ROOT = Path(__file__).parents[2]

#: The public names. A change here is a change for users: note it in CHANGELOG.md.
NAMES = {
    "CPU", "DIALECTS", "Backend", "Buffer", "BufferType", "BufferUsage", "Cause", "ComputeRecord", "Context", "CopyPolicy",
    "CopyRecord", "Device", "DeviceType", "Dialect", "Event", "EventRecord", "FullCopier", "GGUFFile", "Graph", "GraphView",
    "Observer", "Op", "Plan", "Planner", "PyggmlError", "ReadRecord", "Recording", "Repairs", "Scheduler", "Session", "Sim",
    "Split", "SplitRecord", "Statistics", "Tensor", "TensorFlag", "Transfer", "Type", "UsedExpertCopier",
    "UsedExpertsRecord", "VirtualClock", "WaitRecord", "errors", "ops", "plan",
}  # fmt: skip


def test_public_names_are_pinned() -> None:
    """The names are these, each once; ops are reached by their namespace, and as attributes of the package."""
    assert set(pyggml.__all__) == NAMES
    assert len(NAMES) <= 45
    assert len(pyggml.__all__) == len(set(pyggml.__all__))
    assert not NAMES & set(ops.__all__)
    assert all(getattr(pyggml, name) is getattr(ops, name) for name in ops.__all__)


def test_errors_are_reached_by_their_namespace() -> None:
    """Beside the root of the tree, an error is in `pyggml.errors` and nowhere else."""
    assert not (set(errors.__all__) - {"PyggmlError"}) & set(vars(pyggml))
    assert pyggml.PyggmlError is errors.PyggmlError


def test_pages_import_public_names_from_the_top() -> None:
    """No page takes a public name from an inner module."""
    inner = {}
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for module, names in re.findall(
            r"^from pyggml\.([\w.]+) import (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            if found := NAMES & set(re.split(r",\s*", names)):
                inner[path.name, module] = found
    assert inner == {}


def test_import_of_all_names_hides_no_builtin() -> None:
    """`from pyggml import *` leaves abs, round, set and sum as they are, and brings no op."""
    import builtins

    own: dict[str, object] = {}
    exec("from pyggml import *", own)  # noqa: S102  the statement itself is what is tested
    assert not {name for name in own if hasattr(builtins, name) and not name.startswith("_")}
    assert "mul_mat" not in own


def test_public_names_exist_and_are_documented() -> None:
    """Each name can be imported; each class and function has a docstring of its own."""
    for name in pyggml.__all__:
        value = getattr(pyggml, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert (value.__doc__ or "").strip(), f"pyggml.{name} has no docstring"


@pytest.mark.parametrize("cls", sorted(n for n in NAMES if inspect.isclass(getattr(pyggml, n))))
def test_public_methods_are_documented(cls: str) -> None:
    """Each public method and property that a public class of ours defines has a docstring, its own or inherited."""
    for name, member in vars(getattr(pyggml, cls)).items():
        if not name.startswith("_") and (inspect.isroutine(member) or isinstance(member, (property, classmethod))):
            assert inspect.getdoc(getattr(getattr(pyggml, cls), name)), f"pyggml.{cls}.{name} has no docstring"


def test_what_is_not_there_says_so() -> None:
    """An unknown name is the usual AttributeError."""
    with pytest.raises(AttributeError, match="no attribute 'gpu'"):
        pyggml.gpu  # noqa: B018


def test_import_is_light() -> None:
    """Importing the package brings neither kernels nor file formats nor a terminal library."""
    heavy = "{'numba', 'gguf', 'rich', 'tokenizers', 'jinja2', 'pyggml.session', 'pyggml.kernels.cpu.kernel'}"
    code = f"import sys, pyggml; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
