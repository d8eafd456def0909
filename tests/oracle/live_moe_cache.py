"""Record the expert cache of the installed llama.cpp: ``python -m tests.oracle.live_moe_cache MODEL OUT.json --bytes N``.

The real llama.cpp decodes with a cache on a simulated device of pyggml's, which sees every write. What is recorded has the
form of `tests.oracle.moe_cache`, which replays it. b11549 and release 0.7.0 evict by LRU.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from pyggml.backend import REGISTRY
from pyggml.gguf import GGUFFile
from pyggml.llama import engine as engines
from pyggml.llama.ledger import Ledger
from pyggml.llama.library import find_llama
from pyggml.llama.params import context_params
from pyggml.llama.source import about_context, about_placement
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags, parse_overrides

__all__ = ["main", "record"]

#: Prompts past the cache, into it, and steps.
SIZES = (16, 40, *[1] * 20, 3, 3, 40, *[1] * 8)
DEVICE = "sim:rtx4090-pcie4"


def record(model: Path, n_bytes: int, sizes: Sequence[int], *, seed: int = 0) -> dict[str, Any]:
    """Return what llama.cpp writes to the device while it decodes micro-batches of some sizes."""
    notes: list[list[Any]] = [[]]
    _watch_writes(notes)
    real = context_params

    def with_cache(library: Any, context: Any, *, threads: int = 1) -> Any:
        p = real(library, context, threads=threads)
        p.moe_cache_size = n_bytes
        return p

    engines.context_params = with_cache  # a flag that pyggml has no word for
    flags = PlacementFlags(cpu_moe=True)
    here = REGISTRY.open_all([DEVICE], data=False)
    engine = engines.Engine(find_llama())
    engine.open({
        "model": str(model), "devices": [{"name": DEVICE, "index": 0, "seed": None}],
        "placement": about_placement(flags, here, parse_overrides(flags, here, REGISTRY.open("cpu"))),
        "context": about_context(ContextFlags(n_ctx=512, n_batch=64, n_ubatch=64, flash_attn="on")), "threads": 1,
        "host": None, "use_mmap": True, "takes_records": False, "watches_experts": True, "faults": [],
    })  # fmt: skip
    notes[0].clear()
    rng = np.random.default_rng(seed)
    routing = []
    for n in sizes:
        engine._chosen.clear()
        engine.decode(rng.integers(0, engine.n_vocab, n).tolist(), "all", 0)
        (chosen,) = engine._chosen
        routing.append({str(layer): rows.tolist() for layer, rows in chosen.items()})
        notes.append([])
    engine.lib.llama_free(engine._ctx)
    with GGUFFile.open(model) as file:
        experts = [t for name, t in file.tensors.items() if re.fullmatch(r"blk\.\d+\.ffn_\w+_exps\.weight", name)]
    first = experts[0].name.split(".")[1]
    return {
        "lib": engine.library.text(engine.lib.llama_version()) if engine.library.has("llama_version") else "",
        "log": [line.strip() for line in engine.lines if "moe_cache" in line or " slots (" in line],
        "bs": list(sizes), "routing": routing, "notes": notes[:-1], "budget": n_bytes,
        "expert_bytes": sum(t.nbytes // t.ne[2] for t in experts if t.name.split(".")[1] == first),
        "alignment": here[0].buffer_type.alignment,
    }  # fmt: skip


def _watch_writes(notes: list[list[Any]]) -> None:
    """Note each write to the device, of slot maps with what is written, and each copy within it."""
    wrote, moved = Ledger.wrote, Ledger.moved

    def note_write(self: Ledger, index: int, dst: Any, address: int, offset: int, size: int, *a: Any, **k: Any) -> None:
        if "moe_cache" in dst.name or "_exps" in dst.name:
            import ctypes

            own = list((ctypes.c_int32 * (size // 4)).from_address(address)) if "slot_map" in dst.name else []
            notes[-1].append([dst.name, offset, size, own])
        wrote(self, index, dst, address, offset, size, *a, **k)

    def note_copy(self: Ledger, src_index: Any, dst_index: int, src: Any, dst: Any, *a: Any, **k: Any) -> None:
        if src.name.startswith("moe_cache"):
            notes[-1].append(["COPY", src.name, dst.name])
        moved(self, src_index, dst_index, src, dst, *a, **k)

    patch.multiple(Ledger, wrote=note_write, moved=note_copy).start()  # for as long as this process runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a recording."""
    parser = argparse.ArgumentParser(prog="python -m tests.oracle.live_moe_cache", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bytes", type=int, required=True, help="of the cache")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="tokens of each micro-batch")
    options = parser.parse_args(arguments)
    made = record(options.model, options.bytes, [int(n) for n in options.sizes.split(",")])
    options.out.write_text(json.dumps(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
