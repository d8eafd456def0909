"""Our kernels against libggml's CPU backend, op by op, in a process of its own."""

from __future__ import annotations

import ctypes as c
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def test_results_equal_upstreams():
    """Products, ROPE, softmax, GLU and attention are within upstream's bounds of its results; sorting is the same."""
    if importlib.util.find_spec("libggml") is None:
        pytest.fail("libggml-python is not installed: it is of the test extra")
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "13 cases" in done.stdout


class Upstream:
    """Just enough of ggml through ctypes: tensors in one context, graphs computed at once."""

    def __init__(self) -> None:
        folder = Path(importlib.util.find_spec("libggml").origin).parent / "lib64"
        self.libs = [c.CDLL(str(folder / f"libggml-{n}.so"), c.RTLD_GLOBAL) for n in ("base", "cpu")]

        class InitParams(c.Structure):
            _fields_ = (("size", c.c_size_t), ("buffer", c.c_void_p), ("no_alloc", c.c_bool))

        init = self.function("init", c.c_void_p, InitParams)
        self.context = init(InitParams(64 << 20, None, False))

    def function(self, name: str, result: Any, *args: Any) -> Callable[..., Any]:
        """Return a function of either library."""
        for lib in self.libs:
            if hasattr(lib, f"ggml_{name}"):
                f = getattr(lib, f"ggml_{name}")
                f.restype, f.argtypes = result, args
                return f
        raise AttributeError(name)

    def call(self, name: str, *args: Any) -> int:
        """Call an op's builder: tensors and None as pointers, ints and floats as themselves."""

        def kind(a: Any) -> Any:
            if isinstance(a, float):
                return c.c_float
            return c.c_void_p if a is None or a >= 1 << 31 else c.c_int

        kinds = [kind(a) for a in args]
        return self.function(name, c.c_void_p, c.c_void_p, *kinds)(self.context, *args)

    def tensor(self, type: int, ne: tuple[int, ...], raw: bytes) -> int:
        """Return a tensor with these bytes."""
        new = self.function("new_tensor", c.c_void_p, c.c_void_p, c.c_int, c.c_int, c.POINTER(c.c_int64))
        t = new(self.context, type, len(ne), (c.c_int64 * len(ne))(*ne))
        c.memmove(self.function("get_data", c.c_void_p, c.c_void_p)(t), raw, len(raw))
        return t

    def compute(self, t: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """Compute a node and return its values."""
        graph = self.function("new_graph", c.c_void_p, c.c_void_p)(self.context)
        self.function("build_forward_expand", None, c.c_void_p, c.c_void_p)(graph, t)
        self.function("graph_compute_with_ctx", c.c_int, c.c_void_p, c.c_void_p, c.c_int)(self.context, graph, 1)
        out = np.empty(shape, dtype)
        c.memmove(out.ctypes.data, self.function("get_data", c.c_void_p, c.c_void_p)(t), out.nbytes)
        return out


def main() -> None:
    """Compare all cases and print how many there were."""
    from conftest import ONE, Memory, nmse
    from test_attention import causal, rope_params
    from test_products import weights

    from pyggml.tensor import Tensor, pack_params
    from pyggml.types import GluOp, Op, Type

    memory, up, rng = Memory(ONE), Upstream(), np.random.default_rng(0)
    n_cases = 0

    def theirs(t: Tensor) -> int:
        return up.tensor(int(t.type), t.ne, memory.bytes(t))

    def compare(ours: np.ndarray, node: int, bound: float) -> None:
        nonlocal n_cases
        n_cases += 1
        want = up.compute(node, ours.dtype.str, ours.shape)
        if bound == 0:
            np.testing.assert_array_equal(ours, want)
        else:
            assert nmse(ours, want) < bound, (n_cases, nmse(ours, want))

    x = memory.tensor(rng.standard_normal((9, 512), dtype="f4"))
    for typ in (Type.Q8_0, Type.Q4_1, Type.Q4_K, Type.F32):
        w = weights(memory, rng, typ, (40, 512))
        compare(memory.run(memory.node(Op.MUL_MAT, (40, 9), w, x)), up.call("mul_mat", theirs(w), theirs(x)),
                1e-7 if typ is Type.F32 else 5e-4)  # fmt: skip
    w, ids = weights(memory, rng, Type.Q8_0, (4, 40, 512)), memory.tensor(rng.integers(0, 4, (9, 2)).astype("i4"))
    x3 = memory.tensor(rng.standard_normal((9, 1, 512), dtype="f4"))
    compare(memory.run(memory.node(Op.MUL_MAT_ID, (40, 2, 9), w, x3, ids)),
            up.call("mul_mat_id", theirs(w), theirs(x3), theirs(ids)), 5e-4)  # fmt: skip

    heads = memory.tensor(rng.standard_normal((9, 3, 64), dtype="f4"))
    positions = memory.tensor(np.arange(100, 109, dtype="i4"))
    for mode in (0, 2):
        params = rope_params(64, mode, scale=0.25, ext=1.0, attn=1.1)
        ours = memory.run(memory.node(Op.ROPE, heads.ne, heads, positions, None, params=params))
        node = up.call(
            "rope_ext", theirs(heads), theirs(positions), None, 64, mode, 2048, 1e4, 0.25, 1.0, 1.1, 32.0, 1.0
        )
        compare(ours, node, 1e-9)

    scores, mask = memory.tensor(rng.standard_normal((1, 6, 9, 40), dtype="f4")), memory.tensor(causal(9, 40), "f16")
    ours = memory.run(memory.node(Op.SOFT_MAX, scores.ne, scores, mask, None, params=pack_params(0.3, 8.0)))
    compare(ours, up.call("soft_max_ext", theirs(scores), theirs(mask), 0.3, 8.0), 1e-7)
    gate, value = (memory.tensor(3 * rng.standard_normal((9, 100), dtype="f4")) for _ in range(2))
    params = pack_params(int(GluOp.SWIGLU_OAI), 0, 1.702, 7.0)
    compare(memory.run(memory.node(Op.GLU, gate.ne, gate, value, params=params)),
            up.call("swiglu_oai", theirs(gate), theirs(value), 1.702, 7.0), 1e-7)  # fmt: skip

    ties = memory.tensor(rng.integers(0, 12, (7, 300)).astype("f4"))  # equal values: the order upstream's sort leaves
    for order in (0, 1):
        ours = memory.run(memory.node(Op.ARGSORT, ties.ne, ties, params=(order,), type=Type.I32))
        compare(ours, up.call("argsort", theirs(ties), order), 0)
    ours = memory.run(memory.node(Op.TOP_K, (5, 7), ties, type=Type.I32))
    compare(ours, up.call("top_k", theirs(ties), 5), 0)

    q = memory.tensor(rng.standard_normal((1, 6, 9, 64), dtype="f4"))
    k, v = (memory.tensor(rng.standard_normal((1, 2, 40, 64), dtype="f4"), "f16") for _ in range(2))
    ours = memory.run(memory.node(Op.FLASH_ATTN_EXT, (64, 6, 9), q, k, v, mask, params=pack_params(0.125, 0.0, 0.0)))
    node = up.call("flash_attn_ext", theirs(q), theirs(k), theirs(v), theirs(mask), 0.125, 0.0, 0.0)
    compare(ours, node, 5e-4)
    print(n_cases, "cases")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
