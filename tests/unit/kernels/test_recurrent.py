"""Layers with a state, whatever the number of threads; ids of states out of bounds; ROPE that cannot be."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml import ops
from pyggml.errors import ComputeError
from pyggml.opset import reason_unsupported
from pyggml.tensor import Tensor
from pyggml.testing import ref
from pyggml.types import Op


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Return standard normal floats."""
    return np.random.default_rng(seed).standard_normal(shape, dtype="f4")


def scan_sources(memory, n_rate: int, slots: list[int]) -> list[Tensor]:
    """Return SSM_SCAN's sources: 6 heads of 4 in 2 groups, states of 33, 9 tokens, 2 of 3 kept states."""
    arrays = [normal(3, 6, 4, 33), normal(2, 9, 6, 4), 9 * normal(2, 9, 6), -np.abs(normal(6, n_rate))]
    arrays += [normal(2, 9, 2, 33, seed=1), normal(2, 9, 2, 33, seed=2), np.array(slots, "i4")]
    return [memory.tensor(a) for a in arrays]


@pytest.mark.parametrize(("n_rate", "n_kept"), [(1, 1), (1, 4), (33, 1)])
def test_ssm_scan(memory, n_rate, n_kept):
    """Mamba-1 and Mamba-2 scan from the states that ids name, and give back the last states."""
    src = scan_sources(memory, n_rate, [2, 0])
    made = ops.ssm_scan(*src, n_kept)
    got = memory.compute(Op.SSM_SCAN, made.ne, *src, params=made.op_params)
    want = ref.compute(made, [memory.values(t) for t in src])
    assert ref.nmse(want.reshape(got.shape), got) < 1e-7


@pytest.mark.parametrize("slot", [-1, 3])
def test_ssm_scan_of_a_state_that_is_not_there(memory, slot):
    """The id of a state out of bounds is named, and nothing is read there."""
    src = scan_sources(memory, 1, [0, slot])
    made = ops.ssm_scan(*src, 1)
    with pytest.raises(ComputeError, match=rf"{slot} is not in 0\.\.2"):
        memory.run(memory.node(Op.SSM_SCAN, made.ne, *src, params=made.op_params))


@pytest.mark.parametrize("n_gate", [1, 48])
def test_gated_delta_net(memory, n_gate):
    """Heads of v share those of q and k; states of the last tokens are given back, the latest first."""
    shapes = [(2, 7, 2, 48), (2, 7, 2, 48), (2, 7, 4, 48), (2, 7, 4, n_gate), (2, 7, 4, 1), (2, 4, 48, 48)]
    arrays = [normal(*shape, seed=i) / 8 for i, shape in enumerate(shapes)]
    arrays[3] = -np.abs(arrays[3])
    src = [memory.tensor(a) for a in arrays]
    made = ops.gated_delta_net(*src, 3)
    got = memory.compute(Op.GATED_DELTA_NET, made.ne, *src, params=made.op_params)
    want = ref.compute(made, arrays)
    assert ref.nmse(want.reshape(got.shape), got) < 1e-7


@pytest.mark.parametrize("op", ["rwkv_wkv6", "rwkv_wkv7", "gated_linear_attn"])
def test_linear_attention_of_short_heads(memory, op):
    """Heads shorter than a vector, which upstream's kernels cannot take, are computed as defined; sequences do not mix."""
    n, n_head, n_token, n_seq = 10, 3, 6, 2
    n_source = {"rwkv_wkv6": 5, "rwkv_wkv7": 6, "gated_linear_attn": 4}[op]
    arrays = [normal(n_token, n_head, n, seed=i) / 4 for i in range(n_source)]
    if op == "rwkv_wkv6":
        arrays[3] = arrays[3][0]
    arrays.append(normal(n_seq, n * n * n_head, seed=9))
    src = [memory.tensor(a) for a in arrays]
    made = getattr(ops, op)(*src, *([0.5] if op == "gated_linear_attn" else []))
    assert not reason_unsupported(made)
    got = memory.compute(made.op, made.ne, *src, params=made.op_params)
    want = ref.compute(made, [memory.values(t) for t in src])
    assert ref.nmse(want.reshape(got.shape), got) < 1e-7


@pytest.mark.parametrize(("i", "ne"), [(0, (8, 2, 5)), (6, (128, 3)), (6, (128, 0))])
def test_linear_attention_that_would_read_past_a_source(i, ne):
    """A source that upstream does not look at, and sequences that tokens do not divide into, are refused with the reason."""
    src = [Tensor("f32", (8, 2, 4)) for _ in range(6)] + [Tensor("f32", (128, 1))]
    made = ops.rwkv_wkv7(*src)
    made.src = tuple(Tensor("f32", ne) if j == i else t for j, t in enumerate(src))
    assert "shape" in reason_unsupported(made) or "do not divide" in reason_unsupported(made)


def test_pads_that_cut(memory):
    """A negative pad takes elements off."""
    x = normal(3, 4, 10)
    made = ops.pad_ext(memory.tensor(x), -2, 3, 1, -1, 0, 0, 0, 0)
    got = memory.compute(Op.PAD, made.ne, made.src[0], params=made.op_params)
    want = np.pad(x[:, :3, 2:], [(0, 0), (1, 0), (0, 3)])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("n_dims", "sections", "mode", "n_factor", "why"),
    [
        (6, [0, 0, 0, 1], 8, 0, "sections"),
        (6, [9, 9, 0, 0], 40, 0, "sections"),
        (6, [1, 1, 1, 0], 24, 0, "VISION"),
        (4, [2, 2, 0, 0], 24, 2, "frequency factor"),
        (10, [1, 1, 1, 0], 8, 0, "10 of 8 elements"),
        (4, [1, 1, 1, 0], 16, 0, "mode 16"),
    ],
)
def test_ropes_that_cannot_be_are_not_taken(n_dims, sections, mode, n_factor, why):
    """Where upstream's kernel would assert or read past the end, the backend says why it does not take a ROPE."""
    a, b = Tensor("f32", (8, 2, 3)), Tensor("i32", (12 if mode & 8 else 3,))
    factors = Tensor("f32", (n_factor,)) if n_factor else None
    made = ops.rope_multi(a, b, factors, n_dims, sections, mode, 0, 1e4, 1.0, 0.0, 1.0, 32.0, 1.0)
    assert why in reason_unsupported(made)
