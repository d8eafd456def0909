"""Imports go one way, as the rooms of the style guide have it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: Rooms by the first name that fits a module's path below ``pyggml``; a module may import rooms of lower numbers, and
#: those of its own number where `_SIDEWAYS` says so.
_ROOMS = {
    "errors": 0, "files": 0, "edits": 0, "collector": 0, "config": 0, "types": 0, "dialect": 0, "notebook": 0,
    "record": 1, "values": 1, "memory_rows": 1, "cost": 2, "hardware": 1, "gguf": 1, "routing": 1,
    "tensor": 2,
    "ops": 3, "graph": 3, "graph_context": 3, "buffer": 3, "opset": 3, "clock": 3,
    "alloc": 4, "backend": 4,
    "sched": 5, "moe_cache": 5,
    "backends": 6, "models": 6, "makers": 6, "tokenizer": 6, "sampling": 6,
    "llama": 7, "session": 7, "generation": 7, "planning": 7, "fit": 7, "catalog": 7, "foresight": 7, "simulation": 7, "plan_report": 7, "report": 7, "timeline": 7, "upgrade": 7, "viz": 7,
    "advisor": 8, "testing": 8, "selftest": 9, "replay": 8, "lab": 8,
    "commands": 9, "cli": 9, "__main__": 9, "": 9,
}  # fmt: skip
#: What a room must not import although its number is lower.
_FORBIDDEN = {
    "backends": {"sched"},
    "models": {"sched", "backends", "makers"},
    "makers": {"sched", "backends", "models"},
    "tokenizer": {"sched", "backends"},
}
#: Objects that show themselves ask for what draws them inside the method that does, and nowhere else.
_INSIDE = {("graph", "viz"), ("sched.scheduler", "viz")}
#: Imports between rooms of one number, each with its reason; all others are forbidden.
_SIDEWAYS = {
    ("types", "errors"): "a type that is not known is an error of the tree",
    ("files", "errors"): "a file that cannot be written is an error of the tree",
    ("clock", "opset"): "the cost of a node follows from the cost rule of its op",
    ("opset", "ops"): "parameters of ops are named as their builders name them",
    ("graph", "graph_context"): "a graph collects what ops make",
    ("ops", "graph_context"): "ops add what they make to the graph at hand",
    ("routing", "hardware"): "how evenly experts are used is one of the fitted rates",
    ("moe_cache", "sched"): "it goes by the byte ranges of used experts",
    ("foresight", "catalog"): "a model may be named instead of given",
    ("planning", "fit"): "-ngl auto is settled before a model is opened",
    ("planning", "catalog"): "a model may be named instead of given",
    ("planning", "llama"): "graphs may come from llama.cpp",
    ("planning", "plan_report"): "a planner reports its plans",
    ("plan_report", "simulation"): "a report has what a plan came to",
    ("llama", "fit"): "what llama.cpp chooses is the same answer",
    ("llama", "planning"): "captured graphs are compared with plans",
    ("llama", "plan_report"): "captured graphs are compared with plans",
    ("session", "planning"): "a session is a planner that computes",
    ("session", "generation"): "tokens follow a decode one by one, whoever decodes",
    ("llama", "generation"): "tokens follow a decode one by one, whoever decodes",
    ("llama", "session"): "a micro-batch of llama.cpp is told of as one of a session",
    ("timeline", "viz"): "a timeline's file holds the records as the page packs them",
    ("upgrade", "planning"): "plans in two dialects are compared",
    ("upgrade", "simulation"): "plans in two dialects are compared",
    ("cli", "commands"): "the program's commands",
    ("commands", "selftest"): "one of the commands",
    ("__main__", "cli"): "the program",
}


def _modules() -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / "pyggml").rglob("*.py")):
        parts = path.relative_to(ROOT / "pyggml").with_suffix("").parts
        yield ".".join(p for p in parts if p != "__init__"), path


MODULES = dict(_modules())


def _imports(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """Yield what a module imports of pyggml, as names below it, with lines; TYPE_CHECKING blocks are exempt."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    exempt: set[int] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            exempt |= {id(child) for statement in node.body for child in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in exempt:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "pyggml":
                    yield alias.name.partition(".")[2], node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, package)
            if base is None:
                continue
            for alias in node.names:
                whole = f"{base}.{alias.name}".strip(".")
                yield (whole if whole in MODULES or base == "" else base), node.lineno


def _base(node: ast.ImportFrom, package: str) -> str | None:
    """Return the module that is imported from, below pyggml; None if it is another package's."""
    if node.level:
        up = package.split(".") if package else []
        up = up[: len(up) - (node.level - 1)]
        return ".".join([*up, *([node.module] if node.module else [])])
    top, _, rest = (node.module or "").partition(".")
    return rest if top == "pyggml" else None


def _room(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("name", MODULES, ids=lambda name: name or "pyggml")
def test_imports_go_one_way(name: str) -> None:
    """A module imports rooms of lower numbers, those of its number that are listed, and none that is forbidden to it."""
    room = _room(name)
    assert room in _ROOMS, f"{name}: say in test_layers.py and in the style guide which room it belongs to"
    wrong = []
    top = {node.lineno for node in ast.parse(MODULES[name].read_text()).body}
    for target, line in _imports(name, MODULES[name]):
        to = _room(target)
        if to in ("kernels", "__version__"):
            continue
        number = _ROOMS.get(to, 9)  # a name of the package itself counts as its highest room
        is_lower = number < _ROOMS[room] or to == room or (room, to) in _SIDEWAYS
        if (name, to) in _INSIDE and line not in top:
            continue
        if not is_lower or to in _FORBIDDEN.get(room, ()):
            wrong.append(f"line {line}: {target or 'pyggml'}")
    assert not wrong, f"{name} imports {', '.join(wrong)}"


def test_backends_do_not_know_each_other() -> None:
    """A wing of the backends imports no other, but what the host shares: its kernels, its memory, the race watch."""
    for name, path in MODULES.items():
        if _room(name) == "backends" and "." in name:
            wing = name.split(".")[1]
            wings = {t.split(".")[1] for t, _ in _imports(name, path) if _room(t) == "backends" and "." in t}
            assert wings <= ({"host"} if wing == "host" else {wing, "host"}), name


def test_backends_have_public_modules() -> None:
    """No module of the backends is private: what another may import has a name that says so."""
    assert not [name for name in MODULES if _room(name) == "backends" and "._" in name]


def test_core_needs_no_large_package() -> None:
    """The lowest room imports nothing but the standard library, itself and, for folders, platformdirs."""
    for name in ("errors", "config", "types", "dialect"):
        tree = ast.parse(MODULES[name].read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not {a.name.split(".")[0] for a in node.names} & {"numpy", "numba", "rich", "click"}, name
        assert {_room(t) for t, _ in _imports(name, MODULES[name])} <= {"errors", "config", "types", "dialect"}


def test_kernels_know_nothing_of_pyggml() -> None:
    """Kernels import numpy, numba and each other, never the package around them."""
    for path in (ROOT / "kernels").rglob("*.py"):
        depth = len(path.relative_to(ROOT / "kernels").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= depth, f"{path}:{node.lineno}"
                assert (node.module or "").split(".")[0] != "pyggml" or node.level, f"{path}:{node.lineno}"
            elif isinstance(node, ast.Import):
                assert not [a for a in node.names if a.name.split(".")[0] == "pyggml"], f"{path}:{node.lineno}"


def test_the_page_tells_the_same_rooms() -> None:
    """The table in docs/architecture.md has every module at the top of the package, with the number of its room."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    told = {
        module: int(number)
        for number, modules in re.findall(r"^\| (\d) \| (.*?) \|", page, re.MULTILINE)
        for module in re.findall(r"`(\w+)(?:\.py|/)", modules)
    }
    own = {path.stem for path in (ROOT / "pyggml").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {name: _ROOMS.get(name) for name in own if name not in ("__init__", "__main__")} == {
        name: number for name, number in told.items() if name != "__init__"
    } | {"sched": 5}


def test_no_file_is_long() -> None:
    """No file of the package, the kernels or the tests has more than 600 lines: a longer one has a seam to cut along."""
    kinds = {".py", ".c", ".h", ".js", ".css", ".html"}
    files = [p for top in ("pyggml", "kernels", "tests") for p in (ROOT / top).rglob("*") if p.suffix in kinds]
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text(encoding="utf-8").splitlines())) > 600}
    assert not long
