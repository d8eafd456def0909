"""Small programs of builder calls, run by pyggml and by the real library, and what came of them in one form.

Programs are those of `pyggml.testing.op_cases`. Their descriptions are JSON, so that a child process can run them.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from pyggml import ops
from pyggml.errors import ShapeError
from pyggml.graph import Graph
from pyggml.tensor import Tensor
from pyggml.testing.op_cases import Step, run
from pyggml.types import MAX_SRC

from .child import Message
from .libggml import Library

N_PARAMS = 16

#: Where the name of ours differs from that of ggml 0.20.2: it had but one CLAMP, in place.
NAME_IN_LIBRARY = {"clamp_inplace": "ggml_clamp", "as_": "as"}
FUNCTIONS = [NAME_IN_LIBRARY.get(name, f"ggml_{name}") for name in ops.__all__]


# -- ours ------------------------------------------------------------------------


def describe(values: Sequence[Tensor | None]) -> list[Message | None]:
    """Return what a program made, each tensor as JSON; other tensors are numbers of steps."""
    known = {t: i for i, t in reversed([*enumerate(values)]) if t is not None}
    return [None if t is None else _describe(t, known) for t in values]


def _describe(t: Tensor, known: dict[Tensor, int]) -> Message:
    def point(to: Tensor | None) -> Any:
        if to is None:
            return None
        return known[to] if to in known else _describe(to, known)

    return {
        "name": t.name,
        "type": t.type.ggml_name,
        "ne": list(t.ne),
        "nb": list(t.nb),
        "op": t.op.name,
        "op_params": [t.param_i32(i) for i in range(N_PARAMS)],
        "flags": int(t.flags),
        "src": [point(s) for s in t.src] + [None] * (MAX_SRC - len(t.src)),
        "view_src": point(t.view_src),
        "view_offs": t.view_offs,
        "nbytes": t.nbytes,
    }


def run_and_describe(steps: Sequence[Step]) -> Message:
    """Return ``{"tensors": [...]}``, or ``{"refused": message}``, as the child answers."""
    try:
        return {"tensors": describe(run(steps))}
    except ShapeError as error:
        return {"refused": str(error)}


def expand(steps: Sequence[Step], results: Sequence[int]) -> Message:
    """Return the graph that expanding the given steps makes: names, use counts and flags of nodes and leafs."""
    values = run(steps)
    graph = Graph()
    for i in results:
        result = values[i]
        assert result is not None
        graph.expand(result)

    def show(tensors: Sequence[Tensor]) -> list[Message]:
        known = {t: i for i, t in enumerate(values)}
        return [
            {"step": known.get(t), "name": t.name, "uses": graph.use_counts[t], "flags": int(t.flags)} for t in tensors
        ]

    return {"nodes": show(graph.nodes), "leafs": show(graph.leafs)}


# -- the library's, in the child -------------------------------------------------


def _run_library(lib: Library, ctx: Any, steps: Sequence[Step]) -> list[Any]:
    ffi = lib.ffi
    values: list[Any] = []
    for name, *arguments in steps:
        if name == "new":
            type, ne, label = arguments
            t = lib.base.ggml_new_tensor_4d(ctx, lib.type_of[type], *ne, *[1] * (4 - len(ne)))
            t.name = label.encode()
            values.append(t)
            continue
        plain = []
        for a in arguments:
            if a is None:
                plain.append(ffi.NULL)
            elif isinstance(a, dict):
                plain.append(values[a["t"]])
            elif isinstance(a, str):
                plain.append(lib.type_of[a])
            else:
                plain.append(a)
        symbol = NAME_IN_LIBRARY.get(name, f"ggml_{name}")
        call = lib.function(symbol)
        if "struct ggml_context *" in lib.prototypes[symbol]:
            plain.insert(0, ctx)
        result = call(*plain)
        values.append(result if isinstance(result, ffi.CData) and result != ffi.NULL else None)
    return values


def _describe_library(lib: Library, values: list[Any]) -> list[Message | None]:
    ffi = lib.ffi
    known: dict[Any, int] = {}
    for i, t in enumerate(values):
        if t is not None:
            known.setdefault(t, i)

    def point(to: Any) -> Any:
        if to == ffi.NULL:
            return None
        return known[to] if to in known else show(to)

    def show(t: Any) -> Message:
        return {
            "name": lib.text(t.name),
            "type": lib.text(lib.base.ggml_type_name(t.type)),
            "ne": list(t.ne),
            "nb": list(t.nb),
            "op": lib.text(lib.base.ggml_op_name(t.op)),
            "op_params": list(t.op_params),
            "flags": t.flags,
            "src": [point(s) for s in t.src],
            "view_src": point(t.view_src),
            "view_offs": t.view_offs,
            "nbytes": lib.base.ggml_nbytes(t),
        }

    return [None if t is None else show(t) for t in values]


def _build(lib: Library, request: Message) -> Message:
    ctx = lib.new_context(64 * 1024)
    return {"tensors": _describe_library(lib, _run_library(lib, ctx, request["steps"]))}


def _expand(lib: Library, request: Message) -> Message:
    ctx = lib.new_context(1024 * 1024)
    values = _run_library(lib, ctx, request["steps"])
    graph = lib.base.ggml_new_graph(ctx)
    for i in request["results"]:
        lib.base.ggml_build_forward_expand(graph, values[i])
    visited = graph.visited
    slots = (i for i in range(visited.size) if visited.used[i >> 5] >> (i & 31) & 1)
    uses = {visited.keys[i]: graph.use_counts[i] for i in slots}

    def show(tensors: Any, n: int) -> list[Message]:
        known = {t: i for i, t in enumerate(values)}
        found = [tensors[i] for i in range(n)]
        return [{"step": known.get(t), "name": lib.text(t.name), "uses": uses[t], "flags": t.flags} for t in found]

    return {"nodes": show(graph.nodes, graph.n_nodes), "leafs": show(graph.leafs, graph.n_leafs)}


def _compute(lib: Library, request: Message) -> Message:
    """Run a program, fill its leafs, compute its last result with one thread, and return the bytes of some steps."""
    ffi = lib.ffi
    ctx = lib.new_context(8 * 1024 * 1024, with_data=True)
    values = _run_library(lib, ctx, request["steps"])
    for i, data in request["data"].items():
        raw = base64.b64decode(data)
        t = values[int(i)]
        assert len(raw) == lib.base.ggml_nbytes(t), (i, len(raw), lib.base.ggml_nbytes(t))
        ffi.memmove(t.data, raw, len(raw))
    graph = lib.base.ggml_new_graph(ctx)
    lib.base.ggml_build_forward_expand(graph, values[request["result"]])
    status = lib.cpu.ggml_graph_compute_with_ctx(ctx, graph, 1)
    bytes_of = {}
    for i in request["read"]:
        t = values[i]
        bytes_of[i] = base64.b64encode(ffi.buffer(t.data, lib.base.ggml_nbytes(t))[:]).decode()
    return {"status": status, "bytes": bytes_of}


HANDLERS = {"build": _build, "expand": _expand, "compute": _compute}
