"""Memory of plans against the buffers that llama.cpp's own logs name."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pyggml.catalog import find_model, parse_quant
from pyggml.errors import PyggmlError
from pyggml.types import Type

__all__ = ["Unpredicted", "integer", "memory_rows"]


class Unpredicted(Exception):
    """Raised with the reason why there is no prediction."""


def integer(value: Any, default: int) -> int:
    """Return a value of a row as an integer; the default for what is none."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return default


def memory_rows(logs: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Return predicted and logged buffers of llama.cpp's own logs whose model and buffers are named."""
    out: list[dict[str, Any]] = []
    why: Counter[str] = Counter()
    for log in logs:
        try:
            if not log.get("mainline"):
                raise Unpredicted("engine")
            named: dict[str, list[float]] = {}
            for name, values in (log.get("buffers_mib") or {}).items():
                if key := _plain_name(name):
                    named.setdefault(key, []).extend(
                        float(v) for v in (values if isinstance(values, list) else [values])
                    )
            if not named or not log.get("ctx"):
                raise Unpredicted("no named buffers")
            found = planned_mib(log)
            for key, values in named.items():
                if key not in found or (key == "CPU_Mapped model" and len(values) > 1):
                    why["mapped ranges of several files" if key in found else f"not planned: {key}"] += 1
                    continue
                planned, logged = found[key], sum(values)
                error = math.exp(abs(math.log(max(planned, 1e-3) / max(logged, 1e-3)))) - 1
                out.append({"id": log.get("id"), "buffer": key, "predicted": planned, "logged": logged, "error": error})
        except Unpredicted as reason:
            why[str(reason)] += 1
        except PyggmlError as error:
            why[f"refused: {type(error).__name__}"] += 1
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # of strange logs
            why[f"not understood: {type(error).__name__}"] += 1
    return out, why


def _plain_name(name: str) -> str:
    """Return a buffer's name as llama.cpp prints it, without what was added in brackets; empty for another thing.

    Buffers of one device that hold the same are added: caches with and without a window, and weights that are read into host
    memory, which older builds kept in two kinds of buffers.
    """
    plain = re.sub(r"\s*\(.*|non-SWA|SWA", "", name).strip()
    kinds = "model|KV|compute|output"
    if (
        not re.fullmatch(rf"((CUDA|ROCm|Vulkan)\d|CPU|CPU_Mapped|(CUDA|ROCm|Vulkan)_Host) ({kinds})", plain)
        or "fail" in name
    ):
        return ""
    plain = re.sub(r"^(ROCm|Vulkan)", "CUDA", plain)
    return "host model" if plain in ("CPU model", "CUDA_Host model") else plain


def planned_mib(log: dict[str, Any]) -> dict[str, float]:
    """Return the buffers that a plan gives for a log's flags, by the names that llama.cpp prints."""
    import tempfile

    from pyggml.catalog import write_header
    from pyggml.models.context import ContextFlags
    from pyggml.models.placement import PlacementFlags
    from pyggml.planning import Planner

    flags = str(log.get("flags") or "")
    sizes = find_model(str(log.get("model") or ""))
    if sizes is None:
        raise Unpredicted("unknown model")
    try:
        parse_quant(quant := str(log.get("quant") or sizes.quant))
    except PyggmlError:
        raise Unpredicted("unknown quantisation") from None
    size = re.search(r"([\d.]+) ?Gi?B", str(log.get("file_size") or ""))
    is_mapped = not re.search(r"--no-mmap|-mmp 0", flags)
    n_gpu = len(log.get("gpus") or []) or (0 if log.get("backend") == "CPU" else 1)
    kv = {k: m[1] if (m := re.search(rf"-{k} (\w+)", flags)) else "f16" for k in ("ctk", "ctv")}
    ngl = int(m[1]) if (m := re.search(r"(?:-ngl|--n-gpu-layers) (\d+)", flags)) else (-1 if n_gpu else 0)
    ncmoe = int(m[1]) if (m := re.search(r"(?:-ncmoe|--n-cpu-moe) (\d+)", flags)) else 0
    ots = tuple(f"{pattern}={'CPU' if host else f'CUDA{device}'}" for pattern, host, device in _placed_overrides(flags))
    kinds = [f"sim:custom:{round(_gib(log, i))}GiB,900GB/s,25GB/s,pinned" for i in range(n_gpu)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_header(sizes, quant, path, file_bytes=float(size[1]) * 2**30 if size and "GiB" in size[0] else None)
        with Planner.open(
            path, devices=kinds, data=False,
            placement=PlacementFlags(
                n_gpu_layers=ngl, n_cpu_moe=ncmoe, cpu_moe="--cpu-moe" in flags,
                overrides=tuple(o.replace("CUDA", "SIM") for o in ots), use_mmap=is_mapped,
            ),
            context=ContextFlags(
                n_ctx=int(log["ctx"]), n_batch=integer(log.get("batch"), 2048), n_ubatch=integer(log.get("ubatch"), 512),
                type_k=Type.of(kv["ctk"]), type_v=Type.of(kv["ctv"]),
                flash_attn="on" if re.search(r"-fa", flags) else "auto",
            ),
        ) as planner:  # fmt: skip
            return _named(planner, is_mapped)


def _gib(log: dict[str, Any], i: int) -> float:
    gpus = log.get("gpus") or []
    return float(gpus[i].get("vram_gib") or 48) if i < len(gpus) else 48.0


def _placed_overrides(flags: str) -> list[tuple[str, bool, int]]:
    out = []
    for group in re.findall(r"(?:-ot|--override-tensor)[ =]+(?:\"([^\"]*)\"|'([^']*)'|(\S+))", flags):
        for part in "".join(group).split(","):
            pattern, _, where = part.rpartition("=")
            if pattern:
                number = re.search(r"\d+$", where)
                out.append((pattern, where.upper() == "CPU", int(number[0]) if number else 0))
    return out


def _named(planner: Any, is_mapped: bool) -> dict[str, float]:
    """Return a plan's memory under llama.cpp's names, in MiB."""
    mib = 2.0**20
    out: dict[str, float] = {}

    def add(name: str, n: int) -> None:
        if n:
            out[name] = out.get(name, 0.0) + n / mib

    for use in planner.memory():
        cuda = re.sub(r"^SIM\d*_Host$", "CUDA_Host", re.sub(r"^SIM(\d+)$", r"CUDA\1", use.buft))
        host = "CPU_Mapped model" if is_mapped else "host model"
        add(host if cuda in ("CPU", "CUDA_Host") else f"{cuda} model", use.weights)
        add(f"{cuda} KV", use.cache)
        add(f"{cuda} compute", use.compute)
    add("CUDA_Host output" if len(planner.backends) > 1 else "CPU output", 4 * planner.hparams.n_vocab)
    return out
