"""What cannot run is an error that names op, types and backend, whichever way it takes to a kernel; nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

import pyggml as ggml
from pyggml import ops
from pyggml.backend import REGISTRY
from pyggml.opset import supports_op
from pyggml.types import Op, Type

#: Ops of one tensor, of all that kernels take as floats; with a type that they do not take.
ONE = {
    "cont of a transposed": lambda x: ops.cont(ops.transpose(x)),
    "concat": lambda x: ops.concat(x, x, 1),
    "add": lambda x: ops.add(x, x),
    "scale": lambda x: ops.scale(x, 2.0),
    "rms_norm": lambda x: ops.rms_norm(x, 1e-5),
    "soft_max": ops.soft_max,
    "sqr": ops.sqr,
    "silu": ops.silu,
    "sum_rows": ops.sum_rows,
    "cumsum": ops.cumsum,
    "argsort": lambda x: ops.argsort(x, 0),
    "mul_mat": lambda x: ops.mul_mat(x, ggml.Tensor("f32", (64, 2), name="b")),
    "clamp": lambda x: ops.clamp(x, 0.0, 1.0),
    "swiglu": ops.swiglu,
    "repeat": lambda x: ops.repeat_4d(x, 64, 192, 1, 1),
    "diag_mask_inf": lambda x: ops.diag_mask_inf(x, 0),
    "cast to i64": lambda x: ops.cast(x, "i64"),
}
TYPES = ("q4_0", "q8_0", "q4_K", "iq4_xs", "i32", "i64", "f16")
#: The same in place, or into what is there already.
INTO = {
    "scale_inplace": lambda x: ops.scale_inplace(x, 2.0),
    "add_inplace": lambda x: ops.add_inplace(x, x),
    "silu_inplace": ops.silu_inplace,
    "rms_norm_inplace": lambda x: ops.rms_norm_inplace(x, 1e-5),
    "cpy": lambda x: ops.cpy(ggml.Tensor("f32", x.ne, name="other", flags=1), x),
}


def _built(build: Callable[[ggml.Tensor], ggml.Tensor], kind: str) -> tuple[ggml.Graph, ggml.Tensor] | None:
    """Return a graph of one op over a tensor of a type; None if the builder refuses, or if the kernels take it."""
    graph = ggml.Graph()
    with graph:
        x = graph.input(kind, (256, 64) if Type.of(kind).block_size > 64 else (64, 96), name="x")
        try:
            y = build(x)
        except ggml.errors.ShapeError:
            return None
    if supports_op(y):
        return None
    graph.expand(y)
    return graph, y


WAYS = ("alone", "pinned to the CPU", "pinned to a device")


@pytest.mark.parametrize("way", WAYS)
def test_a_node_that_cannot_run_is_refused_when_it_is_allocated(way: str) -> None:
    """Every op with every type that it cannot take is `UnsupportedOpError` in `alloc_graph`, pinned or not, in place or not."""
    n = 0
    cpu, gpu = ggml.CPU(threads=1), ggml.Sim("rtx4090-pcie4")
    for (name, build), kind in product((ONE | INTO).items(), TYPES):
        made = _built(build, kind)
        if made is None:
            continue
        graph, y = made
        sched = ggml.Scheduler([gpu, cpu])
        if way != "alone":
            sched.set_tensor_backend(y, cpu if way == "pinned to the CPU" else gpu)
        with pytest.raises(ggml.errors.UnsupportedOpError) as caught:
            sched.alloc_graph(graph)
        error = caught.value
        assert error.op == y.op_desc, name
        assert Type.of(kind).ggml_name in str(error)
        if way != "alone":
            assert error.backends == ((cpu if way == "pinned to the CPU" else gpu).name,)
        n += 1
    assert n > 70


@pytest.mark.parametrize("device", ["cpu", "sim", "libggml:CPU"])
def test_a_backend_used_by_hand_refuses_the_same(device: str) -> None:
    """`graph_compute` of what the kernels cannot run is `UnsupportedOpError`; the result keeps what it held."""
    backend = ggml.CPU(threads=1) if device == "cpu" else REGISTRY.open(device).backend()
    n = 0
    for (name, build), kind in product(ONE.items(), ("q4_0", "i64")):
        made = _built(build, kind)
        if made is None or backend.supports_op(made[1]):
            continue
        graph, y = made
        with ggml.Context() as context:
            for tensor in (*graph.leafs, *graph.nodes):
                context.add(tensor)
            context.alloc(backend.device)
            before = y.tobytes() if y.last_byte == y.nbytes else b""
            with pytest.raises(ggml.errors.UnsupportedOpError, match=backend.name):
                backend.graph_compute(graph.view(0, len(graph.nodes)))
            assert not before or y.tobytes() == before, name
        n += 1
    assert n > 8


def _of_columns(x: ggml.Tensor, first: int, last: int) -> ggml.Tensor:
    """Return the blocks of columns from first to last of a matrix, still in its rows."""
    at = x.type.row_size(first)
    return ops.view_2d(x, last - first, x.ne[1], x.nb[1], at)


#: Ops that take blocks apart or together: how it is built of x and y, and numpy's answer.
MOVES: dict[str, tuple[Callable[..., ggml.Tensor], Callable[..., np.ndarray]]] = {
    "cont of a transposed": (lambda x, y: ops.cont(ops.transpose(x)), lambda x, y: x.T),
    "concat of rows": (lambda x, y: ops.concat(x, y, 1), lambda x, y: np.concatenate([x, y])),
    "concat side by side": (lambda x, y: ops.concat(x, y, 0), lambda x, y: np.concatenate([x, y], axis=1)),
    "cast of columns": (lambda x, y: ops.cast(_of_columns(x, 32, 96), "f32"), lambda x, y: x[:, 32:96]),
    "cast to f16 of columns": (lambda x, y: ops.cast(_of_columns(x, 0, 64), "f16"), lambda x, y: x[:, :64].astype("f2")),
    "cont of columns": (lambda x, y: ops.cont(_of_columns(x, 64, 128)), lambda x, y: x[:, 64:]),
    "cpy of columns": (
        lambda x, y: ops.cpy(_of_columns(x, 32, 64), ggml.Tensor("f32", (32, 24), name="into", flags=1)),
        lambda x, y: x[:, 32:64],
    ),
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("kind", ["q4_0", "q5_1", "q8_0"])
@pytest.mark.parametrize("name", MOVES)
def test_blocks_are_moved_right_or_not_at_all(name: str, kind: str, device: str) -> None:
    """Turned and joined matrices of blocks are refused when built or placed, or exact; columns that are whole blocks are exact."""
    build, expected = MOVES[name]
    cpu = ggml.CPU(threads=1)
    first = cpu if device == "cpu" else ggml.Sim("rtx4090-pcie4")
    rng = np.random.default_rng(3)
    graph = ggml.Graph()
    try:
        with graph:
            x, y = (graph.input(kind, (128, 24), name=n).set_output() for n in "xy")
            z = build(x, y).named("z").set_output()
        graph.expand(x, y, z)
        sched = ggml.Scheduler([cpu] if first is cpu else [first, cpu])
        for node in graph.nodes:
            if not node.is_view:
                sched.set_tensor_backend(node, first)
        sched.alloc_graph(graph)
    except (ggml.errors.ShapeError, ggml.errors.UnsupportedOpError):
        if "columns" in name:  # whole blocks of each row, which kernels copy
            raise
        return
    for t in (x, y):
        t.set_array(rng.standard_normal((24, 128), dtype="f4"))
    sched.compute(graph)
    np.testing.assert_array_equal(z.numpy(), expected(x.numpy(), y.numpy()))


def test_a_strict_scheduler_obeys_pins_and_computes_nothing_that_it_cannot() -> None:
    """With upstream's rules a pin is taken as it is; the kernels refuse it all the same."""
    graph, y = _built(ONE["sqr"], "q4_0") or pytest.fail("SQR of q4_0 has a kernel")
    sched = ggml.Scheduler([cpu := ggml.CPU(threads=1)], strict=True)
    sched.set_tensor_backend(y, cpu)
    sched.alloc_graph(graph)
    with pytest.raises(ggml.errors.UnsupportedOpError, match="CPU cannot run SQR"):
        sched.compute(graph)


def test_in_place_ops_run_where_their_memory_is() -> None:
    """On an input, on a result of a device and on a view of either, an op in place runs where it can write, and is right."""
    cpu, gpu = ggml.CPU(threads=1), ggml.Sim("rtx4090-pcie4")
    weights = ggml.Context()
    w = weights.new_tensor("f32", (8, 8), name="w")
    weights.alloc(gpu.device, usage="weights")
    matrix = np.random.default_rng(0).standard_normal((8, 8)).astype("f4")
    w.set_array(matrix)
    for on_input, view, pin in product((True, False), (True, False), (None, "root")):
        graph = ggml.Graph()
        with graph:
            x = graph.input("f32", (8, 4), name="x")
            root = x if on_input else ggml.mul_mat(w, x).named("root")
            part = ggml.view_2d(root, 4, 4, root.nb[1], 16) if view else root
            y = ggml.scale_inplace(part, 2.0).named("y")
            z = ggml.mul_mat(w, y if not view else ggml.add(root, root)).named("z").set_output()
        graph.expand(y, z)
        sched = ggml.Scheduler([gpu, cpu])
        if pin is not None and not on_input:
            sched.set_tensor_backend(root, cpu)
        sched.alloc_graph(graph)
        data = np.arange(32, dtype="f4").reshape(4, 8)
        x.set_array(data)
        sched.compute(graph)
        want = data.copy() if on_input else data @ matrix.T
        want[:, 4 if view else 0 :] *= 2
        np.testing.assert_allclose(z.numpy(), (want + want if view else want) @ matrix.T, rtol=1e-4)


def test_an_op_in_place_pinned_away_from_its_memory_says_so() -> None:
    """A pin to a device that cannot write the memory of the result names the tensor and where it is."""
    graph = ggml.Graph()
    with graph:
        x = graph.input("f32", (8, 4), name="x")
        y = ggml.scale_inplace(x, 2.0)
    graph.expand(y)
    gpu = ggml.Sim("rtx4090-pcie4")
    sched = ggml.Scheduler([gpu, ggml.CPU(threads=1)])
    sched.set_tensor_backend(y, gpu)
    with pytest.raises(ggml.errors.UnsupportedOpError, match="it writes into 'x', which is in memory of CPU"):
        sched.alloc_graph(graph)


def test_checked_plans_are_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computing a graph that was allocated once asks no backend whether it can run a node."""
    graph = ggml.Graph()
    with graph:
        x = graph.input("f32", (8, 4), name="x")
        y = ggml.sqr(ggml.scale(x, 2.0))
    x.set_output()
    graph.expand(y)
    sched = ggml.Scheduler([ggml.CPU(threads=1)])
    sched.alloc_graph(graph)
    x.set_array(np.ones((4, 8)))
    sched.compute(graph)
    asked: list[Op] = []
    monkeypatch.setattr("pyggml.backends.host.plan.reason_unsupported", lambda node: asked.append(node.op) or "")
    for _ in range(3):
        sched.compute(graph)
    assert asked == []
    assert (y.numpy() == 4).all()
