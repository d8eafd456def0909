"""Tiny models of each family, and what files of a family differ in: keys, tensors that may be missing, layers that nothing runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edited_models import SIZES

from pyggml.types import Type

_NEXTN_LAYER = {
    "attn_norm.weight": (64,),
    "attn_q.weight": (64, 64),
    "attn_k.weight": (32, 64),
    "attn_v.weight": (32, 64),
    "attn_q.bias": (64,),
    "attn_k.bias": (32,),
    "attn_v.bias": (32,),
    "attn_output.weight": (64, 64),
    "post_attention_norm.weight": (64,),
    "ffn_gate_inp.weight": (8, 64),
    "exp_probs_b.bias": (8,),
    "ffn_gate_exps.weight": (8, 32, 64),
    "ffn_down_exps.weight": (8, 64, 32),
    "ffn_up_exps.weight": (8, 32, 64),
    "ffn_gate_shexp.weight": (32, 64),
    "ffn_down_shexp.weight": (64, 32),
    "ffn_up_shexp.weight": (32, 64),
    "nextn.eh_proj.weight": (64, 128),
    "nextn.enorm.weight": (64,),
    "nextn.hnorm.weight": (64,),
    "nextn.shared_head_norm.weight": (64,),
}
_QWEN35_NEXTN_LAYER = {
    **{
        name: shape
        for name, shape in _NEXTN_LAYER.items()
        if name.startswith(("nextn.", "post_attention", "attn_norm"))
    },
    "attn_q.weight": (128, 64),
    "attn_k.weight": (32, 64),
    "attn_v.weight": (32, 64),
    "attn_output.weight": (64, 64),
    "attn_q_norm.weight": (16,),
    "attn_k_norm.weight": (16,),
    "ffn_gate.weight": (96, 64),
    "ffn_up.weight": (96, 64),
    "ffn_down.weight": (64, 96),
}
_ROUTED_WEIGHTS = {
    "ffn_gate_inp.weight": (8, 64),
    "exp_probs_b.bias": (8,),
    "ffn_gate_exps.weight": (8, 32, 64),
    "ffn_down_exps.weight": (8, 64, 32),
    "ffn_up_exps.weight": (8, 32, 64),
}
_EXPERT_WEIGHTS = tuple(
    f"ffn_{part}.weight"
    for part in (
        *("gate_inp", "gate_exps", "up_exps", "down_exps"),
        *("gate_inp_shexp", "gate_shexp", "up_shexp", "down_shexp"),
    )
)


def _scales(*stems: str, layers: tuple[int, ...] = (0, 1, 2), both: bool = True) -> dict[str, tuple[int, ...]]:
    """Return scales beside weights: one for each expert, or one."""
    kinds = ("scale", "input_scale") if both else ("scale",)
    return {f"blk.{i}.{stem}.{kind}": (8 if "exps" in stem else 1,) for i in layers for stem in stems for kind in kinds}


_QKVO = ("attn_q", "attn_k", "attn_v", "attn_output")
_EXPS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 32.0, "rope.scaling.original_context_length": 64}


def _in_layers(tensors: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return tensors of every layer."""
    return {f"blk.{i}.{name}": shape for i in range(3) for name, shape in tensors.items()}


_QKV_BIASES = (("attn_q.bias", 64), ("attn_k.bias", 32), ("attn_v.bias", 32))
GLM4: dict[str, Any] = {
    "renamed_arch": "glm4",
    "without": ("ffn_gate.weight", "ffn_up.weight"),
    "tensors": _in_layers(
        {"ffn_up.weight": (192, 64), "post_attention_norm.weight": (64,), "post_ffw_norm.weight": (64,)}
    ),
}
_PHI3: dict[str, Any] = {
    "renamed_arch": "phi3",
    "without": (*(f"attn_{part}.weight" for part in "qkv"), "ffn_gate.weight", "ffn_up.weight"),
    "tensors": _in_layers({"attn_qkv.weight": (128, 64), "ffn_up.weight": (192, 64)}),
}
GEMMA2: dict[str, Any] = {
    "renamed_arch": "gemma2",
    "without": ("output.weight",),
    "tensors": _in_layers({"post_attention_norm.weight": (64,), "post_ffw_norm.weight": (64,)}),
}
_GEMMA3 = {
    "renamed_arch": "gemma3",
    "without": (*_EXPERT_WEIGHTS, "output.weight"),
    "tensors": {
        **{
            f"blk.{i}.ffn_{part}.weight": (64, 96) if part == "down" else (96, 64)
            for i in range(3)
            for part in ("gate", "up", "down")
        },
        **{f"blk.{i}.post_{part}_norm.weight": (64,) for i in range(3) for part in ("attention", "ffw")},
    },
}
_GEMMA3_KEYS = {"expert_count": None, "expert_used_count": None, "feed_forward_length": 96}

#: Weights of a recurrent layer of qwen35moe.
_HYBRID_LAYER = (
    *("attn_norm.weight", "post_attention_norm.weight", "attn_qkv.weight", "attn_gate.weight", "ssm_conv1d.weight"),
    *("ssm_dt.bias", "ssm_a", "ssm_beta.weight", "ssm_alpha.weight", "ssm_norm.weight", "ssm_out.weight"),
    *_EXPERT_WEIGHTS,
)
#: Name: architecture, and how its file differs.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3moe": ("qwen3moe", {}),
    "llama with scales": ("llama", {"tensors": _scales(*_QKVO, *_EXPS)}),
    "dense llama with scales": (
        "llama-dense",
        {"renamed_arch": "llama", "tensors": _scales(*_QKVO, "ffn_gate", "ffn_up", "ffn_down")},
    ),
    "qwen3moe with some scales": ("qwen3moe", {"tensors": _scales("attn_k", "ffn_up_exps", layers=(1,), both=False)}),
    "qwen3moe in NVFP4 with all scales": (
        "qwen3moe",
        {
            "retyped": {
                **{
                    f"blk.{i}.{stem}.weight": Type.NVFP4
                    for i in range(3)
                    for stem in ("attn_q", "attn_output", *_EXPS[:2])
                },
                "output.weight": Type.NVFP4,
            },
            "tensors": _scales("attn_q", "attn_output", *_EXPS) | {"output.scale": (1,), "output.input_scale": (1,)},
        },
    ),
    "granitemoe with scales of attention": ("granitemoe", {"tensors": _scales(*_QKVO)}),
    "gpt-oss with scales of attention": ("gpt-oss", {"tensors": _scales(*_QKVO)}),
    "deepseek2 with scales": ("deepseek2", {"tensors": _scales("attn_output")}),
    "glm4moe": ("glm4moe", {}),
    "glm4moe, half of each head rotates": ("glm4moe", {"keys": {"rope.dimension_count": 8}}),
    "glm4moe without norms of q and k": ("glm4moe", {"without": ("attn_q_norm.weight", "attn_k_norm.weight")}),
    "glm4moe, tied head, two dense layers": (
        "glm4moe",
        {
            "keys": {"leading_dense_block_count": 2},
            "without": ("output.weight", *(f"blk.1.{name}" for name in _NEXTN_LAYER if "exp" in name or "inp" in name)),
            "tensors": {
                "blk.1.ffn_gate.weight": (96, 64),
                "blk.1.ffn_up.weight": (96, 64),
                "blk.1.ffn_down.weight": (64, 96),
            },
        },
    ),
    "glm4moe with the least keys": (
        "glm4moe",
        {"keys": {"expert_gating_func": None, "expert_weights_norm": None, "expert_weights_scale": None}},
    ),
    "glm4moe with a layer that predicts further": (
        "glm4moe",
        {
            "keys": {"block_count": 4, "nextn_predict_layers": 1},
            "tensors": {f"blk.3.{name}": shape for name, shape in _NEXTN_LAYER.items()},
        },
    ),
    "granitemoe": ("granitemoe", {}),
    "granitemoe with a shared expert, tied": (
        "granitemoe",
        {
            "keys": {"expert_shared_feed_forward_length": 48},
            "without": ("output.weight",),
            "tensors": {
                f"blk.{i}.ffn_{part}_shexp.weight": (64, 48) if part == "down" else (48, 64)
                for i in range(3)
                for part in ("gate", "up", "down")
            },
        },
    ),
    "granitemoe with the least keys": (
        "granitemoe",
        {"keys": {"residual_scale": None, "embedding_scale": None, "attention.scale": None}},
    ),
    "qwen2moe": ("qwen2moe", {}),
    "qwen2moe with the least keys": (
        "qwen2moe",
        {"keys": {"expert_shared_feed_forward_length": None, "expert_feed_forward_length": None}},
    ),
    "qwen2": (
        "qwen2moe",
        {
            "renamed_arch": "qwen2",
            "keys": {"expert_count": None, "expert_used_count": None},
            "without": (*_EXPERT_WEIGHTS, "output.weight"),
            "tensors": {
                f"blk.{i}.ffn_{part}.weight": (64, 96) if part == "down" else (96, 64)
                for i in range(3)
                for part in ("gate", "up", "down")
            },
        },
    ),
    "olmoe": ("olmoe", {}),
    "olmoe with fused q, k and v": (
        "olmoe",
        {
            "without": ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
            "tensors": {f"blk.{i}.attn_qkv.weight": (192, 64) for i in range(3)},
        },
    ),
    "olmoe with a fused projection and its scale": (
        "olmoe",
        {
            "without": ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
            "tensors": {f"blk.{i}.attn_qkv.weight": (192, 64) for i in range(3)} | _scales("attn_qkv", "attn_output"),
        },
    ),
    "deepseek2": ("deepseek2", {}),
    "deepseek2, experts in groups": ("deepseek2", {"keys": {"expert_group_count": 4, "expert_group_used_count": 2}}),
    "deepseek2 with yarn": ("deepseek2", {"keys": {**_YARN, "rope.scaling.yarn_log_multiplier": 0.0707}}),
    "deepseek2 with yarn, other multiplier": (
        "deepseek2",
        {"keys": {**_YARN, "rope.scaling.yarn_log_multiplier": 0.1}},
    ),
    "deepseek2 by softmax, no bias, q at once": (
        "deepseek2",
        {
            "keys": {"expert_gating_func": None, "attention.q_lora_rank": 0},
            "without": ("exp_probs_b.bias", "attn_q_a.weight", "attn_q_a_norm.weight", "attn_q_b.weight"),
            "tensors": {f"blk.{i}.attn_q.weight": (256, 64) for i in range(3)},
        },
    ),
    "deepseek2, gates and ups in one": (
        "deepseek2",
        {
            "without": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
            "tensors": {f"blk.{i}.ffn_gate_up_exps.weight": (8, 64, 64) for i in (1, 2)},
        },
    ),
    "minimax-m2": (
        "glm4moe",
        {
            "renamed_arch": "minimax-m2",
            "keys": {"feed_forward_length": 32, "rope.dimension_count": 8, "leading_dense_block_count": None},
            "without": (
                *("attn_q_norm.weight", "attn_k_norm.weight", "attn_q.bias", "attn_k.bias", "attn_v.bias"),
                *("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight", "post_attention_norm.weight"),
                *("ffn_gate_shexp.weight", "ffn_up_shexp.weight", "ffn_down_shexp.weight"),
            ),
            "tensors": {
                **{f"blk.{i}.attn_q_norm.weight": (64,) for i in range(3)},
                **{f"blk.{i}.attn_k_norm.weight": (32,) for i in range(3)},
                **{f"blk.{i}.ffn_norm.weight": (64,) for i in range(3)},
                **{f"blk.0.{name}": shape for name, shape in _ROUTED_WEIGHTS.items()},
            },
        },
    ),
    "dots1": (
        "glm4moe",
        {
            "renamed_arch": "dots1",
            "sizes": replace(SIZES, kv_heads=4),
            "without": ("attn_q.bias", "attn_k.bias", "attn_v.bias", "post_attention_norm.weight"),
            "tensors": {f"blk.{i}.ffn_norm.weight": (64,) for i in range(3)},
        },
    ),
    "dots1 without a bias": (
        "glm4moe",
        {
            "renamed_arch": "dots1",
            "sizes": replace(SIZES, kv_heads=4),
            "without": (
                *("attn_q.bias", "attn_k.bias", "attn_v.bias"),
                "post_attention_norm.weight",
                "exp_probs_b.bias",
            ),
            "tensors": {f"blk.{i}.ffn_norm.weight": (64,) for i in range(3)},
        },
    ),
    "ernie4_5-moe": (
        "glm4moe",
        {
            "renamed_arch": "ernie4_5-moe",
            "keys": {"interleave_moe_layer_step": 1, "expert_shared_feed_forward_length": 32},
            "without": (
                *("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_q_norm.weight", "attn_k_norm.weight"),
                "post_attention_norm.weight",
            ),
            "tensors": {f"blk.{i}.ffn_norm.weight": (64,) for i in range(3)},
        },
    ),
    "ernie4_5-moe without a shared expert": (
        "glm4moe",
        {
            "renamed_arch": "ernie4_5-moe",
            "keys": {"interleave_moe_layer_step": 1},
            "without": (
                *("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_q_norm.weight", "attn_k_norm.weight"),
                *("ffn_gate_shexp.weight", "ffn_up_shexp.weight", "ffn_down_shexp.weight"),
                *("post_attention_norm.weight", "exp_probs_b.bias", "output.weight"),
            ),
            "tensors": {f"blk.{i}.ffn_norm.weight": (64,) for i in range(3)},
        },
    ),
    "gpt-oss": ("gpt-oss", {}),
    "gpt-oss with yarn": ("gpt-oss", {"keys": _YARN}),
    "gpt-oss, every third layer dense": ("gpt-oss", {"keys": {"attention.sliding_window_pattern": 3}}),
    "gpt-oss, layers named": ("gpt-oss", {"keys": {"attention.sliding_window_pattern": [False, True, True]}}),
    "gemma3": (
        "qwen3moe",
        {
            **_GEMMA3,
            "keys": {**_GEMMA3_KEYS, "attention.sliding_window": 16, "attention.sliding_window_pattern": 3},
        },
    ),
    "gemma3, six layers a period, another base, rows stretched": (
        "qwen3moe",
        {
            **_GEMMA3,
            "keys": {
                **_GEMMA3_KEYS,
                "attention.sliding_window": 16,
                "rope.freq_base_swa": 5000.0,
                "rope.scaling.type": "linear",
                "rope.scaling.factor": 8.0,
            },
        },
    ),
    "gemma3 without windows, logits bent": (
        "qwen3moe",
        {**_GEMMA3, "keys": {**_GEMMA3_KEYS, "final_logit_softcapping": 3.0}},
    ),
    "gemma2": ("llama-dense", GEMMA2),
    "gemma2, a short window in two layers, other bounds, another base": (
        "llama-dense",
        {
            **GEMMA2,
            "keys": {
                "attention.sliding_window": 16,
                "attention.sliding_window_pattern": 3,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 3.0,
                "rope.freq_base_swa": 5000.0,
                "rope.scaling.type": "linear",
                "rope.scaling.factor": 8.0,
            },
        },
    ),
    "qwen3next": ("qwen3next", {}),
    "qwen3next, projections in one by groups, tied": (
        "qwen3next",
        {
            "without": ("output.weight", "blk.0.attn_qkv.weight", "blk.0.attn_gate.weight"),
            "tensors": {"blk.0.ssm_in.weight": (192, 64)},
        },
    ),
    "qwen3next, as many heads of q and k": (
        "qwen3next",
        {
            "keys": {"ssm.group_count": 4, "attention.recurrent_layers": [True, False, True]},
            "without": ("blk.0.attn_qkv.weight", "blk.2.attn_qkv.weight", "ssm_conv1d.weight"),
            "tensors": {
                f"blk.{i}.{name}": shape
                for i in (0, 2)
                for name, shape in (("attn_qkv.weight", (192, 64)), ("ssm_conv1d.weight", (192, 4)))
            },
        },
    ),
    "qwen35moe": ("qwen35moe", {}),
    "qwen35moe with scales": (
        "qwen35moe",
        {
            "tensors": _scales("attn_qkv", "attn_gate", "ssm_out", "ssm_alpha", "ssm_beta", layers=(0, 2))
            | _scales(*_QKVO, layers=(1,))
            | _scales(*_EXPS)
        },
    ),
    "qwen35moe, half of each head rotates, gates and ups in one": (
        "qwen35moe",
        {
            "keys": {"rope.dimension_count": 8, "rope.dimension_sections": [2, 1, 1, 0]},
            "without": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
            "tensors": {f"blk.{i}.ffn_gate_up_exps.weight": (8, 64, 64) for i in range(3)},
        },
    ),
    "qwen35moe, attention last": (
        "qwen35moe",
        {
            "keys": {"block_count": 2},
            "without": tuple(f"blk.2.{name}" for name in _HYBRID_LAYER),
        },
    ),
    "qwen35": ("qwen35-dense", {}),
    "qwen35, tied, with scales": (
        "qwen35-dense",
        {
            "without": ("output.weight",),
            "tensors": _scales("attn_qkv", "attn_gate", "ssm_out", layers=(0, 2))
            | _scales(*_QKVO, layers=(1,))
            | _scales("ffn_gate", "ffn_up", "ffn_down"),
        },
    ),
    "qwen35 with a layer that predicts further": (
        "qwen35-dense",
        {
            "keys": {"block_count": 4, "nextn_predict_layers": 1},
            "tensors": {f"blk.3.{name}": shape for name, shape in _QWEN35_NEXTN_LAYER.items()},
        },
    ),
    "seed_oss": (
        "llama-dense",
        {
            "renamed_arch": "seed_oss",
            "without": ("ffn_norm.weight",),
            "tensors": {f"blk.{i}.post_attention_norm.weight": (64,) for i in range(3)},
        },
    ),
    "seed_oss, tied, with biases": (
        "llama-dense",
        {
            "renamed_arch": "seed_oss",
            "without": ("ffn_norm.weight", "output.weight"),
            "tensors": {
                f"blk.{i}.{name}": (n,)
                for i in range(3)
                for name, n in (("post_attention_norm.weight", 64), *_QKV_BIASES)
            },
        },
    ),
    "glm4": ("llama-dense", GLM4),
    "glm4, a part of each head rotates, with biases, tied": (
        "llama-dense",
        {
            **GLM4,
            "keys": {"rope.dimension_count": 8},
            "without": (*GLM4["without"], "output.weight"),
            "tensors": GLM4["tensors"] | {f"blk.{i}.{name}": (n,) for i in range(3) for name, n in _QKV_BIASES},
        },
    ),
    "phi3": ("llama-dense", _PHI3),
    "phi3 with factors of frequencies, a part of each head rotates, q, k and v apart": (
        "llama-dense",
        {
            "renamed_arch": "phi3",
            "keys": {
                "rope.dimension_count": 8,
                "rope.scaling.type": "longrope",
                "rope.scaling.attn_factor": 1.2,
                "rope.scaling.original_context_length": 128,
            },
            "without": ("ffn_gate.weight", "ffn_up.weight"),
            "tensors": _in_layers({"ffn_up.weight": (192, 64)})
            | {"rope_factors_long.weight": (4,), "rope_factors_short.weight": (4,)},
        },
    ),
    "gemma4": ("gemma4", {}),
    "gemma4, q, k and v in one, gates and ups in one, tied": (
        "gemma4",
        {
            "keys": {"final_logit_softcapping": None, "rope.freq_base_swa": 5000.0},
            "without": (
                *("output.weight", "layer_output_scale.weight", "ffn_gate_exps.weight", "ffn_up_exps.weight"),
                *("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"),
            ),
            "tensors": {"blk.0.attn_qkv.weight": (128, 64)}
            | {f"blk.{i}.ffn_gate_up_exps.weight": (8, 64, 64) for i in range(3)},
        },
    ),
    "gemma4 dense": ("gemma4-dense", {}),
    "gemma4 dense, of two kinds of layers some share": ("gemma4-dense", {"sizes": replace(SIZES, layers=4)}),
    "gpt-oss, another base in its windows": ("gpt-oss", {"keys": {"rope.freq_base_swa": 150000.0}}),
}
