"""The driver interface: the real half against a stand-in for the bindings, and the `gpu` tests through a real driver."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from driver_stand_in import Bindings
from emulated_card import FLOATS, QUANTIZED, DriverBench, mul_mat_id_case, nmse
from test_backend import Experts, run
from test_model import write_model

import pyggml as ggml
from pyggml.backends import cuda
from pyggml.backends.cuda import driver as cuda_driver
from pyggml.testing.fake_driver import FakeMachine

PRODUCTS = [(t, n) for t in QUANTIZED + FLOATS for n in (1, 8, 9, 33)]


# -- without a driver ------------------------------------------------------------


def stand_in_devices(n_card=1, **options):
    """Return devices whose cards are the real driver's code over the stand-in."""
    machine = FakeMachine(n_card, **options)
    api = cuda_driver._Api(Bindings(machine))
    return machine, [cuda.CudaDevice(cuda_driver.SystemCard(api, i)) for i in range(n_card)]


@pytest.mark.parametrize("seed", range(3))
def test_the_real_half(seed):
    """What calls the real driver gives a right answer where the bindings are replaced by a stand-in."""
    machine, (device,) = stand_in_devices(seed=seed)
    assert run(Experts(n_token=33), [device.backend()], parallel=seed == 2) < 5e-4
    assert machine.cards[0].traffic.n_launched


def test_the_real_half_reports_a_full_card():
    """Out of memory is the library's own error, with what is free."""
    _, (device,) = stand_in_devices(memory_bytes=4096)
    with pytest.raises(ggml.errors.OutOfMemoryError) as caught:
        device.buffer_type.alloc_buffer(5000)
    assert (caught.value.buft, caught.value.requested_bytes, caught.value.available_bytes) == ("CUDA0", 5000, 4096)


def test_the_real_half_copies_between_cards():
    """A copy to another card names both contexts."""
    machine, devices = stand_in_devices(2)
    tensors = []
    for device in devices:
        context = ggml.Context()
        tensors.append(context.new_tensor("f32", (8,), name=device.name))
        context.alloc(device)
    tensors[0].set_array(np.arange(8))
    first, second = (d.backend() for d in devices)
    assert second.cpy_tensor_async(first, *tensors)
    second.synchronize()
    assert np.array_equal(tensors[1].numpy(), np.arange(8, dtype="f4"))
    assert machine.cards[0].traffic.bytes_peer == 32


def test_the_stand_in_has_the_bindings_calls():
    """Every driver function that is called exists in the bindings, with as many parameters as the stand-in's."""
    module = importlib.import_module("cuda.bindings.driver")
    called = set(re.findall(r'"(cu[A-Z]\w+)"', inspect.getsource(cuda_driver)))
    assert len(called) > 20
    for name in called:
        line = getattr(module, name).__doc__.splitlines()[0]
        inside = line[line.index("(") + 1 : line.rindex(")")]
        n_real = len(inside.split(",")) if inside else 0
        assert n_real == len(inspect.signature(getattr(Bindings, name)).parameters) - 1, line


def test_why_there_is_no_card():
    """Without a driver the list of devices is empty, and one line says why."""
    if cuda.devices():
        pytest.skip("there is a card")
    reason = cuda.why_missing()
    assert reason
    assert "\n" not in reason
    with pytest.raises(ggml.errors.DeviceUnavailableError) as caught:
        cuda.open_device("0")
    assert reason in str(caught.value)


def test_the_program_says_so_in_one_line(tmp_path):
    """`pyggml run --device cuda:0,cpu` without a card ends with one line that says why."""
    if cuda.devices():
        pytest.skip("there is a card")
    path = write_model("qwen3moe", tmp_path / "model.gguf")
    command = [sys.executable, "-m", "pyggml", "run", str(path), "--device", "cuda:0,cpu", "--cpu-moe", "-p", "a"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert not done.stdout
    assert done.stderr == f"Error: cuda: {cuda.why_missing()}\n"


def test_importing_touches_no_driver():
    """The package and its CUDA backend are imported without the bindings, the compiler or a driver."""
    code = (
        "import sys, pyggml, pyggml.backends.cuda as c; "
        "bad = [m for m in sys.modules if m.split('.')[0] == 'cuda' or m.startswith(('numba', 'pyggml.kernels.cuda'))]; "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kernels_through_the_driver_interface():
    """The cases that the `gpu` tests run work over the fake driver."""
    bench = DriverBench(cuda.CudaDevice(FakeMachine().cards[0]))
    case = {"n_expert": 4, "n_row": 37, "n_k": 256, "n_used": 2, "n_token": 9}
    got, want = mul_mat_id_case(np.random.default_rng(0), bench, "q8_0", **case)
    assert nmse(got, want) < 5e-4
    bench.close()
    assert bench.device.card.used_bytes == 0


# -- with a card -----------------------------------------------------------------


@pytest.fixture
def device():
    """Give the first card of this machine."""
    found = cuda.devices()
    if not found:
        pytest.skip(f"no card: {cuda.why_missing()}")
    return found[0]


@pytest.mark.gpu
@pytest.mark.parametrize(("type", "n_token"), PRODUCTS)
def test_products_on_a_card(device, type, n_token):
    """MUL_MAT_ID of every type on a real card, both paths, agrees with float64."""
    bench = DriverBench(device)
    case = {"n_expert": 8, "n_row": 300, "n_k": 512, "n_used": 3, "n_token": n_token}
    got, want = mul_mat_id_case(np.random.default_rng(1), bench, type, **case)
    bench.close()
    assert nmse(got, want) < (5e-4 if type in QUANTIZED else 1e-8)


@pytest.mark.gpu
@pytest.mark.parametrize("n_token", [1, 33])
@pytest.mark.parametrize("parallel", [False, True])
def test_experts_on_a_card(device, n_token, parallel, monkeypatch):
    """The scheduler with used-expert copies on a real card."""
    monkeypatch.setenv("GGML_OP_OFFLOAD_MIN_BATCH", "1")
    assert run(Experts(n_token=n_token), [cuda.CudaDevice(device.card).backend()], n_run=5, parallel=parallel) < 5e-4


@pytest.mark.gpu
def test_two_cards_hand_over(device):
    """A copy between two real cards arrives."""
    if len(cuda.devices()) < 2:
        pytest.skip("one card only")
    tensors = []
    for d in cuda.devices()[:2]:
        context = ggml.Context()
        tensors.append(context.new_tensor("f32", (1024,), name=d.name))
        context.alloc(d)
    tensors[0].set_array(np.arange(1024))
    assert tensors[1].storage.cpy_tensor(*tensors)
    assert np.array_equal(tensors[1].numpy(), np.arange(1024, dtype="f4"))


@pytest.mark.gpu
@pytest.mark.parametrize("n_token", [1, 8, 64, 512])
@pytest.mark.parametrize("type", ["q8_0", "mxfp4", "f16"])
def test_bench_mul_mat_id(device, type, n_token, capsys):
    """Print how fast MUL_MAT_ID is: bytes of used weights, and multiply-adds, a second."""
    bench = DriverBench(device)
    work = {"n_expert": 32, "n_row": 2048, "n_k": 2048, "n_used": 4, "n_token": n_token}
    launches = []
    plain = bench.run
    bench.run = lambda made: (launches.extend(made), plain(made))
    mul_mat_id_case(np.random.default_rng(2), bench, type, **work)
    times = []
    for _ in range(20):
        bench.stream.synchronize()
        start = time.perf_counter()
        plain(launches)
        bench.stream.synchronize()
        times.append(time.perf_counter() - start)
    best = sorted(times)[len(times) // 2]
    n_used = min(work["n_expert"], work["n_used"] * n_token)
    n_bytes = n_used * work["n_row"] * ggml.Type.of(type).row_size(work["n_k"])
    n_fma = work["n_used"] * n_token * work["n_row"] * work["n_k"]
    with capsys.disabled():
        print(
            f"{type} {n_token}: {best * 1e6:.0f} µs, {n_bytes / best / 1e9:.0f} GB/s, {2 * n_fma / best / 1e12:.1f} TFLOP/s"
        )
    bench.close()
