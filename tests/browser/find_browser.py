"""Find Chromium or Chrome for the tests in this folder; `make test` runs this file before them.

Run as a program, it installs Debian's Chromium if there is none and it may, or says in a line what to do. The words after
the program's name are pytest's: if they leave these tests out, nothing is looked for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

#: A path or name that goes before all others.
VARIABLE = "CHROME_BIN"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge", "msedge")
#: Where they lie on systems that do not put programs on the path.
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "~/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "~/Applications/Chromium.app/Contents/MacOS/Chromium",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
)
MISSING = (
    "The browser tests need Chromium or Google Chrome: install one (Debian: `apt-get install chromium`), or name it in "
    f"{VARIABLE}, or leave these tests out: make test ARGS=\"-m 'not slow and not gpu and not browser'\""
)
LEFT_OUT = "not browser"
APT = ("apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=120")
#: The browser alone: what it recommends is for desktops.
COMMANDS = ((*APT, "update"), (*APT, "install", "--no-install-recommends", "chromium"))


def find_browser(environ: Mapping[str, str] = os.environ, *, places: Sequence[str] = PLACES) -> Path | None:
    """Return the browser's program; None if there is none, or none where the variable says."""
    path = environ.get("PATH", os.defpath)
    if named := environ.get(VARIABLE):
        found = shutil.which(named, path=path)
        return None if found is None else Path(found)
    for name in NAMES:
        if found := shutil.which(name, path=path):
            return Path(found)
    return next((p for p in (Path(place).expanduser() for place in places) if p.is_file()), None)


def may_install(environ: Mapping[str, str] = os.environ, *, os_release: Path = Path("/etc/os-release")) -> bool:
    """Return whether this is Debian, where `chromium` is a package as others are, and the user may install it."""
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    is_debian = os_release.is_file() and "ID=debian" in os_release.read_text(encoding="utf-8").splitlines()
    has_apt = shutil.which("apt-get", path=environ.get("PATH", os.defpath)) is not None
    return is_root and is_debian and has_apt and VARIABLE not in environ


def install(environ: Mapping[str, str] = os.environ) -> None:
    """Install Debian's Chromium; what apt-get says is shown if it fails."""
    for command in COMMANDS:
        done = subprocess.run(
            command, env={**environ, "DEBIAN_FRONTEND": "noninteractive"}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.stderr.write(done.stdout)
            return


def main(words: Sequence[str]) -> str | None:
    """Return why there is no browser; None if there is one, or none is needed."""
    if any(LEFT_OUT in word for word in words) or find_browser() is not None:
        return None
    if may_install():
        sys.stdout.write("No Chromium found: installing Debian's for the browser tests\n")
        sys.stdout.flush()
        install()
    return MISSING if find_browser() is None else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
