"""A family of models is one module: nothing else in the product names it."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
from pathlib import Path

import pytest
import tiny

from pyggml.models import architectures, families
from pyggml.models.architecture import Architecture
from pyggml.models.architectures import ARCHITECTURES
from pyggml.models.hparams import HParams

PACKAGE = Path(families.__file__).parents[2]
#: Where names of architectures may stand beside the family's module, and why.
EXCEPTIONS = {
    "catalog": "sizes and headers of published models, of families that are built here or not",
    "foresight": "what a file of any family leaves unsaid of its windows",
    "makers": "random models, of which most families need none of their own",
    "commands/make_moe.py": "the choices of --arch, without importing what makes them",
    "selftest/models.py": "the models that a device is tested with",
    "lab/formats/bigmoeonedge.py": "names that another program's files use",
}
#: Names that mean something else, too: a folder, a vocabulary, a library.
OTHERWISE = {
    "llama": {"llama", "tokenizer", "commands", "planning.py"},
    "qwen2": {"tokenizer"},
    "qwen35": {"tokenizer"},
    "glm4": {"tokenizer"},
    "minimax-m2": {"tokenizer"},
}


@functools.cache
def constants() -> dict[str, set[object]]:
    """Return the constants of each product file, by its path below the package."""
    return {
        path.relative_to(PACKAGE).as_posix(): {
            n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)
        }
        for path in PACKAGE.rglob("*.py")
    }


def naming(name: str) -> set[str]:
    """Return the product files in which an architecture is named."""
    return {path for path, found in constants().items() if name in found}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_named_in_one_file(name):
    """Its name is in one module of `families`, and elsewhere only where the lists above say why."""
    allowed = tuple(EXCEPTIONS) + tuple(OTHERWISE.get(name, ()))
    own = {f for f in naming(name) if f not in allowed and not f.startswith(tuple(f"{a}/" for a in allowed))}
    assert len(own) == 1
    assert own.pop().startswith("models/families/")


def test_each_exception_is_needed():
    """Each place of the list names some architecture that is built here."""
    found = set().union(*(naming(name) for name in ARCHITECTURES))
    assert not [e for e in EXCEPTIONS if not any(f == e or f.startswith(f"{e}/") for f in found)]


def test_a_new_family_is_one_file(tmp_path, monkeypatch):
    """A module beside the others is a family, with no entry anywhere: its weights and its graph are there by its name."""
    source = Path(inspect.getfile(ARCHITECTURES["qwen3"].layer_weights)).read_text()
    source = source.replace('"qwen3moe"', '"brandnewmoe"').replace('"qwen3"', '"brandnew"')
    source = source.replace("from ...", "from pyggml.").replace("from ..", "from pyggml.models.")
    (tmp_path / "brandnew.py").write_text(source.replace("from pyggml. import", "from pyggml import"))
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    monkeypatch.setattr(architectures, "ARCHITECTURES", architectures._gathered())
    hp = dataclasses.replace(tiny.hparams("qwen3moe"), arch="brandnewmoe")
    assert [s.name for s in architectures.weight_specs(hp, {})] == [
        s.name for s in architectures.weight_specs(tiny.hparams("qwen3moe"), {})
    ]


def test_names_belong_to_one_family():
    """No two families have a name in common."""
    names = [name for arch in set(map(id, ARCHITECTURES.values())) for name in _of(arch)]
    assert sorted(names) == sorted(ARCHITECTURES)


def _of(identity: int) -> tuple[str, ...]:
    arch = next(a for a in ARCHITECTURES.values() if id(a) == identity)
    return (*arch.names, *arch.moe_names)


def test_a_family_is_dense_unless_it_says_otherwise():
    """The defaults of all flags are what most families have: dense, whole heads rotating, a head that may be tied."""
    flags = {f.name: f.default for f in dataclasses.fields(Architecture) if f.type == "bool"}
    assert flags.pop("has_tied_head") is True
    assert not any(flags.values())
    assert len(flags) >= 4


def test_no_code_asks_for_the_name_of_an_architecture():
    """Outside the registry nothing in `models` compares or looks up ``arch``: what differs is a field."""
    assert "arch" in {f.name for f in dataclasses.fields(HParams)}
    asked: list[str] = []
    for path in (PACKAGE / "models").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            sides = (node.left, *node.comparators) if isinstance(node, ast.Compare) else ()
            if any(isinstance(side, ast.Attribute) and side.attr == "arch" for side in sides):
                asked.append(path.name)
    assert asked == ["architecture.py"]  # whether it is one of `moe_names`
