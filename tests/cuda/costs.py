"""What each kernel costs: counts from the emulator on fixed work, registers from ptxas; kept in ``costs.json``.

``python tests/cuda/costs.py [KERNEL ...]`` measures anew, and writes ``costs.json`` and the tables of ``docs/cuda.md``. Do
so, with a reason in the commit, when a change makes a kernel dearer on purpose.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from emulated_card import FLOATS, Card, mul_mat_id_case
from pyggml.kernels.cuda import compiler, launch, rows

HERE = Path(__file__).parent
COSTS = HERE / "costs.json"
PAGE = HERE.parent.parent / "docs" / "cuda.md"
#: what counts are taken on
CC = (8, 6)
#: one token, as ggml's counts below; and the work of the emulator's example tile
FEW = {"n_expert": 8, "n_row": 64, "n_k": 2048, "n_used": 4, "n_token": 1}
MANY = {"n_expert": 8, "n_row": 256, "n_k": 256, "n_used": 2, "n_token": 64}
#: ggml 0.21's own kernels on FEW, compiled for cc 8.6 and counted in the same emulator: warp instructions, sectors
GGML = {"mmvq_q8_0": (178_944, 144_384), "mmvq_mxfp4": (194_816, 173_568)}
#: fused multiply-adds per instruction of the example tile (fast_tile.py) on MANY
EXAMPLE_RATIO = 0.785
#: of a multiprocessor of cc 8.6: registers, warps, blocks, bytes of shared memory
SM = (65536, 48, 16, 100 * 1024)


def find_ptxas() -> str | None:
    """Return the assembler: the one of the test extra, or the system's."""
    for folder in map(Path, sys.path):
        found = folder / "nvidia" / "cu13" / "bin" / "ptxas"
        if found.exists():
            if not os.access(found, os.X_OK):
                continue
            return str(found)
    return shutil.which("ptxas")


def resources(name: str, cc: tuple[int, int]) -> dict[str, int]:
    """Assemble a kernel; return registers, shared memory, stack and spilled bytes, and external functions."""
    text = compiler.ptx(name, cc).text
    ptxas = find_ptxas()
    assert ptxas is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(text)
        command = [ptxas, "-v", f"-arch=sm_{cc[0]}{cc[1]}", "-o", f"{folder}/kernel.cubin", str(source)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    number = lambda pattern: int(found[1]) if (found := re.search(pattern, out)) else 0
    return {
        "registers": number(r"Used (\d+) registers"),
        "shared": number(r"(\d+) bytes smem"),
        "stack": number(r"(\d+) bytes stack frame"),
        "spilled": number(r"(\d+) bytes spill stores"),
        "external": text.count(".extern .func"),
    }


def occupancy(registers: int, shared: int, threads: int) -> float:
    """Return the part of a multiprocessor's warps that can be resident (cc 8.6)."""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    limits = [SM[2], SM[1] // warps, SM[0] // (per_warp * warps)]
    if shared:
        limits.append(SM[3] // (shared + 1024))
    return min(limits) * warps / SM[1]


def _row_work(name: str, card: Card) -> int:
    """Run a kernel that works by rows on 64 rows of 512; return its useful bytes."""
    rng = np.random.default_rng(0)
    lead = 4 if name.endswith("_any") else 0
    x, y = (card.operand(rng.standard_normal((64, 512)).astype("f4"), lead=lead) for _ in range(2))
    dst = card.result(512, 64)
    base = name.removesuffix("_any")
    nbytes = 64 * 512 * 4
    if base == "scale":
        card.run(launch.scale(x, dst, 2.0, 1.0))
        return 2 * nbytes
    if base.startswith("copy"):
        types = [{"f32": (4, "f4"), "f16": (2, "f2")}[part] for part in base.split("_")[1:]]
        src, to = (card.operand(np.ones((64, 512), d), base.split("_")[i + 1]) for i, (_, d) in enumerate(types))
        card.run(launch.copy(src, to))
        return 64 * 512 * (types[0][0] + types[1][0])
    if base.startswith("set_rows"):
        type = base.removeprefix("set_rows_")
        to = card.operand(np.ones((64, 512), "f4" if type == "f32" else "f2"), type)
        card.run(launch.set_rows(x, card.operand(np.arange(64), "i64"), to))
        return nbytes + 64 * 512 * (4 if type == "f32" else 2)
    if base.startswith("get_rows"):
        type = base.removeprefix("get_rows_")
        src = card.operand(np.ones((64, 512), "f4" if type in ("f32", "i32") else "f2"), type)
        card.run(launch.get_rows(src, card.operand(np.arange(64, dtype="i4"), "i32"), dst))
        return nbytes + 64 * 512 * (4 if type in ("f32", "i32") else 2)
    if base in ("rms_norm", "sum_rows", "argsort"):
        extra = {"rms_norm": {"eps": 1e-5}, "argsort": {"descending": True}}.get(base, {})
        to = {"sum_rows": card.result(1, 64), "argsort": card.result(512, 64, type="i32")}.get(base, dst)
        card.run(getattr(launch, base)(x, to, **extra))
        return nbytes + (256 if base == "sum_rows" else nbytes)
    if base.startswith("soft_max"):
        type = base.removeprefix("soft_max_")
        mask = None if type == "none" else card.operand(np.zeros((64, 512), "f4" if type == "f32" else "f2"), type)
        card.run(launch.soft_max(x, mask, None, dst, 0.5, 0.0))
        return 2 * nbytes + {"none": 0, "f32": nbytes, "f16": nbytes // 2}[type]
    if base.startswith("rope"):
        type = base.removeprefix("rope_")
        at = card.operand(np.arange(64, dtype="i4"), "i32")
        values = card.operand(np.ones((64, 1, 512), "f4" if type == "f32" else "f2"), type)
        card.run(launch.rope(values, at, None, values, launch.Rope(512, True, 4096, 1e4, 1.0, 0.0, 1.0, 32.0, 1.0)))
        return 2 * nbytes if type == "f32" else nbytes
    if base in rows.UNARY:
        card.run(launch.unary(base, x, dst, -1.0, 1.0))
        return 2 * nbytes
    if base == "add_id":
        ids = card.operand(np.zeros((1, 64), "i4"), "i32", ne=(64, 1))
        card.run(launch.add_id(x, y, ids, dst))
        return 2 * nbytes + 2048
    if base in ("add", "sub", "mul", "div"):
        card.run(launch.binary(base, x, y, dst))
    else:
        card.run(launch.glu(base, x, y, dst, 1.0, 7.0))
    return 3 * nbytes


def _product_work(name: str, card: Card) -> int:
    """Run a matrix product; return its useful bytes: used weights, activations and results, once each."""
    kind, _, type = name.partition("_")
    type = type.removesuffix("_any").removesuffix("_odd")
    work = dict(MANY if kind == "tile" else FEW)
    lead = 0
    if name.endswith("_any"):
        lead = 4
    if name.endswith("_odd"):
        work["n_k"] += 32
    mul_mat_id_case(np.random.default_rng(0), card, type, **work, lead=lead)
    stats = card.stats[name]
    assert stats.warp_instructions
    block, size = {"f32": (1, 4), "f16": (1, 2), "bf16": (1, 2)}.get(type) or (
        launch.FORMATS[type].block_values,
        launch.FORMATS[type].block_bytes,
    )
    n_used = work["n_expert"] if kind == "tile" else work["n_used"]
    y_bytes = work["n_k"] * work["n_token"] * (4 if type in FLOATS else 1.25)
    out = work["n_row"] * work["n_used"] * work["n_token"] * 4
    return int(n_used * work["n_row"] * work["n_k"] // block * size + y_bytes + out)


def counts(name: str) -> dict[str, float]:
    """Run a kernel on its fixed work and return its counts."""
    card = Card(CC)
    if name in ("group_ids", "fill_ids") or name.startswith("quantize"):
        type = "q8_0"
        lead = 4 if name.endswith("_any") else 0
        if name == "fill_ids":
            card.run([launch.Launch(name, (1, 1, 1), (256, 1, 1), (card.mem.alloc(4 * 64).addr, 64, 2))])
            useful = 256
        else:
            mul_mat_id_case(np.random.default_rng(0), card, type, **MANY, lead=lead)
            n = MANY["n_token"] * MANY["n_used"]
            useful = 3 * 4 * n if name == "group_ids" else int(MANY["n_token"] * MANY["n_k"] * 5.25)
    elif name.split("_")[0] in ("mmvq", "mmv", "tile"):
        useful = _product_work(name, card)
    else:
        useful = _row_work(name, card)
    s = card.stats[name]
    sectors = s.global_load_sectors + s.global_store_sectors
    requests = s.shared_load_requests + s.shared_store_requests
    wavefronts = s.shared_load_wavefronts + s.shared_store_wavefronts
    multiply = s.by_opcode["dp4a"] + s.by_opcode["fma"]
    return {
        "instructions": s.warp_instructions,
        "load_sectors": s.global_load_sectors,
        "sectors_per_useful": round(sectors * 32 / useful, 2),
        "wavefronts_per_request": round(wavefronts / requests, 2) if requests else 0,
        "barriers": s.barriers,
        "multiply_add": round(multiply / s.warp_instructions, 3),
        "dp4a": round(s.by_opcode["dp4a"] / s.warp_instructions, 3),
    }


def measure(name: str) -> dict[str, object]:
    """Return everything that is kept about a kernel."""
    per_cc = {f"{a}.{b}": resources(name, (a, b)) for a, b in compiler.TARGETS}
    registers = {cc: r["registers"] for cc, r in per_cc.items()}
    shared = max(r["shared"] for r in per_cc.values())
    for cc, r in per_cc.items():
        assert not r["stack"] + r["spilled"] + r["external"], (name, cc, r)
    threads = compiler.kernel(name).threads
    share = occupancy(registers["8.6"], shared, threads)
    return {**counts(name), "registers": registers, "shared": shared, "occupancy": round(share, 2)}


def load() -> dict[str, dict]:
    """Return what is kept."""
    return json.loads(COSTS.read_text())


def table(costs: dict[str, dict], names: list[str], *, dp4a: bool = False) -> list[str]:
    """Return rows of a table for people; ``dp4a`` counts that alone, too."""
    head = ["kernel", "warp instr.", "load sectors", "sector bytes / useful", "wavefronts / request", "barriers"]
    head += ["(dp4a+fma) / instr.", *["dp4a / instr."] * dp4a]
    head += ["registers 7.5 8.0 8.6 8.9 9.0 10.0 12.0", "shared", "occupancy 8.6"]
    rows = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for name in names:
        c = costs[name]
        cells = [f"`{name}`", f"{c['instructions']:,}", f"{c['load_sectors']:,}", c["sectors_per_useful"]]
        cells += [c["wavefronts_per_request"] or "-", c["barriers"], c["multiply_add"] or "-"]
        cells += [c["dp4a"] or "-"] * dp4a
        cells += [" ".join(map(str, c["registers"].values())), f"{c['shared']:,}" if c["shared"] else "-"]
        cells.append(f"{c['occupancy']:.0%}")
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def ggml_table(costs: dict[str, dict]) -> list[str]:
    """Return the comparison with ggml's kernels."""
    rows = ["| work | | pyggml | ggml | ratio |", "| --- | --- | --- | --- | --- |"]
    for name, (instructions, sectors) in GGML.items():
        for what, ours, theirs in (
            ("warp instructions", costs[name]["instructions"], instructions),
            ("load sectors", costs[name]["load_sectors"], sectors),
        ):
            rows.append(f"| `{name}` | {what} | {ours:,} | {theirs:,} | {ours / theirs:.2f} |")
    return rows


def tables(costs: dict[str, dict]) -> dict[str, str]:
    """Return the generated parts of the page, by name."""
    few = [n for n in costs if n.startswith(("mmvq", "mmv_"))]
    many = [n for n in costs if n.startswith("tile")]
    others = [n for n in costs if n not in few and n not in many]
    parts = {"few": table(costs, few), "many": table(costs, many, dp4a=True), "rows": table(costs, others)}
    parts["ggml"] = ggml_table(costs)
    return {name: "\n".join(lines) for name, lines in parts.items()}


def write_page(costs: dict[str, dict]) -> None:
    """Put the tables into the page, between their marks."""
    text = PAGE.read_text()
    for name, lines in tables(costs).items():
        start, end = f"<!-- table {name} -->", f"<!-- end {name} -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}\n{lines}\n{end}{after}"
    PAGE.write_text(text)


if __name__ == "__main__":
    names = sys.argv[1:] or list(compiler.KERNELS)
    if names != ["--page"]:
        measured = {**load(), **{name: measure(name) for name in names}}
        lines = [f" {json.dumps(name)}: {json.dumps(measured[name])}" for name in compiler.KERNELS]
        COSTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    write_page(load())
