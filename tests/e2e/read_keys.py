"""Every optional key of the hyper-parameters that llama.cpp b11434 reads for the families built here, and what becomes of it.

The table in docs/upstream.md is this one; `test_read_keys.py` changes each key and compares with live llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pyggml.models.architectures import ARCHITECTURES

Verdict = Literal["honoured", "refused", "cannot matter"]

#: The families, as `families.FAMILIES` names them.
EVERY = tuple(name for name in ARCHITECTURES if name != "qwen3")  # qwen3 is in test_variants.py
_ROUTED = ("glm4moe", "deepseek2", "dots1")
_WINDOWED = ("gpt-oss", "gemma2", "gemma3", "gemma4")
_NO_WINDOW = tuple(family for family in EVERY if family not in _WINDOWED)
_EXPERTS = tuple(f for f in EVERY if ARCHITECTURES[f].may_have_experts or f in ARCHITECTURES[f].moe_names)
_DENSE = tuple(family for family in EVERY if family not in _EXPERTS)
_HYBRID = ("qwen3next", "qwen35moe", "qwen35")
_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
Values = dict[str, Any]


@dataclass(frozen=True)
class ReadKey:
    """A key, without the family's name before it.

    Attributes
    ----------
    families : tuple of str
        That read it.
    verdict : str
        What pyggml makes of it.
    values : tuple of dict
        Keys as a file may have them, this one among them; None takes a key away.
    counts : bool
        Whether one of the values changes llama.cpp's logits; else they say how large tensors are, or nothing.
    """

    name: str
    families: tuple[str, ...]
    verdict: Verdict
    values: tuple[Values, ...]
    counts: bool = True


def _key(name: str, families: tuple[str, ...], verdict: Verdict, *values: Any, counts: bool = True) -> ReadKey:
    return ReadKey(name, families, verdict, tuple(v if isinstance(v, dict) else {name: v} for v in values), counts)


def _size(name: str, families: tuple[str, ...], *values: Any) -> ReadKey:
    return _key(name, families, "honoured", *values, counts=False)


def _nothing(name: str, families: tuple[str, ...], *values: Any) -> ReadKey:
    return _key(name, families, "cannot matter", *values, counts=False)


READ_KEYS: list[ReadKey] = [
    _size("vocab_size", EVERY, None, 64),
    _size("feed_forward_length", EVERY, None, 48, [96, 96, 96], [96, 48, 96]),
    _size("attention.head_count", EVERY, 8, [4, 4, 4]),
    _size("attention.head_count_kv", EVERY, None, 1, [2, 2, 2], [2, 1, 2]),
    _size("attention.key_length", EVERY, None, 8),
    _size("attention.value_length", EVERY, None, 8),
    _size("rope.dimension_count", EVERY, None),
    _size("nextn_predict_layers", EVERY, 0, 1),
    _size("expert_count", _EXPERTS, 4),
    _key("expert_used_count", _EXPERTS, "honoured", 1, 2, [2, 2, 2]),
    _key("expert_group_count", _EXPERTS, "honoured", 1, {"expert_group_count": 4, "expert_group_used_count": 1}, 4),
    _key("expert_group_used_count", _EXPERTS, "honoured", 3, {"expert_group_count": 2, "expert_group_used_count": 1}),
    _key("expert_count", _DENSE, "refused", 1, 3, counts=False),
    _key("expert_used_count", _DENSE, "refused", 1, 3, counts=False),
    _key("expert_group_count", _DENSE, "refused", 1, 3, counts=False),
    _key("expert_group_used_count", _DENSE, "refused", 1, counts=False),
    _key("attention.layer_norm_rms_epsilon", EVERY, "honoured", 0.5),
    _key("rope.freq_base", EVERY, "honoured", None, 100.0),
    _key("rope.scaling.type", EVERY, "honoured", "none", "linear", _YARN),
    _key("rope.scaling.factor", EVERY, "honoured", 0.0, 3.0, {"rope.scale_linear": 2.0, "rope.scaling.factor": 4.0}),
    _key("rope.scale_linear", EVERY, "honoured", 3.0),
    # with 0.5 two experts of gemma4 are as good as equal for one token; from 0.49 and 0.51 on logits agree to 1e-3
    _key("rope.scaling.attn_factor", EVERY, "honoured", 1.5, _YARN | {"rope.scaling.attn_factor": 0.55}),
    _key("rope.scaling.original_context_length", EVERY, "honoured", 0, _YARN,
         _YARN | {"rope.scaling.original_context_length": 16}),
    _key("attention.causal", EVERY, "refused", True, False),
    _nothing("rope.scaling.finetuned", EVERY, True, False),
    _nothing("rope.scaling.alpha", EVERY, 0.5),
    _nothing("embedding_length_out", EVERY, 32),
    _nothing("pooling_type", EVERY, 0, 3),
    _nothing("classifier.pooling_type", EVERY, 1),
    _nothing("classifier.output_labels", EVERY, ["yes", "no"]),
    _nothing("attention.key_length_swa", _NO_WINDOW, 8),
    _nothing("attention.value_length_swa", _NO_WINDOW, 8),
    _nothing("rope.dimension_count_swa", _NO_WINDOW, 8),
    _size("expert_feed_forward_length", tuple(f for f in _EXPERTS if f not in ("llama", "olmoe", "granitemoe")), None, 16),
    _size("expert_shared_feed_forward_length", ("qwen2moe", "granitemoe", "ernie4_5-moe", *_HYBRID[:2]), None, 16),
    _size("expert_shared_count", _ROUTED, 2),
    _size("leading_dense_block_count", (*_ROUTED, "ernie4_5-moe"), None, 2),
    _key("expert_weights_scale", _ROUTED, "honoured", None, 0.0, 3.0),
    _key("expert_weights_norm", _ROUTED, "honoured", None, True, False),
    _key("expert_gating_func", (*_ROUTED, "minimax-m2"), "honoured", None, 1, 2, 3),
    _key("attention.sliding_window", _WINDOWED, "honoured", 4, 40),
    _nothing("attention.sliding_window", ("phi3",), 4, 40),
    _key("attention.sliding_window_pattern", ("gpt-oss", "gemma2", "gemma3"), "honoured",
         *({"attention.sliding_window": 4, "attention.sliding_window_pattern": p} for p in (0, 3, [True, True, False]))),
    _key("rope.freq_base_swa", _WINDOWED, "honoured", 100.0),
    _key("attention.key_length_swa", ("gpt-oss", "gemma2", "gemma3"), "refused", 8, counts=False),
    _key("attention.value_length_swa", ("gpt-oss", "gemma2", "gemma3"), "refused", 8, counts=False),
    _key("rope.dimension_count_swa", ("gpt-oss", "gemma2", "gemma3"), "refused", 8, counts=False),
    _key("rope.dimension_sections", ("glm4",), "honoured", [0, 0, 0, 0], [4, 2, 2, 0], [4, 4, 0, 0]),
    _key("rope.dimension_sections", ("glm4moe",), "refused", [0, 0, 0, 0], [4, 2, 2, 0], 2, counts=False),
    _key("rope.dimension_sections", ("qwen35moe", "qwen35"), "honoured", [8, 0, 0, 0], [2, 2, 2, 2]),
    _size("ssm.conv_kernel", _HYBRID, None, 3),
    _size("ssm.inner_size", _HYBRID, None, 32),
    _size("ssm.state_size", _HYBRID, None, 8),
    _size("ssm.time_step_rank", _HYBRID, None, 2),
    _size("ssm.group_count", _HYBRID, None, 1),
    _size("full_attention_interval", _HYBRID, 2, 3),
    _size("attention.recurrent_layers", _HYBRID, [True, False, True], [True, True, True]),
    _size("attention.key_length_swa", ("gemma4",), 8),
    _size("attention.value_length_swa", ("gemma4",), 8),
    _key("rope.dimension_count_swa", ("gemma4",), "honoured", 8),
    _key("attention.sliding_window_pattern", ("gemma4",), "honoured",
         {"attention.sliding_window": 4, "attention.sliding_window_pattern": [True, False, True]}),
    _size("attention.shared_kv_layers", ("gemma4",), 0, 1),
    _size("embedding_length_per_layer_input", ("gemma4",), 16),
    _nothing("rope.dimension_sections", ("ernie4_5-moe",), [4, 2, 2, 0]),
    _key("final_logit_softcapping", ("gemma3", "gemma4"), "honoured", 0.0, 2.0),
    _key("final_logit_softcapping", ("gemma2",), "honoured", None, 2.0),
    _key("attn_logit_softcapping", ("gemma2",), "honoured", None, 2.0),
    _key("logit_scale", ("granitemoe",), "honoured", 2.0),
    _key("residual_scale", ("granitemoe",), "honoured", None, 2.0),
    _key("embedding_scale", ("granitemoe",), "honoured", None, 2.0),
    _key("attention.scale", ("granitemoe",), "honoured", None, 2.0),
    _size("attention.q_lora_rank", ("deepseek2",), 0),
    _size("attention.key_length_mla", ("deepseek2",), None, 40),
    _size("attention.value_length_mla", ("deepseek2",), None, 8),
    _key("rope.scaling.yarn_log_multiplier", ("deepseek2",), "honoured",
         *(_YARN | {"rope.scaling.yarn_log_multiplier": m} for m in (0.0, 0.0707, 0.5))),
    _key("attention.temperature_scale", ("deepseek2",), "refused", 0.0,
         {"attention.temperature_scale": 0.5, "attention.temperature_length": 4}),
    _nothing("attention.temperature_length", ("deepseek2",), 4),
    _key("interleave_moe_layer_step", ("ernie4_5-moe",), "refused", 1, 3),
]  # fmt: skip
