"""GPT-OSS-MoE-ExpertFingerprinting's examples: one prompt; ``router_data`` has each generated token's experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import FormatError
from ...files import read_json
from ..trace import Phase, Trace, TraceBuilder
from ._text import as_ids

__all__ = ["read", "sniff"]

_N_EXPERT = 32  # of gpt-oss-20b, the only model of the data set
_N_EXPERT_BY_LAYERS = {24: 32, 36: 128}


def sniff(start: bytes) -> bool:
    """Return whether a file starts like this format."""
    head = start.lstrip()
    return head[:1] == b"{" and (b'"router_data"' in start or (b'"row_index"' in start and b'"dataset"' in start))


def read(path: Path) -> Trace:
    """Return the trace of a file.

    Raises
    ------
    FormatError
        The file contradicts the format.
    """
    whole = read_json(path)
    tokens = whole.get("router_data") if isinstance(whole, dict) else None
    if not isinstance(tokens, list):
        raise FormatError(str(path), "no list 'router_data'")
    builder = TraceBuilder(str(path))
    n_layer = 0
    for step, entry in enumerate(tokens):
        if not isinstance(entry, dict) or len(entry) != 1:
            raise FormatError(str(path), f"router_data[{step}] is no object of one token")
        name, layers = next(iter(entry.items()))
        if not isinstance(layers, dict):
            raise FormatError(str(path), f"router_data[{step}].{name} is no object of layers")
        chosen = sorted((_number(path, step, key), value) for key, value in layers.items())
        n_layer = max(n_layer, *(layer + 1 for layer, _ in chosen)) if chosen else n_layer
        for layer, value in chosen:
            where = f"router_data[{step}].{name}.layer_{layer}"
            if not isinstance(value, dict):
                raise FormatError(str(path), f"{where} is no object")
            ids = as_ids(path, f"{where}.selected_experts", value.get("selected_experts"))
            weights = _weights(path, where, value.get("selected_probs"), len(ids))
            builder.add(0, step, Phase.DECODE, layer, [ids], weights=[weights])
    name = f"{whole.get('dataset', '')} {whole.get('category', '')}".strip()
    n_expert = _N_EXPERT_BY_LAYERS.get(n_layer)
    model = "" if n_expert is None else "gpt-oss-20b" if n_expert == _N_EXPERT else "gpt-oss-120b"
    return builder.finish(
        n_layer=n_layer or None, n_expert=n_expert, model=model, format="fingerprint", requests=(name or path.name,),
        n_used_model=None if n_expert is None else 4,
    )  # fmt: skip


def _number(path: Path, step: int, key: str) -> int:
    digits = key.removeprefix("layer_")
    if not digits.isascii() or not digits.isdecimal() or len(digits) > 6:
        raise FormatError(str(path), f"router_data[{step}]: '{key[:40]}' is no layer")
    return int(digits)


def _weights(path: Path, where: str, value: Any, n: int) -> list[float]:  # of JSON's values
    if value is None:
        return [float("nan")] * n
    if not isinstance(value, list) or len(value) != n or any(type(w) not in (int, float) for w in value):
        raise FormatError(str(path), f"{where}.selected_probs is no list of {n} numbers")
    return [float(w) for w in value]
