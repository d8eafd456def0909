"""The report at the end of `run`: what was split, copied, used and waited for, as JSON and as tables."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType

from ..moe_cache import prefetch_of
from ..plan_report import MemoryFit, memory_fits
from ..report import CopyAccount, LayerCopies, Phase
from ..session import Session
from ._cache_options import cache_table
from ._console import Bar, n_bytes, n_seconds, table
from ._tables import memory_table

if TYPE_CHECKING:
    from ..backend import Backend
    from ..cost import LinkProfile
    from ..llama import LlamaModel
    from ..moe_cache import MoeCache
    from ..sched.prefetch import ExpertPrefetch
    from ..session import BatchRecord
    from ._virtual import VirtualReport

__all__ = ["BatchShape", "RunReport"]


@dataclass(slots=True)
class BatchShape:
    """Micro-batches of one size, which share a plan."""

    n_tokens: int
    n_splits: int
    splits_by_backend: dict[str, int]
    n_split_inputs: int
    n_nodes: int
    n_batches: int = 0
    bytes_copied: int = 0
    bytes_full: int = 0
    seconds: float = 0.0
    virtual_s: float | None = None


@dataclass(slots=True)
class RunReport:
    """The report of `run`. It is filled during the run, so that it can be printed at any time."""

    model: dict[str, Any]
    devices: list[dict[str, Any]]
    account: CopyAccount
    memory: list[MemoryFit] = field(default_factory=list)
    shapes: dict[tuple[int, int], BatchShape] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    n_prompt: int = 0
    n_generated: int = 0
    text: str = ""
    prompt_tokens: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    is_complete: bool = False
    link: LinkProfile | None = None  #: of the first device, if it is simulated
    stopped: str = ""
    virtual: VirtualReport | None = None
    expert_cache: MoeCache | None = None
    prefetch: ExpertPrefetch | None = None
    cache_log: list[str] = field(default_factory=list)  #: llama.cpp's own lines about its expert cache

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of the block to a phase, on this machine and on the simulated one."""
        start_s = time.perf_counter()
        try:
            with nullcontext() if self.virtual is None else self.virtual.timed(phase):
                yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start_s

    def watch(self, session: Session | LlamaModel, backends: Sequence[Backend]) -> None:
        """Record the session's memory, and every micro-batch from now on."""
        self.memory = memory_fits([m for m in session.memory() if m.total], backends)
        self.expert_cache = getattr(session, "expert_cache", None)  # llama.cpp's is its own
        self.prefetch = prefetch_of(session.sched.policy) if isinstance(session, Session) else None  # not llama.cpp

        def on_batch(batch: BatchRecord) -> None:
            key = (batch.n_tokens, batch.n_splits)
            shape = self.shapes.get(key)
            if shape is None:
                by_backend, n_inputs = session.count_splits()
                shape = BatchShape(batch.n_tokens, batch.n_splits, by_backend, n_inputs, batch.n_nodes)
                self.shapes[key] = shape
            shape.n_batches += 1
            shape.bytes_copied += batch.bytes_copied
            shape.bytes_full += batch.bytes_full
            shape.seconds += batch.seconds
            if batch.virtual_s is not None:
                shape.virtual_s = (shape.virtual_s or 0.0) + batch.virtual_s

        session.on_batch = on_batch

    # -- as data -------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "model": self.model,
            "devices": self.devices,
            "complete": self.is_complete,
            "stopped": self.stopped,
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "text": self.text,
            "batches": [asdict(s) for s in self.shapes.values()],
            "layers": [row.as_dict() for row in self.account.layers()],
            "experts": {
                "prompt": self.account.total("prompt").as_dict(),
                "generate": self.account.total("generate").as_dict(),
                "total": self.account.total().as_dict(),
            },
            "bytes_by_device": {d["name"]: self.account.bytes_to(d["name"]) for d in self.devices},
            "seconds": {k: round(v, 6) for k, v in self.seconds.items()},
            "tokens_per_s": {k: v and round(v, 2) for k, v in self._rates().items()},
            "memory": [f.as_dict() for f in self.memory],
            "virtual": None if self.virtual is None else self.virtual.as_dict(self._counts()),
            "expert_cache": self._cache_dict(),
            "expert_prefetch": None if self.prefetch is None else self.prefetch.as_dict(),
        }

    def _cache_dict(self) -> dict[str, Any] | None:
        cache = self.expert_cache
        if self.cache_log:
            return {"log": self.cache_log}
        return None if cache is None else {**cache.as_dict(), "log": [*cache.start_lines(), *cache.counters.lines()]}

    def _counts(self) -> dict[str, int]:
        """Return the tokens evaluated in each phase; the first generated token counts for the prompt."""
        n_evaluated = sum(s.n_tokens * s.n_batches for s in self.shapes.values())
        return {"prompt": self.n_prompt, "generate": max(self.n_generated - 1, 0), "turns": n_evaluated}

    def _rates(self) -> dict[str, float | None]:
        phases = {"prompt", "generate", *({"turns"} & self.seconds.keys())}
        counts = self._counts()
        return {
            p: counts[p] / s if (s := self.seconds.get(p, 0.0)) and counts[p] else None
            for p in sorted(phases, reverse=True)
        }

    # -- as tables -----------------------------------------------------------

    def print(self, console: Console) -> None:
        """Print the report as tables."""
        for i, part in enumerate(self._parts()):
            if i:
                console.print()
            console.print(part)

    def _parts(self) -> list[RenderableType]:
        parts: list[RenderableType] = [self._splits_table()] if self.shapes else []
        if any(row.bytes_full for row in self.account.layers()):
            parts += [self._layers_table(), self._saved_text()]
        if self.expert_cache is not None:
            parts.append(cache_table(self.expert_cache))
            parts += ["\n".join(lines)] if (lines := self.expert_cache.counters.lines()) else []
        parts += ["\n".join(self.cache_log)] if self.cache_log else []
        if self.prefetch is not None:
            parts.append(self.prefetch.counters.line())
        parts += [memory_table(self.memory), self._time_table()]
        if self.virtual is not None and self.virtual.phases:
            parts.append(self.virtual.table(self._counts()))
            parts.append(self.virtual.assumed())
            parts += [links] if (links := self.virtual.links()) else []
        return parts

    def _splits_table(self) -> RenderableType:
        right = ("tokens", "micro-batches", "splits", "inputs", "nodes", "copied", "if whole")
        made = table("Splits by micro-batch size", "tokens", "micro-batches", "splits", "on", "inputs", "nodes", "copied",
                     "if whole", right=right, free=("on",))  # fmt: skip
        for s in self.shapes.values():
            where = ", ".join(f"{n} × {name}" for name, n in s.splits_by_backend.items())
            made.add_row(
                str(s.n_tokens), str(s.n_batches), str(s.n_splits), where, str(s.n_split_inputs), str(s.n_nodes),
                n_bytes(s.bytes_copied), n_bytes(s.bytes_full),
            )  # fmt: skip
        return made

    def _layers_table(self) -> RenderableType:
        phases: list[Phase] = [p for p in ("prompt", "generate") if self.account.layers(p)]
        made = table("Expert weights copied, by layer")
        made.add_column("layer", justify="right")
        for phase in phases:
            for name in (f"{phase}: used", "copied", "if whole", "ratio"):
                made.add_column(name, justify="right", no_wrap=True)
            made.add_column("")
        rows = {phase: {r.layer: r for r in self.account.layers(phase)} for phase in phases}
        for layer in [r.layer for r in self.account.layers()]:
            made.add_row(
                "-" if layer is None else str(layer),
                *(c for p in phases for c in _cells(rows[p].get(layer, LayerCopies(layer)))),
            )
        made.add_section()
        made.add_row("all", *(c for p in phases for c in _cells(self.account.total(p))))
        return made

    def _saved_text(self) -> str:
        total = self.account.total()
        saved = total.bytes_full - total.bytes_copied
        text = (
            f"Copied {n_bytes(total.bytes_copied)} of expert weights; full copies would have copied "
            f"{n_bytes(total.bytes_full)}: {total.ratio:.0%}, {n_bytes(saved)} saved."
        )
        if self.link is not None:
            copied_s, full_s = (self.link.seconds(n, n_copies=0) for n in (total.bytes_copied, total.bytes_full))
            text += (
                f"\nOn this device's link ({self.link.bytes_per_s / 1e9:.1f} GB/s) that is {n_seconds(copied_s)} "
                f"instead of {n_seconds(full_s)}."
            )
        return text

    def _time_table(self) -> RenderableType:
        made = table(
            "Time on this machine", "phase", "seconds", "tokens", "tokens/s", right=("seconds", "tokens", "tokens/s")
        )
        rates = self._rates()
        counts = self._counts()
        phases = {phase: s for phase, s in self.seconds.items() if phase != "total"}
        total_s = self.seconds.get("total", sum(phases.values()))
        for phase, seconds in {**phases, "other": max(total_s - sum(phases.values()), 0.0), "total": total_s}.items():
            rate = rates.get(phase)
            made.add_row(phase, f"{seconds:.3f}", str(counts.get(phase, "")), "" if rate is None else f"{rate:,.1f}")
        return made


def _cells(row: LayerCopies) -> list[RenderableType]:
    if not row.bytes_full:
        return ["-", "-", "-", "-", ""]
    used = f"{row.used_mean:.1f} of {row.n_expert}" if row.n_reads else "all"
    return [used, n_bytes(row.bytes_copied), n_bytes(row.bytes_full), f"{row.ratio:.0%}", Bar(row.ratio)]
