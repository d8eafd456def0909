"""What `splits` prints for a family that pyggml does not build, if llama.cpp is not installed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DeviceUnavailableError
from ._console import n_bytes, print_json, report, table

if TYPE_CHECKING:
    from ..backend import Backend
    from ..planning import GraphChoice
    from ._model_options import ModelFlags

__all__ = ["print_header", "why_not_captured"]


def why_not_captured(model: Path, graph: GraphChoice) -> DeviceUnavailableError | None:
    """Return why a model that only llama.cpp can build cannot be captured; None for all other models."""
    from ..gguf import GGUFFile
    from ..llama.library import find_llama
    from ..models.architectures import ARCHITECTURES

    if graph == "built" or not model.exists():  # a name of the catalog, or nothing at all
        return None
    with GGUFFile.open(model) as file:
        if graph == "auto" and file.metadata.get("general.architecture") in ARCHITECTURES:
            return None
    try:
        find_llama()
    except DeviceUnavailableError as error:
        return error
    return None


def print_header(
    flags: ModelFlags, model: Path, backends: list[Backend], missing: DeviceUnavailableError, *, as_json: bool
) -> None:
    """Print what the header alone shows."""
    from ..gguf import GGUFFile
    from ..models.architectures import ARCHITECTURES
    from ..models.header_plan import plan_header

    devices = [b.device for b in backends]
    with GGUFFile.open(model) as file:
        memory = plan_header(file, devices[:-1], devices[-1], placement=flags.placement(), context=flags.context())
        arch = file.require("general.architecture", str)
    if as_json:
        print_json({
            "model": {"path": str(model), "arch": arch},
            "memory": [asdict(m) for m in memory],
            "splits": None,
            "install": missing.hint,
        })  # fmt: skip
        return
    console = report()
    is_built = arch in ARCHITECTURES
    how = "is to" if is_built else "can only"
    console.print(f"{model.name}: the graph of {arch} {how} come from llama.cpp. From the header alone:")
    console.print()
    columns = ("buffer type", "weights", "KV cache (max.)")
    made = table("Memory", *columns, right=columns[1:])
    for m in memory:
        made.add_row(m.buft, *(n_bytes(n) if n else "-" for n in (m.weights, m.cache)))
    console.print(made)
    console.print()
    console.print(
        "Splits, copies and compute buffers need the graph" + (", which --graph built makes." if is_built else ".")
    )
