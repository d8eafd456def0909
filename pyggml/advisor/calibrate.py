"""`calibrate`: predictions beside what llama-bench measured, and the machine that fits the measurements best.

Five numbers may move: arithmetic and memory of the cards, the link, memory and arithmetic of the host. Each is held
near what data sheets and fitted rates say, so that a number that no run depends on stays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FormatError
from ..files import read_text
from ..foresight import Machine, ModelShape, Setting, Speed, model_shape, speed_of
from ..foresight.estimate import Placed, place, predict
from ..types import Type

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["BenchRun", "Calibration", "Comparison", "calibrate", "compare_runs", "read_bench"]

#: What moves, in the order of the fit.
PARTS = ("card arithmetic", "card memory", "link", "host memory", "host arithmetic")
#: A measurement is trusted to 5 %, a machine's description to a factor of 1.5.
_MEASURED, _DESCRIBED = 0.05, math.log(1.5)
_ROUNDS, _STEP = 12, 1e-3


@dataclass(frozen=True, slots=True)
class BenchRun:
    """One row of `llama-bench -o json`.

    Attributes
    ----------
    n_prompt, n_generate, depth : int
        Tokens of the test; both kinds for ``-pg``.
    tokens_per_s : float
        Measured, the mean of repetitions.
    """

    n_prompt: int
    n_generate: int
    depth: int
    setting: Setting
    tokens_per_s: float
    label: str

    @property
    def test(self) -> str:
        """What llama-bench calls it."""
        parts = [f"pp{self.n_prompt}"] if self.n_prompt else []
        parts += [f"tg{self.n_generate}"] if self.n_generate else []
        return "+".join(parts) + (f" @ d{self.depth}" if self.depth else "")


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run beside its prediction."""

    run: BenchRun
    predicted: Speed

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted.mid / self.run.tokens_per_s

    @property
    def holds(self) -> bool:
        """Whether the measured speed is in the predicted range."""
        return self.predicted.low <= self.run.tokens_per_s <= self.predicted.high


@dataclass(frozen=True, slots=True)
class Calibration:
    """A machine that was fitted to runs.

    Attributes
    ----------
    factors : dict
        Of each of `PARTS`: what it was multiplied by.
    before, after : list of Comparison
        By the machine as described, and as fitted.
    left_out : list of float
        Of each run, predicted over measured by a machine that was fitted to all the others; empty for a single run.
    """

    machine: Machine
    factors: dict[str, float]
    before: list[Comparison]
    after: list[Comparison]
    left_out: list[float]


def read_bench(path: Path) -> list[BenchRun]:
    """Return the runs of `llama-bench -o json` or ``-o jsonl``.

    Raises
    ------
    FormatError
        The file cannot be read, is something else, or has no run with a speed.
    """
    hint = "write it with `llama-bench ... -o json > FILE`"
    text = read_text(path, hint=hint)
    try:
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(x) for x in text.splitlines() if x.strip()]
        )
        runs = [_run(row) for row in rows if row["avg_ts"] > 0]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"  # its repr may hold the whole file
        raise FormatError(str(path), f"is no JSON of llama-bench: {reason[:200]}", hint=hint) from None
    if not runs:
        raise FormatError(str(path), "has no run with a speed", hint=hint)
    return runs


def _run(row: dict[str, Any]) -> BenchRun:
    """Return the run of a row; fields that older builds lack have llama-bench's defaults."""
    n_gpu = int(row.get("n_gpu_layers", 99))
    said = row.get("tensor_buft_overrides") or ""
    overrides = () if said in ("none", "") else tuple(str(said).split(";"))
    n_cpu_moe = int(row.get("n_cpu_moe", 0))
    mode = str(row.get("load_mode", ""))
    pinned = mode in ("none", "mlock") if mode else not row.get("use_mmap", True)
    setting = Setting(
        n_gpu_layers=-1 if n_gpu >= 99 else n_gpu, n_cpu_moe=n_cpu_moe, overrides=overrides,
        n_ubatch=int(row.get("n_ubatch", 512)), n_batch=int(row.get("n_batch", 2048)), threads=int(row.get("n_threads", 0)),
        flash_attn=str(row.get("flash_attn", "0")).lower() in ("1", "true", "on", "auto", "-1"),
        type_k=Type.of(str(row.get("type_k", "f16"))), type_v=Type.of(str(row.get("type_v", "f16"))), is_pinned=bool(pinned),
        kv_offload=not row.get("no_kv_offload", False), op_offload=not row.get("no_op_offload", 0),
        backend=str(row.get("backends", "")), split_mode=str(row.get("split_mode", "layer")).replace("none", "layer"),
    )  # fmt: skip
    label = " ".join(
        f"{flag} {row[name]}"
        for flag, name, usual in (("-ngl", "n_gpu_layers", 99), ("-ncmoe", "n_cpu_moe", 0), ("-ub", "n_ubatch", 512),
                                  ("-fa", "flash_attn", None), ("-ctk", "type_k", "f16"))
        if name in row and usual is not None and row[name] != usual
    )  # fmt: skip
    return BenchRun(
        int(row["n_prompt"]), int(row["n_gen"]), int(row.get("n_depth", 0)), setting, float(row["avg_ts"]), label
    )  # fmt: skip


def compare_runs(model: str | ModelShape, machine: Machine, runs: Iterable[BenchRun]) -> list[Comparison]:
    """Return runs beside what is predicted of a model on a machine.

    Parameters
    ----------
    model : str or ModelShape
        A file, ``NAME[:QUANT]``, or what `model_shape` returned.
    """
    shape = model if isinstance(model, ModelShape) else model_shape(model)
    return [Comparison(run, _speed(shape, machine, run)) for run in runs]


def _speed(shape: ModelShape, machine: Machine, run: BenchRun) -> Speed:
    seconds = _seconds(shape, machine, run)
    is_prompt = bool(run.n_prompt)
    n, depth = (run.n_prompt, run.depth) if is_prompt else (run.n_generate, run.depth)
    alone = speed_of(shape, machine, run.setting, n, depth, is_prompt=is_prompt)
    return Speed.around((run.n_prompt + run.n_generate) / seconds, alone.high / alone.mid)


def _seconds(shape: ModelShape, machine: Machine, run: BenchRun, placed: list[Placed] | None = None) -> float:
    total = 0.0
    if run.n_prompt:
        total += run.n_prompt * predict(
            shape, machine, run.setting, run.n_prompt, run.depth, is_prompt=True, placed=placed
        )
    if run.n_generate:
        depth = run.depth + run.n_prompt
        total += run.n_generate * predict(
            shape, machine, run.setting, run.n_generate, depth, is_prompt=False, placed=placed
        )
    return total


def scaled(machine: Machine, factors: Sequence[float]) -> Machine:
    """Return a machine whose `PARTS` are faster by the given factors."""
    card, memory, link, read, cpu = factors
    cards = [
        replace(
            c, f32_per_s=card * c.f32_per_s, f16_per_s=card * c.f16_per_s, int8_per_s=card * c.int8_per_s,
            bytes_per_s=memory * c.bytes_per_s,
        )
        for c in machine.cards
    ]  # fmt: skip
    links = [replace(x, bytes_per_s=link * x.bytes_per_s) for x in machine.links]
    host = replace(
        machine.host, read_bytes_per_s=read * machine.host.read_bytes_per_s,
        product_per_s=cpu * machine.host.int8_per_s * machine.rates.cpu_product,
    )  # fmt: skip
    return replace(machine, cards=cards, links=links, host=host)


def calibrate(model: str | ModelShape, machine: Machine, runs: Sequence[BenchRun]) -> Calibration:
    """Fit a machine's rates to runs of a model on it.

    Parameters
    ----------
    model : str or ModelShape
        As for `compare_runs`.
    machine : Machine
        As described; `machine_of` makes one from names.
    runs : sequence of BenchRun
        Of this model on this machine, with as many different settings as there are: generation tells memory, prompts
        tell arithmetic, weights in host memory tell link and host.
    """
    shape = model if isinstance(model, ModelShape) else model_shape(model)
    where = [place(shape, run.setting, [c.memory_bytes for c in machine.cards]) for run in runs]

    def ratios(factors: Sequence[float], which: Sequence[int]) -> list[float]:
        made = scaled(machine, factors)
        return [
            math.log(
                (runs[i].n_prompt + runs[i].n_generate)
                / _seconds(shape, made, runs[i], where[i])
                / runs[i].tokens_per_s
            )
            for i in which
        ]

    def fitted(which: Sequence[int]) -> list[float]:
        """Return the factors of least squares, by Gauss and Newton with halved steps."""
        import numpy as np

        def error(u: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            return np.array(ratios([float(x) for x in np.exp(u)], which), np.float64)

        u = np.zeros(len(PARTS))
        now = error(u)
        cost = _cost(now, u)
        for _ in range(_ROUNDS):
            slope = np.stack([(error(u + _STEP * row) - now) / _STEP for row in np.eye(len(u))], axis=1)
            left = slope.T @ slope / _MEASURED**2 + np.eye(len(u)) / _DESCRIBED**2
            step = np.linalg.solve(left, -(slope.T @ now / _MEASURED**2 + u / _DESCRIBED**2))
            for _ in range(6):
                then = error(u + step)
                if _cost(then, u + step) < cost:
                    break
                step = step / 2
            else:
                break
            u, now, gain = u + step, then, cost - _cost(then, u + step)
            cost -= gain
            if gain < 1e-6:
                break
        return [float(x) for x in np.exp(u)]

    every = range(len(runs))
    factors = fitted(every)
    left_out = []
    if len(runs) > 1:
        for i in every:
            others = fitted([j for j in every if j != i])
            left_out.append(math.exp(ratios(others, [i])[0]))
    best = scaled(machine, factors)
    return Calibration(
        best, dict(zip(PARTS, factors, strict=True)), compare_runs(shape, machine, runs), compare_runs(shape, best, runs), left_out
    )  # fmt: skip


def _cost(errors: npt.NDArray[np.float64], u: npt.NDArray[np.float64]) -> float:
    return float((errors**2).sum() / _MEASURED**2 + (u**2).sum() / _DESCRIBED**2)
