"""Arguments of benches: what they take, and that wrong ones are shown as wrong usage."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """A parser with an argument of each type."""
    monkeypatch.syspath_prepend(str(BENCH))
    from arguments import count, counts, file, some_of

    made = argparse.ArgumentParser(exit_on_error=False)
    for flag, kind in (("-n", count), ("-c", counts), ("-t", some_of(["f32", "Q8_0"])), ("-f", file)):
        made.add_argument(flag, type=kind)
    return made


def test_names_are_taken_in_letters_of_either_case(parser: argparse.ArgumentParser) -> None:
    """Names of a list are those of the bench, whatever case they were given in."""
    assert parser.parse_args(["-t", "F32, q8_0,", "-c", "1,8", "-n", "3"]) == argparse.Namespace(
        t=["f32", "Q8_0"], c=[1, 8], n=3, f=None
    )


@pytest.mark.parametrize(
    ("flag", "text", "said"),
    [("-n", "0", "at least 1"), ("-c", "1,,2", "at least 1"), ("-n", "two", "'two'"), ("-t", "f32,f33", "no f33: "),
     ("-f", "absent.gguf", "no file 'absent.gguf'")],
)  # fmt: skip
def test_a_wrong_argument_is_named(parser: argparse.ArgumentParser, flag: str, text: str, said: str) -> None:
    """What is no count, no name or no file is wrong usage that names it."""
    with pytest.raises(argparse.ArgumentError, match=said):
        parser.parse_args([flag, text])


def test_a_bench_shows_a_wrong_type_as_wrong_usage() -> None:
    """The products' bench takes F32 in capitals, and says which of its types there is not."""
    command = [sys.executable, str(BENCH / "bench_mul_mat_id.py"), "--types", "F32,f33"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no f33: choose from f32," in done.stderr
