"""The CUDA backend over a fake driver, under the real scheduler: ordering, used-expert copies, two cards, failures."""

from __future__ import annotations

import numpy as np
import pytest
from pyggml.kernels.cuda import copies, formats, launch, reduce, rope, rows, tile

import pyggml as ggml
from pyggml.backends import cuda
from pyggml.backends.cuda import ops as cuda_ops
from pyggml.backends.cuda.ops import WEIGHT_TYPES, reason_refused
from pyggml.opset import checks
from pyggml.testing.fake_driver import FakeMachine

N_IN, N_FF, N_EXPERT, N_USED = 64, 96, 8, 2
SEEDS = range(20)


class Experts:
    """The feed-forward of a layer with experts: gate, up, activation, bias, down; weights in host memory."""

    def __init__(self, type="q8_0", *, n_token=33, n_layer=1, where=None, seed=0):
        rng = np.random.default_rng(seed)
        self.rng = rng
        self.cpu = ggml.CPU(threads=1)
        self.weights = ggml.Context()
        self.n_token = n_token
        shapes = {"gate": (N_IN, N_FF), "up": (N_IN, N_FF), "down": (N_FF, N_IN)}
        self.tensors = {
            (i, n): self.weights.new_tensor(type, (*s, N_EXPERT), name=f"blk.{i}.ffn_{n}_exps.weight")
            for i in range(n_layer)
            for n, s in shapes.items()
        }
        self.weights.alloc(where or self.cpu, usage="weights")
        for t in self.tensors.values():
            t.set_array(rng.standard_normal(t.shape).astype("f4") / 8)
        self.graph = graph = ggml.Graph()
        with graph:
            x = self.x = graph.input("f32", (N_IN, 1, n_token), name="x")
            self.ids = []
            for i in range(n_layer):
                ids = graph.input("i32", (N_USED, n_token), name=f"ids-{i}")
                self.ids.append(ids)
                gate, up = (ggml.mul_mat_id(self.tensors[i, n], x, ids).named(f"{n}-{i}") for n in ("gate", "up"))
                h = ggml.swiglu_split(gate, up).named(f"act-{i}")
                down = ggml.mul_mat_id(self.tensors[i, "down"], h, ids).named(f"down-{i}")
                first = ggml.view_3d(down, N_IN, 1, n_token, down.nb[1], down.nb[2], 0)
                second = ggml.view_3d(down, N_IN, 1, n_token, down.nb[1], down.nb[2], down.nb[1])
                x = ggml.add(ggml.scale(ggml.add(first, second), 0.5), x).named(f"out-{i}")
            self.y = x.set_output()
        graph.expand(x)

    def fill(self):
        """Give the inputs values; only experts 1, 2, 5 and 6 are used."""
        x = self.rng.standard_normal((self.n_token, 1, N_IN)).astype("f4")
        self.x.set_array(x)
        chosen = []
        for ids in self.ids:
            chosen.append(np.stack([self.rng.permutation([1, 2, 5, 6])[:N_USED] for _ in range(self.n_token)]))
            ids.set_array(chosen[-1].astype("i4"))
        return x, chosen

    def expected(self, x, chosen):
        """Return the result in float64."""
        x = x[:, 0].astype("f8")
        for i, ids in enumerate(chosen):
            w = {n: self.tensors[i, n].numpy().astype("f8") for n in ("gate", "up", "down")}
            gate, up = (np.einsum("tumk,tk->tum", w[n][ids], x) for n in ("gate", "up"))
            h = gate / (1 + np.exp(-gate)) * up
            x = np.einsum("tumk,tuk->tm", w["down"][ids], h) * 0.5 + x
        return x


def error(got, want):
    """Return the normalised mean squared error; NaN if anything is NaN."""
    with np.errstate(all="ignore"):
        return float(((got - want) ** 2).sum() / (want**2).sum())


def run(experts, backends, *, n_run=1, **options):
    """Run the graph over backends and return the worst error."""
    worst = 0.0
    sched = ggml.Scheduler([*backends, experts.cpu], **options)
    for _ in range(n_run):
        sched.reset()
        sched.alloc_graph(experts.graph)
        x, chosen = experts.fill()
        sched.compute(experts.graph)
        value = error(experts.y.numpy().reshape(experts.n_token, N_IN), experts.expected(x, chosen))
        worst = value if np.isnan(value) else max(worst, value)
    return worst


@pytest.mark.parametrize("seed", SEEDS)
def test_used_experts_in_any_order(seed):
    """Whatever order the driver chooses, used experts are on the card before the kernels that need them."""
    machine = FakeMachine(seed=seed)
    device = cuda.CudaDevice(machine.cards[0])
    experts = Experts(n_token=33, seed=seed)
    worst = run(experts, [device.backend()])
    assert worst < 5e-4
    whole = sum(t.nbytes for t in experts.tensors.values())
    assert machine.cards[0].traffic.bytes_in < 0.75 * whole, "experts that nobody chose were copied"
    assert machine.cards[0].traffic.n_launched >= 3 * 3


@pytest.mark.parametrize("seed", SEEDS)
def test_two_cards(seed):
    """Two cards, one layer's weights on each, hand their results on in the right order."""
    machine = FakeMachine(2, seed=seed, has_peers=seed % 4 != 0)
    devices = [cuda.CudaDevice(card) for card in machine.cards]
    experts = Experts(n_layer=2, n_token=4)
    backends = [d.backend() for d in devices]
    sched = ggml.Scheduler([*backends, experts.cpu], op_offload=False)
    for i, backend in enumerate(backends):  # weights on the cards: nothing needs offloading
        copies = ggml.Context()
        for n in ("gate", "up", "down"):
            old = experts.tensors[i, n]
            new = copies.new_tensor(old.type, old.ne, name=old.name)
            for node in experts.graph.nodes:
                node.src[:] = [new if s is old else s for s in node.src]
            experts.graph.leafs[:] = [new if s is old else s for s in experts.graph.leafs]
            experts.graph.use_counts[new] = experts.graph.use_counts.pop(old)
        copies.alloc(backend, usage="weights")
        for n in ("gate", "up", "down"):
            old = experts.tensors[i, n]
            copies[old.name].set_array(old.numpy())
    sched.alloc_graph(experts.graph)
    x, chosen = experts.fill()
    sched.compute(experts.graph)
    got = experts.y.numpy().reshape(experts.n_token, N_IN)
    assert error(got, experts.expected(x, chosen)) < 5e-4
    assert {s.backend_id for s in sched.splits} >= {0, 1}
    assert all(card.traffic.n_launched for card in machine.cards)
    assert bool(machine.cards[0].traffic.bytes_peer) == machine.has_peers


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("parallel", [False, True])
def test_several_runs(seed, parallel):
    """Graphs one after the other, with and without pipeline copies, do not disturb each other."""
    machine = FakeMachine(seed=seed)
    experts = Experts(n_token=33)
    worst = run(experts, [cuda.CudaDevice(machine.cards[0]).backend()], n_run=3, parallel=parallel)
    assert worst < 5e-4


def test_a_forgotten_wait_shows_as_nan(monkeypatch):
    """Without waits nothing is right, and the fake driver shows it: NaN, stale values, or memory that is gone."""
    monkeypatch.setattr(cuda.CudaBackend, "event_wait", lambda self, event: None)
    monkeypatch.setattr(cuda.CudaBackend, "synchronize", lambda self: None)
    for seed in range(4):
        try:
            worst = run(Experts(n_token=33), [cuda.CudaDevice(FakeMachine(seed=seed).cards[0]).backend()])
        except ggml.errors.BackendError:  # memory was given back while kernels still used it
            continue
        assert not worst < 5e-4


@pytest.mark.parametrize("is_ordered", [True, False])
def test_streams_need_events(is_ordered):
    """Two streams are in order exactly if an event says so: without, some seed copies before the data is there."""
    right = []
    for seed in SEEDS:
        card = FakeMachine(seed=seed).cards[0]
        first, second, event = card.stream(), card.stream(), card.event()
        host, out = np.arange(8, dtype="f4"), np.zeros(8, "f4")
        a, b = card.alloc(32), card.alloc(32)
        first.copy_in(a, host.ctypes.data, 32)
        if is_ordered:
            first.record(event)
            second.wait(event)
        second.copy(card, b, a, 32)
        second.copy_out(out.ctypes.data, b, 32)
        second.synchronize()
        right.append(np.array_equal(out, host))
    assert all(right) == is_ordered


def test_allocation_failure():
    """A card that is too small is reported as such, and the scheduler works again once there is room."""
    machine = FakeMachine(memory_bytes=60_000)
    device = cuda.CudaDevice(machine.cards[0])
    experts = Experts(n_token=33)
    sched = ggml.Scheduler([device.backend(), experts.cpu])
    with pytest.raises(ggml.errors.OutOfMemoryError) as caught:
        sched.alloc_graph(experts.graph)
    assert caught.value.buft == "CUDA0"
    machine.cards[0].memory_bytes = 1 << 30
    sched.reset()
    sched.alloc_graph(experts.graph)
    x, chosen = experts.fill()
    sched.compute(experts.graph)
    assert error(experts.y.numpy().reshape(33, N_IN), experts.expected(x, chosen)) < 5e-4


def test_no_room_for_scratch_memory():
    """Scratch memory that does not fit fails the computation, not the process."""
    machine = FakeMachine()
    device = cuda.CudaDevice(machine.cards[0])
    experts = Experts(n_token=33)
    sched = ggml.Scheduler([device.backend(), experts.cpu])
    sched.alloc_graph(experts.graph)
    experts.fill()
    machine.cards[0].n_allocs_left = 0
    with pytest.raises(ggml.PyggmlError):
        sched.compute(experts.graph)


def test_memory_is_given_back():
    """Closing buffers and the backend leaves the card as it was."""
    machine = FakeMachine()
    card = machine.cards[0]
    device = cuda.CudaDevice(card)
    backend = device.backend()
    context = ggml.Context()
    t = context.new_tensor("f32", (10, 3), name="t")
    buffer = context.alloc(device)
    assert card.used_bytes == 256
    t.set_array(np.arange(30).reshape(3, 10))
    assert np.array_equal(t.numpy(), np.arange(30, dtype="f4").reshape(3, 10))
    buffer.clear(0)
    assert not t.numpy().any()
    buffer.close()
    backend.close()
    assert card.used_bytes == 0
    with pytest.raises(ggml.errors.BackendError, match="closed"):
        t.numpy()


def test_pinned_memory_is_host_memory():
    """The scheduler takes pinned memory for host memory, as the CPU does."""
    device = cuda.CudaDevice(FakeMachine().cards[0])
    experts = Experts(where=device.host_buffer_type)
    assert experts.tensors[0, "up"].buffer.is_host
    worst = run(experts, [device.backend()])
    assert worst < 5e-4


def test_fresh_memory_is_nan():
    """What nobody wrote reads as NaN."""
    context = ggml.Context()
    t = context.new_tensor("f32", (4,), name="t")
    context.alloc(cuda.CudaDevice(FakeMachine().cards[0]))
    assert np.isnan(t.numpy()).all()


def test_supported_ops():
    """The device takes what it has kernels for, and leaves the rest to others."""
    graph = ggml.Graph()
    with graph:
        x = graph.input("f32", (64, 4), name="x")
        half = graph.input("f16", (64, 4), name="half")
        w = graph.input("q4_K", (256, 4), name="w")
        y = graph.input("f32", (256, 3), name="y")
        odd = graph.input("iq4_xs", (256, 4), name="odd")
        heads = graph.input("f32", (64, 2, 4), name="heads")
        long = graph.input("f32", (2048, 1), name="long")
        at = graph.input("i32", (4,), name="at")
        at4 = graph.input("i32", (16,), name="at4")
        yes = [
            *(ggml.mul_mat(w, y), ggml.add(x, x), ggml.scale(x, 2.0), ggml.swiglu(x), ggml.reshape_2d(x, 128, 2)),
            *(ggml.soft_max(x), ggml.argsort_top_k(x, 2).src[0], ggml.top_k(x, 2), ggml.sum_rows(x), ggml.silu(x)),
            *(
                ggml.get_rows(half, at),
                ggml.clamp(x, 0.0, 1.0),
                ggml.rope(heads, at, 32, 0),
                ggml.rope(heads, at, 64, 2),
            ),
        ]
        no = [
            *(ggml.mul_mat(odd, y), ggml.add(half, half), ggml.get_rows(w, at), ggml.top_k(long, 2), ggml.elu(x)),
            ggml.rope_multi(heads, at4, None, 32, (8, 8, 8, 8), 8, 4096, 1e4, 1.0, 0.0, 1.0, 32.0, 1.0),
        ]
    assert [reason_refused(op) for op in yes] == [""] * len(yes)
    assert all(reason_refused(op) for op in no)
    assert "iq4_xs" in reason_refused(no[0])


def test_limits_are_the_kernels():
    """What the device promises is what the kernels can."""
    names = {t.ggml_name for t in WEIGHT_TYPES}
    assert names == set(formats.FORMATS) | set(launch.FLOAT_BYTES)
    for fmt in formats.FORMATS.values():
        assert (ggml.Type.of(fmt.name).block_size, ggml.Type.of(fmt.name).type_size) == (
            fmt.block_values,
            fmt.block_bytes,
        )
    assert (cuda_ops._MAX_SORTED, cuda_ops._COLUMNS, cuda_ops._MAX_GRID) == (
        reduce.MAX_SORTED,
        tile.COLUMNS,
        launch.MAX_GRID_YZ,
    )
    assert {t.ggml_name for t in cuda_ops._GETS} == set(copies.GETS)
    assert {t.ggml_name for t in checks.F16_F32} == set(rope.TYPES)
    assert {*cuda_ops._UNARY.values(), "clamp"} == set(rows.UNARY)


def test_an_old_card_is_refused():
    """A card below the oldest target says so, with what is needed."""
    with pytest.raises(ggml.errors.DeviceUnavailableError, match=r"6\.1 is too old: 7\.5 is needed"):
        cuda.CudaDevice(FakeMachine(cc=(6, 1)).cards[0])


@pytest.mark.parametrize("type", ["f32", "f16", "q4_1", "mxfp4"])
@pytest.mark.parametrize("n_token", [2, 40])
def test_types(type, n_token, monkeypatch):
    """The whole feed-forward works for weights of any type, for few and for many tokens."""
    monkeypatch.setenv("GGML_OP_OFFLOAD_MIN_BATCH", "1")
    machine = FakeMachine(seed=5)
    worst = run(Experts(type, n_token=n_token), [cuda.CudaDevice(machine.cards[0]).backend()])
    assert worst < 5e-4
    assert machine.cards[0].traffic.n_launched


def launched(build, monkeypatch):
    """Return the names of the kernels that a graph on a card becomes, and its result."""
    names = []
    plain = cuda.CudaDevice.function
    monkeypatch.setattr(cuda.CudaDevice, "function", lambda self, name: (names.append(name), plain(self, name))[1])
    device = cuda.CudaDevice(FakeMachine().cards[0])
    graph = ggml.Graph()
    weights = ggml.Context()
    with graph:
        result, fill = build(graph, weights)
    weights.alloc(device, usage="weights")
    graph.expand(result.set_output())
    sched = ggml.Scheduler([device.backend(), ggml.CPU(threads=1)])
    sched.alloc_graph(graph)
    fill()
    sched.compute(graph)
    return names, result.numpy()


@pytest.mark.parametrize("n_token", [4, 40])
def test_gate_and_up_share_their_preparation(n_token, monkeypatch):
    """Activations are quantised and ids grouped once for two products of the same, and anew after a change."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n_token, 1, 64)).astype("f4")
    ids = np.stack([rng.permutation(4)[:2] for _ in range(n_token)]).astype("i4")
    values = [rng.standard_normal((4, 10, 64)).astype("f4") for _ in range(3)]

    def build(graph, weights):
        ws = [weights.new_tensor("q8_0", (64, 10, 4), name=f"w{i}") for i in range(3)]
        a, chosen = graph.input("f32", (64, 1, n_token), name="x"), graph.input("i32", (2, n_token), name="ids")
        there = ggml.scale(a, 1.0)  # on the card, where it can be changed
        first, second = (ggml.mul_mat_id(w, there, chosen) for w in ws[:2])
        both = ggml.add(first, second)
        graph.expand(both)  # before the change
        changed = ggml.scale_inplace(there, 2.0)
        third = ggml.mul_mat_id(ws[2], changed, chosen)

        def fill():
            a.set_array(x)
            chosen.set_array(ids)
            for w, v in zip(ws, values, strict=True):
                w.set_array(v)

        return ggml.add(both, third), fill

    names, got = launched(build, monkeypatch)
    assert names.count("quantize_q8_1") == 2
    assert names.count("group_ids") == (1 if n_token > 8 else 0)
    w = values[0] + values[1] + 2 * values[2]
    want = np.einsum("tumk,tk->tum", w[ids].astype("f8"), x[:, 0].astype("f8"))
    assert error(got, want) < 5e-4


def test_mul_mat_chain(monkeypatch):
    """MUL_MAT on the card, for few and many columns and for repeated matrices, makes its ids once for equal shapes."""
    rng = np.random.default_rng(1)
    values = rng.standard_normal((2, 64, 64)).astype("f4") / 8
    x = rng.standard_normal((4, 20, 64)).astype("f4")

    def build(graph, weights):
        w = weights.new_tensor("f16", (64, 64, 2), name="w")
        a = graph.input("f32", (64, 20, 4), name="x")

        def fill():
            w.set_array(values)
            a.set_array(x)

        return ggml.mul_mat(w, ggml.mul_mat(w, a)), fill

    names, got = launched(build, monkeypatch)
    assert names.count("fill_ids") == 1
    full = np.repeat(values.astype("f2").astype("f8"), 2, 0)
    want = np.einsum("cmk,cnk->cnm", full, np.einsum("cmk,cnk->cnm", full, x.astype("f8")))
    assert error(got, want) < 1e-6
