"""Remote devices: results, conversations recorded of real servers, and every way in which a server can go wrong."""

from __future__ import annotations

import pickle
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rpc_cases import Experts, Recorded, converse

import pyggml as ggml
from pyggml.backend import REGISTRY
from pyggml.backends import rpc
from pyggml.backends.rpc.protocol import Command, Connection, parse_address
from pyggml.buffer import tensor_copy, tensor_memset
from pyggml.errors import (
    BackendError,
    DeviceUnavailableError,
    ExpertIdError,
    OutOfMemoryError,
    RPCError,
    UnsupportedOpError,
)
from pyggml.testing.rpc_server import Fault, RPCServer
from pyggml.types import Op

DATA = Path(__file__).parents[2] / "data" / "rpc"
VERSIONS = [(7, 0, 0), (8, 0, 0)]
#: Of the squared error to the squares, between a real server's kernels and ours.
BOUND = 1e-6


@pytest.fixture(params=VERSIONS, ids=["7.0", "8.0"])
def server(request) -> Iterator[RPCServer]:
    """Give a server of each version of the protocol that computes on our CPU."""
    with RPCServer(version=request.param) as made:
        yield made


@pytest.fixture
def patience(monkeypatch) -> None:
    """Let clients wait only a second."""
    monkeypatch.setenv("PYGGML_RPC_TIMEOUT", "1")


@pytest.fixture
def unchecked(monkeypatch) -> None:
    """Let the scheduler ask for no more than it needs: its checks read what was copied."""
    monkeypatch.setenv("PYGGML_CHECK", "0")


@pytest.fixture(scope="module")
def cpu() -> ggml.Backend:
    """Give our own CPU."""
    return ggml.CPU(threads=1)


def open_at(server: RPCServer) -> rpc.RPCDevice:
    """Return the server's first device."""
    device = REGISTRY.open(server.address)
    assert isinstance(device, rpc.RPCDevice)
    return device


# -- results ------------------------------------------------------------------


def test_results_are_those_of_the_host(server, cpu):
    """The same kernels give the same numbers at the other end; a graph that stays is not sent again."""
    first, again, larger = converse(open_at(server))
    want = Experts(cpu.device)
    np.testing.assert_array_equal(first, want.run(ggml.Scheduler([cpu])))
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(larger, Experts(cpu.device, n_tokens=9).run(ggml.Scheduler([cpu])))
    assert server.counts[Command.GRAPH_COMPUTE] == 2
    assert server.counts[Command.GRAPH_RECOMPUTE] == 1
    assert server.refused == []


@pytest.mark.parametrize("version", ["7.0.0", "8.0.0"])
@pytest.mark.usefixtures("unchecked")
def test_real_servers_were_asked_the_same(version, cpu):
    """What is sent is what llama.cpp's own servers answered to, byte by byte; their numbers are ours within a bound."""
    real = Recorded(DATA / f"server-{version}.json.gz")
    device = REGISTRY.open(f"rpc:{real.host}:{real.port}")
    results = converse(device)
    device.connection.close()
    real.close()
    assert real.differs == ""
    assert real.n_served == len(real.turns)
    want = Experts(cpu.device).run(ggml.Scheduler([cpu]))
    assert float(((results[0] - want) ** 2).sum() / (want**2).sum()) < BOUND
    np.testing.assert_array_equal(results[1], results[0])


def test_used_experts_are_sent(server, cpu):
    """Experts in host memory are copied to the remote device as they are used, and no others."""
    experts = Experts(cpu.device)
    experts.chosen[:] = 2
    remote = open_at(server).backend()
    sched = ggml.Scheduler([remote, cpu], offload_rule=lambda backend, op: backend is remote)
    got = experts.run(sched)
    assert sched.tensor_backend(experts.y) is remote
    assert sched.stats.bytes_copied < sched.stats.bytes_full / 2
    local = Experts(cpu.device)
    local.chosen[:] = 2
    np.testing.assert_array_equal(got, local.run(ggml.Scheduler([cpu])))


def test_two_devices_of_a_server_share_its_connection(cpu):
    """A tensor goes from one device of a server to the other without coming here."""
    with RPCServer(n_devices=2) as server:
        first, second = REGISTRY.open_all([server.address, f"{server.address}/1"])
        assert first.connection is second.connection
        assert not first.supports_buft(second.buffer_type)
        a_context, b_context = ggml.Context(), ggml.Context()
        a, b = a_context.new_tensor("f32", (7,), name="a"), b_context.new_tensor("f32", (7,), name="b")
        a_context.alloc(first)
        b_context.alloc(second)
        a.set_array(np.arange(7))
        tensor_copy(a, b)
        np.testing.assert_array_equal(b.numpy(), np.arange(7))
        assert server.counts[Command.COPY_TENSOR] == 1
        with pytest.raises(DeviceUnavailableError, match="2 devices"):
            REGISTRY.open(f"{server.address}/2")


def test_devices_of_two_servers_work_in_a_pipeline(cpu):
    """Two servers and the host, each with some nodes, with events between pipeline copies, give the host's numbers."""
    with RPCServer(version=(7, 0, 0)) as one, RPCServer(version=(8, 0, 0)) as two:
        backends = [open_at(one).backend(), open_at(two).backend(), cpu]
        graph = ggml.Graph()
        with graph:
            x = graph.input("f32", (64, 3), name="x")
            a = ggml.scale(x, 2.0).named("a")
            b = ggml.rms_norm(a, 1e-6).named("b")
            c = ggml.add(b, a).named("c").set_output()
        graph.expand(c)
        sched = ggml.Scheduler(backends, parallel=True)
        for turn in range(6):
            sched.reset()
            for node, backend in zip((a, b, c), backends, strict=True):
                sched.set_tensor_backend(node, backend)
            sched.alloc_graph(graph)
            values = np.random.default_rng(turn).standard_normal((3, 64), np.float32)
            x.set_array(values)
            sched.compute_async(graph)
            sched.synchronize()
            want = 2 * values + 2 * values / np.sqrt((4 * values**2).mean(axis=1, keepdims=True) + 1e-6)
            np.testing.assert_allclose(c.numpy(), want, rtol=1e-5)


# -- memory --------------------------------------------------------------------


def test_memory_is_the_servers(server):
    """Sizes and alignment come from the server; bytes go there and back, are set and cleared, and buffers are freed."""
    device = open_at(server)
    free, total = device.memory()
    assert 0 < free <= total
    assert device.buffer_type.alignment == 32
    assert not device.buffer_type.is_host
    assert device.buffer_type.name == f"RPC0[{server.host}:{server.port}]"
    context = ggml.Context()
    a = context.new_tensor("i32", (5,), name="a")
    buffer = context.alloc(device)
    a.set_array(np.arange(5, dtype=np.int32))
    assert a.numpy().tolist() == [0, 1, 2, 3, 4]
    tensor_memset(a, 0xFF, 4, 8)
    assert a.numpy().tolist() == [0, -1, -1, 3, 4]
    buffer.clear(0)
    assert a.numpy().tolist() == [0] * 5
    assert server.n_open_buffers == 1
    buffer.close()
    with pytest.raises(BackendError, match="closed"):
        a.numpy()
    device.memory()
    assert server.n_open_buffers == 0


def test_large_tensors_go_in_pieces(server):
    """A tensor of several pieces arrives whole."""
    context = ggml.Context()
    a = context.new_tensor("f32", (1 << 20,), name="a")
    context.alloc(open_at(server))
    values = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    a.set_array(values)
    np.testing.assert_array_equal(a.numpy(), values)


def test_too_much_memory_is_refused(server):
    """A server that has not so much says so, and can be used further."""
    device = open_at(server)
    with pytest.raises(OutOfMemoryError) as caught:
        device.buffer_type.alloc_buffer(1 << 55)
    assert caught.value.requested_bytes == 1 << 55
    assert device.memory()[1] > 0


def test_strides_that_the_protocol_has_no_room_for_are_refused(server):
    """Strides are 32 bits on the wire; larger ones are an error here, not a wrong address there."""
    device = open_at(server)
    wide = ggml.Tensor("f32", (4, 2), (4, 1 << 33, 1 << 34, 1 << 34), name="wide", op=Op.MUL_MAT)
    with pytest.raises(BackendError, match="4 GiB"):
        device.buffer_type.alloc_size(wide)


# -- what would end a server -----------------------------------------------------


def test_a_bad_expert_id_does_not_leave_this_machine(server, cpu):
    """Ids are compared as they are written, or else read back; the server never sees a graph with a bad one."""
    experts = Experts(open_at(server))
    sched = ggml.Scheduler([open_at(server).backend(), cpu])
    want = experts.run(sched)
    n_read = server.counts[Command.GET_TENSOR]
    experts.chosen[4, 1] = 4
    n_graphs = server.counts[Command.GRAPH_COMPUTE] + server.counts[Command.GRAPH_RECOMPUTE]
    with pytest.raises(ExpertIdError) as caught:
        experts.run(sched)
    e = caught.value
    assert (e.tensor, e.layer, e.token, e.slot, e.id, e.n_expert) == (experts.up.name, 3, 4, 1, 4, 4)
    assert server.counts[Command.GRAPH_COMPUTE] + server.counts[Command.GRAPH_RECOMPUTE] == n_graphs
    experts.chosen[4, 1] = 0
    experts.fill(sched)
    ids = sched.splits[0].graph.nodes[0].src[2]
    tensor_memset(ids, 0, 0, 4)  # now nothing is known of them: they are read back
    sched.compute(experts.graph)
    assert server.counts[Command.GET_TENSOR] > n_read
    assert experts.normed.numpy().shape == want.shape


def test_weights_that_were_given_back_are_not_computed_with(server, cpu):
    """A graph whose weights were freed is an error here: a server would close the connection."""
    experts = Experts(open_at(server))
    sched = ggml.Scheduler([open_at(server).backend(), cpu])
    experts.run(sched)
    experts.buffer.close()
    with pytest.raises(BackendError, match=r"'blk\.3\.ffn_up_exps\.weight' is in a buffer that was closed"):
        sched.compute(experts.graph)
    assert server.refused == []


def test_a_node_that_servers_may_not_run_is_not_sent(server):
    """A server ends at a node that its device cannot run: such nodes stay here."""
    device = open_at(server)
    i32 = ggml.Tensor("i32", (8, 2), name="i")
    node = ggml.Tensor("i32", (8, 2), name="sum", op=Op.ADD, src=[i32, i32], flags=16)
    assert not device.supports_op(node)
    graph = ggml.Graph()
    graph.nodes.append(node)
    with pytest.raises(UnsupportedOpError, match="cannot run ADD 'sum': i32 from i32, i32"):
        device.backend().graph_compute(graph.view(0, 1))


def test_a_tensor_elsewhere_is_not_sent(server, cpu):
    """A tensor that was not copied to the device is an error before anything is sent."""
    context = ggml.Context()
    a = context.new_tensor("f32", (4,), name="a")
    context.alloc(cpu.device)
    graph = ggml.Graph()
    with graph:
        out = ggml.scale(a, 2.0).named("out")
    graph.expand(out)
    out.buffer, out.data = a.buffer, a.data
    with pytest.raises(BackendError, match="is in CPU"):
        open_at(server).backend().graph_compute(graph.view(0, 1))
    assert server.counts[Command.GRAPH_COMPUTE] == 0


# -- servers that go wrong ---------------------------------------------------------


WRONG = [
    (Fault(Command.GRAPH_COMPUTE, "close"), "DEVICE_COUNT", "closed the connection"),
    (Fault(Command.GRAPH_COMPUTE, "stall"), "DEVICE_COUNT", "within 2 s"),
    (Fault(Command.SET_TENSOR, "close", skip=1), "", "connection"),
    (
        Fault(Command.DEVICE_COUNT, "cut", skip=1),
        "DEVICE_COUNT",
        "closed the connection after 2 bytes of an answer of 4",
    ),
    (Fault(Command.DEVICE_COUNT, "size", skip=1), "DEVICE_COUNT", "answers with 12 bytes where 4 are due"),
    (Fault(Command.GET_TENSOR, "close"), "GET_TENSOR", "closed the connection after 0 bytes"),
    (Fault(Command.GET_TENSOR, "cut"), "GET_TENSOR", "closed the connection after 384 bytes of an answer of 768"),
    (Fault(Command.GET_TENSOR, "size"), "GET_TENSOR", "answers with 776 bytes where 768 are due"),
    (Fault(Command.GET_TENSOR, "stall"), "GET_TENSOR", "0 bytes of an answer came within 2 s"),
    (Fault(Command.GET_TENSOR, "trickle"), "GET_TENSOR", "came within 2 s"),
    (Fault(Command.GET_ALLOC_SIZE, "lie", b"\xff" * 7 + b"\x7f", skip=0), "GET_ALLOC_SIZE", "cannot take"),
    (Fault(Command.ALLOC_BUFFER, "lie", struct.pack("<QQ", 9, 16)), "ALLOC_BUFFER", "16 bytes came for"),
    (Fault(Command.ALLOC_BUFFER, "lie", struct.pack("<QQ", 9, 1 << 40)), "BUFFER_GET_BASE", "closed the connection"),
    (Fault(Command.BUFFER_GET_BASE, "lie", struct.pack("<Q", 33)), "BUFFER_GET_BASE", "0x21 is no start"),
    (Fault(Command.BUFFER_GET_BASE, "lie", bytes(8)), "BUFFER_GET_BASE", "0x0 is no start"),
    (Fault(Command.BUFFER_GET_BASE, "lie", b"\xe0" + b"\xff" * 7), "BUFFER_GET_BASE", "is no start"),
    (Fault(Command.GET_ALIGNMENT, "lie", struct.pack("<Q", 48)), "GET_ALIGNMENT", "48 is no alignment"),
    (Fault(Command.GET_ALIGNMENT, "lie", bytes(8)), "GET_ALIGNMENT", "0 is no alignment"),
    (Fault(Command.GET_MAX_SIZE, "lie", bytes(8)), "GET_MAX_SIZE", "no buffer"),
    (Fault(Command.DEVICE_COUNT, "lie", b"\xff" * 4), "DEVICE_COUNT", "not to be believed"),
    (Fault(Command.HELLO, "close"), "HELLO", "closed the connection"),
    (Fault(Command.HELLO, "size"), "HELLO", "36 bytes where 28"),
    (Fault(Command.HELLO, "stall"), "HELLO", "within 2 s"),
]


@pytest.mark.parametrize(
    ("fault", "command", "text"), WRONG, ids=[f"{f.command.name}-{f.kind}-{i}" for i, (f, _, _) in enumerate(WRONG)]
)
@pytest.mark.usefixtures("unchecked")
def test_a_server_that_goes_wrong_is_an_error(server, cpu, fault, command, text, monkeypatch):
    """Wherever a server fails, `RPCError` comes within the time, tells the command, and the server can be opened anew."""
    want = Experts(cpu.device).run(ggml.Scheduler([cpu]))  # first: the server's kernels are then compiled, too
    if fault.kind in ("stall", "trickle"):
        monkeypatch.setenv("PYGGML_RPC_TIMEOUT", "2")
    server.fault = fault
    start_s = time.monotonic()
    with pytest.raises(RPCError, match=text) as caught:
        converse(open_at(server))
    assert time.monotonic() - start_s < 30
    assert (caught.value.host, caught.value.port) == (server.host, server.port)
    assert caught.value.command == command or not command
    server.fault = None
    monkeypatch.delenv("PYGGML_RPC_TIMEOUT", raising=False)
    np.testing.assert_array_equal(converse(open_at(server))[0], want)


def test_a_scheduler_outlives_its_remote_device(server, cpu):
    """After the connection broke in the middle of a graph, the same scheduler computes on what is left."""
    remote = open_at(server).backend()
    sched = ggml.Scheduler([remote, cpu])
    experts = Experts(remote.device)
    experts.fill(sched)
    server.fault = Fault(Command.GRAPH_COMPUTE, "close")
    with pytest.raises(RPCError) as caught:
        sched.compute(experts.graph)
    assert caught.value.unanswered[-1] == "GRAPH_COMPUTE"
    assert "GRAPH_COMPUTE" in str(caught.value)
    with pytest.raises(RPCError, match=r"connection is lost: DEVICE_COUNT: the server closed"):
        experts.up.tobytes()
    sched.reset()
    graph = ggml.Graph()
    with graph:
        x = graph.input("f32", (8, 2), name="x")
        y = ggml.scale(x, 3.0).named("y")
    graph.expand(y)
    sched.set_tensor_backend(y, cpu)
    sched.set_tensor_backend(x, cpu)
    sched.alloc_graph(graph)
    x.set_array(np.ones((2, 8)))
    sched.compute(graph)
    np.testing.assert_array_equal(y.numpy(), np.full((2, 8), 3.0))


def test_a_server_that_refuses_closes_and_says_at_what(server):
    """A command that the server does not like shows at the next answer, with those that had none."""
    device = open_at(server)
    connection = device.connection
    connection.tell(Command.BUFFER_CLEAR, struct.pack("<QB", 77, 0))
    connection.synchronize()  # no graph is being computed: nothing to wait for
    with pytest.raises(RPCError, match=r"GET_DEVICE_MEMORY \(after BUFFER_CLEAR\): ") as caught:
        device.memory()
    assert caught.value.unanswered == ("BUFFER_CLEAR",)
    assert server.refused == ["there is no buffer 77"]
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.command, again.port) == (str(caught.value), "GET_DEVICE_MEMORY", server.port)


@pytest.mark.parametrize("version", [(6, 1, 0), (7, 0, 1), (9, 0, 0)], ids=str)
def test_other_versions_are_refused(version):
    """A version whose ops may have other numbers is told, with those that are known."""
    with (
        RPCServer(version=version) as server,
        pytest.raises(RPCError, match=r"7\.0\.0 and 8\.0\.0 are known") as caught,
    ):
        open_at(server)
    assert ".".join(map(str, version)) in str(caught.value)


def test_nobody_there_is_an_error():
    """A port where nobody listens is an error at once."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(RPCError, match="cannot connect"):
        REGISTRY.open(f"rpc:127.0.0.1:{port}")


@pytest.mark.usefixtures("patience")
def test_somebody_else_there_is_an_error():
    """A server of something else, which says nothing that is due, is an error in time."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host, port = silent.getsockname()
        with pytest.raises(RPCError, match="within 1 s"):
            Connection((host, port))


@pytest.mark.parametrize("spec", ["", "localhost", "localhost:", ":50052", "localhost:0", "localhost:70000", "h:1/x"])
def test_what_is_no_address_is_refused(spec):
    """A name that is no HOST:PORT says how one is written."""
    with pytest.raises(DeviceUnavailableError, match="write rpc:HOST:PORT"):
        REGISTRY.open(f"rpc:{spec}")


def test_servers_are_not_looked_for():
    """The list of devices has no remote ones, and says why."""
    assert rpc.devices() == []
    assert "rpc:HOST:PORT" in rpc.why_missing()
    assert parse_address("10.0.0.7:50052") == ("10.0.0.7", 50052)
