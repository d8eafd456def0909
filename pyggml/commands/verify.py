"""`pyggml verify`: compare pyggml's plan of a model with llama.cpp's own scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
import cloup
from click.core import ParameterSource

from ._cache_options import cache_options
from ._console import print_json, report, table, warn
from ._model_options import ModelCommand, ModelFlags, model_options, open_backends, parse_sizes
from ._options import choice, json_option, option
from ._values import ModelPath

if TYPE_CHECKING:
    from rich.table import Table

    from ..backend import Backend, Device
    from ..llama.verify import Verification
    from ..moe_cache import CacheRule

__all__ = ["command"]


EXAMPLES = """
\b
Examples:
  pyggml verify moe.gguf --cpu-moe
  pyggml verify gemma.gguf -ngl 10 -fa on --batches 512,32,31,1
  pyggml verify moe.gguf -ncmoe 24 --json | jq .equal
  pyggml verify moe.gguf --cpu-moe --moe-cache-mib 512 --batches 64,1
"""


@cloup.command("verify", cls=ModelCommand, epilog=EXAMPLES)
@click.argument("model", type=ModelPath())
@cloup.option_group(
    "Batches",
    option("--batches", shown="512,1", metavar="N,N", help="Batch sizes; each with a full cache."),
    choice("--outputs", values=["last", "all"], shown="last", help="Tokens whose logits are computed."),
)
@model_options
@cache_options
@cloup.option_group("Output", json_option("Print the comparison as JSON."))
@click.pass_context
def command(
    ctx: click.Context,
    flags: ModelFlags,
    model: Path,
    batches: str,
    outputs: Literal["last", "all"],
    expert_cache: CacheRule | None,
    as_json: bool,
) -> None:
    """Plan a GGUF model with pyggml and with llama.cpp's own scheduler, and compare splits, inputs, sizes and nodes.

    Both use the graph that llama.cpp builds; no weight is read. The default --device stands for a device that runs
    every op and offloads from 32 tokens on. Exit status 1: something differs. Needs the packages of the `llama` extra.
    """
    from ..llama.verify import DEVICE, verify

    if flags.offload_by != "rows":
        raise click.UsageError("--offload-by does not work with verify, which compares llama.cpp's rule")
    sizes = parse_sizes(batches)
    devices: list[str | Device | Backend] = [DEVICE]
    if ctx.get_parameter_source("device") is ParameterSource.COMMANDLINE:
        devices = [*open_backends(flags, data=False)[0]]
    _warn_of_flags(model, flags)
    found = verify(
        model, sizes, devices=devices, placement=flags.placement(), context=flags.context(), outputs=outputs,
        expert_cache=expert_cache,
    )  # fmt: skip
    if as_json:
        print_json(found.as_dict())
    else:
        _print(found)
    if not found.equal:
        ctx.exit(1)


def _warn_of_flags(model: Path, flags: ModelFlags) -> None:
    """Warn if flags are about experts but the model has none."""
    from ..gguf import GGUFFile

    about_experts = [text for text in flags.overrides if text.startswith("--")]
    if not about_experts or not model.exists():
        return
    with GGUFFile.open(model) as file:
        if not any("_exps" in name or "_chexps" in name for name in file.tensors):
            warn(f"{model.name} has no experts: {', '.join(about_experts)} has no effect")


def _print(found: Verification) -> None:
    console = report()
    console.print(
        f"{Path(found.model).name}: {found.arch}, llama.cpp {found.build['llama']}, ggml {found.build['ggml']}"
    )
    console.print(_table(found))
    for plan in found.plans:
        if plan.first_difference is not None:
            d = plan.first_difference
            console.print(f"Batch {plan.batch}, micro-batch of {plan.n_tokens}: line {d.line} differs")
            console.print(f"  llama.cpp: {d.llama.strip() or '(nothing more)'}", markup=False)
            console.print(f"  pyggml:    {d.pyggml.strip() or '(nothing more)'}", markup=False)


def _table(found: Verification) -> Table:
    columns = ("batch", "micro-batch", "splits", "lines")
    made = table("Splits of pyggml and llama.cpp", *columns, "", right=columns)
    for plan in found.plans:
        made.add_row(
            str(plan.batch), str(plan.n_tokens), str(plan.n_splits), f"{plan.n_lines:,}",
            "equal" if plan.equal else "different",
        )  # fmt: skip
    return made
