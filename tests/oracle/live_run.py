"""One case in the real library: what `oracle.child` serves to `LiveScheduler`.

Tensors, graphs and buffers are made through the library's public functions; the scheduler's state is read out of its
private structs (`live_state`), whose layout is stated here: the same from 0.20 to 0.27.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cases.graph import Json

from pyggml.sched.experts import expert_copy_ranges

from .child import Message
from .libggml import COPY_EXPERTS, Library
from .live_state import read_state

__all__ = ["FUNCTIONS", "HANDLERS", "Instance", "LiveRun", "prepare"]

_FLAGS = {"input": 1, "output": 2, "param": 4, "loss": 8}
_USAGES = {"any": 0, "weights": 1, "compute": 2}
_DEVICES = {"CPU": 0, "GPU": 1, "IGPU": 2, "ACCEL": 3}
#: Room for a `llama_context` of which llama.cpp's copy callback reads, without an expert cache, the ids that it keeps; all
#: zero is a new one.
_CONTEXT_BYTES = 1 << 16
_VIEWS_AND_NONE = ("NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE")

#: The scheduler's private structs, as laid out from 0.20 to 0.27, then the functions called.
_DECLARATIONS = """
struct sched_split {
    int backend_id, i_start, i_end;
    struct ggml_tensor ** inputs;
    int n_inputs, inputs_capacity;
    struct ggml_cgraph graph;
};
struct vbuffer { void * chunks[16]; };
struct gallocr { void ** bufts; struct vbuffer ** buffers; };
struct sched {
    bool is_reset, is_alloc;
    int n_backends;
    void * backends[16];
    void * bufts[16];
    struct gallocr * galloc;
    struct ggml_hash_set hash_set;
    int * hv_tensor_backend_ids;
    struct ggml_tensor ** hv_tensor_copies;
    int * node_backend_ids, * leaf_backend_ids, * prev_node_backend_ids, * prev_leaf_backend_ids;
    struct ggml_cgraph graph;
    struct sched_split * splits;
    int n_splits, splits_capacity;
    int n_copies, cur_copy, next_copy;
    void * events[16][4];
    struct ggml_tensor ** graph_inputs;
    int n_graph_inputs, graph_inputs_capacity;
};
size_t ggml_graph_overhead_custom(size_t, bool);
struct ggml_cgraph * ggml_new_graph_custom(struct ggml_context *, size_t, bool);
size_t ggml_backend_buft_get_alloc_size(void *, const struct ggml_tensor *);
void * ggml_backend_buffer_get_base(void *);
size_t ggml_backend_buffer_get_size(void *);
int ggml_backend_tensor_alloc(void *, struct ggml_tensor *, void *);
int ggml_backend_view_init(struct ggml_tensor *);
void ggml_backend_tensor_set(struct ggml_tensor *, const void *, size_t, size_t);
struct sched * ggml_backend_sched_new(void **, void **, int, size_t, bool, bool);
bool ggml_backend_sched_reserve(struct sched *, struct ggml_cgraph *);
void ggml_backend_sched_reserve_size(struct sched *, struct ggml_cgraph *, size_t *);
void ggml_backend_sched_split_graph(struct sched *, struct ggml_cgraph *);
bool ggml_backend_sched_alloc_graph(struct sched *, struct ggml_cgraph *);
int ggml_backend_sched_graph_compute(struct sched *, struct ggml_cgraph *);
int ggml_backend_sched_graph_compute_async(struct sched *, struct ggml_cgraph *);
void ggml_backend_sched_synchronize(struct sched *);
void ggml_backend_sched_reset(struct sched *);
void ggml_backend_sched_set_tensor_backend(struct sched *, struct ggml_tensor *, void *);
size_t ggml_backend_sched_get_buffer_size(struct sched *, void *);
void ggml_backend_tensor_set_async(void *, struct ggml_tensor *, const void *, size_t, size_t);
void ggml_backend_tensor_get_async(void *, struct ggml_tensor *, void *, size_t, size_t);
void ggml_backend_synchronize(void *);
void ggml_abort(const char *, int, const char *, ...);

struct mock_buft {
    char name[64];
    int index, is_host;
    size_t alignment, max_size, quant_row, extra, round_to, alloc_limit;
    int has_cpy;
    uint64_t cpy_from;
};
struct mock_backend {
    char name[64];
    int index, type, buft;
    uint64_t bufts;
    uint8_t op_ok[256], op_wanted[256];
    int64_t op_min_batch[256];
    uint8_t src0_type_bad[64];
    int64_t offload_min_batch;
    int has_offload, has_sync, has_set, has_get, has_cpy, has_events, has_optimize;
    uint64_t cpy_from;
    char fail_node[64];
    int fail_status, fail_times, n_order;
    char * order;
    int n_keep;
    char * keep;
    int n_events;
    void * own[64];
};
const char * mock_log_text(void);
size_t mock_log_len(void);
void mock_log_clear(void);
void mock_silence(void);
void mock_op(int, const char *);
void * mock_realloc_callback(void);
void ggml_backend_sched_set_copy_callback(struct sched *, void *, void *);
void ggml_backend_sched_set_realloc_callback(struct sched *, void *, void *);
void * mock_buft_new(struct mock_buft *);
void * mock_static_buffer(void *, const char *, size_t, int);
size_t mock_backend_size(void);
void * mock_backend_new(struct mock_backend *, void **);
void mock_results_clear(void);
void mock_result(const struct ggml_tensor *, const void *, size_t);
void mock_eval_callback(struct sched *, const char *, int, const char *);
"""
#: What the child's library is asked for beside what is declared here.
FUNCTIONS: tuple[str, ...] = ()


def prepare(library: Library) -> None:
    """Declare once, before the child forks, as reading declarations takes long."""
    library.ffi.cdef(_DECLARATIONS)


def _ops(library: Library) -> dict[str, int]:
    """Numbers of the ops by name."""
    names = {}
    for i in range(256):
        name = library.text(library.base.ggml_op_name(i))
        names[name] = i
        if name == "GLU":  # the last
            return names
    raise RuntimeError("the library has no GLU op: another version")


def _names64(names: Sequence[str]) -> bytes:
    return b"".join(name.encode().ljust(64, b"\0") for name in names)


def _payload(step: Json) -> bytes:
    """Bytes of a `set_data` or `node_data` step."""
    values = step.get("i32")
    if values is None:
        n = step["rows"]["ncols"]
        values = [x for row in step["rows"]["data"] for x in [*row, *[0] * (n - len(row))]]
    return struct.pack(f"<{len(values)}i", *values)


class CopyExperts:
    """llama.cpp's copy callback once more, for a ggml that comes without llama.cpp.

    Notes
    -----
    Mirrors `llama_context::sched_copy_experts` without an expert cache.
    """

    def __init__(self, run: LiveRun) -> None:
        self.run = run
        self.read: tuple[Any, int, set[int]] | None = None  # ids (cffi), number of experts, experts that are used
        kind = "bool(void *, struct ggml_tensor *, struct ggml_tensor *, struct ggml_cgraph *, void *)"
        made = run.ffi.callback(kind, self._copy)
        self._made = made  # must outlive the scheduler
        self.callback = run.ffi.cast("void *", made)

    def _copy(self, backend: Any, src: Any, dst: Any, graph: Any, _: Any) -> bool:  # cffi
        run, base, ffi = self.run, self.run.base, self.run.ffi
        node = graph.nodes[0] if graph.n_nodes else None
        if node is None or node.op != run.ops["MUL_MAT_ID"] or node.src[0] != dst:
            return False
        ids, n_expert, size = node.src[2], src.ne[2], src.nb[2]
        if 0 in list(ids.ne):
            return True
        if self.read is None or self.read[:2] != (ids, n_expert):
            self.read = None
            words = ffi.new("int32_t[]", base.ggml_nbytes(ids) // 4)
            base.ggml_backend_tensor_get_async(backend, ids, words, 0, base.ggml_nbytes(ids))
            base.ggml_backend_synchronize(backend)
            steps = [[i1 * ids.nb[1] // 4 + i0 * ids.nb[0] // 4 for i0 in range(ids.ne[0])] for i1 in range(ids.ne[1])]
            used = {words[k] for row in steps for k in row}
            if min(used) < 0 or max(used) >= n_expert:
                base.ggml_abort(b"llama-context.cpp", 0, b"%s", ffi.new("char[]", b"id >= 0 && id < n_expert"))
            self.read = (ids, n_expert, used)
        for r in expert_copy_ranges(self.read[2], n_expert, size):
            source = ffi.cast("char *", src.data) + r.offset_bytes
            base.ggml_backend_tensor_set_async(backend, dst, source, r.offset_bytes, r.size_bytes)
        return True


class Instance:
    """A graph as built last."""

    def __init__(self, graph: Any, tensors: dict[str, Any], sources: dict[str, list[str | None]]) -> None:
        self.graph = graph  # cffi
        self.tensors = tensors
        self.sources = sources
        self.flags: dict[str, int] = {}


class LiveRun:
    """One case in the library, in a process that nothing else will use.

    Attributes are cffi handles where their names are the library's.
    """

    def __init__(self, library: Library, case: Json, mock_path: str) -> None:
        self.library, self.ffi, self.base, self.case = library, library.ffi, library.base, case
        self.mock = self.ffi.dlopen(mock_path, self.ffi.RTLD_NOW)
        self.mock.mock_silence()
        self.ops = _ops(library)
        for name, number in self.ops.items():
            self.mock.mock_op(number, name.encode())
        self.static: dict[str, Any] = {}
        self.static_buffers: dict[int, str] = {}
        self.instances: dict[str, Instance] = {}
        self.results: dict[tuple[str, str], bytes] = {}
        self.sched: Any = None  # cffi
        self._llama: Any = None  # cffi
        self._copier: CopyExperts | None = None
        self._keep: list[Any] = []  # cffi memory that must outlive this call
        self.buft_ids = {b["name"]: i for i, b in enumerate(case["buffer_types"])}
        self.bufts = self._hold(
            self.ffi.new("void *[]", [self._make_buft(i, b) for i, b in enumerate(case["buffer_types"])])
        )
        self.backends = [self._make_backend(i, b) for i, b in enumerate(case["backends"])]
        self._make_static()

    def _hold(self, memory: Any) -> Any:  # cffi
        self._keep.append(memory)
        return memory

    def _hold_names(self, names: Sequence[str]) -> Any:  # cffi
        return self.ffi.cast("char *", self._hold(self.ffi.from_buffer(bytearray(_names64(names) or b"\0"))))

    # -- what the case describes ----------------------------------------------------

    def _mask(self, names: Sequence[str] | None) -> int:
        return sum(1 << self.buft_ids[name] for name in names or ())

    def _make_buft(self, i: int, b: Json) -> Any:  # cffi
        pad = b.get("alloc_pad") or {}
        spec = {
            "name": b["name"].encode(),
            "index": i,
            "is_host": bool(b.get("host")),
            "alignment": b.get("alignment", 64),
            "max_size": b.get("max_size") or 0,
            "quant_row": pad.get("quant_row", 0),
            "extra": pad.get("extra", 0),
            "round_to": pad.get("round_to", 0),
            "alloc_limit": b.get("alloc_limit") or 0,
            "has_cpy": b.get("cpy_from") is not None,
            "cpy_from": self._mask(b.get("cpy_from")),
        }
        return self.mock.mock_buft_new(self._hold(self.ffi.new("struct mock_buft *", spec)))

    def _make_backend(self, i: int, b: Json) -> Any:  # cffi
        caps, wish, fail = b.get("caps", {}), b.get("offload"), b.get("fail_compute")
        optimize = b.get("optimize")
        order, kept = (optimize or {}).get("order", ()), (optimize or {}).get("keep", ())
        spec = self._hold(self.ffi.new("struct mock_backend *"))
        assert self.ffi.sizeof("struct mock_backend") >= self.mock.mock_backend_size()
        spec.name, spec.index, spec.type = b["name"].encode(), i, _DEVICES[b["device"]]
        spec.buft, spec.bufts = self.buft_ids[b["buft"]], self._mask(b["bufts"])
        spec.has_sync = caps.get("synchronize", True)
        spec.has_set, spec.has_get = caps.get("set_async", False), caps.get("get_async", False)
        spec.has_events = caps.get("events", False)
        spec.has_cpy, spec.cpy_from = caps.get("cpy_async_from") is not None, self._mask(caps.get("cpy_async_from"))
        spec.has_optimize = optimize is not None
        spec.n_order, spec.order = len(order), self._hold_names(order)
        spec.n_keep, spec.keep = len(kept), self._hold_names([name for pair in kept for name in pair])
        if wish is not None:
            spec.has_offload, spec.offload_min_batch = 1, wish["min_batch"]
        if fail:
            spec.fail_node, spec.fail_status = fail["node"].encode(), fail.get("status", -1)
            spec.fail_times = fail.get("times", -1)
        ops = {} if b.get("ops", "all") == "all" else b["ops"]
        for name, k in self.ops.items():
            allowed = (
                name in ops["allow"] or name in _VIEWS_AND_NONE if "allow" in ops else name not in ops.get("deny", ())
            )
            spec.op_ok[k] = allowed
            spec.op_min_batch[k] = ops.get("min_batch", {}).get(name, 0)
            spec.op_wanted[k] = wish is not None and (wish["ops"] == "all" or name in wish["ops"])
        for name in ops.get("deny_src0_types", ()):
            spec.src0_type_bad[self.library.type_of[name]] = 1
        return self.mock.mock_backend_new(spec, self.bufts)

    def _new_tensor(self, context: Any, spec: Json, table: dict[str, Any]) -> None:  # cffi
        def find(name: str) -> Any:  # cffi
            return table[name] if name in table else self.static[name]

        ffi = self.ffi
        ne = [*spec["ne"], *[1] * (4 - len(spec["ne"]))]
        t = self.base.ggml_new_tensor_4d(context, self.library.type_of[spec["type"]], *ne)
        t.name, t.op = spec["id"].encode(), self.ops[spec.get("op", "NONE")]
        for k, word in enumerate(spec.get("op_params", ())):
            t.op_params[k] = word
        for k, name in enumerate(spec.get("src", ())):
            if name is not None:
                t.src[k] = find(name)
        for k, stride in enumerate(spec.get("nb", ())):
            t.nb[k] = stride
        for flag in spec.get("flags", ()):
            t.flags |= _FLAGS[flag]
        if "view" in spec:
            root, offs = find(spec["view"]["src"]), spec["view"].get("offs", 0)
            t.view_src, t.view_offs = root, offs
            if root.data != ffi.NULL:
                t.data = ffi.cast("char *", root.data) + offs
        table[spec["id"]] = t

    def _context(self, n_tensors: int, graph_size: int) -> Any:  # cffi
        return self.library.new_context(
            (n_tensors + 8) * 512 + self.base.ggml_graph_overhead_custom(graph_size, False) + 4096
        )

    def _make_static(self) -> None:
        base, ffi = self.base, self.ffi
        context = self._context(len(self.case.get("tensors", ())), 1)
        for spec in self.case.get("tensors", ()):
            self._new_tensor(context, spec, self.static)
        for b in self.case.get("buffers", ()):
            i = self.buft_ids[b["buft"]]
            alignment = self.case["buffer_types"][i].get("alignment", 64)
            offset, places = 0, []
            for name in b["tensors"]:
                t = self.static[name]
                places.append((t, offset))
                if t.view_src == ffi.NULL:
                    offset += -(-base.ggml_backend_buft_get_alloc_size(self.bufts[i], t) // alignment) * alignment
            usage = _USAGES[b.get("usage", "any")]
            buffer = self.mock.mock_static_buffer(self.bufts[i], b["id"].encode(), offset, usage)
            self.static_buffers[int(ffi.cast("uintptr_t", buffer))] = b["id"]
            start = ffi.cast("char *", base.ggml_backend_buffer_get_base(buffer))
            for t, at in places:
                if t.view_src == ffi.NULL:
                    base.ggml_backend_tensor_alloc(buffer, t, start + at)
                else:
                    base.ggml_backend_view_init(t)

    # -- steps ------------------------------------------------------------------------

    def new_sched(self) -> Json:
        """Make the scheduler."""
        sched, n = self.case["sched"], len(self.backends)
        backends = self._hold(self.ffi.new("void *[]", self.backends))
        bufts = self.ffi.NULL
        if sched.get("bufts"):
            chosen = [self.bufts[self.buft_ids[name]] for name in sched["bufts"]]
            bufts = self._hold(self.ffi.new("void *[]", chosen))
        parallel, op_offload = sched.get("parallel", False), sched.get("op_offload", False)
        self.sched = self.base.ggml_backend_sched_new(backends, bufts, n, sched["graph_size"], parallel, op_offload)
        self._set_hooks()
        return {}

    def _set_hooks(self) -> None:
        """Set llama.cpp's own copy callback, as llama.cpp does, and one that notes reallocations, where there are such."""
        library, ffi = self.library, self.ffi
        if library.dialect.expert_copy == "callback":
            set_callback = library.function("ggml_backend_sched_set_copy_callback")
            if library.exports(COPY_EXPERTS):
                self._llama = self._hold(ffi.new("char[]", _CONTEXT_BYTES))
                set_callback(self.sched, ffi.cast("void *", library.address(COPY_EXPERTS)), self._llama)
            else:  # a ggml without llama.cpp
                self._copier = CopyExperts(self)
                set_callback(self.sched, self._copier.callback, ffi.NULL)
        if library.dialect.realloc_callback:
            noting = self.mock.mock_realloc_callback()
            library.function("ggml_backend_sched_set_realloc_callback")(self.sched, noting, ffi.NULL)

    def build(self, name: str) -> Json:
        """Make tensors and graph anew."""
        spec = self.case["graphs"][name]
        size = spec.get("size") or max(2 * len(spec["tensors"]), 16) + len(self.static)
        context = self._context(len(spec["tensors"]), size)
        tensors: dict[str, Any] = {}
        for tensor in spec["tensors"]:
            self._new_tensor(context, tensor, tensors)
        graph = self.base.ggml_new_graph_custom(context, size, False)
        for result in spec["expand"]:
            self.base.ggml_build_forward_expand(graph, tensors.get(result) or self.static[result])
        sources = {t["id"]: t.get("src", []) for t in [*self.case.get("tensors", ()), *spec["tensors"]]}
        made = self.instances[name] = Instance(graph, tensors, sources)
        made.flags = {key: t.flags & 15 for key, t in (self.static | tensors).items()}
        self._bind_results()
        nodes = [self.name(graph.nodes[k]) for k in range(graph.n_nodes)]
        return {"nodes": nodes, "leafs": [self.name(graph.leafs[k]) for k in range(graph.n_leafs)]}

    def name(self, tensor: Any) -> str:  # cffi
        """Return a tensor's name."""
        return self.library.text(tensor.name)

    def _bind_results(self) -> None:
        self.mock.mock_results_clear()
        for (graph, name), data in self.results.items():
            if graph in self.instances:
                self.mock.mock_result(self.instances[graph].tensors[name], data, len(data))

    def _tensor(self, step: Json) -> Any:  # cffi
        made = self.instances.get(step.get("graph") or "")
        return (made.tensors.get(step["tensor"]) if made else None) or self.static[step["tensor"]]

    def step(self, step: Json) -> Json:
        """Make a step and return what it adds to the trace."""
        op, base, sched = step["op"], self.base, self.sched
        if op == "sched_new":
            return self.new_sched()
        if op == "build":
            return self.build(step["graph"])
        if op == "pin":
            base.ggml_backend_sched_set_tensor_backend(sched, self._tensor(step), self.backends[step["backend"]])
        elif op == "set_data":
            data = _payload(step)
            base.ggml_backend_tensor_set(self._tensor(step), data, 0, len(data))
        elif op == "node_data":
            self.results[step["graph"], step["tensor"]] = _payload(step)
            self._bind_results()
        elif op == "eval_callback":
            need = step.get("need")
            n, stop = -1 if need is None else len(need), (step.get("stop") or "").encode()
            self.mock.mock_eval_callback(sched, _names64(need or ()), n, stop)
        elif op == "reset":
            base.ggml_backend_sched_reset(sched)
        elif op == "synchronize":
            base.ggml_backend_sched_synchronize(sched)
            return {"next_copy": sched.next_copy}
        else:
            return self._use(op, step, self.instances[step["graph"]])
        return {}

    def _use(self, op: str, step: Json, made: Instance) -> Json:
        """Make a step that gives the scheduler a graph."""
        base, sched, graph = self.base, self.sched, made.graph
        if op == "reserve":
            done = base.ggml_backend_sched_reserve(sched, graph)
            return {"result": bool(done), "state": read_state(self, made, is_allocated=False, is_assigned=not done)}
        if op == "reserve_size":
            sizes = self.ffi.new("size_t[16]")
            base.ggml_backend_sched_reserve_size(sched, graph, sizes)
            return {"sizes": list(sizes)[: len(self.backends)]}
        if op == "split":
            base.ggml_backend_sched_split_graph(sched, graph)
            return {"state": read_state(self, made, is_allocated=False, is_assigned=True)}
        if op == "alloc_graph":
            done = base.ggml_backend_sched_alloc_graph(sched, graph)
            return {"result": bool(done), "state": read_state(self, made, is_allocated=done, is_assigned=True)}
        assert op == "compute", op
        was_allocated = sched.is_alloc
        if self._copier is not None:
            self._copier.read = None
        if self._llama is not None:
            self.ffi.memmove(self._llama, bytes(_CONTEXT_BYTES), _CONTEXT_BYTES)  # as llama.cpp does before it computes
        if step.get("async"):
            status = base.ggml_backend_sched_graph_compute_async(sched, graph)
        else:
            status = base.ggml_backend_sched_graph_compute(sched, graph)
        if was_allocated or not sched.is_alloc:
            return {"result": int(status)}
        return {"result": int(status), "state": read_state(self, made, is_allocated=True, is_assigned=True)}

    def take_calls(self) -> list[Any]:
        """Return the calls since the last time; JSON values."""
        text = (
            self.ffi.buffer(self.mock.mock_log_text(), self.mock.mock_log_len())[:] if self.mock.mock_log_len() else b""
        )
        self.mock.mock_log_clear()
        return [json.loads(line) for line in text.decode().splitlines()]


def _trace(library: Library, request: Message) -> Message:
    """Run a case; each step's record is in the file before the next step begins."""
    case: Json = request["case"]
    run = LiveRun(library, case, request["mock"])
    with open(request["out"], "a") as out:
        for step in [{"op": "sched_new"}, *case["steps"]]:
            record: Json = {"op": step["op"], **({"graph": step["graph"]} if "graph" in step else {})}
            run.mock.mock_log_clear()
            record = {**record, **run.step(step)}
            calls = run.take_calls()
            record["calls"] = [call for call in calls if call[0] != "realloc"]
            reallocs = [call[1:] for call in calls if call[0] == "realloc"]
            if reallocs:
                record["reallocs"] = reallocs  # of graph_alloc: ids changed, size changed; no part of a trace
            out.write(json.dumps(record) + "\n")
            out.flush()
    return {"done": True}


def _about(library: Library, request: Message) -> Message:
    """Return which library this is."""
    return {"dialect": asdict(library.dialect), "version": library.version, "api": library.api}


#: What `oracle.child` serves.
HANDLERS = {"trace": _trace, "about": _about}
