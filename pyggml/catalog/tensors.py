"""The tensors of a model with published sizes: names and shapes as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .sizes import ModelSizes

__all__ = ["Shape", "compress_ratio", "shapes"]

#: Architectures with norms behind attention, where others have one before the feed-forward layer.
_POST_ATTENTION = {"gpt-oss", "qwen35", "qwen35moe", "qwen3next", "glm4moe", "seed_oss"}
#: Architectures with norms before and behind both.
_SANDWICHED = {"glm4", "gemma2", "gemma3", "gemma4"}
#: Architectures whose router adds a bias to what it chooses by.
_ROUTER_BIAS = {"glm4moe", "minimax-m2", "dots1", "ernie4_5-moe", "deepseek4"}
#: Architectures whose feed-forward layers keep gate and up as one.
_FUSED_UP = {"glm4", "phi3"}

# DeepSeek 4 and Qwen 3.8 Flash Next, of which there is one size each; from their makers' configuration files
STREAMS, STREAM_RANK = 4, 320  #: parallel residual streams (hyper-connections), and the rank of Qwen's mixers
INDEX_HEADS, INDEX_WIDTH = {"deepseek4": 64, "qwen4exp": 4}, 128  #: of the attention that selects positions
SPARSE_RATIO = 4  #: positions that are compressed to one where attention selects among them
OUTPUT_RANK = 1024  #: of DeepSeek's projections after attention
HASHED_LAYERS = 3  #: DeepSeek's first layers choose experts by a table of tokens
NGRAM_LAYER, NGRAM_SIZE, NGRAM_HEADS, NGRAM_ROWS = 1, 3, 16, 20_000_000  #: Qwen's embeddings of two and three tokens


class Shape(NamedTuple):
    """A tensor without a type."""

    name: str
    ne: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        n = 1
        for size in self.ne:
            n *= size
        return n


def shapes(s: ModelSizes, *, nextn: bool = True) -> list[Shape]:
    """Return the tensors of a model, in the order of a quantised file.

    Parameters
    ----------
    nextn : bool
        Include the layers that predict further tokens.

    Notes
    -----
    Mirrors `load_arch_tensors` of each architecture in llama.cpp.
    """
    e = s.n_embd
    # llama-quantize writes by layer, then by name (`weight_name_comparer`)
    rows = [] if s.tied else [Shape("output.weight", (e, s.n_vocab))]
    if s.arch == "qwen4exp":  # the last mixer of its residual streams has the norm
        rows += [Shape(f"output_hc_{name}.weight", ne) for name, ne in _mixer(s)]
        rows.append(Shape("per_layer_token_embd.weight", (s.per_layer // NGRAM_HEADS, NGRAM_HEADS * NGRAM_ROWS)))
    else:
        rows.append(Shape("output_norm.weight", (e,)))
    if s.arch == "deepseek4":
        rows += [Shape(f"output_hc_{name}.weight", ne) for name, ne in _streams(s, STREAMS, 1)]
    if s.arch == "gemma4":
        rows.append(Shape("rope_freqs.weight", (s.head_full // 2,)))
    rows.append(Shape("token_embd.weight", (e, s.n_vocab)))
    for i in range(s.n_layer + (s.n_nextn if nextn else 0)):
        rows += sorted(Shape(f"blk.{i}.{name}", ne) for name, ne in _layer(s, i))
    return rows


def compress_ratio(s: ModelSizes, i: int) -> int:
    """Return how many positions a layer's attention compresses to one; 0 for none."""
    if s.arch == "qwen4exp":
        return 0 if s.is_recurrent(i) else SPARSE_RATIO
    return 0 if i < 2 else SPARSE_RATIO if i % 2 == 0 else 128


_Rows = Iterator[tuple[str, tuple[int, ...]]]


def _layer(s: ModelSizes, i: int) -> _Rows:
    e = s.n_embd
    if s.arch == "qwen4exp":
        yield from _mixed(s, i)
    else:
        yield "attn_norm.weight", (e,)
    if s.is_recurrent(i):
        yield from _recurrent(s)
    elif s.arch == "deepseek4":
        yield from _compressed(s, i)
    elif s.kv_lora:
        yield from _latent(s)
    else:
        yield from _attention(s, i)
    if s.arch == "qwen4exp":
        pass
    elif s.arch in _POST_ATTENTION:
        yield "post_attention_norm.weight", (e,)
    elif s.arch in _SANDWICHED:
        yield "post_attention_norm.weight", (e,)
        yield "ffn_norm.weight", (e,)
        yield "post_ffw_norm.weight", (e,)
    else:
        yield "ffn_norm.weight", (e,)
    if s.has_experts(i):
        yield from _experts(s, i)
    elif s.arch in _FUSED_UP:
        yield "ffn_up.weight", (e, 2 * s.n_ff)
        yield "ffn_down.weight", (s.n_ff, e)
    else:
        yield from _dense(s)
    if i >= s.n_layer:
        yield "nextn.eh_proj.weight", (2 * e, e)
        yield "nextn.enorm.weight", (e,)
        yield "nextn.hnorm.weight", (e,)
        yield "nextn.shared_head_norm.weight", (e,)


def _attention(s: ModelSizes, i: int) -> _Rows:
    e = s.n_embd
    n_kv, head = s.heads(i)
    q, kv = s.n_head * head, n_kv * head
    is_gated = s.full_interval > 0
    if s.arch == "phi3":
        yield "attn_qkv.weight", (e, q + 2 * kv)
    else:
        yield "attn_q.weight", (e, 2 * q if is_gated else q)
        yield "attn_k.weight", (e, kv)
        if not (s.head_full and not s.has_window(i)):  # gemma4's layers without a window use K as V
            yield "attn_v.weight", (e, kv)
    yield "attn_output.weight", (q, e)
    if s.qkv_bias:
        for name, n in (("q", q), ("k", kv), ("v", kv)):
            yield f"attn_{name}.bias", (n,)
    if s.arch == "gpt-oss":
        yield "attn_output.bias", (e,)
        yield "attn_sinks.weight", (s.n_head,)
    if s.qk_norm:
        whole = s.arch in ("minimax-m2", "olmoe")
        yield "attn_q_norm.weight", (q if whole else head,)
        yield "attn_k_norm.weight", (kv if whole else head,)


def _recurrent(s: ModelSizes) -> _Rows:
    e, value, key = s.n_embd, s.ssm_heads * s.ssm_state, s.ssm_groups * s.ssm_state
    yield "attn_qkv.weight", (e, 2 * key + value)
    yield "attn_gate.weight", (e, value)
    yield "ssm_conv1d.weight", (s.ssm_conv, 2 * key + value)
    yield "ssm_dt.bias", (s.ssm_heads,)
    yield "ssm_a", (s.ssm_heads,)
    if s.arch == "qwen3next":
        yield "ssm_ba.weight", (e, 2 * s.ssm_heads)
    else:
        yield "ssm_beta.weight", (e, s.ssm_heads)
        yield "ssm_alpha.weight", (e, s.ssm_heads)
    yield "ssm_norm.weight", (s.ssm_state,)
    yield "ssm_out.weight", (value, e)


def _latent(s: ModelSizes) -> _Rows:
    e, nope = s.n_embd, s.head - s.rope_dim
    if s.q_lora:
        yield "attn_q_a_norm.weight", (s.q_lora,)
        yield "attn_q_a.weight", (e, s.q_lora)
        yield "attn_q_b.weight", (s.q_lora, s.n_head * s.head)
    else:
        yield "attn_q.weight", (e, s.n_head * s.head)
    yield "attn_kv_a_norm.weight", (s.kv_lora,)
    yield "attn_kv_a_mqa.weight", (e, s.kv_lora + s.rope_dim)
    yield "attn_k_b.weight", (nope, s.kv_lora, s.n_head)
    yield "attn_v_b.weight", (s.kv_lora, s.head_v, s.n_head)
    yield "attn_output.weight", (s.n_head * s.head_v, e)


def _compressed(s: ModelSizes, i: int) -> _Rows:
    """Yield a layer of DeepSeek 4: attention to a window and to compressed positions, and residual streams."""
    e, ratio, out = s.n_embd, compress_ratio(s, i), s.n_head * s.head // s.n_group
    yield "attn_sinks.weight", (s.n_head,)
    yield "attn_q_a.weight", (e, s.q_lora)
    yield "attn_q_a_norm.weight", (s.q_lora,)
    yield "attn_q_b.weight", (s.q_lora, s.n_head * s.head)
    yield "attn_kv.weight", (e, s.head)
    yield "attn_kv_a_norm.weight", (s.head,)
    yield "attn_output_a.weight", (out, OUTPUT_RANK * s.n_group)
    yield "attn_output_b.weight", (s.n_group * OUTPUT_RANK, e)
    for place in ("attn", "ffn"):
        for name, ne in _streams(s, STREAMS * (STREAMS + 2), 3):
            yield f"hc_{place}_{name}.weight", ne
    if ratio:
        yield from _compressor("attn", s, s.head, ratio)
    if ratio == SPARSE_RATIO:
        yield "indexer.proj.weight", (e, INDEX_HEADS[s.arch])
        yield "indexer.attn_q_b.weight", (s.q_lora, INDEX_HEADS[s.arch] * INDEX_WIDTH)
        yield from _compressor("indexer", s, INDEX_WIDTH, ratio)


def _compressor(place: str, s: ModelSizes, width: int, ratio: int) -> _Rows:
    n = 2 * width if ratio == SPARSE_RATIO else width  # sparse ones overlap
    yield f"{place}_compressor_kv.weight", (s.n_embd, n)
    yield f"{place}_compressor_gate.weight", (s.n_embd, n)
    yield f"{place}_compressor_ape.weight", (n, ratio)
    yield f"{place}_compressor_norm.weight", (width,)


def _streams(s: ModelSizes, n: int, n_scales: int) -> _Rows:
    """Yield what mixes the residual streams of DeepSeek 4 (hyper-connections)."""
    yield "fn", (STREAMS * s.n_embd, n)
    yield "base", (n,)
    yield "scale", (n_scales,)


def _mixer(s: ModelSizes) -> _Rows:
    """Yield what mixes the residual streams of Qwen 3.8 Flash Next (hyper-connections of low rank)."""
    e = s.n_embd
    yield "norm", (e * STREAMS,)
    yield "down", (STREAMS * e, STREAM_RANK)
    yield "up", (STREAM_RANK, STREAMS * e)


def _mixed(s: ModelSizes, i: int) -> _Rows:
    """Yield what a layer of Qwen 3.8 Flash Next has beside attention, recurrence and experts."""
    e = s.n_embd
    for place in ("attn", "ffn"):
        for name, ne in _mixer(s):
            yield f"hc_{place}_{name}.weight", ne
        yield f"hc_{place}_inject.weight", (STREAMS * e, STREAMS)
    if not s.is_recurrent(i):
        yield "indexer.q_proj.weight", (e, INDEX_HEADS[s.arch] * INDEX_WIDTH)
        yield "indexer.k_proj.weight", (e, INDEX_WIDTH)
        yield "indexer.q_norm.weight", (INDEX_WIDTH,)
        yield "indexer.k_norm.weight", (INDEX_WIDTH,)
    if i == NGRAM_LAYER:
        yield "ple_key.weight", (e, STREAMS * e)
        yield "ple_value.weight", (s.per_layer, e)
        for name in ("norm_key", "norm_query", "norm_conv"):
            yield f"ple_{name}.weight", (e * STREAMS,)
        yield "ple_conv1d.weight", (s.ssm_conv, STREAMS * e)


def _experts(s: ModelSizes, i: int) -> _Rows:
    e, n = s.n_embd, s.n_expert
    yield "ffn_gate_inp.weight", (e, n)
    if s.arch == "deepseek4" and i < HASHED_LAYERS:
        yield "ffn_gate_tid2eid.weight", (s.n_used, s.n_vocab)
    elif s.arch in _ROUTER_BIAS or (s.arch == "deepseek2" and s.q_lora):
        yield "exp_probs_b.bias", (n,)
    if s.arch == "gemma4":
        yield from _dense(s)
        yield "ffn_gate_inp.scale", (e,)
        for name in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"):
            yield f"{name}.weight", (e,)
        yield "ffn_gate_up_exps.weight", (e, 2 * s.n_ff_exp, n)
    else:
        yield "ffn_gate_exps.weight", (e, s.n_ff_exp, n)
        yield "ffn_up_exps.weight", (e, s.n_ff_exp, n)
    yield "ffn_down_exps.weight", (s.n_ff_exp, e, n)
    if s.arch == "gpt-oss":
        yield "ffn_gate_inp.bias", (n,)
        yield "ffn_gate_exps.bias", (s.n_ff_exp, n)
        yield "ffn_up_exps.bias", (s.n_ff_exp, n)
        yield "ffn_down_exps.bias", (e, n)
    if s.n_ff_shexp:
        if s.full_interval:
            yield "ffn_gate_inp_shexp.weight", (e,)
        yield "ffn_gate_shexp.weight", (e, s.n_ff_shexp)
        yield "ffn_up_shexp.weight", (e, s.n_ff_shexp)
        yield "ffn_down_shexp.weight", (s.n_ff_shexp, e)


def _dense(s: ModelSizes) -> _Rows:
    yield "ffn_gate.weight", (s.n_embd, s.n_ff)
    yield "ffn_up.weight", (s.n_embd, s.n_ff)
    yield "ffn_down.weight", (s.n_ff, s.n_embd)
