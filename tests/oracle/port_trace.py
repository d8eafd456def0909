"""What the port decides at each step of a case, in the form of a trace without calls (``FORMAT.md``, section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyggml.dialect import Dialect

from .port import PlainGraph, Port, PortAbort

__all__ = ["port_trace"]

FLAG_NAMES = ("input", "loss", "output", "param")
#: A step's record, or a part of it: JSON values.
Record = dict[str, Any]


def port_trace(case: Mapping[str, Any], dialect: Dialect | str = "0.26") -> list[Record]:
    """Return a record for the scheduler and one for each step, until upstream would abort."""
    port = Port(case, dialect)
    records: list[Record] = [{"op": "sched_new"}]
    for step in case["steps"]:
        record = {"op": step["op"], **({"graph": step["graph"]} if "graph" in step else {})}
        try:
            record.update(_step(port, step))
        except PortAbort as abort:
            record["abort"] = {"kind": "abort", "message": str(abort)}
            records.append(record)
            break
        records.append(record)
    return records


def _step(port: Port, step: Mapping[str, Any]) -> Record:
    op, name = step["op"], step.get("graph")
    if op == "build":
        graph = port.build(step["graph"])
        return {"nodes": [t.name for t in graph.nodes], "leafs": [t.name for t in graph.leafs]}
    if op == "pin":
        tensors = port.graphs[step["graph"]].tensors
        tensor = tensors.get(step["tensor"]) or port.static[step["tensor"]]
        port.backend_ids[tensor] = step["backend"]
        port.is_reset = False
        return {}
    if op == "reset":
        port.reset()
        return {}
    if op == "synchronize":
        port.synchronize()
        return {"next_copy": port.next_copy}
    if name is None or op not in ("reserve", "reserve_size", "split", "alloc_graph", "compute"):
        return {}
    graph = port.graphs[name]
    if op == "reserve":
        done = port.reserve(graph)
        return {"result": done, "state": port_state(port, graph, is_allocated=False, is_assigned=not done)}
    if op == "reserve_size":
        return {"sizes": port.reserve_size(graph)}
    if op == "split":
        port.split_graph(graph)
        return {"state": port_state(port, graph, is_allocated=False, is_assigned=True)}
    if op == "alloc_graph":
        done = port.alloc_graph(graph)
        return {"result": done, "state": port_state(port, graph, is_allocated=done, is_assigned=True)}
    if port.is_alloc:
        return {}
    port.reset()
    return {"state": port_state(port, graph, is_allocated=True, is_assigned=True)} if port.alloc_graph(graph) else {}


def port_state(port: Port, graph: PlainGraph, *, is_allocated: bool, is_assigned: bool) -> Record:
    """Return the state of a trace."""
    node_ids, leaf_ids = port.ids()
    everything = {**graph.tensors, **port.static}
    splits = port.splits[: port.n_splits]
    state: Record = {
        "n_splits": port.n_splits,
        "n_copies": port.n_copies,
        "cur_copy": port.cur_copy,
        "next_copy": port.next_copy,
        "splits": [
            {
                "backend": split.backend_id,
                "i_start": split.i_start,
                "i_end": split.i_end,
                "n_inputs": len(split.inputs),
                "inputs": [t.name for t in split.inputs],
            }
            for split in splits
        ],
        "graph_inputs": [t.name for t in port.graph_inputs],
        "copy_nodes": [[t.name, b] for t, b in zip(port.copy_nodes, node_ids, strict=True)],
        "copy_leafs": [[t.name, b] for t, b in zip(port.copy_leafs, leaf_ids, strict=True)],
        "rewritten": [
            [node.name, j, src.name]
            for node in graph.nodes
            for j, src in enumerate(node.src)
            if src is not None and src.name != graph.sources[node.name][j]
        ],
        "flags_changed": {
            name: [flag for flag in FLAG_NAMES if flag in tensor.flags]
            for name, tensor in everything.items()
            if tensor.flags != graph.flags[name]
        },
    }
    if is_assigned:
        ids = {name: port.id_of(tensor) for name, tensor in everything.items()}
        state["tensor_backend"] = {name: b for name, b in ids.items() if b != -1}
        state["copies"] = {}
        for (tensor, b), made in port.copies.items():
            if everything.get(tensor.name) is tensor:
                state["copies"].setdefault(tensor.name, {})[str(b)] = [t.name for t in made]
    galloc = port.galloc
    state["buffer_sizes"] = [galloc.buffer_size(i) for i in range(port.n_backends)]
    state["chunk_sizes"] = [sizes or [] for sizes in galloc.chunk_sizes]
    if is_allocated:
        state["alloc"] = {}
        for node in port.copy_nodes:
            if node.op == "NONE" and node.view_src is not None and node.src and node.name.endswith(" (view)"):
                continue  # a dependency
            for used in (node, *node.src):
                if used is not None:
                    state["alloc"][used.name] = None if used.data is None else list(used.data)
        for leaf in port.copy_leafs:
            state["alloc"][leaf.name] = None if leaf.data is None else list(leaf.data)
    return state
