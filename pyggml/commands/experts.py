"""`pyggml experts`: replay routing traces: what expert caches, prefetch and placement would gain."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from ._console import n_bytes, n_seconds, print_json, progress, report, table, warn
from ._expert_traces import TraceFlags, trace_options
from ._options import choice, count, option

if TYPE_CHECKING:
    from rich.table import Table

    from ..lab import Trace
    from ..lab.comparison import Comparison
    from ..lab.predict import Score
    from ..lab.usage import Usage

__all__ = ["command"]

EXAMPLES = """
\b
Examples:
  pyggml experts compare prompt.jsonl --capacities 10%,20%,40%
  pyggml experts compare route.csv --scope global --capacities 1GiB,2GiB --machine rtx3090-pcie4
  pyggml experts usage a.json.gz b.json.gz
  pyggml experts predict a.json.gz b.json.gz --capacities 10,16 --html predicted.html
  pyggml experts compare moe.gguf --prompt "Why is the sky blue?" -n 64
"""


@cloup.group("experts", epilog=EXAMPLES, no_args_is_help=True)
def command() -> None:
    """Replay recorded routing, and show what caches, prefetch and placement of experts would gain.

    A TRACE is a file from `pyggml run --record-routing`, BigMoeOnEdge, onnx-genai, moe-cache-eval (NPZ), Expertflow,
    the gpt-oss-20b fingerprints or llama.cpp's MCT1, or JSON lines after a first line that describes them. Several
    traces are requests of one model. A MODEL.gguf instead is run on the CPU, and its routing recorded.
    """


def _list_policies(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Print the policies and what each does, and exit."""
    if value and not ctx.resilient_parsing:
        from ..lab.policies import POLICIES

        shown = table("Policies of expert caches", "policy", "what it does", free=("what it does",))
        for policy in POLICIES.values():
            shown.add_row(policy.name, policy.meaning)
        report().print(shown)
        ctx.exit()


@command.command("compare", short_help="Compare policies by cache size: bytes, hit rate, tokens/s.")
@trace_options
@option("--policies", shown="lru,lfu,lfru,belady,belady-bypass", metavar="P,P",
     help="Policies (--list-policies lists them); P+2of8, P+hotter, P+atmost:2, P+next set the admission; module:Class is your own.")  # fmt: skip
@option(
    "--list-policies",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_policies,
    help="List the policies and exit.",
)
@option("--capacities", shown="10%,20%,30%,40%,50%", metavar="C,C",
     help="Sizes: 10% of the experts, 6 slots per pool, or 512MiB in total.")  # fmt: skip
@choice("--scope", values=["layer", "global", "group"], shown="layer",
     help="Pools of slots: per layer, one for all layers, or one per group of equal layers as in llama.cpp.")  # fmt: skip
@choice("--contract", values=["event", "bigmoeonedge", "sequential"], shown="event",
     help="How ids are replayed; sequential gives misleading results.")  # fmt: skip
@option("--machine", shown="rtx4090-pcie4", metavar="PROFILE", help="A profile of `pyggml devices`.")
@option("--dense-bytes", metavar="SIZE", help="Bytes that a step reads besides experts, for times.")
def compare_command(
    flags: TraceFlags, policies: str, capacities: str, scope: str, contract: str, machine: str, dense_bytes: str | None
) -> None:
    """Compare policies at several sizes: bytes, ms and tokens/s, hit rate, and the distance to the optimum."""
    from ..cost import parse_profile
    from ..errors import GraphError
    from ..lab.comparison import compare
    from ..lab.machine import Machine
    from ..lab.pools import Capacity, parse_capacities
    from ..lab.replay import Setting

    named = [name for name in policies.split(",") if name.strip()]
    sizes = parse_capacities(capacities)
    if not named or not sizes:
        raise click.UsageError("--policies and --capacities need at least one each")
    trace = flags.open()
    dense = 0 if dense_bytes is None else Capacity.parse(dense_bytes)
    made = compare(
        trace, named, sizes, Setting(scope, flags.phase, contract), Machine(parse_profile(machine.removeprefix("sim:"))),
        dense_bytes=dense.n_bytes or dense.slots or 0 if isinstance(dense, Capacity) else 0,
    )  # fmt: skip
    for text in made.warnings:
        warn(text)
    for refusal in made.refused:
        warn(f"{refusal.policy} at {refusal.capacity}: {refusal.reason}")
    if flags.html is not None and made.rows:
        from ..lab.page import write_comparison

        write_comparison(flags.html, made)
    if flags.as_json:
        print_json(made.json())
    elif made.rows:
        console = report()
        console.print(_compare_table(made))
        console.print(*_compare_words(made), sep="\n")
    if not made.rows:
        raise GraphError(
            f"nothing was replayed: {made.refused[0].reason}",
            hint="use larger --capacities, or policies that can decline",
        )


def _compare_table(made: Comparison) -> Table:
    """Return policies by size as a table."""
    has_bytes = made.trace.expert_bytes is not None
    requests = len({r.request for row in made.rows for r in row.result.requests})
    columns = [
        "size",
        "slots",
        *(["cache"] if has_bytes else []),
        "policy",
        *(["MiB/token", "ms/token", "tokens/s"] if has_bytes else []),
    ]
    columns += ["hit rate", *(["of requests"] if requests > 1 else []), "below best"]
    shown = table(f"{made.trace}, {made.setting.phase}", *columns, right=tuple(c for c in columns if c != "policy"))
    last = None
    resident = dict(made.resident)
    for row in sorted(made.rows, key=lambda row: made.capacities.index(row.result.capacity)):
        result = row.result
        if last is not None and result.capacity != last:
            _resident_row(shown, columns, resident.get(last))
        first = result.capacity != last
        last = result.capacity
        cells = {
            "size": str(result.capacity) if first else "",
            "slots": f"{result.slots:,}" if first and result.slots is not None else "",
            "cache": n_bytes(result.capacity_bytes) if first else "",
            "policy": result.policy.name,
            "hit rate": f"{100 * result.hit_rate:.2f}%",
            "of requests": f"{100 * min(r.hit_rate for r in result.requests):.1f} to {100 * max(r.hit_rate for r in result.requests):.1f}",
            "below best": "-" if row.gap is None else f"{100 * row.gap:.1f}",
        }
        if row.time is not None and result.bytes_read is not None:
            cells["MiB/token"] = f"{result.bytes_read / max(1, result.n_token) / (1 << 20):,.1f}"
            cells["ms/token"] = f"{1e3 * row.time.total_s:,.2f}"
            cells["tokens/s"] = f"{1 / row.time.total_s:,.1f}"
        shown.add_row(*(cells.get(name, "") for name in columns))
    if last is not None:
        _resident_row(shown, columns, resident.get(last))
    return shown


def _resident_row(shown: Table, columns: list[str], resident: Any) -> None:  # of a ResidentLayers, or None
    if resident is None:
        return
    cells = {
        "policy": f"as {resident.n_resident} of {resident.n_layer} layers",
        "MiB/token": "0.0",
        "ms/token": f"{1e3 * resident.time.total_s:,.2f}",
        "tokens/s": f"{1 / resident.time.total_s:,.1f}",
    }
    shown.add_row(*(cells.get(name, "") for name in columns))


def _compare_words(made: Comparison) -> list[str]:
    """Return what stands below the table."""
    words = []
    begins = made.lru_begins
    if begins["slots"] is not None:
        size = "" if begins["bytes"] is None else f", {n_bytes(begins['bytes'])} in all"
        words.append(
            f"LRU has hits from {begins['slots']:,} slots per pool{size}; a step uses up to {made.sweep:,} experts in all layers."
        )
    if made.trace.expert_bytes is not None:
        m = made.machine.json()
        words.append(
            f"Times: {m['name']}, {m['link_gb_per_s']:.1f} GB/s and {m['copy_latency_us']:.0f} µs per copy; only experts and their copies, without overlap. "
            "'as N layers' uses the same bytes for whole layers; the CPU computes the others."
        )
    if made.seconds:
        rate = made.n_replayed / made.seconds / 1e6
        words.append(
            f"Replayed {made.n_replayed:,} touches in {n_seconds(made.seconds)}, {rate:,.1f} million per second."
        )
    return words


@command.command("usage", short_help="Show which experts are used, and how often.")
@trace_options
def usage_command(flags: TraceFlags) -> None:
    """Show which experts are used, and how many distinct experts a group of tokens uses."""
    from ..lab.usage import usage

    trace = flags.open()
    found = usage(trace, phase=flags.phase)
    for finding in trace.findings:
        warn(f"{finding.name}: {finding.text}")
    if flags.html is not None:
        from ..lab.page import write_usage

        write_usage(flags.html, trace, found, phase=flags.phase)
    if flags.as_json:
        print_json(
            {
                "layers": found.layers, "events": found.events.tolist(), "counts": found.counts.tolist(), "unions": [u.json() for u in found.unions],
                "coverage": [{"share_of_experts": s, "share_of_uses": c} for s, c in found.coverage],
                "repeat": None if math.isnan(found.repeat) else found.repeat,
            }
        )  # fmt: skip
        return
    console = report()
    console.print(_heat(found, trace))
    console.print(_union_table(found, trace))
    console.print(*found.sentences(trace), sep="\n")


def _heat(found: Usage, trace: Trace) -> Table:
    """Return layer by expert as characters: from blank (unused) to full (used in every event)."""
    import numpy as np

    shades = " ·░▒▓█"
    width = min(trace.n_expert, 64)
    shown = table(
        "Share of events in which an expert is used",
        "layer",
        "experts",
        "unused",
        "most used",
        right=("layer", "unused", "most used"),
    )
    shares = found.counts / found.events.clip(1)[:, None]
    for layer, row, counts in zip(found.layers, shares, found.counts, strict=True):
        groups = [part.max() for part in np.array_split(row, width)]
        cells = "".join(
            shades[0 if g == 0 else min(5, 1 + int(4 * min(1.0, g / max(1e-9, shares.max()))))] for g in groups
        )
        shown.add_row(str(layer), cells, str(int((counts == 0).sum())), f"{int(row.argmax())} ({row.max():.0%})")
    return shown


def _union_table(found: Usage, trace: Trace) -> Table:
    """Return distinct experts by tokens evaluated together."""
    columns = ("tokens", "consecutive", "independent", "uniform router")
    shown = table(f"Distinct experts of a layer, of {trace.n_expert}", *columns, right=columns)
    for u in found.unions:
        cells = ("-" if n is None else f"{n:.1f}" for n in (u.consecutive, u.independent, u.uniform))
        shown.add_row(str(u.n_token), *cells)
    return shown


@command.command("predict", short_help="Show how often prefetchers are right.")
@trace_options
@option("--prefetchers", shown="popularity,previous,average,previous-layer,both", metavar="P,P",
     help="Prefetchers; oracle is the limit. module:Class is your own.")  # fmt: skip
@option("--capacities", shown="20%,30%,50%", metavar="C,C", help="Sizes of the cache.")
@option("--policy", shown="lru", help="Policy of the cache.")
@count("--guesses", least=1, help="Guesses per layer.  [experts per token]")
@option("--machine", shown="rtx4090-pcie4", metavar="PROFILE", help="A profile of `pyggml devices`.")
def predict_command(
    flags: TraceFlags, prefetchers: str, capacities: str, policy: str, guesses: int | None, machine: str
) -> None:
    """Show how often prefetchers are right, and how often for experts that are not in the cache."""
    from ..cost import parse_profile
    from ..lab.machine import Machine
    from ..lab.policies import parse_policy
    from ..lab.pools import parse_capacities
    from ..lab.predict import predict
    from ..lab.replay import Setting

    named, sizes = [p.strip() for p in prefetchers.split(",") if p.strip()], parse_capacities(capacities)
    if not named or not sizes:
        raise click.UsageError("--prefetchers and --capacities need at least one each")
    rule, on = parse_policy(policy), Machine(parse_profile(machine.removeprefix("sim:")))
    trace = flags.open()
    scores = predict(trace, named, sizes, rule, n_guess=guesses, setting=Setting(phase=flags.phase), machine=on)
    if flags.html is not None:
        from ..lab.page import write_prediction

        write_prediction(flags.html, trace, scores, phase=flags.phase, policy=policy, machine=on)
    if flags.as_json:
        print_json({"policy": policy, "rows": [score.json() for score in scores]})
        return
    report().print(_predict_table(scores, trace, policy))


def _predict_table(scores: list[Score], trace: Trace, policy: str) -> Table:
    """Return prefetchers by size as a table."""
    columns = (
        "prefetcher",
        "cache",
        "recall",
        "right of the absent",
        "misses covered",
        "wasted/token",
        "late",
        "pays from",
    )
    shown = table(f"{trace}: {scores[0].n_guess} guesses a layer beside {policy}", *columns, right=columns[1:])
    for s in scores:

        def share(value: float | None) -> str:
            return "-" if value is None else f"{value:.0%}"

        wasted = "-" if s.wasted_bytes is None else n_bytes(round(s.wasted_bytes))
        shown.add_row(
            s.prefetcher,
            str(s.capacity),
            share(s.recall),
            share(s.precision_missing),
            share(s.covered),
            wasted,
            share(s.late),
            share(s.break_even),
        )
    return shown


@command.command("fetch", short_help="Download public traces (5 MB), checked by hash.")
@click.argument("folder", required=False, type=click.Path(path_type=Path))
def fetch_command(folder: Path | None) -> None:
    """Download public traces, checked by hash: BigMoeOnEdge, onnx-genai, 15 prompts of gpt-oss-20b (5 MB, unpacked 53 MB).

    Without FOLDER they are kept in pyggml's cache folder.
    """
    from ..lab.public import fetch, traces_folder

    folder = folder or traces_folder()
    with progress() as bar:
        task = bar.add_task("", total=None)
        paths = fetch(folder, lambda name, done, n: bar.update(task, description=name, completed=done, total=n))
    report().print(f"{len(paths)} files in {folder}")
