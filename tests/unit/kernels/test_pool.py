"""The pool of threads, the plan's stages, stopping, and where compiled code lies."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import Memory
from pyggml.kernels.cpu import words
from pyggml.kernels.cpu.pool import Pool
from test_products import weights

from pyggml.backends.host.plan import HostPlan, kernels_of
from pyggml.errors import ComputeError
from pyggml.tensor import Tensor, pack_params
from pyggml.types import Op, TensorFlag, Type, UnaryOp


def chain(memory: Memory, n: int, width: int = 8192) -> tuple[list[Tensor], np.ndarray]:
    """Return a chain of alternating ops, each of which all threads share, and its result."""
    t = first = memory.tensor(np.ones((2, width), "f4"))
    nodes = []
    for i in range(n):
        src = (t, first) if i % 2 else (t,)
        op, params = (Op.ADD, ()) if i % 2 else (Op.SCALE, pack_params(0.5, 0.25))
        t = memory.node(op, t.ne, *src, params=params)
        nodes.append(t)
    value = np.float32(1)
    for i in range(n):
        value = value + np.float32(1) if i % 2 else value * np.float32(0.5) + np.float32(0.25)
    return nodes, np.full((2, width), value)


@pytest.mark.parametrize("can_sleep", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_plans_give_the_same_with_any_number_of_threads(memory, threads, can_sleep):
    """Threads wait for each other's results, more threads than cores included, whichever way they sleep."""
    pool = Pool(threads, can_sleep=can_sleep)
    try:
        nodes, want = chain(memory, 60)
        plan = HostPlan(nodes, lambda t: t.data)
        for _ in range(5):
            memory.arrays[-1][:] = 0xFF
            plan.run(pool)
            np.testing.assert_array_equal(memory.values(nodes[-1]), want)
    finally:
        pool.close()


def test_times_are_added_up_for_parts_and_stages(memory, pool):
    """Each descriptor's parts take some time, a stage at least as long as thread 0's, and no more is added once it is not asked for."""
    nodes, _ = chain(memory, 8, width=65536)
    plan = HostPlan(nodes, lambda t: t.data)
    times = np.zeros((plan.n_descriptors, 3), np.int64)
    plan.times = times.ctypes.data
    plan.run(pool)
    assert (times[:, :2] > 0).all()
    assert (times[:, 2] >= times[:, 0]).all()
    once, plan.times = times.copy(), 0
    plan.run(pool)
    assert (times == once).all()


def test_threads_wake_from_sleep(memory, pool):
    """A plan that comes after the threads went to sleep runs as well."""
    import time

    nodes, want = chain(memory, 6)
    plan = HostPlan(nodes, lambda t: t.data)
    for _ in range(3):
        time.sleep(0.05)
        plan.run(pool)
        np.testing.assert_array_equal(memory.values(nodes[-1]), want)


def test_pools_take_turns(memory, pool):
    """Several Python threads may run plans on one pool, and on pools of their own, at once."""
    other = Pool(2)
    plans = []
    for _ in range(4):
        nodes, want = chain(memory, 20)
        plans.append((HostPlan(nodes, lambda t: t.data), nodes[-1], want))
    failures = []

    def work(i: int) -> None:
        for _ in range(10):
            plan, node, want = plans[i]
            plan.run(pool if i % 2 else other)
            if not np.array_equal(memory.values(node), want):
                failures.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    other.close()
    assert not failures


def test_closed_pool_refuses_and_ends_its_threads(memory):
    """After close no thread is left, and a run says why it cannot."""
    before = set(threading.enumerate())
    pool = Pool(3)
    nodes, _ = chain(memory, 2)
    HostPlan(nodes, lambda t: t.data).run(pool)
    own = set(threading.enumerate()) - before
    assert len(own) == 2
    pool.close()
    for t in own:
        t.join(timeout=20)
        assert not t.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        HostPlan(nodes, lambda t: t.data).run(pool)


def test_abort_stops_at_the_next_op_and_the_pool_lives_on(memory, pool):
    """A stopped plan raises with status 1, and the same plan runs through afterwards."""
    rng = np.random.default_rng(0)
    w = weights(memory, rng, Type.Q8_0, (256, 256))
    t = memory.tensor(rng.standard_normal((64, 256), dtype="f4"))
    nodes = []
    for _ in range(2000):
        t = memory.node(Op.MUL_MAT, (256, 64), w, t)
        t = memory.node(Op.UNARY, (256, 64), t, params=(int(UnaryOp.TANH),), into=t)
        nodes += [t.src[0], t]
    plan = HostPlan(nodes, lambda t: t.data)
    timer = threading.Timer(0.02, pool.abort)
    timer.start()
    with pytest.raises(ComputeError, match="stopped") as caught:
        plan.run(pool)
    timer.join()
    assert caught.value.status == 1
    HostPlan(nodes[:4], lambda t: t.data).run(pool)
    assert np.isfinite(memory.values(nodes[3])).all()


def test_long_plans_come_back_to_python(memory, pool):
    """A plan of seconds is cut, so that Ctrl-C is heard."""
    rng = np.random.default_rng(0)
    w = weights(memory, rng, Type.F32, (512, 512))
    x = memory.tensor(rng.standard_normal((256, 512), dtype="f4"))
    nodes = [memory.node(Op.MUL_MAT, (512, 256), w, x) for _ in range(80)]
    plan = HostPlan(nodes, lambda t: t.data)
    assert len(plan._pieces) > 1
    assert sum(n for _, n in plan._pieces) == plan.n_descriptors


def test_only_what_computes_is_in_a_plan(memory):
    """Views, empty tensors and nodes without the COMPUTE flag make no kernel call."""
    x = memory.tensor(np.ones((4, 8), "f4"))
    node = memory.node(Op.SCALE, x.ne, x, params=pack_params(2.0, 0.0))
    idle = memory.node(Op.SCALE, x.ne, x, params=pack_params(3.0, 0.0))
    idle.flags = TensorFlag.NONE
    empty = memory.place(Tensor(Type.F32, (8, 0), op=Op.SCALE, src=(x,), flags=TensorFlag.COMPUTE))
    plan = HostPlan([memory.permute(x, 1, 0), node, idle, empty, x], lambda t: t.data)
    assert plan.n_descriptors == 1


def test_nodes_run_one_by_one(memory, pool):
    """A plan that shares nothing runs node by node, for traces and callbacks."""
    rng = np.random.default_rng(0)
    ws = [weights(memory, rng, Type.Q8_0, (32, 64)) for _ in range(2)]
    x = memory.tensor(rng.standard_normal((3, 64), dtype="f4"))
    nodes = [memory.node(Op.MUL_MAT, (32, 3), w, x) for w in ws]
    plan = HostPlan(nodes, lambda t: t.data, share=False)
    for i in (1, 0):
        plan.run_node(i, pool)
    alone = [memory.values(n) for n in nodes]
    HostPlan(nodes, lambda t: t.data).run(pool)
    for before, node in zip(alone, nodes, strict=True):
        np.testing.assert_array_equal(before, memory.values(node))
    with pytest.raises(ValueError, match="share=False"):
        HostPlan(nodes, lambda t: t.data).run_node(0, pool)


def test_independent_products_do_not_wait_for_each_other(memory):
    """Threads meet only where one op needs another's result."""
    rng = np.random.default_rng(0)
    x = memory.tensor(rng.standard_normal((64, 256), dtype="f4"))
    products = [memory.node(Op.MUL_MAT, (256, 64), weights(memory, rng, Type.F32, (256, 256)), x) for _ in range(3)]
    total = memory.node(Op.ADD, (256, 64), products[0], products[2])
    plan = HostPlan([*products, total], lambda t: t.data)
    assert [plan._words[s + words.STAGE] for s in plan._starts] == [3, 0, 0, 1]
    assert plan._words[plan._starts[0] + words.PARALLEL] == 1


CHILD = """
import numpy as np
from pyggml.kernels.cpu import cache
from pyggml.kernels.cpu.activations import quantise_row_q8_0
x, q = np.full(32, 2.54, np.float32), np.zeros(48, np.uint8)
quantise_row_q8_0(x.ctypes.data, q.ctypes.data, 1, 0)
assert (q[:32] == 127).all()
print(cache.CACHE_DIR, quantise_row_q8_0.from_cache, sep="\\n")
"""


def child(**environment: str) -> list[str]:
    """Compile one kernel in a fresh process; return the cache folder and whether the kernel was found there."""
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", CHILD], env=env, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_cache_folder(tmp_path):
    """Code is found again below NUMBA_CACHE_DIR, in a folder named after the sources; elsewhere if it is read-only."""
    from pyggml.kernels.cpu.cache import source_hash

    folder, found = child(NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert (Path(folder), found) == (tmp_path / "cache" / source_hash(), "False")
    assert child(NUMBA_CACHE_DIR=str(tmp_path / "cache")) == [folder, "True"]
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    elsewhere, found = child(NUMBA_CACHE_DIR=str(blocked))
    assert not elsewhere.startswith(str(blocked))
    assert not Path(elsewhere).exists()  # it went with the process


def test_a_damaged_file_of_the_cache_is_compiled_again(tmp_path):
    """Whatever happened to the index or the code of a kernel, the next use compiles it, and the one after it finds it mended."""
    code = (
        CHILD
        + """
from pathlib import Path
from pyggml.kernels.cpu.kernel import KERNELS, Kernel

def used_again():
    kernel = KERNELS.pop("quantise_row_q8_0")  # a new object loads its code as a new process does
    kernel = Kernel(kernel.function, kernel.n)
    q[:] = 0
    kernel(x.ctypes.data, q.ctypes.data, 1, 0)
    assert (q[:32] == 127).all()
    return kernel.from_cache

def changed(raw, i, bits):
    return raw[:i] + bytes([raw[i] ^ bits]) + raw[i + 1 :]

for ending, damages in ((".nbc", 4), (".nbi", 3)):  # a byte of the index may be one that is not looked at
    for damage in range(damages):
        file = next(Path(cache.CACHE_DIR).rglob("*" + ending))
        raw = file.read_bytes()
        file.write_bytes((b"", raw[: len(raw) // 2], changed(raw, 0, 255), changed(raw, 2 * len(raw) // 3, 16))[damage])
        assert not used_again(), (ending, damage)
        assert used_again(), (ending, damage)
"""
    )
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_importing_the_package_is_cheap():
    """`pyggml.kernels` and the backends' questions about support need no Numba."""
    code = (
        "import sys, pyggml.kernels, pyggml.kernels.cpu, pyggml.backends.host.plan; assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_pool_after_fork_starts_new_threads(tmp_path):
    """A forked child has no threads but its own: the pool starts others, in a process that never ran pytest."""
    code = """
import os, sys, numpy as np, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from pyggml.kernels.cpu.pool import Pool
from pyggml.backends.host.plan import HostPlan, kernels_of
from pyggml.tensor import Tensor, pack_params
from pyggml.types import Op
x, y = np.ones(100_000, "f4"), np.zeros(100_000, "f4")
a = Tensor("f32", (100_000,)); a.data = x.ctypes.data
b = Tensor("f32", (100_000,), op=Op.SCALE, src=(a,), op_params=pack_params(2.0, 0.0), flags=16); b.data = y.ctypes.data
plan, pool = HostPlan([b], lambda t: t.data), Pool(2)
plan.run(pool)
pid = os.fork()
if pid == 0:
    y[:] = 0
    plan.run(pool)
    os._exit(0 if (y == 2).all() else 1)
status = os.waitpid(pid, 0)[1]
plan.run(pool)
sys.exit(os.waitstatus_to_exitcode(status))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_fork_waits_for_kernels_that_another_thread_loads():
    """No child begins with Numba half imported or its compiler's lock held for ever: it would fail, or never end."""
    code = """
import os, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from pyggml.opset import kernels
from pyggml.kernels.cpu.loading import LOADING
started, done = threading.Event(), []
def load():
    with LOADING:
        started.set()
        time.sleep(0.3)
        kernels.words  # of a module that brings no Numba
        done.append(True)
threading.Thread(target=load).start()
started.wait()
pid = os.fork()
if pid == 0:
    with LOADING:
        os._exit(0 if done else 1)
status = os.waitpid(pid, 0)[1]
with LOADING:
    sys.exit(os.waitstatus_to_exitcode(status))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_ctrl_c_is_heard_while_a_plan_runs(memory, pool):
    """KeyboardInterrupt comes out of a running plan, and plan and pool can be used again."""
    import _thread

    rng = np.random.default_rng(0)
    w = weights(memory, rng, Type.F32, (512, 512))
    x = memory.tensor(rng.standard_normal((256, 512), dtype="f4"))
    nodes = [memory.node(Op.MUL_MAT, (512, 256), w, x) for _ in range(60)]
    plan = HostPlan(nodes * 40, lambda t: t.data)  # seconds
    timer = threading.Timer(0.05, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        plan.run(pool)
    timer.join()
    HostPlan(nodes[:1], lambda t: t.data).run(pool)
    np.testing.assert_allclose(memory.values(nodes[0]), memory.values(x) @ memory.values(w).T, rtol=1e-3, atol=1e-3)


def test_warm_up_tells_of_each_kernel():
    """Warm-up names every kernel but rare ones once, counts them, and leaves all compiled."""
    from pyggml.kernels.cpu.kernel import KERNELS, warm_up

    told = []
    warm_up(lambda name, i, n: told.append((name, i, n)))
    names = {k.name for k in KERNELS.values() if not k.rare}
    assert [i for _, i, _ in told] == list(range(len(names) + 1))
    assert {name for name, _, _ in told[:-1]} == names
    assert told[-1] == ("", len(names), len(names))


def test_two_processes_compile_and_what_either_made_is_used(tmp_path):
    """With an empty cache a second process compiles from the end, and this one loads what it has made."""
    code = """
import os
os.cpu_count = lambda: 2
from pyggml.kernels.cpu import kernel
few = [k for k in kernel.common_kernels() if k.name in ("quantise_row_q8_0", "sum_all", "group_by_expert")]
assert len(few) == 3 and kernel.missing(few) == few
started, plain = [], kernel._helper
kernel._helper = lambda names: started.append((names, plain(names))) or started[0][1]
kernel.warm_up(lambda name, i, n: i == 1 and started[0][1].wait(), few)
((names, process),) = started
print(names == [k.name for k in few[::-1]], process.returncode, kernel.missing(few), [k.from_cache for k in few[1:]])
"""
    env = dict(os.environ, NUMBA_CACHE_DIR=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False, env=env
    )
    assert done.stdout == "True 0 [] [True, True]\n", done.stderr


def test_kernels_that_nodes_need_are_found_without_compiling(memory, monkeypatch):
    """What is found before a plan is made is what the plan calls, also through parameters, and nothing else is loaded."""
    from pyggml.kernels.cpu.kernel import KERNELS

    rng = np.random.default_rng(0)
    w = weights(memory, rng, Type.Q8_0, (256, 256))
    x = memory.tensor(rng.standard_normal((2, 256), dtype="f4"))
    row = memory.node(Op.GET_ROWS, (256, 1), w, memory.tensor(np.asarray([3], "i4")))
    nodes = [row, memory.node(Op.MUL_MAT, (256, 2), w, x), memory.node(Op.SCALE, x.ne, x, params=pack_params(2.0, 0.0))]
    plan = HostPlan(nodes, lambda t: t.data)
    names = {k._address: k.name for k in KERNELS.values() if k._address}
    called = {names[word] for word in plan._words if word in names}
    assert {"get_rows", "dequantise_q8_0", "mul_mat", "rows_q8_0", "map_rows"} <= called
    for kernel in list(KERNELS.values()):
        monkeypatch.setattr(kernel, "_address", 0)
    found = kernels_of(nodes)
    assert {k.name for k in found} == called | {"place_product"}
    assert not any(k._address for k in found)
