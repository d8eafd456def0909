"""The PTX emulator: right results, exact counts, and an error for each thing a kernel must not do."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

cuda = pytest.importorskip("numba.cuda")
import emulator_kernels as X
import fast_tile as F
from numba import types as T

from pyggml.testing.ptxemu import (
    BarrierError,
    Memory,
    Misaligned,
    OutOfBounds,
    Program,
    PtxError,
    Race,
    Uninitialised,
)
from pyggml.testing.ptxemu.bridge import EmuKernel

CCS = [(7, 5), (8, 6), (9, 0), (12, 0)]


def A(dt, n=1):
    """Return the type of a contiguous array."""
    return T.Array(dt, n, "C")


f32, i32 = T.float32, T.int32


@pytest.fixture(params=CCS, ids=lambda c: f"sm_{c[0]}{c[1]}")
def cc(request):
    """Give one compute capability after the other."""
    return request.param


def test_gather_and_sectors(cc):
    """Sectors of a gather are exact for patterns whose answer is known."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(1 << 20).astype("f4")
    k = EmuKernel(*X.SIGNATURES["gather"], cc=cc)
    for idx, want in ((np.arange(1024), 128), (np.arange(1024) * 8, 1024), (np.zeros(1024, int), 32)):
        idx, y = idx.astype("i4"), np.zeros(1024, "f4")
        st = k[8, 128](x, idx, y, 1024)
        assert np.array_equal(y, x[idx])
        assert st.global_load_sectors == want + 128  # the values, and the indices
        assert st.global_store_sectors == 128


def test_reduce(cc):
    """A reduction in shared memory gives the sum, and its barriers are counted."""
    x = np.random.default_rng(1).standard_normal(64 * 64 * 4).astype("f4")
    y = np.zeros(64, "f4")
    st = EmuKernel(*X.SIGNATURES["reduce_block"], cc=cc)[64, 64](x, y, x.size, racecheck=True)
    assert np.allclose(y, x.reshape(4, 64, 64).astype("f8").sum(0).sum(1), atol=1e-5)
    assert st.barriers == 64 * 7


def test_mul_mat_id_f32(cc):
    """A tile kernel gives the bits that the same operations in the same order give in numpy."""
    w, x, ids, plan = X.mmid_case(8, 256, 256, 64, 2)
    dst = np.full((128, 256), np.nan, "f4")
    st = EmuKernel(*X.SIGNATURES["mmid_f32"], cc=cc)[plan.grid, 128](
        w, x, dst, plan.row_src, plan.row_dst, plan.bounds, 256, 256
    )
    ref = np.einsum("smk,sk->sm", w[ids.ravel()], x[np.arange(128) // 2], dtype="f8", optimize=True)
    assert np.abs(dst - ref).max() < 1e-4
    # the same order of the same fused operations gives the same bits
    acc = np.zeros((128, 256), "f4")
    for kk in range(256):
        acc = (w[ids.ravel(), :, kk].astype("f8") * x[np.arange(128) // 2, kk, None] + acc).astype("f4")
    assert np.array_equal(acc.view("u4"), dst.view("u4"))
    assert st.local_accesses == 0


def test_mmvq_q8_0(cc):
    """dp4a through inline PTX and shuffles give the right dot products."""
    rng = np.random.default_rng(2)
    E, M, nb, S = 8, 64, 8, 8
    wq = rng.integers(-127, 128, (E, M, nb, 32)).astype("i1")
    xq = rng.integers(-127, 128, (S, nb, 32)).astype("i1")
    wd, xd = rng.random((E, M, nb)).astype("f2"), rng.random((S, nb)).astype("f4")
    ids, dst = rng.integers(0, E, S).astype("i4"), np.full((S, M), np.nan, "f4")
    EmuKernel(*X.SIGNATURES["mmvq_q8_0"], cc=cc)[(M // 4, S), (32, 4)](
        wq.view("i4"), wd, xq.view("i4"), xd, ids, dst, M, nb
    )
    isum = (wq[ids].astype("i8") * xq[:, None].astype("i8")).sum(-1)
    ref = (isum * wd[ids].astype("f8") * xd[:, None].astype("f8")).sum(-1)
    assert np.allclose(dst, ref, rtol=1e-5, atol=1e-2)


def test_out_of_bounds():
    """A read past the end names the buffer, the offset and the thread."""
    k = EmuKernel(*X.SIGNATURES["gather"])
    x, y = np.zeros(100, "f4"), np.zeros(64, "f4")
    idx = np.arange(64).astype("i4")
    idx[37] = 100
    with pytest.raises(OutOfBounds, match=r"offset 400 of 'arg0' .*thread \(5,0,0\)"):
        k[2, 32](x, idx, y, 64)
    with pytest.raises(OutOfBounds):
        k[3, 32](x, np.arange(64).astype("i4"), y, 96)


def test_misaligned():
    """A pointer that is no multiple of the access's size is an error."""
    ptx, _ = cuda.compile_ptx(X.copy1, (T.CPointer(f32), T.CPointer(f32)), cc=(8, 6))
    mem = Memory()
    a, b = mem.upload(np.arange(40, dtype="f4")), mem.alloc(128)
    k = Program(ptx, mem).kernel()
    k.launch(1, 32, [a, b])
    assert np.array_equal(mem.read(b, "f4"), np.arange(32))
    with pytest.raises(Misaligned):
        k.launch(1, 32, [a.addr + 2, b])


def test_uninitialised_shared_and_global():
    """Reading what nobody wrote is an error."""

    def f(o, n):
        s = cuda.shared.array(64, f32)
        t = cuda.threadIdx.x
        if t < n:
            s[t] = t
        cuda.syncthreads()
        o[t] = s[63 - t]

    k = EmuKernel(f, (A(f32), i32))
    k[1, 64](np.zeros(64, "f4"), 64)
    with pytest.raises(Uninitialised):
        k[1, 64](np.zeros(64, "f4"), 63)
    ptx, _ = cuda.compile_ptx(X.copy1, (T.CPointer(f32), T.CPointer(f32)), cc=(8, 6))
    mem = Memory(track_init=True)
    with pytest.raises(Uninitialised):
        Program(ptx, mem).kernel().launch(1, 32, [mem.alloc(128), mem.alloc(128)])


def test_missing_barrier_is_a_race():
    """Two warps that share a word without a barrier between are found."""

    def f(o):
        s = cuda.shared.array(64, f32)
        t = cuda.threadIdx.x
        s[t] = t
        o[t] = s[63 - t]

    k = EmuKernel(f, (A(f32),))
    with pytest.raises(Race):
        k[1, 64](np.zeros(64, "f4"), racecheck=True)


def test_barrier_in_divergent_code():
    """Threads of a block that wait at different barriers are found."""

    def f(o):
        t = cuda.threadIdx.x
        if t < 40:
            o[t] = 1
            cuda.syncthreads()
            o[t] = 2
        else:
            o[t] = 3
            cuda.syncthreads()
            o[t] = 4

    with pytest.raises(BarrierError):
        EmuKernel(f, (A(f32),))[1, 64](np.zeros(64, "f4"))


def test_shuffle_from_inactive_lane():
    """A shuffle that reads a lane which is not there is found."""

    def f(o):
        t = cuda.threadIdx.x
        if t < 20:
            o[t] = cuda.shfl_down_sync(0xFFFFF, t, 1)

    with pytest.raises(PtxError, match="not active"):
        EmuKernel(f, (A(i32),))[1, 32](np.zeros(32, "i4"))


def test_divergence_loops_and_atomics(cc):
    """Lanes that go different ways through a loop meet again."""

    def f(o, c):
        i = cuda.grid(1)
        n, s = i % 7, 0
        for j in range(n):
            if j % 2:
                s += j
            else:
                s -= 3 * j
        o[i] = s
        cuda.atomic.add(c, i % 3, 1)

    o, c = np.zeros(500, "i4"), np.zeros(3, "i4")
    EmuKernel(f, (A(i32), A(i32)), cc=cc)[5, 100](o, c)
    want = [sum(j if j % 2 else -3 * j for j in range(i % 7)) for i in range(500)]
    assert o.tolist() == want
    assert c.tolist() == [167, 167, 166]


def test_local_array_and_integer_division(cc):
    """The stack, and division and remainder of negative numbers, follow PTX."""

    def f(o, d):
        a = cuda.local.array(16, i32)
        i = cuda.grid(1)
        for j in range(16):
            a[(j * 5 + i) % 16] = j * i
        o[i] = a[d[i] % 16] // 3 - (a[(d[i] + 1) % 16] % 5)

    d = np.random.default_rng(3).integers(0, 99, 64).astype("i4")
    o = np.zeros(64, "i4")
    EmuKernel(f, (A(i32), A(i32)), cc=cc)[2, 32](o, d)
    want = []
    for i in range(64):
        a = [0] * 16
        for j in range(16):
            a[(j * 5 + i) % 16] = j * i
        want.append(a[d[i] % 16] // 3 - (a[(d[i] + 1) % 16] % 5))
    assert o.tolist() == want


def test_float_functions_and_conversions(cc):
    """Functions from libdevice and conversions agree with numpy."""

    def f(x, o, q):
        i = cuda.grid(1)
        v = x[i]
        o[0, i] = math.exp(v)
        o[1, i] = math.sqrt(abs(v)) / (f32(1) + v * v)
        o[2, i] = math.tanh(v)
        o[3, i] = f32(T.float16(v))
        q[i] = i32(v * f32(1000))

    x = np.linspace(-8, 8, 256).astype("f4")
    o, q = np.zeros((4, 256), "f4"), np.zeros(256, "i4")
    EmuKernel(f, (A(f32), A(f32, 2), A(i32)), cc=cc)[2, 128](x, o, q)
    assert np.allclose(o[0], np.exp(x), rtol=3e-7)
    assert np.allclose(o[1], np.sqrt(np.abs(x)) / (1 + x * x), rtol=3e-7)
    assert np.allclose(o[2], np.tanh(x), rtol=1e-6, atol=1e-7)
    assert np.array_equal(o[3], x.astype("f2").astype("f4"))
    assert np.array_equal(q, (x * np.float32(1000)).astype("i4"))


MMA = """.version 7.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 a, .param .u64 b, .param .u64 d){
 .reg .b32 %r<9>; .reg .f32 %f<5>; .reg .b64 %rd<9>;
 ld.param.u64 %rd1, [a]; ld.param.u64 %rd2, [b]; ld.param.u64 %rd3, [d];
 mov.u32 %r7, %tid.x;
 mul.wide.u32 %rd4, %r7, 16; add.s64 %rd1, %rd1, %rd4; add.s64 %rd3, %rd3, %rd4;
 mul.wide.u32 %rd5, %r7, 8; add.s64 %rd2, %rd2, %rd5;
 ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1];
 ld.global.v2.u32 {%r5, %r6}, [%rd2];
 mov.f32 %f1, 0f00000000;
 MMAOP
 st.global.v4.DT [%rd3], {RES};
 ret; }
"""


@pytest.mark.parametrize("kind", ["f16", "bf16", "s8"])
def test_mma(kind):
    """Matrix products of fragments agree with numpy, row = lane // 4, column = lane % 4 groups."""
    rng = np.random.default_rng(5)
    if kind == "s8":
        K, per = 32, 4
        a, b = rng.integers(-128, 128, (16, K)).astype("i1"), rng.integers(-128, 128, (K, 8)).astype("i1")
        fa, fb = a, b
        op, dt, res = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", "u32", "%r1, %r2, %r3, %r4"
        text = "mov.u32 %r8, 0; " + op + " {%r1,%r2,%r3,%r4},{%r1,%r2,%r3,%r4},{%r5,%r6},{%r8,%r8,%r8,%r8};"
    else:
        K, per = 16, 2
        a, b = rng.standard_normal((16, K)).astype("f2"), rng.standard_normal((K, 8)).astype("f2")
        fa, fb = a, b
        if kind == "bf16":
            fa, fb = ((v.astype("f4").view("u4") >> 16).astype("u2") for v in (a, b))
            a, b = ((v.astype("u4") << 16).view("f4") for v in (fa, fb))
        op, dt, res = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32", "f32", "%f1, %f2, %f3, %f4"
        text = op + " {%f1,%f2,%f3,%f4},{%r1,%r2,%r3,%r4},{%r5,%r6},{%f1,%f1,%f1,%f1};"
    A_, B_ = np.zeros((32, 4, per), fa.dtype), np.zeros((32, 2, per), fb.dtype)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for r in range(4):
            for e in range(per):
                A_[lane, r, e] = fa[g + 8 * (r % 2), t * per + e + (r // 2) * K // 2]
        for r in range(2):
            for e in range(per):
                B_[lane, r, e] = fb[t * per + e + r * K // 2, g]
    mem = Memory()
    d = mem.alloc(512)
    ptx = MMA.replace("MMAOP", text).replace("DT", dt).replace("RES", res)
    Program(ptx, mem).kernel().launch(1, 32, [mem.upload(A_), mem.upload(B_), d])
    D = mem.read(d, "i4" if kind == "s8" else "f4", (32, 4))
    ref = a.astype("f8") @ b.astype("f8")
    for lane in range(32):
        g, t = divmod(lane, 4)
        for r in range(4):
            assert abs(D[lane, r] - ref[g + 8 * (r // 2), t * 2 + r % 2]) < 1e-4


@pytest.mark.parametrize("cc", [(8, 6), pytest.param((12, 0), marks=pytest.mark.slow)], ids=["sm_86", "sm_120"])
def test_fast_mul_mat_id(cc):
    """The unrolled tile with 16-byte loads gives the same bits, without a race."""
    w, x, ids, plan = X.mmid_case(8, 128, 96, 64, 2, seed=3)
    k = F.kernel(cc)
    assert all(re.search(rf"ld\.{sp}\.v4\.[bf]32", k.ptx) for sp in ("global", "shared"))
    dst = np.full((128, 128), np.nan, "f4")
    k[plan.grid, 128](w, x, dst, plan.row_src, plan.row_dst, plan.bounds, 128, 96, racecheck=True)
    acc = np.zeros((128, 128), "f4")
    for kk in range(96):
        acc = (w[ids.ravel(), :, kk].astype("f8") * x[np.arange(128) // 2, kk, None] + acc).astype("f4")
    assert np.array_equal(acc.view("u4"), dst.view("u4"))


def test_device_function_for_several_targets():
    """One device function compiles for several targets in one process."""

    @cuda.jit(device=True)
    def twice(v):
        return v * f32(2)

    def f(x, o):
        o[cuda.grid(1)] = twice(x[cuda.grid(1)])

    for cc in CCS:
        x, o = np.arange(32, dtype="f4"), np.zeros(32, "f4")
        EmuKernel(f, (A(f32), A(f32)), cc=cc)[1, 32](x, o)
        assert np.array_equal(o, 2 * x), cc


LDM = """.version 7.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 a, .param .u64 d){
 .reg .b32 %r<9>; .reg .b64 %rd<9>; .shared .align 16 .b8 sm[512];
 ld.param.u64 %rd1, [a]; ld.param.u64 %rd3, [d];
 mov.u32 %r7, %tid.x; mov.u64 %rd7, sm;
 mul.wide.u32 %rd4, %r7, 16; add.s64 %rd1, %rd1, %rd4; add.s64 %rd3, %rd3, %rd4; add.s64 %rd7, %rd7, %rd4;
 cp.async.cg.shared.global [%rd7], [%rd1], 16;
 cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
 ldmatrix.sync.aligned.m8n8.x4TR.shared.b16 {%r1, %r2, %r3, %r4}, [%rd7];
 st.global.v4.u32 [%rd3], {%r1, %r2, %r3, %r4};
 ret; }
"""


@pytest.mark.parametrize("tr", ["", ".trans"])
def test_ldmatrix_and_cp_async(tr):
    """cp.async and ldmatrix move the values that the PTX ISA says."""
    m = np.arange(4 * 64, dtype="u2").reshape(4, 8, 8)
    mem = Memory()
    d = mem.alloc(512)
    st = Program(LDM.replace("TR", tr), mem).kernel().launch(1, 32, [mem.upload(m), d])
    out = mem.read(d, "u2", (32, 4, 2))
    for lane in range(32):
        for q in range(4):
            for e in range(2):
                r, c = lane // 4, lane % 4 * 2 + e
                assert out[lane, q, e] == (m[q, c, r] if tr else m[q, r, c])
    assert st.global_load_unique == 16


def test_cp_async_from_numba():
    """cp.async written as an intrinsic works."""
    from llvmlite import ir
    from numba.cuda.extending import intrinsic

    @intrinsic
    def copy16(typingctx, arr, i, p):
        def codegen(context, builder, sig, args):
            a = context.make_array(sig.args[0])(context, builder, args[0])
            q = builder.gep(a.data, [args[1]])
            s = builder.addrspacecast(q, ir.PointerType(ir.FloatType(), 3))
            s, g = builder.ptrtoint(s, ir.IntType(32)), builder.ptrtoint(args[2], ir.IntType(64))
            f = ir.FunctionType(ir.VoidType(), [ir.IntType(32), ir.IntType(64)])
            builder.call(ir.InlineAsm(f, "cp.async.cg.shared.global [$0], [$1], 16;", "r,l,~{memory}", True), [s, g])
            return context.get_dummy_value()

        return T.void(arr, T.uint64, p), codegen

    @intrinsic
    def wait_all(typingctx):
        def codegen(context, builder, sig, args):
            f = ir.FunctionType(ir.VoidType(), [])
            builder.call(ir.InlineAsm(f, "cp.async.wait_all;", "~{memory}", True), [])
            return context.get_dummy_value()

        return T.void(), codegen

    @intrinsic
    def offset(typingctx, p, i):
        return p(p, T.uint64), lambda context, builder, sig, args: builder.gep(args[0], [args[1]])

    def f(p, o):
        s = cuda.shared.array(128, f32, alignment=16)
        i = T.uint64(cuda.threadIdx.x) * T.uint64(4)
        copy16(s, i, offset(p, i))
        wait_all()
        cuda.syncthreads()
        for j in range(4):
            o[i + T.uint64(j)] = s[T.uint64(127) - i - T.uint64(j)]

    x, o = np.arange(128, dtype="f4"), np.zeros(128, "f4")
    EmuKernel(f, (T.CPointer(f32), T.CPointer(f32)), cc=(8, 0))[1, 32](x, o)
    assert np.array_equal(o, x[::-1])


def test_external_call_is_reported():
    """A call that the kernel reaches is an error."""

    def f(x, o):
        i = cuda.grid(1)
        if x[i] > T.float16(2):
            o[i] = x[i] * x[i]  # float16 products are calls in numba-cuda

    k = EmuKernel(f, (A(T.float16), A(T.float16)))
    if ".extern .func" not in k.ptx:
        pytest.skip("float16 products are inline here")
    x = np.zeros(32, "f2")
    with pytest.raises(PtxError, match="called"):
        k[1, 32](x + 3, x.copy())
