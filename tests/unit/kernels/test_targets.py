"""The same kernels for lesser CPUs: AVX2, and nothing but SSE2, each compiled in a fresh process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the targets are x86-64's")

TARGETS = {
    "avx2": ("haswell", "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2"),
    "sse2": ("x86-64", "+sse,+sse2"),
}

CODE = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np
from conftest import ONE, Memory, nmse
import test_coded, test_products
from pyggml.types import Op, Type, UnaryOp
from pyggml.tensor import pack_params

memory, rng = Memory(ONE), np.random.default_rng(0)
for typ in {types}:
    typ = Type[typ]
    w = (test_coded if typ in test_coded.TYPES else test_products).weights(memory, rng, typ, (37, 256))
    for n in (1, 9):
        x = rng.standard_normal((n, 256), dtype="f4")
        got = memory.run(memory.node(Op.MUL_MAT, (37, n), w, memory.tensor(x)))
        error = nmse(got.reshape(n, 37), x.astype("f8") @ memory.values(w).astype("f8").T)
        assert error < (1e-7 if typ.block_size == 1 else 5e-4), (typ, n, error)
edges = [0, 1e-8, 65504, 7e4, np.inf, 6e-5, 3.1e-5, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25]
x = np.concatenate([rng.standard_normal(60), edges])
with np.errstate(over="ignore"):
    want = x.astype("f4").astype("f2").astype("f4")
got = memory.run(memory.node(Op.CPY, (70,), memory.tensor(x.astype("f4")), None, type=Type.F16))
np.testing.assert_array_equal(got, want)
finite = memory.tensor(want[:60].astype("f4"), "f16")
np.testing.assert_array_equal(memory.run(memory.node(Op.CPY, (60,), finite, None)), want[:60])
got = memory.run(memory.node(Op.UNARY, (60,), memory.tensor(x[:60].astype("f4")), params=(int(UnaryOp.SILU),)))
np.testing.assert_allclose(got, x[:60] / (1 + np.exp(-x[:60])), rtol=1e-5)
"""


@pytest.mark.parametrize(
    ("target", "types"),
    [
        ("avx2", "Q8_0 MXFP4 F16"),
        ("sse2", "Q5_1 Q2_K F16"),
        pytest.param("avx2", "Q6_K IQ3_XXS Q4_1 Q3_K IQ4_XS IQ1_M TQ1_0", marks=pytest.mark.slow),
        pytest.param("sse2", "Q8_0 MXFP4 IQ4_NL IQ1_S IQ2_XXS NVFP4 Q2_0", marks=pytest.mark.slow),
    ],
    ids=["avx2", "sse2", "avx2 more", "sse2 more"],
)
def test_results_are_right_for_lesser_cpus(target, types, request):
    """Products, conversions and functions hold their bounds without AVX-512, and without AVX, FMA and F16C."""
    name, features = TARGETS[target]
    code = CODE.format(tests=os.path.dirname(__file__), types=types.split())
    environment = {**os.environ, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=280)
