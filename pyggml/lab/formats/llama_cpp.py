"""``MCT1``: the lookups of llama.cpp's expert cache (``LLAMA_MOE_CACHE_TRACE=FILE``, b12211 and later).

The file has no steps: one begins when a layer is not above the previous one. It has no phases: a lookup of one token
counts as decode, of several as prefill. Lookups have at most 32 tokens. Several sequences that decode together cannot
be told from prefill.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ...errors import FormatError
from ..trace import MAX_EXPERTS, MAX_LAYERS, MAX_SLOTS, Phase, Trace, TraceBuilder

__all__ = ["read", "sniff"]

_MAX_TOKENS = 4096


def sniff(start: bytes) -> bool:
    """Return whether a file starts like this format."""
    return start.startswith(b"MCT1")


def read(path: Path) -> Trace:
    """Return the trace of a file.

    Raises
    ------
    FormatError
        The file contradicts the format.
    """
    with path.open("rb") as file:
        if file.read(4) != b"MCT1":
            raise FormatError(str(path), "no MCT1 header", offset=0)
        n_layer, n_used, n_group = _ints(file, path, 3)
        if not (1 <= n_layer <= MAX_LAYERS and 1 <= n_used <= MAX_SLOTS and 0 <= n_group <= MAX_LAYERS):
            raise FormatError(str(path), f"{n_layer} layers, {n_used} experts used, {n_group} groups", offset=4)
        sizes: dict[int, tuple[int, ...]] = {}
        n_expert = 0
        for _ in range(n_group):
            _, experts, n_layers = _ints(file, path, 3)
            if not (1 <= experts <= MAX_EXPERTS and 0 <= n_layers <= n_layer):
                raise FormatError(str(path), f"a group of {n_layers} layers with {experts} experts", offset=file.tell())
            layers = _ints(file, path, n_layers)
            _unpack(file, path, "<ddQQQ")
            (n_tensor,) = _ints(file, path, 1)
            if not 0 <= n_tensor <= 64 or any(not 0 <= layer < n_layer for layer in layers):
                raise FormatError(
                    str(path), f"a group of {n_tensor} tensors in layers {layers[:8]}", offset=file.tell()
                )
            nb = _unpack(file, path, f"<{n_tensor}Q")
            n_expert = max(n_expert, experts)
            sizes.update(dict.fromkeys(layers, nb))
        builder = TraceBuilder(str(path))
        step, before = 0, -1
        for layer, used, ids in _lookups(file, path, n_layer):
            step += layer <= before
            before = layer
            rows = [ids[i : i + used] for i in range(0, len(ids), used)]
            builder.add(0, step, Phase.DECODE if len(rows) == 1 else Phase.PREFILL, layer, rows)
    return builder.finish(
        n_layer=n_layer, n_expert=n_expert or None, n_used=n_used, expert_bytes=_table(path, n_layer, sizes),
        projections=_names(max(map(len, sizes.values()), default=0)), format="llama.cpp MCT1",
    )  # fmt: skip


def _names(n: int) -> tuple[str, ...]:
    """Return the projections in llama.cpp's order."""
    return {2: ("gate_up", "down"), 3: ("gate", "up", "down")}.get(
        n, tuple(f"tensor {i}" for i in range(n)) or ("all",)
    )


def _table(
    path: Path, n_layer: int, sizes: dict[int, tuple[int, ...]]
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]] | None:
    if not sizes:
        return None
    table = np.zeros((n_layer, max(map(len, sizes.values())) or 1), np.int64)
    for layer, nb in sizes.items():
        if any(n >= 1 << 44 for n in nb):
            raise FormatError(str(path), f"layer {layer}: experts of {max(nb):,} bytes")
        table[layer, : len(nb)] = nb
    return table


def _lookups(file: BinaryIO, path: Path, n_layer: int) -> Iterator[tuple[int, int, list[int]]]:
    while start := file.read(12):
        if len(start) < 12:
            raise FormatError(str(path), "cut within a lookup", offset=file.tell())
        layer, used, n_ids = struct.unpack("<3i", start)
        if not (
            0 <= layer < n_layer and 1 <= used <= MAX_SLOTS and 0 <= n_ids <= used * _MAX_TOKENS and n_ids % used == 0
        ):
            raise FormatError(
                str(path), f"a lookup of {n_ids} ids, {used} a token, in layer {layer}", offset=file.tell() - 12
            )
        yield layer, used, list(_ints(file, path, n_ids))


def _ints(file: BinaryIO, path: Path, n: int) -> tuple[int, ...]:
    return _unpack(file, path, f"<{n}i")


def _unpack(file: BinaryIO, path: Path, layout: str) -> tuple[int, ...]:
    data = file.read(struct.calcsize(layout))
    if len(data) < struct.calcsize(layout):
        raise FormatError(str(path), "cut within the header or a lookup", offset=file.tell())
    return struct.unpack(layout, data)
