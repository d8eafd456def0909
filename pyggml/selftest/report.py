"""What a self test found: outcomes by stage, measured rates, and one verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

__all__ = ["Outcome", "Rate", "Report", "Result", "Verdict"]


class Result(Enum):
    """What came of one check."""

    PASSED = "passed"
    WRONG = "wrong"  #: it computed something else than it should
    FAILED = "failed"  #: it raised an error
    UNSUPPORTED = "unsupported"  #: the device says that it does not do this; the scheduler gives it to the CPU
    SKIPPED = "skipped"  #: not tried; the detail says why


class Verdict(Enum):
    """What a self test says in one word; the value is the exit status of `pyggml selftest`."""

    PASSED = 0
    WRONG = 1  #: at least one result is wrong, or an error was raised
    MISSING = 4  #: there is no such device here
    SLOW = 5  #: all results are right; at least one kernel is far below the rates of the same device
    INTERRUPTED = 130  #: stopped by hand; nothing that ran was wrong


@dataclass(frozen=True, slots=True)
class Outcome:
    """One check.

    Attributes
    ----------
    stage : str
        One of `STAGES`.
    name : str
        What was checked.
    detail : str
        One line for people: what was found.
    error, bound : float or None
        Worst normalised mean squared error against the definition or the CPU, and what is allowed.
    """

    stage: str
    name: str
    result: Result
    detail: str = ""
    error: float | None = None
    bound: float | None = None


@dataclass(frozen=True, slots=True)
class Rate:
    """One measured time.

    Attributes
    ----------
    what : str
        Work: a kernel with its type and tokens, or a way of a copy with its size.
    seconds : float
        Least of several runs, waits included.
    per_s : float
        Bytes or operations a second, by `unit`.
    unit : str
        ``"B/s"`` or ``"op/s"``.
    share : float or None
        Part of the best rate of that unit that this run measured on the same device.
    other_s : float or None
        What the device beside it took for the same work, if there is one.
    """

    what: str
    seconds: float
    per_s: float
    unit: str
    share: float | None = None
    other_s: float | None = None


@dataclass(slots=True)
class Report:
    """All that one self test found.

    Attributes
    ----------
    device : str
        As asked for.
    description : str
        As the device calls itself; empty if it is missing.
    facts : dict
        Versions and what else one needs to read the numbers: pyggml, Python, system, driver.
    outcomes : list of Outcome
    rates : list of Rate
        Empty if the device has no times of its own (simulated, emulated).
    peaks : dict
        Best measured rate by unit.
    beside : str
        Device whose times stand beside; empty if there is none.
    missing : str
        Why there is no such device; empty if it is there.
    slow : list of str
        What is far below the device's own rates.
    seconds : float
        Wall time of the whole test.
    """

    device: str
    description: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    rates: list[Rate] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)
    beside: str = ""
    missing: str = ""
    slow: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    was_interrupted: bool = False
    seconds: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """The one word."""
        if self.missing:
            return Verdict.MISSING
        if self.wrong:
            return Verdict.WRONG
        if self.was_interrupted:
            return Verdict.INTERRUPTED
        return Verdict.SLOW if self.slow else Verdict.PASSED

    @property
    def wrong(self) -> list[Outcome]:
        """Outcomes that are wrong or failed."""
        return [o for o in self.outcomes if o.result in (Result.WRONG, Result.FAILED)]

    def sentence(self) -> str:
        """Return the verdict as a sentence."""
        n = {result: sum(o.result is result for o in self.outcomes) for result in Result}
        match self.verdict:
            case Verdict.MISSING:
                return f"There is no device {self.device} here: {self.missing}"
            case Verdict.WRONG:
                return f"{len(self.wrong)} of {len(self.outcomes)} checks are wrong: do not use this device yet."
            case Verdict.INTERRUPTED:
                return f"Interrupted: the {n[Result.PASSED]} checks that ran passed; the rest was not tried."
            case Verdict.SLOW:
                return f"All {n[Result.PASSED]} checks passed, but {len(self.slow)} kernels are slow for this device."
        left_out = f"; {n[Result.UNSUPPORTED]} are for the CPU" if n[Result.UNSUPPORTED] else ""
        skipped = f"; {n[Result.SKIPPED]} were skipped" if n[Result.SKIPPED] else ""
        return f"All {n[Result.PASSED]} checks passed{left_out}{skipped}."

    def as_json(self) -> dict[str, Any]:
        """Return values of JSON, the verdict included."""
        made = asdict(self)
        made["verdict"] = self.verdict.name.lower()
        made["sentence"] = self.sentence()
        for outcome, source in zip(made["outcomes"], self.outcomes, strict=True):
            outcome["result"] = source.result.value
            for key in ("error", "bound"):  # JSON has no NaN
                if outcome[key] is not None and not outcome[key] < float("inf"):
                    outcome[key] = None
        return made
