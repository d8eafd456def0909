"""Converts flags of placement and context to llama.cpp's parameters; in the child."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..backends.libggml.library import Handle
from ..errors import SchedError
from .library import LlamaLibrary

__all__ = ["context_params", "model_params"]

Message = dict[str, Any]  # as `pyggml.llama.source` writes it

_FLASH = {"off": 0, "on": 1, "auto": -1}
_COPIED = (
    "n_ctx", "n_batch", "n_ubatch", "n_seq_max", "type_k", "type_v", "offload_kqv", "op_offload", "swa_full",
    "kv_unified", "rope_freq_base", "rope_freq_scale",
)  # fmt: skip


def model_params(
    library: LlamaLibrary, placement: Message, devices: Sequence[Handle], bufts: Mapping[str, Handle]
) -> tuple[Handle, list[Handle]]:
    """Return ``llama_model_params``, and objects that must live as long as the model.

    Parameters
    ----------
    placement : dict
        From `about_placement`.
    devices : sequence of pointer
        In order.
    bufts : mapping of str to pointer
        Buffer types by their names in overrides.
    """
    ffi, lib = library.ffi, library.lib
    p = lib.llama_model_default_params()
    kept: list[Handle] = [ffi.new("void *[]", [*devices, ffi.NULL])]
    p.devices, p.lazy_mode, p.use_extra_bufts = kept[0], 0, False
    p.n_gpu_layers = placement["n_gpu_layers"] if devices else 0
    if placement["tensor_split"]:
        shares = ffi.new("float[]", max(lib.llama_max_devices(), len(devices)))
        for i, share in enumerate(placement["tensor_split"]):
            shares[i] = share
        kept.append(shares)
        p.tensor_split = shares
    if placement["overrides"]:
        table = ffi.new("struct llama_model_tensor_buft_override[]", len(placement["overrides"]) + 1)
        for row, (pattern, buft) in zip(table, placement["overrides"], strict=False):
            kept.append(ffi.new("char[]", pattern.encode()))
            row.pattern, row.buft = kept[-1], bufts[buft]
        kept.append(table)
        p.tensor_buft_overrides = table
    return p, kept


def context_params(library: LlamaLibrary, context: Message, *, threads: int = 1) -> Handle:
    """Return ``llama_context_params`` for a dict from `about_context`."""
    p = library.lib.llama_context_default_params()
    for name in _COPIED:
        setattr(p, name, context[name])
    if context["moe_cache_size"]:
        if not library.has_copy_callback:
            raise SchedError(
                f"llama.cpp in {library.path} has no expert cache",
                hint="use a build since b11549, or leave out --moe-cache-mib",
            )
        p.moe_cache_size = context["moe_cache_size"]
    p.flash_attn_type = _FLASH[context["flash_attn"]]
    p.n_threads = p.n_threads_batch = threads
    return p
