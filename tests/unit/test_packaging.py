"""What is packaged, and that the package is what its metadata says."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pyggml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_package_list_equals_folders() -> None:
    """Each folder with an __init__.py is in the list of packages, and nothing else is."""
    folders = {p.parent.relative_to(ROOT).parts for p in (ROOT / "pyggml").rglob("__init__.py")}
    folders |= {("pyggml", *p.parent.relative_to(ROOT).parts) for p in (ROOT / "kernels").rglob("__init__.py")}
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(".".join(parts) for parts in folders)
    assert len(set(listed)) == len(listed)


def test_no_module_outside_a_package() -> None:
    """Every module lies in a folder with an __init__.py, so that the wheel has it."""
    for top in ("pyggml", "kernels"):
        for path in (ROOT / top).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def test_version_is_one() -> None:
    """The module's version is the package's."""
    assert PROJECT["project"]["version"] == pyggml.__version__


def test_typed_and_licensed() -> None:
    """The package says that it is typed, and the license names whose design it follows."""
    assert (ROOT / "pyggml" / "py.typed").exists()
    text = (ROOT / "LICENSE").read_text()
    assert "MIT License" in text
    assert "ggml authors" in text
