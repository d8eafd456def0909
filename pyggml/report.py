"""Sums of a run's records, returned as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .notebook import Bar, html_table
from .record import CopyRecord, Record, UsedExpertsRecord
from .sched.experts import layer_of

__all__ = ["CopyAccount", "LayerCopies", "Phase"]

Phase = Literal["prompt", "generate"]


@dataclass(slots=True)
class LayerCopies:
    """The expert weights of one layer that were copied."""

    layer: int | None  #: None if the weight's name contains no layer
    n_expert: int = 0
    n_reads: int = 0  #: number of used-expert copies: one for each weight and micro-batch
    n_used: int = 0  #: sum of the used experts of all these copies
    bytes_copied: int = 0
    bytes_full: int = 0  #: if every input had been copied whole

    @property
    def used_mean(self) -> float:
        """The average number of used experts."""
        return self.n_used / self.n_reads if self.n_reads else 0.0

    @property
    def ratio(self) -> float:
        """Bytes copied, divided by bytes of full copies; 1 if there were no copies."""
        return self.bytes_copied / self.bytes_full if self.bytes_full else 1.0

    def add(self, other: LayerCopies) -> None:
        """Add the counts of another object."""
        self.n_expert = max(self.n_expert, other.n_expert)
        self.n_reads += other.n_reads
        self.n_used += other.n_used
        self.bytes_copied += other.bytes_copied
        self.bytes_full += other.bytes_full

    def as_dict(self) -> dict[str, Any]:
        """Return the counts, mean and ratio for JSON."""
        return {**asdict(self), "used_mean": self.used_mean, "ratio": self.ratio}


@dataclass(slots=True)
class CopyAccount:
    """A recorder that keeps sums instead of records, so that its memory does not grow during a run.

    Attributes
    ----------
    phase : str
        The phase of the records that follow, such as "prompt"; set by the caller.
    """

    phase: Phase = "prompt"
    _layers: dict[tuple[Phase, int | None], LayerCopies] = field(default_factory=dict)
    _bytes: dict[tuple[Phase, str, str], int] = field(default_factory=dict)

    def clear(self) -> None:
        """Set all sums to zero."""
        self._layers.clear()
        self._bytes.clear()

    def record(self, record: Record) -> None:
        """Add one record to the sums."""
        if isinstance(record, UsedExpertsRecord):
            row = self._row(record.tensor)
            row.n_expert = record.n_expert
            row.n_reads += 1
            row.n_used += len(record.used)
            row.bytes_full += record.tensor_bytes
        elif isinstance(record, CopyRecord) and record.src != record.dst:  # copies within a device do not count
            if record.reason in ("experts", "weight"):
                row = self._row(record.tensor)
                row.bytes_copied += record.size_bytes
                if record.reason == "weight":
                    row.bytes_full += record.tensor_bytes
            key = (self.phase, record.dst, record.reason)
            self._bytes[key] = self._bytes.get(key, 0) + record.size_bytes

    def _row(self, tensor: str) -> LayerCopies:
        layer = layer_of(tensor)
        return self._layers.setdefault((self.phase, layer), LayerCopies(layer))

    def layers(self, phase: Phase | None = None) -> list[LayerCopies]:
        """Return the sums of each layer in order, for one phase or for all."""
        rows: dict[int | None, LayerCopies] = {}
        for (p, layer), row in self._layers.items():
            if phase in (None, p):
                rows.setdefault(layer, LayerCopies(layer)).add(row)
        return sorted(rows.values(), key=lambda r: -1 if r.layer is None else r.layer)

    def __repr__(self) -> str:
        total = self.total()
        return f"<CopyAccount: {total.bytes_copied:,} bytes of weights, {total.bytes_full:,} if whole>"

    def _repr_html_(self) -> str:
        """Return a table of the sums of each layer and of all, for notebooks."""
        layers = [("-" if row.layer is None else str(row.layer), row) for row in self.layers()]
        rows = [
            (
                name,
                f"{row.used_mean:.1f} of {row.n_expert}" if row.n_reads else "all",
                f"{row.bytes_copied:,}",
                f"{row.bytes_full:,}",
                Bar(row.ratio),
            )
            for name, row in [("all", self.total()), *layers]
        ]
        columns = ("layer", "experts used", "bytes copied", "if whole", "ratio")
        return html_table("Weights copied, by layer", columns, rows, n_rows=len(rows), right=columns[:-1])

    def total(self, phase: Phase | None = None) -> LayerCopies:
        """Return the sum over all layers."""
        total = LayerCopies(None)
        for row in self.layers(phase):
            total.add(row)
        return total

    def bytes_to(self, backend: str, phase: Phase | None = None) -> dict[str, int]:
        """Return the bytes that were copied to a backend, by reason."""
        found: dict[str, int] = {}
        for (p, dst, reason), n in self._bytes.items():
            if dst == backend and phase in (None, p):
                found[reason] = found.get(reason, 0) + n
        return found
