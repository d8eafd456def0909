"""Captured graphs: from what the child says of one to tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..backend import Backend
from ..edits import Sources
from ..graph import Graph
from ..tensor import Tensor
from ..types import GluOp, Op, Type, UnaryOp

__all__ = ["CapturedGraph", "CapturedTensor", "UnknownError", "read_graph", "read_tensor", "with_tensors"]

Message = dict[str, Any]  # what goes through JSON

_TYPES = {t.ggml_name: t for t in Type}
_OPS = dict(Op.__members__)


class CapturedTensor(NamedTuple):
    """A tensor of a captured graph.

    Attributes
    ----------
    src, view
        Places in the list of the graph's tensors.
    where
        The name of the buffer type and the usage of a weight or cache; None for others.
    desc : str
        The name of the op's kind, such as ``"SILU"``.
    """

    op: str
    name: str
    type: str
    ne: Sequence[int]
    nb: Sequence[int]
    src: Sequence[int | None]
    params: Sequence[int]
    flags: int
    view: int | None
    offs: int
    where: Sequence[Any] | None
    desc: str


@dataclass(eq=False, slots=True)
class CapturedGraph:
    """A captured graph; see `PlannableGraph`."""

    graph: Graph
    n_tokens: int
    logits: Tensor
    norms: list[tuple[Tensor, int]]
    attn_outputs: list[Tensor]
    delta_nodes: list[tuple[Tensor, int]] = field(default_factory=list)  #: empty, likewise
    flash_nodes: list[tuple[Tensor, int]] = field(default_factory=list)  #: empty: llama.cpp has decided it
    pins: list[tuple[Tensor, Backend]] = field(default_factory=list)  #: lookups of slots of an expert cache

    def __repr__(self) -> str:
        return f"<CapturedGraph of {self.n_tokens} tokens: {self.graph!r}>"


class UnknownError(Exception):
    """An op or a type that pyggml does not have."""


def with_tensors(captured: Message) -> Message:
    """Return a child's answer about a graph, with each tensor a `CapturedTensor`."""
    return captured | {"tensors": list(map(CapturedTensor._make, captured["tensors"]))}


def read_tensor(about: CapturedTensor) -> Tensor:
    """Return a tensor without its sources."""
    op, element, params = _OPS.get(about.op), _TYPES.get(about.type), about.params
    if op is None:
        raise UnknownError(f"the op {about.op}")
    if element is None:
        raise UnknownError(f"the type {about.type}")
    if about.op in ("UNARY", "GLU"):
        kind: type[UnaryOp | GluOp] = UnaryOp if op is Op.UNARY else GluOp
        if about.desc not in kind.__members__:
            raise UnknownError(f"the op {about.desc}")
        params = [int(kind[about.desc]), *params[1:]]
    return Tensor(
        element, tuple(about.ne), tuple(about.nb), name=about.name, op=op, op_params=tuple(params), flags=about.flags
    )


def read_graph(
    captured: Message, n_tokens: int, leaf: Any, known: Callable[[CapturedTensor], Tensor | None] | None = None
) -> CapturedGraph:
    """Return the graph of an answer of `with_tensors`.

    Parameters
    ----------
    known : callable
        Returns a tensor that exists already, with its sources, from its description; None for others.
    leaf : callable
        Returns the tensor of a weight or cache, from its description and the number of earlier ones in the graph with
        that name and place.
    """
    tensors, n_nodes = captured["tensors"], captured["n_nodes"]
    made: list[Tensor] = []
    n_seen: dict[tuple[str, str], int] = {}
    for about in tensors:
        if known is not None and (found := known(about)) is not None:
            made.append(found)
        elif about.where is None:
            made.append(read_tensor(about))
        else:
            key = (about.name, about.where[0])
            made.append(leaf(about, n_seen.get(key, 0)))
            n_seen[key] = n_seen.get(key, 0) + 1
    for about, tensor in zip(tensors, made, strict=True):
        if tensor.op is Op.VIEW and tensor.view_src is not None:  # a known one
            continue
        tensor.src = Sources([None if i is None else made[i] for i in about.src])
        if about.view is not None:
            tensor.view_src, tensor.view_offs = made[about.view], about.offs
    graph = Graph()
    graph.nodes = made[:n_nodes]
    graph.leafs = [made[i] for i in captured["leafs"]] or [t for t in made[n_nodes:] if t.op is Op.NONE]
    graph.use_counts = dict.fromkeys([*graph.nodes, *graph.leafs], 0)
    graph.use_counts.update(Counter(source for node in graph.nodes for source in node.src if source is not None))
    graph.version += 1
    logits = next((t for t in reversed(graph.nodes) if t.name == "result_output"), graph.nodes[-1])
    norms = [(graph.nodes[i], layer) for i, layer in captured["pins"]]
    return CapturedGraph(graph, n_tokens, logits, norms, [t for t in graph.nodes if _is_attn_output(t)])


def _is_attn_output(node: Tensor) -> bool:
    """Return whether a node is the result of attention without FLASH_ATTN_EXT, by its sources: its own name may change.

    Notes
    -----
    Mirrors the nodes that `llm_graph_context::build_attn_mha` pins to the CPU: CONT of PERMUTE of ``kqv``, which MLA
    multiplies once more. Attention that a model writes out itself has another name for its SOFT_MAX and no pin.
    """
    permuted = node.src[0] if node.op is Op.CONT else None
    product = permuted.src[0] if permuted is not None and permuted.op is Op.PERMUTE else None
    for _ in range(2):
        if product is None or product.op is not Op.MUL_MAT:
            return False
        product = product.src[1]
        if product is not None and product.op is Op.SOFT_MAX:
            return product.name.startswith("kq_soft_max")
    return False
