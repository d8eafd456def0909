"""Scheduler cases: the file that says which backends, tensors, graphs and steps a replay has.

A case is read into plain values and checked as a whole, so that a replay meets only what can be built. A file that is
not a case is refused with the place in it and what was expected there.
"""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .backends.mock import (
    BackendAbilities,
    BufferTypeAbilities,
    Capabilities,
    FailCompute,
    OffloadWish,
    OpSupport,
    Optimize,
)
from .errors import FormatError
from .types import MAX_DIMS, MAX_SRC, SIZE_MAX, BufferUsage, DeviceType, Op, TensorFlag, Type

__all__ = ["CASE_FORMAT", "BufferSpec", "Case", "GraphSpec", "Step", "TensorSpec", "parse_case", "read_case"]

CASE_FORMAT = "pyggml-sched-case/1"
#: Bytes of a name in a case: one less than a trace can print, so that no two names are cut to one.
_MAX_CASE_NAME = 62
#: Words of an op's parameters, upstream's `GGML_MAX_OP_PARAMS` / 4.
_MAX_OP_PARAMS = 16


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to make; sources and view source by name."""

    id: str
    type: Type
    ne: tuple[int, ...]
    nb: tuple[int, ...] | None
    op: Op
    src: tuple[str | None, ...]
    view: tuple[str, int] | None  #: root, offset in bytes
    flags: int
    op_params: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BufferSpec:
    """A buffer that lives for the whole case, and what lies in it."""

    id: str
    buft: str
    usage: BufferUsage
    tensors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """A graph to build: its tensors, and those to expand."""

    tensors: tuple[TensorSpec, ...]
    expand: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One call on the scheduler; the fields that its ``op`` does not use are empty."""

    op: str
    graph: str | None = None
    tensor: str = ""
    backend: int = 0
    is_async: bool = False
    data: bytes = b""
    offset: int = 0
    need: frozenset[str] | None = None
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """A whole case."""

    name: str
    bufts: tuple[BufferTypeAbilities, ...]
    backends: tuple[BackendAbilities, ...]
    tensors: tuple[TensorSpec, ...]
    buffers: tuple[BufferSpec, ...]
    graphs: dict[str, GraphSpec]
    graph_size: int
    parallel: bool
    op_offload: bool
    sched_bufts: tuple[str, ...] | None
    steps: tuple[Step, ...]


def read_case(path: str | Path) -> Case:
    """Read a case, plain or gzip.

    Raises
    ------
    FormatError
        It is not a case; the text says where and what was expected.
    OSError
        The file cannot be read.
    """
    raw = Path(path).read_bytes()
    try:
        value = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise FormatError(str(path), f"damaged gzip: {error}") from None
    except UnicodeDecodeError as error:
        raise FormatError(str(path), "not text", offset=error.start) from None
    except json.JSONDecodeError as error:
        raise FormatError(str(path), f"not JSON: {error.msg}, line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise FormatError(str(path), "not a case: nested too deeply") from None
    return _parse(_At(str(path), "", value))


def parse_case(value: object) -> Case:
    """Read a case from JSON values made in this process.

    Raises
    ------
    FormatError
        It is not a case; the text says where and what was expected.
    """
    return _parse(_At("case", "", value))


# -- walking the file --------------------------------------------------------

_KINDS: dict[type, str] = {str: "text", int: "a whole number", bool: "true or false", list: "a list", dict: "an object"}
_MISSING: Any = object()


class _At:
    """A value of the file, and the way to it."""

    __slots__ = ("path", "value", "where")

    def __init__(self, path: str, where: str, value: Any) -> None:
        self.path = path
        self.where = where
        self.value = value

    def fail(self, message: str) -> NoReturn:
        raise FormatError(self.path, f"{self.where or 'the file'}: {message}")

    def kind(self, kind: type) -> Any:
        """Return the value if it is of a JSON kind."""
        if type(self.value) is not kind:
            self.fail(f"{_KINDS[kind]} expected, not {_shown(self.value)}")
        return self.value

    def integer(self, low: int, high: int = SIZE_MAX) -> int:
        value: int = self.kind(int)
        if not low <= value <= high:
            self.fail(f"{value} is out of range: {low} to {high}")
        return value

    def text(self) -> str:
        value: str = self.kind(str)
        return value

    def boolean(self) -> bool:
        value: bool = self.kind(bool)
        return value

    def name(self) -> str:
        """Return a name that a trace can print."""
        name = self.text()
        if not name.isascii() or '"' in name or "\\" in name or not 0 < len(name) <= _MAX_CASE_NAME:
            self.fail(f"{_shown(name)} is no name: 1 to {_MAX_CASE_NAME} ASCII characters without quote and backslash")
        return name

    def one_of(self, names: Container[str], what: str) -> str:
        """Return a name that was defined before."""
        name = self.text()
        if name not in names:
            self.fail(f"there is no {what} '{name}' here")
        return name

    def has(self, key: str) -> bool:
        return key in self.kind(dict)

    def get(self, key: str, default: Any = _MISSING) -> _At:
        """Return a member of an object."""
        value = self.kind(dict).get(key, default)
        if value is _MISSING:
            self.fail(f"'{key}' is missing")
        return _At(self.path, f"{self.where}.{key}" if self.where else key, value)

    def optional(self, key: str) -> _At | None:
        """Return a member of an object, or None if it is absent or null."""
        return None if self.kind(dict).get(key) is None else self.get(key)

    def items(self) -> Iterator[_At]:
        for i, value in enumerate(self.kind(list)):
            yield _At(self.path, f"{self.where}[{i}]", value)

    def members(self) -> Iterator[tuple[str, _At]]:
        for key, value in self.kind(dict).items():
            yield key, _At(self.path, f"{self.where}.{key}", value)

    def list_of(self, read: Callable[[_At], Any]) -> tuple[Any, ...]:
        return tuple(read(item) for item in self.items())


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unique(at: _At, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            at.fail(f"'{name}' stands twice")
        seen.add(name)


def _enum(at: _At, enum: Any, what: str) -> Any:
    """Return the member of an enumeration that a text names."""
    name = at.text()
    member = enum.__members__.get(name.upper())
    if member is None:
        at.fail(f"there is no {what} '{name}'")
    return member


def _op(at: _At) -> Op:
    op: Op = _enum(at, Op, "op")
    return op


def _type(at: _At) -> Type:
    type: Type = _enum(at, Type, "type")
    return type


def _int32(at: _At) -> int:
    return at.integer(-(2**31), 2**31 - 1)


# -- the parts of a case -----------------------------------------------------


def _parse(at: _At) -> Case:
    if at.get("format").value != CASE_FORMAT:
        at.get("format").fail(f"'{CASE_FORMAT}' expected, not {_shown(at.get('format').value)}")
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


def _buffer_type(at: _At) -> BufferTypeAbilities:
    alignment = at.get("alignment", 64).integer(1, 2**40)
    if alignment & (alignment - 1):
        at.get("alignment").fail(f"{alignment} is no power of 2")
    pad = at.optional("alloc_pad") or _At(at.path, at.where, {})
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
        cpy_from=None if cpy_from is None else frozenset(cpy_from.list_of(_At.text)),
        alloc_limit=limit.integer(0) if limit else 0,
    )


def _backend(at: _At, bufts: Container[str]) -> BackendAbilities:
    def buft(at: _At) -> str:
        return at.one_of(bufts, "buffer type")

    def ops_or_all(at: _At) -> frozenset[Op] | None:
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


def _int64(at: _At) -> int:
    return at.integer(-(2**63), 2**63 - 1)


def _op_support(at: _At) -> OpSupport:
    if at.value == "all":
        return OpSupport()
    allow = at.optional("allow")
    min_batch = {}
    for name, least in at.get("min_batch", {}).members():
        min_batch[_op(_At(least.path, least.where, name))] = _int64(least)
    return OpSupport(
        allow=None if allow is None else frozenset(allow.list_of(_op)),
        deny=frozenset(at.get("deny", []).list_of(_op)),
        min_batch=min_batch,
        deny_src0_types=frozenset(at.get("deny_src0_types", []).list_of(_type)),
    )


def _fail_compute(at: _At) -> FailCompute:
    status, times = at.get("status", -1), at.optional("times")
    if status.integer(-2, 1) == 0:
        status.fail("0 is success: -2, -1 or 1 expected")
    return FailCompute(at.get("node").text(), status.value, None if times is None else times.integer(0))


def _optimize(at: _At) -> Optimize:
    def pair(at: _At) -> tuple[str, str]:
        names = at.list_of(_At.text)
        if len(names) != 2:
            at.fail("two names expected: the tensor, and the node until which it is kept")
        return names[0], names[1]

    return Optimize(at.get("order", []).list_of(_At.text), at.get("keep", []).list_of(pair))


def _tensors(at: _At, table: dict[str, TensorSpec], outer: dict[str, TensorSpec]) -> tuple[TensorSpec, ...]:
    """Read tensors in order: each may name those before it, and the outer ones."""
    for item in at.items():
        spec = _tensor(item, table, outer)
        if spec.id in table or spec.id in outer:
            item.get("id").fail(f"there is a tensor '{spec.id}' already")
        table[spec.id] = spec
    return tuple(table.values())


def _tensor(at: _At, table: dict[str, TensorSpec], outer: dict[str, TensorSpec]) -> TensorSpec:
    def known(at: _At) -> TensorSpec:
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


def _buffer(at: _At, bufts: Container[str], static: dict[str, TensorSpec]) -> BufferSpec:
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
        self.readers: dict[str, Callable[[_At], Step]] = {
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

    def read(self, at: _At) -> tuple[Step, ...]:
        steps = []
        for item in at.items():
            op = item.get("op").one_of(self.readers, "step")
            steps.append(self.readers[op](item))
        return tuple(steps)

    def _graph(self, at: _At) -> str:
        name = at.get("graph").one_of(self.graphs, "graph")
        if name not in self.built:
            at.get("graph").fail(f"graph '{name}' is not built yet")
        return name

    def _tensor(self, at: _At, graph: str | None) -> str:
        here = self.graphs[graph] if graph is not None else {}
        name = at.get("tensor").text()
        if name not in here and name not in self.static:
            at.get("tensor").fail(
                f"there is no tensor '{name}' in {f'graph {graph!r}' if graph else 'the static ones'}"
            )
        return name

    def _graph_only(self, at: _At) -> Step:
        return Step(at.get("op").text(), self._graph(at))

    def _build(self, at: _At) -> Step:
        graph = at.get("graph").one_of(self.graphs, "graph")
        self.built.add(graph)
        return Step("build", graph)

    def _pin(self, at: _At) -> Step:
        graph = self._graph(at) if at.optional("graph") else None
        backend = at.get("backend").integer(0, self.n_backends - 1)
        return Step("pin", graph, self._tensor(at, graph), backend)

    def _set_data(self, at: _At) -> Step:
        graph = self._graph(at) if at.optional("graph") else None
        offset = at.get("offset", 0).integer(0)
        return Step("set_data", graph, self._tensor(at, graph), data=_payload(at), offset=offset)

    def _node_data(self, at: _At) -> Step:
        graph = at.get("graph").one_of(self.graphs, "graph")
        tensor = at.get("tensor").one_of(self.graphs[graph], f"tensor of graph '{graph}' called")
        return Step("node_data", graph, tensor, data=_payload(at))

    def _eval_callback(self, at: _At) -> Step:
        need, stop = at.optional("need"), at.optional("stop")
        return Step(
            "eval_callback",
            need=None if need is None else frozenset(need.list_of(_At.text)),
            stop=None if stop is None else stop.text(),
        )


def _payload(at: _At) -> bytes:
    """Return the bytes of a step: words, or rows that are filled up with zeros."""
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
