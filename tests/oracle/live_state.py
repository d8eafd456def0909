"""Read the real scheduler's state out of its private structs (``FORMAT.md``, section 2, state)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cases.graph import Json

if TYPE_CHECKING:
    from .live_run import Instance, LiveRun

__all__ = ["read_state"]

MAX_CHUNKS = 16
MAX_SRC = 10
FLAG_NAMES = {"input": 1, "loss": 8, "output": 2, "param": 4}


def read_state(run: LiveRun, made: Instance, *, is_allocated: bool, is_assigned: bool) -> Json:
    """Return what the scheduler decided on a graph."""
    sched, graph, name = run.sched, made.graph, run.name
    copy = sched.graph
    null = run.ffi.NULL
    everything = made.tensors | run.static
    state: Json = {key: getattr(sched, key) for key in ("n_splits", "n_copies", "cur_copy", "next_copy")}
    state["splits"] = [
        {
            "backend": split.backend_id,
            "i_start": split.i_start,
            "i_end": split.i_end,
            "n_inputs": split.n_inputs,
            "inputs": [name(split.inputs[j]) for j in range(split.n_inputs)],
        }
        for split in (sched.splits[k] for k in range(sched.n_splits))
    ]
    state["graph_inputs"] = [name(sched.graph_inputs[k]) for k in range(sched.n_graph_inputs)]
    state["copy_nodes"] = [[name(copy.nodes[k]), sched.node_backend_ids[k]] for k in range(copy.n_nodes)]
    state["copy_leafs"] = [[name(copy.leafs[k]), sched.leaf_backend_ids[k]] for k in range(copy.n_leafs)]
    state["rewritten"] = []
    for node in (graph.nodes[k] for k in range(graph.n_nodes)):
        described = made.sources[name(node)]
        for j in range(MAX_SRC):
            now = None if node.src[j] == null else name(node.src[j])
            if now != (described[j] if j < len(described) else None):
                state["rewritten"].append([name(node), j, now])
    state["flags_changed"] = {
        key: [flag for flag, bit in FLAG_NAMES.items() if t.flags & bit]
        for key, t in everything.items()
        if t.flags & 15 != made.flags[key]
    }
    if is_assigned:
        _read_assignment(run, everything, state)
    state["buffer_sizes"] = [run.base.ggml_backend_sched_get_buffer_size(sched, b) for b in run.backends]
    state["chunk_sizes"] = [
        [run.base.ggml_backend_buffer_get_size(chunk) for chunk in _chunks(run, b)] for b in range(sched.n_backends)
    ]
    if is_allocated:
        state["alloc"] = _read_places(run)
    return state


def _read_assignment(run: LiveRun, everything: dict[str, Any], state: Json) -> None:
    sched, name = run.sched, run.name
    n_copies = sched.n_copies
    state["tensor_backend"], state["copies"] = {}, {}
    for key, tensor in everything.items():
        at = _find(run, tensor)
        if at is None:
            continue
        if sched.hv_tensor_backend_ids[at] != -1:
            state["tensor_backend"][key] = sched.hv_tensor_backend_ids[at]
        for b in range(sched.n_backends):
            first = (at * sched.n_backends + b) * n_copies
            copies = [sched.hv_tensor_copies[first + c] for c in range(n_copies)]
            if copies[0] != run.ffi.NULL:
                state["copies"].setdefault(key, {})[str(b)] = [name(copy) for copy in copies]


def _find(run: LiveRun, tensor: Any) -> int | None:  # cffi
    """Return a tensor's slot in the scheduler's hash set, whose hash is the address without its lowest 4 bits."""
    table = run.sched.hash_set
    size: int = table.size
    start = i = (int(run.ffi.cast("uintptr_t", tensor)) >> 4) % size
    while table.used[i >> 5] >> (i & 31) & 1:
        if table.keys[i] == tensor:
            return i
        i = (i + 1) % size
        if i == start:
            break
    return None


def _chunks(run: LiveRun, b: int) -> list[Any]:  # cffi
    buffers = run.sched.galloc.buffers[b]
    if buffers == run.ffi.NULL:
        return []
    chunks = [buffers.chunks[k] for k in range(MAX_CHUNKS)]
    return chunks[: chunks.index(run.ffi.NULL)] if run.ffi.NULL in chunks else chunks


def _read_places(run: LiveRun) -> dict[str, list[int | str] | None]:
    copy, null, name = run.sched.graph, run.ffi.NULL, run.name
    chunks: dict[int, tuple[int, int]] = {}
    for b in reversed(range(run.sched.n_backends)):  # so that the first backend of a shared buffer is what stays
        for k, chunk in enumerate(_chunks(run, b)):
            chunks[int(run.ffi.cast("uintptr_t", chunk))] = (b, k)

    def place(tensor: Any) -> list[int | str] | None:  # cffi
        if tensor.buffer == null:
            return None
        buffer = int(run.ffi.cast("uintptr_t", tensor.buffer))
        address = int(run.ffi.cast("uintptr_t", tensor.data))
        size = run.base.ggml_backend_buffer_get_size(tensor.buffer)
        base = run.base.ggml_backend_buffer_get_base(tensor.buffer) if size else null
        offset = address - int(run.ffi.cast("uintptr_t", base))
        if buffer in run.static_buffers:
            return [run.static_buffers[buffer], 0, offset]
        return [*chunks[buffer], offset]

    places: dict[str, list[int | str] | None] = {}
    for node in (copy.nodes[k] for k in range(copy.n_nodes)):
        if node.op == 0 and node.view_src != null and node.src[0] != null and name(node).endswith(" (view)"):
            continue  # a dependency of the scheduler's own
        places[name(node)] = place(node)
        for j in range(MAX_SRC):
            if node.src[j] != null:
                places[name(node.src[j])] = place(node.src[j])
    for leaf in (copy.leafs[k] for k in range(copy.n_leafs)):
        places[name(leaf)] = place(leaf)
    return places
