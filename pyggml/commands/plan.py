"""`pyggml plan`: recommend flags for a model and a machine: how fast, how much memory, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup
from click.core import ParameterSource

from ..files import aside
from ._cache_options import cache_options, stated_routing
from ._console import n_bytes, print_json, progress, report, table
from ._options import cards_option, count, file_option, json_option, number, option
from ._page import check_outputs
from ._values import ModelPath

if TYPE_CHECKING:
    from rich.table import Table

    from ..advisor import Advice, Explanation, Recommendation
    from ..foresight import Setting, Speed

__all__ = ["EXIT_DOES_NOT_FIT", "command"]

EXIT_DOES_NOT_FIT = 3
#: Columns from which on the table has room for ranges.
_WIDE = 120
EXAMPLES = """
\b
Examples:
  pyggml plan gpt-oss-120b --device rtx3090 --host ddr4-3200x2,cores=8,64GiB
  pyggml plan my.gguf -dev rtx3060 --prompt 4096 --generate 512 --context 32768
  pyggml plan qwen3-30b-a3b -dev rtx3060 --compare "-ncmoe 48 -ub 512"
  pyggml plan --explain -ncmoe
"""


#: Options of llama.cpp that load something beside the model.
_BESIDE = ("-md", "--model-draft", "--spec-draft-model", "-mm", "--mmproj")
#: Those that name the model.
_MODEL = ("-m", "--model", "-hf", "-hfr", "--hf-repo")
#: Options of `splits` that a row of a plan cannot have of its own, and the value that all rows have.
_NOT_COMPARED = {
    "device": None, "split_mode": "layer", "main_gpu": 0, "swa_full": False, "n_seq_max": 1, "kv_unified": False,
    "expert_copy": "used", "prefetcher": None, "prefetch_fit": None, "peer_mib": None, "offload_by": "rows",
}  # fmt: skip


class _PlanCommand(cloup.Command):
    """A command that refuses llama.cpp's flags by their names: what a plan chooses is not told to it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; click alone would read ``-ctk`` as ``-c tk``."""
        own = {name for param in self.get_params(ctx) for name in param.opts}
        for before, word in zip(["", *args], args, strict=False):
            if word[:1] == "-" and word.partition("=")[0] not in own and before not in ("--explain", "--compare"):
                from ..advisor import flag_name

                _refuse_beside(word, ctx)
                if flag := flag_name(word.partition("=")[0]):
                    hint = "--kv-types T,T allows types" if "-ct" in flag else f'--compare "{word} ..." adds a row'
                    raise click.UsageError(f"{word}: a plan chooses {flag} ({hint}, --explain {flag} says why)", ctx)
        return super().parse_args(ctx, args)


def _refuse_beside(word: str, ctx: click.Context | None = None) -> None:
    if word.partition("=")[0] in _BESIDE:
        raise click.UsageError(
            f"{word}: a plan does not count it; keep its memory free with --margin GiB (`pyggml splits {word} ...` counts it)",
            ctx,
        )


@cloup.command("plan", epilog=EXAMPLES, cls=_PlanCommand)
@click.argument("model", type=ModelPath(), required=False)
@cloup.option_group(
    "Your model",
    option("-hf", "--hf-repo", metavar="REPO[:QUANT]",
         help="A model on Hugging Face instead of MODEL; only its header is read."),
)  # fmt: skip
@cloup.option_group(
    "Your machine",
    cards_option(
         help="Cards, separated by commas, also with another size (m2max-48GiB); cpu for no card; or a profile FILE.json. `pyggml devices` lists names. "
         "[default: those found in this machine]"),
    option("--host", default="", metavar="SPEC",
         help="RAM type x channels, cores, size: ddr4-3200x2,cores=8,64GiB. Or read=60GB/s, or a processor's name."),
    number("--margin", shown=1.0, metavar="GiB", help="Memory to keep free on each device and on the host, also for a draft model or a projector: `pyggml splits -md MODEL --mmproj FILE` counts them."),
)  # fmt: skip
@cloup.option_group(
    "Your work",
    count("--prompt", least=1, shown=2048, help="Tokens per prompt."),
    count("--generate", least=1, shown=256, help="Tokens per answer."),
    count("-c", "--context", "--ctx-size", least=1, shown=8192, help="Context: tokens in the KV cache."),
    option("--kv-types", shown="f16,q8_0", metavar="T,T",
         help="Allowed types of the KV cache; the first is preferred."),
    option("--routing", default="", metavar="lognormal:SPREAD|zipf:SKEW|uniform|trace:FILE|counts:N,N",
         help="How tokens choose experts, as for `splits`: it decides the hits of an expert cache. [default: by the model's router]"),
)  # fmt: skip
@cloup.option_group(
    "Output",
    count("--plans", least=1, most=20, shown=4, help="Maximum number of recommendations."),
    option("--compare", multiple=True, metavar="FLAGS",
         help="Add a row for your own flags, such as \"-ngl 99 -ncmoe 30\", or for a llama-server line; repeatable."),
    option("--explain", metavar="FLAG",
         help="Say what a flag does. With MODEL also what its other values come to on this machine, and why it is chosen or not."),
    file_option("--html", help="Write a page that plots memory against speed for all settings."),
    json_option("Print the recommendations as JSON."),
)  # fmt: skip
def command(
    model: Path | None,
    hf_repo: str | None,
    device: str | None,
    host: str,
    margin: float,
    prompt: int,
    generate: int,
    context: int,
    kv_types: str,
    routing: str,
    plans: int,
    compare: tuple[str, ...],
    explain: str | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Recommend -ngl, -ncmoe, -ub, load mode and KV types for a model on a machine, before you download it.

    MODEL is a GGUF file (only its header is read) or NAME[:QUANT] from `pyggml models`. Each recommendation is a
    complete llama-server command line with its speed, the range that holds in four cases of five, and its memory.
    Exit status 3: nothing fits.
    """
    from ..advisor import EXPLAIN, plan

    flag = "" if explain is None else _flag_to_explain(explain)
    if flag and model is None and hf_repo is None:
        report().print(f"{flag}: {EXPLAIN[flag]}")
        return
    if hf_repo is not None:
        if model is not None:
            raise click.UsageError("a model is named twice: as MODEL and with -hf")
        model = Path(f"hf:{hf_repo}")
    if model is None:
        raise click.UsageError("Missing argument 'MODEL': a GGUF file, or a name from `pyggml models`.")
    check_outputs(model, html)
    own = [_setting(text, n_ctx=context) for text in compare]
    with progress() as bar:
        task = bar.add_task("starting", total=None)
        advice = plan(
            model, devices=device, host=host, prompt=prompt, generate=generate, context=context,
            margin_bytes=int(margin * 2**30), kv_types=[t.strip() for t in kv_types.split(",")], n_plans=plans,
            routing=stated_routing(routing) if routing else None, compare=own, explain=flag,
            on_progress=lambda what: bar.update(task, description=what[:40].ljust(40)),
        )  # fmt: skip
    if html is not None:
        from ..advisor.page import page_html

        with aside(html) as part:
            part.write_text(page_html(advice), encoding="utf-8")
    if as_json:
        print_json(as_dict(advice))
    elif flag and advice.plans:
        report().print(f"{flag}: {EXPLAIN[flag]}\n")
        _print_plan(advice.plans[0])
        if advice.explained is not None:
            click.echo()
            _print_explanation(advice.explained)
    else:
        _print(advice)
    if not advice.plans:
        click.get_current_context().exit(EXIT_DOES_NOT_FIT)


def _flag_to_explain(flag: str) -> str:
    from ..advisor import EXPLAIN, flag_name

    name = flag_name(flag)
    if name is None:
        raise click.UsageError(f"`pyggml plan` does not choose {flag}; it chooses {', '.join(EXPLAIN)}")
    return name


def _print_explanation(told: Explanation) -> None:
    """Print what a flag's values come to."""
    from ..advisor.limits import short_s

    out = report()
    if told.choices:
        columns = ("seconds", "prompt s", "answer s", "fits")
        made = table(
            f"{told.flag} and the other flags of the best plan",
            "",
            *columns,
            right=columns[:3],
        )
        for c in told.choices:
            fits = f"lacks {n_bytes(c.missing_bytes)}" if c.missing_bytes else "yes"
            style = "bold" if c.is_chosen else "red" if c.missing_bytes else None
            made.add_row(c.flags, *map(short_s, (c.seconds, c.prompt_s, c.generate_s)), fits, style=style)
        out.print(made)
        out.print("Bold: the best plan's value. Seconds are those of the formulas that rank settings.", style="dim")
    out.print(told.verdict)


def _setting(text: str, *, n_ctx: int = 0) -> Setting:
    """Return the setting that a user's flags, or a line of llama-server, describe.

    What a row cannot have of its own, such as another context than the plan's, is refused.
    """
    import shlex

    from ..foresight import Setting
    from ..moe_cache import CacheRule, LlamaCache
    from ..types import Type
    from ._model_options import ModelCommand, ModelFlags, model_options

    found: list[tuple[ModelFlags, CacheRule | None]] = []

    @cloup.command("--compare", cls=ModelCommand)
    @model_options
    @cache_options
    def read(flags: ModelFlags, expert_cache: CacheRule | None) -> None:
        found.append((flags, expert_cache))

    try:
        words = shlex.shlex(text.replace("\\\n", " "), posix=True, punctuation_chars="")
        words.whitespace_split, words.escape, words.commenters = True, "", ""  # a pattern's backslashes stay
        with read.make_context("--compare", _without_model(words)) as ctx:
            for name, value in _NOT_COMPARED.items():
                if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE and ctx.params[name] != value:
                    option = next(param.opts[0] for param in read.params if param.name == name)
                    raise click.UsageError(f"{option} is the same for all rows (`pyggml splits` takes it)")
            read.invoke(ctx)
        if found[0][0].n_ctx not in (0, n_ctx):
            raise click.UsageError(
                f"the plan's context is {n_ctx} (--context {found[0][0].n_ctx} plans with the other)"
            )
    except (click.ClickException, ValueError) as error:
        reason = error.format_message() if isinstance(error, click.ClickException) else str(error)
        raise click.UsageError(f"--compare {text!r}: {reason}") from None
    ((flags, cache),) = found
    if cache is not None and not (isinstance(cache, LlamaCache) and cache.eviction == LlamaCache(0).eviction):
        raise click.UsageError(f"--compare {text!r}: of caches --moe-cache-mib with its default eviction is compared")
    placement, made = flags.placement(), flags.context()
    if placement.fit:
        raise click.UsageError(f"--compare {text!r}: a number of layers is compared, not -ngl auto")
    overrides, n_cpu_moe = placement.overrides, 0
    # after all patterns -ncmoe is a number, as in a plan's own settings
    if overrides and overrides[-1].startswith("--n-cpu-moe "):
        overrides, n_cpu_moe = overrides[:-1], int(overrides[-1].split()[1])
    return Setting(
        n_gpu_layers=placement.n_gpu_layers, overrides=overrides, n_cpu_moe=n_cpu_moe,
        tensor_split=placement.tensor_split, n_ubatch=made.n_ubatch, n_batch=made.n_batch, threads=flags.threads or 0, flash_attn=made.flash_attn != "off", type_k=Type.of(made.type_k),
        type_v=Type.of(made.type_v), is_pinned=not placement.use_mmap, kv_offload=made.offload_kqv,
        op_offload=made.op_offload, moe_cache_mib=0 if cache is None else cache.size_bytes >> 20,
        moe_cache_misses="copy" if cache is None else cache.misses,
    )  # fmt: skip


def _without_model(words: Iterable[str]) -> list[str]:
    """Return the words of a command line without its program and model."""
    made: list[str] = []
    given = iter(words)
    for i, word in enumerate(given):
        _refuse_beside(word)
        if word in _MODEL:
            next(given, None)
        elif not (i == 0 and Path(word).name.startswith("llama-")) and word.partition("=")[0] not in _MODEL:
            made.append(word)
    return made


# -- JSON ------------------------------------------------------------------------


def _speed(speed: Speed) -> dict[str, float]:
    return {"low": speed.low, "mid": speed.mid, "high": speed.high}


def _plan_dict(plan: Recommendation) -> dict[str, Any]:
    return {
        "title": plan.title,
        "flags": plan.flags,
        "command": plan.command,
        "ik_llama_command": plan.ik_command,
        "pp_tps": _speed(plan.pp_tps),
        "tg_tps": _speed(plan.tg_tps),
        "seconds": plan.seconds,
        "memory": [
            {"device": m.device, "bytes": m.bytes, "of_bytes": m.of_bytes, "fits": m.fits, "missing_bytes": m.missing_bytes}
            for m in plan.memory
        ],
        "fits": plan.fits,
        "link_bytes_per_prompt_token": plan.link_bytes_per_token,
        "link_bytes_per_generated_token": plan.link_bytes_per_generated,
        "bottleneck": plan.bottleneck,
        "refused": plan.refused,
        "moe_cache_mib": plan.setting.moe_cache_mib,
        "moe_cache_misses": plan.setting.moe_cache_misses,
        "cache_hit_rate": plan.hit_rate,
    }  # fmt: skip


def as_dict(advice: Advice) -> dict[str, Any]:
    """Return the recommendations as JSON values."""
    return {
        "model": advice.model,
        "machine": advice.machine,
        "goal": asdict(advice.goal),
        "assumed": advice.assumed,
        "plans": [_plan_dict(p) for p in advice.plans],
        "compared": [_plan_dict(p) for p in advice.compared],
        "beyond_llama": None if advice.beyond is None else _plan_dict(advice.beyond),
        "fit": None if advice.fit is None else {**_plan_dict(advice.fit), "note": advice.fit_note, "by": advice.fit_by},
        "helps": [asdict(h) for h in advice.helps],
        "explained": None if advice.explained is None else asdict(advice.explained),
        "offload_pays_from_tokens": advice.pays_from,
        "missing_bytes": advice.missing_bytes,
        "smaller": advice.smaller or "",
        "seconds": advice.seconds,
        "tried": advice.tried,
        "planned": advice.n_planned,
    }


# -- terminal --------------------------------------------------------------------


def _print(advice: Advice) -> None:
    out = report()
    goal = advice.goal
    out.print(f"{advice.model} on {advice.machine}", style="bold")
    out.print(f"prompt {goal.prompt}, answer {goal.generate}, context {goal.context} tokens")
    for line in advice.assumed:
        out.print(f"assumed: {line}", style="dim")
    out.print()
    if advice.nothing_fits:
        out.print(advice.nothing_fits, style="bold red")
        out.print()
    shown = advice.shown
    if shown:
        out.print(_table(advice))
    titles: dict[str, str] = {}  # by command
    for plan in shown:
        out.print()
        if (same := titles.setdefault(plan.command, plan.title)) == plan.title:
            _print_plan(plan)
        else:
            out.print(f"{plan.title}:", style="bold")
            out.print(f"the same as '{same}'.")
        if plan is advice.fit:
            out.print(f"Chosen by {advice.fit_by}.", style="dim")
            if advice.fit_note:
                out.print(f"--fit: {advice.fit_note}.", style="red")
    if advice.plans:
        out.print()
        if advice.pays_line:
            out.print(advice.pays_line)
        for help in advice.helps:
            if help.speedup > 1.01:
                out.print(f"{help.change[0].upper()}{help.change[1:]}: {help.speedup:.2f} times as fast.")
        out.print(
            f"{advice.tried} settings predicted, {advice.n_planned} planned by the scheduler, {advice.seconds:.1f} s",
            style="dim",
        )


def _print_plan(plan: Recommendation) -> None:
    """Print a plan's command lines and what is said of it."""
    out = report()
    out.print(f"{plan.title}:", style="bold")
    out.print(plan.command, soft_wrap=True)
    if plan.ik_command not in ("", plan.command) and not plan.refused:
        note = f", {plan.ik_note}" if plan.ik_note else ""
        out.print(f"ik_llama.cpp{note}: {plan.ik_command}", soft_wrap=True, style="dim")
    if plan.refused:
        out.print(f"llama.cpp cannot run this: {plan.refused}.", style="red")
        return
    out.print(" ".join(filter(None, (plan.bottleneck, plan.cache_line))))
    if out.width < _WIDE:  # what the table has no room for
        n = round(plan.link_bytes_per_token)
        link = f"; {n_bytes(n)} of link per prompt token" if n else ""
        out.print(f"Prompt {_low_high(plan.pp_tps)}, answer {_low_high(plan.tg_tps)} t/s{link}.", style="dim")
    for m in plan.memory:
        if not m.fits:
            out.print(f"{m.device} lacks {n_bytes(m.missing_bytes)}, margin included.", style="red")


def _table(advice: Advice) -> Table:
    from ..advisor.limits import short_s

    sizes: dict[str, int] = {}
    for m in (m for plan in advice.shown for m in plan.memory):  # of a host that shares its memory rows differ
        sizes[m.device] = m.of_bytes if sizes.get(m.device, m.of_bytes) == m.of_bytes else 0
    devices = list(sizes)
    shown = [f"{d} of {sizes[d] / 2**30:.0f} GiB" if sizes[d] else d for d in devices]
    is_narrow = report().width < _WIDE
    if is_narrow:
        shown = [name.replace(" of ", "\nof ") for name in shown]
    first, gap = ("plan", "\n") if is_narrow else ("recommendation", " ")
    links = [] if is_narrow or not any(plan.link_bytes_per_token for plan in advice.shown) else ["link/token"]
    columns = [f"prompt{gap}t/s", f"answer{gap}t/s", "seconds", *shown, *links]
    made = table("", first, *columns, right=tuple(columns), free=(first,))
    for plan in advice.shown:
        memory = {m.device: m for m in plan.memory}
        cells = [
            f"{memory[d].bytes / 2**30:.1f}{'' if memory[d].fits else ' !'}" if d in memory else "" for d in devices
        ]
        speed = _middle if is_narrow else _range
        made.add_row(
            plan.title, *(["-"] * 3 if plan.refused else [speed(plan.pp_tps), speed(plan.tg_tps), short_s(plan.seconds)]), *cells,
            *([n_bytes(round(plan.link_bytes_per_token))] if links else []), style=None if plan.fits else "red",
        )  # fmt: skip
    return made


def _digits(speed: Speed) -> int:
    return 0 if speed.mid >= 100 else 1 if speed.mid >= 1 else 2


def _middle(speed: Speed) -> str:
    return f"{speed.mid:.{_digits(speed)}f}"


def _low_high(speed: Speed) -> str:
    return f"{speed.low:.{_digits(speed)}f}-{speed.high:.{_digits(speed)}f}"


def _range(speed: Speed) -> str:
    return f"{_middle(speed)} ({_low_high(speed)})"
