"""The documentation site, built by Sphinx: `make docs`. Pages have the same paths as in the repository, so that links work in both."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import click
import cloup
from sphinx.application import Sphinx

import pyggml

ROOT = Path(__file__).parents[1]

project = "pyggml"
version = release = pyggml.__version__
author = "The pyggml developers"
copyright = author

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinx_copybutton",
]
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "docs/**/*.md"]
root_doc = "docs/index"
suppress_warnings = ["ref.python"]  # a word such as `path` in the type of an argument is also the name of attributes

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
copybutton_exclude = ".linenos, .gp, .go"

default_role = "py:obj"  # docstrings name objects in single backticks
napoleon_google_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True}

html_theme = "furo"
html_title = f"pyggml {version}"
html_show_sphinx = False
html_show_search_summary = False  # would load pages, which browsers refuse for files
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "native"


def finish(app: Sphinx, exception: Exception | None) -> None:
    """Copy the pictures that pages show with HTML, and redirect from the top of the folder to the first page."""
    if exception is None and app.builder.name == "html":
        shutil.copytree(ROOT / "docs/img", Path(app.outdir) / "docs/img", dirs_exist_ok=True)
        lead = '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html"><title>pyggml</title>'
        (Path(app.outdir) / "index.html").write_text(lead, encoding="utf-8")


def group_options(app: Sphinx, ctx: click.Context, lines: list[str]) -> None:
    """Put the options of a command under the titles of its ``--help``."""
    if not isinstance(ctx.command, cloup.Command) or not ctx.command.option_groups:
        return
    starts = [i for i, line in enumerate(lines) if line.startswith(".. option::")]
    texts = [lines[start:end] for start, end in pairwise([*starts, len(lines)])]
    options = [p for p in ctx.command.params if isinstance(p, click.Option) and not p.hidden]
    by_option = dict(zip(options, texts, strict=True))
    grouped = []
    for group in ctx.command.option_groups:
        grouped += [f".. rubric:: {group.title}", "   :class: option-group", ""]
        grouped += [line for option in group.options if option in by_option for line in by_option.pop(option)]
    others = [line for text in by_option.values() for line in text]
    lines[:] = [*grouped, *(([".. rubric:: Other options", "   :class: option-group", ""]) if others else []), *others]


def show_examples(app: Sphinx, ctx: click.Context, lines: list[str]) -> None:
    """Show the examples of a command as code that can be copied."""
    commands = [line.removeprefix("|").strip() for line in lines if line.startswith("|   pyggml")]
    if commands:
        lines[:] = [".. rubric:: Examples", "", ".. code-block:: sh", "", *(f"   {c}" for c in commands), ""]


def setup(app: Sphinx) -> None:
    """Connect the functions above to the build."""
    app.connect("build-finished", finish)
    app.connect("sphinx-click-process-options", group_options)
    app.connect("sphinx-click-process-epilog", show_examples)
