"""The public names: what `pyggml.__all__` lists exists, is documented, and changes only on purpose."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import pyggml
from pyggml import ops

#: The public names. A change here is a change for users: note it in CHANGELOG.md.
NAMES = {
    "CPU", "DIALECTS", "REGISTRY", "AllocError", "Backend", "BackendError", "Buffer", "BufferType", "BufferUsage",
    "Cause", "ComputeError", "ComputeRecord", "Context", "CopyPolicy", "CopyRecord", "Device", "DeviceType",
    "DeviceUnavailableError", "Dialect", "Event", "ExpertIdError", "FormatError", "FullCopier", "GGUFFile", "Graph",
    "GraphError", "GraphView", "Observer", "Op", "OutOfMemoryError", "Plan", "Planner", "PyggmlError", "RPCError",
    "ReadRecord", "Recorder", "Recording", "Repairs", "SchedError", "Scheduler", "Session", "ShapeError", "Sim",
    "Split", "SplitRecord", "Statistics", "Tensor", "TensorFlag", "Transfer", "Type", "UnsupportedOpError",
    "UpstreamCopier", "UsedExpertCopier", "UsedExpertsRecord", "VirtualClock", "WaitRecord", "ops", "plan",
}  # fmt: skip


def test_public_names_are_pinned() -> None:
    """The names are these, each once; ops are reached by their namespace, and as attributes of the package."""
    assert set(pyggml.__all__) == NAMES
    assert len(pyggml.__all__) == len(set(pyggml.__all__))
    assert not NAMES & set(ops.__all__)
    assert all(getattr(pyggml, name) is getattr(ops, name) for name in ops.__all__)


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
