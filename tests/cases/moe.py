"""Scheduler cases of mixture-of-experts models: Mixtral, Qwen3-MoE and gpt-oss with llama.cpp's placement.

Only names, shapes and order matter; nothing is computed. Weights have a placement, each batch has a graph, and routings
use from one expert to all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .graph import CaseGraph, CaseStatic, CaseTensor, Json, make_case

__all__ = ["ARCHITECTURES", "PLACEMENTS", "ROUTINGS", "Architecture", "MoeModel", "make_machine", "moe_case", "routing"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """The sizes of a model."""

    n_embd: int
    n_head: int
    n_head_kv: int
    n_rot: int  #: elements of a head
    n_ff: int  #: of an expert
    n_expert: int
    n_used: int
    expert_type: str
    has_bias: bool = False  #: ADD after projections, ADD_ID after experts
    has_qk_norm: bool = False
    has_sinks: bool = False
    softmax_late: bool = False  #: the weights are normalised after the choice
    n_vocab: int = 32000


ARCHITECTURES = {
    "mixtral": Architecture(4096, 32, 8, 128, 14336, 8, 2, "q4_K"),
    "qwen3moe": Architecture(2048, 32, 4, 128, 768, 128, 8, "q4_K", has_qk_norm=True),
    "gpt-oss": Architecture(2880, 64, 8, 64, 2880, 32, 4, "mxfp4", has_bias=True, has_sinks=True, softmax_late=True),
    "tiny": Architecture(256, 4, 2, 64, 512, 16, 2, "q8_0", n_vocab=512),
    "tiny-odd": Architecture(288, 6, 2, 48, 96, 40, 4, "q4_0", has_bias=True, n_vocab=512),
}
PLACEMENTS = ("experts_host", "half", "alternate", "host", "device")
ROUTINGS = ("uniform", "skewed", "single", "all", "first", "last", "alternate", "runs")

#: Buffer type and usage of a tensor, by its layer (None: no layer) and kind: attn, exps, cache, embd, out.
Place = Callable[[int | None, str], tuple[str, str]]


def placement(kind: str, n_gpu: int, n_layer: int, *, is_pinned: bool) -> Place:
    """Return the place of each tensor; layers are divided among the devices in order."""
    host = "GPU_Host" if is_pinned and n_gpu else "CPU"

    def place(i_layer: int | None, what: str) -> tuple[str, str]:
        usage = "any" if what == "cache" else "weights"
        if not n_gpu:
            return "CPU", usage
        if i_layer is None:
            return (host, usage) if what == "embd" else (f"GPU{n_gpu - 1}", usage)
        gpu = f"GPU{min(n_gpu - 1, i_layer * n_gpu // n_layer)}"
        on_host = (
            (kind == "experts_host" and what == "exps")
            or (kind == "half" and i_layer < n_layer // 2)
            or (kind == "alternate" and what == "exps" and i_layer % 2 == 1)
            or (kind == "host" and what != "cache")
        )
        if not on_host:
            return gpu, usage
        return ("CPU" if what == "cache" else host), usage

    return place


def make_machine(
    n_gpu: int,
    *,
    has_blas: bool = False,
    events: bool = True,
    set_async: bool = True,
    cpy_async: bool = True,
    alignment: int = 128,
    max_size: int | None = None,
    min_batch: int | None = 32,
) -> Json:
    """Return llama.cpp's buffer types and backends with ``n_gpu`` GPUs; ``min_batch`` None: nothing is offloaded."""
    gpus = [f"GPU{i}" for i in range(n_gpu)]
    hosts = ["CPU", "GPU_Host"] if gpus else ["CPU"]
    bufts: list[Json] = [{"name": name, "host": True, "alignment": 64} for name in hosts]
    backends: list[Json] = []
    for name in gpus:
        buft = {"name": name, "host": False, "alignment": alignment, "alloc_pad": {"quant_row": 512}, "cpy_from": gpus}
        bufts.append(buft | ({"max_size": max_size} if max_size else {}))
        caps: Json = {"set_async": set_async, "get_async": set_async, "events": events}
        caps |= {"cpy_async_from": gpus} if cpy_async else {}
        backend = {"name": name, "device": "GPU", "buft": name, "bufts": [name], "ops": "all", "caps": caps}
        backends.append(backend | ({"offload": {"ops": "all", "min_batch": min_batch}} if min_batch else {}))
    if has_blas:
        ops = {"allow": ["MUL_MAT", "OUT_PROD"], "min_batch": {"MUL_MAT": 32}}
        blas = {"name": "BLAS", "device": "ACCEL", "buft": "CPU", "bufts": hosts, "ops": ops}
        backends.append(blas | {"caps": {"synchronize": False}})
    cpu = {"name": "CPU", "device": "CPU", "buft": "CPU", "bufts": hosts, "ops": "all", "caps": {"synchronize": False}}
    return {"buffer_types": bufts, "backends": [*backends, cpu]}


class MoeModel:
    """Weights and caches of a model, and its graphs.

    Attributes
    ----------
    routers : list of str
        The tensors of the latest graph that contain the ids of each layer.
    """

    def __init__(self, arch: Architecture, n_layer: int, place: Place, *, n_ctx: int = 1024) -> None:
        self.arch, self.n_layer, self.n_ctx = arch, n_layer, n_ctx
        self.static = CaseStatic()
        self.routers: list[tuple[str, int]] = []
        a = arch

        def add(i_layer: int | None, what: str, name: str, type: str, *ne: int) -> CaseTensor:
            return self.static.add(name, type, ne, *place(i_layer, what))

        dense = "q8_0" if a.n_embd % 256 else "q4_K"
        n_q, n_kv = a.n_head * a.n_rot, a.n_head_kv * a.n_rot
        self.token_embd = add(None, "embd", "token_embd.weight", dense, a.n_embd, a.n_vocab)
        self.layers: list[dict[str, CaseTensor]] = []
        for i in range(n_layer):
            shapes: list[tuple[str, str, str, tuple[int, ...]]] = [
                ("attn_norm", "attn", "f32", (a.n_embd,)),
                ("attn_q", "attn", dense, (a.n_embd, n_q)),
                ("attn_k", "attn", dense, (a.n_embd, n_kv)),
                ("attn_v", "attn", dense, (a.n_embd, n_kv)),
                ("attn_out", "attn", "q8_0", (n_q, a.n_embd)),
                ("ffn_norm", "attn", "f32", (a.n_embd,)),
                ("ffn_gate_inp", "attn", "f32", (a.n_embd, a.n_expert)),
                ("ffn_gate_exps", "exps", a.expert_type, (a.n_embd, a.n_ff, a.n_expert)),
                ("ffn_up_exps", "exps", a.expert_type, (a.n_embd, a.n_ff, a.n_expert)),
                ("ffn_down_exps", "exps", a.expert_type, (a.n_ff, a.n_embd, a.n_expert)),
                ("cache_k", "cache", "f16", (n_kv, n_ctx)),
                ("cache_v", "cache", "f16", (n_kv, n_ctx)),
            ]
            if a.has_bias:
                shapes += [
                    ("attn_q.bias", "attn", "f32", (n_q,)),
                    ("attn_k.bias", "attn", "f32", (n_kv,)),
                    ("attn_v.bias", "attn", "f32", (n_kv,)),
                    ("attn_out.bias", "attn", "f32", (a.n_embd,)),
                    ("ffn_gate_inp.bias", "attn", "f32", (a.n_expert,)),
                    ("ffn_gate_exps.bias", "exps", "f32", (a.n_ff, a.n_expert)),
                    ("ffn_up_exps.bias", "exps", "f32", (a.n_ff, a.n_expert)),
                    ("ffn_down_exps.bias", "exps", "f32", (a.n_embd, a.n_expert)),
                ]
            if a.has_qk_norm:
                shapes += [("attn_q_norm", "attn", "f32", (a.n_rot,)), ("attn_k_norm", "attn", "f32", (a.n_rot,))]
            if a.has_sinks:
                shapes += [("attn_sinks", "attn", "f32", (a.n_head,))]
            self.layers.append({key: add(i, what, f"blk.{i}.{key}", type, *ne) for key, what, type, ne in shapes})
        self.output_norm = add(None, "out", "output_norm.weight", "f32", a.n_embd)
        self.output = add(None, "out", "output.weight", dense, a.n_embd, a.n_vocab)

    def graph(self, n_token: int, *, n_past: int = 0, flash: bool = True, ids: str = "topk") -> CaseGraph:
        """Return the graph of a batch.

        Parameters
        ----------
        ids : str
            ``topk``: chosen by the router; ``input``: given by the user; ``view``: a strided view of a user's input.
        """
        g = CaseGraph()
        self.routers = []
        n_kv = min(self.n_ctx, -(-(n_past + n_token) // 256) * 256)
        tokens = g.input("inp_tokens", "i32", [n_token])
        positions = g.input("inp_pos", "i32", [n_token])
        rows = g.input("inp_kv_idxs", "i64", [n_token])
        mask = g.input("kq_mask", "f16" if flash else "f32", [n_kv, -(-n_token // 64) * 64 if flash else n_token])
        out_ids = g.input("inp_out_ids", "i32", [1])
        x = g.get_rows(self.token_embd, tokens, "inp_embd")
        for i in range(self.n_layer):
            attn = self._attention(g, i, x, positions, rows, mask, n_kv, flash=flash)
            if i == self.n_layer - 1:
                attn, x = g.get_rows(attn, out_ids, f"attn_sel-{i}"), g.get_rows(x, out_ids, f"inp_sel-{i}")
            x = g.same("ADD", attn, x, name=f"ffn_inp-{i}")
            x = g.same("ADD", self._experts(g, i, x, ids), x, name=f"l_out-{i}")
        x = g.same("MUL", g.same("RMS_NORM", x, name="norm_final"), self.output_norm, name="result_norm")
        logits = g.mul_mat(self.output, x, "result_output")
        logits.flags.append("output")
        g.results.append(logits)
        return g

    def _attention(
        self,
        g: CaseGraph,
        i: int,
        x: CaseTensor,
        positions: CaseTensor,
        rows: CaseTensor,
        mask: CaseTensor,
        n_kv: int,
        *,
        flash: bool,
    ) -> CaseTensor:
        a, w = self.arch, self.layers[i]
        n, dh = x.ne[1], a.n_rot
        x = g.same("MUL", g.same("RMS_NORM", x, name=f"norm-{i}"), w["attn_norm"], name=f"attn_norm-{i}")
        heads = {}
        for key, n_head in (("q", a.n_head), ("k", a.n_head_kv), ("v", a.n_head_kv)):
            y = g.mul_mat(w[f"attn_{key}"], x, f"{key}-{i}")
            if a.has_bias:
                y = g.same("ADD", y, w[f"attn_{key}.bias"], name=f"{key}_biased-{i}")
            y = g.reshape(y, [dh, n_head, n], f"{key}_heads-{i}")
            if key != "v":
                if a.has_qk_norm:
                    y = g.same(
                        "MUL",
                        g.same("RMS_NORM", y, name=f"{key}_rms-{i}"),
                        w[f"attn_{key}_norm"],
                        name=f"{key}_normed-{i}",
                    )
                y = g.same("ROPE", y, positions, name=f"{key}_rope-{i}")
            heads[key] = y
        g.results += [heads["q"], heads["v"], heads["k"]]
        row = 2 * a.n_head_kv * dh
        seen = {}
        for key in ("k", "v"):
            cache = w[f"cache_{key}"]
            flat = g.reshape(heads[key], [a.n_head_kv * dh, n], f"{key}_flat-{i}")
            g.results.append(g.set_rows(cache, flat, rows, f"{key}_set-{i}"))
            seen[key] = g.view(cache, [dh, a.n_head_kv, n_kv], [2, 2 * dh, row, row * n_kv], name=f"{key}_cache-{i}")
        q, k, v = (g.permute(t, [0, 2, 1, 3], f"{key}_perm-{i}") for key, t in (("q", heads["q"]), *seen.items()))
        if flash:
            o = g.reshape(
                g.flash_attn(q, k, v, mask, w.get("attn_sinks"), f"fattn-{i}"), [dh * a.n_head, n], f"kqv_out-{i}"
            )
        else:
            kq = g.new("f32", [n_kv, n, a.n_head], "MUL_MAT", (k, q), f"kq-{i}")
            kq = g.same("SOFT_MAX", kq, mask, name=f"kq_soft-{i}")
            vt = g.cont(g.permute(v, [1, 0, 2, 3], f"v_trans-{i}"), name=f"v_cont-{i}")
            o = g.new("f32", [dh, n, a.n_head], "MUL_MAT", (vt, kq), f"kqv-{i}")
            o = g.cont(g.permute(o, [0, 2, 1, 3], f"kqv_perm-{i}"), [dh * a.n_head, n], f"kqv_out-{i}")
        g.results.append(o)
        o = g.mul_mat(w["attn_out"], o, f"attn_out-{i}")
        return g.same("ADD", o, w["attn_out.bias"], name=f"attn_out_biased-{i}") if a.has_bias else o

    def _experts(self, g: CaseGraph, i: int, x: CaseTensor, ids: str) -> CaseTensor:
        a, w = self.arch, self.layers[i]
        n, n_used = x.ne[1], a.n_used
        x = g.same("MUL", g.same("RMS_NORM", x, name=f"norm_ffn-{i}"), w["ffn_norm"], name=f"ffn_norm-{i}")
        logits = g.mul_mat(w["ffn_gate_inp"], x, f"ffn_moe_logits-{i}")
        if a.has_bias:
            logits = g.same("ADD", logits, w["ffn_gate_inp.bias"], name=f"ffn_moe_logits_biased-{i}")
        probs = logits if a.softmax_late else g.same("SOFT_MAX", logits, name=f"ffn_moe_probs-{i}")
        if ids == "topk":
            order = g.argsort(probs, f"ffn_moe_argsort-{i}")
            chosen = g.view(order, [n_used, n], order.nb, name=f"ffn_moe_topk-{i}")
            self.routers.append((order.id, n))
        elif ids == "input":
            chosen = g.input(f"ids-{i}", "i32", [n_used, n])
            self.routers.append((chosen.id, n))
        else:
            wide = g.input(f"ids-{i}", "i32", [n_used + 3, n])
            chosen = g.view(wide, [n_used, n], wide.nb, offs=4, name=f"ids_view-{i}")
            self.routers.append((wide.id, n))
        weights = g.get_rows(g.reshape(probs, [1, a.n_expert, n], f"probs_rows-{i}"), chosen, f"ffn_moe_weights-{i}")
        weights = g.reshape(weights, [n_used, n], f"weights_flat-{i}")
        if a.softmax_late:
            weights = g.same("SOFT_MAX", weights, name=f"ffn_moe_weights_soft-{i}")
        else:
            total = g.new("f32", [1, n], "SUM_ROWS", (weights,), f"weights_sum-{i}")
            total = g.same("CLAMP", total, name=f"weights_sum_clamped-{i}", view=(total, 0))
            weights = g.same("DIV", weights, total, name=f"ffn_moe_weights_norm-{i}")
        weights = g.reshape(weights, [1, n_used, n], f"weights_rows-{i}")
        g.results.append(weights)
        x = g.reshape(x, [a.n_embd, 1, n], f"ffn_x-{i}")

        def expert(key: str, y: CaseTensor) -> CaseTensor:
            y = g.mul_mat_id(w[f"ffn_{key}_exps"], y, chosen, f"ffn_moe_{key}-{i}")
            if a.has_bias:
                y = g.same("ADD_ID", y, w[f"ffn_{key}_exps.bias"], chosen, name=f"ffn_moe_{key}_biased-{i}")
            return y

        up, gate = expert("up", x), expert("gate", x)
        y = expert("down", g.glu(gate, up, f"ffn_moe_swiglu-{i}"))
        y = g.same("MUL", y, weights, name=f"ffn_moe_weighted-{i}")
        nb = [4, y.nb[2], y.nb[2] * n, y.nb[2] * n]
        parts = [g.view(y, [a.n_embd, n], nb, offs=y.nb[1] * e, name=f"part{e}-{i}") for e in range(n_used)]
        g.results += parts
        if n_used == 1:
            return g.cont(parts[0], name=f"ffn_moe_out-{i}")
        total = parts[0]
        for e, part in enumerate(parts[1:]):
            total = g.same("ADD", total, part, name=f"moe_sum{e}-{i}")
        return total


def routing(kind: str, n_expert: int, n_used: int, n_token: int, rng: random.Random) -> list[list[int]]:
    """Return the experts of each token."""
    order = list(range(n_expert))
    rng.shuffle(order)
    weights = [1 / (1 + e) ** 2 for e in range(n_expert)]
    rows: list[list[int]] = []
    for token in range(n_token):
        first = token * n_used
        if kind == "uniform":
            row = rng.sample(range(n_expert), n_used)
        elif kind == "skewed":
            row = list(dict.fromkeys(rng.choices(order, weights, k=8 * n_used)))[:n_used]
            row += [row[0]] * (n_used - len(row))
        elif kind == "all":
            row = [(first + j) % n_expert for j in range(n_used)]
        elif kind == "alternate":
            row = [2 * (first + j) % n_expert for j in range(n_used)]
        elif kind == "runs":
            start = rng.choice([0, n_expert // 2, n_expert - n_used])
            row = [(start + j) % n_expert for j in range(n_used)]
        else:
            row = [{"first": 0, "last": n_expert - 1, "single": order[0]}[kind]] * n_used
        rows.append(row)
    return rows


def routing_steps(model: MoeModel, graph: str, kind: str, ids: str, rng: random.Random) -> list[Json]:
    """Return the steps that give each layer of a graph its ids."""
    steps: list[Json] = []
    for name, n_token in model.routers:
        rows = routing(kind, model.arch.n_expert, model.arch.n_used, n_token, rng)
        if ids == "topk":
            data = {"ncols": model.arch.n_expert, "data": rows}
            steps.append({"op": "node_data", "graph": graph, "tensor": name, "rows": data})
            continue
        # ids around the view are invalid
        flat = [id for row in rows for id in (row if ids == "input" else [-1, *row, -7, 999])]
        steps.append({"op": "set_data", "graph": graph, "tensor": name, "i32": flat})
    return steps


def moe_case(
    name: str,
    arch: Architecture,
    machine: Json,
    batches: Sequence[int],
    rng: random.Random,
    *,
    n_layer: int = 2,
    place: str = "experts_host",
    route: str = "uniform",
    ids: str = "topk",
    flash: bool = True,
    parallel: bool = False,
    op_offload: bool = True,
    is_pinned: bool = True,
    reserve: bool = True,
) -> Json:
    """Return a case that reserves like llama.cpp and computes batches one after another."""
    gpus = [b["name"] for b in machine["backends"] if b["device"] == "GPU"]
    model = MoeModel(arch, n_layer, placement(place, len(gpus), n_layer, is_pinned=is_pinned))
    graphs: dict[str, CaseGraph] = {}
    steps: list[Json] = []
    for key, n_token in (("reserve_pp", max(*batches, 64)), ("reserve_tg", 1)) if reserve else ():
        graphs[key] = model.graph(n_token, n_past=256, flash=flash, ids=ids)
        steps += [{"op": "build", "graph": key}, {"op": "reserve", "graph": key}]
    for i, n_token in enumerate(batches):
        key = f"batch{i}"
        graphs[key] = model.graph(n_token, n_past=64 * i, flash=flash, ids=ids)
        steps += [{"op": "reset"}, {"op": "build", "graph": key}, {"op": "alloc_graph", "graph": key}]
        for tensor in ("inp_tokens", "inp_pos"):
            steps.append({"op": "set_data", "graph": key, "tensor": tensor, "i32": list(range(n_token))})
        steps += routing_steps(model, key, route, ids, rng)
        steps.append({"op": "compute", "graph": key, "async": True})
        if rng.random() < 0.6:
            steps.append({"op": "synchronize"})
    sched: Json = {"parallel": parallel, "op_offload": op_offload}
    if gpus and is_pinned:
        sched["bufts"] = ["GPU_Host" if b["device"] == "CPU" else b["buft"] for b in machine["backends"]]
    return make_case(name, machine, model.static, graphs, sched, steps)
