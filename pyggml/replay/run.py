"""Runs a scheduler case in `Scheduler` on mock backends, and returns the trace of what it does.

The scheduler has no repairs, because every decision and call is compared with upstream's. If upstream would abort, the
step records pyggml's error, and later steps are still made.
"""

from __future__ import annotations

import ctypes
import gzip
import json
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..backends.mock import MockBufferType, MockDevice, MockMemory, short_name
from ..buffer import Buffer, tensor_alloc, tensor_set, view_init
from ..dialect import DEFAULT_DIALECT, Dialect
from ..errors import ComputeError, OutOfMemoryError, PyggmlError
from ..files import aside
from ..graph import Graph
from ..sched.scheduler import Scheduler
from ..tensor import Tensor
from ..types import Op, TensorFlag
from .case import Case, Step, TensorSpec
from .reading import read_case

__all__ = ["TRACE_FORMAT", "Replay", "replay", "replay_file", "write_trace"]

TRACE_FORMAT = "pyggml-sched-trace/1"

#: Part of a trace, in the trace's format.
Record = dict[str, Any]

_FLAGS = (TensorFlag.INPUT, TensorFlag.OUTPUT, TensorFlag.PARAM, TensorFlag.LOSS)
_FLAG_MASK = int(TensorFlag.INPUT | TensorFlag.OUTPUT | TensorFlag.PARAM | TensorFlag.LOSS)


def replay_file(path: str | Path, trace: str | Path, *, dialect: Dialect = DEFAULT_DIALECT) -> Record:
    """Run the case in a file and write its trace, compressed if the name ends in ``.gz``.

    Raises
    ------
    FormatError
        The file is not a case.
    OSError
        A file cannot be read or written.
    """
    result = replay(read_case(path), dialect=dialect)
    write_trace(result, trace)
    return result


def replay(case: Case, *, dialect: Dialect = DEFAULT_DIALECT) -> Record:
    """Run a case and return its trace.

    Notes
    -----
    A step that fails where upstream would abort has an additional ``error``. A failure after which no later step is
    possible ends the trace with an ``abort``: no scheduler, no graph, or a mistake of pyggml.
    """
    run = Replay(case, dialect)
    records: list[Record] = []
    for step in (Step("sched_new"), *case.steps):
        record: Record = {"op": step.op}
        if step.graph is not None:
            record["graph"] = step.graph
        try:
            record |= run.step(step)
        except Exception as error:  # noqa: BLE001  # whatever it is, the trace up to here is worth keeping
            record["abort"] = {"kind": "abort", "message": f"{type(error).__name__}: {error}"}
        record["calls"] = run.take_calls()
        records.append(record)
        if "abort" in record:
            break
    by = f"pyggml {version('pyggml')}, dialect {dialect.version}"
    return {"format": TRACE_FORMAT, "case": case.name, "by": by, "steps": records}


def write_trace(trace: Record, path: str | Path) -> None:
    """Write a trace, compressed if the name ends in ``.gz``; equal traces give equal bytes."""
    text = json.dumps(trace, separators=(",", ":")).encode()
    with aside(path) as part:
        part.write_bytes(gzip.compress(text, mtime=0) if Path(path).suffix == ".gz" else text)


class _Instance:
    """A graph as last built: its tensors by name, and their state at that time."""

    __slots__ = ("flags", "graph", "sources", "tensors")

    def __init__(
        self, graph: Graph, tensors: dict[str, Tensor], static: dict[str, Tensor], specs: Iterable[TensorSpec]
    ) -> None:
        self.graph = graph
        self.tensors = tensors
        self.flags = {name: tensor.flags & _FLAG_MASK for name, tensor in (tensors | static).items()}
        self.sources = {spec.id: spec.src for spec in specs}


class Replay:
    """The scheduler of a case, its backends and graphs, and the calls so far."""

    def __init__(self, case: Case, dialect: Dialect = DEFAULT_DIALECT) -> None:
        self.case = case
        self.dialect = dialect
        self.sched: Scheduler | None = None
        self._calls: list[list[object]] = []
        note = self._note
        memory = MockMemory()
        self.bufts = {b.name: MockBufferType(b, memory, note) for b in case.bufts}
        self.devices = [MockDevice(b, self.bufts, index=i, note=note) for i, b in enumerate(case.backends)]
        self.backends = [device.backend() for device in self.devices]
        self._static: dict[str, Tensor] = {}
        _make_tensors(case.tensors, self._static, {})
        self._static_buffers: dict[Buffer, str] = {}
        self._place_static()
        self._instances: dict[str, _Instance] = {}
        self._node_data: dict[tuple[str, str], bytes] = {}

    def _note(self, call: list[object]) -> None:
        self._calls.append(call)

    def take_calls(self) -> list[list[object]]:
        """Return the calls since the last `take_calls`."""
        calls = self._calls.copy()
        self._calls.clear()
        return calls

    def _place_static(self) -> None:
        """Place the static tensors in their buffers, in order."""
        for spec in self.case.buffers:
            buft = self.bufts[spec.buft]
            offset, places = 0, []
            for name in spec.tensors:
                tensor = self._static[name]
                places.append((tensor, offset))
                if tensor.view_src is None:
                    offset += -(-buft.alloc_size(tensor) // buft.alignment) * buft.alignment
            buffer = buft.static_buffer(offset, spec.id, spec.usage)
            self._static_buffers[buffer] = spec.id
            for tensor, at in places:
                if tensor.view_src is None:
                    tensor_alloc(buffer, tensor, buffer.base + at)
                else:
                    view_init(tensor)

    # -- steps ---------------------------------------------------------------

    def step(self, step: Step) -> Record:
        """Make a step and return its part of the trace."""
        made: Record = getattr(self, f"_step_{step.op}")(step)
        return made

    def _step_sched_new(self, step: Step) -> Record:
        case = self.case
        self.sched = Scheduler(
            self.backends,
            bufts=None if case.sched_bufts is None else [self.bufts[name] for name in case.sched_bufts],
            parallel=case.parallel,
            op_offload=case.op_offload,
            dialect=self.dialect,
            strict=True,
            debug=0,
        )
        return {}

    def _step_build(self, step: Step) -> Record:
        spec = self.case.graphs[_graph_id(step)]
        tensors: dict[str, Tensor] = {}
        _make_tensors(spec.tensors, tensors, self._static)
        graph = Graph()
        for name in spec.expand:
            graph.expand(tensors[name] if name in tensors else self._static[name])
        self._instances[_graph_id(step)] = _Instance(graph, tensors, self._static, (*spec.tensors, *self.case.tensors))
        self._bind_node_data()
        return {"nodes": _names(graph.nodes), "leafs": _names(graph.leafs)}

    def _step_pin(self, step: Step) -> Record:
        backend = self.backends[step.backend]
        return _told(_attempt(lambda: self._sched.set_tensor_backend(self._tensor(step), backend)))

    def _step_reserve(self, step: Step) -> Record:
        instance = self._instances[_graph_id(step)]
        error = _attempt(lambda: self._sched.reserve(instance.graph))
        return {"result": error is None} | (_told(error) or {"state": self._state(instance, hashed=error is not None)})

    def _step_reserve_size(self, step: Step) -> Record:
        sizes: list[int] = []
        graph = self._instances[_graph_id(step)].graph
        return _told(_attempt(lambda: sizes.extend(self._sched.reserve_size(graph)))) | {"sizes": sizes}

    def _step_split(self, step: Step) -> Record:
        instance = self._instances[_graph_id(step)]
        error = _attempt(lambda: self._sched.split_graph(instance.graph))
        return _told(error) or {"state": self._state(instance)}

    def _step_alloc_graph(self, step: Step) -> Record:
        instance = self._instances[_graph_id(step)]
        error = _attempt(lambda: self._sched.alloc_graph(instance.graph))
        return {"result": error is None} | (_told(error) or {"state": self._state(instance, allocated=error is None)})

    def _step_compute(self, step: Step) -> Record:
        instance = self._instances[_graph_id(step)]
        sched = self._sched
        was_alloc = sched.is_alloc
        compute = sched.compute_async if step.is_async else sched.compute
        error = _attempt(lambda: compute(instance.graph))
        record: Record = {"result": _status(error)} | _told(error)
        if sched.is_alloc and not was_alloc:
            record["state"] = self._state(instance, allocated=True)
        return record

    def _step_set_data(self, step: Step) -> Record:
        data = ctypes.create_string_buffer(step.data, len(step.data))
        address = ctypes.addressof(data)
        return _told(_attempt(lambda: tensor_set(self._tensor(step), address, step.offset, len(step.data))))

    def _step_node_data(self, step: Step) -> Record:
        self._node_data[_graph_id(step), step.tensor] = step.data
        self._bind_node_data()
        return {}

    def _step_eval_callback(self, step: Step) -> Record:
        self._sched.set_eval_callback(None if step.need is None else self._eval_callback(step.need, step.stop))
        return {}

    def _step_reset(self, step: Step) -> Record:
        return _told(_attempt(self._sched.reset))

    def _step_synchronize(self, step: Step) -> Record:
        return _told(_attempt(self._sched.synchronize)) | {"next_copy": self._sched.next_copy}

    def _eval_callback(self, need: frozenset[str], stop: str | None) -> Callable[[Tensor, bool], bool]:
        """Return a callback that asks for the needed tensors and stops after one."""

        def callback(tensor: Tensor, ask: bool) -> bool:
            name = short_name(tensor)
            answer = name in need if ask else name != stop
            self._note(["eval_ask" if ask else "eval_got", name, answer])
            return answer

        return callback

    @property
    def _sched(self) -> Scheduler:
        assert self.sched is not None
        return self.sched

    def _tensor(self, step: Step) -> Tensor:
        if step.graph is not None:
            tensor = self._instances[step.graph].tensors.get(step.tensor)
            if tensor is not None:
                return tensor
        return self._static[step.tensor]

    def _bind_node_data(self) -> None:
        """Set the bytes that computing nodes writes, for the graphs as last built."""
        bound = {
            self._instances[graph].tensors[name]: data
            for (graph, name), data in self._node_data.items()
            if graph in self._instances
        }
        for device in self.devices:
            device.node_data = bound

    # -- state ---------------------------------------------------------------

    def _state(self, instance: _Instance, *, allocated: bool = False, hashed: bool = True) -> Record:
        """Return the scheduler's state in the trace's format.

        Parameters
        ----------
        allocated : bool
            Include the addresses of tensors.
        hashed : bool
            Include the scheduler's data about tensors; not possible after a reset.
        """
        sched = self._sched
        graph = sched.sched_graph
        state: Record = {
            "n_splits": sched.n_splits,
            "n_copies": sched.n_copies,
            "cur_copy": sched.cur_copy,
            "next_copy": sched.next_copy,
            "splits": [
                {
                    "backend": split.backend_id,
                    "i_start": split.i_start,
                    "i_end": split.i_end,
                    "n_inputs": len(split.inputs),
                    "inputs": _names(split.inputs),
                }
                for split in sched.splits
            ],
            "graph_inputs": _names(sched.plan.graph_inputs),
            "copy_nodes": [[short_name(t), b] for t, b in zip(graph.nodes, graph.node_backend_ids, strict=True)],
            "copy_leafs": [[short_name(t), b] for t, b in zip(graph.leafs, graph.leaf_backend_ids, strict=True)],
            "rewritten": self._rewritten(instance),
        }
        known = instance.tensors | self._static
        state["flags_changed"] = {
            name: sorted(flag.name.lower() for flag in _FLAGS if tensor.flags & flag)
            for name, tensor in known.items()
            if tensor.flags & _FLAG_MASK != instance.flags[name]
        }
        if hashed:
            backend_ids = {name: sched.assignment.get(tensor) for name, tensor in known.items()}
            state["tensor_backend"] = {n: b for n in sorted(backend_ids) if (b := backend_ids[n]) is not None}
            state["copies"] = {
                name: {str(b): _names(row) for b, row in sorted(copies.items())}
                for name, tensor in known.items()
                if (copies := sched.copies.get(tensor))
            }
        state["buffer_sizes"] = [sched.buffer_size(backend) for backend in self.backends]
        state["chunk_sizes"] = [sched.chunk_sizes(backend) for backend in self.backends]
        if allocated:
            state["alloc"] = self._places()
        return state

    def _rewritten(self, instance: _Instance) -> list[list[object]]:
        """Return the sources that the scheduler replaced."""
        found: list[list[object]] = []
        for node in instance.graph.nodes:
            name = short_name(node)
            for j, (src, described) in enumerate(zip(node.src, instance.sources[name], strict=True)):
                now = None if src is None else short_name(src)
                if now != described:
                    found.append([name, j, now])
        return found

    def _places(self) -> dict[str, list[object] | None]:
        """Return buffer and offset by name of the allocator's tensors; None for dependencies."""
        graph = self._sched.sched_graph
        chunks: dict[Buffer, tuple[object, int]] = {buffer: (id, 0) for buffer, id in self._static_buffers.items()}
        for b in range(len(self.backends)):
            for c, buffer in enumerate(self._sched.galloc.chunks(b)):
                chunks.setdefault(buffer, (b, c))
        by_type = {buft: b for b, buft in reversed([*enumerate(self._sched.bufts)])}
        for node in graph.nodes:  # the allocator has no buffer for a chunk with only empty tensors
            for one in (node, *node.src):
                if one is not None and one.buffer is not None and not one.buffer.size and one.buffer.buft in by_type:
                    chunks.setdefault(one.buffer, (by_type[one.buffer.buft], 0))
        places: dict[str, list[object] | None] = {}
        for node in graph.nodes:
            if _is_dependency(node):
                continue
            for tensor in (node, *node.src):
                if tensor is not None:
                    places[short_name(tensor)] = _place(tensor, chunks)
        for leaf in graph.leafs:
            places[short_name(leaf)] = _place(leaf, chunks)
        return dict(sorted(places.items()))


def _make_tensors(specs: Iterable[TensorSpec], into: dict[str, Tensor], outer: dict[str, Tensor]) -> None:
    """Make tensors in order; each may use earlier ones and the outer ones."""

    def known(name: str) -> Tensor:
        return into[name] if name in into else outer[name]

    for spec in specs:
        into[spec.id] = Tensor(
            spec.type,
            spec.ne,
            spec.nb,
            name=spec.id,
            op=spec.op,
            src=[None if name is None else known(name) for name in spec.src],
            op_params=spec.op_params,
            flags=spec.flags,
            view_src=None if spec.view is None else known(spec.view[0]),
            view_offs=0 if spec.view is None else spec.view[1],
        )


def _attempt(call: Callable[[], object]) -> PyggmlError | None:
    """Make a call and return the `PyggmlError` that it raised, or None."""
    try:
        call()
    except PyggmlError as error:
        return error
    return None


def _status(error: PyggmlError | None) -> int:
    """Return upstream's status of a compute."""
    if error is None:
        return 0
    if isinstance(error, ComputeError):
        return error.status
    return -2 if isinstance(error, OutOfMemoryError) else -1


def _told(error: PyggmlError | None) -> Record:
    """Return a step's ``error``; empty if upstream returns a status for it."""
    if error is None or isinstance(error, (ComputeError, OutOfMemoryError)):
        return {}
    return {"error": {"type": type(error).__name__, "message": str(error)}}


def _is_dependency(node: Tensor) -> bool:
    """Return whether a node of the scheduler's graph only keeps others alive, by its name unless that is truncated."""
    is_empty_view = node.op is Op.NONE and node.view_src is not None
    return is_empty_view and bool(node.src) and node.src[0] is not None and short_name(node).endswith(" (view)")


def _place(tensor: Tensor, chunks: dict[Buffer, tuple[object, int]]) -> list[object] | None:
    """Return the place of a tensor: buffer, chunk and offset in bytes."""
    if tensor.buffer is None or tensor.data is None:
        return None
    label, chunk = chunks.get(tensor.buffer, ("?", 0))
    return [label, chunk, tensor.data - tensor.buffer.base]


def _names(tensors: Iterable[Tensor]) -> list[str]:
    return [short_name(tensor) for tensor in tensors]


def _graph_id(step: Step) -> str:
    assert step.graph is not None
    return step.graph
