"""Converts ggml's tensors and graphs to pyggml's; in the child."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from ..backends.libggml.library import Handle
from ..buffer import Buffer
from ..graph import Graph, GraphView
from ..tensor import Tensor
from ..types import Op
from .library import DeviceLibrary

__all__ = ["Translator"]

#: Offset of the sources in ``struct ggml_tensor``, in bytes.
_HEAD_BYTES = 152
#: Most kept graphs of splits; a model has some hundreds per batch size.
_MAX_VIEWS = 4096
_MAX_ANSWERS = 20_000


class Translator:
    """Converts the tensors of a library.

    Parameters
    ----------
    buffer_of : callable
        Returns pyggml's buffer for the address of a ggml buffer.
    """

    def __init__(self, library: DeviceLibrary, buffer_of: Callable[[int], Buffer | None]) -> None:
        self.library, self.ffi = library, library.ffi
        self._buffer_of = buffer_of
        self._ops = {number: op for op, number in library.ops.items()}
        self._subs = {(op, number): sub for (op, sub), number in library.sub_ops.items()}
        self._types = {int(t): t for t in library.types}
        self._views: OrderedDict[int, GraphView] = OrderedDict()
        self._answers: dict[object, bool] = {}
        self._known: dict[bytes, Tensor] = {}
        self._struct_bytes = self.ffi.sizeof("struct ggml_tensor")

    def is_quantized(self, t: Handle) -> bool:
        """Whether a tensor's type has blocks."""
        type = self._types.get(t.type)
        return type is not None and type.is_quantized

    def known(self, t: Handle) -> Tensor:
        """Return `tensor`; until `forget`, equal structs give the same object, because copies repeat tensors."""
        key = bytes(self.ffi.buffer(t, self._struct_bytes))
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= _MAX_ANSWERS:
                self._known.clear()
            found = self._known[key] = self.tensor(t)
        return found

    def forget(self) -> None:
        """Forget tensors, because a buffer was freed and its address may be reused."""
        self._known.clear()

    def tensor(self, t: Handle, *, has_op: bool = False) -> Tensor:
        """Return a tensor with its address; a view becomes a tensor at its own address.

        Parameters
        ----------
        has_op : bool
            Include op and parameters; the caller sets the sources.
        """
        null = self.ffi.NULL
        type = self._types.get(t.type)
        if type is None:
            raise ValueError(f"ggml's type {t.type} is not known")
        made = Tensor(type, tuple(t.ne), tuple(t.nb), name=self._text(t), flags=t.flags)
        owner = t if t.buffer != null or t.view_src == null else t.view_src
        if owner.buffer != null:
            made.buffer = self._buffer_of(self.library.address(owner.buffer))
        if t.data != null:
            made.data = self.library.address(t.data)
        if has_op:
            op = made.op = self._ops[t.op]
            params = list(t.op_params)
            if op in (Op.UNARY, Op.GLU):
                params[0] = self._subs[op, params[0]]
            made.op_params = tuple(params)
        return made

    def _text(self, t: Handle) -> str:
        name: bytes = self.ffi.string(t.name)
        return name.decode("utf-8", "replace")

    def ask(self, t: Handle, supports: Callable[[Tensor], bool]) -> bool:
        """Return a device's answer for a node, asked once for equal nodes; False for unknown ops and types."""
        null = self.ffi.NULL
        key = (
            supports,
            bytes(self.ffi.buffer(t, _HEAD_BYTES)),
            tuple(None if s == null else (s.type, tuple(s.ne), tuple(s.nb)) for s in t.src),
        )
        known = self._answers.get(key)
        if known is None:
            if len(self._answers) >= _MAX_ANSWERS:
                self._answers.clear()
            known = self._answers[key] = self._knows(t) and supports(self._node(t))
        return known

    def _knows(self, t: Handle) -> bool:
        op = self._ops.get(t.op)
        if op is None or (op in (Op.UNARY, Op.GLU) and (op, t.op_params[0]) not in self._subs):
            return False
        return all(s == self.ffi.NULL or s.type in self._types for s in (t, *t.src))

    def _node(self, t: Handle) -> Tensor:
        made = self.tensor(t, has_op=True)
        made.src[:] = _trimmed([None if s == self.ffi.NULL else self.tensor(s) for s in t.src])
        return made

    def view(self, graph: Handle) -> tuple[GraphView, int, int]:
        """Return a graph given to a device, the address of its list of nodes, and its number (0: none).

        The same graph gives the same object if the library numbers graphs.
        """
        uid = graph.uid if self.library.has_uids else 0
        nodes = self.library.address(graph.nodes)
        found = self._views.get(uid) if uid else None
        if found is not None:
            return found, nodes, uid
        made = self._translate(graph)
        if uid:
            made.is_verified = True  # tensors of a numbered graph do not move
            self._views[uid] = made
            if len(self._views) > _MAX_VIEWS:
                self._views.popitem(last=False)
        return made, nodes, uid

    def _linked(self, t: Handle, made: dict[int, Tensor], *, has_op: bool = False) -> Tensor:
        """Return `tensor` and add it to a graph's by address; a view knows its owner, which costs of attention go by."""
        tensor = made[self.library.address(t)] = self.tensor(t, has_op=has_op)
        if t.view_src != self.ffi.NULL:
            owner = made.get(self.library.address(t.view_src))
            tensor.view_src = self._linked(t.view_src, made) if owner is None else owner
            tensor.view_offs = t.view_offs
        return tensor

    def _translate(self, head: Handle) -> GraphView:
        null, address = self.ffi.NULL, self.library.address
        made: dict[int, Tensor] = {}
        graph = Graph()
        for i in range(head.n_nodes):
            t = head.nodes[i]
            node = self._linked(t, made, has_op=True)
            node.src[:] = _trimmed(
                [None if s == null else made.get(address(s)) or self._linked(s, made) for s in t.src]
            )
            graph.nodes.append(node)
        counts: dict[Tensor, int] = {}
        for node in graph.nodes:
            for used in node.src:
                if used is not None:
                    counts[used] = counts.get(used, 0) + 1
        graph.use_counts = counts
        graph.version += 1
        return graph.view(0, len(graph.nodes))


def _trimmed(sources: list[Tensor | None]) -> list[Tensor | None]:
    """Return sources without trailing None."""
    while sources and sources[-1] is None:
        sources.pop()
    return sources
