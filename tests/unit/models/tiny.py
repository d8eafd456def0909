"""The tiny models of the recordings, as headers only: 3 layers, 16 experts, 4 used."""

from __future__ import annotations

from pyggml.gguf import TensorInfo
from pyggml.models.architectures import ARCHITECTURES, weight_specs
from pyggml.models.hparams import HParams
from pyggml.models.weights import Weights, resolve_specs
from pyggml.tensor import Tensor
from pyggml.types import Type

#: Architectures whose recorded models have biases of Q, K and V.
_QKV_BIASES = ("gpt-oss", "glm4moe")


def hparams(arch: str, **changes: object) -> HParams:
    """Return the hyper-parameters of a recorded model."""
    values = {
        "arch": arch,
        "name": "tiny",
        "n_vocab": 320,
        "n_ctx_train": 512,
        "n_embd": 256,
        "n_layer": 3,
        "n_head": 4,
        "n_head_kv": 2,
        "n_embd_head_k": 64,
        "n_embd_head_v": 64,
        "n_rot": 64,
        "n_ff": 256 if arch in ("llama", "gpt-oss") else 512,
        "n_expert": 16,
        "n_expert_used": 4,
        "n_ff_exp": 0 if arch == "llama" else 256,
        "norm_rms_eps": 9.999999747378752e-06,
        "rope_type": ARCHITECTURES[arch].rope,
        "rope_scaling": "linear",
        "rope_freq_base": 10000.0,
        "rope_freq_scale": 1.0,
        "rope_attn_factor": 1.0,
        "n_ctx_orig_yarn": 512,
    }
    if arch == "gpt-oss":
        values |= {"n_swa": 16, "swa_layers": frozenset({0, 2}), "rope_freq_base_swa": 10000.0}
    if arch == "glm4moe":
        values |= {
            "n_layer_dense_lead": 1,
            "n_expert_shared": 1,
            "expert_gating": "sigmoid",
            "expert_weights_norm": True,
        }
        values["expert_weights_scale"] = 1.5
    return HParams(**(values | changes))  # type: ignore[arg-type]


def infos(hp: HParams, type: Type = Type.F32) -> dict[str, TensorInfo]:
    """Return the tensors that a file of these sizes holds: what is optional is left out, but the head."""
    head = {"output.weight": TensorInfo("output.weight", type, (hp.n_embd, hp.n_vocab, 1, 1), 0, 0)}
    out: dict[str, TensorInfo] = {}
    biases = (".attn_q.bias", ".attn_k.bias", ".attn_v.bias") if hp.arch in _QKV_BIASES else ()
    norms = (".attn_q_norm.weight", ".attn_k_norm.weight")
    for spec in weight_specs(hp, head):
        if not spec.is_optional or spec.name.endswith(("gate_exps.weight", *norms, *biases)):
            kind = type if sum(n > 1 for n in spec.ne) > 1 else Type.F32
            nbytes = Tensor(kind, spec.ne).nbytes
            out[spec.name] = TensorInfo(spec.name, kind, spec.ne, 0, nbytes)
    return out


def weights(hp: HParams, type: Type = Type.F32) -> Weights:
    """Return weights without memory."""
    present = infos(hp, type)
    specs = resolve_specs(weight_specs(hp, present), present, "tiny.gguf")
    return Weights(specs, [Tensor(present[s.name].type, s.ne, name=s.name) for s in specs], hp.n_layer)
