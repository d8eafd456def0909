"""The type of each tensor for a quantisation: llama.cpp's rules, and known mixes of others.

A quantisation is a name such as ``Q4_K_M``. What its name does not settle, whose importance matrix was used and which
tensors somebody raised by hand, is settled by the size of the file where that is known.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from ..errors import GraphError
from ..types import Type
from .sizes import ModelSizes
from .tensors import Shape

__all__ = ["QUANTS", "TypedTensor", "parse_quant", "type_tensors"]

#: The type that most tensors get, by the quantisation's name (`llama_ftype_get_default_type`).
QUANTS: dict[str, Type] = {
    "F32": Type.F32, "F16": Type.F16, "BF16": Type.BF16, "Q8_0": Type.Q8_0, "Q4_0": Type.Q4_0, "Q4_1": Type.Q4_1,
    "Q5_0": Type.Q5_0, "Q5_1": Type.Q5_1, "Q2_K": Type.Q2_K, "Q2_K_S": Type.Q2_K, "Q3_K_S": Type.Q3_K,
    "Q3_K_M": Type.Q3_K, "Q3_K_L": Type.Q3_K, "Q4_K_S": Type.Q4_K, "Q4_K_M": Type.Q4_K, "Q5_K_S": Type.Q5_K,
    "Q5_K_M": Type.Q5_K, "Q6_K": Type.Q6_K, "IQ1_S": Type.IQ1_S, "IQ1_M": Type.IQ1_M, "IQ2_XXS": Type.IQ2_XXS,
    "IQ2_XS": Type.IQ2_XS, "IQ2_S": Type.IQ2_XS, "IQ2_M": Type.IQ2_S, "IQ3_XXS": Type.IQ3_XXS, "IQ3_XS": Type.IQ3_S,
    "IQ3_S": Type.IQ3_S, "IQ3_M": Type.IQ3_S, "IQ4_NL": Type.IQ4_NL, "IQ4_XS": Type.IQ4_XS, "MXFP4": Type.MXFP4,
}  # fmt: skip
#: Mixes of others, by the rule that comes nearest.
_ALIASES = {
    "Q2_K_L": "Q2_K", "Q2_K_XL": "Q2_K", "Q3_K_XL": "Q3_K_M", "Q4_K_XL": "Q4_K_M", "Q4_K_L": "Q4_K_M", "Q4_K": "Q4_K_M",
    "Q5_K_XL": "Q5_K_M", "Q5_K_L": "Q5_K_M", "Q5_K": "Q5_K_M", "Q6_K_XL": "Q6_K", "Q6_K_L": "Q6_K", "Q8_K_XL": "Q8_0",
    "Q8_0_XL": "Q8_0", "Q3_K": "Q3_K_M", "MXFP4_MOE": "MXFP4",
}  # fmt: skip
#: One step up of a type, as mixes made by hand raise tensors.
_UP = {
    Type.IQ1_S: Type.IQ2_XXS, Type.IQ1_M: Type.IQ2_XXS, Type.IQ2_XXS: Type.IQ2_S, Type.IQ2_XS: Type.IQ3_XXS,
    Type.IQ2_S: Type.IQ3_XXS, Type.Q2_K: Type.Q3_K, Type.IQ3_XXS: Type.IQ4_XS, Type.IQ3_S: Type.IQ4_XS,
    Type.Q3_K: Type.Q4_K, Type.IQ4_XS: Type.Q5_K, Type.IQ4_NL: Type.Q5_K, Type.Q4_K: Type.Q5_K, Type.Q5_K: Type.Q6_K,
    Type.Q6_K: Type.Q8_0,
}  # fmt: skip
_FALLBACK = {
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
}
_KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ssm_conv1d|\.bias$|ffn_gate_inp_shexp|ffn_gate_tid2eid|indexer\.[qk]_proj"
)
#: How near a total is to be to the file's.
_CLOSE = 0.002
_VERY_LOW = ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ2_S", "IQ2_M", "IQ1_M")


@dataclass(frozen=True, slots=True)
class TypedTensor:
    """A tensor of a model: name, ``ne`` in ggml's order, type."""

    name: str
    ne: tuple[int, ...]
    type: Type

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        n = self.type.row_size(self.ne[0])
        for size in self.ne[1:]:
            n *= size
        return n


@dataclass(frozen=True, slots=True)
class Quant:
    """A parsed name of a quantisation."""

    name: str  #: of llama.cpp's rules
    is_mix: bool = False  #: a mix that differs slightly from that rule


def parse_quant(text: str) -> Quant:
    """Parse the name of a quantisation.

    Raises
    ------
    GraphError
        No rule has that name.

    Examples
    --------
    >>> parse_quant("UD-Q4_K_XL")
    Quant(name='Q4_K_M', is_mix=True)
    """
    name = re.sub(r"[ (].*", "", text.strip()).upper().replace("-", "_")
    is_mix = bool(re.match(r"(UD|MIX)_", name))
    name = re.sub(r"^(UD|MIX)_|_R[48]$", "", name)
    if name in _ALIASES:
        return Quant(_ALIASES[name], is_mix=is_mix or name.endswith(("_XL", "_L")))
    if name in QUANTS:
        return Quant(name, is_mix)
    raise GraphError(
        f"no quantisation is called {text!r}", hint=f"there are {', '.join(QUANTS)}, and UD- mixes of them"
    )


def type_tensors(
    s: ModelSizes, rows: Sequence[Shape], quant: str, *, file_bytes: float | None = None
) -> list[TypedTensor]:
    """Return the tensors of a model with their types.

    Parameters
    ----------
    quant : str
        A name of `QUANTS`, or a mix such as ``UD-Q4_K_XL``.
    file_bytes : float, optional
        The size of all tensors, if known: types are raised or lowered until the total is equal.

    Raises
    ------
    GraphError
        No rule has that name.
    """
    q = parse_quant(quant)
    plain = _by_rule(s, rows, q.name)
    if not QUANTS[q.name].is_quantized:
        return plain
    if file_bytes is None:
        return _mix(rows, q.name, plain, Type.Q8_0) if q.is_mix and s.is_moe else plain
    if abs(_total(plain) - file_bytes) <= _CLOSE * file_bytes:
        return plain
    ways = [plain]
    if s.is_moe and q.is_mix:
        ways += [_mix(rows, q.name, plain, rest) for rest in (Type.Q8_0, Type.Q6_K, Type.Q5_K)]
    fitted = [_fit(way, file_bytes) for way in ways]
    near = [(n, way) for n, way in fitted if abs(_total(way) - file_bytes) <= 2 * _CLOSE * file_bytes]
    if near:
        return min(near, key=lambda found: found[0])[1]
    return min((way for _, way in fitted), key=lambda way: abs(_total(way) - file_bytes))


def _total(tensors: Iterable[TypedTensor]) -> int:
    return sum(t.nbytes for t in tensors)


def _mix(rows: Sequence[Shape], name: str, plain: list[TypedTensor], rest: Type) -> list[TypedTensor]:
    """Return a mix made by hand: experts of the named type, ``ffn_down_exps`` one step up, the rest of another type.

    Notes
    -----
    unsloth's files of 2026 are so, with Q8_0 for what every token reads; those of 2025 are nearer to the rule.
    """
    base = QUANTS[name]
    out = []
    for row, tensor in zip(rows, plain, strict=True):
        if not _is_quantized(row) or row.name.startswith("per_layer"):
            out.append(tensor)
        elif "_exps." in row.name:
            type = _UP.get(base, base) if "down" in row.name else base
            out.append(TypedTensor(row.name, row.ne, _fitting(row, type)))
        else:
            out.append(TypedTensor(row.name, row.ne, _fitting(row, rest)))
    return out


def _fit(tensors: list[TypedTensor], file_bytes: float) -> tuple[int, list[TypedTensor]]:
    """Raise or lower feed-forward tensors, one after another, until the total is that of the file.

    Returns
    -------
    n_changed : int
    tensors : list of TypedTensor
    """
    out, n_changed = list(tensors), 0
    total = _total(out)
    order = [i for i, t in enumerate(out) if re.search(r"ffn_(down|up|gate|gate_up)(_exps)?\.weight", t.name)]
    order.sort(key=lambda i: ("down" not in out[i].name, i * 7 % 11))
    steps = _UP if total < file_bytes else _DOWN
    for _ in range(4):
        for i in order:
            if abs(total - file_bytes) <= _CLOSE / 2 * file_bytes:
                return n_changed, out
            t = out[i]
            type = steps.get(t.type, t.type)
            changed = TypedTensor(t.name, t.ne, _fitting(Shape(t.name, t.ne), type))
            if abs(total + changed.nbytes - t.nbytes - file_bytes) < abs(total - file_bytes):
                out[i], n_changed, total = changed, n_changed + 1, total + changed.nbytes - t.nbytes
    return n_changed, out


_DOWN = {
    Type.Q4_K: Type.IQ4_XS, Type.Q5_K: Type.Q4_K, Type.Q6_K: Type.Q5_K, Type.Q3_K: Type.IQ3_XXS, Type.Q2_K: Type.IQ2_XS,
    Type.IQ3_XXS: Type.IQ2_S, Type.IQ2_XXS: Type.IQ1_M, Type.IQ1_M: Type.IQ1_S, Type.Q8_0: Type.Q6_K,
}  # fmt: skip


def _is_quantized(row: Shape) -> bool:
    """Whether llama.cpp quantises a tensor at all (`tensor_allows_quantization`)."""
    return len(row.ne) > 1 and row.name.endswith(".weight") and not _KEPT.search(row.name)


def _fitting(row: Shape, type: Type) -> Type:
    """Return a type whose blocks divide the rows (`tensor_type_fallback`)."""
    if row.ne[0] % type.block_size == 0:
        return type
    type = _FALLBACK.get(type, Type.IQ4_NL if type.block_size == 256 else type)
    return type if row.ne[0] % type.block_size == 0 else Type.F16


def _by_rule(s: ModelSizes, rows: Sequence[Shape], name: str) -> list[TypedTensor]:
    base = QUANTS[name]
    kinds = [_category(row.name) for row in rows]
    counts = {kind: kinds.count(kind) for kind in ("v", "down")}
    seen = {"v": 0, "down": 0}
    out = []
    for row, kind in zip(rows, kinds, strict=True):
        is_quantized = _is_quantized(row)
        if not is_quantized:
            type = Type.I32 if "tid2eid" in row.name else Type.F32
        elif not base.is_quantized:
            type = base
        else:
            type = _fitting(row, _rule(s, row, kind, name, base, seen, counts))
        if s.arch == "gpt-oss" and name == "MXFP4" and len(row.ne) == 2 and is_quantized:
            type = Type.Q8_0 if row.ne[0] % 32 == 0 else Type.F16
        out.append(TypedTensor(row.name, row.ne, type))
    return out


@cache
def _category(name: str) -> str:
    """Return the kind of tensor that the rules know (`tensor_get_category`)."""
    for part, kind in (
        ("attn_qkv.weight", "qkv"), ("attn_kv_b.weight", "kv_b"), ("attn_v.weight", "v"), ("attn_k.weight", "k"),
        ("attn_q.weight", "q"), ("attn_output.weight", "o"), ("ffn_up", "up"), ("ffn_gate", "gate"),
        ("ffn_down", "down"),
    ):  # fmt: skip
        if part in name:
            return kind
    return {"output.weight": "output", "token_embd.weight": "embd", "per_layer_token_embd.weight": "embd"}.get(name, "")


def _more_bits(i: int, n: int) -> bool:
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _rule(
    s: ModelSizes, row: Shape, kind: str, name: str, base: Type, seen: dict[str, int], counts: dict[str, int]
) -> Type:
    """Return the type of one tensor; ``kind``: its `_category`.

    Notes
    -----
    Mirrors `llama_tensor_get_type_impl`. Differs: rules of falcon and of unused names are left out; files of IQ types
    are taken to be made with an importance matrix, and others without.
    """
    gqa = s.n_head // s.n_head_kv if s.n_head_kv else 1
    if s.kv_lora and not s.is_recurrent(0):
        gqa = s.n_head
    is_8 = s.n_expert == 8
    if kind == "output" or (kind == "embd" and s.tied):
        if name == "MXFP4" or row.ne[0] % base.block_size:
            return Type.Q8_0
        return Type.Q5_K if name in (*_VERY_LOW, "IQ3_XXS") else base if base is Type.Q8_0 else Type.Q6_K
    if name == "MXFP4":
        return Type.MXFP4 if len(row.ne) > 2 else Type.Q8_0
    if kind == "embd":
        if name in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
            return Type.Q2_K
        return Type.IQ3_S if name in ("IQ2_S", "IQ2_M", "IQ3_XXS") else base
    i_layer = int(m[1]) if (m := re.match(r"blk\.(\d+)\.", row.name)) else 0
    if kind in ("v", "qkv", "kv_b"):
        i_v, seen["v"] = seen["v"], seen["v"] + (kind == "v")
        return _attn_v(s, name, base, i_v, counts["v"], gqa, is_8)
    i_down = seen["down"]
    n_layer = s.n_layer + s.n_nextn if s.is_moe else counts["down"]
    if kind == "down":
        seen["down"] += 1
        i_down = i_layer if s.is_moe else i_down
        n_layer = counts["down"] if not s.is_moe else n_layer
    if name in _VERY_LOW:
        mild = name in ("IQ2_S", "IQ2_M")
        if kind == "k" and is_8:
            return Type.Q4_K
        if kind == "down" and i_down < n_layer // 8:
            return Type.IQ3_S if mild else Type.Q2_K
        if kind == "o":
            if is_8:
                return Type.Q5_K
            return Type.IQ2_XXS if name in ("IQ1_S", "IQ1_M") else Type.IQ3_S if mild else base
        return base
    if kind == "k" and is_8:
        return Type.Q8_0
    if kind in ("k", "q"):
        return {"IQ3_XS": Type.IQ3_XXS, "IQ3_XXS": Type.IQ2_S}.get(name, base)
    if kind == "down":
        return _ffn_down(name, base, i_down, n_layer, is_8)
    if kind == "o":
        if is_8:
            return base if name in ("Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0", "Q4_0", "Q5_0", "Q4_1", "Q5_1") else Type.Q5_K
        return {
            "Q2_K": Type.Q3_K, "IQ3_XXS": Type.IQ3_S, "Q3_K_M": Type.Q4_K, "Q3_K_L": Type.Q5_K, "IQ3_M": Type.Q4_K,
        }.get(name, base)  # fmt: skip
    if kind in ("gate", "up") and name == "IQ3_XS" and n_layer // 8 <= i_layer < 7 * n_layer // 8:
        return Type.IQ3_XXS
    return base


def _attn_v(s: ModelSizes, name: str, base: Type, i: int, n: int, gqa: int, is_8: bool) -> Type:
    type = base
    if name in _VERY_LOW:
        many = gqa >= 4 or s.n_expert >= 4
        return Type.Q4_K if many else Type.IQ3_S if name in ("IQ2_S", "IQ2_M") else Type.Q2_K
    if name == "Q2_K":
        type = Type.Q4_K if gqa >= 4 else Type.Q3_K
    elif (name in ("Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S") and gqa >= 4) or name == "IQ3_M":
        type = Type.Q4_K
    elif name == "Q3_K_M":
        type = Type.Q5_K if i < 2 else Type.Q4_K
    elif name == "Q3_K_L" or (name in ("IQ4_NL", "IQ4_XS") and gqa >= 4):
        type = Type.Q5_K
    elif name in ("Q4_K_M", "Q5_K_M") and _more_bits(i, n):
        type = Type.Q6_K
    elif name == "Q4_K_S" and i < 4:
        type = Type.Q5_K
    if s.n_layer == 80 and type in (Type.Q3_K, Type.Q4_K):
        type = Type.Q5_K
    return Type.Q8_0 if is_8 else type


def _ffn_down(name: str, base: Type, i: int, n: int, is_8: bool) -> Type:
    if name == "Q2_K":
        return Type.Q3_K
    if name == "Q2_K_S":
        return Type.Q4_K if i < n // 8 else base
    if name == "Q3_K_M":
        return Type.Q5_K if i < n // 16 else Type.Q4_K
    if name == "IQ3_M":
        return Type.Q4_K if i < n // 8 or (is_8 and _more_bits(i, n)) else base
    if name == "Q3_K_L":
        return Type.Q5_K
    if name in ("Q4_K_M", "Q5_K_M"):
        return Type.Q6_K if _more_bits(i, n) else base
    return Type.Q5_K if name == "Q4_K_S" and i < n // 8 else base
