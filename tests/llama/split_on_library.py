"""A split without inputs in a library's own scheduler: ``split_on_library.py LIBRARY OUT SEEDS``.

Two ggml devices are two streams of one simulated device and have the same memory, so nothing is copied between them. The first
refuses SQR. The graph is ``sum += sqr(w @ x)``, computed again and again without a wait.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from on_library import FUNCTIONS
from random_on_library import SCHEDULER

from pyggml.backend import REGISTRY
from pyggml.backends.sim.device import SimDevice
from pyggml.cost import parse_profile
from pyggml.llama.computing import ComputingDevice, Machine
from pyggml.llama.ledger import Ledger
from pyggml.llama.library import DeviceLibrary
from pyggml.types import Op

OPS = """
struct ggml_tensor * ggml_mul_mat(void * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
struct ggml_tensor * ggml_sqr(void * ctx, struct ggml_tensor * a);
struct ggml_tensor * ggml_add(void * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
struct ggml_tensor * ggml_cpy(void * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
void ggml_set_input(struct ggml_tensor * tensor);
int ggml_backend_sched_get_n_splits(void * sched);
void * ggml_backend_alloc_ctx_tensors_from_buft(void * ctx, void * buft);
"""
N, T = 32, 4
N_RUNS = 8


class Stream(ComputingDevice):
    """A ggml device for one stream of a simulated device."""

    def __init__(self, machine: Machine, device: SimDevice, name: str, refuses: frozenset[Op], first: Stream | None):
        self.refuses, self.first = refuses, first
        super().__init__(machine, device, 0, threads=1, name=name)

    def _functions(self) -> dict[str, Any]:
        functions = super()._functions()
        supports = functions["device"]["supports_op"]
        refused = {self.machine.library.ops[op] for op in self.refuses}
        functions["device"] |= {
            "supports_op": lambda device, t: t.op not in refused and supports(device, t),
            "supports_buft": lambda _, buft: buft == (self.first or self).buft,
            "get_buffer_type": lambda _: (self.first or self).buft,
        }
        return functions


def main(path: str, out: str, seeds: str) -> None:
    """Run, and write the hazards and whether numbers are right, by seed."""
    library = DeviceLibrary(Path(path))
    ffi, lib = library.ffi, library.lib
    for text in (FUNCTIONS, SCHEDULER, OPS):
        ffi.cdef(text)
    cpu_device = REGISTRY.open("cpu")
    machine = Machine(library, cpu_device)
    sim = SimDevice(parse_profile("rtx4090-pcie4"), seed=0)
    machine.ledger = Ledger([sim, cpu_device], machine.host.at, clock=None, takes_records=False)
    first = Stream(machine, sim, "SIM0", frozenset({Op.SQR}), None)
    second = Stream(machine, sim, "SIM0b", frozenset(), first)
    null = ffi.NULL
    backends = [lib.ggml_backend_dev_init(d.handle, null) for d in (first, second)]
    backends.append(lib.ggml_backend_dev_init(lib.ggml_backend_dev_by_type(0), null))
    static = library.new_context(4)
    w, total = (lib.ggml_new_tensor_4d(static, 0, *ne, 1, 1) for ne in ((N, N), (N, T)))
    weights = lib.ggml_backend_alloc_ctx_tensors_from_buft(static, first.buft)
    lib.ggml_backend_buffer_set_usage(weights, 1)
    rng = np.random.default_rng(3)
    values = [rng.standard_normal(n).astype(np.float32) / 8 for n in (N * N, *[N * T] * N_RUNS)]

    def write(tensor: Any, data: np.ndarray) -> None:
        lib.ggml_backend_tensor_set(tensor, ffi.from_buffer(data), 0, data.nbytes)

    found: list[dict[str, Any]] = []
    expected = b""
    for seed in (None, *json.loads(seeds)):
        sim.reseed(seed)
        write(w, values[0])
        write(total, np.zeros(N * T, np.float32))
        sched = lib.ggml_backend_sched_new(ffi.new("void *[]", backends), null, 3, 64, False, True)
        context = library.new_context(16, graph_size=64)
        x = lib.ggml_new_tensor_4d(context, 0, N, T, 1, 1)
        lib.ggml_set_input(x)
        graph = lib.ggml_new_graph_custom(context, 64, False)
        summed = lib.ggml_add(context, total, lib.ggml_sqr(context, lib.ggml_mul_mat(context, w, x)))
        lib.ggml_build_forward_expand(graph, lib.ggml_cpy(context, summed, total))
        assert lib.ggml_backend_sched_alloc_graph(sched, graph)
        for data in values[1:]:
            write(x, data)
            assert lib.ggml_backend_sched_graph_compute_async(sched, graph) == 0
        lib.ggml_backend_sched_synchronize(sched)
        raw = np.empty(N * T, np.float32)
        lib.ggml_backend_tensor_get(total, ffi.from_buffer(raw), 0, raw.nbytes)
        expected = expected or raw.tobytes()
        hazards = list(dict.fromkeys(str(h) for h in sim.hazards))
        found.append({
            "seed": seed, "is_right": raw.tobytes() == expected, "hazards": hazards,
            "n_splits": lib.ggml_backend_sched_get_n_splits(sched),
        })  # fmt: skip
        lib.ggml_backend_sched_free(sched)
        error = machine.take_error()
        if error is not None:
            raise error
    Path(out).write_text(json.dumps({"version": library.version, "runs": found}))
    os._exit(0)  # destructors of the library and of Python need not agree on an order


if __name__ == "__main__":
    main(*sys.argv[1:])
