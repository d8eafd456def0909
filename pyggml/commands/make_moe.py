"""`pyggml make-moe`: write a small mixture-of-experts model, random or from a dense model."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from ..types import Type
from ._options import choice, count, file_option, json_option, number, option

if TYPE_CHECKING:
    from ..makers.gguf_writer import Progress, Written

__all__ = ["command"]

_MB = 10**6
_TYPES = [
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
    "TQ1_0", "TQ2_0", "MXFP4",
]  # fmt: skip
_ARCHS = [
    "llama",
    "qwen3moe",
    "gpt-oss",
    "olmoe",
    "granitemoe",
    "qwen2moe",
    "glm4moe",
    "deepseek2",
    "qwen3next",
    "qwen35moe",
    "qwen35-dense",
    "gemma4",
    "gemma4-dense",
    "llama-dense",
]
#: What only random models have; an upcycled one takes these from its dense model.
_RANDOM_ONLY = (
    "arch", "preset", "dense_type", "tokenizer", "layers", "embd", "heads", "kv_heads", "head_dim", "ff", "ff_exp", "ctx",
    "vocab",
)  # fmt: skip
_SIZES = {
    "layers": "Layers.",
    "embd": "Width of the residual stream.",
    "heads": "Attention heads.",
    "kv-heads": "Key-value heads.",
    "head-dim": "Elements of a head.",
    "ff": "Width of a dense feed-forward network.",
    "ff-exp": "Width of one expert.",
    "vocab": "Tokens of the vocabulary.",
    "ctx": "Trained context.",
}


EXAMPLES = """
\b
Examples:
  pyggml make-moe moe.gguf --preset fine-grained
  pyggml make-moe moe.gguf --arch qwen3moe --type q4_k --layers 4 --experts 16 --used 2
  pyggml make-moe moe.gguf --from dense.gguf --experts 8
"""
_TYPE = click.Choice(_TYPES, case_sensitive=False)


@cloup.command("make-moe", short_help="Write a small mixture-of-experts model.", epilog=EXAMPLES)
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@cloup.option_group(
    "Source",
    file_option("--from", "dense", dir_okay=False, metavar="MODEL", help="Make it from this dense llama model."),
    choice("--preset", values=["fine-grained"], help="32 small experts, 4 used per token, unevenly."),
    choice("--arch", values=_ARCHS, metavar="NAME",
         help=f"Architecture of a random model: {', '.join(_ARCHS)}. [default: llama]"),
    choice("--tokenizer", values=["bytes", "none"], help="Tokenizer of a random model. [default: bytes]"),
)  # fmt: skip
@cloup.option_group(
    "Experts and weights",
    count("--experts", least=1, help="Experts per layer. [default: 8]"),
    count("--used", least=1, help="Experts used per token. [default: 2]"),
    number("--skew", metavar="X", help="How strongly routers prefer some experts."),
    number("--noise", metavar="X", help="With --from: how much the experts differ. [default: 0.05]"),
    option("--type", "kind", type=_TYPE, metavar="TYPE",
         help=f"Type of the weights; with --from, of the experts: {', '.join(_TYPES)}."),
    option("--dense-type", type=_TYPE, metavar="TYPE", help="Type of all other weights."),
    count("--seed", help="Seed of all random numbers. [default: 1]"),
)  # fmt: skip
@cloup.option_group(
    "Sizes of a random model",
    *(count(f"--{name}", least=1, help=help) for name, help in _SIZES.items()),
)
@cloup.option_group(
    "Output",
    json_option("Print the report as JSON."),
)
def command(out: Path, dense: Path | None, as_json: bool, **given: Any) -> None:
    """Write a small mixture-of-experts model to OUT. The same arguments give the same bytes.

    Without --from, the weights are random: for tests and examples. With --from, each expert is a slightly different
    copy of the dense model's feed-forward network, and the model writes text as sensible as the dense model's.
    """
    from . import _console

    given = {name: value for name, value in given.items() if value is not None}
    for name in ("kind", "dense_type"):
        if name in given:
            given[name] = Type.of(given[name])
    if dense is None and "noise" in given:
        raise click.UsageError("--noise needs --from: random experts already differ")
    with _console.progress() as bar:
        task = bar.add_task("Writing (MB)", total=None)
        tell: Progress = lambda done, total: bar.update(task, completed=done // _MB, total=-(-total // _MB))
        report = _make_random(out, given, tell) if dense is None else _upcycle(out, dense, given, tell)
    if as_json:
        _console.print_json(report)
    else:
        console = _console.report()
        console.print(f"{report['path']}: {report['arch']}, {report['experts']} experts, {report['used']} used")
        console.print(f"{_console.n_bytes(report['bytes'])}, sha256 {report['sha256']}", soft_wrap=True)


def _make_random(out: Path, given: dict[str, Any], tell: Progress) -> dict[str, Any]:
    from ..makers.make_moe import PRESETS, Recipe, Sizes, make_moe

    recipe = PRESETS[given["preset"]] if "preset" in given else Recipe("llama")
    sizes = {field.name: given[field.name] for field in fields(Sizes) if field.name in given}
    names = {n: n for n in ("arch", "dense_type", "seed", "tokenizer", "skew")} | {"kind": "type"}
    rest = {ours: given[name] for name, ours in names.items() if name in given}
    recipe = replace(recipe, sizes=replace(recipe.sizes, **sizes), **rest)
    written = make_moe(out, recipe, progress=tell)
    has_experts = not recipe.arch.endswith("-dense")
    return _report(
        written,
        arch=recipe.arch,
        type=recipe.type.ggml_name,
        experts=recipe.sizes.experts if has_experts else 0,
        used=recipe.sizes.used if has_experts else 0,
        seed=recipe.seed,
    )


def _upcycle(out: Path, dense: Path, given: dict[str, Any], tell: Progress) -> dict[str, Any]:
    unfit = [name for name in _RANDOM_ONLY if name in given]
    if given.get("arch") == "llama":
        unfit.remove("arch")
    if unfit:
        raise click.UsageError(f"--{unfit[0].replace('_', '-')} does not work with --from: the dense model decides it")
    if out.exists() and dense.exists() and out.samefile(dense):
        raise click.UsageError("OUT and --from are the same file")
    from ..gguf import GGUFFile
    from ..makers.upcycle import Upcycling, upcycle
    from ._fetch import calibration_tokens

    options = Upcycling()
    names = {"experts": "experts", "used": "used", "seed": "seed", "noise": "noise", "skew": "skew", "kind": "type"}
    options = replace(options, **{ours: given[name] for name, ours in names.items() if name in given})
    with GGUFFile.open(dense) as file:
        written = upcycle(file, out, calibration_tokens(file), options, progress=tell)
        kind = options.type or file.tensor("blk.0.ffn_gate.weight").type
        arch = file.require("general.architecture", str)
    return _report(
        written,
        arch=arch,
        type=kind.ggml_name,
        experts=options.experts,
        used=options.used,
        seed=options.seed,
        source=str(dense),
    )


def _report(written: Written, **facts: Any) -> dict[str, Any]:
    return {"path": written.path, "bytes": written.n_bytes, "sha256": written.sha256, **facts}
