"""Lists in options, like llama-bench's: plans each combination, and prints one table with rows such as pp2048 and tg128."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ..routing import Routing
from ._cache_options import forecast
from ._console import n_bytes, report, table
from ._model_options import ModelCommand, ModelFlags, device_names, flags_of, open_backends, parse_sizes

if TYPE_CHECKING:
    from ..dialect import Dialect
    from ..hardware.hosts import Host
    from ..moe_cache import CacheRule
    from ..planning import GraphChoice
    from ._beside import Beside

__all__ = ["FORMATS", "SweepCommand", "combinations", "print_sweep", "sweep_rows"]

FORMATS = ("md", "csv", "json", "jsonl")
#: Options that take a list.
LISTS = ("n_gpu_layers", "n_cpu_moe", "n_cpu_ffn", "n_batch", "n_ubatch", "flash_attn", "type_k", "type_v")
_KEY = __name__


class SweepCommand(ModelCommand):
    """A command whose options in `LISTS` accept lists; it is parsed with the first value of each."""

    def translate(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Return the words of the first combination; `combinations` has all."""
        words = super().translate(ctx, args)
        names = {o: p.name for p in self.get_params(ctx) for o in p.opts}
        choices = [
            word.split(",") if i and names.get(words[i - 1]) in LISTS and "," in word else [word]
            for i, word in enumerate(words)
        ]
        varied = [i for i, choice in enumerate(choices) if len(choice) > 1]
        made = [list(combination) for combination in itertools.product(*choices)]
        if varied:
            ctx.meta[_KEY] = [({words[i - 1]: one[i] for i in varied}, one) for one in made]
        return list(made[0])


def combinations(ctx: click.Context) -> list[tuple[dict[str, str], ModelFlags]]:
    """Return each combination of a command's lists: labels of what varies, and all flags. Without a list there is one, without labels."""
    if _KEY not in ctx.meta:
        return [({}, flags_of(ctx))]
    return [(labels, flags_of(ctx.command.make_context("splits", list(words)))) for labels, words in ctx.meta[_KEY]]


def sweep_rows(
    ctx: click.Context,
    model: Path,
    batches: str,
    depth: int,
    routing: Routing,
    outputs: Literal["last", "all"],
    graph: GraphChoice,
    dialect: Dialect,
    host: Host | None,
    expert_cache: CacheRule | None,
    generate: int,
    beside: Beside,
) -> Iterator[dict[str, Any]]:
    """Plan every combination and yield a row for each batch size.

    Notes
    -----
    A batch of one token is called tg128: all 128 tokens use the graph of the first, because a cache of up to 256 tokens
    is read as one of 256. With an expert cache ``generate`` tokens are generated, from an empty cache on.
    """
    from ..cost import host_profile
    from ..hardware.hosts import assumed_host
    from ..plan_report import memory_fits, plan_batches
    from ..planning import Planner, virtual_clock

    planner: Planner | None = None
    kept: tuple[object, ...] = ()
    try:
        for labels, flags in combinations(ctx):
            same = device_names(flags), flags.expert_copy, flags.offload_by, flags.threads
            if planner is not None and same == kept:
                planner.change(flags.placement(), flags.context())
            else:
                if planner is not None:
                    planner.close()
                backends, cpu = open_backends(flags, data=False)
                around = host or assumed_host(b.device.profile.sheet for b in backends if b.device.profile)
                clock = virtual_clock([*backends, cpu], host_profile(around.with_threads(flags.threads or 0)))
                planner = Planner.open(
                    model, devices=backends, cpu=cpu, placement=flags.placement(), context=flags.context(), data=False,
                    graph=graph, strict=True, dialect=dialect, policy=flags.policy(), clock=clock,
                    expert_cache=expert_cache, offload_rule=flags.offload_rule([*backends, cpu], clock, routing),
                )  # fmt: skip
                kept = same
            plans = plan_batches(planner, parse_sizes(batches), outputs=outputs, routing=routing, depth=depth)
            fits = memory_fits(
                beside.count(planner, flags)[0], planner.backends, host_bytes=host.memory_bytes if host else None,
                gap_bytes=planner.placement.gap_bytes(),
            )  # fmt: skip
            for plan in plans:
                is_cached = planner.expert_cache is not None and plan.n_tokens == 1
                s = forecast(planner, routing, generate, depth) if is_cached else plan.simulated
                speed = None if s is None else s.speed
                yield {
                    "model": planner.hparams.name or model.stem,
                    **labels,
                    "test": f"pp{plan.n_tokens}" if plan.n_tokens > 1 else f"tg{generate if is_cached else 128}",
                    **({"depth": depth} if depth else {}),
                    "t/s": None if speed is None else round(speed.mid, 2),
                    "low": None if speed is None else round(speed.low, 2),
                    "high": None if speed is None else round(speed.high, 2),
                    "splits": len(plan.graphs[0].splits),
                    "copied_bytes": sum(g.bytes_expected for g in plan.graphs) if s is None else s.bytes_copied,
                    **{f"{f.backend}_bytes": f.needed_bytes for f in fits if f.backend},
                    "fits": not any(f.missing_bytes for f in fits),
                }
    finally:
        if planner is not None:
            planner.close()


def print_sweep(rows: Sequence[dict[str, Any]], form: str | None) -> None:
    """Print rows in one of llama-bench's formats, or as a table."""
    if form == "json":
        click.echo(json.dumps(rows, indent=2))
    elif form == "jsonl":
        for row in rows:
            click.echo(json.dumps(row))
    elif form == "csv":
        text = StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        click.echo(text.getvalue(), nl=False)
    else:
        names = [name.removesuffix("_bytes") for name in rows[0]]
        cells = [[_cell(name, value) for name, value in row.items()] for row in rows]
        if form == "md":
            lines = [names, ["---:" if isinstance(v, int | float) else "---" for v in rows[0].values()], *cells]
            for line in lines:
                click.echo(f"| {' | '.join(line)} |")
            return
        made = table(
            "Expected tokens/s with their range (four cases of five)",
            *names,
            right=tuple(n for n in names if n not in ("model", "test", "fits")),
        )
        for row, line in zip(rows, cells, strict=True):
            made.add_row(*line, style=None if row["fits"] else "red")
        report().print(made)


def _cell(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return n_bytes(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:,.2f}" if isinstance(value, float) else str(value)
