"""Fit the rates of `pyggml.hardware.rates` to published runs, and show errors of runs that a fit has not seen.

    python tests/bench/fit_foresight.py                   # fit, print the numbers and their errors
    python tests/bench/fit_foresight.py --leave-out series
    python tests/bench/fit_foresight.py --leave-out card

Needs scipy. A residual is the logarithm of predicted over measured; residuals above 15 % count as their root, so that a run under a broken
driver does not bend the rest; runs of one series share their weight, and a run of trust C has 0.4 of it. Each number is held near
its start, which is what data sheets and other measurements say of it. Runs of the class *partial* are never fitted.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from bench_foresight import DATA, Case, Unpredicted, case_of, read_lines, results_of, sweeps

from pyggml.foresight.api import range_of
from pyggml.foresight.estimate import Machine, predict
from pyggml.hardware.formulas import backend_family
from pyggml.hardware.rates import RATES, Family, Rates

#: Where each number starts, and what it is drawn back to.
START = Rates(
    cuda=Family(0.30, 0.88, 10.0, 1.6e-6, 0.5), rocm=Family(0.70, 0.86, 40.0, 3.5e-6, 0.2),
    vulkan=Family(0.28, 0.80, 30.0, 4e-6, 0.05), metal=Family(0.65, 0.85, 10.0, 3e-6, 0.3), half=0.45, half_metal=0.8,
    dp4a=0.40, scalar=10.0, few=6.0, few_half=12.0, kv=0.45, state=0.06, passes=1.0, expert_passes=3.0, cpu_read=200e9,
    cpu_few=1.0, cpu_product=0.4, cpu_attention=0.03, cpu_attention_few=0.04, switch_s=60e-6, slow_host=12.0, pageable=0.5, pipeline=0.4, spread=1.2,
)  # fmt: skip
#: Numbers that generation is fitted with; the others belong to prompts.
_GENERATION = {"memory", "cpu_read", "launch_s", "few", "few_half", "kv"} | {
    "cpu_few",
    "cpu_attention_few",
    "switch_s",
    "slow_host",
}
_NAMES = [
    (f.name, g.name) if isinstance(getattr(START, f.name), Family) else (f.name, "")
    for f in fields(START)
    for g in (fields(Family) if isinstance(getattr(START, f.name), Family) else fields(START)[:1])
]
_PRIOR, _BEND, _MAX_MEMORY = 0.15, 0.15, 0.95


@dataclass(frozen=True)
class Item:
    """A speed that was measured."""

    row: dict[str, Any]
    kind: str
    case: Case
    measured: float

    @property
    def factor(self) -> float:
        """How far the range of the prediction goes, up and down."""
        return range_of(self.case.machine, self.case.setting, self.case.placed, is_prompt=self.kind == "pp")

    def log_ratio(self, rates: Rates) -> float:
        """Return the logarithm of predicted over measured."""
        c, is_prompt = self.case, self.kind == "pp"
        machine = Machine(c.machine.cards, c.machine.links, c.machine.host, rates)
        n, depth = (c.n_prompt, c.depth) if is_prompt else (max(c.n_gen, 1), c.gen_depth)
        return -float(np.log(predict(c.model, machine, c.setting, n, depth, is_prompt=is_prompt) * self.measured))


def items_of(rows: list[dict[str, Any]]) -> list[Item]:
    """Return the speeds that may be fitted."""
    out = []
    for row in rows:
        try:
            case = case_of(row)
        except Unpredicted:
            continue
        if row.get("pp_tps") and case.n_prompt and not case.partial_pp:
            out.append(Item(row, "pp", case, row["pp_tps"]))
        if row.get("tg_tps") and not case.partial_tg:
            out.append(Item(row, "tg", case, row["tg_tps"]))
    return out


def numbers(rates: Rates) -> np.ndarray:
    """Return the numbers in a row."""
    return np.array([getattr(getattr(rates, a), b) if b else getattr(rates, a) for a, b in _NAMES])


def rates_of(values: np.ndarray) -> Rates:
    """Return the rates of numbers in a row."""
    named: dict[str, Any] = {}
    for (a, b), value in zip(_NAMES, values, strict=True):
        if b:
            named.setdefault(a, {})[b] = float(value)
        else:
            named[a] = float(value)
    return Rates(**{a: Family(**v) if isinstance(v, dict) else v for a, v in named.items()})


def fit(items: list[Item], start: np.ndarray, *, rounds: int = 2, n_steps: int = 12) -> np.ndarray:
    """Return the fitted numbers: those of generation and those of prompts in turn."""
    from scipy.optimize import least_squares

    x, origin = start.copy(), numbers(START)
    for _ in range(rounds):
        for kind in ("tg", "pp"):
            own = [item for item in items if item.kind == kind]
            free = [i for i, (a, b) in enumerate(_NAMES) if ((b or a) in _GENERATION) == (kind == "tg")]
            n = Counter(item.row["series"] for item in own)
            weight = np.array([n[i.row["series"]] ** -0.4 * (0.4 if i.row.get("trust") == "C" else 1.0) for i in own])
            center = np.log(origin[free])

            def residuals(u: np.ndarray) -> np.ndarray:
                y = x.copy()  # used before the loop goes on
                y[free] = np.exp(u)  # noqa: B023
                rates = rates_of(y)
                e = np.array([item.log_ratio(rates) for item in own])  # noqa: B023
                size = np.minimum(np.abs(e), 1.0)
                bent = np.where(size < _BEND, size, np.sqrt(np.maximum(2 * _BEND * size - _BEND**2, 1e-9)))
                return np.concatenate([weight * bent * np.sign(e), _PRIOR * (u - center)])  # noqa: B023

            high = center + 1.3
            for k, i in enumerate(free):
                if _NAMES[i][1] == "memory":
                    high[k] = np.log(_MAX_MEMORY)
            first = np.clip(np.log(x[free]), center - 1.29, high - 1e-3)
            found = least_squares(residuals, first, max_nfev=n_steps, diff_step=1e-3, bounds=(center - 1.3, high))
            x[free] = np.exp(found.x)
    return x


def show(title: str, items: list[Item], ratios: list[float]) -> None:
    """Print the errors of prompts and of generation, and how many ranges hold."""
    for kind in ("pp", "tg"):
        own = [(item, r) for item, r in zip(items, ratios, strict=True) if item.kind == kind]
        if own:
            errors = [np.exp(abs(r)) - 1 for _, r in own]
            inside = np.mean([abs(r) <= np.log(item.factor) for item, r in own])
            print(
                f"{title} {kind}: n {len(errors)}, median {np.median(errors):.1%}, 90th {np.quantile(errors, 0.9):.1%}, "
                f"ranges hold {inside:.0%} at a median of high over low of {np.median([i.factor**2 for i, _ in own]):.2f}",
                flush=True,
            )


def show_families(items: list[Item], ratios: list[float]) -> None:
    """Print the factors that 80 % stay within, by family of kernels: what `pyggml.hardware.ranges` is made of."""
    groups: dict[str, list[float]] = {}
    for item, r in zip(items, ratios, strict=True):
        cards = item.case.machine.cards
        family = backend_family(cards[0], item.case.setting.backend).partition("-")[0] if cards else "cpu"
        groups.setdefault(f"{item.kind} {family}", []).append(abs(r))
    for name, own in sorted(groups.items()):
        print(f"{name}: n {len(own)}, 80 % within a factor of {np.exp(np.quantile(own, 0.8)):.2f}")


def show_regrets(rows: list[dict[str, Any]], items: list[Item]) -> None:
    """Print what `plan` would lose in each sweep of flags, with rates that were fitted without the sweep's series."""
    regrets: list[float] = []
    for series in sorted({s["series"] for s in sweeps(results_of(rows)[0])}):
        others = [i for i in items if i.row["series"] != series]
        rates = RATES if len(others) == len(items) else rates_of(fit(others, numbers(RATES), rounds=1, n_steps=5))
        found = sweeps(results_of([r for r in rows if r.get("series") == series], rates)[0])
        regrets += [s["regret"] for s in found]
        told = ", ".join(f"{s['kind']} {s['regret']:.1%}" for s in found)
        print(f"{series} ({len(items) - len(others)} of its speeds were fitted): {told}", flush=True)
    print(f"{len(regrets)} sweeps: median {float(np.median(regrets)):.1%}, worst {max(regrets):.1%}")


def main() -> int:
    """Fit, or leave out and fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=DATA / "foresight_runs.jsonl")
    parser.add_argument("--leave-out", choices=["series", "card"])
    parser.add_argument(
        "--sweeps", action="store_true", help="only: what is lost in each sweep if its series is left out"
    )
    given = parser.parse_args()
    rows = read_lines(given.runs)
    items = items_of(rows)
    if given.sweeps:
        show_regrets(rows, items)
        return 0
    if given.leave_out is None:
        rates = rates_of(fit(items, numbers(START)))
        print(rates)
        show("fitted", items, [i.log_ratio(rates) for i in items])
        return 0
    groups: dict[str, list[Item]] = {}
    for item in items:
        cards = "+".join(sorted({c.name for c in item.case.machine.cards})) or "cpu"
        groups.setdefault(item.row["series"] if given.leave_out == "series" else cards, []).append(item)
    left_out: list[Item] = []
    ratios: list[float] = []
    for name, held in groups.items():
        others = [item for item in items if item not in held]
        rates = rates_of(fit(others, numbers(RATES), rounds=1, n_steps=5))
        own = [i.log_ratio(rates) for i in held]
        show(name, held, own)
        left_out, ratios = left_out + held, ratios + own
    show(f"leave one {given.leave_out} out,", left_out, ratios)
    show_families(left_out, ratios)
    for item, r in zip(left_out, ratios, strict=True):
        if abs(r) > np.log(1.3):
            print(f"{item.kind} {item.row.get('id')}: {np.exp(r):.2f} times what was measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
