"""Reads cases from files and checks them completely, so that a replay can build everything in them.

If a file is not a case, the error names the place in it and what was expected there.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from ..backends.mock import (
    BackendAbilities,
    BufferTypeAbilities,
    Capabilities,
    FailCompute,
    OffloadWish,
    OpSupport,
    Optimize,
)
from ..files import read_json
from ..types import MAX_DIMS, MAX_SRC, SIZE_MAX, BufferUsage, DeviceType, Op, TensorFlag, Type
from .case import BufferSpec, Case, GraphSpec, Step, TensorSpec
from .json_walk import At, shown

__all__ = ["CASE_FORMAT", "parse_case", "read_case"]

CASE_FORMAT = "pyggml-sched-case/1"
#: Words of an op's parameters, upstream's `GGML_MAX_OP_PARAMS` / 4.
_MAX_OP_PARAMS = 16


def read_case(path: str | Path) -> Case:
    """Read a case from a file, which may be compressed with gzip.

    Raises
    ------
    FormatError
        The file cannot be read or is not a case; the text says where and what was expected.
    """
    return _parse(At(str(path), "", read_json(path)))


def parse_case(value: object) -> Case:
    """Read a case from JSON values.

    Raises
    ------
    FormatError
        It is not a case; the text says where and what was expected.
    """
    return _parse(At("case", "", value))


def _unique(at: At, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            at.fail(f"'{name}' stands twice")
        seen.add(name)


def _enum(at: At, enum: Any, what: str) -> Any:
    """Return the member of an enumeration with the value's name."""
    name = at.text()
    member = enum.__members__.get(name.upper())
    if member is None:
        at.fail(f"there is no {what} '{name}'")
    return member


def _op(at: At) -> Op:
    op: Op = _enum(at, Op, "op")
    return op


def _type(at: At) -> Type:
    type: Type = _enum(at, Type, "type")
    return type


def _int32(at: At) -> int:
    return at.integer(-(2**31), 2**31 - 1)


# -- the parts of a case -----------------------------------------------------


def _parse(at: At) -> Case:
    if at.get("format").value != CASE_FORMAT:
        at.get("format").fail(f"'{CASE_FORMAT}' expected, not {shown(at.get('format').value)}")
    bufts = at.get("buffer_types").list_of(_buffer_type)
    _unique(at.get("buffer_types"), [b.name for b in bufts])
    buft_names = {b.name for b in bufts}
    for buft in at.get("buffer_types").items():
        if sources := buft.optional("cpy_from"):
            sources.list_of(lambda b: b.one_of(buft_names, "buffer type"))
    backends = at.get("backends").list_of(lambda b: _backend(b, buft_names))
    if not backends:
        at.get("backends").fail("no backend")
    _unique(at.get("backends"), [b.name for b in backends])

    static: dict[str, TensorSpec] = {}
    tensors = _tensors(at.get("tensors", []), static, {})
    buffers = at.get("buffers", []).list_of(lambda b: _buffer(b, buft_names, static))
    _unique(at.get("buffers", []), [name for buffer in buffers for name in buffer.tensors])

    graphs: dict[str, GraphSpec] = {}
    names: dict[str, dict[str, TensorSpec]] = {}
    for key, graph in at.get("graphs").members():
        names[key] = {}
        made = _tensors(graph.get("tensors"), names[key], static)
        known = names[key].keys() | static.keys()
        graphs[key] = GraphSpec(made, tuple(e.one_of(known, "tensor") for e in graph.get("expand").items()))

    sched = at.get("sched")
    sched_bufts = None
    if given := sched.optional("bufts"):
        sched_bufts = given.list_of(lambda b: b.one_of(buft_names, "buffer type"))
        if len(sched_bufts) != len(backends):
            given.fail(f"{len(backends)} buffer types expected, one per backend, not {len(sched_bufts)}")
    return Case(
        name=at.get("name").text(),
        bufts=bufts,
        backends=backends,
        tensors=tensors,
        buffers=buffers,
        graphs=graphs,
        graph_size=sched.get("graph_size").integer(0, 2**40),
        parallel=sched.get("parallel", False).boolean(),
        op_offload=sched.get("op_offload", False).boolean(),
        sched_bufts=sched_bufts,
        steps=_Steps(names, static, len(backends)).read(at.get("steps")),
    )


def _buffer_type(at: At) -> BufferTypeAbilities:
    alignment = at.get("alignment", 64).integer(1, 2**40)
    if alignment & (alignment - 1):
        at.get("alignment").fail(f"{alignment} is no power of 2")
    pad = at.optional("alloc_pad") or At(at.path, at.where, {})
    cpy_from = at.optional("cpy_from")
    max_size = at.optional("max_size")
    limit = at.optional("alloc_limit")
    return BufferTypeAbilities(
        name=at.get("name").name(),
        is_host=at.get("host", False).boolean(),
        alignment=alignment,
        max_size=(max_size.integer(0) if max_size else 0) or SIZE_MAX,
        quant_row=pad.get("quant_row", 0).integer(0),
        extra_bytes=pad.get("extra", 0).integer(0),
        round_to_bytes=pad.get("round_to", 0).integer(0) or 1,
        cpy_from=None if cpy_from is None else frozenset(cpy_from.list_of(At.text)),
        alloc_limit=limit.integer(0) if limit else 0,
    )


def _backend(at: At, bufts: Container[str]) -> BackendAbilities:
    def buft(at: At) -> str:
        return at.one_of(bufts, "buffer type")

    def ops_or_all(at: At) -> frozenset[Op] | None:
        return None if at.value == "all" else frozenset(at.list_of(_op))

    offload, fail, optimize = at.optional("offload"), at.optional("fail_compute"), at.optional("optimize")
    caps = at.get("caps", {})
    cpy_from = caps.optional("cpy_async_from")
    return BackendAbilities(
        name=at.get("name").name(),
        type=_enum(at.get("device"), DeviceType, "kind of device"),
        buft=buft(at.get("buft")),
        bufts=frozenset(at.get("bufts").list_of(buft)),
        ops=_op_support(at.get("ops", "all")),
        offload=OffloadWish(_int64(offload.get("min_batch")), ops_or_all(offload.get("ops"))) if offload else None,
        caps=Capabilities(
            synchronize=caps.get("synchronize", True).boolean(),
            set_async=caps.get("set_async", False).boolean(),
            get_async=caps.get("get_async", False).boolean(),
            events=caps.get("events", False).boolean(),
            cpy_async_from=None if cpy_from is None else frozenset(cpy_from.list_of(buft)),
        ),
        fail_compute=_fail_compute(fail) if fail else None,
        optimize=_optimize(optimize) if optimize else None,
    )


def _int64(at: At) -> int:
    return at.integer(-(2**63), 2**63 - 1)


def _op_support(at: At) -> OpSupport:
    if at.value == "all":
        return OpSupport()
    allow = at.optional("allow")
    min_batch = {}
    for name, least in at.get("min_batch", {}).members():
        min_batch[_op(At(least.path, least.where, name))] = _int64(least)
    return OpSupport(
        allow=None if allow is None else frozenset(allow.list_of(_op)),
        deny=frozenset(at.get("deny", []).list_of(_op)),
        min_batch=min_batch,
        deny_src0_types=frozenset(at.get("deny_src0_types", []).list_of(_type)),
    )


def _fail_compute(at: At) -> FailCompute:
    status, times = at.get("status", -1), at.optional("times")
    if status.integer(-2, 1) == 0:
        status.fail("0 is success: -2, -1 or 1 expected")
    return FailCompute(at.get("node").text(), status.value, None if times is None else times.integer(0))


def _optimize(at: At) -> Optimize:
    def pair(at: At) -> tuple[str, str]:
        names = at.list_of(At.text)
        if len(names) != 2:
            at.fail("two names expected: the tensor, and the node until which it is kept")
        return names[0], names[1]

    return Optimize(at.get("order", []).list_of(At.text), at.get("keep", []).list_of(pair))


def _tensors(at: At, table: dict[str, TensorSpec], outer: dict[str, TensorSpec]) -> tuple[TensorSpec, ...]:
    """Read tensors in order: each may refer to earlier ones and to the outer ones."""
    for item in at.items():
        spec = _tensor(item, table, outer)
        if spec.id in table or spec.id in outer:
            item.get("id").fail(f"there is a tensor '{spec.id}' already")
        table[spec.id] = spec
    return tuple(table.values())


def _tensor(at: At, table: dict[str, TensorSpec], outer: dict[str, TensorSpec]) -> TensorSpec:
    def known(at: At) -> TensorSpec:
        spec = table.get(at.text()) or outer.get(at.value)
        return spec if spec is not None else at.fail(f"there is no tensor '{at.value}' before this one")

    ne = at.get("ne").list_of(lambda n: n.integer(0, 2**63 - 1))
    if not 1 <= len(ne) <= MAX_DIMS:
        at.get("ne").fail(f"1 to {MAX_DIMS} dimensions expected, not {len(ne)}")
    type = _type(at.get("type"))
    if ne[0] % type.block_size:
        at.get("ne").fail(f"{ne[0]} is no multiple of the {type.block_size} elements of a {type.ggml_name} block")
    nb = at.optional("nb")
    if nb is not None and len(nb.kind(list)) != MAX_DIMS:
        nb.fail(f"{MAX_DIMS} strides expected, not {len(nb.value)}")
    src = at.get("src", []).list_of(lambda s: None if s.value is None else known(s).id)
    if len(src) > MAX_SRC:
        at.get("src").fail(f"at most {MAX_SRC} sources expected, not {len(src)}")
    view = None
    if viewed := at.optional("view"):
        root = known(viewed.get("src"))
        if root.view is not None:
            viewed.get("src").fail(f"'{root.id}' is a view itself; its root '{root.view[0]}' expected")
        view = root.id, viewed.get("offs", 0).integer(0)
    op_params = at.get("op_params", []).list_of(_int32)
    if len(op_params) > _MAX_OP_PARAMS:
        at.get("op_params").fail(f"at most {_MAX_OP_PARAMS} words expected, not {len(op_params)}")
    flags = 0
    for flag in at.get("flags", []).items():
        if flag.text() not in ("input", "output", "param", "loss"):
            flag.fail(f"there is no flag '{flag.value}'")
        flags |= TensorFlag[flag.value.upper()]
    return TensorSpec(
        id=at.get("id").name(),
        type=type,
        ne=ne,
        nb=None if nb is None else nb.list_of(lambda n: n.integer(0)),
        op=_op(at.get("op", "NONE")),
        src=src,
        view=view,
        flags=flags,
        op_params=op_params,
    )


def _buffer(at: At, bufts: Container[str], static: dict[str, TensorSpec]) -> BufferSpec:
    return BufferSpec(
        id=at.get("id").name(),
        buft=at.get("buft").one_of(bufts, "buffer type"),
        usage=_enum(at.get("usage", "any"), BufferUsage, "usage"),
        tensors=at.get("tensors").list_of(lambda t: t.one_of(static, "static tensor")),
    )


class _Steps:
    """Reads steps; knows which graphs have been built so far."""

    def __init__(
        self, graphs: dict[str, dict[str, TensorSpec]], static: dict[str, TensorSpec], n_backends: int
    ) -> None:
        self.graphs = graphs
        self.static = static
        self.n_backends = n_backends
        self.built: set[str] = set()
        self.readers: dict[str, Callable[[At], Step]] = {
            "build": self._build,
            "pin": self._pin,
            "reserve": self._graph_only,
            "reserve_size": self._graph_only,
            "split": self._graph_only,
            "alloc_graph": self._graph_only,
            "compute": lambda at: Step("compute", self._graph(at), is_async=at.get("async", False).boolean()),
            "set_data": self._set_data,
            "node_data": self._node_data,
            "eval_callback": self._eval_callback,
            "reset": lambda at: Step("reset"),
            "synchronize": lambda at: Step("synchronize"),
        }

    def read(self, at: At) -> tuple[Step, ...]:
        steps = []
        for item in at.items():
            op = item.get("op").one_of(self.readers, "step")
            steps.append(self.readers[op](item))
        return tuple(steps)

    def _graph(self, at: At) -> str:
        name = at.get("graph").one_of(self.graphs, "graph")
        if name not in self.built:
            at.get("graph").fail(f"graph '{name}' is not built yet")
        return name

    def _tensor(self, at: At, graph: str | None) -> str:
        here = self.graphs[graph] if graph is not None else {}
        name = at.get("tensor").text()
        if name not in here and name not in self.static:
            at.get("tensor").fail(
                f"there is no tensor '{name}' in {f'graph {graph!r}' if graph else 'the static ones'}"
            )
        return name

    def _graph_only(self, at: At) -> Step:
        return Step(at.get("op").text(), self._graph(at))

    def _build(self, at: At) -> Step:
        graph = at.get("graph").one_of(self.graphs, "graph")
        self.built.add(graph)
        return Step("build", graph)

    def _pin(self, at: At) -> Step:
        graph = self._graph(at) if at.optional("graph") else None
        backend = at.get("backend").integer(0, self.n_backends - 1)
        return Step("pin", graph, self._tensor(at, graph), backend)

    def _set_data(self, at: At) -> Step:
        graph = self._graph(at) if at.optional("graph") else None
        offset = at.get("offset", 0).integer(0)
        return Step("set_data", graph, self._tensor(at, graph), data=_payload(at), offset=offset)

    def _node_data(self, at: At) -> Step:
        graph = at.get("graph").one_of(self.graphs, "graph")
        tensor = at.get("tensor").one_of(self.graphs[graph], f"tensor of graph '{graph}' called")
        return Step("node_data", graph, tensor, data=_payload(at))

    def _eval_callback(self, at: At) -> Step:
        need, stop = at.optional("need"), at.optional("stop")
        return Step(
            "eval_callback",
            need=None if need is None else frozenset(need.list_of(At.text)),
            stop=None if stop is None else stop.text(),
        )


def _payload(at: At) -> bytes:
    """Return the bytes of a step: words, or rows padded with zeros."""
    if words := at.optional("i32"):
        values = words.list_of(_int32)
    elif rows := at.optional("rows"):
        n = rows.get("ncols").integer(0, 2**31)
        words_by_row: list[int] = []
        for row in rows.get("data").items():
            words_of_row = row.list_of(_int32)
            if len(words_of_row) > n:
                row.fail(f"at most {n} words expected, not {len(words_of_row)}")
            words_by_row += words_of_row + (0,) * (n - len(words_of_row))
        values = tuple(words_by_row)
    else:
        at.fail("bytes expected: 'i32' or 'rows'")
    return struct.pack(f"<{len(values)}i", *values)
