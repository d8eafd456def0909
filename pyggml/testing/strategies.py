"""Hypothesis strategies for scheduler cases: random machines, graphs, placements, routings and steps.

A graph is drawn as a *program*, a list of small tuples of numbers, that an interpreter without choices of its own turns
into tensors. So a failing example shrinks by losing instructions, and what is left is small.

Examples
--------
>>> from hypothesis import given
>>> @given(cases())
... def test_something(case): ...
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from .case_graph import CaseGraph, CaseStatic, CaseTensor, Json, make_case
from .case_moe import ARCHITECTURES, PLACEMENTS, ROUTINGS, make_machine, moe_case, routing

__all__ = ["INSTRUCTIONS", "Instruction", "cases", "interpret", "machines", "moe_cases", "programs"]

HEADS = 4
N_KV = 64
N_ROWS = 96  #: of the embedding

#: What, then three numbers that choose sources and forms.
Instruction = tuple[str, int, int, int]
INSTRUCTIONS = (
    *(
        "add",
        "bias",
        "norm",
        "unary",
        "scale",
        "mul_mat",
        "mul_mat",
        "moe",
        "moe",
        "moe",
        "reshape",
        "rope",
        "soft_max",
    ),
    *("get_rows", "set_rows", "cpy", "slice", "flash_attn", "concat", "clamp", "inplace", "output", "glu"),
)
#: Ops that a device may lack without making graphs impossible (what writes into caches is not among them).
DENIABLE = (
    *("ROPE", "SOFT_MAX", "GET_ROWS", "FLASH_ATTN_EXT", "UNARY", "ADD_ID", "CONT", "MUL_MAT_ID", "CONCAT", "RMS_NORM"),
    *("MUL_MAT", "ADD", "MUL", "GLU", "SCALE", "ARGSORT"),
)


def programs(max_size: int = 40) -> st.SearchStrategy[list[Instruction]]:
    """Return programs; each instruction's numbers are taken modulo what there is to choose from."""
    back = st.sampled_from([0, 0, 0, 0, 1, 2, 5, 11])  # mostly the latest result, so that most results are needed
    number = st.integers(0, 11)
    instruction = st.tuples(st.sampled_from(INSTRUCTIONS), back, number, number)
    lengths = st.sampled_from([0, max_size // 4, max_size // 2])
    return lengths.flatmap(lambda n: st.lists(instruction, min_size=n, max_size=max_size))


# -- machines ------------------------------------------------------------------


@st.composite
def machines(draw: st.DrawFn, *, may_fail: bool = True) -> Json:
    """Draw buffer types and backends of any abilities; the last backend is a CPU that runs all.

    Parameters
    ----------
    may_fail : bool
        Whether backends may fail to compute, and buffer types to allocate.
    """
    n_gpu = draw(st.sampled_from([1, 0, 2, 3]))
    gpus = [f"GPU{i}" for i in range(n_gpu)]
    hosts = ["CPU", "GPU_Host"] if n_gpu else ["CPU"]
    bufts: list[Json] = [{"name": n, "host": True, "alignment": draw(st.sampled_from([64, 32, 16]))} for n in hosts]
    for name in gpus:
        buft: Json = {"name": name, "host": False, "alignment": draw(st.sampled_from([128, 64, 256, 512]))}
        pad = draw(st.sampled_from([{"quant_row": 512}, None, {"quant_row": 512}, {"extra": 40}, {"round_to": 1024}]))
        max_size = draw(st.sampled_from([None, None, None, 1 << 20, 200_000, 40_960]))
        limit = 60_000 if may_fail and draw(st.integers(0, 29)) == 29 else None
        from_ = draw(st.sampled_from([gpus, None, [*hosts, *gpus], []]))
        options = {"alloc_pad": pad, "max_size": max_size, "alloc_limit": limit, "cpy_from": from_}
        bufts.append(buft | {key: value for key, value in options.items() if value is not None})
    backends = [draw(_gpus(name, gpus, hosts, may_fail=may_fail)) for name in gpus]
    if draw(st.integers(0, 3)) == 3:
        ops = {"allow": ["MUL_MAT", "OUT_PROD"], "min_batch": {"MUL_MAT": draw(st.sampled_from([32, 2]))}}
        blas = {"name": "BLAS", "device": "ACCEL", "buft": "CPU", "bufts": hosts, "ops": ops}
        backends.append(blas | {"caps": {"synchronize": False}})
    cpu: Json = {"name": "CPU", "device": "CPU", "buft": "CPU", "bufts": hosts, "ops": "all"}
    return {"buffer_types": bufts, "backends": [*backends, cpu | {"caps": {"synchronize": draw(st.booleans())}}]}


@st.composite
def _gpus(draw: st.DrawFn, name: str, gpus: list[str], hosts: list[str], *, may_fail: bool) -> Json:
    is_integrated = draw(st.integers(0, 4)) == 4
    others = draw(st.sampled_from([[], [], [], [g for g in gpus if g != name]]))
    caps: Json = {}
    for key in ("set_async", "get_async", "events", "synchronize"):
        caps[key] = draw(st.booleans())
    from_ = draw(st.sampled_from([gpus, [*hosts, *gpus], [], None]))
    backend: Json = {
        "name": name,
        "device": "IGPU" if is_integrated else "GPU",
        "buft": name,
        "bufts": [name, *others, *(hosts if is_integrated else [])],
        "ops": draw(_ops()),
        "caps": caps | ({} if from_ is None else {"cpy_async_from": from_}),
    }
    if draw(st.integers(0, 3)) < 3:
        which = draw(st.sampled_from(["all", "all", ["MUL_MAT_ID"], ["MUL_MAT", "MUL_MAT_ID", "ADD_ID"]]))
        backend["offload"] = {"ops": which, "min_batch": draw(st.sampled_from([32, 1, 8]))}
    return backend


@st.composite
def _ops(draw: st.DrawFn) -> str | Json:
    kind = draw(st.sampled_from(["all", "all", "deny", "deny", "allow", "min_batch"]))
    if kind == "all":
        return "all"
    if kind == "allow":
        some = draw(st.lists(st.sampled_from(DENIABLE), unique=True, max_size=8))
        return {"allow": ["SET_ROWS", "CPY", *some]}
    if kind == "min_batch":
        return {"deny": [], "min_batch": {"MUL_MAT": draw(st.sampled_from([2, 32])), "MUL_MAT_ID": 2}}
    deny: Json = {"deny": draw(st.lists(st.sampled_from(DENIABLE), unique=True, max_size=4))}
    if draw(st.integers(0, 3)) == 3:
        deny["deny_src0_types"] = [draw(st.sampled_from(["q4_0", "q8_0", "f16"]))]
    return deny


# -- weights and graphs --------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """The static tensors that a program's instructions choose from."""

    static: CaseStatic
    n_embd: int
    n_expert: int
    n_used: int
    dense: list[CaseTensor]
    experts: list[CaseTensor]
    expert_bias: list[CaseTensor]
    norms: list[CaseTensor]
    caches: list[CaseTensor]
    embedding: CaseTensor
    freqs: CaseTensor
    sinks: CaseTensor


@st.composite
def _weights(draw: st.DrawFn, bufts: list[str]) -> Weights:
    static = CaseStatic()
    n_embd = draw(st.sampled_from([128, 256]))
    n_expert = draw(st.sampled_from([5, 16, 48]))
    types = st.sampled_from(["q8_0", "f16", "q4_0", *(["q4_K"] if n_embd == 256 else [])])

    def add(name: str, type: str, *ne: int, usage: str = "weights") -> CaseTensor:
        buft = draw(st.sampled_from(bufts))
        if usage == "weights" and draw(st.integers(0, 15)) == 15:
            usage = "any"
        return static.add(name, type, ne, buft, usage)

    dense = [
        add(f"w{i}", draw(types), n_embd, draw(st.sampled_from([n_embd, n_embd, 2 * n_embd])))
        for i in range(draw(st.integers(1, 5)))
    ]
    experts = [add(f"exps{i}", draw(types), n_embd, n_embd, n_expert) for i in range(draw(st.integers(1, 4)))]
    return Weights(
        static,
        n_embd,
        n_expert,
        draw(st.integers(1, 4)),
        dense,
        experts,
        [add(f"exps{i}_b", "f32", n_embd, n_expert) for i in range(2)],
        [add(f"norm{i}", "f32", n_embd) for i in range(2)],
        [add(f"cache{i}", "f16", n_embd, N_KV, usage="any") for i in range(2)],
        add("tok_embd", draw(types), n_embd, N_ROWS),
        add("rope_freqs", "f32", n_embd // HEADS // 2),
        add("sinks", "f32", HEADS),
    )


def interpret(program: list[Instruction], w: Weights, n_token: int) -> tuple[CaseGraph, list[str]]:
    """Turn a program into a graph.

    Returns
    -------
    CaseGraph
        Every activation is f32, ``(n_embd, n_token)``.
    list of str
        Tensors that hold expert ids once computed.
    """
    return _Interpreter(w, n_token).run(program)


class _Interpreter:
    def __init__(self, w: Weights, n_token: int) -> None:
        self.w, self.n, self.g = w, n_token, CaseGraph()
        g, n = self.g, n_token
        self.positions = g.input("pos", "i32", [n])
        self.tokens = g.input("tok", "i32", [n])
        self.rows = g.input("rows", "i64", [n])
        self.mask = g.input("mask", "f16", [N_KV, n])
        self.ids = g.input("ids", "i32", [w.n_used, n])
        embd = g.input("embd", "f32", [w.n_embd, n])
        self.acts = [embd, g.get_rows(w.embedding, self.tokens, "embedded")]
        self.id_nodes: list[str] = []

    def run(self, program: list[Instruction]) -> tuple[CaseGraph, list[str]]:
        g = self.g
        for kind, i, j, k in program:
            a = self.acts[-1 - i % len(self.acts)]
            y = getattr(self, f"_{kind}")(a, j, k)
            if y is None:
                continue
            if y.op == "VIEW":
                y = g.cont(y)
            self.acts.append(y)
        last = self.acts[-1]
        if last.op != "NONE" and last.view is None:
            last.flags.append("output")
        g.results.append(last)
        return g, self.id_nodes

    def _other(self, j: int) -> CaseTensor:
        return self.acts[-1 - j % len(self.acts)]

    def _slice(self, a: CaseTensor, j: int, k: int) -> None:
        m = max(1, self.n // 2)
        part = self.g.view(a, [self.w.n_embd, m], a.nb, offs=a.nb[1] * (self.n - m))
        done = self.g.same("UNARY", part) if j % 2 else self.g.cont(part)
        if k % 2:
            done.flags.append("output")
        self.g.results.append(done)

    def _add(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        return self.g.same(("ADD", "MUL", "SUB")[k % 3], a, self._other(j))

    def _bias(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        return self.g.same(("ADD", "MUL")[k % 2], a, self.w.norms[j % len(self.w.norms)])

    def _norm(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        y = self.g.same("RMS_NORM", a)
        return self.g.same("MUL", y, self.w.norms[j % len(self.w.norms)]) if k % 3 else y

    def _unary(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        return self.g.same("UNARY", a)

    def _scale(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        return self.g.same("SCALE", a)

    def _clamp(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        return self.g.same("CLAMP", a)

    def _inplace(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        if a.op == "NONE":  # a computed result only: inputs are not overwritten
            a = self.g.same("SCALE", a)
        return self.g.inplace(("SCALE", "CLAMP", "ADD")[k % 3], a, *([self._other(j)] if k % 3 == 2 else []))

    def _output(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        y = self.g.same("SCALE", a)
        y.flags.append("output")
        return y

    def _mul_mat(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        g, d = self.g, self.w.n_embd
        y = g.mul_mat(self.w.dense[j % len(self.w.dense)], a)
        if y.ne[0] == d:
            return y
        return g.glu(g.view(y, [d, self.n], y.nb), g.view(y, [d, self.n], y.nb, offs=4 * d))

    def _glu(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        return self.g.glu(a, self._other(j))

    def _reshape(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        g, d = self.g, self.w.n_embd
        y = g.permute(g.reshape(a, [d // HEADS, HEADS, self.n]), [0, 2, 1, 3])
        return g.reshape(g.cont(y), [d, self.n])

    def _rope(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        g, d = self.g, self.w.n_embd
        y = g.reshape(a, [d // HEADS, HEADS, self.n])
        y = g.same("ROPE", y, self.positions, *([self.w.freqs] if k % 2 else []))
        return g.reshape(y, [d, self.n])

    def _soft_max(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        return self.g.same("SOFT_MAX", a)

    def _get_rows(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        return self.g.get_rows(a, self.positions)

    def _set_rows(self, a: CaseTensor, j: int, k: int) -> None:
        self.g.results.append(self.g.set_rows(self.w.caches[j % 2], a, self.rows))

    def _cpy(self, a: CaseTensor, j: int, k: int) -> None:
        g, d, m = self.g, self.w.n_embd, min(self.n, N_KV)
        cache = self.w.caches[j % 2]
        g.results.append(g.cpy(g.view(a, [d, m], a.nb), g.view(cache, [d, m], cache.nb)))

    def _flash_attn(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        g, d = self.g, self.w.n_embd
        dh = d // HEADS
        q = g.permute(g.reshape(a, [dh, HEADS, self.n]), [0, 2, 1, 3])
        nb = [2, 2 * d, 2 * dh, 2 * d * N_KV]
        kk, vv = (g.view(cache, [dh, N_KV, HEADS], nb) for cache in self.w.caches)
        o = g.flash_attn(q, kk, vv, self.mask, self.w.sinks if k % 2 else None)
        return g.reshape(o, [d, self.n])

    def _concat(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        g, d = self.g, self.w.n_embd
        y = g.new("f32", [2 * d, self.n], "CONCAT", (a, self._other(j)))
        return g.view(y, [d, self.n], y.nb, offs=(0, 4 * d)[k % 2])

    def _moe(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        g, w, d, n = self.g, self.w, self.w.n_embd, self.n
        ids = self.ids
        if j % 3:
            logits = g.mul_mat(w.dense[j % len(w.dense)], a)
            order = g.argsort(g.cont(g.view(logits, [w.n_expert, n], logits.nb)))
            ids = g.view(order, [w.n_used, n], order.nb)
            self.id_nodes.append(order.id)
        x = g.reshape(a, [d, 1, n])
        y = g.mul_mat_id(w.experts[k % len(w.experts)], x, ids)
        if k % 4 == 1:
            y = g.same("ADD_ID", y, w.expert_bias[j % 2], ids)
        if k % 3:
            y = g.glu(y, g.mul_mat_id(w.experts[(k + 1) % len(w.experts)], x, ids))
        if k % 3 == 2:
            y = g.mul_mat_id(w.experts[(k + 2) % len(w.experts)], y, ids)
        nb = [4, y.nb[2], y.nb[2] * n, y.nb[2] * n]
        parts = [g.view(y, [d, n], nb, offs=y.nb[1] * e) for e in range(w.n_used)]
        total = parts[0]
        for part in parts[1:]:
            total = g.same("ADD", total, part)
        return total


# -- cases ---------------------------------------------------------------------


class DrawnCase(dict[str, Any]):
    """A case whose text is cut where Hypothesis would warn that it is too long to be read."""

    def __repr__(self) -> str:
        text = json.dumps(self)
        return text if len(text) < 20_000 else f"{text[:20_000]}... ({len(text):,} characters)"


@st.composite
def cases(draw: st.DrawFn, *, max_instructions: int = 40, may_fail: bool = True) -> Json:
    """Draw a case: a machine, weights, one to three graphs, and the steps that use them.

    Parameters
    ----------
    may_fail : bool
        Whether buffers may fail to be allocated, and backends to compute.
    """
    machine = draw(machines(may_fail=may_fail))
    backends = machine["backends"]
    bufts = [b["name"] for b in machine["buffer_types"]]
    w = draw(_weights(bufts))
    programs_ = draw(st.lists(programs(max_instructions), min_size=1, max_size=2))
    does_optimize = draw(st.integers(0, 4)) == 4
    if does_optimize:
        del programs_[1:]  # an order of nodes goes by their names, which another program gives to others
    batches = draw(st.lists(st.sampled_from([1, 3, 32, 48, 200]), min_size=1, max_size=3))
    rng = random.Random(draw(st.integers(0, 2**16)))
    graphs: dict[str, CaseGraph] = {}
    steps: list[Json] = []
    if draw(st.booleans()):
        graphs["reserve"], _ = interpret(programs_[0], w, max(batches))
        op = draw(st.sampled_from(["reserve"] * 7 + ["split", "reserve_size"]))
        steps += [{"op": "build", "graph": "reserve"}, {"op": op, "graph": "reserve"}]
        if op != "reserve" or any("alloc_limit" in b for b in machine["buffer_types"]):
            steps.append({"op": "reset"})  # without it upstream would use the freed copies of this graph for the next
    for i, n_token in enumerate(batches):
        key = f"g{i}"
        graphs[key], id_nodes = interpret(programs_[draw(st.integers(0, len(programs_) - 1))], w, n_token)
        if i or draw(st.booleans()):
            steps.append({"op": "reset"})
        steps.append({"op": "build", "graph": key})
        steps += draw(_pins(key, graphs[key], backends))
        if draw(st.integers(0, 3)) < 3:  # else compute allocates
            steps.append({"op": "alloc_graph", "graph": key})
            steps += _inputs(key, graphs[key], w, n_token, rng)
        steps += _node_ids(key, graphs[key], w, n_token, id_nodes, rng)
        for _ in range(draw(st.sampled_from([1, 1, 2]))):
            steps += draw(_compute(key, graphs[key]))
    if may_fail and draw(st.integers(0, 4)) == 4:
        _let_compute_fail(draw(st.integers(0, 99)), graphs["g0"], backends)
    if does_optimize:
        _let_optimize(draw(st.integers(0, 2**16)), graphs["g0"], backends)
    sched: Json = {"parallel": draw(st.integers(0, 2)) == 2, "op_offload": draw(st.booleans())}
    if "GPU_Host" in bufts and draw(st.booleans()):
        sched["bufts"] = ["GPU_Host" if b["device"] == "CPU" else b["buft"] for b in backends]
    return DrawnCase(make_case("random", machine, w.static, graphs, sched, steps))


@st.composite
def _pins(draw: st.DrawFn, key: str, graph: CaseGraph, backends: list[Json]) -> list[Json]:
    if draw(st.integers(0, 2)) < 2:
        return []
    seen = graph.reach()
    free = [t.id for t in graph.tensors.values() if t.id in seen and (t.op == "NONE" or t.view is None)]
    number = st.integers(0, 1 << 10)
    return [
        {"op": "pin", "graph": key, "tensor": free[i % len(free)], "backend": b % len(backends)}
        for i, b in draw(st.lists(st.tuples(number, number), max_size=4))
        if free
    ]


def _inputs(key: str, graph: CaseGraph, w: Weights, n_token: int, rng: random.Random) -> list[Json]:
    seen = graph.reach()
    steps: list[Json] = []
    if "ids" in seen:
        kind = rng.choice(ROUTINGS)
        rows = routing(kind, w.n_expert, w.n_used, n_token, rng)
        steps.append({"op": "set_data", "graph": key, "tensor": "ids", "i32": [i for row in rows for i in row]})
    if "tok" in seen:
        data = [rng.randrange(N_ROWS) for _ in range(n_token)]
        steps.append({"op": "set_data", "graph": key, "tensor": "tok", "i32": data})
    return steps


def _node_ids(
    key: str, graph: CaseGraph, w: Weights, n_token: int, id_nodes: list[str], rng: random.Random
) -> list[Json]:
    seen = graph.reach()
    return [
        {
            "op": "node_data",
            "graph": key,
            "tensor": name,
            "rows": {"ncols": w.n_expert, "data": routing(rng.choice(ROUTINGS), w.n_expert, w.n_used, n_token, rng)},
        }
        for name in id_nodes
        if name in seen
    ]


@st.composite
def _compute(draw: st.DrawFn, key: str, graph: CaseGraph) -> list[Json]:
    compute: Json = {"op": "compute", "graph": key, "async": draw(st.booleans())}
    steps: list[Json] = [compute]
    if draw(st.integers(0, 7)) == 7:
        seen = graph.reach()
        asked = [t.id for t in graph.tensors.values() if t.id in seen and t.op not in ("NONE", "VIEW")][:3]
        does_stop = draw(st.booleans())
        stop = asked[0] if asked and does_stop else None
        steps = [{"op": "eval_callback", "need": asked, "stop": stop}, compute, {"op": "eval_callback", "need": None}]
    return [*steps, {"op": "synchronize"}] if draw(st.booleans()) else steps


def _let_compute_fail(choice: int, graph: CaseGraph, backends: list[Json]) -> None:
    nodes = [t.id for t in graph.tensors.values() if t.op != "NONE"]
    if nodes:
        fail: Json = {"node": nodes[choice % len(nodes)], "status": (-1, -2, 1)[choice % 3]}
        for backend in backends:
            backend["fail_compute"] = fail | ({"times": 1} if choice % 2 else {})


def _let_optimize(choice: int, graph: CaseGraph, backends: list[Json]) -> None:
    """Let backends reorder the first graph's nodes, sources before users, and keep some results longer."""
    rng = random.Random(choice)
    seen = graph.reach()
    waiting = {t.id: t for t in graph.tensors.values() if t.id in seen}
    order: list[str] = []
    while waiting:
        ready = [t for t in waiting.values() if not any(s is not None and s.id in waiting for s in t.src)]
        chosen = rng.choice(ready)
        del waiting[chosen.id]
        if chosen.op != "NONE":
            order.append(chosen.id)
    pairs = [sorted(rng.sample(range(len(order)), 2)) for _ in range(rng.choice([0, 1, 12])) if len(order) > 1]
    for backend in backends:
        backend["optimize"] = {"order": order, "keep": [[order[a], order[b]] for a, b in pairs]}


@st.composite
def moe_cases(draw: st.DrawFn, *, names: tuple[str, ...] = tuple(ARCHITECTURES)) -> Json:
    """Draw a case of a mixture-of-experts model over one to three devices and a CPU."""
    machine = make_machine(
        draw(st.sampled_from([1, 2, 3])),
        has_blas=draw(st.booleans()),
        events=draw(st.booleans()),
        set_async=draw(st.booleans()),
        cpy_async=draw(st.booleans()),
        alignment=draw(st.sampled_from([128, 256, 512])),
        max_size=draw(st.sampled_from([None, None, 400_000])),
        min_batch=draw(st.sampled_from([32, 1, 4, None])),
    )
    name = draw(st.sampled_from(names))
    case = moe_case(
        name,
        ARCHITECTURES[name],
        machine,
        draw(st.lists(st.sampled_from([1, 2, 3, 17, 31, 32, 48, 96]), min_size=1, max_size=4)),
        random.Random(draw(st.integers(0, 2**16))),
        n_layer=draw(st.integers(1, 3)),
        place=draw(st.sampled_from(PLACEMENTS)),
        route=draw(st.sampled_from(ROUTINGS)),
        ids=draw(st.sampled_from(["topk", "input", "view"])),
        flash=draw(st.booleans()),
        parallel=draw(st.integers(0, 2)) == 2,
        op_offload=draw(st.booleans()),
        is_pinned=draw(st.booleans()),
        reserve=draw(st.booleans()),
    )
    return DrawnCase(case)
