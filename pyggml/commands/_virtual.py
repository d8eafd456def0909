"""The time of a run on the simulated machine, by phase, for JSON and as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from ..clock import Reading
from ..hardware.rates import n_fitted
from ..routing import DEFAULT_ROUTING
from ._console import n_bytes, table

if TYPE_CHECKING:
    from ..clock import VirtualClock
    from ..routing import Routing

__all__ = ["VirtualReport", "assumed_text", "assumptions"]


class VirtualReport:
    """Virtual time by phase.

    Parameters
    ----------
    clock : VirtualClock
        The scheduler's.
    names : sequence of str
        The names of the scheduler's backends.
    """

    def __init__(self, clock: VirtualClock, names: Sequence[str]) -> None:
        self.clock = clock
        self.names = list(names)
        self.phases: dict[str, Reading] = {}

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the virtual time that passes in the block to a phase."""
        before = self.clock.reading()
        try:
            yield
        finally:
            sum_so_far = self.phases.get(phase, Reading.zero(len(self.names)))
            self.phases[phase] = sum_so_far.plus(self.clock.reading(), before)

    def as_dict(self, n_tokens: dict[str, int]) -> dict[str, Any]:
        """Return times and rates for JSON.

        Parameters
        ----------
        n_tokens : dict
            Tokens evaluated in each phase.
        """
        return {
            "assumed": assumptions(self.clock, self.names),
            "link_bytes": link_bytes(self.clock, self.names),
            "phases": {phase: self._phase(reading, n_tokens.get(phase)) for phase, reading in self.phases.items()},
        }

    def _phase(self, r: Reading, n: int | None) -> dict[str, Any]:
        devices = list(enumerate(self.names))[:-1]
        return {
            "seconds": round(r.host_s, 9),
            "n_tokens": n,
            "tokens_per_s": round(n / r.host_s, 2) if n and r.host_s else None,
            "compute_s": {name: round(s, 9) for name, s in zip(self.names, r.busy_s, strict=True)},
            "busy_share": {name: round(s / r.host_s, 4) if r.host_s else 0.0
                           for name, s in zip(self.names, r.busy_s, strict=True)},
            "copy_to_s": {name: round(r.to_device_busy_s[i], 9) for i, name in devices},
            "copy_from_s": {name: round(r.from_device_busy_s[i], 9) for i, name in devices},
        }  # fmt: skip

    def table(self, n_tokens: dict[str, int]) -> RenderableType:
        """Return the times as a table."""
        devices = list(enumerate(self.names))[:-1]
        space = " " if len(self.names) < 3 else "\n"
        columns = ["seconds", "tokens/s", *(f"{name}{space}computes" for name in self.names)]
        for _, name in devices:
            columns += [f"to{space}{name}", f"from{space}{name}"]
        made = table("Time on the simulated machine (virtual)", "phase", *columns, right=tuple(columns))
        for phase, r in self.phases.items():
            n = n_tokens.get(phase)
            cells = [f"{r.host_s:.4f}", f"{n / r.host_s:,.1f}" if n and r.host_s else ""]
            shares = [*r.busy_s, *(s for i, _ in devices for s in (r.to_device_busy_s[i], r.from_device_busy_s[i]))]
            made.add_row(phase, *cells, *(f"{s / r.host_s:.0%}" if r.host_s else "-" for s in shares))
        return made

    def assumed(self) -> str:
        """Return the assumptions of the times in one line."""
        return assumed_text(self.clock, self.names)

    def links(self) -> str:
        """Return what each link carried in one line; empty if no device copied to another by a link of their own."""
        clock = self.clock
        if not any(clock.peer_link(src, dst) for src, dst in clock.link_bytes):
            return ""
        return "Links: " + ", ".join(f"{link} {n_bytes(n)}" for link, n in link_bytes(clock, self.names).items())


def link_bytes(clock: VirtualClock, names: Sequence[str]) -> dict[str, int]:
    """Return the bytes that each link carried so far."""
    return {f"{names[src]} to {names[dst]}": n for (src, dst), n in clock.link_bytes.items()}


def assumptions(clock: VirtualClock, names: Sequence[str], routing: Routing | None = None) -> dict[str, Any]:
    """Return the assumptions of virtual times."""
    return {
        "backends": {
            name: {"profile": p.name, "description": p.description, "source": p.source}
            for name, p in zip(names, clock.profiles, strict=True)
        },
        "rates": "pyggml/hardware/rates.py, fitted to published runs",
        "routing": str(routing)
        if routing is not None
        else f"as read where experts are copied, otherwise {DEFAULT_ROUTING}",
    }


def assumed_text(clock: VirtualClock, names: Sequence[str]) -> str:
    """Return the assumptions of virtual times in one line."""
    machines = "; ".join(f"{name}: {p.description}" for name, p in zip(names, clock.profiles, strict=True))
    return f"Assumed: {machines}; {n_fitted()} rates fitted to published runs"
