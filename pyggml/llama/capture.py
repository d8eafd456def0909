"""Opens a model's header and a context in llama.cpp, and captures the graphs; in the child.

Requests and answers are plain data that JSON can hold.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..backends.libggml.library import Handle
from .capturing import CapturingCPU, CapturingDevice, Watcher
from .library import LlamaLibrary, reason_of
from .params import context_params, model_params

__all__ = ["Capture", "CaptureFailed", "Host"]

Message = dict[str, Any]  # what goes through JSON
_T = TypeVar("_T")

#: Upstream's `GGML_BACKEND_BUFFER_USAGE_COMPUTE`.
_COMPUTE_USAGE = 2
#: Address of weights and caches without memory during a simulated decode.
_NOWHERE = 1 << 45
_PAGE = 4096

_LAYER = re.compile(r"layer\s+(\d+) assigned to device (\S+?),")
_LOADING = re.compile(r"loading tensor (\S+)")
_MOVED = re.compile(r"buffer type overridden to (\S+)")
_UNUSED = re.compile(r"model has unused tensor (\S+)")
_FUSED = re.compile(r"resolve_fused_ops: (.+?) (enabled|not supported, set to disabled)")
_PINNED = re.compile(rb"(?:norm|l_last)-(\d+)")
_RESERVING = re.compile(r"reserving a graph for ubatch with n_tokens = *(\d+), n_seqs = *(\d+), n_outputs = *(\d+)")

#: `TENSOR_STRUCT` up to its name.
_STRUCT = struct.Struct("@iP4q4Ni16ii10PPNP64s")

Size = tuple[int, int, int]  # tokens, sequences, outputs


class CaptureFailed(Exception):
    """Raised if llama.cpp refuses, with its own text."""


class Host:
    """llama.cpp in this process, and the devices registered so far."""

    def __init__(self, path: Path) -> None:
        self.library = LlamaLibrary(path)
        self.devices: dict[str, CapturingDevice] = {}
        self._nobody = Watcher()
        self.cpu = CapturingCPU(self.library, self._nobody)

    def device(self, about: Message, watcher: Watcher) -> CapturingDevice:
        """Return the device with a name; it is registered once."""
        name = about["name"]
        made = self.devices.get(name)
        if made is None:
            made = self.devices[name] = CapturingDevice(
                self.library, name, free=about["free"], total=about["total"], min_batch=about["min_batch"],
                row_padding=about["row_padding"], watcher=watcher,
            )  # fmt: skip
        made.free, made.total, made.min_batch = about["free"], about["total"], about["min_batch"]
        made.row_padding, made.pinned = about["row_padding"], about["pinned"]
        made.watcher = watcher
        return made

    def leave(self) -> None:
        """Stop calls to a closed capture."""
        self.cpu.watcher = self._nobody
        self.library.on_line = lambda line: None


class Capture(Watcher):
    """A model and a context in llama.cpp.

    Parameters
    ----------
    host : Host
        llama.cpp in this process; it has one capture at a time.
    request : dict
        ``model``, ``placement`` and ``context``, as `pyggml.llama.source` writes them.

    Raises
    ------
    CaptureFailed
        llama.cpp refuses the model or the flags.
    """

    def __init__(self, host: Host, request: Message) -> None:
        self.host, self.library = host, host.library
        self.ffi, self.lib = host.library.ffi, host.library.lib
        self.is_relaxed, self.has_sizes, self.has_memory = False, True, True
        self._is_ready = False
        self.lines: list[str] = []
        self.fused: list[list[str]] = []
        self.weights: list[Message] = []
        self.layers: dict[int, str] = {}
        self._asked: dict[int, int] = {}
        self._pins = self._asked
        self._end = 0
        self._keeps = False
        self._computed: list[Handle] = []
        self._leafs: list[Handle] = []
        self._reserving: Size | None = None
        self._reserved: dict[Size, Message] = {}
        self._names: dict[tuple[str, int], str] = {}
        self._next = _NOWHERE
        self.error: BaseException | None = None
        self._model = self._ctx = self.ffi.NULL
        host.cpu.watcher = self
        self.library.on_line = self._take_line
        try:
            self._load(request["model"], request["placement"])
            self._make_context(request["context"])
        except BaseException:
            self.close()
            raise

    # -- what llama.cpp tells ------------------------------------------------

    def _take_line(self, line: str) -> None:
        self.lines.append(line)
        if found := _FUSED.search(line):
            self.fused.append([found[1], found[2]])
        if self._ctx != self.ffi.NULL:
            if found := _RESERVING.search(line):
                n, n_seqs, n_outputs = map(int, found.groups())
                self._reserving = (-(-n // n_seqs) * n_seqs, n_seqs, n_outputs)
                self._asked = {}
            return
        if found := _LAYER.search(line):
            self.layers[int(found[1])] = found[2]
        elif found := _LOADING.search(line):
            self.weights.append({"name": found[1], "op": None, "buft": None, "moved": False})
        elif self.weights and (found := _MOVED.search(line)):
            self.weights[-1] |= {"buft": found[1], "moved": True}
        elif self.weights and _UNUSED.search(line):
            self.weights.pop()

    def asked(self, tensor: Handle, answer: bool) -> None:
        """Record the op and place of a weight that is being loaded, or a norm that may be pinned.

        The loader asks about an op whose only named source is the weight; the first device that supports it gets the
        weight. While llama.cpp builds a graph, it asks a norm's device when the norm has its name.
        """
        if self._model == self.ffi.NULL:
            if not self.weights or not answer:
                return
            weight = self.weights[-1]
            for source in tensor.src:
                if source != self.ffi.NULL and self.library.text(source.name) == weight["name"]:
                    weight["op"] = self._text("op", tensor.op)
                    if not weight["moved"] and source.buffer != self.ffi.NULL:
                        weight["buft"] = self._buft_of(source)
            return
        if tensor.name[0] in b"nl" and (found := _PINNED.fullmatch(self.ffi.string(tensor.name))):
            self._asked[self.library.address(tensor)] = int(found[1])

    def split(self, graph: Handle) -> None:
        """Give weights and caches addresses before a decode needs them, and keep the pins and graphs of `_own_graphs`."""
        if self._ctx == self.ffi.NULL:
            return
        is_next = self.library.address(graph.nodes) == self._end
        self._end = self.library.address(graph.nodes + graph.n_nodes)
        if not self.library.has_heads:
            self._place_nowhere(self._nodes_of(graph))
        if is_next:
            return
        self._pins, self._asked = self._asked, {}
        head = self.library.head_of(graph)
        self._place_nowhere(self._leafs_of(head))
        if self._keeps and self._reserving is not None and head != self.ffi.NULL:
            self._reserved[self._reserving] = self._read(self._nodes_of(head), self._leafs_of(head))
        elif self._reserving is None:
            self.has_sizes = True
        self._reserving = None

    def computed(self, graph: Handle) -> None:
        """Record the nodes of a split, in order, and the leafs of the graph that it is the first of."""
        if not self._computed:
            self._leafs = self._leafs_of(self.library.head_of(graph))
        self._computed += self._nodes_of(graph)

    def _nodes_of(self, graph: Handle) -> list[Handle]:
        return [self.lib.ggml_graph_node(graph, i) for i in range(self.lib.ggml_graph_n_nodes(graph))]

    def failed(self, error: BaseException) -> None:
        """Record an exception of the two above, which becomes the answer."""
        self.error = self.error or error

    def _buft_of(self, t: Handle) -> str:
        return self.library.text(self.lib.ggml_backend_buft_name(self.lib.ggml_backend_buffer_get_type(t.buffer)))

    def _text(self, kind: str, number: int) -> str:
        known = self._names.get((kind, number))
        if known is None:
            function = self.lib.ggml_op_name if kind == "op" else self.lib.ggml_type_name
            known = self._names[kind, number] = self.library.text(function(number))
        return known

    def _failure(self, what: str) -> CaptureFailed:
        return CaptureFailed(f"{what}: {reason_of(self.lines, self.library.warning) or 'no reason was given'}")

    # -- making --------------------------------------------------------------

    def _load(self, path: str, placement: Message) -> None:
        ffi, lib = self.ffi, self.lib
        devices = [self.host.device(about, self) for about in placement["devices"]]
        by_name = {d.name: d.buft for d in devices} | {"CPU": lib.ggml_backend_cpu_buffer_type()}
        self.has_devices = bool(devices)
        p, kept = model_params(self.library, placement, [d.handle for d in devices], by_name)
        p.no_alloc, p.load_mode = True, 0
        self._kept = kept
        self._model = lib.llama_model_load_from_file(path.encode(), p)
        if self._model == ffi.NULL:
            raise self._failure("llama.cpp does not load the model")

    def _make_context(self, context: Message) -> None:
        lib = self.lib
        p = context_params(self.library, context)
        for name, free in context[
            "moe_cache_free"
        ].items():  # weights have no memory here, so that llama.cpp cannot tell
            self.host.devices[name].free = free
        del self.lines[:]
        self.library.warning = ""
        made = lib.llama_init_from_model(self._model, p)
        if made == self.ffi.NULL:
            raise self._failure("llama.cpp does not make a context")
        self._ctx = made
        #: Parts of the KV cache; a graph that sees all of them has as many tokens for each.
        self._n_stream = 1 if context["kv_unified"] else lib.llama_n_seq_max(made)

    def facts(self) -> Message:
        """Return what a plan needs in addition to graphs."""
        lib = self.lib
        return {
            "build": {
                "llama": self.library.build,
                "ggml": self.library.version,
                "path": str(self.library.path),
            },
            "reserves": self.library.reserves,
            "n_vocab": lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model)),
            "n_ctx": lib.llama_n_ctx(self._ctx),
            "n_batch": lib.llama_n_batch(self._ctx),
            "n_ubatch": lib.llama_n_ubatch(self._ctx),
            "n_seq_max": lib.llama_n_seq_max(self._ctx),
            "layers": [self.layers[i] for i in sorted(self.layers)],
            "weights": self.weights,
            "fused": self.fused,
        }

    # -- graphs --------------------------------------------------------------

    def _relax(self) -> None:
        self.is_relaxed = self.has_devices

    def _reserve(self, n_tokens: int, n_seqs: int, n_outputs: int) -> Handle:
        self._clear()  # what earlier decodes left in the cache changes a few graphs
        del self.lines[:]
        graph = self.library.reserve(self._ctx, n_tokens, n_seqs, n_outputs)
        if graph == self.ffi.NULL:
            raise self._failure(f"llama.cpp makes no graph of {n_tokens} tokens")
        return graph

    def reserve(self, n_tokens: int, n_seqs: int, n_outputs: int) -> Message:
        """Return the graph for reserving memory, over the whole cache."""
        self._relax()
        if not self.library.reserves:
            return self._own((n_tokens, n_seqs, n_outputs), self._own_graphs())
        graph = self._reserve(n_tokens, n_seqs, n_outputs)
        return self._read(self._nodes_of(graph), self._leafs_of(self.ffi.cast("struct cgraph_head *", graph)))

    def printed(self, n_tokens: int, n_seqs: int, n_outputs: int) -> list[str]:
        """Return what llama.cpp's scheduler prints of that graph; requires ``GGML_SCHED_DEBUG=2``."""
        if self.library.reserves:
            self.is_relaxed = False
            self._reserve(n_tokens, n_seqs, n_outputs)
            text = "".join(self.lines)
        else:
            self.is_relaxed = False
            text = self._own((n_tokens, n_seqs, n_outputs), self._own_texts())
        return [line for line in text.split("\n") if line.startswith(("## SPLIT", "node #"))]

    # -- without llama_graph_reserve: what llama.cpp itself reserves before a decode -----------------------------------

    def _own_graphs(self) -> dict[Size, Message]:
        self._relax()
        if not self._reserved:
            self._keeps = True
            self._reserve_anew()
            self._keeps = False
        return self._reserved

    def _own_texts(self) -> dict[Size, str]:
        texts: dict[Size, str] = {}
        self._reserve_anew()
        for part in "".join(self.lines).split("reserving a graph for ubatch")[1:]:
            if found := _RESERVING.search("reserving a graph for ubatch" + part):
                n, n_seqs, n_outputs = map(int, found.groups())
                texts[-(-n // n_seqs) * n_seqs, n_seqs, n_outputs] = part.partition("sched_reserve:")[0]
        return texts

    def _reserve_anew(self) -> None:
        """Let llama.cpp reserve again, by a decode that then fails for want of memory."""
        self._is_ready = self.has_memory = False
        self._clear()
        self._go_through(1, 0, 1)
        self._is_ready, self.has_memory = False, True

    def _own(self, size: Size, found: Mapping[Size, _T]) -> _T:
        if size not in found:
            known = [f"{n} tokens ({n_outputs} outputs)" for n, _, n_outputs in found]
            raise CaptureFailed(
                "this build of llama.cpp does not export llama_graph_reserve: of graphs over a whole cache it gives "
                f"{'those of ' + ' and '.join(known) if known else 'none'}, not one of {size[0]} tokens ({size[2]} outputs)"
            )
        return found[size]

    def decode(self, n_tokens: int, outputs: str, *, depth: int = 0, is_full: bool = False) -> Message:
        """Simulate a decode with ``depth`` tokens in the cache, and return the graph of each micro-batch.

        If llama.cpp fails on it, or with ``is_full``, the graphs are those of `reserve`.
        """
        self._relax()
        n_batch, n_ubatch = self.lib.llama_n_batch(self._ctx), self.lib.llama_n_ubatch(self._ctx)
        parts: list[Message] = []
        graphs: list[Message] = []
        self._clear()
        for first in () if is_full else range(0, depth, n_ubatch):
            self._go_through(min(n_ubatch, depth - first), first, 0)
        starts = [
            i for batch in range(0, n_tokens, n_batch) for i in range(batch, min(batch + n_batch, n_tokens), n_ubatch)
        ]
        for first, after in zip(starts, [*starts[1:], n_tokens], strict=True):
            n = after - first
            n_outputs = n if outputs == "all" else int(first + n == n_tokens)
            if not is_full and self._go_through(n, depth + first, n_outputs):
                graph = self._read(self._computed, self._leafs)
            else:
                is_full = True
                if n % self._n_stream:
                    raise CaptureFailed(
                        f"a graph over the caches of {self._n_stream} sequences has as many tokens of each, "
                        f"and {n} cannot be divided among them; plan with -np 1, or with --kv-unified"
                    )
                graph = self.reserve(n, 1, max(n_outputs, 1))
            if not graphs or graphs[-1] != graph:
                graphs.append(graph)
            parts.append({"n_tokens": n, "n_outputs": n_outputs, "graph": len(graphs) - 1})
        return {"parts": parts, "graphs": graphs, "is_full": is_full}

    def _clear(self) -> None:
        memory = self.lib.llama_get_memory(self._ctx)
        if memory != self.ffi.NULL:
            self.lib.llama_memory_clear(memory, False)

    def _go_through(self, n: int, first: int, n_outputs: int) -> bool:
        """Let llama.cpp decode tokens from a position on; return whether it succeeded and its nodes were seen."""
        lib = self.lib
        if not self._is_ready:
            # another control vector, even none, makes the decode reserve again, and this time without sizes
            lib.llama_set_adapter_cvec(self._ctx, self.ffi.NULL, 0, 0, 0, 0)
            self.has_sizes, self._is_ready = False, True
        self._computed.clear()
        del self.lines[:]
        status = self.library.decode(self._ctx, [0] * n, first, n_outputs)
        return not status and bool(self._computed)

    def _leafs_of(self, head: Handle) -> list[Handle]:
        """Return the leafs in upstream's order, from the head of the struct if it agrees with public functions."""
        if head == self.ffi.NULL or not self.library.has_heads:
            return []
        n = self.lib.ggml_graph_n_nodes(head)
        ends = (0, n - 1) if n else ()
        if head.n_nodes != n or any(head.nodes[i] != self.lib.ggml_graph_node(head, i) for i in ends):
            return []
        if not 0 <= head.n_leafs <= head.size:
            return []
        leafs = [head.leafs[i] for i in range(head.n_leafs)]
        return leafs if all(t.op == 0 for t in leafs) else []

    def _place_nowhere(self, todo: list[Handle]) -> None:
        """Give weights and caches, whose buffers have no bytes, addresses that no process uses: some tensors and their sources."""
        null, done = self.ffi.NULL, set()
        while todo:
            t = todo.pop()
            key = self.library.address(t)
            if key in done:
                continue
            done.add(key)
            todo += [s for s in (*t.src, t.view_src) if s != null]
            if t.op == 0 and t.view_src == null and t.buffer != null and t.data == null:
                t.data = self.ffi.cast("void *", self._next)
                self._next += -(-self.lib.ggml_nbytes(t) // _PAGE) * _PAGE
                self.host.cpu.fill(t.buffer)

    def _read(self, nodes: list[Handle], leafs: list[Handle]) -> Message:
        """Return nodes in order, then leafs, then other reachable tensors, which refer to each other by index.

        A tensor is what `CapturedTensor` takes.
        """
        ffi, lib = self.ffi, self.lib
        address = self.library.address
        todo = [*nodes, *leafs]
        index = {address(t): i for i, t in enumerate(todo)}

        def place_of(key: int) -> int:
            if key not in index:
                index[key] = len(todo)
                todo.append(ffi.cast("struct ggml_tensor *", key))
            return index[key]

        tensors: list[tuple[object, ...]] = []
        for t in todo:  # grows while it is read
            fields = _STRUCT.unpack_from(ffi.buffer(t))
            (type, buffer), ne, nb, n_op, params = fields[:2], fields[2:6], fields[6:10], fields[10], fields[11:27]
            flags, sources, view, offs, name = fields[27], fields[28:38], fields[38], fields[39], fields[41]
            where = None
            if buffer and not n_op and not view:
                usage = lib.ggml_backend_buffer_get_usage(t.buffer)
                if usage != _COMPUTE_USAGE:
                    where = (self._buft_of(t), usage)
            op = self._text("op", n_op)
            tensors.append((
                op, name.partition(b"\0")[0].decode("utf-8", "replace"), self._text("type", type), ne, nb,
                _without_end([place_of(key) if key else None for key in sources], None), _without_end(params, 0), flags,
                place_of(view) if view else None, offs, where,
                self.library.text(lib.ggml_op_desc(t)) if op in ("UNARY", "GLU") else op,
            ))  # fmt: skip
        n = len(nodes)
        return {
            "n_nodes": n,
            "tensors": tensors,
            "leafs": [index[address(t)] for t in leafs],
            "cpu_lacks": [i for i, t in enumerate(nodes) if not self.host.cpu.supports(t)],
            "pins": [[i, layer] for key, layer in self._pins.items() if (i := index.get(key, n)) < n],
        }

    def close(self) -> None:
        """Free the context and the model."""
        self.is_relaxed, self.has_sizes, self.has_memory = False, True, True
        if self._ctx != self.ffi.NULL:
            self.lib.llama_free(self._ctx)
        if self._model != self.ffi.NULL:
            self.lib.llama_model_free(self._model)
        self._ctx = self._model = self.ffi.NULL
        self.host.leave()


def _without_end(values: Sequence[_T], end: _T) -> Sequence[_T]:
    """Return values without equal ones at the end."""
    n = len(values)
    while n and values[n - 1] == end:
        n -= 1
    return values[:n]
