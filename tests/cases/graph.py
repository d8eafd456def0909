"""Builds scheduler cases in the way in which graphs are built: tensors, ops, buffers, steps.

The tensors here only describe a case. A replay, the port and the real library each build their own tensors from them,
so that they are independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pyggml.replay import CASE_FORMAT
from pyggml.types import Type

__all__ = ["CaseGraph", "CaseStatic", "CaseTensor", "Json", "contiguous", "make_case"]

#: A JSON object.
Json = dict[str, Any]


def contiguous(type: str, ne: Sequence[int]) -> list[int]:
    """Return strides without gaps."""
    kind = Type.of(type)
    nb = [kind.type_size, kind.type_size * (ne[0] // kind.block_size)]
    nb.append(nb[1] * ne[1])
    nb.append(nb[2] * ne[2])
    return nb


class CaseTensor:
    """A tensor of a case; ``view`` is another tensor and an offset in bytes."""

    def __init__(
        self,
        id: str,
        type: str,
        ne: Sequence[int],
        op: str = "NONE",
        src: Iterable[CaseTensor | None] = (),
        *,
        view: tuple[CaseTensor, int] | None = None,
        nb: Sequence[int] | None = None,
        flags: Iterable[str] = (),
        op_params: Iterable[int] = (),
    ) -> None:
        self.id, self.type, self.op = id, type, op
        self.ne = [*ne, *[1] * (4 - len(ne))]
        self.nb = list(nb) if nb else contiguous(type, self.ne)
        self.src, self.flags, self.op_params = list(src), list(flags), list(op_params)
        self.view: CaseTensor | None = None
        self.offs = 0
        if view is not None:
            root, offs = view
            self.view, self.offs = (root, offs) if root.view is None else (root.view, root.offs + offs)

    def json(self) -> Json:
        """Return the description, without defaults."""
        spec: Json = {"id": self.id, "type": self.type, "ne": self.ne}
        if self.nb != contiguous(self.type, self.ne):
            spec["nb"] = self.nb
        if self.op != "NONE":
            spec["op"] = self.op
        if self.src:
            spec["src"] = [None if s is None else s.id for s in self.src]
        if self.view is not None:
            spec["view"] = {"src": self.view.id, "offs": self.offs}
        if self.flags:
            spec["flags"] = self.flags
        if self.op_params:
            spec["op_params"] = self.op_params
        return spec


class CaseStatic:
    """Tensors that are in buffers for the whole case, and these buffers."""

    def __init__(self) -> None:
        self.tensors: dict[str, CaseTensor] = {}
        self.buffers: dict[str, Json] = {}

    def add(self, id: str, type: str, ne: Sequence[int], buft: str, usage: str = "weights", **more: Any) -> CaseTensor:
        """Place a tensor in the buffer of a type and usage."""
        tensor = self.tensors[id] = CaseTensor(id, type, ne, **more)
        name = f"{usage}.{buft}"
        buffer = self.buffers.setdefault(name, {"id": name, "buft": buft, "usage": usage, "tensors": []})
        buffer["tensors"].append(id)
        return tensor

    def json(self) -> Json:
        """Return the case's ``tensors`` and ``buffers``."""
        return {"tensors": [t.json() for t in self.tensors.values()], "buffers": list(self.buffers.values())}


class CaseGraph:
    """A graph of a case: each method adds a tensor with the shape that upstream's builder gives it."""

    def __init__(self) -> None:
        self.tensors: dict[str, CaseTensor] = {}
        self.results: list[CaseTensor] = []

    def new(
        self,
        type: str,
        ne: Sequence[int],
        op: str = "NONE",
        src: Iterable[CaseTensor | None] = (),
        name: str = "",
        **more: Any,
    ) -> CaseTensor:
        """Add a tensor; by default its name is made from its op and number."""
        name = name or f"{op.lower()}_{len(self.tensors)}"
        assert name not in self.tensors, name
        tensor = self.tensors[name] = CaseTensor(name, type, ne, op, src, **more)
        return tensor

    def input(self, name: str, type: str, ne: Sequence[int]) -> CaseTensor:
        """Add an input."""
        return self.new(type, ne, name=name, flags=["input"])

    def same(self, op: str, a: CaseTensor, *more_src: CaseTensor, name: str = "", **more: Any) -> CaseTensor:
        """Add an op whose result has the shape and type of its first source."""
        return self.new(a.type, a.ne, op, (a, *more_src), name, **more)

    def inplace(self, op: str, a: CaseTensor, *more_src: CaseTensor) -> CaseTensor:
        """Add an op whose result is a view of its first source."""
        return self.new(a.type, a.ne, op, (a, *more_src), view=(a, 0), nb=a.nb)

    def mul_mat(self, w: CaseTensor, x: CaseTensor, name: str = "") -> CaseTensor:
        """Add ``w`` times ``x``."""
        return self.new("f32", [w.ne[1], *x.ne[1:]], "MUL_MAT", (w, x), name)

    def mul_mat_id(self, w: CaseTensor, x: CaseTensor, ids: CaseTensor, name: str = "") -> CaseTensor:
        """Add chosen experts of ``w`` times ``x``."""
        return self.new("f32", [w.ne[1], ids.ne[0], x.ne[2], 1], "MUL_MAT_ID", (w, x, ids), name)

    def view(
        self,
        a: CaseTensor,
        ne: Sequence[int],
        nb: Sequence[int] | None = None,
        *,
        offs: int = 0,
        name: str = "",
        op: str = "VIEW",
    ) -> CaseTensor:
        """Add a view."""
        return self.new(a.type, ne, op, (a,), name, view=(a, offs), nb=nb)

    def reshape(self, a: CaseTensor, ne: Sequence[int], name: str = "") -> CaseTensor:
        """Add a view of another shape."""
        return self.view(a, ne, name=name, op="RESHAPE")

    def permute(self, a: CaseTensor, axes: Sequence[int], name: str = "") -> CaseTensor:
        """Add a view with dimensions exchanged."""
        ne, nb = [0] * 4, [0] * 4
        for i, axis in enumerate(axes):
            ne[axis], nb[axis] = a.ne[i], a.nb[i]
        return self.view(a, ne, nb, name=name, op="PERMUTE")

    def cont(self, a: CaseTensor, ne: Sequence[int] | None = None, name: str = "") -> CaseTensor:
        """Add a contiguous copy."""
        return self.new(a.type, ne or a.ne, "CONT", (a,), name)

    def get_rows(self, a: CaseTensor, ids: CaseTensor, name: str = "") -> CaseTensor:
        """Add chosen rows."""
        type = "i32" if a.type == "i32" else "f32"
        return self.new(type, [a.ne[0], ids.ne[0], ids.ne[1], ids.ne[2]], "GET_ROWS", (a, ids), name)

    def set_rows(self, dst: CaseTensor, x: CaseTensor, rows: CaseTensor, name: str = "") -> CaseTensor:
        """Add a write of rows into a tensor, whose view is the result."""
        return self.new(dst.type, dst.ne, "SET_ROWS", (x, rows, dst), name, view=(dst, 0), nb=dst.nb)

    def cpy(self, a: CaseTensor, b: CaseTensor, name: str = "") -> CaseTensor:
        """Add a copy into a tensor, whose view is the result."""
        return self.new(b.type, b.ne, "CPY", (a, b), name, view=(b, 0), nb=b.nb)

    def flash_attn(
        self,
        q: CaseTensor,
        k: CaseTensor,
        v: CaseTensor,
        mask: CaseTensor,
        sinks: CaseTensor | None = None,
        name: str = "",
    ) -> CaseTensor:
        """Add attention."""
        src = (q, k, v, mask) if sinks is None else (q, k, v, mask, sinks)
        return self.new("f32", [v.ne[0], q.ne[2], q.ne[1], q.ne[3]], "FLASH_ATTN_EXT", src, name)

    def glu(self, a: CaseTensor, b: CaseTensor, name: str = "") -> CaseTensor:
        """Add a gated product (SWIGLU)."""
        return self.new(a.type, a.ne, "GLU", (a, b), name, op_params=[2, 0])

    def argsort(self, a: CaseTensor, name: str = "") -> CaseTensor:
        """Add the order of each row's elements."""
        return self.new("i32", a.ne, "ARGSORT", (a,), name, op_params=[1])

    def reach(self) -> set[str]:
        """Return the names of the tensors that the results need."""
        seen: set[str] = set()
        open_ = list(self.results)
        while open_:
            tensor = open_.pop()
            if tensor.id not in seen:
                seen.add(tensor.id)
                open_ += [s for s in tensor.src if s is not None]
        return seen

    def json(self) -> Json:
        """Return the case's graph."""
        return {"tensors": [t.json() for t in self.tensors.values()], "expand": [t.id for t in self.results]}


def make_case(
    name: str, machine: Json, static: CaseStatic, graphs: Mapping[str, CaseGraph], sched: Json, steps: Sequence[Json]
) -> Json:
    """Return a whole case; ``machine`` has ``buffer_types`` and ``backends``."""
    n_tensors = max((len(g.tensors) for g in graphs.values()), default=0) + len(static.tensors)
    return {
        "format": CASE_FORMAT,
        "name": name,
        **machine,
        **static.json(),
        "graphs": {key: graph.json() for key, graph in graphs.items()},
        "sched": {"graph_size": 2 * n_tensors + 64, **sched},
        "steps": list(steps),
    }
