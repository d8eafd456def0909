"""Find the smallest header that llama.cpp takes for each of its architectures, and write them all to ``data/headers.json.gz``.

``python tests/llama/find_headers.py [NAME ...]``. Keys are those of upstream's ``tests/test-llama-archs.cpp``; a key that
llama.cpp misses is added, one of another type is changed. No tensor is known beforehand: llama.cpp itself makes them from
the keys (`llama_model_init_from_user`). Each architecture is tried in a process of its own, as assertions may fail.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from headers import DATA, write_header

from pyggml.llama.capturing import CapturingDevice, Watcher
from pyggml.llama.library import LlamaLibrary, find_llama

Keys = dict[str, Any]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


MLA = _names("""
    deepseek2 deepseek32 glm-dsa dots3note kimi-linear bailingmoe3 kimi-k3 glm5-next mistral4 hy_v4
""")
PER_LAYER_HEADS = _names("""
    plamo2 jamba nemotron_h nemotron_h_moe granitehybrid lfm2 lfm2moe kimi-linear bailingmoe3 kimi-k3
    glm5-next
""")
EXPERTS = _names("""
    llama4 qwen2moe qwen3moe qwen3next qwen3vlmoe qwen35moe clef grok qwen4exp phimoe jamba cohere2moe dbrx
    olmoe arctic deepseek deepseek2 deepseek2-ocr deepseek32 deepseek4 glm4moe glm-dsa nemotron_h_moe
    exaone-moe granitemoe graniteswitch bailingmoe bailingmoe2 bailingmoe3 dots1 dots3note afmoe laguna
    ernie4_5-moe hunyuan-moe hy_v3 hy_v4 gpt-oss lfm2moe smallthinker llada-moe grovemoe minimax-01 minimax-m2
    minimax-m3 rnd1 mistral4 mimo2 step35 kimi-linear kimi-k3 glm5-next mellum nomic-bert-moe spark2_5 maple
    gemma4 granitehybrid k2-horizon
""")
WINDOW_BY_LAYER = _names("""
    cohere2moe mimo2 step35 spark2_5 muse-glimmer granite_swa dots3note maple
""")
DELTA_NET = _names("""
    qwen3next qwen35 qwen35moe qwen4exp clef
""")

N_CTX = 256


def _sizes(arch: str) -> dict[str, int]:
    """Return layers, width, heads, heads of K and V, width of feed-forward, vocabulary."""
    s = {"layers": 2, "embd": 256, "heads": 2, "ff": 384, "vocab": 128}
    s |= {
        "llama4": {"layers": 4},
        "gemma4": {"embd": 128, "ff": 192, "layers": 5},
        "gemma3n": {"embd": 64, "heads": 1, "ff": 96, "layers": 22},
        "deepseek4": {"embd": 512, "heads": 8, "ff": 1024, "layers": 4},
        "step35": {"embd": 160},
        "laguna": {"embd": 160},
        "qwen3": {"heads": 4},
        "muse-glimmer": {"heads": 4},
        "afmoe": {"heads": 4},
        "nemotron_h": {"layers": 3},
        "nemotron_h_moe": {"layers": 3},
        "chameleon": {"vocab": 10240},
        "qwen3tts": {"vocab": 3072},
        "hrm_text": {"layers": 6},
        "eagle3": {"layers": 1},
    }.get(arch, {"embd": 128, "heads": 1, "ff": 192} if arch in MLA else {})
    s["heads_kv"] = {"qwen3": 1, "muse-glimmer": 2, "afmoe": 2, "deepseek4": 1}.get(arch, s["heads"])
    return s


def first_keys(arch: str) -> Keys:
    """Return the keys that an architecture is tried with first."""
    s = _sizes(arch)
    n, embd, heads, ff = s["layers"], s["embd"], s["heads"], s["ff"]
    head = embd // heads
    windows = [i % 2 for i in range(n)]
    k: Keys = {
        "vocab_size": s["vocab"], "context_length": N_CTX, "embedding_length": embd, "features_length": embd,
        "block_count": n, "leading_dense_block_count": 1, "use_parallel_residual": False, "logit_scale": 1.0,
        "feed_forward_length": [0 if i <= 1 else ff for i in range(n)] if arch.startswith("nemotron_h") else ff,
        "time_mix_extra_dim": 64, "time_decay_extra_dim": 128, "full_attention_interval": 2,
        "attention.max_alibi_bias": 8.0, "attention.clamp_kqv": 1.0, "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5, "attention.group_norm_epsilon": 1e-5,
        "attention.group_norm_groups": 8, "attention.q_lora_rank": 64 if arch == "deepseek4" else 512,
        "attention.kv_lora_rank": 512, "attention.relative_buckets_count": 8, "attention.sliding_window": N_CTX // 8,
        "attention.indexer.head_count": heads if arch == "minimax-m3" else 64,
        "attention.indexer.key_length": head if arch == "qwen4exp" else 128, "attention.indexer.top_k": 131072,
        "attention.indexer.block_size": 4, "attention.indexer.kpool": 4, "attention.indexer.kpool_select_tail": True,
        "attention.indexer.local_blocks": 1,
        "rope.dimension_sections": [8, 12, 12, 0] if arch == "bailingmoe3" else [head // 4] * 4,
        "ssm.conv_kernel": 4, "ssm.inner_size": 256 if arch in DELTA_NET else 2 * embd, "ssm.state_size": 128,
        "ssm.time_step_rank": heads, "ssm.group_count": 0 if arch == "plamo2" else 2, "ssm.dt_b_c_rms": False,
        "xielu.alpha_n": [1.0] * n, "xielu.alpha_p": [1.0] * n, "xielu.beta": [1.0] * n, "xielu.eps": [1e-7] * n,
        "residual_scale": 3.5, "kda.safe_gate": True, "kda.head_dim": 128, "kda.gate_lower_bound": -5.0,
        "wkv.head_size": head, "shortconv.l_cache": 3, "token_shift_count": 2,
        "attention.sliding_window_pattern": windows if arch in WINDOW_BY_LAYER else 2,
    }  # fmt: skip
    if arch in PER_LAYER_HEADS:
        by_layer = [0 if i == 1 else heads for i in range(n)]
        k["attention.head_count"] = heads if arch == "glm5-next" else by_layer
        k["attention.head_count_kv"] = by_layer
    else:
        k |= {"attention.head_count": heads, "attention.head_count_kv": s["heads_kv"]}
    if arch in EXPERTS:
        k |= {
            "expert_feed_forward_length": ff, "expert_shared_feed_forward_length": ff // 2, "moe_latent_size": ff,
            "interleave_moe_layer_step": 2, "expert_count": 4, "expert_used_count": 2, "expert_shared_count": 1,
            "expert_gating_func": 4 if arch == "deepseek4" else 2, "expert_group_scale": 1.0, "experts_per_group": 1,
            "expert_weights_scale": 1.0, "moe_every_n_layers": 2,
        }  # fmt: skip
    if arch in MLA:
        is_glm5 = arch == "glm5-next"
        k |= {
            "attention.key_length": 512 if is_glm5 else 576, "attention.value_length": 512,
            "rope.dimension_count": 0 if is_glm5 else 64, "attention.key_length_mla": 192,
            "attention.value_length_mla": 128,
        }  # fmt: skip
    return k | _own_keys(arch, n, embd, head, windows)


def _own_keys(arch: str, n: int, embd: int, head: int, windows: list[int]) -> Keys:
    """Return keys that one architecture has for itself."""
    hyper: Keys = {"hyper_connection.count": 4, "hyper_connection.epsilon": 1e-6}
    sinkhorn: Keys = {**hyper, "hyper_connection.sinkhorn_iterations": 2}
    clamped: Keys = {"swiglu_clamp_exp": 10.0, "expert_weights_scale": 1.0, "expert_weights_norm": True}
    global_layers = [1 - w for w in windows]
    own: dict[str, Keys] = {
        "minimax-m3": {"rope.dimension_count": 64},
        "gemma4": {
            "embedding_length_per_layer_input": embd // 2, "attention.shared_kv_layers": 0,
            "attention.key_length_swa": head, "attention.value_length_swa": head, "rope.freq_base_swa": 10000.0,
            "attention.sliding_window_pattern": [1, 1, 1, 1, 0],
        },
        "dots3note": {
            "attention.kv_lora_rank_swa": 512, "attention.key_length_swa": 576, "attention.value_length_swa": 512,
            "attention.key_length_mla_swa": 192, "attention.value_length_mla_swa": 128, "rope.freq_base_swa": 10000.0,
            "attention.indexer.types": global_layers,
        },
        "hy_v4": {**hyper, **clamped, "hyper_connection.magnitude": 2.0, "attention.indexer.types": global_layers},
        "deepseek4": {
            **sinkhorn, **clamped, "attention.key_length": head, "attention.value_length": head,
            "rope.dimension_count": head // 2, "attention.output_group_count": 8, "attention.output_lora_rank": 32,
            "attention.compress_ratios": [0, 0, 4, 128], "attention.compress_rope_freq_base": 160000.0,
            "hash_layer_count": 0,
        },
        "hrm_text": {"hrm.layers_per_stack": 1, "hrm.h_cycles": 2, "hrm.l_cycles": 2},
        "maple": {"swiglu_clamp_exp": 7.0},
        "eagle3": {"target_layers": [0, 1, 1], "target_hidden_size": embd},
        "dflash": {"target_layers": [0, 1, 1], "attention.sliding_window_pattern": windows},
        "gemma4-assistant": {
            "nextn_predict_layers": n, "embedding_length_out": 2 * embd, "attention.sliding_window_pattern": windows,
            "attention.key_length_swa": head, "attention.value_length_swa": head,
        },
        "graniteswitch": {
            "adapters.count": 2, "adapters.lora_rank": 8, "adapters.token_ids_activate": [5, 6],
            "adapters.token_ids_substitute": [7, 8],
        },
        "plm": {"rope.dimension_count": head // 2},
        "rwkv7": {"attention.gate_lora_rank": 8},
        "arwkv7": {"attention.gate_lora_rank": 8, "token_shift_count": 1},
        "rwkv6qwen2": {"token_shift_count": 1},
        "clef": {"decision.routing_block_count": 1, "decision.block_count": 1, "decision.head_count": 2},
        "qwen4exp": {**sinkhorn, "hyper_connection.low_rank": 8},
        "glm5-next": {**sinkhorn, "hyper_connection.low_rank": 8},
    }  # fmt: skip
    out = own.get(arch, {})
    return out | {"tokenizer.ggml.token_type_count": 2} if "bert" in arch else out


#: Tensors by which llama.cpp decides what to make; it looks for them in the file only.
_DECIDING: dict[str, dict[str, list[int]]] = {
    "eagle3": {"token_embd.weight": [256, 128]},
    "gemma4-assistant": {"token_embd.weight": [256, 128]},
    "clef": {"decision.proj_memory.weight": [256, 64], "dec.blk.0.ffn_up.weight": [64, 96]},
}
#: Optional tensors with which llama.cpp builds a graph that it fails on, as published files do not have them.
_LEFT_OUT = {"rwkv6qwen2": "time_mix_first"}
#: Architectures whose other tensors are those of another one, or all only found by what llama.cpp misses in a file.
_LIKE = {"clef": "qwen35", "gemma4-assistant": ""}


def find(arch: str, tries: int = 200) -> tuple[Keys, dict[str, list[int]]]:
    """Return keys and tensors with which llama.cpp loads a model of an architecture."""
    library = LlamaLibrary(find_llama())
    ffi, lib = library.ffi, library.lib
    device = CapturingDevice(
        library, "FIND", free=1 << 40, total=1 << 40, min_batch=None, row_padding=1, watcher=Watcher()
    )
    devices = ffi.new("void *[]", [device.handle, ffi.NULL])
    said: list[str] = []
    library.on_line = said.append
    params = lib.llama_model_default_params()
    params.devices, params.use_extra_bufts, params.load_mode, params.lazy_mode = devices, False, 0, 0
    path = Path(tempfile.mkdtemp()) / "header.gguf"
    keys, tensors = first_keys(arch), {}

    def see(tensor: Any, _: Any) -> None:
        ne = list(tensor.ne)
        while len(ne) > 1 and ne[-1] == 1:
            ne.pop()
        tensors.setdefault(library.text(tensor.name), ne)

    seen = ffi.callback("void(struct ggml_tensor *, void *)", see)
    like = _LIKE.get(arch, arch)
    for _ in range(tries if like else 0):
        write_header(path, like, keys, {})
        gguf = lib.gguf_init_from_file(str(path).encode(), ffi.new("struct gguf_init_params *", [True, ffi.NULL])[0])
        said.clear()
        tensors.clear()
        model = lib.llama_model_init_from_user(gguf, seen, ffi.NULL, params)
        lib.gguf_free(gguf)
        if model != ffi.NULL:
            break
        _mend(like, keys, "".join(said))
    tensors = {name: ne for name, ne in tensors.items() if _LEFT_OUT.get(arch, " ") not in name}
    tensors |= _DECIDING.get(arch, {})
    params.no_alloc = True
    for _ in range(tries if arch in _DECIDING else 0):
        write_header(path, arch, keys, tensors)
        said.clear()
        if lib.llama_model_load_from_file(str(path).encode(), params) != ffi.NULL:
            break
        text = "".join(said)
        if found := re.search(r"tensor '(\S+)' not found", text):
            tensors[found[1]] = [1]
        elif found := re.search(r"tensor '(\S+)' has wrong shape; expected ([\d, ]+), got", text):
            tensors[found[1]] = [int(n) for n in found[2].split(",") if n.strip()]
        else:
            _mend(arch, keys, text)
    return keys, tensors


def _mend(arch: str, keys: Keys, text: str) -> None:
    """Add or change the key that llama.cpp complains of."""
    if found := re.search(r"key not found in model: ([\w.\-]+)", text):
        name = found[1].removeprefix(arch + ".")
        if name in keys:
            raise RuntimeError(f"key {name} is there")
        is_number = re.search("eps|scale|base|bias|factor|clamp|theta|bound|beta", name)
        keys[name] = 1.0 if is_number else 2
    elif found := re.search(r"key ([\w.\-]+) has wrong type (\w+) but expected type (\w+)", text):
        name = found[1].removeprefix(arch + ".")
        value = keys[name][0] if isinstance(keys[name], list) else keys[name]
        keys[name] = {"f32": float, "u32": int, "bool": bool, "str": str, "i32": int}[found[3]](value)
    elif found := re.search(r"error loading model[^:]*: (.*)", text):
        raise RuntimeError(found[1][:300])
    else:
        raise RuntimeError(text[-300:])


def main(names: list[str]) -> None:
    """Find headers, each in a process of its own."""
    kept = json.loads(gzip.decompress(DATA.read_bytes())) if DATA.exists() else {}
    for name in names or sorted(kept):
        run = subprocess.run(
            [sys.executable, __file__, "--one", name], check=False, capture_output=True, text=True, timeout=120,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )  # fmt: skip
        if run.returncode:
            words = [line for line in run.stderr.splitlines() if "Error" in line or "ASSERT" in line]
            kept[name] = {"why_not": (words or [f"status {run.returncode}"])[-1]}
        else:
            kept[name] = json.loads(run.stdout.splitlines()[-1])
        print(name, kept[name].get("why_not", len(kept[name].get("tensors", ()))), flush=True)
    body = json.dumps(dict(sorted(kept.items())), separators=(",", ":")).encode()
    DATA.write_bytes(gzip.compress(body, 9, mtime=0))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        found_keys, found_tensors = find(sys.argv[2])
        print(json.dumps({"keys": found_keys, "tensors": found_tensors}), flush=True)
        os._exit(0)
    main(sys.argv[1:])
