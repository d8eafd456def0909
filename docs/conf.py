"""The documentation site, made by Sphinx: `make docs`. Pages are where they are on the disk, so that links hold everywhere."""

from __future__ import annotations

import shutil
from pathlib import Path

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
suppress_warnings = ["ref.python"]  # a word such as `path` in the type of an argument, which attributes are called, too

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
html_show_search_summary = False  # fetched from the pages, which browsers refuse for files
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "native"


def finish(app: Sphinx, exception: Exception | None) -> None:
    """Copy the pictures that pages show by HTML of their own, and lead from the top of the folder to the first page."""
    if exception is None and app.builder.name == "html":
        shutil.copytree(ROOT / "docs/img", Path(app.outdir) / "docs/img", dirs_exist_ok=True)
        lead = '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html"><title>pyggml</title>'
        (Path(app.outdir) / "index.html").write_text(lead, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Connect what is done beside the build."""
    app.connect("build-finished", finish)
