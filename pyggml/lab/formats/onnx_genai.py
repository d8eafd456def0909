"""onnx-genai's ``moe_expert_trace.json``: prompts by name, ``prefill`` and ``decode`` as ``[token][layer][slot]``.

A prompt's prefill is one step with all its tokens; each decoded token is a step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import FormatError
from ...files import read_json
from ..trace import Phase, Trace, TraceBuilder
from ._text import as_ids, as_int

__all__ = ["read", "sniff"]


def sniff(start: bytes) -> bool:
    """Return whether a file starts like this format."""
    return start.lstrip()[:1] == b"{" and b'"num_layers"' in start and b'"num_experts"' in start


def read(path: Path) -> Trace:
    """Return the trace of a file.

    Raises
    ------
    FormatError
        The file contradicts the format.
    """
    whole = read_json(path)
    prompts = whole.get("prompts") if isinstance(whole, dict) else None
    if not isinstance(prompts, dict):
        raise FormatError(str(path), "no object of prompts by name")
    n_layer, n_expert, n_used = (as_int(path, key, whole.get(key), 1) for key in ("num_layers", "num_experts", "top_k"))
    builder = TraceBuilder(str(path))
    for request, (name, prompt) in enumerate(prompts.items()):
        if not isinstance(prompt, dict):
            raise FormatError(str(path), f"prompt '{name}' is no object")
        prefill = _tokens(path, f"{name}.prefill", prompt.get("prefill", []), n_layer)
        decode = _tokens(path, f"{name}.decode", prompt.get("decode", []), n_layer)
        if prefill:
            for layer in range(n_layer):
                builder.add(request, 0, Phase.PREFILL, layer, (token[layer] for token in prefill))
        for step, token in enumerate(decode, start=1):
            for layer in range(n_layer):
                builder.add(request, step, Phase.DECODE, layer, [token[layer]])
    return builder.finish(
        n_layer=n_layer, n_expert=n_expert, n_used=n_used, model=str(whole.get("model", "")), format="onnx-genai",
        requests=tuple(prompts),
    )  # fmt: skip


def _tokens(path: Path, where: str, value: Any, n_layer: int) -> list[list[list[int]]]:  # of JSON's values
    if not isinstance(value, list):
        raise FormatError(str(path), f"{where} is no list of tokens")
    for i, token in enumerate(value):
        if not isinstance(token, list) or len(token) != n_layer:
            raise FormatError(str(path), f"{where}[{i}] is no list of {n_layer} layers")
        for layer, ids in enumerate(token):
            as_ids(path, f"{where}[{i}][{layer}]", ids)
    return value
