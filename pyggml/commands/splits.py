"""`pyggml splits`: show what flags do to a model, from its header alone: splits, copies, memory, speed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import cloup
from rich.text import Text

from ..dialect import DEFAULT_DIALECT, DIALECTS, Dialect
from ..sched.state import Cause
from ._beside import Beside, Loaded, beside_options
from ._cache_options import N_FORECAST, cache_options, forecast, print_forecast, stated_routing
from ._console import ROOMY_WIDTH, Bar, n_bytes, print_json, report, table, warn
from ._header import print_header, why_not_captured
from ._model_options import ModelFlags, model_options, open_backends, parse_sizes
from ._options import choice, count, file_option, flag, json_option, option
from ._page import about_devices, about_model, check_outputs, given_options, write_records
from ._sweep import FORMATS, SweepCommand, combinations, print_sweep, sweep_rows
from ._tables import memory_table, too_large
from ._values import ModelPath

if TYPE_CHECKING:
    from rich.table import Table

    from ..models.context import ContextFlags
    from ..moe_cache import CacheRule
    from ..plan_report import BatchPlan, GraphPlan, MemoryFit
    from ..planning import GraphChoice, Planner
    from ..record import Recorder, SplitRecord
    from ..routing import Routing
    from ..simulation import SimulatedBatch

__all__ = ["command"]

#: A device has too little memory.
EXIT_DOES_NOT_FIT = 3

EXAMPLES = """
\b
Examples:
  pyggml splits moe.gguf --cpu-moe --batches 512,1
  pyggml splits moe.gguf -dev sim:rtx3090-pcie4,cpu -ncmoe 24 -ub 2048 --html plan.html
  pyggml splits moe.gguf --cpu-moe --dialect 0.26,0.27
  pyggml splits gpt-oss-120b -c 8192 -ncmoe 24,28 -ub 512,2048 -p 2048 -n 128 -o md
  pyggml splits moe.gguf --json | jq .memory
"""


@cloup.command("splits", cls=SweepCommand, epilog=EXAMPLES)
@click.argument("model", type=ModelPath())
@cloup.option_group(
    "What is planned",
    option("--batches", shown="512,1", metavar="N,N", help="Batch sizes; each is planned alone."),
    count("-d", "--depth", "--n-depth", shown=0, help="Tokens in the cache before each batch."),
    count("--generate", least=1, shown=N_FORECAST,
         help="With an expert cache: tokens that are generated, one by one after --depth, from an empty cache on."),
    choice("--outputs", values=["last", "all"], shown="last", help="Tokens whose logits are computed."),
    choice("--graph", values=["auto", "built", "llama"], shown="auto",
         help="Plan the graph that pyggml builds, or the one captured from llama.cpp. auto: built if pyggml knows the architecture."),
    option("--dialect", "versions", shown=DEFAULT_DIALECT.version, metavar="V[,V]",
         help="Version of ggml: 0.20, 0.21, 0.26, 0.27. Several: a table of what each upgrade changes, and by which rule."),
    option("--routing", default="", metavar="lognormal:SPREAD|zipf:SKEW|uniform|trace:FILE|counts:N,N",
         help="How tokens are assumed to choose experts; counts: used experts by layer, or a JSON file of them. [default: by the model's router]"),
    option("--host", default="", metavar="SPEC",
         help="The host of simulated devices: ddr4-3200x2,cores=8,64GiB, or FILE.json from devices --measure."),
)  # fmt: skip
@model_options
@cache_options
@beside_options
@cloup.option_group(
    "Output",
    file_option("--html", help="Write a page that shows what would happen and why."),
    file_option("--timeline", help="Write a timeline for Perfetto and `pyggml viz`."),
    flag("--all-splits", help="List every split, also those that repeat in each layer."),
    choice("--format", "form", values=["table", "ggml"], shown="table", help="ggml: the text of GGML_SCHED_DEBUG=2."),
    json_option("Print the plan as JSON."),
    choice("-o", "--output", "bench", values=FORMATS,
         help="Print one row per batch, like llama-bench. Lists such as -ncmoe 20,24 -ub 512,2048 also do this."),
)  # fmt: skip
def command(
    flags: ModelFlags,
    model: Path,
    batches: str,
    depth: int,
    generate: int,
    outputs: Literal["last", "all"],
    form: str,
    graph: GraphChoice,
    expert_cache: CacheRule | None,
    beside: Beside,
    versions: str,
    routing: str,
    host: str,
    all_splits: bool,
    timeline: Path | None,
    html: Path | None,
    as_json: bool,
    bench: str | None,
) -> None:
    """Plan a GGUF model without reading a weight: splits, copies, memory, causes."""
    from ..cost import host_profile
    from ..hardware.hosts import assumed_host, parse_host
    from ..plan_report import ggml_text, memory_fits, plan_batches
    from ..planning import Planner, virtual_clock
    from ..record import Recording

    sizes = parse_sizes(batches)
    context = _context(flags)
    given = stated_routing(routing) if routing else None
    dialects = _parse_dialects(versions)
    stated = parse_host(host) if host else None
    if len(dialects) > 1 and (form == "ggml" or timeline or html):
        raise click.UsageError("several versions give a table or JSON: remove --format, --timeline and --html")
    if expert_cache is not None and len(dialects) > 1:
        raise click.UsageError("an expert cache works with one --dialect")
    if form == "ggml" and (as_json or timeline or html):
        raise click.UsageError("--format ggml prints only that text: remove --json, --timeline and --html")
    check_outputs(model, timeline, html)
    assumed = given or _routing_of(model)
    ctx = click.get_current_context()
    if bench is not None or len(combinations(ctx)) > 1:
        if timeline or html or form == "ggml":
            raise click.UsageError("lists and -o print only rows: remove --html, --timeline and --format ggml")
        if len(dialects) > 1:
            raise click.UsageError("lists and -o work with one --dialect")
        rows = [*sweep_rows(
            ctx, model, batches, depth, assumed, outputs, graph, dialects[0], stated, expert_cache, generate, beside
        )]  # fmt: skip
        print_sweep(rows, "json" if as_json else bench)
        ctx.exit(0 if any(row["fits"] for row in rows) else EXIT_DOES_NOT_FIT)
    recording = Recording() if timeline or html else None
    backends, cpu = open_backends(flags, data=False)
    around = stated or assumed_host(b.device.profile.sheet for b in backends if b.device.profile)
    machine = host_profile(around.with_threads(flags.threads or 0))
    if graph != "built" and (missing := why_not_captured(model, graph)) is not None:
        print_header(flags, model, [*backends, cpu], missing, as_json=as_json)
        raise missing

    def open_planner(dialect: Dialect, recorder: Recorder | None, rule: CacheRule | None = None) -> Planner:
        clock = virtual_clock([*backends, cpu], machine)
        return Planner.open(
            model, devices=backends, cpu=cpu, placement=flags.placement(), context=context, data=False,
            graph=graph, strict=True, dialect=dialect, policy=flags.policy(), clock=clock, recorder=recorder,
            expert_cache=rule, offload_rule=flags.offload_rule([*backends, cpu], clock, assumed),
        )  # fmt: skip

    if len(dialects) > 1:
        from ._upgrade import print_upgrades

        print_upgrades(open_planner, sizes, dialects, outputs=outputs, routing=assumed, as_json=as_json)
        return
    without = None
    if expert_cache is not None and form != "ggml":
        with open_planner(dialects[0], None) as planner:
            without = forecast(planner, assumed, generate, depth)
    with open_planner(dialects[0], recording, expert_cache) as planner:
        if form == "ggml":
            for n in sizes:
                click.echo(f"# batch {n}")
                for planned in planner.plan_batch(n, outputs=outputs, depth=depth):
                    click.echo(ggml_text(planner, planned), nl=False)
            return
        plans = plan_batches(planner, sizes, outputs=outputs, routing=assumed, depth=depth)
        cached, generated = planner.expert_cache, None
        if cached is not None:
            for text in cached.warnings():
                warn(text)
            generated = forecast(planner, assumed, generate, depth)
        from ..moe_cache import prefetch_of

        prefetch = prefetch_of(planner.sched.policy)
        memory, loaded = beside.count(planner, flags)
        gap = planner.placement.gap_bytes()
        fits = memory_fits(memory, planner.backends, host_bytes=stated.memory_bytes if stated else None, gap_bytes=gap)
        if recording is not None:
            write_records(
                recording.records, _about(planner, assumed, fits), timeline=timeline, html=html, name=model.stem
            )
        if as_json:
            found = _as_dict(planner, plans, assumed, fits)
            if loaded:
                found["beside"] = [one.as_dict() for one in loaded]
            if cached is not None:
                found["expert_cache"] = {
                    **cached.as_dict(), "generated": _generated_dict(generated), "generated_without": _generated_dict(without)
                }  # fmt: skip
            if prefetch is not None:
                found["expert_prefetch"] = prefetch.as_dict()
            print_json(found)
        else:
            _print(planner, plans, assumed, fits, loaded, all_splits=all_splits)
            if cached is not None:
                print_forecast(cached, generated, without)
            if prefetch is not None:
                report().print(prefetch.counters.line())
        if any(f.missing_bytes for f in fits):
            click.get_current_context().exit(EXIT_DOES_NOT_FIT)


def _generated_dict(made: SimulatedBatch | None) -> dict[str, Any] | None:
    if made is None:
        return None
    return {
        **asdict(made), "tokens_per_s": made.tokens_per_s, "speed": None if made.speed is None else asdict(made.speed)
    }  # fmt: skip


def _context(flags: ModelFlags) -> ContextFlags:
    """Return the context of one sequence, or of a server's slots.

    Notes
    -----
    Mirrors how llama-server sets its context: one sequence per slot, logits for one token of each.
    """
    context = flags.context()
    if flags.n_seq_max is None:
        if flags.kv_unified:
            raise click.UsageError("-kvu needs -np: a single sequence does not share its cache")
        return context
    return replace(context, n_outputs_max=context.n_seq_max)


def _routing_of(model: Path) -> Routing:
    """Return how tokens of a model are assumed to choose experts."""
    from ..catalog import header_path
    from ..gguf import GGUFFile
    from ..routing import routing_of

    with GGUFFile.open(model if os.path.lexists(model) else header_path(str(model))) as file:
        return routing_of(file.tensors)


def _parse_dialects(text: str) -> list[Dialect]:
    """Return the dialects of a list of versions."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in DIALECTS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(DIALECTS)}", param_hint="'--dialect'")
    if len(set(names)) < len(names):
        raise click.BadParameter("a version occurs twice", param_hint="'--dialect'")
    return [DIALECTS[name] for name in names]


def _about(planner: Planner, routing: Routing, fits: list[MemoryFit]) -> dict[str, Any]:
    """Return the facts about a plan that are not in its records."""
    from ._virtual import assumed_text

    clock = planner.sched.clock
    assumed = [] if clock is None else [assumed_text(clock, [b.name for b in planner.backends]), f"routing: {routing}"]
    return {
        "model": about_model(planner.file, planner.hparams),
        "devices": about_devices(planner.backends, clock),
        "options": given_options(),
        "is_plan": True,
        "assumed": "; ".join(assumed),
        "too_large": too_large(fits),
    }


def _as_dict(planner: Planner, plans: Iterable[BatchPlan], routing: Routing, fits: list[MemoryFit]) -> dict[str, Any]:
    from ._virtual import assumptions

    clock = planner.sched.clock
    names = [b.name for b in planner.backends]
    return {
        "model": about_model(planner.file, planner.hparams),
        "context": {
            "n_ctx": planner.params.n_ctx, "n_batch": planner.params.n_batch, "n_ubatch": planner.params.n_ubatch,
            "flash_attn": planner.params.flash_attn, "op_offload": planner.params.op_offload,
        },
        "routing": str(routing),
        "fits": not any(f.missing_bytes for f in fits),
        "memory": [f.as_dict() for f in fits],
        "weights": [
            {"name": w.info.name, "bytes": w.info.nbytes, "buft": w.buft.name, "reason": w.reason}
            for w in planner.placement.weights
        ],
        "virtual": None if clock is None else {"assumed": assumptions(clock, names, routing)},
        "batches": [plan.as_dict() for plan in plans],
    }  # fmt: skip


def _print(
    planner: Planner,
    plans: list[BatchPlan],
    routing: Routing,
    fits: list[MemoryFit],
    loaded: list[Loaded],
    *,
    all_splits: bool,
) -> None:
    from ._virtual import assumed_text

    hp, console = planner.hparams, report()
    experts = f", {hp.n_expert_used} of {hp.n_expert} experts used" if hp.n_expert else ""
    console.print(f"{hp.name or Path(planner.file.path).name}: {hp.arch}, {hp.n_layer} layers{experts}")
    console.print(
        f"context {planner.params.n_ctx}, micro-batches of up to {planner.params.n_ubatch} tokens, "
        f"flash attention {'on' if planner.params.flash_attn else 'off'}"
    )
    if planner.fit is not None:
        console.print(planner.fit.line)
    console.print()
    console.print(memory_table(fits))
    if gap := planner.placement.gap_bytes():
        host = next(f for f in fits if f.backend == planner.backends[-1].name)
        console.print(
            f"The host needs {n_bytes(host.needed_bytes)} in all: of the mapped file {n_bytes(gap)} are read once, for devices."
        )
    for one in loaded:
        console.print(one.line())
    for line in too_large(fits):
        console.print(line, style="red")
    console.print()
    console.print(_summary_table(plans, routing))
    if planner.sched.clock is not None:
        console.print()
        console.print(_virtual_table(planner, plans))
        console.print()
        names = [b.name for b in planner.backends]
        console.print(f"{assumed_text(planner.sched.clock, names)}; routing: {routing}")
        for line in _links(plans, names[-1]):
            console.print(line)
    has_bars = console.width >= ROOMY_WIDTH
    for same in _same_splits(plans):
        console.print()
        console.print(_splits_table(same, all_splits=all_splits, has_bars=has_bars))
    console.print()
    console.print(f"(×N): N splits that differ only by layer{'; bars: share of all copied bytes' if has_bars else ''}")
    notes = {split.cause for plan in plans for graph in plan.graphs for split in graph.splits} - {""}
    for note in sorted(notes):
        console.print(f"{note:<7} {Cause(note).text}")
    if Cause.OFFLOADED.value in notes:
        console.print("With --no-op-offload the CPU runs these ops, and their weights are not copied.")


def _summary_table(plans: list[BatchPlan], routing: Routing) -> Table:
    columns = ("batch", "micro-batch", "nodes", "splits", f"copied ({routing})", "if whole", "ratio")
    made = table("Copies between devices", *columns, "", right=columns)
    for plan in plans:
        for graph in plan.graphs:
            ratio = graph.bytes_expected / graph.bytes_max if graph.bytes_max else 1.0
            made.add_row(
                str(plan.n_tokens), str(graph.n_tokens), str(graph.n_nodes), str(len(graph.splits)),
                n_bytes(graph.bytes_expected), n_bytes(graph.bytes_max), f"{ratio:.0%}", Bar(ratio),
            )  # fmt: skip
    return made


def _virtual_table(planner: Planner, plans: list[BatchPlan]) -> Table:
    names = [b.name for b in planner.backends]
    space = " " if len(names) < 3 else "\n"
    columns = [
        "batch",
        f"micro-{space.strip()}batches",
        "tokens/s",
        "from",
        "to",
        *(f"{name}{space}computes" for name in names),
    ]
    columns += [f"to{space}{name}" for name in names[:-1]]
    made = table(
        "Speed to expect, from and to in four cases of five; where the time goes", *columns, right=tuple(columns)
    )
    for plan in plans:
        s = plan.simulated
        if s is None or s.speed is None or s.seconds is None:
            continue
        speeds = (f"{v:,.1f}" if v < 100 else f"{v:,.0f}" for v in (s.speed.mid, s.speed.low, s.speed.high))
        shares = [*s.compute_s.values(), *s.copy_to_s.values()]
        made.add_row(
            str(s.n_tokens), str(s.n_micro_batches), *speeds,
            *(f"{share / s.seconds:.0%}" for share in shares),
        )  # fmt: skip
    return made


def _links(plans: Iterable[BatchPlan], host: str) -> Iterator[str]:
    """Yield what each link carries in batches in which devices copy from each other, too."""
    for plan in plans:
        links = {} if plan.simulated is None else plan.simulated.link_bytes
        if any(n and host not in link.split(" to ") for link, n in links.items()):
            yield f"Links, {plan.n_tokens} tokens: " + ", ".join(f"{link} {n_bytes(n)}" for link, n in links.items())


def _same_splits(plans: Iterable[BatchPlan]) -> list[list[GraphPlan]]:
    """Group the micro-batches of one size that have the same splits with the same inputs."""

    def pattern(graph: GraphPlan) -> tuple[Any, ...]:
        splits = ((s.backend, s.first, s.cause, *(i.tensor for i in s.inputs)) for s in graph.splits)
        return graph.n_tokens, *splits

    found: dict[tuple[Any, ...], list[GraphPlan]] = {}
    for plan in plans:
        for graph in plan.graphs:
            found.setdefault(pattern(graph), []).append(graph)
    return list(found.values())


def _splits_table(same: list[GraphPlan], *, all_splits: bool, has_bars: bool) -> Table:
    graph = max(same, key=lambda g: g.bytes_expected)
    tokens = "1 token" if graph.n_tokens == 1 else f"{graph.n_tokens} tokens"
    several = "" if len(same) == 1 else f" ({len(same)} micro-batches; copies of the one with most bytes)"
    made = table(
        f"Splits of a micro-batch of {tokens}{several}", "split", "on", "why", "first node ← inputs", "copied", "if whole",
        *([""] if has_bars else []), right=("copied", "if whole"), free=("first node ← inputs", ""),
    )  # fmt: skip
    for splits in _alike(graph.splits, all_splits=all_splits):
        first = splits[0]
        inputs = [i for s in splits for i in s.inputs]
        expected = sum(graph.expected_bytes(i) for i in inputs)
        made.add_row(
            str(first.split) if len(splits) == 1 else f"{first.split} … {splits[-1].split} (×{len(splits)})",
            first.backend, first.cause, _story(first, is_one=len(splits) == 1), n_bytes(expected),
            n_bytes(sum(i.size_bytes for i in inputs)),
            *([Bar(expected / graph.bytes_expected if graph.bytes_expected else 0.0)] if has_bars else []),
        )  # fmt: skip
    return made


def _story(split: SplitRecord, *, is_one: bool) -> Text:
    """Return the first node and, below it, the inputs; for splits that differ by layer, without the layer's number."""
    name: Callable[[str], str] = str if is_one else _without_layer
    told = Text(f"{split.op} {name(split.first)}")
    if split.inputs:
        told.append("\n← " + ", ".join(name(i.tensor) for i in split.inputs), style="dim")
    return told


def _alike(splits: Sequence[SplitRecord], *, all_splits: bool) -> list[list[SplitRecord]]:
    """Group the splits that differ only by their layer."""
    if all_splits:
        return [[s] for s in splits]

    def pattern(split: SplitRecord) -> tuple[Any, ...]:
        names = tuple(_without_layer(i.tensor) for i in split.inputs)
        return split.backend, split.op, _without_layer(split.first), split.cause, names

    order: dict[tuple[Any, ...], int] = {}
    for split in splits:
        order.setdefault(pattern(split), split.split)
    ranked = sorted(splits, key=lambda s: (order[pattern(s)], s.split))
    return [list(group) for _, group in groupby(ranked, key=pattern)]


def _without_layer(name: str) -> str:
    return re.sub(r"(?<=blk\.)\d+(?=\.)|(?<=-)\d+|(?<=_l)\d+|(?<=node_)\d+", "N", name)
