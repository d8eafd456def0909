"""The same MUL_MAT_ID tile as emulator_kernels.mmid_f32, written so that NVVM makes the code a CUDA C++ compiler would.

What changes: pointers instead of numba arrays (no 64-bit strides, no wrap-around of negative indices), unsigned
indices, 16-byte loads through intrinsics, scalar accumulators, and unrolling by generating the source.
"""

from __future__ import annotations

from functools import cache

from llvmlite import ir
from numba import cuda
from numba import types as T
from numba.cuda.extending import intrinsic

from pyggml.testing.ptxemu.bridge import EmuKernel

f32, i32, u32, u64, P = T.float32, T.int32, T.uint32, T.uint64, T.CPointer
_I32 = ir.IntType(32)


def _vec4(context, builder, ret, ptr):
    q = builder.bitcast(ptr, ir.VectorType(ir.FloatType(), 4).as_pointer(ptr.type.addrspace))
    v = builder.load(q)
    v.align = 16
    return context.make_tuple(builder, ret, [builder.extract_element(v, ir.Constant(_I32, j)) for j in range(4)])


@intrinsic
def ldg4(typingctx, p, i):
    """p[i:i+4] in one 16-byte load; the address must be a multiple of 16 bytes"""

    def codegen(context, builder, sig, args):
        return _vec4(context, builder, sig.return_type, builder.gep(args[0], [args[1]]))

    return T.UniTuple(T.float32, 4)(p, T.uint64), codegen


@intrinsic
def lds4(typingctx, arr, i):
    """arr[i:i+4] of a one-dimensional shared array (made with alignment=16) in one 16-byte load"""

    def codegen(context, builder, sig, args):
        a = context.make_array(sig.args[0])(context, builder, args[0])
        return _vec4(context, builder, sig.return_type, builder.gep(a.data, [args[1]]))

    return T.UniTuple(T.float32, 4)(arr, T.uint64), codegen


_SRC = """
def mmid_fast(w, x, dst, row_src, row_dst, bounds, M, K):
    sw = cuda.shared.array({swn}, f32, alignment=16)
    sx = cuda.shared.array({sxn}, f32, alignment=16)
    e = u32(cuda.blockIdx.z)
    lo = u32(bounds[e])
    hi = u32(bounds[e + u32(1)])
    n0 = lo + u32(cuda.blockIdx.y) * u32(32)
    if n0 >= hi:
        return
    m0 = u32(cuda.blockIdx.x) * u32(64)
    t = u32(cuda.threadIdx.x)
    tm = (t & u32(15)) * u32(4)
    tn = (t >> u32(4)) * u32(4)
    lr = t >> u32(2)
    lk = (t & u32(3)) * u32(4)
    c = n0 + lr
    has = c < hi
    xr = u64(0)
    if has:
        xr = u64(row_src[c]) * u64(K)
    w0 = (u64(e) * u64(M) + u64(m0 + lr)) * u64(K) + u64(lk)
    w1 = w0 + u64(32) * u64(K)
    xr += u64(lk)
{init}
    k0 = u32(0)
    while k0 < u32(K):
        a0, a1, a2, a3 = ldg4(w, w0 + u64(k0))
        b0, b1, b2, b3 = ldg4(w, w1 + u64(k0))
        c0 = f32(0)
        c1 = f32(0)
        c2 = f32(0)
        c3 = f32(0)
        if has:
            c0, c1, c2, c3 = ldg4(x, xr + u64(k0))
{store}
        cuda.syncthreads()
{body}
        cuda.syncthreads()
        k0 += u32(16)
{out}
"""
WP, XP = 68, 36  # padded rows of the tiles, in floats (multiples of 4)


def build():
    """K must be a multiple of 16, M of 64; 128 threads a block; grid (M/64, tiles, experts)."""
    r4 = range(4)
    init = [f"    s{i}{j} = f32(0)" for i in r4 for j in r4]
    store = [
        f"        s{n}[(lk + u32({q})) * u32({p}) + lr{off}] = {v}{q}"
        for q in r4
        for n, p, off, v in (("w", WP, "", "a"), ("w", WP, " + u32(32)", "b"), ("x", XP, "", "c"))
    ]
    body = []
    for k in range(16):
        body.append(f"        p0, p1, p2, p3 = lds4(sw, u64(tm + u32({k * WP})))")
        body.append(f"        q0, q1, q2, q3 = lds4(sx, u64(tn + u32({k * XP})))")
        body += [f"        s{i}{j} += p{i} * q{j}" for i in r4 for j in r4]
    out = []
    for j in r4:
        out += [f"    c = n0 + tn + u32({j})", "    if c < hi:", "        d = u64(row_dst[c]) * u64(M) + u64(m0 + tm)"]
        out += [f"        dst[d + u64({i})] = s{i}{j}" for i in r4]
    src = _SRC.format(
        swn=16 * WP, sxn=16 * XP, init="\n".join(init), store="\n".join(store), body="\n".join(body), out="\n".join(out)
    )
    ns = {"cuda": cuda, "f32": f32, "u32": u32, "u64": u64, "ldg4": ldg4, "lds4": lds4}
    exec(src, ns)  # noqa: S102
    return ns["mmid_fast"]


SIGNATURE = (P(f32), P(f32), P(f32), P(i32), P(i32), P(i32), i32, i32)


@cache
def kernel(cc):
    """Return the tile, compiled for a compute capability."""
    return EmuKernel(build(), SIGNATURE, cc=cc)
