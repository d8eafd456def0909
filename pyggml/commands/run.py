"""`pyggml run`: run a model: evaluate a prompt, generate text, report copies, memory and time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
import cloup

from ._cache_options import cache_options
from ._model_options import ModelCommand, ModelFlags, model_options
from ._options import choice, count, file_option, flag, json_option, number, option
from ._page import check_outputs
from ._values import ModelPath

if TYPE_CHECKING:
    from ..moe_cache import CacheRule

__all__ = ["command"]

#: Most tokens of an answer under --interactive if -n does not say.
DEFAULT_ANSWER = 256


EXAMPLES = """
\b
Examples:
  pyggml run moe.gguf -p "Why is the sky blue?" -n 64 --chat --cpu-moe
  pyggml run moe.gguf -p "Once upon a time" -n 32 -ncmoe 12 --html run.html
  pyggml run moe.gguf -i -dev sim:rtx3090-pcie4,cpu -ngl 20
  pyggml run gemma-3-4b.gguf -p "Why is the sky blue?" -n 32 --engine llama
"""


@cloup.command("run", cls=ModelCommand, epilog=EXAMPLES)
@click.argument("model", type=ModelPath())
@cloup.option_group(
    "Prompt and answer",
    option("-p", "--prompt", metavar="TEXT", help="The prompt."),
    option("--tokens", metavar="1,2,3", help="The prompt as token ids."),
    count("-n", "--n-predict", shown=0, help="Tokens to generate."),
    flag("--chat", help="Format the prompt with the model's chat template."),
    flag("-i", "--interactive", help="Chat: each line is a prompt, and the KV cache is kept. /help lists commands."),
    option("--system", default="", metavar="TEXT", help="System message for --chat or -i."),
    flag("--ignore-eos", help="Continue after the end-of-text token."),
)
@cloup.option_group(
    "Sampling",
    number("--temp", shown=0.0, metavar="T", help="Temperature; 0: always the most likely token."),
    count("--top-k", metavar="K", shown=40, help="Sample from the K most likely tokens; 0: all."),
    number("--top-p", most=1, shown=0.95, metavar="P",
         help="Sample from the most likely tokens with total probability P."),
    number("--min-p", most=1, shown=0.05, metavar="P",
         help="Sample from tokens at least P times as likely as the most likely one."),
    count("--seed", shown=0, help="Seed of the sampling."),
)  # fmt: skip
@model_options
@cache_options
@cloup.option_group(
    "Engine",
    choice("--engine", values=["pyggml", "llama"], shown="pyggml",
         help="llama: the real llama.cpp schedules and pyggml's devices compute; runs every model that llama.cpp supports."),
)  # fmt: skip
@cloup.option_group(
    "Output",
    file_option("--html", help="Write a page that shows what happened and why."),
    file_option("--timeline", help="Write a timeline for Perfetto and `pyggml viz`."),
    file_option("--dump-logits", help="Write the prompt's logits and chosen experts to an NPZ file."),
    file_option("--record-routing",
         help="Write the experts that tokens choose (.npz or .jsonl), for `splits --routing trace:FILE` and `experts`."),
    flag("--quiet", help="Print only the text, no report."),
    json_option("Print text and report as one JSON document."),
)  # fmt: skip
def command(
    flags: ModelFlags,
    expert_cache: CacheRule | None,
    model: Path,
    prompt: str | None,
    tokens: str | None,
    n_predict: int,
    chat: bool,
    interactive: bool,
    system: str,
    temp: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    ignore_eos: bool,
    engine: Literal["pyggml", "llama"],
    timeline: Path | None,
    html: Path | None,
    dump_logits: Path | None,
    record_routing: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run a GGUF model on several devices: evaluate a prompt, generate text, and report what was copied.

    Without --prompt or --tokens the model starts from its first token.
    """
    if prompt is not None and tokens is not None:
        raise click.UsageError("give --prompt or --tokens, not both")
    if chat and prompt is None:
        raise click.UsageError("--chat needs a --prompt")
    if system and not (chat or interactive):
        raise click.UsageError("--system needs --chat or --interactive")
    if interactive and (as_json or tokens is not None or dump_logits is not None or record_routing is not None):
        raise click.UsageError("--interactive does not work with --json, --tokens, --dump-logits or --record-routing")
    check_outputs(model, timeline, html, dump_logits, record_routing)
    if engine == "llama" and expert_cache is not None and not hasattr(expert_cache, "size_bytes"):
        raise click.UsageError("--expert-cache does not work with --engine llama, which has its own: --moe-cache-mib")
    if engine == "llama" and expert_cache is not None and expert_cache.misses != "copy":
        raise click.UsageError("--moe-cache-misses does not work with --engine llama: llama.cpp copies what is missing")
    if engine == "llama" and flags.offload_by != "rows":
        raise click.UsageError("--offload-by does not work with --engine llama: llama.cpp decides what is offloaded")
    if engine == "llama" and flags.expert_copy != "used":
        raise click.UsageError("--expert-copy does not work with --engine llama: llama.cpp decides what is copied")
    from ..sampling import SamplerFlags
    from ._run import Output, converse, evaluate

    sampler = SamplerFlags(temperature=temp, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    sampler.check()
    output = Output(as_json, timeline, html, dump_logits, record_routing, quiet, engine, expert_cache)
    if interactive:
        converse(flags, model, output, prompt, n_predict or DEFAULT_ANSWER, sampler, system=system)
        return
    ids = _parse_ids(tokens) if tokens is not None else None
    evaluate(flags, model, output, prompt, n_predict, sampler, ids=ids, chat=chat, system=system, ignore_eos=ignore_eos)


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise click.UsageError(f"--tokens {text}: give numbers, separated by commas") from None
