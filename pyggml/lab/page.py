"""The page of a comparison: cost against size, experts used against tokens, and where a token's time goes; a table beside each plot."""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..files import aside
from .comparison import Comparison
from .machine import TokenTime
from .usage import usage

__all__ = ["page_html", "write_page"]


def page_html(made: Comparison) -> str:
    """Return the page as one file that needs no network."""
    text = json.dumps(_data(made), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    style = (files("pyggml.viz") / "static" / "page.css").read_text(encoding="utf-8")
    page = (files(__package__) / "static" / "lab.html").read_text(encoding="utf-8")
    parts = {"TITLE": escape(f"Expert caches: {made.trace.model or made.trace.source}"), "STYLE": style, "DATA": text}
    before, *pieces = page.split("{{")
    out = [before]
    for piece in pieces:
        key, _, rest = piece.partition("}}")
        out += [parts[key], rest]
    return "".join(out)


def write_page(path: Path, made: Comparison) -> None:
    """Write the page of a comparison."""
    with aside(path) as part:
        part.write_text(page_html(made), encoding="utf-8")


def _data(made: Comparison) -> dict[str, Any]:
    """Return what the page draws."""
    used = usage(made.trace, phase=made.setting.phase)
    shares = used.counts / used.events.clip(1)[:, None]
    return {
        **made.json(),
        "title": str(made.trace),
        "usage": {
            "layers": used.layers,
            "shares": [[round(float(x), 4) for x in row] for row in shares],
            "unions": [u.json() for u in used.unions],
        },
        "bars": _bars(made),
    }


def _bars(made: Comparison) -> list[dict[str, Any]]:
    """Return a token's time by term, of no cache, each policy, and each policy with prefetch that is always right."""
    if made.trace.expert_bytes is None:
        return []
    bars = []
    capacities = list(dict.fromkeys(row.result.capacity for row in made.rows))
    touches = made.rows[0].result.touches
    for capacity in capacities:
        none = made.work.seconds(made.machine, made.work.expert_bytes, touches)
        bars.append(_bar(str(capacity), "no cache", none, 0.0))
        for row in made.rows:
            if row.result.capacity == capacity and row.time is not None:
                bars.append(_bar(str(capacity), row.result.policy.name, row.time, 0.0))
                # what is computed of a layer can hide a copy of the next
                bars.append(
                    _bar(
                        str(capacity),
                        f"{row.result.policy.name}, perfect prefetch",
                        row.time,
                        min(row.time.copy_s, row.time.device_s),
                    )
                )
        for size, layers in made.resident:
            if size == capacity:
                bars.append(_bar(str(capacity), f"as {layers.n_resident} of {layers.n_layer} layers", layers.time, 0.0))
    return bars


def _bar(size: str, name: str, time: TokenTime, hidden_s: float) -> dict[str, Any]:
    ms = {
        "device": time.device_s - hidden_s,
        "device and copy": hidden_s,
        "copy": time.copy_s - hidden_s,
        "sync": time.sync_s,
        "CPU": time.cpu_s,
    }
    return {"size": size, "name": name, "ms": {term: round(1e3 * s, 5) for term, s in ms.items()}}
