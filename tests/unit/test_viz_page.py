"""The page: one file with everything in it."""

from __future__ import annotations

import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pyggml.record import ComputeRecord, CopyRecord
from pyggml.viz import View, page, page_html, view_of_records, write_page

STATIC = Path(page.__file__).parent / "static"
EVIL = "</script><script>alert(1)</script><!-- {{DATA}} \u2028"


class Parts(HTMLParser):
    """Collects the tags of a page, and the text of its elements by id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self._inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep a tag."""
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") == "data"

    def handle_endtag(self, tag: str) -> None:
        """Leave an element."""
        self._inside = False

    def handle_data(self, data: str) -> None:
        """Keep the text of the data's element."""
        if self._inside:
            self.data += data


def view(name: str = "a", tensor: str = "x") -> View:
    """Return a view of one copy and one computing."""
    return view_of_records(
        [
            CopyRecord(0, tensor, "CPU", "GPU", 0, 4, 4, "activation", 0.0, 0.5),
            ComputeRecord(0, "GPU", 1, "y", 0.5, 1.0),
        ],
        name=name,
    )


def data_of(html: str) -> dict[str, Any]:
    """Return the data that a page holds."""
    found: dict[str, Any] = json.loads(Parts(html).data)
    return found


def test_the_data_comes_out_as_it_went_in() -> None:
    """What the page's script reads is the model of each view."""
    views = [view("used"), view("full")]
    found = data_of(page_html(*views))
    assert found["title"] == "used against full"
    assert found["views"] == [json.loads(json.dumps({**v.model, "name": v.name})) for v in views]


def test_names_cannot_leave_their_place() -> None:
    """No name of a model or a title ends the element that it is in, and none is taken for a place of the template."""
    plain, html = page_html(view(), title="t"), page_html(view(EVIL, EVIL), title=EVIL)
    assert [tag for tag, _ in Parts(html).tags] == [tag for tag, _ in Parts(plain).tags]
    assert EVIL in data_of(html)["views"][0]["strings"]
    assert "alert(1)</script>" not in html
    assert data_of(html)["title"] == EVIL


def test_nothing_is_fetched() -> None:
    """No element names another file or host: the page works without a network."""
    tags = Parts(page_html(view())).tags
    sources = [v for _, attrs in tags for k, v in attrs.items() if k in ("src", "href", "data", "action")]
    assert all(v is not None and (v.startswith("#") or v == "data:,") for v in sources)
    own = "".join(p.read_text() for p in STATIC.glob("*.*"))
    assert not re.search(r"https?://|\bfetch\(|XMLHttpRequest|@import|url\(|\bimport\(", own)


def test_every_file_is_in_the_page() -> None:
    """Each script is in the page once, after those that it needs, and so are the licences of others' work."""
    html = page_html(view())
    for path in STATIC.rglob("*.js"):
        assert html.count(path.read_text().strip()[:200]) == 1, path.name
    assert (STATIC / "page.css").read_text() in html
    assert "Mike Bostock" in html
    assert "Robert Penner" in html
    for path in (STATIC / "vendor").glob("*.js"):
        name = path.name.removesuffix(".min.js")
        assert re.search(rf"\b{name}\b", (STATIC / "vendor" / "LICENSES.txt").read_text()), name


def test_every_file_is_in_the_wheel() -> None:
    """Each file that the page is made of fits one of the patterns by which files are packaged."""
    project = tomllib.loads((STATIC.parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["pyggml.viz"]
    packaged = {path for pattern in patterns for path in STATIC.parent.glob(pattern)}
    assert packaged == {path for path in STATIC.rglob("*") if path.is_file()}


@pytest.mark.parametrize("n", [0, 3])
def test_one_view_or_two(n: int) -> None:
    """A page of no view, or of three, is refused."""
    with pytest.raises(ValueError, match=f"not {n}"):
        page_html(*[view()] * n)


def test_written(tmp_path: Path) -> None:
    """The file has what `page_html` returns, in UTF-8."""
    path = tmp_path / "p.html"
    write_page(path, view("→"), title="Δ")
    assert path.read_bytes() == page_html(view("→"), title="Δ").encode()
