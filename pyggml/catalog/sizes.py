"""Published sizes of well-known models, from their makers' configuration files, one line per model.

Widths are elements, windows are positions. `tensors.py` turns a line into names and shapes, `quantization.py` into types.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

__all__ = ["MODELS", "ModelSizes"]


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """The sizes of a model.

    Attributes
    ----------
    name : str
        In lower case, as in ``NAME[:QUANT]``.
    arch : str
        The ``general.architecture`` of its GGUF files.
    head : int
        Width of a head of Q, K and V.
    n_ff : int
        Width of dense feed-forward layers; in models with experts, of the leading or parallel dense layers.
    n_ff_exp, n_ff_shexp : int
        Width of one expert, and of the shared one.
    n_lead : int
        Dense layers before the first with experts.
    moe_step : int
        One of this number of layers has experts.
    n_swa, swa_period : int
        Window of layers with sliding windows; one of ``swa_period`` layers has none; 0: no windows.
    full_interval : int
        One of this number of layers has attention, the others are recurrent; 0: all have attention.
    n_nextn : int
        Layers that predict further tokens; some files lack them.
    quant : str
        The default quantisation.
    """

    name: str
    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head: int
    n_ff: int
    n_vocab: int
    quant: str = "Q4_K_M"
    n_expert: int = 0
    n_used: int = 0
    n_ff_exp: int = 0
    n_ff_shexp: int = 0
    n_lead: int = 0
    moe_step: int = 1
    tied: bool = False
    n_ctx: int = 131072
    n_swa: int = 0
    swa_period: int = 0
    full_interval: int = 0
    ssm_state: int = 128
    ssm_groups: int = 16
    ssm_heads: int = 0
    ssm_conv: int = 4
    q_lora: int = 0
    kv_lora: int = 0
    rope_dim: int = 0
    head_v: int = 0
    head_kv_full: int = 0  #: heads of K and V in layers without a window, where they differ (gemma4)
    head_full: int = 0  #: their width
    qkv_bias: bool = False
    qk_norm: bool = False
    per_layer: int = 0  #: width of each layer's own embeddings
    n_shared_kv: int = 0  #: last layers that use the K and V of an earlier one
    rope_base: float = 1e6
    n_nextn: int = 0
    n_group: int = 0  #: groups of experts (DeepSeek) or of output projections

    @property
    def is_moe(self) -> bool:
        """Whether the model has experts."""
        return self.n_expert > 0

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.is_moe and layer >= self.n_lead and (layer + 1) % self.moe_step == 0

    def is_recurrent(self, layer: int) -> bool:
        """Whether a layer has a recurrent state instead of K and V."""
        return self.full_interval > 0 and layer < self.n_layer and (layer + 1) % self.full_interval != 0

    def has_window(self, layer: int) -> bool:
        """Whether a layer has a sliding window."""
        return self.swa_period > 0 and (layer + 1) % self.swa_period != 0

    def heads(self, layer: int) -> tuple[int, int]:
        """Return the number of K and V heads of a layer, and their width."""
        if self.head_full and not self.has_window(layer):
            return self.head_kv_full, self.head_full
        return self.n_head_kv, self.head


def _like(model: ModelSizes, *names: str) -> list[ModelSizes]:
    return [replace(model, name=name) for name in names]


# fields of `ModelSizes` that several models share, of whatever types these have
_Fields = dict[str, Any]

_LINEAR: _Fields = {"full_interval": 4, "qk_norm": True, "rope_base": 1e7, "n_ctx": 262144, "rope_dim": 64}
_QWEN36_35B = ModelSizes(
    "qwen3.6-35b-a3b", "qwen35moe", 40, 2048, 16, 2, 256, 0, 248320, n_expert=256, n_used=8, n_ff_exp=512,
    n_ff_shexp=512, ssm_heads=32, **_LINEAR,
)  # fmt: skip
_QWEN35_27B = ModelSizes("qwen3.8-27b", "qwen35", 64, 5120, 24, 4, 256, 17408, 248320, ssm_heads=48, **_LINEAR)
_QWEN3_30B = ModelSizes(
    "qwen3-30b-a3b", "qwen3moe", 48, 2048, 32, 4, 128, 6144, 151936, n_expert=128, n_used=8, n_ff_exp=768, qk_norm=True,
    n_ctx=40960,
)  # fmt: skip
_QWEN3_NEXT = ModelSizes(
    "qwen3-next-80b-a3b", "qwen3next", 48, 2048, 16, 2, 256, 5120, 151936, n_expert=512, n_used=10, n_ff_exp=512,
    n_ff_shexp=512, ssm_heads=32, **_LINEAR,
)  # fmt: skip
_QWEN3_235B = ModelSizes(
    "qwen3-235b-a22b", "qwen3moe", 94, 4096, 64, 4, 128, 12288, 151936, n_expert=128, n_used=8, n_ff_exp=1536,
    qk_norm=True, n_ctx=40960,
)  # fmt: skip
_OSS: _Fields = {
    "n_used": 4, "n_ff_exp": 2880, "n_swa": 128, "swa_period": 2, "qkv_bias": True, "rope_base": 150000.0,
    "quant": "MXFP4",
}  # fmt: skip
_V3: _Fields = {
    "n_expert": 256, "n_used": 8, "n_ff_exp": 2048, "n_ff_shexp": 2048, "n_lead": 3, "q_lora": 1536, "kv_lora": 512,
    "rope_dim": 64, "head_v": 128, "n_ctx": 163840, "rope_base": 10000.0, "n_group": 8,
}  # fmt: skip
_DEEPSEEK_V3 = ModelSizes("deepseek-v3", "deepseek2", 61, 7168, 128, 128, 192, 18432, 129280, **_V3)
_LLAMA3: _Fields = {"n_ctx": 8192, "rope_base": 500000.0}
_LLAMA31: _Fields = {"rope_base": 500000.0}
_LLAMA3_8B = ModelSizes("llama-3-8b", "llama", 32, 4096, 32, 8, 128, 14336, 128256, **_LLAMA3)
_LLAMA3_70B = ModelSizes("llama-3-70b", "llama", 80, 8192, 64, 8, 128, 28672, 128256, **_LLAMA3)
_LLAMA2: _Fields = {"n_ctx": 4096, "rope_base": 10000.0, "quant": "Q4_0"}
_MISTRAL_24B = ModelSizes("mistral-small-24b", "llama", 40, 5120, 32, 8, 128, 32768, 131072, rope_base=1e8)
_QWEN3_: _Fields = {"qk_norm": True, "n_ctx": 40960}
_QWEN25: _Fields = {"qkv_bias": True, "n_ctx": 32768}
_GEMMA3: _Fields = {"qk_norm": True, "n_swa": 1024, "swa_period": 6, "tied": True}
_GEMMA4: _Fields = {"qk_norm": True, "n_swa": 1024, "swa_period": 6, "tied": True, "head_full": 512, "n_ctx": 262144}
_GLM: _Fields = {"n_used": 8, "n_nextn": 1, "qkv_bias": True}
_GLM47_FLASH = ModelSizes(
    "glm-4.7-flash", "deepseek2", 47, 2048, 20, 20, 256, 10240, 154880, n_expert=64, n_used=4, n_ff_exp=1536,
    n_ff_shexp=1536, n_lead=1, q_lora=768, kv_lora=512, rope_dim=64, head_v=256, n_ctx=202752, n_nextn=1,
)  # fmt: skip
_GLM45 = ModelSizes(
    "glm-4.5", "glm4moe", 92, 5120, 96, 8, 128, 12288, 151552, n_expert=160, n_ff_exp=1536, n_ff_shexp=1536, n_lead=3,
    qk_norm=True, **_GLM,
)  # fmt: skip
_MINIMAX = ModelSizes(
    "minimax-m2", "minimax-m2", 62, 3072, 48, 8, 128, 1536, 200064, n_expert=256, n_used=8, n_ff_exp=1536, qk_norm=True,
    rope_dim=64, rope_base=5e6, n_ctx=196608,
)  # fmt: skip
_KIMI = ModelSizes(
    "kimi-k2", "deepseek2", 61, 7168, 64, 64, 192, 18432, 163840, n_expert=384, n_used=8, n_ff_exp=2048, n_ff_shexp=2048,
    n_lead=1, q_lora=1536, kv_lora=512, rope_dim=64, head_v=128, n_group=1, rope_base=50000.0,
)  # fmt: skip
_CODER_480B = ModelSizes(
    "qwen3-coder-480b-a35b", "qwen3moe", 62, 6144, 96, 8, 128, 8192, 151936, n_expert=160, n_used=8, n_ff_exp=2560,
    qk_norm=True, n_ctx=262144, rope_base=1e7,
)  # fmt: skip

_ALL = [
    # OpenAI
    ModelSizes("gpt-oss-20b", "gpt-oss", 24, 2880, 64, 8, 64, 2880, 201088, n_expert=32, **_OSS),
    ModelSizes("gpt-oss-120b", "gpt-oss", 36, 2880, 64, 8, 64, 2880, 201088, n_expert=128, **_OSS),
    # Qwen with recurrent layers
    _QWEN36_35B,
    *_like(_QWEN36_35B, "qwen3.5-35b-a3b", "ornith-1.5-35b-a3b"),
    ModelSizes("qwen3.5-122b-a10b", "qwen35moe", 48, 3072, 32, 2, 256, 0, 248320, n_expert=256, n_used=8, n_ff_exp=1024,
       n_ff_shexp=1024, ssm_heads=64, **_LINEAR),
    ModelSizes("qwen3.5-397b-a17b", "qwen35moe", 60, 4096, 32, 2, 256, 0, 248320, n_expert=512, n_used=10, n_ff_exp=1024,
       n_ff_shexp=1024, ssm_heads=64, **_LINEAR),
    ModelSizes("qwen3.5-4b", "qwen35", 32, 2560, 16, 4, 256, 9216, 248320, ssm_heads=32, tied=True, **_LINEAR),
    ModelSizes("qwen3.5-9b", "qwen35", 32, 4096, 16, 4, 256, 12288, 248320, ssm_heads=32, **_LINEAR),
    _QWEN35_27B,
    *_like(_QWEN35_27B, "qwen3.5-27b", "qwen3.6-27b"),
    _QWEN3_NEXT,
    *_like(_QWEN3_NEXT, "qwen3-coder-next"),
    ModelSizes("qwen3.8-flash-next", "qwen4exp", 48, 2560, 24, 2, 256, 0, 248320, n_expert=512, n_used=10, n_ff_exp=640,
       n_ff_shexp=640, ssm_heads=48, per_layer=2560, **_LINEAR),
    # Qwen 3 and 2.5
    _QWEN3_30B,
    *_like(replace(_QWEN3_30B, n_ctx=262144, rope_base=1e7), "qwen3-30b-a3b-2507", "qwen3-coder-30b-a3b"),
    _QWEN3_235B,
    *_like(replace(_QWEN3_235B, n_ctx=262144, rope_base=5e6), "qwen3-235b-a22b-2507"),
    _CODER_480B,
    ModelSizes("qwen3-0.6b", "qwen3", 28, 1024, 16, 8, 128, 3072, 151936, tied=True, **_QWEN3_),
    ModelSizes("qwen3-1.7b", "qwen3", 28, 2048, 16, 8, 128, 6144, 151936, tied=True, **_QWEN3_),
    ModelSizes("qwen3-4b", "qwen3", 36, 2560, 32, 8, 128, 9728, 151936, tied=True, **_QWEN3_),
    ModelSizes("qwen3-8b", "qwen3", 36, 4096, 32, 8, 128, 12288, 151936, **_QWEN3_),
    ModelSizes("qwen3-14b", "qwen3", 40, 5120, 40, 8, 128, 17408, 151936, **_QWEN3_),
    ModelSizes("qwen3-32b", "qwen3", 64, 5120, 64, 8, 128, 25600, 151936, **_QWEN3_),
    ModelSizes("qwen2.5-0.5b", "qwen2", 24, 896, 14, 2, 64, 4864, 151936, tied=True, **_QWEN25),
    ModelSizes("qwen2.5-1.5b", "qwen2", 28, 1536, 12, 2, 128, 8960, 151936, tied=True, **_QWEN25),
    ModelSizes("qwen2.5-3b", "qwen2", 36, 2048, 16, 2, 128, 11008, 151936, tied=True, **_QWEN25),
    ModelSizes("qwen2.5-7b", "qwen2", 28, 3584, 28, 4, 128, 18944, 152064, **_QWEN25),
    ModelSizes("qwen2.5-14b", "qwen2", 48, 5120, 40, 8, 128, 13824, 152064, **_QWEN25),
    ModelSizes("qwen2.5-32b", "qwen2", 64, 5120, 40, 8, 128, 27648, 152064, **_QWEN25),
    ModelSizes("qwen2.5-72b", "qwen2", 80, 8192, 64, 8, 128, 29568, 152064, **_QWEN25),
    # Llama
    ModelSizes("llama-2-7b", "llama", 32, 4096, 32, 32, 128, 11008, 32000, **_LLAMA2),
    ModelSizes("llama-2-13b", "llama", 40, 5120, 40, 40, 128, 13824, 32000, **_LLAMA2),
    ModelSizes("llama-2-70b", "llama", 80, 8192, 64, 8, 128, 28672, 32000, **_LLAMA2),
    _LLAMA3_8B,
    *_like(replace(_LLAMA3_8B, n_ctx=131072), "llama-3.1-8b"),
    _LLAMA3_70B,
    *_like(replace(_LLAMA3_70B, n_ctx=131072), "llama-3.1-70b", "llama-3.3-70b"),
    ModelSizes("llama-3.1-405b", "llama", 126, 16384, 128, 8, 128, 53248, 128256, **_LLAMA31),
    ModelSizes("llama-3.2-1b", "llama", 16, 2048, 32, 8, 64, 8192, 128256, tied=True, **_LLAMA31),
    ModelSizes("llama-3.2-3b", "llama", 28, 3072, 24, 8, 128, 8192, 128256, tied=True, **_LLAMA31),
    ModelSizes("llama-4-scout", "llama4", 48, 5120, 40, 8, 128, 16384, 202048, n_expert=16, n_used=1, n_ff_exp=8192,
       n_ff_shexp=8192, n_swa=8192, swa_period=4, rope_base=500000.0, n_ctx=1048576),
    ModelSizes("llama-4-maverick", "llama4", 48, 5120, 40, 8, 128, 16384, 202048, n_expert=128, n_used=1, n_ff_exp=8192,
       n_ff_shexp=8192, moe_step=2, n_swa=8192, swa_period=4, rope_base=500000.0, n_ctx=1048576),
    # Mistral
    ModelSizes("mistral-7b", "llama", 32, 4096, 32, 8, 128, 14336, 32000, n_ctx=32768, rope_base=10000.0),
    ModelSizes("mistral-nemo-12b", "llama", 40, 5120, 32, 8, 128, 14336, 131072),
    _MISTRAL_24B,
    *_like(_MISTRAL_24B, "mistral-small-3.1-24b", "mistral-small-3.2-24b", "devstral-small-24b", "magistral-small-24b"),
    ModelSizes("mistral-large-123b", "llama", 88, 12288, 96, 8, 128, 28672, 32768),
    ModelSizes("mixtral-8x7b", "llama", 32, 4096, 32, 8, 128, 14336, 32000, n_expert=8, n_used=2, n_ff_exp=14336, n_ctx=32768),
    ModelSizes("mixtral-8x22b", "llama", 56, 6144, 48, 8, 128, 16384, 32768, n_expert=8, n_used=2, n_ff_exp=16384, n_ctx=65536),
    # Google
    ModelSizes("gemma-2-9b", "gemma2", 42, 3584, 16, 8, 256, 14336, 256000, n_swa=4096, swa_period=2, tied=True, n_ctx=8192),
    ModelSizes("gemma-2-27b", "gemma2", 46, 4608, 32, 16, 128, 36864, 256000, n_swa=4096, swa_period=2, tied=True, n_ctx=8192),
    ModelSizes("gemma-3-4b", "gemma3", 34, 2560, 8, 4, 256, 10240, 262208, **_GEMMA3),
    ModelSizes("gemma-3-12b", "gemma3", 48, 3840, 16, 8, 256, 15360, 262208, **_GEMMA3),
    ModelSizes("gemma-3-27b", "gemma3", 62, 5376, 32, 16, 128, 21504, 262208, **_GEMMA3),
    ModelSizes("gemma-4-26b-a4b", "gemma4", 30, 2816, 16, 8, 256, 2112, 262144, n_expert=128, n_used=8, n_ff_exp=704,
       head_kv_full=2, **_GEMMA4),
    ModelSizes("gemma-4-31b", "gemma4", 60, 5376, 32, 16, 256, 21504, 262144, head_kv_full=4, **_GEMMA4),
    # DeepSeek and Moonshot
    ModelSizes("deepseek-v2-lite", "deepseek2", 27, 2048, 16, 16, 192, 10944, 102400, n_expert=64, n_used=6, n_ff_exp=1408,
       n_ff_shexp=2816, n_lead=1, kv_lora=512, rope_dim=64, head_v=128, rope_base=10000.0, n_ctx=163840),
    _DEEPSEEK_V3,
    *_like(_DEEPSEEK_V3, "deepseek-r1"),
    ModelSizes("deepseek-v4-flash", "deepseek4", 43, 4096, 64, 1, 512, 0, 129280, n_expert=256, n_used=6, n_ff_exp=2048,
       n_ff_shexp=2048, q_lora=1024, kv_lora=512, rope_dim=64, n_group=8, n_ctx=1048576, quant="MXFP4"),
    _KIMI,
    # Zhipu
    ModelSizes("glm-4-32b", "glm4", 61, 6144, 48, 2, 128, 23040, 151552, n_ctx=32768, rope_base=10000.0),
    ModelSizes("glm-4-9b", "glm4", 40, 4096, 32, 2, 128, 13696, 151552, qkv_bias=True, n_ctx=32768, rope_base=10000.0),
    ModelSizes("glm-4.5-air", "glm4moe", 46, 4096, 96, 8, 128, 10944, 151552, n_expert=128, n_ff_exp=1408, n_ff_shexp=1408,
       n_lead=1, **_GLM),
    _GLM45,
    *_like(replace(_GLM45, n_ctx=202752), "glm-4.6", "glm-4.7"),
    _GLM47_FLASH,
    # others
    _MINIMAX,
    *_like(_MINIMAX, "minimax-m2.1", "minimax-m2.5", "minimax-m2.7"),
    ModelSizes("phi-4-14b", "phi3", 40, 5120, 40, 10, 128, 17920, 100352, n_ctx=16384, rope_base=250000.0),
    ModelSizes("hunyuan-a13b", "hunyuan-moe", 32, 4096, 32, 8, 128, 3072, 128167, n_expert=64, n_used=8, n_ff_exp=3072,
       n_ff_shexp=3072, qk_norm=True, tied=True, n_ctx=262144, rope_base=10000.0),
    ModelSizes("dots.llm1", "dots1", 62, 4096, 32, 32, 128, 10944, 152064, n_expert=128, n_used=6, n_ff_exp=1408,
       n_ff_shexp=2816, n_lead=1, qk_norm=True, n_ctx=32768, rope_base=1e7),
    ModelSizes("olmoe-1b-7b", "olmoe", 16, 2048, 16, 16, 128, 1024, 50304, n_expert=64, n_used=8, n_ff_exp=1024, qk_norm=True,
       n_ctx=4096, rope_base=10000.0),
    ModelSizes("ernie-4.5-21b-a3b", "ernie4_5-moe", 28, 2560, 20, 4, 128, 12288, 103424, n_expert=64, n_used=6, n_ff_exp=1536,
       n_ff_shexp=3072, n_lead=1, tied=True, rope_base=500000.0),
    ModelSizes("seed-oss-36b", "seed_oss", 64, 5120, 80, 8, 128, 27648, 155136, qkv_bias=True, rope_base=1e7, n_ctx=524288),
]  # fmt: skip

#: Models by name.
MODELS: dict[str, ModelSizes] = {model.name: model for model in _ALL}
