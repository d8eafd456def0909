"""Hypothesis strategies for scheduler cases: random machines, graphs, placements, routings and steps.

A graph is drawn as a program (`program`), so that a failing example shrinks to a small one.

Examples
--------
>>> from hypothesis import given
>>> @given(cases())
... def test_something(case): ...
"""

from __future__ import annotations

import json
import random
from typing import Any

from hypothesis import strategies as st

from .graph import CaseGraph, CaseStatic, CaseTensor, Json, make_case
from .moe import ARCHITECTURES, PLACEMENTS, ROUTINGS, make_machine, moe_case, routing
from .program import HEADS, INSTRUCTIONS, N_KV, N_ROWS, Instruction, Weights, interpret

__all__ = ["DrawnCase", "cases", "machines", "moe_cases", "programs"]

#: Ops that a device may lack without making graphs impossible (ops that write into caches are not among them).
DENIABLE = (
    *("ROPE", "SOFT_MAX", "GET_ROWS", "FLASH_ATTN_EXT", "UNARY", "ADD_ID", "CONT", "MUL_MAT_ID", "CONCAT", "RMS_NORM"),
    *("MUL_MAT", "ADD", "MUL", "GLU", "SCALE", "ARGSORT"),
)


def programs(max_size: int = 40) -> st.SearchStrategy[list[Instruction]]:
    """Return programs; each instruction's numbers are taken modulo the number of choices."""
    back = st.sampled_from([0, 0, 0, 0, 1, 2, 5, 11])  # mostly the latest result, so that most results are needed
    number = st.integers(0, 11)
    instruction = st.tuples(st.sampled_from(INSTRUCTIONS), back, number, number)
    lengths = st.sampled_from([0, max_size // 4, max_size // 2])
    return lengths.flatmap(lambda n: st.lists(instruction, min_size=n, max_size=max_size))


# -- machines ------------------------------------------------------------------


@st.composite
def machines(draw: st.DrawFn, *, may_fail: bool = True) -> Json:
    """Draw buffer types and backends with random abilities; the last backend is a CPU that runs everything.

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


# -- cases ---------------------------------------------------------------------


class DrawnCase(dict[str, Any]):
    """A case whose ``repr`` is truncated, because Hypothesis warns about long ones."""

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
    may_not_fit = any("alloc_limit" in b for b in machine["buffer_types"])
    w = draw(_weights(bufts))
    programs_ = draw(st.lists(programs(max_instructions), min_size=1, max_size=2))
    does_optimize = draw(st.integers(0, 4)) == 4
    if does_optimize:
        del programs_[1:]  # an order of nodes refers to names, which differ in other programs
    batches = draw(st.lists(st.sampled_from([1, 3, 32, 48, 200, 0]), min_size=1, max_size=3))
    rng = random.Random(draw(st.integers(0, 2**16)))
    graphs: dict[str, CaseGraph] = {}
    steps: list[Json] = []
    if draw(st.booleans()):
        graphs["reserve"], _ = interpret(programs_[0], w, max(batches))
        op = draw(st.sampled_from(["reserve"] * 7 + ["split", "reserve_size"]))
        steps += [{"op": "build", "graph": "reserve"}, {"op": op, "graph": "reserve"}]
        if op != "reserve" or may_not_fit:
            steps.append({"op": "reset"})  # without it upstream would use the freed copies of this graph for the next
    for i, n_token in enumerate(batches):
        key = f"g{i}"
        graphs[key], id_nodes = interpret(programs_[draw(st.integers(0, len(programs_) - 1))], w, n_token)
        if i or draw(st.booleans()):
            steps.append({"op": "reset"})
        steps.append({"op": "build", "graph": key})
        steps += draw(_pins(key, graphs[key], backends))
        if not may_not_fit and draw(st.integers(0, 3)) < 3:  # otherwise compute allocates
            steps.append({"op": "alloc_graph", "graph": key})
            steps += _inputs(key, graphs[key], w, n_token, rng)
        steps += _node_ids(key, graphs[key], w, n_token, id_nodes, rng)
        # after a failed allocation upstream's nodes name copies that are freed, until the graph is built again
        for _ in range(1 if may_not_fit else draw(st.sampled_from([1, 1, 2]))):
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
    """Let backends reorder the first graph's nodes, sources before readers, and keep some results longer."""
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
    """Draw a case of a mixture-of-experts model on one to three devices and a CPU."""
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
