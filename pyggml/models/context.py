"""`ContextFlags`, the flags of a context, and `ContextParams`, the resulting parameters for a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import GraphError, check_kind
from ..types import Type
from .hparams import HParams, round_f32

__all__ = ["MAX_SEQ", "ContextFlags", "ContextParams", "cache_type", "check_context"]

#: Most sequences of a context: their set is one 64-bit word (`LLAMA_MAX_SEQ` is 256).
MAX_SEQ = 64
#: Types of a KV cache (`kv_cache_types`).
CACHE_TYPES = (
    Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.IQ4_NL, Type.Q5_0, Type.Q5_1,
)  # fmt: skip

FlashAttn = Literal["on", "off", "auto"]


@dataclass(frozen=True, slots=True)
class ContextFlags:
    """The flags of a context, with the defaults of llama.cpp's command line.

    Notes
    -----
    Mirrors `llama_context_params`.
    """

    n_ctx: int = 0  #: ``-c``: tokens; 0: the context that the model was trained with
    n_batch: int = 2048  #: ``-b``: most tokens of one decode
    n_ubatch: int = 512  #: ``-ub``: most tokens of one graph
    n_seq_max: int = 1  #: sequences
    n_outputs_max: int = 0  #: most wanted logits of a batch, for which memory is planned; 0: ``n_batch``
    kv_unified: bool = False  #: all sequences share one stream of cells
    type_k: Type = Type.F16  #: ``-ctk``
    type_v: Type = Type.F16  #: ``-ctv``
    flash_attn: FlashAttn = "auto"  #: ``-fa``
    offload_kqv: bool = True  #: False with ``--no-kv-offload``
    op_offload: bool = True  #: False with ``--no-op-offload``
    swa_full: bool = False  #: ``--swa-full``: layers with a sliding window have as many cells as the others
    rope_freq_base: float = 0.0  #: 0: the model's
    rope_freq_scale: float = 0.0  #: 0: the model's


@dataclass(frozen=True, slots=True)
class ContextParams:
    """The parameters of a context for one model.

    Notes
    -----
    Mirrors `llama_cparams` and the first half of the constructor of `llama_context`.
    """

    n_ctx: int
    n_ctx_seq: int  #: cells of one stream
    n_batch: int
    n_ubatch: int
    n_seq_max: int
    kv_unified: bool
    type_k: Type
    type_v: Type
    flash_attn: bool
    auto_flash_attn: bool  #: a probe decides whether it stays on
    offload_kqv: bool
    op_offload: bool
    swa_full: bool
    n_outputs_max: int = 0  #: most wanted logits of a batch; 0: `n_batch`
    fused_delta_one: bool = True  #: GATED_DELTA_NET for one token per sequence; a probe decides whether it stays on
    fused_delta_many: bool = True  #: the same for several tokens
    # only for graphs that pyggml builds: captured graphs contain their rotary constants
    n_ctx_orig: int = 0
    freq_base: float = 0.0
    freq_scale: float = 1.0
    ext_factor: float = 0.0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    @property
    def n_stream(self) -> int:
        """The number of streams of the KV cache."""
        return 1 if self.kv_unified else self.n_seq_max

    @classmethod
    def resolve(cls, flags: ContextFlags, hparams: HParams) -> ContextParams:
        """Return the parameters for a model.

        Raises
        ------
        GraphError
            A number is out of range, or a cache type does not fit the model.
        """
        check_context(flags)
        _check_heads(flags, hparams)
        n_ctx = flags.n_ctx or hparams.n_ctx_train
        n_batch = min(n_ctx, flags.n_batch)
        n_ubatch = min(n_batch, flags.n_ubatch or flags.n_batch)
        n_ctx = _pad(n_ctx, 256)
        if flags.kv_unified:
            n_ctx_seq = n_ctx
        else:
            n_ctx_seq = _pad(n_ctx // flags.n_seq_max, 256)
            n_ctx = n_ctx_seq * flags.n_seq_max
        freq_scale = round_f32(flags.rope_freq_scale or hparams.rope_freq_scale)
        if hparams.rope_scaling == "none":
            freq_scale = 1.0
        ext_factor = 1.0 if hparams.rope_scaling == "yarn" else 0.0
        return cls(
            n_ctx=n_ctx,
            n_ctx_seq=n_ctx_seq,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_seq_max=flags.n_seq_max,
            kv_unified=flags.kv_unified,
            type_k=flags.type_k,
            type_v=flags.type_v,
            flash_attn=flags.flash_attn != "off",
            auto_flash_attn=flags.flash_attn == "auto" and not flags.type_v.is_quantized,
            offload_kqv=flags.offload_kqv,
            op_offload=flags.op_offload,
            swa_full=flags.swa_full,
            n_outputs_max=flags.n_outputs_max,
            n_ctx_orig=hparams.n_ctx_orig_yarn,
            freq_base=round_f32(flags.rope_freq_base or hparams.rope_freq_base),
            freq_scale=freq_scale,
            ext_factor=ext_factor,
            attn_factor=_attn_factor(ext_factor, freq_scale, hparams),
            beta_fast=32.0,
            beta_slow=1.0,
        )


def _pad(n: int, to: int) -> int:
    return -(-n // to) * to


def check_context(flags: ContextFlags, *, max_seq: int = MAX_SEQ) -> None:
    """Check the flags of a context that do not depend on the model.

    Raises
    ------
    GraphError
        A number is out of range, or a cache type or the way of attention is not possible.
    """
    check_kind("context", flags, ContextFlags, hint="such as ContextFlags(n_ctx=4096)")
    if not 1 <= flags.n_seq_max <= max_seq:
        raise GraphError(f"a context cannot have {flags.n_seq_max} sequences", hint=f"1 to {max_seq} are possible")
    if flags.flash_attn not in get_args(FlashAttn):
        raise GraphError(f"-fa cannot be {flags.flash_attn!r}", hint=f"there are {', '.join(get_args(FlashAttn))}")
    for name, n, least in (("n_ctx", flags.n_ctx, 0), ("n_batch", flags.n_batch, 1), ("n_ubatch", flags.n_ubatch, 0)):
        if n < least:
            raise GraphError(f"{name} is {n}, at least {least} is needed")
    for name, type in (("type_k", flags.type_k), ("type_v", flags.type_v)):
        cache_type(type, name)
    if flags.type_v.is_quantized and flags.flash_attn == "off":
        raise GraphError(
            f"a V cache of {flags.type_v.ggml_name} needs flash attention", hint="use -fa on, or -ctv f16 or f32"
        )


def cache_type(type: Type | str, name: str) -> Type:
    """Return a type of a KV cache.

    Parameters
    ----------
    name : str
        What errors call it.

    Raises
    ------
    GraphError
        No KV cache has this type.
    """
    found = type if isinstance(type, Type) else next((t for t in CACHE_TYPES if t.ggml_name == type.lower()), None)
    if found not in CACHE_TYPES:
        told = type.ggml_name if isinstance(type, Type) else repr(type)
        raise GraphError(
            f"{name} cannot be {told}", hint=f"a KV cache is of {', '.join(t.ggml_name for t in CACHE_TYPES)}"
        )
    return found


def _check_heads(flags: ContextFlags, hparams: HParams) -> None:
    """Require that a head's K and V are whole blocks of the cache types.

    Notes
    -----
    Mirrors `llama_init_from_model`. Differs: also checked without flash attention, where upstream aborts.
    """
    if hparams.is_mla and flags.type_k is not flags.type_v:
        raise GraphError(
            f"K of {flags.type_k.ggml_name} and V of {flags.type_v.ggml_name}: this model keeps both in one tensor",
            hint="give -ctk and -ctv the same type",
        )
    heads = {(hp.n_embd_head_k, hp.n_embd_head_v) for hp in map(hparams.of_layer, range(hparams.n_layer))}
    sides = [side for k, v in sorted(heads) for side in (("K", flags.type_k, k), ("V", flags.type_v, v))]
    for name, type, n in sides:
        if n % type.block_size:
            raise GraphError(
                f"a {name} cache of {type.ggml_name} has blocks of {type.block_size}, which do not divide a head of {n}",
                hint=f"-ct{name.lower()} f16, bf16 and f32 are possible",
            )


def _attn_factor(ext_factor: float, freq_scale: float, hparams: HParams) -> float:
    """Return YaRN's factor of Q and K, divided by the part that ROPE itself applies."""
    factor = 1.0
    if ext_factor != 0.0:
        stretch = round_f32(1.0 / freq_scale)
        log = round_f32(math.log(stretch))
        mscale = 1.0 if stretch <= 1.0 else round_f32(round_f32(round_f32(0.1) * log) + 1.0)
        if hparams.rope_yarn_log_mul:  # such models scale Q times K instead
            mscale = 1.0
        cancel = round_f32(1.0 / round_f32(1.0 + round_f32(round_f32(0.1) * log)))
        factor = round_f32(mscale * cancel)
    return round_f32(factor * round_f32(hparams.rope_attn_factor))
