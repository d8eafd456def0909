"""The README's pictures: what the project's own commands print, as SVG. `make docs` runs this.

A small random model is made, and the commands run on it as a user would run them. What depends on the machine, wall
times, is left out, so that the same code gives the same files.
"""

from __future__ import annotations

import html
import io
import os
import re
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.table import Table
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from pyggml import cli
from pyggml.commands import _console

FOLDER = Path(__file__).parent / "img"
MODEL = ("make-moe", "moe.gguf", "--preset", "fine-grained")
PROMPT = "The quick brown fox jumps over the lazy dog, and then again."
#: Name of the file, columns, and the commands shown in it.
PICTURES = {
    "savings": (94, [("savings", "moe.gguf", "--batches", "1,2,4,8,16,32,64")]),
    "run": (122, [("run", "moe.gguf", "--cpu-moe", "-n", "8", "--ignore-eos", "--prompt", PROMPT)]),
}
#: A dark window, which light and dark pages both leave readable.
THEME = TerminalTheme(
    (30, 33, 39),
    (222, 226, 232),
    [(30, 33, 39), (224, 108, 117), (126, 211, 140), (229, 192, 123), (97, 175, 239), (198, 120, 221), (86, 182, 194), (171, 178, 191)],
    [(147, 155, 168), (224, 108, 117), (126, 211, 140), (229, 192, 123), (97, 175, 239), (198, 120, 221), (86, 182, 194), (222, 226, 232)],
)  # fmt: skip
#: Rich's own format loads a font from the net, which a page's picture may not.
FORMAT = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
  font-family: "DejaVu Sans Mono", Menlo, Consolas, "Liberation Mono", monospace;
  font-size: {char_height}px;
  line-height: {line_height}px;
}}
.{unique_id}-title {{ font-family: sans-serif; font-size: 18px; font-weight: bold; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


class Screen(Console):
    """A console that keeps what commands print, without the table of wall times."""

    def __init__(self, width: int) -> None:
        super().__init__(
            file=io.StringIO(), record=True, width=width, force_terminal=True, color_system="truecolor",
            highlight=False, emoji=False, markup=False, soft_wrap=False,
        )  # fmt: skip
        self._is_left_out = False

    def print(self, *objects: Any, **options: Any) -> None:
        """Print all but wall times and the line after them, titles, headers and bars in colours of their own."""
        was_left_out, self._is_left_out = self._is_left_out, False
        if was_left_out and not objects:
            return
        for made in objects:
            if isinstance(made, Table):
                if str(made.title).startswith("Time on this machine"):
                    self._is_left_out = True
                    return
                made.title_style = "bold bright_blue"
                made.header_style = "bright_black"
                for column in made.columns:
                    if not column.header:  # bars
                        column.style = "blue"
        super().print(*objects, **options)


def call(words: Sequence[str]) -> None:
    """Run one command of the program; its text and tables of reports go elsewhere."""
    with redirect_stdout(io.StringIO()):
        status = cli.run(words)
    if status:
        raise SystemExit(f"pyggml {' '.join(words)} ended with {status}")


def without_leading_spaces(svg: str) -> str:
    """Say by a text's place what rich says by spaces before it: some programs leave those out."""

    def moved(found: re.Match[str]) -> str:
        x, between, length, rest = float(found[1]), found[2], float(found[3]), found[4]
        n_spaces, text = found[5].count("&#160;"), found[6]
        step = length / max(1, n_spaces + len(html.unescape(text)))
        x, length = x + n_spaces * step, length - n_spaces * step
        return f'x="{x:.1f}"{between}textLength="{length:.1f}"{rest}>{text}</text>' if text else ""

    pattern = r'x="([\d.]+)"([^>]*?)textLength="([\d.]+)"([^>]*)>((?:&#160;)*)([^<]*)</text>'
    return re.sub(pattern, moved, svg)


def picture(name: str, width: int, commands: Sequence[Sequence[str]]) -> None:
    """Run commands and write what they report."""
    screen = Screen(width)
    own = _console._Console  # where every command asks for one; errors go where they go
    with patch.object(_console, "_Console", lambda **options: own(**options) if options.get("stderr") else screen):
        for words in commands:
            line = " ".join(f'"{word}"' if " " in word else word for word in words)
            screen.print(Text.assemble(("$ ", "green"), (f"pyggml {line}", "bold")), soft_wrap=True)
            screen.print()
            call(words)
    text = screen.export_svg(title=f"pyggml {commands[0][0]}", theme=THEME, code_format=FORMAT, unique_id=name)
    text = without_leading_spaces(text)
    text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    (FOLDER / f"{name}.svg").write_text(text, encoding="utf-8")


def main() -> None:
    """Make all pictures anew."""
    FOLDER.mkdir(exist_ok=True)
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the commands show the paths that they were given
        try:
            call(MODEL)
            for name, (width, commands) in PICTURES.items():
                picture(name, width, commands)
        finally:
            os.chdir(before)


if __name__ == "__main__":
    main()
