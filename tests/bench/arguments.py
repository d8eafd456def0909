"""Types of the benches' arguments: what argparse shows as wrong usage instead of a traceback."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

__all__ = ["count", "counts", "file", "some_of"]


def count(text: str) -> int:
    """Return a number of at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def counts(text: str) -> list[int]:
    """Return numbers of at least 1, separated by commas."""
    return [count(part) for part in text.split(",")]


def some_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a type of lists of ``names``, separated by commas, in letters of either case; an empty text is no name."""
    known = {name.casefold(): name for name in names}

    def read(text: str) -> list[str]:
        asked = [part.strip() for part in text.split(",") if part.strip()]
        if wrong := [name for name in asked if name.casefold() not in known]:
            raise argparse.ArgumentTypeError(f"there is no {', '.join(wrong)}: choose from {', '.join(known.values())}")
        return [known[name.casefold()] for name in asked]

    return read


def file(text: str) -> str:
    """Return the path of a file that exists."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file '{text}'")
    return text
