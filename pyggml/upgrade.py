"""What another version of ggml changes for a model and its flags: one decode, planned with the rules of each version."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise

from .dialect import Dialect
from .models.batch import Outputs
from .planning import Planner
from .record import ComputeRecord, CopyRecord, ReadRecord, Record, WaitRecord
from .routing import Routing
from .simulation import simulate_batch

__all__ = ["MEASURES", "DialectCost", "RuleEffect", "Upgrade", "compare_dialects"]

#: The measures of a decode that are compared.
MEASURES = ("splits", "copies", "bytes", "waits", "seconds", "compute_buffer_bytes")


@dataclass(frozen=True, slots=True)
class DialectCost:
    """The cost of one decode with the rules of one version.

    Attributes
    ----------
    splits : int
        Launched splits of all micro-batches.
    copies, bytes : int
        Copies between backends, and their bytes.
    waits : int
        Waits of the host or a backend, and reads of ids or results, which also wait.
    seconds : float or None
        Virtual time; None if a device has no profile.
    compute_buffer_bytes : int
        The sum over all devices.
    """

    splits: int
    copies: int
    bytes: int
    waits: int
    seconds: float | None
    compute_buffer_bytes: int

    def differs(self, other: DialectCost) -> bool:
        """Return whether any measure differs; rounding differences of virtual time do not count."""
        return any(self.change(other, name) for name in MEASURES)

    def change(self, other: DialectCost, name: str) -> float:
        """Return how much one measure changes from another decode to this one; 0 if unknown."""
        before, after = getattr(other, name), getattr(self, name)
        if before is None or after is None:
            return 0
        change: float = after - before
        return 0 if abs(change) <= 1e-9 * abs(before) else change


@dataclass(frozen=True, slots=True)
class RuleEffect:
    """The effect of one rule: the new version compared with the new version with the old value of this rule.

    Attributes
    ----------
    rule : str
        A field of `Dialect`.
    before, after
        Its values.
    without : DialectCost
        The decode with the new version except for this rule.
    """

    rule: str
    before: object
    after: object
    without: DialectCost


@dataclass(frozen=True, slots=True)
class Upgrade:
    """One batch size with two versions.

    Attributes
    ----------
    n_tokens : int
    old, new : str
        The versions.
    before, after : DialectCost
    effects : list of RuleEffect
        Rules that change something for this model and these flags.
    silent : list of str
        Rules that differ between the versions but change nothing here.
    """

    n_tokens: int
    old: str
    new: str
    before: DialectCost
    after: DialectCost
    effects: list[RuleEffect]
    silent: list[str]

    def as_dict(self) -> dict[str, object]:
        """Return values for JSON."""
        return asdict(self)


class _Tally:
    """A recorder that counts."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Set the counts to zero."""
        self.splits = self.copies = self.bytes = self.waits = 0

    def record(self, record: Record) -> None:
        """Count."""
        if isinstance(record, ComputeRecord):
            self.splits += 1
        elif isinstance(record, CopyRecord):
            self.copies += 1
            self.bytes += record.size_bytes
        elif isinstance(record, WaitRecord | ReadRecord):
            self.waits += 1


#: Opens a planner without data for a dialect, with a recorder.
OpenPlanner = Callable[[Dialect, _Tally], Planner]


def compare_dialects(
    open_planner: OpenPlanner,
    sizes: Sequence[int],
    dialects: Sequence[Dialect],
    *,
    outputs: Outputs = "last",
    routing: Routing | None = None,
) -> Iterator[Upgrade]:
    """Yield what changes from each version to the next, for each batch size.

    Parameters
    ----------
    open_planner : callable
        ``(dialect, recorder) -> Planner``, without data; this function closes the planners.
    sizes : sequence of int
        Tokens of each decode, from an empty cache.
    dialects : sequence of Dialect
        At least two.
    """
    kept: dict[tuple[Dialect, int], DialectCost] = {}

    def cost(dialect: Dialect, n: int) -> DialectCost:
        if (dialect, n) not in kept:
            kept[dialect, n] = _cost(open_planner, dialect, n, outputs, routing)
        return kept[dialect, n]

    for n in sizes:
        for old, new in pairwise(dialects):
            before, after = cost(old, n), cost(new, n)
            effects, silent = [], []
            for name in (f.name for f in fields(Dialect) if f.name != "version"):
                was, is_now = getattr(old, name), getattr(new, name)
                if was == is_now:
                    continue
                without = cost(replace(new, **{name: was}), n)
                if after.differs(without):
                    effects.append(RuleEffect(name, was, is_now, without))
                else:
                    silent.append(name)
            yield Upgrade(n, old.version, new.version, before, after, effects, silent)


def _cost(
    open_planner: OpenPlanner, dialect: Dialect, n: int, outputs: Outputs, routing: Routing | None
) -> DialectCost:
    tally = _Tally()
    with closing(open_planner(dialect, tally)) as planner:
        planner.reserve()
        tally.clear()  # opening and reserving are not part of a decode
        seconds = simulate_batch(planner, n, outputs=outputs, routing=routing).seconds
        buffers = sum(m.compute for m in planner.memory())
    return DialectCost(tally.splits, tally.copies, tally.bytes, tally.waits, seconds, buffers)
