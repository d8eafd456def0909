"""moe-cache-eval's events as NPZ: columns by event, and the distinct experts of each as slices of one array.

By event: ``request_indices``, ``scheduler_steps``, ``forward_cycles``, ``phases``, ``layer_ids``, ``token_counts``,
and ``offsets``. By distinct expert: ``expert_ids``, ``assignment_counts``, ``gate_mass``. The model's shape is in
``num_layers``, ``num_experts``, ``top_k``, or in a ``manifest.json`` beside the file. The format lacks the choice of
each token, so `write` adds ``first_row``, ``sequences``, ``ids``, ``weights``, ``expert_bytes`` and ``projections``,
which other readers ignore.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import FormatError
from ...files import aside, read_json
from ..trace import MAX_IDS, MAX_SLOTS, Trace, check_ids, check_shape

__all__ = ["read", "sniff", "write"]

_BY_EVENT = ("request_indices", "scheduler_steps", "phases", "layer_ids", "token_counts")
_MOST_BYTES = 8 * MAX_IDS


def sniff(start: bytes) -> bool:
    """Return whether a file starts like this format."""
    return start.startswith(b"PK\x03\x04")


def read(path: Path) -> Trace:
    """Return the trace of a file.

    Raises
    ------
    FormatError
        The file contradicts the format.
    """
    columns = _arrays(path)
    missing = [name for name in (*_BY_EVENT, "offsets", "expert_ids") if name not in columns]
    if missing:
        raise FormatError(str(path), f"no array {', '.join(missing)}", hint="is it a recording of another program?")
    request, step, phase, layer, n_token = (_whole(path, name, columns[name]) for name in _BY_EVENT)
    offsets, flat = (_whole(path, name, columns[name]) for name in ("offsets", "expert_ids"))
    n_event = len(layer)
    if not n_event or any(len(column) != n_event for column in (request, step, phase, n_token)):
        raise FormatError(
            str(path), f"columns of {len(request)}, {len(step)}, {len(phase)}, {n_event} and {len(n_token)} events"
        )
    if len(offsets) != n_event + 1 or offsets[0] != 0 or offsets[-1] != len(flat) or (np.diff(offsets) < 0).any():
        raise FormatError(str(path), f"offsets do not divide {len(flat):,} experts among {n_event:,} events")
    if not np.isin(phase, (0, 1)).all():
        raise FormatError(str(path), "phases beside 0 (prefill) and 1 (decode)")
    told = _model(path, columns)
    if layer.min() < 0 or (n_layer := told["num_layers"] or int(layer.max()) + 1) <= layer.max():
        raise FormatError(str(path), f"layers from {layer.min()} to {layer.max()}, the model has {told['num_layers']}")
    n_expert = told["num_experts"] or int(flat.max(initial=0)) + 1
    first_row, ids, sequence, weights, is_merged = _rows(path, columns, offsets, flat, n_token)
    n_used = told["top_k"] or max(1, _used(columns, n_token, ids))
    check_shape(str(path), n_layer, n_expert, n_used)
    check_ids(str(path), flat, n_expert)
    check_ids(str(path), ids.ravel(), n_expert)
    from .. import validate

    values, requests = np.unique(request, return_inverse=True)
    trace = Trace(
        n_layer, n_expert, n_used, requests.astype(np.int64), step, phase, layer, first_row, sequence, ids, weights,
        _sizes(path, columns, n_layer), _names(columns), str(told["id"]), str(path), "moe-cache-eval", None, is_merged,
        tuple(str(v) for v in values),
    )  # fmt: skip
    return (
        trace
        if told["num_experts"]
        else validate.with_finding(
            trace, "experts-not-told", f"the file does not say how many experts a layer has: {n_expert} seen"
        )
    )


def write(trace: Trace, path: Path) -> None:
    """Write a trace, which `read` can read."""
    n_event = trace.n_event
    offsets = np.zeros(n_event + 1, np.int64)
    distinct, counts, masses = [], [], []
    for event in range(n_event):
        rows = slice(trace.first_row[event], trace.first_row[event + 1])
        ids = trace.ids[rows]
        chosen = ids[ids >= 0]
        experts, n = np.unique(chosen, return_counts=True)
        mass: npt.NDArray[Any] = np.zeros(len(experts))
        if trace.weights is not None:
            given = np.nan_to_num(trace.weights[rows][ids >= 0])
            mass = np.bincount(np.searchsorted(experts, chosen), weights=given, minlength=len(experts))
        distinct.append(experts)
        counts.append(n)
        masses.append(mass)
        offsets[event + 1] = offsets[event] + len(experts)
    arrays: dict[str, Any] = {  # what numpy writes
        "request_indices": trace.request.astype(np.int32), "scheduler_steps": trace.step.astype(np.int32),
        "forward_cycles": trace.step.astype(np.int32), "phases": trace.phase.astype(np.uint8),
        "layer_ids": trace.layer.astype(np.int16), "token_counts": np.diff(trace.first_row).astype(np.int32),
        "offsets": offsets, "expert_ids": np.concatenate(distinct).astype(np.int32),
        "assignment_counts": np.concatenate(counts).astype(np.int32),
        "gate_mass": np.concatenate(masses).astype(np.float32), "num_layers": trace.n_layer,
        "num_experts": trace.n_expert, "top_k": trace.n_used, "first_row": trace.first_row,
        "sequences": trace.sequence.astype(np.int32), "ids": trace.ids, "projections": np.array(trace.projections),
        "model": np.array(trace.model),
    }  # fmt: skip
    by_layer = [trace.ids[np.repeat(trace.layer == layer, np.diff(trace.first_row))] for layer in trace.layers]
    if len({len(rows) for rows in by_layer}) == 1:  # what `--routing trace:FILE` reads: (layer, token, slot)
        arrays["topk"] = np.stack(by_layer)
    if trace.weights is not None:
        arrays["weights"] = trace.weights
    if trace.expert_bytes is not None:
        arrays["expert_bytes"] = trace.expert_bytes
    with aside(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _arrays(path: Path) -> dict[str, npt.NDArray[Any]]:  # of any element type
    """Return the arrays of a file, after checking that their headers claim no more than a trace can have."""
    found: dict[str, npt.NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            if len(archive.infolist()) > 64:
                raise FormatError(str(path), f"{len(archive.infolist())} arrays")
            for info in archive.infolist():
                with archive.open(info) as member:
                    version = np.lib.format.read_magic(member)
                    reader = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shape, _, dtype = reader(member)
                if dtype.hasobject or math.prod(shape) * max(dtype.itemsize, 1) > min(_MOST_BYTES, info.file_size):
                    raise FormatError(str(path), f"'{info.filename}' claims shape {shape} of {dtype}")
                with archive.open(info) as member:
                    found[info.filename.removesuffix(".npy")] = np.lib.format.read_array(member, allow_pickle=False)
    except FormatError:
        raise
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        RuntimeError,
        SyntaxError,
        TypeError,
        struct.error,
        zlib.error,
        zipfile.BadZipFile,
    ) as error:
        raise FormatError(str(path), f"no NPZ that can be read ({error})") from None
    return found


def _whole(path: Path, name: str, column: npt.NDArray[Any]) -> npt.NDArray[np.int64]:  # of any element type
    if column.ndim != 1 or column.dtype.kind not in "iu":
        raise FormatError(
            str(path), f"'{name}' is {column.dtype} of shape {column.shape}, not a column of whole numbers"
        )
    return column.astype(np.int64)


def _model(path: Path, columns: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:  # numbers, and a name
    """Return the model's shape, from the file or the manifest beside it; 0 if neither has it."""
    told: dict[str, Any] = {"num_layers": 0, "num_experts": 0, "top_k": 0, "id": ""}
    beside = path.with_name("manifest.json")
    if beside.is_file() and "num_layers" not in columns:
        manifest = read_json(beside)
        model = manifest.get("model") if isinstance(manifest, dict) else None
        if isinstance(model, dict):
            told.update({key: model[key] for key in told if key in model})
    for key in ("num_layers", "num_experts", "top_k"):
        if key in columns and columns[key].size == 1 and columns[key].dtype.kind in "iu":
            told[key] = int(columns[key].reshape(()))
        if type(told[key]) is not int or told[key] < 0:
            raise FormatError(str(path), f"{key} is {json.dumps(told[key])[:40]}")
    if "model" in columns and columns["model"].dtype.kind == "U":
        told["id"] = str(columns["model"])
    return told


def _rows(
    path: Path,
    columns: dict[str, npt.NDArray[Any]],
    offsets: npt.NDArray[np.int64],
    flat: npt.NDArray[np.int64],
    n_token: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.float32] | None, bool]:
    """Return first rows, ids, sequences and weights; if the file has only unions, each is one row."""
    n_event = len(n_token)
    if {"first_row", "sequences", "ids"} <= set(columns):
        first_row, sequence = (
            _whole(path, "first_row", columns["first_row"]),
            _whole(path, "sequences", columns["sequences"]),
        )
        ids = columns["ids"]
        if (
            ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.shape[1] > MAX_SLOTS or len(first_row) != n_event + 1
            or first_row[0] != 0 or first_row[-1] != len(ids) or len(sequence) != len(ids) or (np.diff(first_row) < 0).any()
        ):  # fmt: skip
            raise FormatError(str(path), f"first_row, sequences and ids of shape {ids.shape} do not fit")
        weights = columns.get("weights")
        if weights is not None and (weights.shape != ids.shape or weights.dtype.kind != "f"):
            raise FormatError(str(path), f"weights of shape {weights.shape} for ids of shape {ids.shape}")
        return first_row, ids.astype(np.int32), sequence, None if weights is None else weights.astype(np.float32), False
    n = np.diff(offsets)
    width = int(n.max(initial=1)) or 1
    if n_event * width > MAX_IDS:
        raise FormatError(str(path), f"{n_event:,} events of up to {width:,} experts", hint="cut the trace")
    ids = np.full((n_event, width), -1, np.int32)
    ids[np.arange(width) < n[:, None]] = flat
    merged = bool((n_token > 1).any())
    return np.arange(n_event + 1, dtype=np.int64), ids, np.zeros(n_event, np.int64), None, merged


def _used(columns: dict[str, npt.NDArray[Any]], n_token: npt.NDArray[np.int64], ids: npt.NDArray[np.int32]) -> int:
    """Return the experts per token, derived from counts."""
    counts = columns.get("assignment_counts")
    if counts is not None and counts.ndim == 1 and counts.dtype.kind in "iu" and n_token.sum() > 0:
        return round(float(counts.sum()) / float(n_token.sum()))
    single = ids[n_token == 1]
    return int((single >= 0).sum(axis=1).max(initial=1))


def _sizes(path: Path, columns: dict[str, npt.NDArray[Any]], n_layer: int) -> npt.NDArray[np.int64] | None:
    sizes = columns.get("expert_bytes")
    if sizes is None:
        return None
    if (
        sizes.ndim != 2
        or len(sizes) != n_layer
        or sizes.dtype.kind not in "iu"
        or not sizes.shape[1]
        or sizes.min() < 0
    ):
        raise FormatError(str(path), f"expert_bytes of shape {sizes.shape} for {n_layer} layers")
    return sizes.astype(np.int64)


def _names(columns: dict[str, npt.NDArray[Any]]) -> tuple[str, ...]:
    names = columns.get("projections")
    n = columns["expert_bytes"].shape[1] if "expert_bytes" in columns else 1
    if names is not None and names.dtype.kind == "U" and names.size == n:
        return tuple(str(name) for name in names.ravel())
    return ("all",) if n == 1 else tuple(f"tensor {i}" for i in range(n))
