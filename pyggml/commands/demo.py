"""`pyggml demo`: run an example, as `make run` does: experts in host memory, the rest on a simulated device."""

from __future__ import annotations

from pathlib import Path

import click
import cloup

from ._console import progress
from ._options import count, file_option, option

__all__ = ["PROMPT", "command"]

#: 73 tokens in the example model's chat template: more than 32, from which on the device offers to compute with experts
#: that lie in host memory.
PROMPT = (
    "A friend who has never programmed wants to know what a computer program is, and why the same program can give "
    "different results on different days. Explain it in a few friendly sentences, with one example from the kitchen."
)
DEVICES = "sim:rtx4090-pcie4,cpu"


EXAMPLES = """
\b
Examples:
  pyggml demo
  pyggml demo --model my.gguf --prompt "Why is the sky blue?" -n 64 -ncmoe 10
"""


@cloup.command("demo", epilog=EXAMPLES, context_settings={"ignore_unknown_options": True})
@file_option("--model", dir_okay=False, metavar=None, help="Your own GGUF file.  [an example]")
@option("--prompt", default=PROMPT, help="The prompt.  [an example]")
@count("-n", "n_predict", metavar=None, shown=160, help="Tokens to generate.")
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def command(ctx: click.Context, model: Path | None, prompt: str, n_predict: int, more: tuple[str, ...]) -> None:
    """Generate text with the experts in host memory and the rest on a simulated device, and report what was copied.

    Without --model, an example is made once from SmolLM2-135M-Instruct: this downloads 93 MB and writes 660 MB to your
    cache folder. You can add options of `pyggml run`; they take precedence.
    """
    path = _example() if model is None else model
    words = [str(path), "--prompt", prompt, "-n", str(n_predict), "--device", DEVICES, "--cpu-moe"]
    if _has_chat_template(path):
        words.append("--chat")
    from .run import command as run

    if not {"--json", "--quiet"} & set(more):
        click.echo(f"Prompt: {prompt}\n")
    with run.make_context("run", [*words, *more], parent=ctx.parent) as sub:
        run.invoke(sub)


def _example() -> Path:
    from ._fetch import cache_folder, example_model

    with progress() as bar:
        task = bar.add_task("", total=None)
        return example_model(
            cache_folder(), lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
        )


def _has_chat_template(path: Path) -> bool:
    from ..gguf import GGUFFile

    with GGUFFile.open(path) as file:
        return "tokenizer.chat_template" in file.metadata
