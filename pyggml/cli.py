"""The program `pyggml`: one group of the commands in `pyggml.commands`, and what becomes of their errors.

A command is a module of `pyggml.commands` that holds a ``command``. The first line of the module's docstring,
"`pyggml NAME`: what it does.", is the command's line in the help. Modules are imported when their command runs, so that
help takes no time.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import click

from . import __version__, commands, config
from .errors import PyggmlError

__all__ = ["CommandGroup", "group", "main", "run"]

#: Columns of help at most, on a terminal that has them.
HELP_WIDTH = 110
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class CommandGroup(click.Group):
    """The commands in a package, each imported when it is asked for.

    Parameters
    ----------
    folder : Path
        Of the package.
    package : str
        Its name.
    """

    def __init__(self, name: str, folder: Path, package: str, *, help: str) -> None:
        super().__init__(
            name,
            help=help,
            no_args_is_help=True,
            context_settings={"help_option_names": ["-h", "--help"], "max_content_width": HELP_WIDTH},
        )
        self.folder = folder
        self.package = package

    def _modules(self) -> dict[str, str]:
        """Return the modules of the commands, by the commands' names."""
        stems = sorted(path.stem for path in self.folder.glob("*.py"))
        return {stem.replace("_", "-"): stem for stem in stems if not stem.startswith("_")}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(self._modules())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, imported."""
        stem = self._modules().get(cmd_name)
        if stem is None:
            return None
        command = importlib.import_module(f"{self.package}.{stem}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        rows = [(name, self._summary(stem)) for name, stem in self._modules().items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def _summary(self, stem: str) -> str:
        """Return what a command does: the first line of its module, after the command's name."""
        source = (self.folder / f"{stem}.py").read_text(encoding="utf-8")
        text = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
        text = text.partition(": ")[2] or text
        return text[:1].upper() + text[1:]


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"pyggml {__version__}")
        ctx.exit()


group = CommandGroup(
    "pyggml",
    Path(commands.__file__).parent,
    commands.__name__,
    help="ggml's backend scheduler in Python: run, plan and explain models over several devices.",
)
group.params.append(
    click.Option(
        ["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_print_version,
        help="Show the version and exit.",
    )
)


def run(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 failed, 2 usage, 130 interrupted.

    Parameters
    ----------
    args : sequence of str, optional
        The words after the program's name; those of this process if not given.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        with group.make_context("pyggml", words) as ctx:
            group.invoke(ctx)
        sys.stdout.flush()
    except click.exceptions.Exit as exit:
        return exit.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_USAGE
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted.", err=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the reader had enough, as `head` does; nothing more may be written, not even at exit
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if config.traceback():
            raise
        click.echo(f"Error: {_line(error)}", err=True)
        return EXIT_FAILED
    return 0


def _line(error: Exception) -> str:
    """Return one line that tells a user what went wrong."""
    if isinstance(error, PyggmlError):
        text = str(error)
    elif isinstance(error, OSError):
        where = "" if error.filename is None else f"{error.filename}: "
        text = f"{where}{error.strerror or error}"
    elif isinstance(error, MemoryError):
        text = f"out of memory{f': {error}' if str(error) else ''} (try a smaller model or context)"
    else:
        text = (
            f"{type(error).__name__}: {error} (this is a mistake in pyggml, not yours; "
            "PYGGML_TRACEBACK=1 shows where it is)"
        )
    return " ".join(text.split())


def main() -> NoReturn:
    """Run the command that this process was started with, and exit."""
    sys.exit(run())
