"""A model of published sizes as a GGUF file without data: a sparse file of some kilobytes that every planner opens."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from ..errors import FormatError, PyggmlError
from ..gguf import ValueType
from ..makers.gguf_writer import GGUFWriter
from . import tensors
from .hub import PREFIX, headers_folder, hub_header
from .quantization import parse_quant, type_tensors
from .sizes import MODELS, ModelSizes
from .tensors import compress_ratio, shapes

__all__ = ["find_model", "header_path", "write_header"]

_U32, _U64, _F32 = ValueType.UINT32, ValueType.UINT64, ValueType.FLOAT32
_STR, _BOOL = ValueType.STRING, ValueType.BOOL
#: What makers and converters append to a model's name and what changes no size.
_TAIL = re.compile(
    r"([-_. ](instruct|it|chat|base|thinking|gguf|hf|text|v\d+(\.\d+)?|\d{4}|\d{2}-\d{2}|128k|1m|distill|reasoning|preview"
    r"|\d+e|\d+x\d+m|17b|mxfp4))+$"
)
#: Other names of the same sizes.
_SAME = {
    "llama-7b": "llama-2-7b", "llama-13b": "llama-2-13b", "llama3-8b": "llama-3-8b", "llama3-70b": "llama-3-70b",
    "glm-z1-32b": "glm-4-32b", "glm-z1-9b": "glm-4-9b", "deepseek-r1-distill-llama-8b": "llama-3-8b",
    "deepseek-r1-distill-llama-70b": "llama-3-70b", "deepseek-r1-distill-qwen-14b": "qwen2.5-14b",
    "deepseek-r1-distill-qwen-32b": "qwen2.5-32b", "deepseek-r1-distill-qwen-7b": "qwen2.5-7b",
    "deepseek-r1-14b": "qwen2.5-14b", "qwen2.5-coder-7b": "qwen2.5-7b", "qwen2.5-coder-14b": "qwen2.5-14b",
    "qwen2.5-coder-32b": "qwen2.5-32b", "qwq-32b": "qwen2.5-32b", "shisa-v2-llama-3.1-8b": "llama-3.1-8b",
    "shisa-v2-llama-3.3-70b": "llama-3.3-70b", "phi-4": "phi-4-14b", "kimi-k2.5": "kimi-k2", "kimi-k2.6": "kimi-k2",
    "deepseek-v3.1": "deepseek-v3", "dots1": "dots.llm1", "mistral-nemo": "mistral-nemo-12b", "llama-4-scout-17b-16e": "llama-4-scout",
    "llama-4-maverick-17b-128e": "llama-4-maverick", "llama-4-scout-17b": "llama-4-scout",
    "mistral-small": "mistral-small-24b", "hunyuan-a13b-instruct": "hunyuan-a13b", "dots.llm1.inst": "dots.llm1",
}  # fmt: skip


def find_model(text: str) -> ModelSizes | None:
    """Return the sizes of a model as people write its name; None for one that is not in the table.

    Examples
    --------
    >>> find_model("Qwen3.8-27B (qwen35 dense, 64 layers)").name
    'qwen3.8-27b'
    >>> find_model("Meta-Llama-3.3-70B-Instruct").name
    'llama-3.3-70b'
    """
    name = re.sub(r"\s*\(.*", "", text.strip().lower()).replace("_", "-").replace(" ", "-")
    name = re.sub(r"^(.*/)?(meta-|unsloth-|google-|thudm-)?", "", name)
    name = re.sub(r"-(instruct|thinking|chat|it)(?=-|$)", "", name)
    while name:
        if name in MODELS:
            return MODELS[name]
        if name in _SAME:
            return MODELS[_SAME[name]]
        shorter = _TAIL.sub("", name)
        if shorter == name:
            return None
        name = shorter
    return None


def header_path(text: str) -> Path:
    """Return a file that has every tensor of ``NAME[:QUANT]``, and no data; it is made when it is not there.

    ``hf:REPO[:QUANT]`` is a model on Hugging Face, whose header is read (`hub_header`).

    Raises
    ------
    FormatError
        No model of that name is in the table, or the name is that of a file.
    GraphError
        No quantisation has that name.
    """
    if text.startswith(PREFIX):
        return _from_hub(text.removeprefix(PREFIX))
    name, _, quant = text.partition(":")
    sizes = find_model(name)
    if sizes is not None and name.lower().endswith(".gguf"):
        raise FormatError(text, "there is no such file", hint=f"for published sizes name the model: {sizes.name}")
    if sizes is None:
        near = difflib.get_close_matches(name.lower(), MODELS, 3, 0.4)
        hint = f"`pyggml models` lists {len(MODELS)}" + (f", such as {', '.join(near)}" if near else "")
        if re.match("https?:/", text):
            hint = "download it, or give the repository as -hf USER/MODEL:QUANT"
        raise FormatError(text, "there is no such file, and no such model in the table", hint=hint)
    quant = quant or sizes.quant
    parse_quant(quant)
    path = headers_folder() / f"{sizes.name}-{quant}.v3.gguf"
    if not path.exists():
        write_header(sizes, quant, path)
    return path


def _from_hub(text: str) -> Path:
    """Return the header of a model on the hub; the error says by which name the table has its sizes."""
    try:
        return hub_header(text)
    except PyggmlError as error:
        repo, colon, quant = text.partition(":")
        known = find_model(re.sub(r"(?i)[-_.]gguf$", "", repo))
        if known is None or isinstance(error, FormatError):
            raise
        hint = f"plan with its published sizes: {known.name}{colon}{quant}"
        raise PyggmlError(error.message, hint=hint) from None


def write_header(s: ModelSizes, quant: str, path: str | os.PathLike[str], *, file_bytes: float | None = None) -> None:
    """Write the header of a model, and room for its tensors that takes no space of the disk.

    Parameters
    ----------
    file_bytes : float, optional
        What all tensors take; see `type_tensors`.

    Raises
    ------
    PyggmlError
        The file cannot be written.
    """
    rows = shapes(s)
    writer = GGUFWriter()
    writer.add("general.architecture", _STR, s.arch)
    writer.add("general.name", _STR, s.name)
    writer.add("general.alignment", _U32, writer.alignment)
    for key, value in _keys(s).items():
        key = f"{s.arch}.{key}"
        if isinstance(value, list):
            kinds = {bool: _BOOL, int: _U32, float: _F32}
            writer.add_array(key, _U64 if ".ple." in key and max(value) > 0xFF else kinds[type(value[0])], value)
        else:
            kind = {bool: _BOOL, int: _U32, float: _F32, str: _STR}[type(value)]
            writer.add(key, kind, value)
    writer.add("tokenizer.ggml.model", _STR, "no_vocab")
    for t in type_tensors(s, rows, quant, file_bytes=file_bytes):
        writer.add_tensor(t.name, t.type, t.ne, list)
    writer.write_header(path)


_Value = bool | int | float | str | list[int] | list[bool] | list[float]


def _keys(s: ModelSizes) -> dict[str, _Value]:
    """Return the keys below the architecture's name."""
    keys: dict[str, _Value] = {
        "vocab_size": s.n_vocab,
        "context_length": s.n_ctx,
        "embedding_length": s.n_embd,
        "block_count": s.n_layer + s.n_nextn,
        "feed_forward_length": s.n_ff or s.n_ff_exp,
        "attention.head_count": s.n_head,
        "attention.head_count_kv": s.n_head_kv,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": s.head,
        "attention.value_length": s.head,
        "rope.freq_base": s.rope_base,
        "rope.dimension_count": s.rope_dim or s.head,
    }
    if s.is_moe:
        keys |= {"expert_count": s.n_expert, "expert_used_count": s.n_used, "expert_feed_forward_length": s.n_ff_exp}
    if s.n_lead:
        keys["leading_dense_block_count"] = s.n_lead
    if s.n_nextn:
        keys["nextn_predict_layers"] = s.n_nextn
    if s.n_ff_shexp:
        keys["expert_shared_feed_forward_length"] = s.n_ff_shexp
        keys["expert_shared_count"] = max(1, s.n_ff_shexp // s.n_ff_exp)
    if s.n_swa:
        keys["attention.sliding_window"] = s.n_swa
    if s.full_interval:
        keys |= {
            "full_attention_interval": s.full_interval,
            "rope.dimension_sections": [11, 11, 10, 0],
            "ssm.conv_kernel": s.ssm_conv,
            "ssm.state_size": s.ssm_state,
            "ssm.group_count": s.ssm_groups,
            "ssm.time_step_rank": s.ssm_heads,
            "ssm.inner_size": s.ssm_heads * s.ssm_state,
        }
    if s.kv_lora and s.arch != "deepseek4":
        keys |= {
            "attention.head_count_kv": 1,
            "attention.kv_lora_rank": s.kv_lora,
            "attention.key_length": s.kv_lora + s.rope_dim,
            "attention.value_length": s.kv_lora,
            "attention.key_length_mla": s.head,
            "attention.value_length_mla": s.head_v,
            "rope.dimension_count": s.rope_dim,
            "expert_weights_scale": 2.5 if s.q_lora else 1.0,
            "expert_weights_norm": bool(s.q_lora),
            "expert_gating_func": 2 if s.q_lora else 1,
        }
        if s.q_lora:
            keys["attention.q_lora_rank"] = s.q_lora
        if s.n_group > 1 and s.arch == "deepseek2":
            keys |= {"expert_group_count": s.n_group, "expert_group_used_count": 4}
    return keys | _own_keys(s)


def _own_keys(s: ModelSizes) -> dict[str, _Value]:
    """Return what a single architecture asks for."""
    if s.arch == "gpt-oss":
        return {
            "rope.scaling.type": "yarn", "rope.scaling.factor": 32.0, "rope.scaling.original_context_length": 4096,
        }  # fmt: skip
    if s.arch == "deepseek4":
        return _selecting(s) | {
            "attention.sliding_window": 128,
            "attention.q_lora_rank": s.q_lora,
            "attention.output_group_count": s.n_group,
            "attention.output_lora_rank": tensors.OUTPUT_RANK,
            "attention.compress_rope_freq_base": 160000.0,
            "attention.indexer.top_k": 512,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 16.0,
            "rope.scaling.original_context_length": 65536,
            "expert_weights_scale": 1.5,
            "expert_weights_norm": True,
            "expert_gating_func": 4,
            "swiglu_clamp_exp": [10.0] * s.n_layer,
            "hyper_connection.sinkhorn_iterations": 20,
            "hyper_connection.epsilon": 1e-6,
            "hash_layer_count": tensors.HASHED_LAYERS,
        }
    if s.arch == "qwen4exp":
        heads, rows = tensors.NGRAM_HEADS, tensors.NGRAM_ROWS
        return _selecting(s) | {
            "attention.indexer.top_k": 2048,
            "hyper_connection.low_rank": tensors.STREAM_RANK,
            "embedding_length_per_layer_input": s.per_layer // heads,
            "ple.layers": [tensors.NGRAM_LAYER],
            "ple.ngram_size": tensors.NGRAM_SIZE,
            "ple.heads_per_ngram": heads // (tensors.NGRAM_SIZE - 1),
            "ple.conv_kernel": s.ssm_conv,
            "ple.eos_token_id": 248044,
            "ple.layer_multipliers": [
                2**40 + 2 * i + 1 for i in range(tensors.NGRAM_SIZE)
            ],  # odd; no size hangs on them
            "ple.head_offsets": [i * rows for i in range(heads)],
            "ple.head_vocab_sizes": [rows] * heads,
        }
    if s.arch == "gemma4":
        windows = [s.has_window(i) for i in range(s.n_layer)]
        return {
            "attention.sliding_window_pattern": windows,
            "attention.head_count_kv": [s.heads(i)[0] for i in range(s.n_layer)],
            "attention.key_length": s.head_full,
            "attention.value_length": s.head_full,
            "attention.key_length_swa": s.head,
            "attention.value_length_swa": s.head,
            "rope.dimension_count": s.head_full,
            "rope.dimension_count_swa": s.head,
            "rope.freq_base_swa": 10000.0,
            "embedding_length_per_layer_input": s.per_layer,
            "attention.shared_kv_layers": s.n_shared_kv,
            "final_logit_softcapping": 30.0,
        }
    if s.arch == "gemma2":
        return {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    if s.arch == "llama4":
        return {"interleave_moe_layer_step": s.moe_step}
    if s.arch == "ernie4_5-moe":
        return {"interleave_moe_layer_step": 1}
    if s.arch in ("glm4moe", "dots1", "minimax-m2"):
        shared: dict[str, _Value] = {"expert_gating_func": 2}
        if s.arch != "minimax-m2":
            shared |= {"expert_weights_scale": 2.5 if s.arch == "dots1" else 1.0, "expert_weights_norm": True}
        if s.arch == "glm4moe":
            shared["rope.dimension_count"] = s.head // 2
        return shared
    return {"rope.dimension_count": s.head // 2} if s.arch == "glm4" else {}


def _selecting(s: ModelSizes) -> dict[str, _Value]:
    """Return the keys of residual streams and of attention that selects positions."""
    return {
        "attention.compress_ratios": [compress_ratio(s, i) for i in range(s.n_layer)],
        "attention.indexer.head_count": tensors.INDEX_HEADS[s.arch],
        "attention.indexer.key_length": tensors.INDEX_WIDTH,
        "hyper_connection.count": tensors.STREAMS,
    }
