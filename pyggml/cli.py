"""The program `pyggml`: the group of all commands, and how their errors are printed.

A command is a module of `pyggml.commands` that defines ``command``. The first line of the module's docstring,
"`pyggml NAME`: what it does.", is the command's line in the help. A module is imported only when its command runs, so
that help is fast.
"""

from __future__ import annotations

import ast
import codecs
import errno
import gc
import importlib
import io
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import cloup

from . import __version__, commands, config
from .collector import rare_collections
from .errors import PyggmlError, visible

__all__ = ["QUESTIONS", "CommandGroup", "group", "main", "run"]

#: The largest width of help, in columns.
HELP_WIDTH = 110
#: What stands for characters that the terminal's encoding lacks; for others a question mark.
_PLAIN = dict(zip("█▓▒░━←×·…µ", "#%:.-<x..u", strict=True))
#: Of an error's line: a damaged file may have a name of megabytes.
MOST_LETTERS = 2500
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
#: Which command answers which question; the help and the README show this table.
QUESTIONS = (
    ("Which flags, how fast, how much memory?", "pyggml plan gpt-oss-120b --device rtx3090"),
    ("Do predictions fit my measurements?", "pyggml calibrate MODEL runs.json"),
    ("What will these flags do, and how fast?", "pyggml splits gpt-oss-120b -ncmoe 28"),
    ("Why is a node on that device?", "pyggml splits MODEL --html plan.html"),
    ("Does llama.cpp decide the same?", "pyggml verify MODEL"),
    ("Does it run? What is copied?", "pyggml run MODEL -p TEXT -n 32"),
    ("What does the real llama.cpp copy?", "pyggml run MODEL -p TEXT -n 32 --engine llama"),
    ("Does llama.cpp miss a wait?", "pyggml races MODEL"),
    ("What do used-expert copies save?", "pyggml savings MODEL"),
    ("Would an expert cache help?", "pyggml experts compare TRACE"),
    ("Which models need no file?", "pyggml models"),
    ("Which devices can I name?", "pyggml devices"),
    ("How do two runs differ?", "pyggml viz a.json b.json"),
    ("What does another ggml decide?", "pyggml replay CASE --dialect 0.21"),
    ("Where do I get a small model?", "pyggml make-moe moe.gguf"),
)
_COMPLETION = (
    "To complete commands, options, devices and files in your shell, put this into ~/.bashrc: "
    'eval "$(_PYGGML_COMPLETE=bash_source pyggml)" (zsh_source and fish_source for other shells).'
)


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"pyggml {__version__}")
        ctx.exit()


VERSION = click.Option(
    ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
    help="Show the version and exit.",
)  # fmt: skip


class Interrupted(click.ClickException):
    """Ctrl-C ended a command."""

    exit_code = EXIT_INTERRUPTED

    def show(self, file: Any = None) -> None:  # as click types it
        """Print the message without "Error:"."""
        click.echo(self.message, file, err=True)


class CommandGroup(cloup.Group):
    """The commands in a package, each imported when it is first used.

    Parameters
    ----------
    folder : Path
        The package's folder.
    package : str
        The package's name.
    """

    def __init__(self, name: str, folder: Path, package: str, *, help: str) -> None:
        theme = cloup.HelpTheme(
            heading=cloup.Style(bold=True), col1=cloup.Style(fg=None if config.no_color() else "cyan")
        )
        look = cloup.HelpFormatter.settings(max_width=HELP_WIDTH, col1_max_width=34, theme=theme)
        settings = cloup.Context.settings(help_option_names=["-h", "--help"], formatter_settings=look)
        super().__init__(name, help=help, no_args_is_help=True, context_settings=settings, params=[VERSION])
        self.folder = folder
        self.package = package

    def _modules(self) -> dict[str, str]:
        """Return the module of each command."""
        stems = sorted(path.stem for path in self.folder.glob("*.py"))
        return {stem.replace("_", "-"): stem for stem in stems if not stem.startswith("_")}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(self._modules())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command."""
        stem = self._modules().get(cmd_name)
        if stem is None:
            return None
        command = importlib.import_module(f"{self.package}.{stem}").command
        assert isinstance(command, click.Command)
        return command

    def handle_bad_command_name(
        self, bad_name: str, valid_names: list[str], error: click.UsageError
    ) -> click.UsageError:
        """Return an error that proposes the nearest command."""
        return click.NoSuchCommand(bad_name, possibilities=list(self._modules()), ctx=error.ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them, then the table of questions."""
        assert isinstance(formatter, cloup.HelpFormatter)
        rows = [(name, self._summary(stem)) for name, stem in self._modules().items()]
        formatter.write_section(cloup.HelpSection("Commands", rows))
        formatter.write_section(cloup.HelpSection("Which command answers which question", QUESTIONS))
        formatter.write_paragraph()
        formatter.write_text(_COMPLETION)

    def _summary(self, stem: str) -> str:
        """Return what a command does: the first line of its module's docstring, after the command's name."""
        source = (self.folder / f"{stem}.py").read_text(encoding="utf-8")
        text = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
        text = text.partition(": ")[2] or text
        return text[:1].upper() + text[1:]

    def invoke(self, ctx: click.Context) -> Any:  # of what a command returns
        """Run a command. An exception becomes one line and an exit status, which click's `main` prints and returns."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):
            raise Interrupted("Interrupted.") from None
        except (click.ClickException, click.exceptions.Exit):
            raise
        except Exception as error:
            if config.traceback() or (isinstance(error, OSError) and error.errno == errno.EPIPE):
                raise
            raise click.ClickException(visible(_line(error))) from error


group = CommandGroup(
    "pyggml",
    Path(commands.__file__).parent,
    commands.__name__,
    help="ggml's backend scheduler in Python: plan, run and explain models on several devices.",
)


class _LogsAsWarnings(logging.Handler):
    """Show what the library logs, where no handler was set, as the program shows its own warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        from .commands._console import warn

        warn(record.getMessage())


def run(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Parameters
    ----------
    args : sequence of str, optional
        The words after the program's name; by default those of this process.

    Returns
    -------
    int
        0: success; 1: the command failed; 2: wrong usage; 3: the plan does not fit; 130: interrupted.
    """
    before, logging.lastResort = logging.lastResort, _LogsAsWarnings(logging.WARNING)
    try:
        group.main(args, prog_name="pyggml")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        logging.lastResort = before


def _line(error: Exception) -> str:
    """Return one line that tells the user what went wrong."""
    if isinstance(error, PyggmlError):
        text = str(error)
    elif isinstance(error, OSError):
        where = "" if error.filename is None else f"{error.filename}: "
        text = f"{where}{error.strerror or error}"
    elif isinstance(error, MemoryError):
        text = f"out of memory{f': {error}' if str(error) else ''} (try a smaller model or context)"
    elif isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        text = f"{error.object}: not a name that a file can have"
    elif place := _own_policy(error):
        text = f"{place}: {type(error).__name__}: {error} (PYGGML_TRACEBACK=1 shows the traceback)"
    else:
        text = (
            f"{type(error).__name__}: {error} (this is an error in pyggml; please report it with the traceback that "
            "PYGGML_TRACEBACK=1 shows)"
        )
    text = " ".join(text.split())
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 500]} … {text[-500:]}"


def _own_policy(error: Exception) -> str:
    """Return which of the user's own policies (``module:Class``) failed, and where; empty if none did."""
    policies = sys.modules.get(f"{__package__}.lab.policies")  # without it no policy was named
    own: set[str] = policies.OWN_MODULES if policies else set()
    place, is_in_own_file = "", False
    for frame, line in traceback.walk_tb(error.__traceback__):
        cls, code = type(frame.f_locals.get("self")), frame.f_code
        if frame.f_globals.get("__name__") in own or (cls.__module__ in own and not is_in_own_file):  # or inherited
            is_in_own_file = frame.f_globals.get("__name__") in own
            who = f"policy {cls.__module__}:{cls.__qualname__}" if cls.__module__ in own else "your own policy"
            place = f"{who} failed in {code.co_qualname}, {code.co_filename}:{line}"
    return place


def _in_plain_letters(error: UnicodeError) -> tuple[str, int]:
    """Return what stands for characters that an output cannot encode, as `codecs.register_error` takes it."""
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_PLAIN.get(c, "?") for c in error.object[error.start : error.end]), error.end


def main() -> None:
    """Run the command of this process, and exit with its status."""
    codecs.register_error("pyggml", _in_plain_letters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it is closed
            stream.reconfigure(errors="pyggml")
    with rare_collections:
        status = run()
        gc.freeze()  # the system takes back all memory at once: the interpreter need not look for garbage in it
    sys.exit(status)
