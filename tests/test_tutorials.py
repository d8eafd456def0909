"""The tutorials, the README and other pages are true: their code runs, and the outputs that they show are what it printed.

A page's Python blocks run in order in one namespace. A ``text`` block that follows one shows what it printed; a block
without one prints nothing. ``python tests/test_tutorials.py --update`` writes what was printed into the pages.
"""

from __future__ import annotations

import ast
import io
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("accuracy", "viz")),
    *sorted((ROOT / "docs/tutorials").glob("*.md")),
]
OTHERS = [ROOT / "CONTRIBUTING.md", *sorted({*(ROOT / "docs").glob("**/*.md")} - {*PAGES})]
#: packages beyond pyggml's own that a page's code needs, by the page's stem
NEEDS = {"09-cuda-kernels-without-a-gpu": ("numba-cuda", "nvidia-cuda-nvrtc", "nvidia-nvvm")}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block of a page."""

    language: str
    text: str
    start: int  #: of the fence, in characters
    end: int
    line: int  #: of the text's first line


@dataclass(frozen=True, slots=True)
class Example:
    """Python that a page shows, what it says is printed, and what was."""

    code: Block
    shown: Block | None
    printed: str


def blocks_of(page: str) -> list[Block]:
    """Return the fenced blocks of a page in order."""
    return [Block(m[1], m[2], m.start(), m.end(), page.count("\n", 0, m.start()) + 2) for m in _FENCE.finditer(page)]


def missing_packages(path: Path) -> list[str]:
    """Return what a page needs and is not installed."""
    missing = []
    for name in NEEDS.get(path.stem, ()):
        try:
            distribution(name)
        except PackageNotFoundError:
            missing.append(name)
    return missing


def run_page(path: Path) -> list[Example]:
    """Run a page's Python, one namespace for all, and return what each block printed, stderr included."""
    blocks = blocks_of(path.read_text(encoding="utf-8"))
    namespace: dict[str, object] = {"__name__": path.stem}
    examples = []
    for block, following in zip(blocks, [*blocks[1:], None], strict=False):
        if block.language != "python":
            continue
        code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")  # so that errors tell the page's line
        out = io.StringIO()
        with redirect_stdout(out), redirect_stderr(out):
            exec(code, namespace)  # noqa: S102  # our own pages
        shown = following if following is not None and following.language == "text" else None
        examples.append(Example(block, shown, out.getvalue()))
    return examples


def update_page(path: Path) -> None:
    """Write what the blocks of a page print under them."""
    page = path.read_text(encoding="utf-8")
    for example in reversed(run_page(path)):
        block = f"```text\n{example.printed}```\n" if example.printed else ""
        if example.shown is not None:
            page = page[: example.shown.start] + block + page[example.shown.end :]
        elif block:
            page = page[: example.code.end] + "\n" + block + page[example.code.end :]
    path.write_text(page, encoding="utf-8")


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_page_shows_what_its_code_prints(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block runs, and the text block after it is what it printed."""
    if missing := missing_packages(path):
        pytest.skip(f"not installed: {', '.join(missing)} (pip install -e '.[cuda]')")
    monkeypatch.setattr("webbrowser.open", lambda url: True)
    monkeypatch.delenv("GGML_SCHED_DEBUG", raising=False)
    monkeypatch.delenv("GGML_OP_OFFLOAD_MIN_BATCH", raising=False)
    if path.parent.name == "docs":
        monkeypatch.chdir(tmp_path)  # some write files; the README reads one of the project
    else:
        monkeypatch.chdir(ROOT)
    for example in run_page(path):
        shown = "" if example.shown is None else example.shown.text
        assert example.printed == shown, f"{path.name}:{example.code.line} prints something else than the page shows"


def shell_lines() -> list[tuple[str, str]]:
    """Return the commands of all pages, each with the page's name."""
    found = []
    for path in [*PAGES, *OTHERS]:
        for block in blocks_of(path.read_text(encoding="utf-8")):
            if block.language == "sh":
                lines = block.text.replace("\\\n", " ").splitlines()
                found += [(path.name, line) for line in lines if line.strip() and not line.startswith("#")]
    return found


@pytest.mark.parametrize(("page", "line"), shell_lines())
def test_shown_commands_exist(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shown command of the program has the options that the page gives it; a make target is in the Makefile."""
    from pyggml.cli import group

    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0]):  # environment
        words.pop(0)
    if not words:
        return
    if words[0] == "pyggml":
        command = group.get_command(group.make_context("pyggml", ["--help"], resilient_parsing=True), words[1])
        assert command is not None, f"{page}: there is no {words[1]}"
        command.make_context(words[1], words[2:])  # raises a usage error if it does not know an option
    elif words[0] == "make":
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        assert {w for w in words[1:] if "=" not in w} <= targets, f"{page}: {line}"


#: Lines of shell blocks that tests do not run: what they start with, or hold.
NOT_RUN = re.compile(
    # the environment's own, a server, a card, what ends with 1 as it finds something
    r"make|pip|uvx|pytest|cmake|export|llama-bench|.*(rpc:\d|libggml:CUDA|selftest|pyggml races)"
)


def shell_pages() -> list[Path]:
    """Return the pages that show commands which a test can run."""
    return [
        path
        for path in [*PAGES, *OTHERS]
        if any(b.language == "sh" and re.search(r"^pyggml ", b.text, re.MULTILINE) for b in blocks_of(path.read_text()))
    ]


#: These run models: their commands take longer than ten seconds.
RUNNING = ("README", "viz", "07-a-model-over-two-devices")


def run_commands(path: Path, folder: Path, blocks: list[tuple[Block, Block | None]]) -> None:
    """Run blocks of commands as printed, and check the text blocks that follow them."""
    program = folder / "bin" / "pyggml"
    program.parent.mkdir()
    for name, words in (("pyggml", "-m pyggml"), ("python", "")):
        program.with_name(name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        program.with_name(name).chmod(0o755)
    env = {**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    env.pop("PYGGML_CHECK", None)  # so slow that a page would mention it
    if "moe.gguf" in path.read_text() and "make-moe moe.gguf" not in path.read_text():
        make = [str(program), "make-moe", "moe.gguf", "--preset", "fine-grained"]  # an earlier page has made it
        subprocess.run(make, cwd=folder, env=env, check=True, capture_output=True)
    for block, following in blocks:
        lines = [line for line in block.text.replace("\\\n", " ").splitlines() if not NOT_RUN.match(line.strip())]
        if block.language != "sh" or not lines:
            continue
        done = subprocess.run(
            ["sh", "-eu", "-c", "\n".join(lines)],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        assert done.returncode == 0, f"{path.name}:{block.line}: {done.stderr}"
        if following is not None and following.language == "text":
            missing = [line for line in following.text.splitlines() if line.rstrip() not in done.stdout]
            assert not missing, f"{path.name}:{following.line}: not printed: {missing}"


def with_following(path: Path) -> list[tuple[Block, Block | None]]:
    """Return the blocks of a page, each with the next one."""
    blocks = blocks_of(path.read_text(encoding="utf-8"))
    return list(zip(blocks, [*blocks[1:], None], strict=True))


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in RUNNING else []) for p in shell_pages()],
)
def test_shown_commands_run(path: Path, tmp_path: Path) -> None:
    """A page's commands run as printed, in order, in a folder of their own; what a page shows of them is printed."""
    run_commands(path, tmp_path, with_following(path))


def test_the_readme_shows_what_its_plan_prints(tmp_path: Path) -> None:
    """The table of expected speeds in the README is what its command prints."""
    readme = ROOT / "README.md"
    shown = [
        pair for pair in with_following(readme) if pair[0].language == "sh" and (pair[1] or pair[0]).language == "text"
    ]
    assert [block.text.split()[:2] for block, _ in shown] == [["pyggml", "splits"]]
    run_commands(readme, tmp_path, shown)


# -- links, and what error texts name ----------------------------------------------


def anchors_of(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links() -> list[tuple[Path, str]]:
    """Return the links of all pages to files of the project, each with its page."""
    pages = [*PAGES, *OTHERS, ROOT / "CHANGELOG.md"]
    found = [
        (p, t) for p in pages for t in re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", p.read_text(encoding="utf-8")))
    ]
    return [(page, target) for page, target in found if "://" not in target]


def test_links_of_pages_lead_somewhere() -> None:
    """Each link between pages names a file and, if it has an anchor, a heading of that file."""
    broken = []
    for page, target in links():
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors_of(path)):
            broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def texts_of_sources() -> list[tuple[str, str]]:
    """Return every text in pyggml's code, docstrings included, with its place."""
    found = []
    for path in sorted((ROOT / "pyggml").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node.value))
    return found


def test_hints_name_what_exists() -> None:
    """Commands with their options, pages and make targets that texts of the code name exist, hints of errors included."""
    from pyggml.cli import group

    context = group.make_context("pyggml", ["--help"], resilient_parsing=True)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    wrong = []
    for place, text in texts_of_sources():
        for name, rest in re.findall(r"`pyggml ([a-z][a-z-]*)((?: [^`]*)?)`", text):
            command = group.get_command(context, name)
            for word in rest.split():  # of a group: its command
                command = command.commands.get(word, command) if isinstance(command, click.Group) else command
            known = {o for p in (command.params if command else ()) for o in (*p.opts, *p.secondary_opts)}
            if command is None or not {w for w in rest.split() if w.startswith("--")} <= known:
                wrong.append(f"{place}: pyggml {name}{rest}")
        wrong += [
            f"{place}: {page}" for page in re.findall(r"\bdocs/[\w/.-]+\.md\b", text) if not (ROOT / page).exists()
        ]
        wrong += [f"{place}: make {target}" for target in re.findall(r"`make ([a-z]+)`", text) if target not in targets]
    assert not wrong


def test_blocks_of_the_readme_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each Python block of the README runs when it is pasted alone."""
    monkeypatch.chdir(ROOT)
    for block in blocks_of((ROOT / "README.md").read_text(encoding="utf-8")):
        if block.language == "python":
            with redirect_stdout(io.StringIO()):
                exec(compile(block.text, f"README.md:{block.line}", "exec"), {"__name__": "pasted"})  # noqa: S102


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/upstream.md", "CONTRIBUTING.md"])
def test_named_code_exists(page: str) -> None:
    """Files of the project that a page names are there; the names that it gives stand in the sources."""
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = [path for top in ("pyggml", "kernels", "tests") for path in (ROOT / top).rglob("*.py")]
    files = ["/" + path.relative_to(ROOT).as_posix() for path in paths]
    words = set(re.findall(r"\w+", "".join(p.read_text(encoding="utf-8") for p in paths if "tests" not in p.parts)))
    for code in re.findall(r"`([\w./]+)`", text):
        if code.endswith(".py"):
            assert any(file.endswith("/" + code) for file in files), f"{page}: there is no {code}"
        elif page == "docs/architecture.md" and "/" not in code:
            assert set(re.findall(r"\w+", code)) <= words, f"{page}: nothing is called {code}"


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit("usage: python tests/test_tutorials.py --update")
    for page_path in PAGES:
        if not missing_packages(page_path):
            update_page(page_path)
