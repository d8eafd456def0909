"""Option values that a shell can complete: model files and lists of devices."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem

__all__ = ["DeviceList", "ModelPath"]


class ModelPath(click.Path):
    """A GGUF file, or a name from `pyggml models`. A shell completes names, files and folders."""

    name = "model"

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the GGUF files, folders and model names that begin with this text."""
        from ..catalog import MODELS

        named = [CompletionItem(name) for name in MODELS if name.startswith(incomplete)]
        folder, slash, start = incomplete.rpartition("/")
        try:
            entries = sorted(Path(folder + slash or ".").iterdir())
        except OSError:
            return named
        return named + [
            CompletionItem(f"{folder}{slash}{path.name}{'/' if path.is_dir() else ''}")
            for path in entries
            if path.name.startswith(start) and path.name[:1] != "." and (path.suffix == ".gguf" or path.is_dir())
        ]


class DeviceList(click.ParamType[str]):
    """Names of devices, separated by commas. A shell completes the last one."""

    name = "LIST"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the devices whose names begin with the last name of the list."""
        from ..backend import REGISTRY
        from ..cost import PROFILES
        from ..hardware.cards import CARDS

        names = [*CARDS, *(f"sim:{name}" for name in PROFILES)] + [kind for kind in REGISTRY.kinds() if kind != "sim"]
        before, comma, last = incomplete.rpartition(",")
        return [CompletionItem(f"{before}{comma}{name}") for name in names if name.startswith(last)]
