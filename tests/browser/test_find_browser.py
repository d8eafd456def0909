"""The browser is found where it lies, installed where that is possible, and else asked for in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import find_browser
import pytest

PROGRAM = Path(find_browser.__file__)


def make_program(path: Path, script: str = "") -> Path:
    """Write a shell script that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_names_on_the_path(tmp_path: Path) -> None:
    """A browser on the path is found by any of its names, Chromium before Chrome."""
    chrome = make_program(tmp_path / "google-chrome")
    assert find_browser.find_browser({"PATH": str(tmp_path)}) == chrome
    chromium = make_program(tmp_path / "chromium")
    assert find_browser.find_browser({"PATH": str(tmp_path)}) == chromium


def test_the_variable_goes_first(tmp_path: Path) -> None:
    """What the variable names is taken; if it is not there, no other browser takes its place."""
    make_program(tmp_path / "bin/chromium")
    own = make_program(tmp_path / "own/chrome")
    environ = {"PATH": str(tmp_path / "bin"), find_browser.VARIABLE: str(own)}
    assert find_browser.find_browser(environ) == own
    assert find_browser.find_browser(environ | {find_browser.VARIABLE: str(tmp_path / "none")}) is None


def test_places_off_the_path(tmp_path: Path) -> None:
    """A browser that is no command is found where its system puts it."""
    app = make_program(tmp_path / "Google Chrome.app/Google Chrome")
    nowhere = {"PATH": str(tmp_path / "empty")}
    assert find_browser.find_browser(nowhere, places=("/nowhere/chrome", str(app))) == app
    assert find_browser.find_browser(nowhere, places=()) is None


@pytest.mark.parametrize(
    ("release", "answer"), [("NAME=Debian\nID=debian\n", True), ("ID=ubuntu\nID_LIKE=debian\n", False), (None, False)]
)
def test_installs_on_debian_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str | None, answer: bool
) -> None:
    """A browser is installed on Debian only, by root only, and never where the variable names another."""
    monkeypatch.setattr(os, "geteuid", lambda: 0, raising=False)
    make_program(tmp_path / "apt-get")
    environ, file = {"PATH": str(tmp_path)}, tmp_path / "os-release"
    if release is not None:
        file.write_text(release)
    assert find_browser.may_install(environ, os_release=file) is answer
    assert not find_browser.may_install(environ | {find_browser.VARIABLE: "chrome"}, os_release=file)
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    assert not find_browser.may_install(environ, os_release=file)


@pytest.fixture
def without_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the only folder on the path of a machine without a browser, which may install one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv(find_browser.VARIABLE, raising=False)
    # what this machine has off the path must not be found
    search = find_browser.find_browser
    monkeypatch.setattr(find_browser, "find_browser", lambda: search(os.environ, places=()))
    monkeypatch.setattr(find_browser, "may_install", lambda: True)
    return folder


def test_installing(without_browser: Path) -> None:
    """The lists of packages are fetched, then the browser is installed; then it is there."""
    log, program = without_browser / "log", without_browser / "chromium"
    script = f'echo "$DEBIAN_FRONTEND $@" >> {log}; case "$*" in *install*) /bin/cp {without_browser}/apt-get {program};; esac'
    make_program(without_browser / "apt-get", script)
    assert find_browser.main([]) is None
    options = "noninteractive -q -y -o DPkg::Lock::Timeout=120"
    assert log.read_text().splitlines() == [f"{options} update", f"{options} install --no-install-recommends chromium"]


def test_a_failing_installation_is_told(without_browser: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """If apt-get fails, what it said is shown, and what to do."""
    make_program(without_browser / "apt-get", "echo no net >&2; exit 100")
    assert find_browser.main([]) == find_browser.MISSING
    assert capfd.readouterr().err == "no net\n"


def test_one_line_and_a_status(tmp_path: Path) -> None:
    """Without a browser the program fails with one line; if the tests are left out, it does not look for one."""
    environ = os.environ | {find_browser.VARIABLE: str(tmp_path / "none")}
    done = subprocess.run([sys.executable, PROGRAM], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == find_browser.MISSING + "\n"
    words = ["-m", "not slow and not gpu and not browser"]
    done = subprocess.run([sys.executable, PROGRAM, *words], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
