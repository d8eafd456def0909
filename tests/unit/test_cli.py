"""The program: help without delay, one clear line for each failure, and the exit status that scripts rely on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import pyggml
from pyggml import cli
from pyggml.backend import REGISTRY, Registry
from pyggml.commands import _console
from pyggml.errors import FormatError
from pyggml.hardware.cards import CARDS

BUG = "(this is an error in pyggml; please report it with the traceback that PYGGML_TRACEBACK=1 shows)"
COMMANDS = ("run", "splits", "replay", "devices", "make-moe", "viz")


def _commands(command: click.Command, ctx: click.Context) -> Iterator[click.Command]:
    """Yield a command and all below it."""
    yield command
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            found = command.get_command(ctx, name)
            assert found is not None
            yield from _commands(found, click.Context(found, parent=ctx, info_name=name))


def test_help_names_no_option_that_does_not_exist() -> None:
    """Each ``--option`` in the help of a command or an option is one of some command's."""
    commands = list(_commands(cli.group, click.Context(cli.group)))
    known = {name for command in commands for param in command.params for name in (*param.opts, *param.secondary_opts)}
    for command in commands:
        for text in (command.help, *(getattr(param, "help", None) for param in command.params)):
            assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text or "")) <= known, text


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> dict[str, BaseException]:
    """A command `broken` that raises what stands under ``error``."""
    raised: dict[str, BaseException] = {}

    @click.command("broken")
    def command() -> None:
        raise raised["error"]

    found = cli.CommandGroup.get_command
    monkeypatch.setattr(
        cli.CommandGroup, "get_command", lambda self, ctx, name: command if name == "broken" else found(self, ctx, name)
    )
    return raised


def test_help_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` names every command and says what it does."""
    assert cli.run(["--help"]) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        line = next(line for line in text.splitlines() if line.split()[:1] == [name])
        assert len(line.split()) > 3, line


def test_each_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """Every command has help, and every option of it too."""
    group = cli.group
    with click.Context(group) as ctx:
        for name in group.list_commands(ctx):
            command = group.get_command(ctx, name)
            assert command is not None
            assert command.name == name
            assert command.help, name
            assert cli.run([name, "--help"]) == 0
            options = [p for p in command.params if isinstance(p, click.Option)]
            assert all(p.help for p in options), name
            ungrouped = [p.name for p in options if getattr(p, "group", None) is None]
            assert len(options) < 8 or not ungrouped, f"{name}: say in which group of the help {ungrouped} belong"
    assert "Usage" in capsys.readouterr().out


def test_questions_name_commands_that_work(capsys: pytest.CaptureFixture[str]) -> None:
    """Each answer of "Which command answers which question" parses, and the README has the same table."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    for question, line in cli.QUESTIONS:
        name, *words = line.split()[1:]
        command = cli.group.get_command(click.Context(cli.group), name)
        assert command is not None
        command.make_context(name, words, resilient_parsing=True)
        assert f"| {question} | `{line}` |" in readme
    assert cli.run(["--help"]) == 0
    assert cli.QUESTIONS[0][0] in capsys.readouterr().out


@pytest.mark.parametrize(("words", "proposal"), [(["split"], "'splits'"), (["splits", "--batchs"], "'--batches'")])
def test_typos_get_a_proposal(words: list[str], proposal: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistyped command or option is answered with the nearest one."""
    assert cli.run(words) == 2
    assert proposal in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("pyggml spl", "splits"),
        ("pyggml splits m", "moe.gguf"),
        ("pyggml splits gpt-oss", "gpt-oss-120b"),
        ("pyggml splits -dev sim:rtx30", "sim:rtx3090-pcie4"),
        ("pyggml splits -dev sim:rtx3090-pcie4,cp", "sim:rtx3090-pcie4,cpu"),
        ("pyggml splits --cache-type-k q8", "q8_0"),
    ],
)
def test_shells_complete(
    typed: str, offered: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell completes commands, model files, devices in a list, and values."""
    (tmp_path / "moe.gguf").touch()
    (tmp_path / "more.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("_PYGGML_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    assert cli.run([]) == 0
    values = [line.partition(",")[2] for line in capsys.readouterr().out.splitlines()]
    assert offered in values
    assert "more.txt" not in values


def test_help_is_light() -> None:
    """`--help` imports neither numba nor numpy, which take longer than all else; `devices` not numba."""
    script = (
        "import sys\nfrom pyggml.cli import run\nassert run({!r}) == 0\n"
        "print(*sorted({{'numba', 'numpy', 'rich', 'gguf'}} & set(sys.modules)), file=sys.stderr)"
    )
    for words, heavy in ((["--help"], {"numba", "numpy", "rich", "gguf"}), (["devices", "--json"], {"numba"})):
        done = subprocess.run([sys.executable, "-c", script.format(words)], capture_output=True, text=True, check=True)
        assert not heavy & set(done.stderr.split())


@pytest.mark.parametrize(("setting", "coloured"), [("1", set()), ("", {"36", "33"})])
def test_no_color(setting: str, coloured: set[str]) -> None:
    """With NO_COLOR neither help nor messages have colours; what is bold stays bold, as the convention has it."""
    script = (
        "from pyggml import cli\ncli.group.main(['--help'], standalone_mode=False, color=True)\n"
        "from pyggml.commands._console import warn\nwarn('late')\n"
    )
    env = {**os.environ, "NO_COLOR": setting, "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    codes = set(re.findall(r"\x1b\[(\d+)m", done.stdout + done.stderr))
    assert codes == {"0", "1"} | coloured


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` tells it, as `python -m pyggml` does."""
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"pyggml {pyggml.__version__}\n"
    done = subprocess.run([sys.executable, "-m", "pyggml", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"pyggml {pyggml.__version__}\n"


@pytest.mark.parametrize("words", [["nope"], ["--nope"], [], ["replay"], ["devices", "--nope"], ["devices", "x"]])
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What was typed wrongly is said on stderr; the status is 2."""
    assert cli.run(words) == 2
    seen = capsys.readouterr()
    assert not seen.out
    assert "Usage" in seen.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("run m.gguf --system Hello", "--system needs --chat or --interactive"),
        ("run m.gguf --prompt a --tokens 1", "give --prompt or --tokens, not both"),
        ("run m.gguf -ctk q7_9", "'q7_9' is not one of 'f32', 'f16',"),
        ("splits m.gguf --format ggml --json", "remove --json, --timeline and --html"),
        ("splits m.gguf --batches 0", "give numbers above 0"),
    ],
)
def test_options_that_do_not_go_together(words: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An option that would do nothing, or cannot be, is refused before the model is looked for."""
    assert cli.run(words.split()) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FormatError("a.gguf", "the header ends", offset=12, hint="fetch it again"),
         "Error: a.gguf: the header ends at byte 12 (fetch it again)"),
        (OSError(28, "No space left on device", "/x/out.gguf"), "Error: /x/out.gguf: No space left on device"),
        (UnicodeEncodeError("utf-8", "\ud800x", 0, 1, "surrogates not allowed"), "Error: \\ud800x: not a name that a file can have"),
        (MemoryError(), "Error: out of memory (try a smaller model or context)"),
        (ZeroDivisionError("a\nb"), f"Error: ZeroDivisionError: a b {BUG}"),
        (FormatError("a.gguf", "x" * 10**6, hint="y"), f"Error: a.gguf: {'x' * 1992} … {'x' * 496} (y)"),
    ],
    ids=["ours", "system", "no name", "memory", "bug", "long"],
)  # fmt: skip
def test_failures_are_one_line(
    broken: dict[str, BaseException], error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error ends the command with one line on stderr and status 1."""
    broken["error"] = error
    assert cli.run(["broken"]) == 1
    assert capsys.readouterr() == ("", line + "\n")


def test_traceback_on_request(broken: dict[str, BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """With PYGGML_TRACEBACK the error itself comes out."""
    monkeypatch.setenv("PYGGML_TRACEBACK", "1")
    broken["error"] = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        cli.run(["broken"])


def test_interrupt(broken: dict[str, BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C ends a command with status 130, without a traceback."""
    broken["error"] = KeyboardInterrupt()
    assert cli.run(["broken"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for child processes there")
def test_interrupt_of_a_process(tmp_path: Path) -> None:
    """A real SIGINT gives the same status."""
    script = tmp_path / "wait.py"
    script.write_text(
        "import click, sys, time\nfrom pyggml import cli\n"
        "@click.command('wait')\ndef wait():\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "cli.CommandGroup.get_command = lambda self, ctx, name: wait\nsys.argv[1:] = ['wait']\ncli.main()\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert err == "Interrupted.\n"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break otherwise there")
@pytest.mark.parametrize("words", [["--help"], ["devices"], ["devices", "--json"]])
def test_closed_pipe_is_quiet(words: list[str]) -> None:
    """When the reader has gone away, as `head` does, the program ends without a word; the status is click's."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pyggml", *words], stdout=write_end, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_an_output_that_lacks_our_characters(encoding: str) -> None:
    """Bars and arrows become plain letters where the encoding of the output has none."""
    words = ["splits", "qwen3-0.6b", "-ngl", "20", "-c", "512", "--batches", "8"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-m", "pyggml", *words], capture_output=True, check=True, env=environment)
    text = done.stdout.decode(encoding)
    assert ("####" in text, "░" in text) == ((False, True) if encoding == "utf-8" else (True, False))
    assert done.stderr == b""


# -- devices -----------------------------------------------------------------


def test_devices_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """`devices --json` is one document: devices, their memory and types, and what is missing."""
    assert cli.run(["devices", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    cpu = told["devices"][0]
    assert (cpu["name"], cpu["type"]) == ("CPU", "CPU")
    assert 0 < cpu["memory_free_bytes"] <= cpu["memory_total_bytes"]
    assert cpu["buffer_types"][0]["is_host"] is True
    assert {"f32", "f16", "q4_1", "q8_0"} <= set(cpu["weight_types"])
    assert {"f32", "f16", "q4_1", "q8_0"} <= set(cpu["expert_weight_types"])
    assert "sim:rtx4090-pcie4" in [p["device"] for p in told["profiles"]]
    assert [card["name"] for card in told["cards"]] == list(CARDS)


def test_devices_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    """`devices` names the CPU, every card that --device takes, and what is missing; without colour where that is no terminal."""
    assert cli.run(["devices"]) == 0
    text = capsys.readouterr().out
    for word in ("CPU", "sim:h100-pcie5", "80.0 GiB", "mock", "q4_1"):
        assert word in text
    named = set(re.split(r"[\s,]+", text))
    assert named >= set(CARDS)
    assert "\x1b" not in text


def test_devices_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A kind of device whose module fails is listed as missing with the reason; the others are shown."""
    modules = {**REGISTRY.modules, "tpu": "pyggml.backends.no_such_module"}
    monkeypatch.setattr("pyggml.commands.devices.REGISTRY", Registry(modules))
    assert cli.run(["devices", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["devices"][0]["name"] == "CPU"
    assert "no_such_module" in {m["kind"]: m["why"] for m in told["missing"]}["tpu"]


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536 * 1024**2, "1.5 GiB"), (5 << 50, "5,120.0 TiB")],
)
def test_sizes(n: int, text: str) -> None:
    """Sizes are told in the unit that people read."""
    assert _console.n_bytes(n) == text


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """A progress bar that goes to a file or a pipe writes nothing."""
    with _console.progress() as bar:
        task = bar.add_task("work", total=2)
        time.sleep(0.01)
        bar.update(task, completed=2)
    assert capsys.readouterr() == ("", "")
