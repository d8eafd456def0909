"""`pyggml demo`, what `make run` does: the right words for `pyggml run`, and an example only if none is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from pyggml import cli, errors
from pyggml.commands import _fetch, demo, run


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `pyggml run` was called with, instead of running it."""
    calls: list[dict[str, Any]] = []

    def note(**given: Any) -> None:
        calls.append(given)

    replaced = click.Command("run", params=run.command.params, callback=note)
    monkeypatch.setattr(run, "command", replaced)
    monkeypatch.setattr(demo, "_has_chat_template", lambda path: path.stem == "chatty")
    return calls


def test_own_model_is_run_with_experts_in_host_memory(ran: list[dict[str, Any]]) -> None:
    """A user's own model is taken as it is; nothing is fetched, and the devices are a simulated one and the CPU."""
    assert cli.run(["demo", "--model", "mine.gguf", "--prompt", "Hello"]) == 0
    (given,) = ran
    assert given["model"] == Path("mine.gguf")
    assert given["prompt"] == "Hello"
    assert given["cpu_moe"] is True
    assert given["chat"] is False
    assert given["device"].startswith("sim:")
    assert given["device"].endswith(",cpu")
    assert given["n_predict"] > 0


def test_chat_template_is_used_where_there_is_one(ran: list[dict[str, Any]]) -> None:
    """A model with a chat template is asked by it."""
    assert cli.run(["demo", "--model", "chatty.gguf"]) == 0
    assert ran[0]["chat"] is True
    assert ran[0]["prompt"] == demo.PROMPT


def test_example_is_made_if_no_model_is_given(
    ran: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a model the example of the cache folder is taken."""
    monkeypatch.setenv("PYGGML_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_fetch, "example_model", lambda folder, report: folder / "chatty.gguf")
    assert cli.run(["demo"]) == 0
    assert ran[0]["model"] == tmp_path / "models" / "chatty.gguf"


def test_further_options_go_to_run_and_win(ran: list[dict[str, Any]]) -> None:
    """Options that the demo does not know are those of `pyggml run`; given ones win over the demo's."""
    assert cli.run(["demo", "--model", "m.gguf", "-n", "3", "-ub", "64", "--device", "cpu"]) == 0
    assert (ran[0]["n_predict"], ran[0]["n_ubatch"], ran[0]["device"]) == (3, 64, "cpu")
    assert cli.run(["demo", "--model", "m.gguf", "--no-such-option"]) == 2


def test_missing_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A model that is not there is named in one line."""
    assert cli.run(["demo", "--model", "/nowhere/m.gguf"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "/nowhere/m.gguf" in err


def test_cache_folder_that_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache folder below a file is an error that names it and says what to try."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYGGML_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(errors.PyggmlError, match="PYGGML_CACHE_DIR"):
        _fetch.example_model(_fetch.cache_folder())
