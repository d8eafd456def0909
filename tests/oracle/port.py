"""Upstream's scheduler rules written out as upstream has them: a slow second opinion for property tests.

`Port` runs the steps of a case (``FORMAT.md``) on plain data: which backend each tensor gets (passes 1 to 4), the splits
and copies (5 and 6), the graph that the allocator sees, and where everything comes to lie. Every loop is upstream's, and
no code is shared with `pyggml.sched` and `pyggml.alloc`. It computes nothing and makes no calls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from cases.graph import contiguous

from pyggml.dialect import DIALECTS, Dialect

from .port_alloc import (
    PlainTensor,
    PortAbort,
    PortGallocr,
    Spec,
    aligned,
    alloc_size,
    batch_of,
    is_view_op,
)

__all__ = ["Port", "PortAbort"]

MAX_SRC = 10
MAX_SPLIT_INPUTS = 30
MAX_COPIES = 4
NAME_BYTES = 63
VIEW_OPS_AND_NONE = ("NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE")


class PortSplit:
    """Mirrors `struct ggml_backend_sched_split`; the record lives on from graph to graph."""

    def __init__(self) -> None:
        self.backend_id = 0
        self.i_start = 0
        self.i_end = 0
        self.inputs: list[PlainTensor] = []
        self.inputs_capacity = 0


class PlainGraph:
    """Tensors of one build of a graph, its nodes and leafs."""

    def __init__(self) -> None:
        self.tensors: dict[str, PlainTensor] = {}
        self.nodes: list[PlainTensor] = []
        self.leafs: list[PlainTensor] = []
        self.sources: dict[str, list[str | None]] = {}
        self.flags: dict[str, set[str]] = {}


class Port:
    """A scheduler that decides as upstream does, and does nothing.

    Parameters
    ----------
    case : dict
        A case, as read from JSON.
    dialect : Dialect or str
        Whose rules.
    """

    def __init__(self, case: Mapping[str, Any], dialect: Dialect | str = "0.26") -> None:
        self.case = case
        self.dialect = DIALECTS[dialect] if isinstance(dialect, str) else dialect
        self.buft_specs: dict[str, Spec] = {b["name"]: b for b in case["buffer_types"]}
        self.backends: list[Spec] = case["backends"]
        sched = case["sched"]
        self.bufts = [self.buft_specs[name] for name in sched.get("bufts") or [b["buft"] for b in self.backends]]
        self.n_backends = len(self.backends)
        self.n_copies = MAX_COPIES if sched.get("parallel") else 1
        self.op_offload = bool(sched.get("op_offload"))
        self.cur_copy = self.next_copy = 0
        self.is_reset, self.is_alloc = True, False
        self.backend_ids: dict[PlainTensor, int] = {}
        self.copies: dict[tuple[PlainTensor, int], list[PlainTensor]] = {}
        self.splits: list[PortSplit] = [PortSplit()]
        self.n_splits = 0
        self.graph_inputs: list[PlainTensor] = []
        self.copy_nodes: list[PlainTensor] = []
        self.copy_leafs: list[PlainTensor] = []
        self.node_ids: dict[int, int] = defaultdict(int)
        self.leaf_ids: dict[int, int] = defaultdict(int)
        self.prev_node_ids: dict[int, int] = defaultdict(int)
        self.prev_leaf_ids: dict[int, int] = defaultdict(int)
        self.galloc = PortGallocr(self.bufts, self.dialect)
        self.static: dict[str, PlainTensor] = {}
        self.graphs: dict[str, PlainGraph] = {}
        for spec in case.get("tensors", ()):
            self.new_tensor(spec, self.static)
        for buffer in case.get("buffers", ()):
            self.place_static(buffer)

    # -- the case's own tensors -------------------------------------------------

    def new_tensor(self, spec: Spec, table: dict[str, PlainTensor]) -> None:
        """Make a tensor of the case."""

        def find(name: str) -> PlainTensor:
            return table[name] if name in table else self.static[name]

        ne = list(spec["ne"]) + [1] * (4 - len(spec["ne"]))
        tensor = PlainTensor(spec["id"], spec["type"], ne, spec.get("nb") or contiguous(spec["type"], ne))
        tensor.op = spec.get("op", "NONE")
        tensor.src = [None if name is None else find(name) for name in spec.get("src", ())]
        tensor.flags = set(spec.get("flags", ()))
        if spec.get("view"):
            root = find(spec["view"]["src"])
            tensor.view_src, tensor.view_offs = root, spec["view"].get("offs", 0)
            if root.data is not None:
                tensor.data = (root.data[0], root.data[1], root.data[2] + tensor.view_offs)
        table[spec["id"]] = tensor

    def place_static(self, buffer: Spec) -> None:
        """Lay a static buffer out."""
        buft = self.buft_specs[buffer["buft"]]
        offset = 0
        for name in buffer["tensors"]:
            tensor = self.static[name]
            tensor.buffer, tensor.buft, tensor.usage = buffer["id"], buffer["buft"], buffer.get("usage", "any")
            if tensor.view_src is not None:
                assert tensor.view_src.data is not None
                tensor.data = (buffer["id"], 0, tensor.view_src.data[2] + tensor.view_offs)
                continue
            tensor.data = (buffer["id"], 0, offset)
            offset += aligned(alloc_size(buft, tensor), buft.get("alignment", 64))

    def build(self, name: str) -> PlainGraph:
        """Mirrors `ggml_build_forward_expand` for each of the graph's results."""
        spec = self.case["graphs"][name]
        graph = self.graphs[name] = PlainGraph()
        for tensor in spec["tensors"]:
            self.new_tensor(tensor, graph.tensors)
        everything = {**self.static, **graph.tensors}
        graph.sources = {t.name: [None if s is None else s.name for s in t.src] for t in everything.values()}
        graph.flags = {t.name: set(t.flags) for t in everything.values()}
        visited: set[PlainTensor] = set()
        for result in spec["expand"]:
            open_ = [everything[result]]  # upstream recurses; Python's stack is too small for that
            while open_:
                tensor = open_[-1]
                if tensor in visited:
                    open_.pop()
                    continue
                waiting = [src for src in tensor.src if src is not None and src not in visited]
                if waiting:
                    open_.append(waiting[0])
                    continue
                visited.add(open_.pop())
                is_leaf = tensor.op == "NONE" and "param" not in tensor.flags
                (graph.leafs if is_leaf else graph.nodes).append(tensor)
        return graph

    # -- questions to the backends ----------------------------------------------

    def supports_op(self, b: int, tensor: PlainTensor) -> bool:
        """Whether a backend says that it can run an op."""
        ops = self.backends[b].get("ops", "all")
        if ops == "all":
            return True
        if "allow" in ops:
            if tensor.op not in ops["allow"] and tensor.op not in VIEW_OPS_AND_NONE:
                return False
        elif tensor.op in ops.get("deny", ()):
            return False
        if tensor.op in ops.get("min_batch", {}) and batch_of(tensor) < ops["min_batch"][tensor.op]:
            return False
        if tensor.op in VIEW_OPS_AND_NONE:
            return True
        src0 = tensor.src[0] if tensor.src else None
        return src0 is None or src0.type not in ops.get("deny_src0_types", ())

    def supports_buft(self, b: int, buft: str) -> bool:
        """Whether a backend says that it can use a buffer type."""
        return buft in self.backends[b]["bufts"]

    def offload_op(self, b: int, tensor: PlainTensor) -> bool:
        """Whether a backend says that it wants an op."""
        wish = self.backends[b].get("offload")
        if not wish:
            return False
        return (wish["ops"] == "all" or tensor.op in wish["ops"]) and batch_of(tensor) >= wish["min_batch"]

    def id_of(self, tensor: PlainTensor | None) -> int:
        """Mirrors `tensor_backend_id`, for which a null tensor is as good as any."""
        return -1 if tensor is None else self.backend_ids.get(tensor, -1)

    def backend_from_buffer(self, tensor: PlainTensor, op: PlainTensor) -> int:
        """Mirrors `ggml_backend_sched_backend_from_buffer`."""
        holder = tensor.view_src if tensor.view_src is not None else tensor
        if holder.buffer is None:
            return -1
        for i in range(self.n_backends):
            if self.supports_buft(i, holder.buft) and self.supports_op(i, op):
                return i
        return -1

    def backend_from_cur(self, tensor: PlainTensor) -> int:
        """Mirrors `ggml_backend_sched_backend_id_from_cur`."""
        found = self.backend_from_buffer(tensor, tensor)
        if found != -1:
            return found
        if tensor.view_src is not None:
            found = self.backend_from_buffer(tensor.view_src, tensor)
            if found != -1:
                return found
        if tensor.buffer is not None or (tensor.view_src is not None and tensor.view_src.buffer is not None):
            raise PortAbort(f"pre-allocated tensor ({tensor.name}) in a buffer that cannot run the operation")
        if "input" in tensor.flags:
            return self.n_backends - 1
        if tensor.op not in ("ROPE", "FLASH_ATTN_EXT"):
            for src in tensor.src:
                if src is None:
                    continue
                if src.buffer is not None and src.usage == "weights":
                    src_id = self.backend_from_buffer(src, tensor)
                    is_host = self.buft_specs[src.buft].get("host", False)
                    if self.op_offload and src_id == self.n_backends - 1 and is_host:
                        for b in range(src_id):
                            if self.supports_op(b, tensor) and self.offload_op(b, tensor):
                                return b
                    return src_id
        return -1

    def buffer_supported(self, tensor: PlainTensor, b: int) -> bool:
        """Mirrors `ggml_backend_sched_buffer_supported`."""
        holder = tensor.view_src if tensor.view_src is not None else tensor
        if holder.buffer is not None:
            return self.supports_buft(b, holder.buft)
        at = self.id_of(tensor)
        if at == -1 and tensor.view_src is not None:
            at = self.id_of(tensor.view_src)
        return at != -1 and self.supports_buft(b, self.bufts[at]["name"])

    # -- passes ------------------------------------------------------------------

    def split_graph(self, graph: PlainGraph) -> None:
        """Mirrors `ggml_backend_sched_split_graph`."""
        if any(s is not None and s.name != graph.sources[t.name][j] for t in graph.nodes for j, s in enumerate(t.src)):
            raise PortAbort("undefined: the graph's sources name copies of an earlier split")
        self.n_splits = 0
        self.graph_inputs = []
        self.is_reset = False
        self.pass_1(graph)
        self.pass_2(graph)
        self.pass_3(graph)
        self.pass_4(graph)
        self.pass_5(graph)
        self.pass_6(graph)
        self.copy_graph(graph, self.optimize(graph))

    def pass_1(self, graph: PlainGraph) -> None:
        """Assign what has a location."""
        for leaf in graph.leafs:
            if self.id_of(leaf) == -1:
                self.backend_ids[leaf] = self.backend_from_cur(leaf)
        for node in graph.nodes:
            if self.id_of(node) == -1:
                self.backend_ids[node] = self.backend_from_cur(node)

    def pass_2(self, graph: PlainGraph) -> None:
        """Assign neighbours."""
        cpu = self.n_backends - 1
        cur = -1  # gpu down
        for i in range(len(graph.nodes)):
            node = graph.nodes[i]
            if is_view_op(node.op):
                continue
            if self.id_of(node) != -1:
                cur = -1 if self.id_of(node) == cpu else self.id_of(node)
            elif cur != -1:
                self.set_if_supported(node, cur)
        cur = -1  # gpu up
        for i in range(len(graph.nodes) - 1, -1, -1):
            node = graph.nodes[i]
            if is_view_op(node.op):
                continue
            if self.id_of(node) != -1:
                cur = -1 if self.id_of(node) == cpu else self.id_of(node)
            elif cur != -1:
                self.set_if_supported(node, cur)
        cur = -1  # rest down
        for i in range(len(graph.nodes)):
            node = graph.nodes[i]
            if is_view_op(node.op):
                continue
            if self.id_of(node) != -1:
                cur = self.id_of(node)
            elif cur != -1:
                self.set_if_supported(node, cur)
        cur = -1  # rest up
        for i in range(len(graph.nodes) - 1, -1, -1):
            node = graph.nodes[i]
            if is_view_op(node.op):
                continue
            if self.id_of(node) != -1:
                cur = self.id_of(node)
            elif cur != -1:
                self.set_if_supported(node, cur)

    def set_if_supported(self, node: PlainTensor, b: int) -> None:
        """Mirrors `ggml_backend_sched_set_if_supported`."""
        if self.supports_op(b, node):
            self.backend_ids[node] = b

    def pass_3(self, graph: PlainGraph) -> None:
        """Upgrade, and assign by sources."""
        for node in graph.nodes:
            if is_view_op(node.op):
                continue
            if self.id_of(node) == -1:
                n_supported_best = -1
                for b in range(self.n_backends):
                    if self.supports_op(b, node):
                        n_supported = 0
                        for src in node.src:
                            if src is None:
                                continue
                            is_known = self.id_of(src) != -1 or self.id_of(src.view_src) != -1
                            if is_known and self.buffer_supported(src, b):
                                n_supported += 1
                        if n_supported > n_supported_best:
                            n_supported_best = n_supported
                            self.backend_ids[node] = b
            else:
                b = 0
                while b < self.id_of(node):
                    if self.bufts[b] is self.bufts[self.id_of(node)] and self.supports_op(b, node):
                        supported = True
                        for src in node.src:
                            if src is not None and not self.buffer_supported(src, b):
                                supported = False
                                break
                        if supported:
                            self.backend_ids[node] = b
                            break
                    b += 1

    def pass_4(self, graph: PlainGraph) -> None:
        """Assign what is left from views and users."""
        for node in graph.nodes:
            if node.view_src is not None and self.id_of(node) == -1:
                self.backend_ids[node] = self.id_of(node.view_src)
            for src in node.src:
                if src is None:
                    continue
                if self.id_of(src) == -1:
                    if src.view_src is not None:
                        self.backend_ids[src] = self.id_of(src.view_src)
                    else:
                        self.backend_ids[src] = self.id_of(node)
            b = 0
            while b < self.n_backends and self.id_of(node) == -1:
                self.set_if_supported(node, b)
                b += 1
            if self.id_of(node) == -1:
                raise PortAbort(f"no backend for {node.name}")

    def pass_5(self, graph: PlainGraph) -> None:
        """Cut into splits, find inputs."""
        i_split = 0
        split = self.splits[0]
        i = 0
        while i < len(graph.nodes):
            if not is_view_op(graph.nodes[i].op):
                split.backend_id = self.id_of(graph.nodes[i])
                break
            i += 1
        split.i_start = 0
        split.inputs = []
        cur = split.backend_id
        while i < len(graph.nodes):
            node = graph.nodes[i]
            if is_view_op(node.op):
                i += 1
                continue
            node_id = self.id_of(node)
            need_new_split = False
            if node_id == cur and len(split.inputs) > 0:
                for src in node.src:
                    if src is None:
                        continue
                    is_weight = src.buffer is not None and src.usage == "weights"
                    if is_weight and self.id_of(src) != cur and not self.buffer_supported(src, cur):
                        need_new_split = True
                        break
                    if self.dialect.cut_at_input_capacity and len(split.inputs) == split.inputs_capacity:
                        is_new = (src, cur) not in self.copies
                        if self.id_of(src) != cur and is_new and not self.buffer_supported(src, cur):
                            need_new_split = True
                            break
            if node_id != cur or need_new_split:
                split.i_end = i
                i_split += 1
                if i_split >= len(self.splits):
                    self.splits.append(PortSplit())
                split = self.splits[i_split]
                split.backend_id = node_id
                split.i_start = i
                split.inputs = []
                cur = node_id
            for j, src in enumerate(node.src):
                if src is None:
                    continue
                src_id = self.id_of(src)
                is_graph_input = "input" in src.flags and self.n_copies > 1 and (src, src_id) not in self.copies
                if self.dialect.graph_inputs_from == "sources" and is_graph_input:
                    self.copy_graph_input(src)
                    self.graph_inputs.append(src)
                if src_id != cur and not self.buffer_supported(src, cur):
                    if (src, cur) not in self.copies:
                        made = []
                        for c in range(self.n_copies):
                            copy = self.duplicate(src, cur, c)
                            if self.n_copies > 1:
                                copy.flags |= {"input", "output"}
                            made.append(copy)
                        self.copies[src, cur] = made
                        split.inputs.append(src)
                        if len(split.inputs) > split.inputs_capacity:
                            split.inputs_capacity = 2 * split.inputs_capacity or MAX_SPLIT_INPUTS
                    node.src[j] = self.copies[src, cur][self.cur_copy]
            i += 1
        split.i_end = len(graph.nodes)
        self.n_splits = i_split + 1

    def duplicate(self, tensor: PlainTensor, b: int, c: int) -> PlainTensor:
        """Mirrors `ggml_dup_tensor_layout` and the name that a copy gets."""
        name = f"{self.backends[b]['name']}#{tensor.name}#{c}"[:NAME_BYTES]
        return PlainTensor(name, tensor.type, tensor.ne, tensor.nb)

    def copy_graph_input(self, tensor: PlainTensor) -> None:
        """Make the pipeline copies of an input, of which it is itself the current one."""
        b = self.id_of(tensor)
        made = []
        for c in range(self.n_copies):
            copy = tensor if c == self.cur_copy else self.duplicate(tensor, b, c)
            copy.flags |= {"input", "output"}
            made.append(copy)
        self.copies[tensor, b] = made

    def pass_6(self, graph: PlainGraph) -> None:
        """Give input leafs their pipeline copies."""
        if self.dialect.graph_inputs_from == "leafs" and self.n_copies > 1:
            for leaf in graph.leafs:
                if "input" not in leaf.flags:
                    continue
                if (leaf, self.id_of(leaf)) not in self.copies:
                    self.copy_graph_input(leaf)
                self.graph_inputs.append(leaf)

    def optimize(self, graph: PlainGraph) -> dict[PlainTensor, list[PlainTensor]]:
        """Let each split's backend order its nodes, and ask for lives, as the case says."""
        keep: dict[PlainTensor, list[PlainTensor]] = {}
        for split in self.splits[: self.n_splits]:
            wish = self.backends[split.backend_id].get("optimize")
            if wish is None:
                continue
            nodes = graph.nodes[split.i_start : split.i_end]
            by_name = {node.name: node for node in nodes}
            order = [by_name[name] for name in wish.get("order", ()) if name in by_name]
            places = [k for k, node in enumerate(nodes) if node in order]
            for k, node in zip(places, order, strict=True):
                nodes[k] = node
            graph.nodes[split.i_start : split.i_end] = nodes

            def find(name: str, nodes: Sequence[PlainTensor] = tuple(nodes)) -> PlainTensor | None:
                for node in nodes:
                    if node.name == name:
                        return node
                for node in nodes:
                    for src in node.src:
                        if src is not None and src.name == name:
                            return src
                return None

            for name, until_name in wish.get("keep", ()) if self.dialect.alloc_deps else ():
                tensor, until = find(name), find(until_name)
                if tensor is not None and until is not None and tensor not in keep.setdefault(until, []):
                    keep[until].append(tensor)
        return keep

    def copy_graph(self, graph: PlainGraph, keep: dict[PlainTensor, list[PlainTensor]]) -> None:
        """Mirrors the end of `ggml_backend_sched_split_graph`: the graph that the allocator sees."""
        self.node_ids, self.prev_node_ids = self.prev_node_ids, self.node_ids
        self.leaf_ids, self.prev_leaf_ids = self.prev_leaf_ids, self.leaf_ids
        self.copy_nodes, self.copy_leafs = [], []

        def add_node(tensor: PlainTensor, b: int) -> None:
            self.node_ids[len(self.copy_nodes)] = b
            self.copy_nodes.append(tensor)

        def add_leaf(tensor: PlainTensor, b: int) -> None:
            self.leaf_ids[len(self.copy_leafs)] = b
            self.copy_leafs.append(tensor)

        def view(tensor: PlainTensor, src: list[PlainTensor | None]) -> PlainTensor:
            root = tensor.view_src if tensor.view_src is not None else tensor
            offs = tensor.view_offs if tensor.view_src is not None else 0
            made = PlainTensor(f"{tensor.name} (view)"[:NAME_BYTES], tensor.type, tensor.ne, tensor.nb, src=src)
            made.view_src, made.view_offs = root, offs
            if root.data is not None:
                made.data = (root.data[0], root.data[1], root.data[2] + offs)
            return made

        n_added = 0
        for split in self.splits[: self.n_splits]:
            for tensor in split.inputs:
                add_node(view(tensor, [tensor]), self.id_of(tensor))
                add_node(self.copies[tensor, split.backend_id][self.cur_copy], split.backend_id)
            for node in graph.nodes[split.i_start : split.i_end]:
                add_node(node, self.id_of(node))
                kept = keep.get(node, [])
                for k in range(0, len(kept), MAX_SRC):
                    add_node(view(kept[k], list(kept[k : k + MAX_SRC])), split.backend_id)
                    n_added += 1
        if n_added != sum(-(-len(kept) // MAX_SRC) for kept in keep.values()):
            raise PortAbort("n_dep_nodes_added == n_dep_nodes")
        if self.n_copies > 1:
            for tensor in self.graph_inputs:
                for copy in self.copies[tensor, self.id_of(tensor)]:
                    add_leaf(copy, self.id_of(tensor))
            for split in self.splits[: self.n_splits]:
                for tensor in split.inputs:
                    for copy in self.copies[tensor, split.backend_id]:
                        add_leaf(copy, split.backend_id)
        for leaf in graph.leafs:
            add_leaf(leaf, self.id_of(leaf))

    # -- the scheduler's functions ------------------------------------------------

    def ids(self) -> tuple[list[int], list[int]]:
        """Return backend ids of the graph copy's nodes and leafs."""
        nodes = [self.node_ids[i] for i in range(len(self.copy_nodes))]
        return nodes, [self.leaf_ids[i] for i in range(len(self.copy_leafs))]

    def reset(self) -> None:
        """Mirrors `ggml_backend_sched_reset`."""
        if not self.is_reset:
            self.backend_ids, self.copies = {}, {}
            self.is_reset = True
        self.is_alloc = False

    def synchronize(self) -> None:
        """Mirrors `ggml_backend_sched_synchronize`."""
        if not self.is_alloc:
            self.next_copy = 0

    def reserve(self, graph: PlainGraph) -> bool:
        """Mirrors `ggml_backend_sched_reserve`."""
        self.synchronize()
        self.split_graph(graph)
        if not self.galloc.reserve_n(self.copy_nodes, self.copy_leafs, *self.ids()):
            return False
        self.reset()
        return True

    def reserve_size(self, graph: PlainGraph) -> list[int]:
        """Mirrors `ggml_backend_sched_reserve_size`."""
        self.reset()
        self.synchronize()
        self.split_graph(graph)
        self.galloc.reserve_n(self.copy_nodes, self.copy_leafs, *self.ids(), no_alloc=True)
        return [sum(talloc.max_size) for talloc in self.galloc.tallocs]

    def alloc_graph(self, graph: PlainGraph) -> bool:
        """Mirrors `ggml_backend_sched_alloc_graph`."""
        if self.is_alloc:
            raise PortAbort("!sched->is_alloc")
        self.cur_copy = self.next_copy
        self.next_copy = (self.next_copy + 1) % self.n_copies
        self.split_graph(graph)
        changed = False
        for i in range(len(self.copy_nodes)):
            if self.bufts[self.node_ids[i]] is not self.bufts[self.prev_node_ids[i]]:
                changed = True
        for i in range(len(self.copy_leafs)):
            if self.bufts[self.leaf_ids[i]] is not self.bufts[self.prev_leaf_ids[i]]:
                changed = True
        if changed or not self.galloc.alloc_graph(self.copy_nodes, self.copy_leafs):
            if not self.galloc.reserve_n(self.copy_nodes, self.copy_leafs, *self.ids()):
                if self.dialect.reserve_failure == "returned":
                    return False
                raise PortAbort("a null buffer")
            if not self.galloc.alloc_graph(self.copy_nodes, self.copy_leafs):
                return False
        self.is_alloc = True
        return True
