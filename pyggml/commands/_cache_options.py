"""The options of `run` and `splits` for an expert cache, and its report."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from ._console import n_bytes, report, table
from ._options import choice, count, file_option, option

if TYPE_CHECKING:
    from rich.table import Table

    from ..moe_cache import CacheRule, Misses, MoeCache
    from ..planning import Planner
    from ..routing import Routing
    from ..simulation import SimulatedBatch

__all__ = ["N_FORECAST", "cache_options", "cache_table", "forecast", "print_forecast", "stated_routing"]

#: Tokens that `splits` generates, from an empty cache on.
N_FORECAST = 64

_OPTIONS = cloup.option_group(
    "Expert cache",
    count("--moe-cache-mib", default=0, help="Size of llama.cpp's expert cache, over all devices. [0: off]"),
    choice("--moe-cache-eviction", values=["lru", "slru"], shown="slru",
         help="Its rule: lru is llama.cpp b11549 and 0.7.0, slru b11739; with --engine llama the library's own."),
    choice("--moe-cache-misses", values=["copy", "cpu"], shown="copy",
         help="copy: what the cache lacks is copied there first, as in llama.cpp; cpu: the CPU computes it, while the device computes the rest."),
    option("--expert-cache", default="", metavar="POLICY:SIZE",
         help="A cache with a policy of `pyggml experts` instead: lfru:20%, lru+hotter:512MiB, lfu:6 (slots)."),
    choice("--expert-cache-scope", values=["layer", "group", "global"], shown="layer",
         help="Which layers share its slots."),
    file_option("--expert-cache-fit", exists=True, dir_okay=False, metavar="TRACE",
         help="Routing trace of other requests, for static and half-pinned."),
)  # fmt: skip
_NAMES = (
    "moe_cache_mib",
    "moe_cache_eviction",
    "moe_cache_misses",
    "expert_cache",
    "expert_cache_scope",
    "expert_cache_fit",
)


def cache_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of an expert cache; it gets what they come to as ``expert_cache: CacheRule | None``."""

    @functools.wraps(function)
    def call(**given: Any) -> Any:
        rest = {name: value for name, value in given.items() if name not in _NAMES}
        return function(expert_cache=_rule(**{name: given[name] for name in _NAMES}), **rest)

    made: Callable[..., Any] = _OPTIONS(call)
    return made


def _rule(
    moe_cache_mib: int,
    moe_cache_eviction: str,
    moe_cache_misses: Misses,
    expert_cache: str,
    expert_cache_scope: str,
    expert_cache_fit: Path | None,
) -> CacheRule | None:
    from ..moe_cache import LlamaCache

    if expert_cache:
        if moe_cache_mib:
            raise click.UsageError("use either --moe-cache-mib or --expert-cache")
        from ..lab.formats import open_trace
        from ..lab.running import parse_rule

        return parse_rule(
            expert_cache, expert_cache_scope, None if expert_cache_fit is None else open_trace(expert_cache_fit),
            misses=moe_cache_misses,
        )  # fmt: skip
    if not moe_cache_mib and moe_cache_misses != "copy":
        raise click.UsageError("--moe-cache-misses needs a cache: --moe-cache-mib or --expert-cache")
    return LlamaCache(moe_cache_mib << 20, moe_cache_eviction, moe_cache_misses) if moe_cache_mib else None


def stated_routing(text: str) -> Routing:
    """Return the routing that ``--routing`` states; ``trace:FILE`` may be any routing trace that the lab reads.

    Raises
    ------
    GraphError, FormatError
        It is none.
    """
    from ..errors import FormatError
    from ..routing import parse_routing

    try:
        return parse_routing(text)
    except FormatError:
        kind, _, path = text.partition(":")
        if kind != "trace" or not Path(path).is_file():
            raise
        from ..lab.formats import open_trace
        from ..lab.running import TraceRouting

        return TraceRouting(open_trace(path))


def cache_table(cache: MoeCache, n_tokens: int = 0) -> Table:
    """Return a row for each group of layers: slots, memory, what was found and uploaded in all, or for each of some tokens."""
    columns = (
        "layers",
        "slots",
        "of experts",
        "memory",
        "hits",
        "misses",
        "hit rate",
        "uploaded/token" if n_tokens else "uploaded",
    )
    told = cache.as_dict()
    where = ", misses on the CPU" if told["misses_on"] == "cpu" else ""
    made = table(f"Expert cache, {told['rule']}{where}", "device", "type", *columns, right=columns)
    for g in told["groups"]:
        rate = g["hit_rate"]
        made.add_row(
            g["device"], g["type"], str(len(g["layers"])), f"{g['n_slots']:,}", f"{g['share']:.1%}", n_bytes(g["bank_bytes"]),
            f"{g['hits']:,}", f"{g['misses']:,}", "-" if rate is None else f"{rate:.1%}",
            n_bytes(g["uploaded_bytes"] // (n_tokens or 1)),
        )  # fmt: skip
    return made


def _forecast_table(runs: dict[str, SimulatedBatch]) -> Table:
    """Return bytes and virtual time of a token of each generation."""
    columns = ("copied/token", "ms/token", "tokens/s")
    n_tokens = next(iter(runs.values())).n_tokens
    made = table(f"Generation of {n_tokens} tokens, one a step (virtual)", "", *columns, right=columns)
    for name, s in runs.items():
        times = (f"{1e3 * s.seconds / n_tokens:.3f}", f"{s.tokens_per_s:,.1f}") if s.seconds else ("-", "-")
        made.add_row(name, n_bytes(s.bytes_copied // n_tokens), *times)
    return made


def forecast(planner: Planner, routing: Routing, n_tokens: int, depth: int) -> SimulatedBatch | None:
    """Simulate a generation from an empty cache; None if a device has data."""
    from ..simulation import can_simulate, simulate_generation

    if not can_simulate(planner):
        return None
    n = min(n_tokens, planner.params.n_ctx - depth, n_tokens if routing.n_tokens is None else routing.n_tokens - depth)
    return simulate_generation(planner, max(n, 1), depth=depth, routing=routing)


def print_forecast(cache: MoeCache, generated: SimulatedBatch | None, without: SimulatedBatch | None) -> None:
    """Print what a cache holds and, of plans that can be carried out, what it does for a generation."""
    console = report()
    console.print()
    console.print(cache_table(cache, 0 if generated is None else generated.n_tokens))
    runs = {name: s for name, s in (("with the cache", generated), ("without", without)) if s is not None}
    if runs:
        console.print()
        console.print(_forecast_table(runs))
