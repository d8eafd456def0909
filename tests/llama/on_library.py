"""What tests of the device in ggml run in a process of their own: ``on_library.py WHAT LIBRARY OUT [ARGUMENTS]``.

``ops``: `ggml_backend_compare_graph_backend` of the library between its CPU and a simulated device, over the op cases of the test kit.
``model``: the same over the graphs that llama.cpp gives the device while it decodes.
``known``: decodes whose calls are answered in compiled code, and the same with all calls answered by Python.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pyggml.backend import REGISTRY
from pyggml.backends.host.ggml_safe import is_safe_on_cpu
from pyggml.backends.libggml.tensors import can_translate, new_tensor, set_op
from pyggml.backends.sim.device import SimDevice
from pyggml.cost import parse_profile
from pyggml.errors import ComputeError
from pyggml.llama.computing import ComputingDevice, Machine
from pyggml.llama.engine import Engine
from pyggml.llama.ledger import Ledger
from pyggml.llama.library import DeviceLibrary
from pyggml.tensor import Tensor
from pyggml.testing import conformance, ref
from pyggml.types import Op
from pyggml.values import decode_array

FUNCTIONS = """
bool ggml_backend_compare_graph_backend(
    void * a, void * b, void * graph, void * callback, void * data, void * test_nodes, size_t n_test_nodes);
void * ggml_backend_alloc_ctx_tensors(void * ctx, void * backend);
"""
CALLBACK = "bool(int, struct ggml_tensor *, struct ggml_tensor *, void *)"

#: In a chain of nodes each side goes on from its own results: what a product may be off by, all may.
CHAIN_BOUND = 5e-4

Found = list[dict[str, Any]]


def compare(machine: Machine, a: Any, b: Any, graph: Any, take: Callable[[int, Tensor, Any, Any], None]) -> bool:
    """Let the library compute a graph node by node on two backends; ``take`` gets both results of each."""
    library = machine.library
    ffi, lib = library.ffi, library.lib
    errors: list[BaseException] = []

    def value(t: Any) -> Any:
        tensor = machine.translator.tensor(t, has_op=True)
        raw = np.empty(max(tensor.nbytes, 1), np.uint8)
        lib.ggml_backend_tensor_get(t, ffi.from_buffer(raw), 0, tensor.nbytes)
        return decode_array(tensor, raw[: tensor.nbytes].tobytes())

    @ffi.callback(CALLBACK, onerror=lambda kind, error, trace: errors.append(error))
    def see(i: int, t1: Any, t2: Any, _: Any) -> bool:
        take(i, machine.translator._node(t1), value(t1), value(t2))
        return True

    done = lib.ggml_backend_compare_graph_backend(a, b, graph, see, ffi.NULL, ffi.NULL, 0)
    for error in [*errors, *filter(None, [machine.take_error()])]:
        raise error
    return bool(done)


def judge(node: Tensor, one: Any, two: Any, at_least: float = 0.0) -> dict[str, Any]:
    """Return how far two results are from each other, and how far they may be."""
    if node.op is Op.TOP_K:  # upstream does not promise an order
        one, two = np.sort(one, axis=-1), np.sort(two, axis=-1)
    bound = max(ref.nmse_bound(node), conformance.BY_TABLE.get(node.op_desc, 0.0), at_least)
    finite = np.isfinite(one)
    same_kind = bool((finite == np.isfinite(two)).all())
    error = float(ref.nmse(one[finite], two[finite])) if finite.any() else 0.0
    return {"op": node.op_desc, "error": error, "bound": bound, "is_right": same_kind and error <= bound}


def ops(path: Path, seed: int | None, n_case: int, every: int = 1) -> Found:
    """Compare the cases of the test kit, or one in so many of them; those that either side does not run are counted as that."""
    library = DeviceLibrary(path)
    library.ffi.cdef(FUNCTIONS)
    ffi, lib = library.ffi, library.lib
    machine = Machine(library, REGISTRY.open("cpu"))
    sim = SimDevice(parse_profile("rtx4090-pcie4"), seed=seed)
    machine.ledger = Ledger([sim, REGISTRY.open("cpu")], machine.host.at, clock=None, takes_records=False)
    device = ComputingDevice(machine, sim, 0, threads=1)
    cpu_device = lib.ggml_backend_dev_by_type(0)
    cpu, own = (lib.ggml_backend_dev_init(d, ffi.NULL) for d in (cpu_device, device.handle))
    found: Found = []
    for name, make in itertools.islice(conformance.cases(n_case=n_case), 0, None, every):
        case = make()
        values = case.build()
        last = case.result
        result = values[last]
        assert result is not None
        about = {"name": name, "op": result.op_desc}
        if not can_translate(library, result) or not is_safe_on_cpu(result):
            found.append(about | {"skipped": "the library lacks it, or its CPU would end the process"})
            continue
        known = {t: i for i, t in enumerate(values) if t is not None}
        roots = {known[s if s.view_src is None else s.view_src] for s in result.src if s is not None} - {last}
        if result.view_src is not None:
            roots.add(known[result.view_src])
        memory = conformance._memory_of(case, roots)
        context = library.new_context(64, graph_size=16)
        made: dict[Tensor, Any] = {}

        def put(tensor: Tensor, context: Any = context, made: dict[Tensor, Any] = made) -> Any:
            if tensor not in made:
                root = None if tensor.view_src is None else put(tensor.view_src)
                made[tensor] = new_tensor(library, context, tensor)
                if root is not None:
                    made[tensor].view_src, made[tensor].view_offs = root, tensor.view_offs
            return made[tensor]

        sources = [None if s is None or s is result else put(s) for s in result.src]
        node = put(result)
        set_op(library, node, result)
        for i, source in enumerate(result.src):
            if source is not None:
                node.src[i] = node if source is result else sources[i]
        graph = lib.ggml_new_graph_custom(context, 16, False)
        buffer = lib.ggml_backend_alloc_ctx_tensors(context, cpu)
        lib.ggml_build_forward_expand(graph, node)
        supports = [lib.ggml_backend_dev_supports_op(d, node) for d in (cpu_device, device.handle)]
        if buffer == ffi.NULL or not all(supports):
            found.append(about | {"skipped": f"supported by CPU, device: {supports}, memory: {buffer != ffi.NULL}"})
            continue
        for i in roots:
            root = values[i]
            assert root is not None
            if len(memory[i]):
                lib.ggml_backend_tensor_set(made[root], ffi.from_buffer(memory[i]), 0, len(memory[i]))
        before = len(found)

        def take(_: int, node: Tensor, one: Any, two: Any, about: dict[str, Any] = about) -> None:
            found.append(about | judge(node, one, two))

        assert compare(machine, cpu, own, graph, take), name
        if len(found) == before:
            found.append(about | {"skipped": "it is a view"})
        lib.ggml_backend_buffer_free(buffer)
    found.append({"hazards": [str(h) for h in sim.hazards]})
    return found


def model(path: Path, request: dict[str, Any]) -> Found:
    """Compare each node of each graph of a prompt and a token, as llama.cpp's scheduler gives them to the device."""
    engine = Engine(path)
    engine.library.ffi.cdef(FUNCTIONS)
    machine, lib = engine.machine, engine.lib
    found: Found = []
    engine.open(request)
    cpu = lib.ggml_backend_dev_init(lib.ggml_backend_dev_by_type(0), engine.ffi.NULL)
    is_inside = False

    def take(_: int, node: Tensor, one: Any, two: Any) -> None:
        found.append({"name": node.name} | judge(node, one, two, CHAIN_BOUND))

    def see(stream: int, graph: Any) -> bool:
        nonlocal is_inside
        if is_inside:
            return False
        is_inside = True
        try:
            assert compare(machine, engine.library.pointer(stream), cpu, graph, take)
        finally:
            is_inside = False
        return True

    machine.on_graph = see
    engine.decode(list(range(40)), "last", 0)
    engine.decode([1], "last", 0)
    return found


def known(path: Path, request: dict[str, Any]) -> Found:
    """Decode a prompt and tokens with known calls, without them, and with a kernel that stops."""
    engine = Engine(path)
    engine.open(request)
    machine, sim = engine.machine, engine.devices[0]
    calls, ledger = machine.known, machine.ledger
    assert isinstance(sim, SimDevice)
    assert ledger.clock is not None
    begin = calls.begin
    # the scheduler's counts, those of the device and those of its buffers
    counters = ledger.counters() + [
        (t, n) for t in (sim.traffic, *(b.traffic for b in sim._buffers)) for n in t.__slots__
    ]

    def run() -> dict[str, Any]:
        engine.keep(0, 0)
        before = [c[0][c[1]] if isinstance(c[0], dict) else getattr(*c) for c in counters]
        about: dict[str, Any] = {"logits": [], "batches": [], "virtual_s": []}
        tokens = list(range(40))
        for _ in range(6):
            found = engine.decode(tokens, "last", 0)
            tokens = [int(found["logits"][-1].argmax())]
            about["logits"].append(found["logits"].tobytes().hex()[:4000])
            (batch,) = found["batches"]
            about["batches"].append([batch.splits, batch.n_inputs, batch.n_nodes, batch.bytes_copied, batch.bytes_full])
            about["virtual_s"].append(batch.virtual_s)
        after = [c[0][c[1]] if isinstance(c[0], dict) else getattr(*c) for c in counters]
        about["counts"] = [b - a for a, b in zip(before, after, strict=True)]
        return about

    found: Found = []
    for is_on in (True, True, False):
        calls.begin = lambda *, is_on, allowed=is_on: begin(is_on=is_on and allowed)
        cycles = calls.cycles
        found.append(run() | {"was_known": calls.cycles > cycles})
    calls.begin = begin
    stream = next(iter(machine.streams.values()))[1]
    stream.pool.abort()  # of a simulated device
    try:
        engine.decode([1], "last", 0)
    except ComputeError as error:
        found.append({"error": str(error)})
    found.append(run())
    return found


def main(what: str, library: str, out: str, arguments: str) -> None:
    """Run, and write what was found as JSON."""
    given = json.loads(arguments)
    if what == "ops":
        found = ops(Path(library), **given)
    else:
        run = {"model": model, "known": known}[what]
        found = run(Path(library), pickle.loads(Path(given["request"]).read_bytes()))
    Path(out).write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # destructors of the library and of Python need not agree on an order


if __name__ == "__main__":
    main(*sys.argv[1:])
