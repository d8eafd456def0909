"""`WeightSpec`: a tensor that a model needs; `Weights`: the tensors by name.

An architecture lists its tensors. Placement decides where each goes, loading makes them, and graph builders read them
by their names in the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import FormatError
from ..gguf import TensorInfo
from ..tensor import Shape, Tensor, pad_ne
from ..types import Op, Type
from .hparams import NOT_BUILT, HParams

__all__ = [
    "EXPERT_OP",
    "LayerWeights",
    "Present",
    "Row",
    "WeightSpec",
    "Weights",
    "attention_rows",
    "dense_rows",
    "expert_rows",
    "gate_up_row",
    "gate_up_rows",
    "layer_specs",
    "nextn_rows",
    "qkv_rows",
    "resolve_specs",
    "rope_factor_specs",
    "scale_specs",
    "shared_rows",
    "skipped",
    "trunk_specs",
]

#: The op that uses weights of experts.
EXPERT_OP = Op.MUL_MAT_ID
#: A tensor of a layer: name without ``blk.N.``, ``ne``, op that uses it, whether it is optional.
_Row = tuple[str, tuple[int, ...], Op, bool]
#: The tensors of a file, by name.
Present = Mapping[str, TensorInfo]
Part = Literal["input", "repeating", "output"]


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One use of a tensor by a model.

    Attributes
    ----------
    name : str
        Name in the file.
    ne : tuple of int
        Required ``ne``.
    part : str
        ``input``, ``repeating`` or ``output``: which device it is placed on.
    layer : int
        The layer of a repeating tensor; otherwise -1.
    op : Op
        The op that uses it, which the device must support with the buffer type.
    is_optional, is_skipped : bool
        The file may lack it; it is in files but no graph uses it.
    """

    name: str
    ne: Shape
    part: Part
    layer: int
    op: Op
    is_optional: bool = False
    is_skipped: bool = False


def spec(name: str, ne: Iterable[int], part: Part, layer: int, op: Op, *, optional: bool = False) -> WeightSpec:
    """Return a `WeightSpec`; the op of a ``.bias`` is ADD or ADD_ID."""
    if name.endswith(".bias"):
        op = Op.ADD_ID if op is EXPERT_OP else Op.ADD
    return WeightSpec(name, pad_ne(tuple(ne)), part, layer, op, optional)


#: What a family lists for a layer.
Row = _Row | WeightSpec


def layer_specs(layer: int, rows: Iterable[Row]) -> list[WeightSpec]:
    """Return the specs of one layer."""
    specs = []
    for row in rows:
        if not isinstance(row, WeightSpec):
            name, ne, op, optional = row
            row = spec(f"blk.{layer}.{name}", ne, "repeating", layer, op, optional=optional)
        specs.append(row)
    return specs


def dense_rows(hp: HParams) -> list[Row]:
    """Return the rows of a dense feed-forward network."""
    return [
        ("ffn_gate.weight", (hp.n_embd, hp.n_ff), Op.MUL_MAT, False),
        ("ffn_down.weight", (hp.n_ff, hp.n_embd), Op.MUL_MAT, False),
        ("ffn_up.weight", (hp.n_embd, hp.n_ff), Op.MUL_MAT, False),
    ]


def gate_up_row(hp: HParams) -> Row:
    """Return the row of a dense feed-forward's gate and up in one weight."""
    return ("ffn_up.weight", (hp.n_embd, 2 * hp.n_ff), Op.MUL_MAT, False)


def expert_rows(
    hp: HParams, n_ff: int, *, is_gate_optional: bool = False, bias: Literal["none", "optional", "required"] = "none"
) -> list[Row]:
    """Return the rows of a router and its experts.

    Parameters
    ----------
    n_ff : int
        Width of one expert.
    is_gate_optional : bool
        Whether the gate may be missing.
    bias : str
        Whether the router has a bias that affects the choice of experts but not their weights.
    """
    return [
        ("ffn_gate_inp.weight", (hp.n_embd, hp.n_expert), Op.MUL_MAT, False),
        *([("exp_probs_b.bias", (hp.n_expert,), Op.ADD, bias == "optional")] if bias != "none" else []),
        ("ffn_gate_exps.weight", (hp.n_embd, n_ff, hp.n_expert), EXPERT_OP, is_gate_optional),
        ("ffn_down_exps.weight", (n_ff, hp.n_embd, hp.n_expert), EXPERT_OP, False),
        ("ffn_up_exps.weight", (hp.n_embd, n_ff, hp.n_expert), EXPERT_OP, False),
    ]


def gate_up_rows(hp: HParams, layer: int, present: Present) -> list[Row]:
    """Return the rows of the experts' gate and up weights, fused if the file has them fused.

    Notes
    -----
    Mirrors `llama_model_base::create_tensor_gate_up_exps`.
    """
    n_embd, n_ff, n_expert = hp.n_embd, hp.n_ff_expert, hp.n_expert
    if f"blk.{layer}.ffn_gate_up_exps.weight" in present:
        return [("ffn_gate_up_exps.weight", (n_embd, 2 * n_ff, n_expert), EXPERT_OP, False)]
    return [(f"ffn_{which}_exps.weight", (n_embd, n_ff, n_expert), EXPERT_OP, False) for which in ("gate", "up")]


def shared_rows(hp: HParams, n_ff: int) -> list[Row]:
    """Return the rows of a shared expert."""
    return [
        ("ffn_gate_shexp.weight", (hp.n_embd, n_ff), Op.MUL_MAT, False),
        ("ffn_down_shexp.weight", (n_ff, hp.n_embd), Op.MUL_MAT, False),
        ("ffn_up_shexp.weight", (hp.n_embd, n_ff), Op.MUL_MAT, False),
    ]


def nextn_rows(hp: HParams) -> list[Row]:
    """Return the additional rows of a layer that predicts the token after the next."""
    return [
        ("nextn.eh_proj.weight", (2 * hp.n_embd, hp.n_embd), Op.MUL_MAT, True),
        ("nextn.enorm.weight", (hp.n_embd,), Op.MUL, True),
        ("nextn.hnorm.weight", (hp.n_embd,), Op.MUL, True),
        ("nextn.embed_tokens.weight", (hp.n_embd, hp.n_vocab), Op.GET_ROWS, True),
        ("nextn.shared_head_head.weight", (hp.n_embd, hp.n_vocab), Op.MUL_MAT, True),
        ("nextn.shared_head_norm.weight", (hp.n_embd,), Op.MUL, True),
    ]


def skipped(specs: Iterable[WeightSpec]) -> list[WeightSpec]:
    """Return the specs marked as in files but unused."""
    return [replace(s, is_skipped=True) for s in specs]


def trunk_specs(hp: HParams, present: Present, *, tied_head: bool = True) -> list[WeightSpec]:
    """Return the specs of the embedding, the last norm and the head; if tied, the embedding can be the head."""
    ne = pad_ne((hp.n_embd, hp.n_vocab))
    head = "output.weight" if "output.weight" in present or not tied_head else "token_embd.weight"
    return [
        WeightSpec("token_embd.weight", ne, "input", -1, Op.GET_ROWS),
        WeightSpec("output_norm.weight", pad_ne((hp.n_embd,)), "output", -1, Op.MUL),
        WeightSpec(head, ne, "output", -1, Op.MUL_MAT),
    ]


def qkv_rows(hp: HParams, layer: int, present: Present, *, n_q_each: int = 1) -> list[Row]:
    """Return the rows of one layer's projections to Q, K and V, fused if the file has them fused.

    Parameters
    ----------
    n_q_each : int
        Q has this many times the elements of its heads.

    Notes
    -----
    Mirrors `llama_model_base::create_tensor_qkv`.
    """
    sizes = {"q": n_q_each * hp.n_embd_head_k * hp.n_head, "k": hp.n_embd_k_gqa, "v": hp.n_embd_v_gqa}
    biases: list[Row] = [(f"attn_{part}.bias", (n,), Op.ADD, True) for part, n in sizes.items()]
    if f"blk.{layer}.attn_qkv.weight" in present:
        n = sum(sizes.values())
        if f"blk.{layer}.attn_qkv.bias" in present:
            biases = [("attn_qkv.bias", (n,), Op.ADD, True)]
        return [("attn_qkv.weight", (hp.n_embd, n), Op.MUL_MAT, False), *biases]
    return [*((f"attn_{part}.weight", (hp.n_embd, n), Op.MUL_MAT, False) for part, n in sizes.items()), *biases]


def attention_rows(hp: HParams, layer: int, present: Present) -> list[Row]:
    """Return the rows of one layer's norm, projections to Q, K and V, and projection from the heads, as most families have them."""
    return [
        ("attn_norm.weight", (hp.n_embd,), Op.MUL, False),
        *qkv_rows(hp, layer, present),
        ("attn_output.weight", (hp.n_embd_head_k * hp.n_head, hp.n_embd), Op.MUL_MAT, False),
    ]


def rope_factor_specs(hp: HParams, layer: int, *, is_long: bool = False) -> list[WeightSpec]:
    """Return the specs of the frequency factors: one tensor that every layer uses, or with ``is_long`` or longrope two."""
    is_long = is_long or hp.rope_scaling == "longrope"
    names = ("rope_factors_long", "rope_factors_short") if is_long else ("rope_freqs",)
    ne = (hp.n_rot // 2, 1, 1, 1)
    return [WeightSpec(f"{n}.weight", ne, "repeating", layer, Op.ROPE, is_optional=True) for n in names]


#: Weights that may have a ``.scale`` and an ``.input_scale``, in llama.cpp's order.
_SCALED = (
    *("attn_q", "attn_k", "attn_v", "attn_output", "attn_qkv", "attn_gate", "ffn_gate", "ffn_down", "ffn_up"),
    *("ffn_gate_shexp", "ffn_down_shexp", "ffn_up_shexp", "ffn_gate_exps", "ffn_down_exps", "ffn_up_exps"),
    *("ssm_in", "ssm_out", "ssm_alpha", "ssm_beta"),
)
#: Prefixes of those in recurrent layers.
_RECURRENT = ("ssm_", "attn_gate")


def scale_specs(
    hp: HParams, specs: Iterable[WeightSpec], present: Present, *, of_ffn: bool, of_recurrent: bool
) -> list[WeightSpec]:
    """Return the specs of the scales of weights: one value for each matrix, or for each expert.

    Files with NVFP4 weights have them. No graph uses ``.input_scale``. Scales of the feed-forward are used with
    ``of_ffn``, those of recurrent layers with ``of_recurrent``.

    Notes
    -----
    Mirrors the generic pass of `llama_model_base::load_tensors`. Differs: scales that llama.cpp reads but does not use
    are not listed, so such a file is refused.
    """
    by_name = {s.name: s for s in specs if not s.is_skipped}
    wanted: list[tuple[str, str]] = [(f"blk.{i}.", stem) for i in range(hp.n_layer) for stem in _SCALED]
    out: list[WeightSpec] = []
    for prefix, stem in [*wanted, ("", "output")]:
        s, info = by_name.get(f"{prefix}{stem}.weight"), present.get(f"{prefix}{stem}.weight")
        if s is None or info is None or (not prefix and info.type is not Type.NVFP4):
            continue
        is_used = of_ffn if stem.startswith("ffn_") else of_recurrent if stem.startswith(_RECURRENT) else True
        if hp.is_mla and stem == "attn_q":
            is_used = False
        ne = pad_ne((hp.n_expert if stem.endswith("exps") else 1,))
        for suffix in ("scale", "input_scale") if is_used else ("input_scale",):
            if (name := f"{prefix}{stem}.{suffix}") in present:
                out.append(WeightSpec(name, ne, s.part, s.layer, s.op, is_optional=True))
    return out


def resolve_specs(specs: Iterable[WeightSpec], present: Present, path: str) -> list[WeightSpec]:
    """Return the specs whose tensors are in the file and used, after checking each.

    Raises
    ------
    FormatError
        A tensor is missing or has another shape, or the file has tensors that the architecture does not know.

    Notes
    -----
    Mirrors `llama_model_loader::check_tensor_dims` and `done_getting_tensors`.
    """
    found: list[WeightSpec] = []
    unused = set(present)
    for s in specs:
        info = present.get(s.name)
        unused.discard(s.name)
        if s.is_skipped:
            continue
        if info is None:
            if s.is_optional:
                continue
            raise FormatError(
                path, f"the tensor '{s.name}' is missing", hint="the model is incomplete: convert it again"
            )
        if info.ne != s.ne:
            raise FormatError(
                path,
                f"'{s.name}' has ne {list(info.ne)}, the metadata asks for {list(s.ne)}",
                offset=info.offset,
                hint="metadata and tensors belong to different models",
            )
        found.append(s)
    if unused:
        raise FormatError(
            path, f"{len(unused)} tensors have no place in this architecture, such as '{min(unused)}'", hint=NOT_BUILT
        )
    return found


class LayerWeights:
    """The weights of one layer, by their names without ``blk.N.``."""

    __slots__ = ("_by_name", "layer")

    def __init__(self, layer: int, by_name: dict[str, Tensor]) -> None:
        self.layer = layer
        self._by_name = by_name

    def __getitem__(self, name: str) -> Tensor:
        return self._by_name[name]

    def get(self, name: str) -> Tensor | None:
        """Return a weight by name, or None."""
        return self._by_name.get(name)

    def items(self) -> Iterable[tuple[str, Tensor]]:
        """Return names and weights."""
        return self._by_name.items()


class Weights:
    """The weights of a model: ``weights["output_norm.weight"]``, ``weights.layers[3]["attn_q.weight"]``.

    Attributes
    ----------
    output : Tensor
        The head; if the file has none, the embedding.
    layers : list of LayerWeights
        The weights of each layer.
    tensors : list of Tensor
        All tensors, each once.
    """

    __slots__ = ("_trunk", "layers", "output", "tensors")

    def __init__(self, specs: Iterable[WeightSpec], tensors: Iterable[Tensor], n_layer: int) -> None:
        by_layer: list[dict[str, Tensor]] = [{} for _ in range(n_layer)]
        self._trunk: dict[str, Tensor] = {}
        self.tensors: list[Tensor] = []
        output: Tensor | None = None
        for s, tensor in zip(specs, tensors, strict=True):
            self.tensors.append(tensor)
            if s.part == "repeating":
                by_layer[s.layer][s.name.removeprefix(f"blk.{s.layer}.")] = tensor
            elif s.part == "output" and s.name.endswith(".weight") and s.op is Op.MUL_MAT:
                output = tensor
            else:
                self._trunk[s.name] = tensor
        assert output is not None
        self.output = output
        self.layers = [LayerWeights(i, d) for i, d in enumerate(by_layer)]
        self.tensors = list(dict.fromkeys(self.tensors))

    def __getitem__(self, name: str) -> Tensor:
        return self._trunk[name]

    def get(self, name: str) -> Tensor | None:
        """Return a weight outside the layers by name, or None."""
        return self._trunk.get(name)
