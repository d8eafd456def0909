"""Predicted speeds and memory against published runs, of which a part was never used for a fit.

    python tests/bench/bench_foresight.py                       # the project's own facts
    python tests/bench/bench_foresight.py --runs FILE --memory-logs FILE --json

A run that cannot be predicted is counted under its reason. Classes: *seen*, a card that numbers were fitted with; *sheet*, a card known by
its data sheet only; *partial*, the link, the RAM's rate or the load mode is not stated and changes the answer, so that a default is
assumed: such runs are reported, never fitted, and left out of ``pp`` and ``tg``.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from memory_logs import Unpredicted, integer, memory_rows

from pyggml.catalog import find_model, parse_quant
from pyggml.cost import link_of
from pyggml.errors import PyggmlError
from pyggml.foresight.api import range_of
from pyggml.foresight.estimate import Machine, Placed, Setting, place, predict
from pyggml.foresight.shape import ModelShape
from pyggml.hardware.cards import Card, find_card
from pyggml.hardware.hosts import DEFAULT_HOST, READ_SHARE, Host, find_cpu
from pyggml.hardware.rates import RATES, Rates, n_fitted
from pyggml.types import Type

DATA = Path(__file__).parent / "data"
#: Cards of the runs that numbers were fitted with.
SEEN = {
    "rtx3090", "rtx3060", "quadrortx5000", "b70", "r9700", "rx7900xtx", "8060s", "rtx3070", "rtx4090", "a100", "m2ultra",
    "rtx3090ti", "rtxa6000", "rtxpro6000", "rtx5090", "b580", "rtx4090d", "rtx5070", "rx7900xt", "rtx4070", "mi60",
    "rtx3080ti", "gb10",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A run as the clock takes it."""

    model: ModelShape
    machine: Machine
    setting: Setting
    n_prompt: int
    n_gen: int
    depth: int
    gen_depth: int
    partial_pp: bool
    partial_tg: bool
    is_seen: bool
    placed: list[Placed]


@lru_cache(maxsize=256)
def model_of(name: str, quant: str, gib: float | None) -> ModelShape:
    """Return the shape of a model as a run names it."""
    sizes = find_model(name)
    if sizes is None:
        raise Unpredicted("unknown model")
    quant = quant or sizes.quant
    if sizes.arch == "gpt-oss" and quant.upper().startswith(("F16", "BF16", "UD-", "Q4_K")):
        quant = "MXFP4"
    try:
        parse_quant(quant)
    except PyggmlError:
        raise Unpredicted("unknown quantisation") from None
    return ModelShape.from_sizes(sizes, quant, file_bytes=None if gib is None else gib * 2**30)


def is_pinned(row: dict[str, Any]) -> bool | None:
    """Return whether host weights are in pinned memory; None if nothing says so.

    Notes
    -----
    ``--no-mmap`` and ``-lm none`` read weights into pinned buffers; ``--mlock`` does, too, as it is not mapped in the measured builds;
    mapped files are pageable.
    """
    mode, flags = str(row.get("mmap") or "").lower(), str(row.get("flags") or "").lower()
    if "register_host=1" in flags:
        return True
    if "register_host=0" in flags:
        return False
    if (
        re.search(r"\b(none|mlock)\b", mode)
        or mode in ("0", "false", "no")
        or re.search(r"--no-mmap|-mmp 0|--mlock|-lm (none|mlock)|--load-mode (none|mlock)", flags)
    ):
        return True
    if mode or re.search(r"mmap|-lm |--load-mode", flags):
        return False
    return None


def host_of(row: dict[str, Any]) -> tuple[Host, bool]:
    """Return the host of a run, and whether the rate of its memory is known."""
    cpu, ram = str(row.get("cpu") or ""), str(row.get("ram") or "")
    cores, isa = find_cpu(cpu)
    measured = row.get("mem_bw_measured_gbs")
    rate = measured * 1e9 if measured else memory_rate(ram)
    is_desktop = isa is not None and not re.search(r"epyc|xeon|threadripper|gold|platinum", cpu.lower())
    known = rate is not None and (bool(measured) or is_desktop or "channel" in ram or "bit" in ram)
    size = re.search(r"(\d+(?:\.\d+)?) ?gi?b", ram.lower())
    threads = integer(row.get("threads"), 0)
    return Host(
        rate or DEFAULT_HOST.read_bytes_per_s, cores or (threads if threads > 1 else DEFAULT_HOST.n_cores),
        isa or "avx2", int(float(size[1]) * 2**30) if size else 0,
    ), known  # fmt: skip


def has_flash(row: dict[str, Any]) -> bool:
    """Whether flash attention is on; without a flag it is from September 2025 on, when ``auto`` became the default."""
    said = str(row.get("fa") if row.get("fa") is not None else "").lower()
    if said:
        return said in ("1", "on", "true", "auto")
    flags = str(row.get("flags") or "")
    if re.search(r"-fa( |$)|-fa (1|on)|--flash-attn", flags):
        return True
    return str(row.get("date") or "2026") >= "2025-09"


def cache_type(row: dict[str, Any], which: str) -> Type:
    """Return the type of K's or V's cache, by the field ``ctk`` or ``ctv`` or by the flags."""
    said = re.search(rf"(?:-ct{which}|--cache-type-{which})[ =](\w+)", str(row.get("flags") or ""))
    return Type.of(str(row.get(f"ct{which}") or (said[1] if said else "f16")))


def overrides_of(flags: str) -> tuple[str, ...]:
    """Return what ``-ot`` says."""
    found = re.findall(r"(?:-ot|--override-tensor)[ =]+(?:\"([^\"]*)\"|'([^']*)'|(\S+))", flags)
    return tuple("".join(group) for group in found)


def case_of(row: dict[str, Any], rates: Rates = RATES) -> Case:
    """Return a run as the clock takes it.

    Raises
    ------
    Unpredicted
        With the reason.
    """
    engine = str(row.get("engine") or "").lower()
    if not engine.startswith("llama.cpp") or "fork" in engine:
        raise Unpredicted("engine")
    flags = str(row.get("flags") or "")
    backend = str(row.get("backend") or "")
    if "UNIFIED_MEMORY" in backend or "unified memory" in flags:
        raise Unpredicted("unified memory of the driver")
    if row.get("gpus") is None:
        raise Unpredicted("hardware not named")
    cards: list[Card] = []
    for gpu in row["gpus"]:
        card = find_card(str(gpu.get("name") or ""), gpu.get("vram_gib"))
        if card is None:
            raise Unpredicted("unknown card")
        cards.append(card)
    if "-sm none" in flags:
        cards = cards[:1]
    model = model_of(str(row.get("model") or ""), str(row.get("quant") or ""), row.get("model_size_gib"))
    host, knows_ram = host_of(row)
    pinned = is_pinned(row)
    links = [link_of(card, str(row.get("pcie") or ""), row.get("h2d_measured_gbs")) for card in cards]
    ngl = row.get("ngl")
    n_ubatch = integer(row.get("ub"), 512)
    setting = Setting(
        n_gpu_layers=-1 if ngl is None else integer(ngl, -1) if integer(ngl, -1) <= len(model.layers) else -1,
        n_cpu_moe=len(model.layers) if re.search(r"--cpu-moe|-cmoe", flags) else integer(row.get("ncmoe"), 0),
        overrides=overrides_of(flags),
        n_ubatch=n_ubatch,
        n_batch=max(integer(row.get("b"), max(2048, n_ubatch)), 1),
        threads=integer(row.get("threads"), 0),
        flash_attn=has_flash(row),
        type_k=cache_type(row, "k"),
        type_v=cache_type(row, "v"),
        is_pinned=bool(pinned),
        kv_offload=not re.search(r"-nkvo 1|--no-kv-offload|-nkvo(?! 0)", flags),
        op_offload="--no-op-offload" not in flags,
        no_gpu=not cards or backend.lower() == "cpu",
        backend=backend,
        split_mode=said[1] if (said := re.search(r"(?:-sm|--split-mode) (row|tensor)", flags)) else "layer",
    )  # fmt: skip
    tool = str(row.get("tool") or "")
    n_prompt, n_gen = integer(row.get("n_prompt"), 0), integer(row.get("n_gen"), 128)
    is_chat = "server" in tool or "main" in tool
    depth = 0 if is_chat else integer(row.get("ctx_or_depth"), 0)
    placed = place(model, setting, [c.memory_bytes for c in cards])
    on_host = host_weight_bytes(placed) if setting.kv_offload else model.total_bytes
    if setting.kv_offload:
        check_fit(model, setting, cards, host, on_host)
    is_shared = bool(cards) and cards[0].is_unified
    no_link = bool(cards) and not is_shared and row.get("pcie") is None and not row.get("h2d_measured_gbs")
    no_mode = pinned is None and "bench" not in tool
    tiny = on_host < 0.01 * model.total_bytes
    return Case(
        model, Machine(cards, links, host, rates), setting, n_prompt, n_gen, depth, depth + (n_prompt if is_chat else 0),
        partial_pp=not tiny and bool(cards) and (no_link or no_mode or (not pinned and not knows_ram)),
        partial_tg=not tiny and not knows_ram,
        is_seen=all(c.name in SEEN for c in cards), placed=placed,
    )  # fmt: skip


def host_weight_bytes(placed: list[Placed]) -> int:
    """Return the bytes of host weights of layers."""
    total = 0
    for p in placed:
        others = p.layer.other_bytes if p.device < 0 else sum(x.nbytes for x in p.others_on_host)
        total += p.count * ((p.layer.expert_bytes if p.experts_on_host else 0) + others)
    return total


def memory_rate(text: str) -> float | None:
    """Return the bytes/s of memory described as people write it; None if the type is not stated."""
    low = text.lower()
    found = re.search(r"(l?p?ddr[345]x?)[- ](?:at )?(\d{4,5})", low)
    if found is None:
        return None
    wide = re.search(r"(\d+)[- ]bit", low)
    n_channels = re.search(r"(\d+)[- ]channel", low)
    bits = int(wide[1]) if wide else 64 * (int(n_channels[1]) if n_channels else 2)
    return READ_SHARE * int(found[2]) * 1e6 * bits / 8


def check_fit(model: ModelShape, s: Setting, cards: list[Card], host: Host, on_host: int) -> None:
    """Refuse what has not enough memory: it pages, or reads from the disk."""
    if cards and not s.no_gpu and not cards[0].is_unified:
        on_cards = model.total_bytes - model.table_bytes - on_host
        if on_cards > sum(c.memory_bytes for c in cards):
            raise Unpredicted("does not fit in device memory")
    if host.memory_bytes and on_host > host.memory_bytes:
        raise Unpredicted("does not fit in host memory")


@dataclass
class Result:
    """A predicted speed beside the measured one."""

    row: dict[str, Any]
    kind: str
    klass: str
    predicted: float
    measured: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """How far apart, the same both ways."""
        return math.exp(abs(math.log(self.predicted / self.measured))) - 1


def results_of(rows: Iterable[dict[str, Any]], rates: Rates = RATES) -> tuple[list[Result], Counter[str]]:
    """Return what was predicted, and why other runs were not."""
    out: list[Result] = []
    why: Counter[str] = Counter()
    for row in rows:
        if not (row.get("pp_tps") or row.get("tg_tps")):
            why["nothing measured"] += 1
            continue
        try:
            case = case_of(row, rates)
            for kind, measured in (("pp", row.get("pp_tps")), ("tg", row.get("tg_tps"))):
                if not measured or measured <= 0 or (kind == "pp" and not case.n_prompt):
                    continue
                is_prompt = kind == "pp"
                seconds = predict(
                    case.model, case.machine, case.setting, case.n_prompt if is_prompt else max(case.n_gen, 1),
                    case.depth if is_prompt else case.gen_depth, is_prompt=is_prompt,
                )  # fmt: skip
                partial = case.partial_pp if is_prompt else case.partial_tg
                klass = "partial" if partial else "seen" if case.is_seen else "sheet"
                factor = range_of(case.machine, case.setting, case.placed, is_prompt=is_prompt)
                out.append(Result(row, kind, klass, 1 / seconds, measured, 1 / seconds / factor, factor / seconds))
        except Unpredicted as reason:
            why[str(reason)] += 1
        except Exception as error:  # noqa: BLE001  # one strange run must not end the benchmark
            why[f"not understood: {type(error).__name__}"] += 1
    return out, why


def quantile(values: list[float], share: float) -> float | None:
    """Return the value below which a share of all lie."""
    if not values:
        return None
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def summary(results: list[Result]) -> dict[str, Any]:
    """Return the errors of predictions."""
    errors = [r.error for r in results]
    return {
        "n": len(results),
        "median_error": quantile(errors, 0.5),
        "p90_error": quantile(errors, 0.9),
        "median_ratio": quantile([r.predicted / r.measured for r in results], 0.5),
    }


_SAME = (
    "series", "engine", "build", "model", "quant", "gpus", "cpu", "ram", "backend", "n_prompt", "n_gen", "ctx_or_depth",
)  # fmt: skip
_SWEPT = ("ub", "b", "ncmoe", "ngl", "fa", "mmap", "ctk", "ctv", "threads")


def sweeps(results: list[Result]) -> list[dict[str, Any]]:
    """Return the sweeps among predictions: what `pyggml plan` would choose, and how much slower that is."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for r in results:
        key = (r.kind, *(json.dumps(r.row.get(name), sort_keys=True) for name in _SAME))
        groups.setdefault(key, []).append(r)
    out = []
    for key, members in groups.items():
        settings = {
            (*(str(m.row.get(n)) for n in _SWEPT), tuple(re.findall(r"-sm \w+", str(m.row.get("flags")))))
            for m in members
        }
        speeds = [m.measured for m in members]
        if len(settings) < 3 or max(speeds) / min(speeds) < 1.10:
            continue
        chosen = min(members, key=_as_plan_chooses)
        out.append(
            {
                "series": members[0].row.get("series"), "kind": key[0], "n": len(members), "class": chosen.klass,
                "chosen": chosen.row.get("id"), "regret": max(speeds) / chosen.measured - 1,
                "rank_correlation": rank_correlation([m.predicted for m in members], speeds),
            }
        )  # fmt: skip
    return out


def _as_plan_chooses(r: Result) -> tuple[int, bool, bool, int]:
    """Return what `plan` orders by: times in steps of half a per cent, then the plainer setting."""
    row = r.row
    plain = str(row.get("ctk") or "f16") != "f16", row.get("mmap") in (False, 0, "0"), int(row.get("ub") or 512)
    return round(200 * math.log(1.0 / r.predicted)), *plain


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Return Spearman's coefficient; equal values share their rank."""

    def ranks(values: list[float]) -> list[float]:
        return [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]

    x, y = ranks(a), ranks(b)
    mean = (len(a) - 1) / 2
    cov = sum((i - mean) * (j - mean) for i, j in zip(x, y, strict=True))
    var = sum((i - mean) ** 2 for i in x) * sum((j - mean) ** 2 for j in y)
    return cov / math.sqrt(var) if var else 0.0


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file, one a line; a line that is none is told and left out."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            print(f"{path}:{number}: not a JSON object, left out", file=sys.stderr)
    return rows


# -- the program ---------------------------------------------------------------


def report(rows: list[dict[str, Any]], logs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return everything that the benchmark tells."""
    results, why = results_of(rows)
    swept = sweeps(results)
    judged = [r for r in results if r.klass != "partial"]
    regrets = [s["regret"] for s in swept]
    memory, memory_why = memory_rows(logs)
    errors = [m["error"] for m in memory]
    inside = [r.low <= r.measured <= r.high for r in judged]
    return {
        **{kind: summary([r for r in judged if r.kind == kind]) for kind in ("pp", "tg")},
        "classes": {
            klass: {kind: summary([r for r in results if r.klass == klass and r.kind == kind]) for kind in ("pp", "tg")}
            for klass in ("seen", "sheet", "partial")
        },
        "regret": {"n": len(regrets), "median": quantile(regrets, 0.5), "worst": max(regrets, default=None)},
        "coverage_80": sum(inside) / len(inside) if inside else None,
        "range_ratio": quantile([r.high / r.low for r in judged], 0.5),
        "memory": {
            "n": len(errors), "median_error": quantile(errors, 0.5),
            "exact": sum(abs(m["predicted"] - m["logged"]) < 0.01 for m in memory), "rows": memory,
            "unpredicted": dict(memory_why),
        },
        "unpredicted": dict(why),
        "parameters": n_fitted(),
        "sweeps": swept,
        "rows": [
            {
                "id": r.row.get("id"), "series": r.row.get("series"), "kind": r.kind, "class": r.klass,
                "predicted": r.predicted, "low": r.low, "high": r.high, "measured": r.measured, "error": r.error,
            }
            for r in results
        ],
    }  # fmt: skip


def show(out: dict[str, Any]) -> None:
    """Print the report for people."""
    series: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in out["rows"]:
        series.setdefault((str(row["series"]), row["kind"], row["class"]), []).append(row)
    print(f"{'series':44} kind class    n  median   worst  ratio")
    for (name, kind, klass), rows in series.items():
        errors = [r["error"] for r in rows]
        ratio = quantile([r["predicted"] / r["measured"] for r in rows], 0.5)
        print(
            f"{name[:44]:44} {kind}   {klass:7} {len(rows):2} {quantile(errors, 0.5):7.0%} {max(errors):7.0%} {ratio:6.2f}"
        )
    print()
    for s in out["sweeps"]:
        print(
            f"sweep {s['series'][:38]:38} {s['kind']} {s['n']:2} settings: regret {s['regret']:.1%}, rank correlation {s['rank_correlation']:.2f}"
        )
    print()
    for klass, kinds in (("seen and sheet", out), *out["classes"].items()):
        for kind in ("pp", "tg"):
            s = kinds[kind]
            if s["n"]:
                print(
                    f"{klass:14} {kind}: n {s['n']:3}, median {s['median_error']:.1%}, 90th {s['p90_error']:.1%}, ratio {s['median_ratio']:.2f}"
                )
    r, m = out["regret"], out["memory"]
    if r["n"]:
        print(f"regret of {r['n']} sweeps: median {r['median']:.1%}, worst {r['worst']:.1%}")
    if out["coverage_80"] is not None:
        print(f"ranges hold {out['coverage_80']:.0%}, high over low {out['range_ratio']:.2f}")
    if m["n"]:
        print(f"memory: {m['n']} buffers, median {m['median_error']:.2%}, {m['exact']} exact")
    print(f"fitted numbers: {out['parameters']}; not predicted: {out['unpredicted']}")


def main(args: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=DATA / "foresight_runs.jsonl")
    parser.add_argument("--memory-logs", type=Path, default=None)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(args)
    own = DATA / "foresight_memory.jsonl"
    logs_path = given.memory_logs or (own if own.exists() else None)
    try:
        rows = read_lines(given.runs)
        logs = read_lines(logs_path) if logs_path else []
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    out = report(rows, logs)
    if given.json:
        print(json.dumps(out, indent=1))
    else:
        show(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
