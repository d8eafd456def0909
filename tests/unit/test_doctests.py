"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2] / "pyggml"
FINDER = doctest.DocTestFinder(exclude_empty=True)


def _modules_with_examples() -> list[str]:
    """Return the names of modules whose source holds an example; the rest need not be imported to know."""
    return [
        ".".join(("pyggml", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for path in sorted(ROOT.rglob("*.py"))
        if ">>> " in path.read_text(encoding="utf-8")
    ]


def _examples(module: ModuleType) -> list[doctest.DocTest]:
    return [found for found in FINDER.find(module, module.__name__) if found.examples]


@pytest.mark.parametrize("name", _modules_with_examples())
def test_examples_are_true(name: str) -> None:
    """Every example of a module prints what it shows."""
    examples = _examples(importlib.import_module(name))
    assert examples, f"{name}: no docstring holds the example"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    failures: list[str] = []
    for example in examples:
        runner.run(example, out=failures.append)
    assert not failures, "".join(failures)
