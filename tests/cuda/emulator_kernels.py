"""Small kernels that the emulator's own tests run."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from llvmlite import ir
from numba import cuda
from numba import types as T
from numba.cuda.extending import intrinsic

f32, i32 = T.float32, T.int32


@intrinsic
def dp4a(typingctx, a, b, c):
    """C + the dot product of four signed bytes (sm_61 and later)"""

    def codegen(context, builder, sig, args):
        fty = ir.FunctionType(ir.IntType(32), [ir.IntType(32)] * 3)
        return builder.call(ir.InlineAsm(fty, "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", side_effect=False), args)

    return T.int32(T.int32, T.int32, T.int32), codegen


def copy1(p, o):
    """Copy one value a thread."""
    o[cuda.grid(1)] = p[cuda.grid(1)]


def gather(x, idx, y, n):
    """Gather by index."""
    i = cuda.grid(1)
    if i < n:
        y[i] = x[idx[i]]


def reduce_block(x, y, n):
    """Add up in shared memory, one sum a block."""
    s = cuda.shared.array(64, f32)
    t = cuda.threadIdx.x
    i = cuda.blockIdx.x * cuda.blockDim.x + t
    v = f32(0)
    while i < n:
        v += x[i]
        i += cuda.gridDim.x * cuda.blockDim.x
    s[t] = v
    cuda.syncthreads()
    k = 32
    while k > 0:
        if t < k:
            s[t] += s[t + k]
        cuda.syncthreads()
        k >>= 1
    if t == 0:
        y[cuda.blockIdx.x] = s[0]


BM, BN, BK, SWP, SXP = 64, 32, 16, 68, 36


def mmid_f32(w, x, dst, row_src, row_dst, bounds, M, K):
    """W [E,M,K], x [rows,K], dst [slots,M].  128 threads; a block makes a 64x32 tile of one expert, 4x4 a thread."""
    sw = cuda.shared.array((BK, SWP), f32)
    sx = cuda.shared.array((BK, SXP), f32)
    e = cuda.blockIdx.z
    lo, hi = bounds[e], bounds[e + 1]
    n0 = lo + cuda.blockIdx.y * BN
    if n0 >= hi:
        return
    m0 = cuda.blockIdx.x * BM
    t = cuda.threadIdx.x
    tm, tn = (t % 16) * 4, (t // 16) * 4
    acc = cuda.local.array((4, 4), f32)
    for i in range(4):
        for j in range(4):
            acc[i, j] = f32(0)
    lr, lk = t // 16, t % 16
    for k0 in range(0, K, BK):
        for r in range(0, BM, 8):
            sw[lk, r + lr] = w[e, m0 + r + lr, k0 + lk]
        for r in range(0, BN, 8):
            c = n0 + r + lr
            v = f32(0)
            if c < hi:
                v = x[row_src[c], k0 + lk]
            sx[lk, r + lr] = v
        cuda.syncthreads()
        for k in range(BK):
            for i in range(4):
                a = sw[k, tm + i]
                for j in range(4):
                    acc[i, j] += a * sx[k, tn + j]
        cuda.syncthreads()
    for j in range(4):
        c = n0 + tn + j
        if c < hi:
            d = row_dst[c]
            for i in range(4):
                dst[d, m0 + tm + i] = acc[i, j]


def mmvq_q8_0(wq, wd, xq, xd, ids, dst, M, nb):
    """One warp per (row, slot), block (32, 4): wq [E,M,nb,8] i32, wd [E,M,nb] f16, xq [slots,nb,8] i32, xd f32."""
    lane = cuda.threadIdx.x
    row = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    slot = cuda.blockIdx.y
    if row >= M:
        return
    e = ids[slot]
    acc = f32(0)
    b, q = lane // 4, (lane % 4) * 2
    while b < nb:
        s = dp4a(wq[e, row, b, q], xq[slot, b, q], i32(0))
        s = dp4a(wq[e, row, b, q + 1], xq[slot, b, q + 1], s)
        acc += f32(s) * f32(wd[e, row, b]) * xd[slot, b]
        b += 8
    o = 16
    while o > 0:
        acc += cuda.shfl_down_sync(0xFFFFFFFF, acc, o)
        o >>= 1
    if lane == 0:
        dst[slot, row] = acc


def _a(dt, n):
    return T.Array(dt, n, "C")


SIGNATURES = {
    "gather": (gather, (_a(f32, 1), _a(i32, 1), _a(f32, 1), i32)),
    "reduce_block": (reduce_block, (_a(f32, 1), _a(f32, 1), i32)),
    "mmid_f32": (mmid_f32, (_a(f32, 3), _a(f32, 2), _a(f32, 2), _a(i32, 1), _a(i32, 1), _a(i32, 1), i32, i32)),
    "mmvq_q8_0": (mmvq_q8_0, (_a(i32, 4), _a(T.float16, 3), _a(i32, 3), _a(f32, 2), _a(i32, 1), _a(f32, 2), i32, i32)),
}


def plan_rows(ids, n_experts, tile_n=BN):
    """Sort the (token, slot) pairs by expert: where each compact row comes from, goes to, and each expert's range."""
    used = ids.shape[1]
    flat = ids.ravel()
    order = np.argsort(flat, kind="stable")
    bounds = np.searchsorted(flat[order], np.arange(n_experts + 1)).astype("i4")
    return SimpleNamespace(
        row_src=(order // used).astype("i4"),
        row_dst=order.astype("i4"),
        bounds=bounds,
        tiles=-(-int(np.diff(bounds).max()) // tile_n),
    )


def mmid_case(n_experts, M, K, tokens, used, seed=0):
    """Return weights, activations, ids and their plan."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n_experts, M, K)).astype("f4")
    x = rng.standard_normal((tokens, K)).astype("f4")
    ids = np.stack([rng.permutation(n_experts)[:used] for _ in range(tokens)]).astype("i4")
    plan = plan_rows(ids, n_experts)
    plan.grid = (M // BM, plan.tiles, n_experts)
    return w, x, ids, plan
