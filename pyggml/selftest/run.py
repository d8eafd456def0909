"""Runs the stages of a self test in order, within a time limit."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .. import __version__
from ..backend import REGISTRY, Device
from ..errors import DeviceUnavailableError, PyggmlError
from ..testing import conformance
from ..testing.conformance import CaseResult, Status
from .models import N_RUNS, check_copies, check_models, check_races
from .report import Outcome, Rate, Report, Result
from .times import Sizes, copy_rates, kernel_rates, slow_kernels, with_shares

__all__ = ["EMULATOR", "STAGES", "Progress", "is_there", "run"]

#: The name of the emulated card: PTX kernels on the CPU, with a fake driver that works late.
EMULATOR = "emulator"
#: The stages in order: kernels of every op, whole models, used-expert copies, repeated runs, times.
STAGES = ("kernels", "models", "copies", "races", "times")
#: Called with the stage, the current work, the number of steps done and the total (None if unknown).
Progress = Callable[[str, str, int, int | None], None]

_RESULTS = {
    Status.PASSED: Result.PASSED,
    Status.WRONG: Result.WRONG,
    Status.FAILED: Result.FAILED,
    Status.UNSUPPORTED: Result.UNSUPPORTED,
}
#: Consecutive errors after which an op is no longer tested, because the device may be lost.
MAX_FAILURES = 5


def run(
    device: str | Device,
    *,
    beside: str | None = None,
    stages: tuple[str, ...] = STAGES,
    budget_s: float = 240.0,
    on_progress: Progress | None = None,
) -> Report:
    """Test a device. Ctrl-C ends the test and keeps the results so far.

    Parameters
    ----------
    device : str or Device
        A name as in ``--device``, `EMULATOR`, or a device.
    beside : str, optional
        A device to time for comparison; by default ggml's device for the same card or CPU, if installed. Empty
        text: none.
    stages : tuple of str
        From `STAGES`.
    budget_s : float
        Seconds after which no further kernel case is started; the later stages are short.
    on_progress : callable, optional

    Returns
    -------
    Report
        Its verdict is `MISSING` if the device does not exist.
    """
    begin = time.perf_counter()
    report = Report(device if isinstance(device, str) else device.name, facts=_facts())
    tell = on_progress or (lambda stage, what, done, total: None)
    try:
        tested = _open(device)[0]
    except (DeviceUnavailableError, ImportError, OSError) as error:
        report.missing = " ".join(str(error).split())
        return report
    report.description = tested.description
    report.facts["memory_bytes"] = str(tested.memory()[1])
    try:
        for stage in stages:
            tell(stage, "", 0, None)
            if stage == "kernels":
                report.outcomes += _kernels(tested, device == EMULATOR, begin + budget_s, report, tell)
            elif stage == "times":
                _times(report, tested, beside, tell)
            else:
                with tempfile.TemporaryDirectory(prefix="pyggml-selftest-") as folder:
                    for outcome in _whole(stage, device, tested, Path(folder)):
                        report.outcomes.append(outcome)
                        tell(stage, outcome.name, len(report.outcomes), None)
    except KeyboardInterrupt:
        report.was_interrupted = True
    report.seconds = time.perf_counter() - begin
    return report


def is_there(device: str) -> bool:
    """Return whether a device exists, without testing it."""
    try:
        _open(device)
    except (DeviceUnavailableError, ImportError, OSError):
        return False
    return True


def _facts() -> dict[str, str]:
    import numpy

    return {
        "pyggml": __version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "system": f"{platform.system()} {platform.release()}",
        "processor": platform.machine(),
    }


def _open(name: str | Device, seeds: int = 1) -> list[Device]:
    """Return a device, for simulated and emulated ones as often as asked, each with another order of its work."""
    if isinstance(name, Device):
        return [name] * seeds
    if name == EMULATOR:
        from ..backends.cuda import CudaDevice
        from ..testing.fake_driver import FakeMachine

        return [CudaDevice(FakeMachine(seed=seed).cards[0]) for seed in range(seeds)]
    kind, _, spec = name.partition(":")
    if kind == "sim" and seeds > 1:
        from ..backends.sim import Sim  # the same device, whose stream works late, by seed

        return [Sim(spec or "rtx4090-pcie4", seed=seed).device for seed in range(seeds)]
    return [REGISTRY.open(name)] * seeds


def _whole(stage: str, name: str | Device, device: Device, folder: Path) -> Iterator[Outcome]:
    if stage == "models":
        yield from check_models(device, folder)
    elif stage == "copies":
        yield from check_copies(device, folder)
    else:
        yield from check_races(_open(name, 3 if name == EMULATOR else N_RUNS), folder)


# -- kernels ---------------------------------------------------------------------


def _kernels(device: Device, is_small: bool, deadline: float, report: Report, tell: Progress) -> list[Outcome]:
    """Run the cases of every op, within the time, and return an outcome for each op."""
    backend = device.backend()
    n_case = 1 if is_small else 3
    total = conformance.n_cases(n_case=n_case)
    found: list[CaseResult] = []
    in_row = 0
    try:
        for done, (name, make) in enumerate(conformance.cases(n_case=n_case)):
            if time.perf_counter() > deadline or in_row >= MAX_FAILURES:
                reason = "time is up" if in_row < MAX_FAILURES else f"{in_row} errors in a row"
                report.notes.append(f"{total - done} of {total} kernel cases were not run: {reason}")
                break
            tell("kernels", name, done, total)
            result = conformance.run_case(backend, name, make)
            in_row = in_row + 1 if result.status is Status.FAILED else 0
            found.append(result)
        return _by_op(found)
    except KeyboardInterrupt:
        report.outcomes += _by_op(found)
        raise
    finally:
        try:
            backend.close()
        except PyggmlError as error:
            report.notes.append(f"closing the device failed: {error}")


def _by_op(results: list[CaseResult]) -> list[Outcome]:
    """Return one outcome an op: the worst of its cases."""
    by_op: dict[str, list[CaseResult]] = {}
    for result in results:
        by_op.setdefault(result.op, []).append(result)
    made = []
    for op, cases in by_op.items():
        bad = next((c for s in (Status.WRONG, Status.FAILED) for c in cases if c.status is s), None)
        n = {status: sum(c.status is status for c in cases) for status in Status}
        computed = [c for c in cases if c.error is not None and c.bound]
        worst = max(computed, key=lambda c: _over(c), default=None)
        if bad is not None:
            status, what = bad.status, f": {bad.message}" if bad.message else ""
            detail = f"{n[bad.status]} of {len(cases)} cases, first {bad.name} ({bad.node}){what}"
        else:
            status = Status.PASSED if n[Status.PASSED] else Status.UNSUPPORTED
            detail = f"{n[Status.PASSED]} of {len(cases)} cases" if n[Status.PASSED] else "no kernel"
            if n[Status.PASSED] and n[Status.UNSUPPORTED]:
                detail += f", {n[Status.UNSUPPORTED]} are for the CPU"
        shown = bad if bad is not None and bad.error is not None else worst
        error, bound = (None, None) if shown is None else (shown.error, shown.bound)
        made.append(Outcome("kernels", op, _RESULTS[status], detail, error, bound))
    return made


def _over(case: CaseResult) -> float:
    assert case.error is not None
    assert case.bound
    return case.error / case.bound


# -- times -----------------------------------------------------------------------


def _times(report: Report, device: Device, beside: str | None, tell: Progress) -> None:
    """Measure, unless the device has no times of its own."""
    if device.profile is not None or report.device == EMULATOR:
        kind = "a simulated" if device.profile is not None else "an emulated"
        report.outcomes.append(Outcome("times", "all", Result.SKIPPED, f"{kind} device has no times of its own"))
        return
    free, _ = device.memory()
    sizes = Sizes()
    if free and free < 1 << 30:
        sizes = Sizes(memory_bytes=max(free // 16, 1 << 20), n_expert=8, copy_bytes=Sizes().copy_bytes[:-1])
        report.notes.append(f"the device has {free >> 20} MiB free: smaller work was timed")
    backend = device.backend()
    rates: list[Rate] = []
    try:
        for rate in kernel_rates(backend, sizes):
            rates.append(rate)
            tell("times", rate.what, len(rates), None)
        copies = list(copy_rates(backend, sizes))
    except PyggmlError as error:
        report.outcomes.append(Outcome("times", "all", Result.FAILED, str(error)))
        return
    finally:
        backend.close()
    rates, report.peaks = with_shares(rates)
    report.slow = slow_kernels(rates)
    report.beside = _other(report.device) if beside is None else beside
    if report.beside:
        rates = _set_beside(report, rates, sizes, tell)
    report.rates = rates + copies
    report.outcomes.append(Outcome("times", "all", Result.PASSED, f"{len(report.rates)} measured"))


def _other(device: str) -> str:
    """Return ggml's own device for the same hardware, if the real library is there and has it."""
    kind, _, spec = device.partition(":")
    name = {"cuda": f"libggml:CUDA{spec or 0}", "cpu": "libggml:CPU"}.get(kind, "")
    if not name:
        return ""
    try:
        REGISTRY.open(name)
    except (DeviceUnavailableError, ImportError, OSError):
        return ""
    return name


def _set_beside(report: Report, rates: list[Rate], sizes: Sizes, tell: Progress) -> list[Rate]:
    """Return rates with the times of the other device for the same work."""
    from dataclasses import replace

    backend = None
    others: dict[str, float] = {}
    try:
        backend = REGISTRY.open(report.beside).backend()
        for rate in kernel_rates(backend, sizes):
            others[rate.what] = rate.seconds
            tell("times", f"{report.beside}: {rate.what}", len(others), None)
    except (PyggmlError, ImportError, OSError) as error:
        report.notes.append(f"{report.beside} could not be timed: {error}")
    finally:
        if backend is not None:
            backend.close()
    return [replace(rate, other_s=others.get(rate.what)) for rate in rates]
