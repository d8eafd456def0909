"""ggml's own scheduler over random graphs and simulated devices that work late: ``random_on_library.py LIBRARY OUT CASES SEEDS``.

The graphs are those of the live oracle's generator, with numbers in their tensors; three devices and ggml's CPU compute them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from on_library import FUNCTIONS, Found

from pyggml.backend import REGISTRY
from pyggml.backends.host.ggml_safe import is_safe_on_cpu
from pyggml.backends.libggml.tensors import can_translate, new_tensor, question, set_op
from pyggml.backends.sim.device import SimDevice
from pyggml.cost import parse_profile
from pyggml.errors import BackendError
from pyggml.llama.computing import ComputingCPU, ComputingDevice, Machine
from pyggml.llama.ledger import Ledger
from pyggml.llama.library import DeviceLibrary
from pyggml.tensor import Tensor, pack_params
from pyggml.testing import ref
from pyggml.types import Op, Type, UnaryOp

SCHEDULER = """
int ggml_backend_sched_graph_compute_async(void * sched, void * graph);
void ggml_backend_sched_synchronize(void * sched);
void ggml_backend_sched_reset(void * sched);
bool ggml_backend_buffer_is_host(void * buffer);
void * ggml_backend_sched_get_tensor_backend(void * sched, struct ggml_tensor * node);
void ggml_backend_sched_set_tensor_backend(void * sched, struct ggml_tensor * node, void * backend);
"""
N_DEVICES = 3
#: Parameters of ops that a generator for mock devices leaves out.
PARAMS = {
    Op.UNARY: (int(UnaryOp.SILU),), Op.SCALE: pack_params(0.7, 0.1), Op.RMS_NORM: pack_params(1e-5),
    Op.SOFT_MAX: pack_params(1.0, 0.0), Op.FLASH_ATTN_EXT: pack_params(0.2, 0.0, 0.0),
    Op.CLAMP: pack_params(-2.0, 2.0),
}  # fmt: skip
_SCALES = {Type.Q8_0: 1, Type.Q4_0: 1, Type.Q4_K: 2}  #: halves at the head of a block that scale it


def _params(tensor: dict[str, Any], op: Op) -> tuple[int, ...]:
    if "op_params" in tensor:
        return tuple(tensor["op_params"])
    if op is Op.ROPE:  # of n_past, n_dims, mode, n_ctx, n_ctx_orig, then floats
        return (0, tensor["ne"][0], 0, 0, 4096, *pack_params(10000.0, 1.0, 0.0, 1.0, 32.0, 1.0))
    return PARAMS.get(op, ())


class RandomGraph:
    """A case of the live oracle's generator, with numbers in its tensors."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case = case
        name, self.graph = next(iter((n, g) for n, g in case["graphs"].items() if n != "reserve"))
        hosts = {b["name"] for b in case["buffer_types"] if b["host"]}
        gpus = [b["name"] for b in case["buffer_types"] if not b["host"]]
        self.static: dict[str, Tensor] = {}
        self.homes: dict[str, tuple[int, bool]] = {}  # device (-1: host) and whether it is a weight
        for buffer in case["buffers"]:
            home = -1 if buffer["buft"] in hosts else gpus.index(buffer["buft"]) % N_DEVICES
            for id in buffer["tensors"]:
                self.homes[id] = home, buffer["usage"] == "weights"
        for t in case["tensors"]:
            self.static[t["id"]] = Tensor(t["type"], t["ne"], name=t["id"])
        devices = [b["device"] for b in case["backends"]]
        seen = -1
        of_backend = []
        for device in devices:
            seen += device in ("GPU", "IGPU")
            of_backend.append(seen % N_DEVICES if device in ("GPU", "IGPU") else -1)
        self.pins = [
            (s["tensor"], of_backend[s["backend"]]) for s in case["steps"] if s["op"] == "pin" and s["graph"] == name
        ]
        self.n_expert = min((t["ne"][2] for t in case["tensors"] if t["ne"][2] > 1), default=1)
        self.nodes: dict[str, Tensor] = dict(self.static)
        for t in self.graph["tensors"]:
            op = Op[t.get("op", "NONE")]
            view = t.get("view")
            made = Tensor(
                t["type"], t["ne"], t.get("nb"), name=t["id"], op=op, op_params=_params(t, op),
                src=[None if s is None else self.nodes[s] for s in t.get("src", [])],
                view_src=None if view is None else self.nodes[view["src"]],
                view_offs=0 if view is None else view["offs"],
                flags=sum({"input": 1, "output": 2}.get(f, 0) for f in t.get("flags", [])),
            )  # fmt: skip
            self.nodes[t["id"]] = made
        self.order = [self.nodes[n] for n in self.graph.get("nodes", [t["id"] for t in self.graph["tensors"]])]

    def data(self, tensor: Tensor, rng: np.random.Generator) -> bytes:
        """Return numbers that fit what the tensor is for."""
        n = int(np.prod(tensor.ne))
        if tensor.type is Type.F32:
            return (0.5 * rng.standard_normal(n)).astype(np.float32).tobytes()
        if tensor.type is Type.F16:
            return (np.zeros(n) if tensor.name == "mask" else 0.5 * rng.standard_normal(n)).astype(np.float16).tobytes()
        if tensor.type in (Type.I32, Type.I64):
            limit = {"ids": self.n_expert, "tok": 96, "rows": 64}.get(tensor.name, 64)
            values = np.arange(n) % limit
            if tensor.name == "ids":  # distinct experts of a token, if there are enough
                n_used = tensor.ne[0]
                values = (np.arange(n) // n_used + np.arange(n) % n_used) % limit
            return values.astype(np.int32 if tensor.type is Type.I32 else np.int64).tobytes()
        blocks = rng.integers(0, 256, (n // tensor.type.block_size, tensor.type.type_size), np.uint8)
        for i in range(_SCALES[tensor.type]):
            blocks[:, 2 * i : 2 * i + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        return blocks.tobytes()


class Runner:
    """ggml's scheduler over simulated devices in this process."""

    def __init__(self, path: Path) -> None:
        self.library = DeviceLibrary(path)
        self.library.ffi.cdef(FUNCTIONS)
        self.library.ffi.cdef(SCHEDULER)
        self.machine = Machine(self.library, REGISTRY.open("cpu"))
        self.sims = [SimDevice(parse_profile("rtx4090-pcie4"), index=i, seed=0) for i in range(N_DEVICES)]
        ledger = Ledger([*self.sims, REGISTRY.open("cpu")], self.machine.host.at, clock=None, takes_records=False)
        self.machine.ledger = ledger
        self.devices = [ComputingDevice(self.machine, sim, i, threads=1) for i, sim in enumerate(self.sims)]
        lib, null = self.library.lib, self.library.ffi.NULL
        self.cpu_device = lib.ggml_backend_dev_by_type(0)
        ComputingCPU(self.machine)
        self.backends = [lib.ggml_backend_dev_init(d.handle, null) for d in self.devices]
        self.cpu = lib.ggml_backend_dev_init(self.cpu_device, null)

    def run(
        self, graph: RandomGraph, seed: int | None, *, n_runs: int, is_alone: bool = False
    ) -> tuple[list[bytes], list[str]]:
        """Compute a graph some times without waiting between, and return its outputs and hazards.

        Parameters
        ----------
        is_alone : bool
            Everything on ggml's CPU.
        """
        library, ffi, lib = self.library, self.library.ffi, self.library.lib
        for sim in self.sims:
            sim.reseed(seed)
        backends = [self.cpu] if is_alone else [*self.backends, self.cpu]
        rng = np.random.default_rng(1)
        contexts = [library.new_context(len(graph.static) + 1) for _ in backends for _ in range(2)]
        handles: dict[Tensor, Any] = {}
        for id, tensor in graph.static.items():
            home, is_weight = graph.homes.get(id, (-1, True))
            at = len(backends) - 1 if home < 0 or is_alone else home
            handles[tensor] = new_tensor(library, contexts[2 * at + is_weight], tensor)
        buffers = []
        for i, context in enumerate(contexts):
            buffer = lib.ggml_backend_alloc_ctx_tensors(context, backends[i // 2])
            if buffer != ffi.NULL:
                lib.ggml_backend_buffer_set_usage(buffer, i % 2)
                buffers.append(buffer)

        def write(tensor: Tensor, handle: Any) -> None:
            data = graph.data(tensor, rng)
            lib.ggml_backend_tensor_set(handle, ffi.from_buffer(data), 0, len(data))

        for tensor in graph.static.values():
            write(tensor, handles[tensor])
        options = graph.case["sched"]
        size = 4 * len(graph.order) + 200
        sched = lib.ggml_backend_sched_new(
            ffi.new("void *[]", backends), ffi.NULL, len(backends), size, options["parallel"] and not is_alone,
            options["op_offload"],
        )  # fmt: skip
        kept, outputs = [], []
        for _ in range(n_runs):
            context = library.new_context(len(graph.nodes) + 1, graph_size=size)
            kept.append(context)
            made = dict(handles)
            for tensor in graph.order:
                if tensor in made:
                    continue
                new = made[tensor] = new_tensor(library, context, tensor)
                set_op(library, new, tensor)
                if tensor.view_src is not None:
                    new.view_src, new.view_offs = made[tensor.view_src], tensor.view_offs
                    if new.view_src.data != ffi.NULL:
                        new.data = ffi.cast("char *", new.view_src.data) + new.view_offs
                for i, source in enumerate(tensor.src):
                    if source is not None:
                        new.src[i] = made[source]
                new.flags = tensor.flags
            cgraph = lib.ggml_new_graph_custom(context, size, False)
            for tensor in graph.order:
                if tensor.op is not Op.NONE:
                    lib.ggml_build_forward_expand(cgraph, made[tensor])
            if not is_alone:
                for name, device in graph.pins:
                    pinned = made.get(graph.nodes[name])
                    if pinned is None or pinned.op == 0 or pinned.view_src != ffi.NULL:
                        continue
                    if device < 0 or lib.ggml_backend_dev_supports_op(self.devices[device].handle, pinned):
                        lib.ggml_backend_sched_set_tensor_backend(sched, pinned, backends[device])
            assert lib.ggml_backend_sched_alloc_graph(sched, cgraph)
            for tensor in graph.order:
                node = made[tensor]
                if (
                    not tensor.op.is_empty
                    and lib.ggml_backend_sched_get_tensor_backend(sched, node) == self.cpu
                    and not lib.ggml_backend_buffer_is_host(node.buffer)
                ):  # upstream runs it all the same, which ends the process: docs/upstream.md, `Repairs.unsupported_ops`
                    raise BackendError("CPU", f"'{tensor.name}' is not in the device's memory")
            for tensor in graph.order:
                if tensor.op is Op.NONE and made[tensor].buffer != ffi.NULL and tensor not in handles:
                    write(tensor, made[tensor])
            if lib.ggml_backend_sched_graph_compute_async(sched, cgraph) != 0:
                raise self.machine.take_error() or RuntimeError("the graph was not computed")
            outputs = [made[t] for t in graph.order if t.flags & 2 and t.op is not Op.NONE] or [made[graph.order[-1]]]
            lib.ggml_backend_sched_reset(sched)
        lib.ggml_backend_sched_synchronize(sched)
        found = []
        for handle in outputs:
            raw = np.zeros(max(lib.ggml_nbytes(handle), 1), np.uint8)
            lib.ggml_backend_tensor_get(handle, ffi.from_buffer(raw), 0, lib.ggml_nbytes(handle))
            found.append(raw.tobytes())
        hazards = [str(h) for sim in self.sims for h in sim.hazards]
        lib.ggml_backend_sched_free(sched)
        for buffer in buffers:
            lib.ggml_backend_buffer_free(buffer)
        error = self.machine.take_error()
        if error is not None:
            raise error
        return found, hazards

    def can_run(self, graph: RandomGraph) -> bool:
        """Whether ggml's CPU, on which any node may land, runs all nodes and is known not to end the process.

        A batch of no tokens gives an empty buffer, at which ggml ends the process when it allocates the next.
        """
        if any(t.is_empty for t in graph.order if not t.op.is_empty):
            return False
        if not all(can_translate(self.library, t) and is_safe_on_cpu(t) for t in graph.order if t.op is not Op.NONE):
            return False
        for tensor in graph.order:
            if not tensor.op.is_empty:
                asked, _context = question(self.library, tensor)
                if not self.library.lib.ggml_backend_dev_supports_op(self.cpu_device, asked):
                    return False
        return True


def random_graphs(path: Path, cases: list[dict[str, Any]], seeds: list[int]) -> Found:
    """Run each case at once, and late with each seed; and all on ggml's CPU."""
    runner = Runner(path)
    found: Found = []
    for i, case in enumerate(cases):
        about = {"name": i, "parallel": case["sched"]["parallel"]}
        graph = RandomGraph(case)
        if not runner.can_run(graph):
            found.append(about | {"skipped": "ggml's CPU does not run a node"})
            continue
        print(i, flush=True)  # the last words of a child that dies
        n_runs = 6 if case["sched"]["parallel"] else 2
        alone, _ = runner.run(graph, None, n_runs=n_runs, is_alone=True)
        try:
            expected, _ = runner.run(graph, None, n_runs=n_runs)
        except BackendError as error:  # see docs/upstream.md: a node may write into memory that its backend cannot use
            if "not in the device's memory" not in str(error):
                raise
            found.append(about | {"skipped": str(error)})
            continue
        one, two = (np.frombuffer(b"".join(x), np.float32) for x in (alone, expected))
        finite = np.isfinite(one)
        # close numbers may be sorted otherwise, and other experts give other results
        about["is_sorted"] = any(t.op is Op.ARGSORT for t in graph.order)
        about["error"] = float(ref.nmse(one[finite], two[finite])) if finite.any() else 0.0
        about["n_equal"], about["hazards"] = 0, []
        for seed in seeds:
            late, hazards = runner.run(graph, seed, n_runs=n_runs)
            about["n_equal"] += late == expected
            about["hazards"] += [h for h in hazards if h not in about["hazards"]]
        found.append(about)
    return found


def main(library: str, out: str, cases: str, seeds: str) -> None:
    """Run, and write what was found as JSON."""
    found = random_graphs(Path(library), json.loads(Path(cases).read_text()), json.loads(seeds))
    Path(out).write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # destructors of the library and of Python need not agree on an order


if __name__ == "__main__":
    main(*sys.argv[1:])
