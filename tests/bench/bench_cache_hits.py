"""Hits of an expert cache by the assumed routing beside those of recorded texts.

    PYGGML_TRACES=FOLDER python tests/bench/bench_cache_hits.py

The folder has traces of single requests in any form that `pyggml experts` reads; those whose layers have different numbers of tokens are
named and left out. All layers share llama.cpp's slots (SLRU), from an empty cache on.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

from pyggml.errors import PyggmlError
from pyggml.lab.formats import open_trace
from pyggml.lab.running import TraceRouting
from pyggml.moe_cache import EVICTIONS
from pyggml.routing import BIASED_ROUTING, DEFAULT_ROUTING, Routing

SHARES = (0.2, 0.3, 0.4, 0.6, 0.8)
N_TOKENS = 256


def hits(routing: Routing, n_layer: int, n_expert: int, n_used: int, share: float, n: int) -> float:
    """Return the hit rate of a generation with slots for a share of all experts."""
    table, found, asked = EVICTIONS["slru"](int(share * n_layer * n_expert), n_expert), 0, 0
    for token in range(n):
        table.begin()
        for layer in range(n_layer):
            lookup = table.lookup(layer, routing.rows(layer, [token], n_expert, n_used)[0])
            found, asked = found + len(lookup.hits), asked + len(lookup.hits) + len(lookup.misses)
    return found / asked


def main() -> None:
    """Print the hit rates of each model's texts and of both assumed routings, by the share of experts that has slots."""
    folder = Path(os.environ.get("PYGGML_TRACES", ""))
    texts: dict[tuple[str, int, int, int], list[TraceRouting]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and "curve" not in p.name):
        try:
            routing = TraceRouting(open_trace(path))
        except (PyggmlError, ValueError, KeyError) as error:
            print(f"left out: {path.name}: {str(error)[:80]}", file=sys.stderr)
            continue
        key = (path.parent.name, len(routing._rows), routing._n_expert, routing._n_used)
        texts.setdefault(key, []).append(routing)
    print(
        f"{'texts':28} {'share':>5}  {'recorded, lowest and highest':30} {BIASED_ROUTING!s:>14} {DEFAULT_ROUTING!s:>14}"
    )
    for (name, n_layer, n_expert, n_used), found in texts.items():
        n = min(N_TOKENS, *(r.n_tokens for r in found))
        for share in SHARES:
            rates = [hits(r, n_layer, n_expert, n_used, share, n) for r in found]
            laws = (hits(law, n_layer, n_expert, n_used, share, n) for law in (BIASED_ROUTING, DEFAULT_ROUTING))
            told = f"{statistics.median(rates):.1%} ({min(rates):.1%} to {max(rates):.1%})"
            print(
                f"{f'{name} ({len(found)}, {n} tokens)':28} {share:5.0%}  {told:30}", *(f"{law:>14.1%}" for law in laws)
            )


if __name__ == "__main__":
    main()
