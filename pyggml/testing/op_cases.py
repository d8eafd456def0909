"""Random cases of every builder: programs of builder calls, with the bytes of their leafs.

`OPS` is the one table of cases. Builders are compared with the real library's in them, and, with a `Case` that changes
some arguments, in what does not fit; definitions (`ref`), kernels, and backends (`conformance`) compute them.

A program is a list of steps. ``["new", type, ne, name]`` makes a leaf; ``[builder, *arguments]`` calls a builder by
name. In arguments, ``{"t": i}`` is the result of step i, None is no tensor, a string is a type's name, and a list is an
array of integers. Steps are JSON, so that another process or library can run them.
"""
# ruff: noqa: D102, D103 - arguments of an op are named after it, or after what they are

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import ops
from ..errors import ShapeError
from ..tensor import Tensor
from ..types import GluOp, Type, UnaryOp
from ..values import encode_array

# a step's arguments are JSON values
Step = list[Any]


def ref(i: int) -> dict[str, int]:
    """Return the argument that refers to the result of step i."""
    return {"t": i}


def run(steps: Sequence[Step]) -> list[Tensor | None]:
    """Run a program with pyggml's builders.

    Raises
    ------
    ShapeError
        A builder refused its arguments.
    """
    values: list[Tensor | None] = []
    for name, *arguments in steps:
        if name == "new":
            type, ne, label = arguments
            values.append(Tensor(type, ne, name=label))
            continue
        plain = [values[a["t"]] if isinstance(a, dict) else a for a in arguments]
        result = getattr(ops, name)(*plain)
        values.append(result if isinstance(result, Tensor) else None)
    return values


class Case:
    """A program with the tested op, and the bytes of its leafs."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.steps: list[Step] = []
        self.data: dict[int, bytes] = {}
        self.result = -1  # the step that is checked

    def add(self, *step: Any) -> dict[str, int]:
        self.steps.append(list(step))
        return ref(len(self.steps) - 1)

    def build(self) -> list[Tensor | None]:
        """Return new tensors, one per step."""
        return run(self.steps)

    def dim(self) -> int:
        return self.random.choice([1, 2, 3, 4, 5, 7])

    def ne(self) -> list[int]:
        return [self.random.choice([1, 4, 10, 33]), self.dim(), self.dim(), self.random.choice([1, 1, 2])]

    def choice(self, *options: Any, also: Sequence[Any] = ()) -> Any:
        """Return one of the options; ``also`` are those that a builder is asked too, but not a kernel."""
        return self.random.choice(options)

    def up_to(self, n: int) -> int:
        chosen: int = self.choice(*range(1, max(n, 1) + 1), also=(0, n + 1))
        return chosen

    def divisor(self, n: int) -> int:
        return self.random.choice([d for d in range(1, n + 1) if n % d == 0] or [n])

    def node(self, builder: str) -> dict[str, int]:
        """Return a node of the table."""
        return self.add(builder, *OPS[builder](self))

    def values(self, values: Any, type: str = "f32") -> dict[str, int]:
        """Return a contiguous leaf with the given values, in numpy's order."""
        values = np.asarray(values)
        leaf = Tensor(type, values.shape[::-1] or (1,))
        result = self.add("new", type, list(leaf.ne), "x")
        self.data[result["t"]] = encode_array(leaf, values.reshape(leaf.shape)).tobytes()
        return result

    def tensor(
        self, ne: list[int], type: str = "f32", *, low: float = -1, high: float = 1, plain: bool = False
    ) -> dict[str, int]:
        """Return a leaf of random numbers, possibly with gaps or with dimensions 1 to 3 permuted."""
        ne = [*ne, *[1] * (4 - len(ne))]
        layout = "plain" if plain else self.choice("plain", "permuted", "strided")
        if layout == "permuted":
            axes = [0, *self.random.sample([1, 2, 3], 3)]
            leaf = self.tensor([ne[axis] for axis in axes], type, low=low, high=high, plain=True)
            return self.add("permute", leaf, *axes)
        if layout == "strided":
            block = Type.of(type).block_size
            big = [ne[0] + block, ne[1] + 1, ne[2], ne[3]]
            nb1 = Type.of(type).row_size(big[0])
            leaf = self.tensor(big, type, low=low, high=high, plain=True)
            return self.add("view_4d", leaf, *ne, nb1, nb1 * big[1], nb1 * big[1] * big[2], nb1)
        return self.values(self.numbers.uniform(low, high, ne[::-1]), type)

    def distinct(self, ne: list[int]) -> dict[str, int]:
        """Return a leaf of distinct numbers."""
        ne = [*ne, *[1] * (4 - len(ne))]
        return self.values(self.numbers.permutation(np.arange(int(np.prod(ne)))).reshape(ne[::-1]) / 7 - 3)

    def integers(self, ne: list[int], n: int, type: str = "i32") -> dict[str, int]:
        """Return a leaf of integers below n."""
        return self.values(self.numbers.integers(0, n, ne[::-1]), type)

    def weight(self, ne: list[int], type: str) -> dict[str, int]:
        """Return a matrix of any type; the library makes types that gguf cannot."""
        if type.endswith("_K") or type == "iq4_nl":
            return self.add("cast", Case.tensor(self, ne, plain=True), type)
        return self.tensor(ne, type)

    def mask(self, ne: list[int], type: str) -> dict[str, int]:
        """Return a mask that hides about a third, but never a whole row."""
        hidden = self.numbers.random(ne[::-1]) < 0.3
        hidden[..., :1] = False
        return self.values(np.where(hidden, -np.inf, self.numbers.uniform(-1, 1, ne[::-1])), type)


Arguments = Callable[[Case], list[Any]]


def any_one(c: Case) -> list[Any]:
    return [c.tensor(c.ne())]


def plain_one(c: Case) -> list[Any]:
    return [c.tensor(c.ne(), low=-4, high=4, plain=True)]


def positive(c: Case) -> list[Any]:
    return [c.tensor(c.ne(), low=0.1, high=5)]


def rows(c: Case) -> list[Any]:
    return [c.tensor(c.ne(), low=-4, high=4), c.choice(1e-6, 0.1)]


def with_numbers(*numbers: float) -> Arguments:
    return lambda c: [*plain_one(c), *(c.choice(number) for number in numbers)]


def broadcast(c: Case) -> list[Any]:
    ne = c.ne()
    return [c.tensor(ne), c.tensor([c.divisor(n) for n in ne], low=0.5, high=2, plain=True)]


def add_cast(c: Case) -> list[Any]:
    ne, type = [32, *c.ne()[1:]], c.choice("f16", "bf16", also=("f32", "q8_0"))
    b = c.tensor([32, *(c.divisor(n) for n in ne[1:])], plain=True)
    return [c.tensor(ne, type), b, c.choice(type, also=("f32",))]


def add_id(c: Case) -> list[Any]:
    n, n_used, n_token, n_expert = 32, c.dim(), c.dim(), c.dim()
    a = c.tensor([n, n_used, n_token], plain=True)
    return [a, c.tensor([n, n_expert], plain=True), c.integers([n_used, n_token], n_expert)]


def into(n_dims: int) -> Arguments:
    """Return a tensor, a smaller one of ``n_dims`` dimensions, strides and an offset."""

    def arguments(c: Case) -> list[Any]:
        a, b = c.tensor([10, 6, 2, 1], plain=True), c.tensor([4, 3, 2, 1][:n_dims], plain=True)
        nb = [c.choice(n, also=(4, 16, 64, 2**33)) for n in (40, 240, 480)[: n_dims - 1]]
        return [a, b, *nb, c.choice(0, 8, 40, also=(4, 2**30 - 1, 2**30, 2**31))]

    return arguments


def split(c: Case) -> list[Any]:
    ne = c.ne()
    return [c.tensor(ne, low=-4, high=4, plain=True), c.tensor(ne, low=-4, high=4, plain=True)]


def halves(c: Case) -> list[Any]:
    ne = c.ne()
    return [c.tensor([2 * ne[0], *ne[1:]], low=-4, high=4, plain=True)]


QUANTS = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4", "iq4_nl", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K"]


def mul_mat(c: Case) -> list[Any]:
    type = c.choice("f32", "f16", "bf16", *QUANTS)
    k, b2, b3 = c.choice(256, 512), c.dim(), c.choice(1, 2)
    a = c.weight([k, c.choice(1, 5, 16), c.divisor(b2), c.divisor(b3)], type)
    return [a, c.tensor([k, c.dim(), b2, b3])]


def mul_mat_id(c: Case) -> list[Any]:
    k, n_expert, n_used, n_token = 256, c.dim(), c.dim(), c.dim()
    a = c.weight([k, c.choice(5, 16), n_expert], c.choice("f32", "f16", "bf16", *QUANTS))
    b = c.tensor([k, c.divisor(n_used), n_token], plain=True)
    return [a, b, c.integers([n_used, n_token], n_expert)]


def out_prod(c: Case) -> list[Any]:
    n, b2, b3 = c.dim(), c.dim(), c.choice(1, 2)
    a = c.tensor([c.dim(), n, c.divisor(b2), c.divisor(b3)])
    return [a, c.tensor([c.dim(), n, b2, b3])]


def cpy(c: Case) -> list[Any]:
    ne, type = [64, c.dim(), c.dim(), 1], c.choice("f32", "f16", "bf16", "q8_0", "q4_0", "q5_1")
    a = c.tensor(ne, c.choice("f32", "f16") if type in ("f32", "f16", "bf16") else "f32")
    return [a, c.tensor(c.choice(ne, also=(ne[::-1], [64, *ne[:0:-1]])), type, plain=True)]


def folded(n_dims: int) -> Arguments:
    """Return a tensor and a shape of ``n_dims`` with as many elements."""

    def arguments(c: Case) -> list[Any]:
        ne = c.ne()
        rest = int(np.prod(ne[n_dims - 1 :]))
        return [c.tensor(ne, plain=True), *ne[: n_dims - 1], c.choice(rest, also=(1, rest + 1))]

    return arguments


def get_rows(c: Case) -> list[Any]:
    n_row, n2, n3 = c.dim(), c.dim(), c.choice(1, 2)
    a = c.weight([256, n_row, n2, n3], c.choice("f32", "f16", "bf16", *QUANTS))
    return [a, c.integers([c.dim(), n2, n3], n_row)]


def set_rows(c: Case) -> list[Any]:
    n_row, n_index, n2, n3 = 9, c.dim(), c.dim(), c.choice(1, 2)
    a = c.tensor([64, n_row, n2, n3], c.choice("f32", "f16", "q8_0", "q4_0"))
    groups = [[c.random.sample(range(n_row), n_index) for _ in range(c.divisor(n2))]]
    return [a, c.tensor([64, n_index, n2, n3]), c.values(groups, c.choice("i64", "i32"))]


def view(n_dims: int) -> Arguments:
    """Return a tensor, a shape of ``n_dims``, its strides and an offset."""

    def arguments(c: Case) -> list[Any]:
        ne = [c.choice(n, also=(0, 1, n + 1)) for n in (4, 3, 2, 1)[:n_dims]]
        nb = [c.choice(n, also=(0, 4, 30)) for n in (40, 240, 960)[: n_dims - 1]]
        return [c.tensor([10, 6, 4, 1], plain=True), *ne, *nb, c.choice(0, 8, 40, also=(4, 1000))]

    return arguments


def soft_max_ext(c: Case) -> list[Any]:
    ne = c.ne()
    max_bias = c.choice(0.0, 8.0)
    mask = None
    if max_bias or c.choice(True, False):
        mask = c.mask([ne[0], ne[1] + c.choice(0, 2), c.divisor(ne[2]), c.divisor(ne[3])], c.choice("f32", "f16"))
    return [c.tensor(ne, low=-3, high=3, plain=True), mask, c.choice(1.0, 0.125), max_bias]


def flash_attn_ext(c: Case) -> list[Any]:
    n_kv, n_token, n_head, n_stream, type = (
        c.choice(8, 40),
        c.dim(),
        c.choice(2, 4, 6),
        c.choice(1, 2),
        c.choice("f32", "f16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"),
    )
    max_bias, n_head_kv = c.choice(0.0, 8.0), c.divisor(n_head)
    q = c.tensor([64, n_token, n_head, n_stream])
    k = c.tensor([64, n_kv, n_head_kv, n_stream], type)
    v = c.tensor([c.choice(32, 64), n_kv, n_head_kv, n_stream], type)
    mask = None
    if max_bias or c.choice(True, False):
        mask = c.mask([n_kv, n_token, c.divisor(n_head), c.divisor(n_stream)], "f16")
    return [q, k, v, mask, c.choice(0.125), max_bias, c.choice(0.0, 10.0)]


def add_sinks(builder: str) -> Arguments:
    """Return a node of a builder, and a sink a head."""

    def arguments(c: Case) -> list[Any]:
        a = c.node(builder)
        try:
            made = c.build()[a["t"]]
        except ShapeError:
            made = None
        scores = made.src[0] if made is not None and made.src else None
        sinks = c.tensor([c.dim() if scores is None else scores.ne[2]], low=-2, high=2, plain=True)
        if c.choice(False, also=(True,)):
            c.add(f"{builder.replace('max_ext', 'max')}_add_sinks", a, sinks)
        return [a, c.choice(sinks, also=(None,))]

    return arguments


def setter(builder: str, *values: int, also: Sequence[int] = (), then: Sequence[Any] = ()) -> Arguments:
    """Return a node of a builder, and what is set in it."""
    return lambda c: [c.node(builder), c.choice(*values, also=also), *then]


def rope(c: Case) -> list[Any]:
    n_token = c.dim()
    a = c.tensor([16, c.dim(), n_token, c.choice(1, 2)], c.choice("f32", "f16"))
    n_dims, mode = c.choice(8, 16, also=(2, 4)), c.choice(0, 2, also=(1, 8, 24, 40))
    return [a, c.integers([n_token], 300), n_dims, mode]


def factors(c: Case) -> dict[str, int] | None:
    """Return a factor a pair, or none."""
    return c.tensor([c.choice(8, also=(4,))], low=1, high=3, plain=True) if c.choice(True, False) else None


def rope_ext(c: Case) -> list[Any]:
    a, pos, *how = rope(c)
    yarn = c.choice(1.0, 0.25), c.choice(0.0, 1.0), c.choice(1.0, 0.8)
    return [a, pos, factors(c), *how, 64, c.choice(10000.0), *yarn, c.choice(32.0), c.choice(1.0)]


def rope_multi(c: Case) -> list[Any]:
    n_token, mode = c.dim(), c.choice(8, 24, 40)
    n_dims, *choices = {
        8: (16, [2, 3, 3, 0], [1, 1, 1, 1], [8, 0, 0, 0], [2, 2, 2, 6]),
        24: (8, [4, 4, 4, 4], [4, 4, 0, 0], [2, 0, 3, 1], [4, 0, 4, 0]),
        40: (16, [3, 3, 2, 0], [2, 2, 2, 0], [4, 2, 1, 1]),
    }[mode]
    a = c.tensor([16, c.dim(), n_token], c.choice("f32", "f16"))
    pos = c.integers([4 * n_token], 100)
    n_dims, mode = c.choice(n_dims, also=(2, 8)), c.choice(mode, also=(0, 1, 2))
    sections = c.choice(*choices, also=([0, 0, 0, 0], [0, 0, 0, 4]))
    yarn = c.choice((1.0, 0.0, 1.0), (0.25, 1.0, 0.8))
    return [a, pos, factors(c), n_dims, sections, mode, 64, c.choice(10000.0), *yarn, 32.0, 1.0]


def top_k(c: Case) -> list[Any]:
    ne = c.ne()
    return [c.distinct(ne), c.up_to(ne[0])]


def concat(c: Case) -> list[Any]:
    ne, dim = c.ne(), c.choice(0, 1, 2, 3)
    b = c.tensor([c.dim() if i == dim else n for i, n in enumerate(ne)])
    return [c.tensor(ne), b, c.choice(dim, also=(-1, 4))]


def pad(n: int) -> Arguments:
    return lambda c: [c.tensor([4, 3, 5, 3], plain=True), *(c.random.randint(0, 3) for _ in range(n))]


def group_norm(c: Case) -> list[Any]:
    return [c.tensor([5, 4, 6, 2], plain=True), c.choice(1, 2, 4), c.choice(1e-5)]  # 4: of 2, 2, 2 and 0 channels


def lightning_indexer(c: Case) -> list[Any]:
    n, n_head, n_token, n_kv, n_stream = c.choice(32, 128), c.choice(1, 4), c.dim(), c.choice(5, 40), c.choice(1, 2)
    return [
        c.tensor([n, n_head, n_token, n_stream]),
        c.tensor([n, 1, n_kv, n_stream], c.choice("f32", "f16", "bf16", "q8_0")),
        c.tensor([n_head, n_token, 1, n_stream]),
        c.tensor([n_kv, n_token, 1, c.divisor(n_stream)], "f16", plain=True),
    ]


def ssm_conv(c: Case) -> list[Any]:
    n_tap, n_channel = c.choice(2, 4), c.choice(3, 8, 33)
    return [
        c.tensor([n_tap - 1 + c.dim(), n_channel, c.choice(1, 3)], plain=True),
        c.tensor([n_tap, n_channel], plain=True),
    ]


def ssm_scan(c: Case) -> list[Any]:
    n_state, dim, n_group, n_seq, n_token = (
        c.choice(16, 40, 128),
        c.choice(1, 4),
        c.choice(1, 2),
        c.choice(1, 2),
        c.dim(),
    )
    n_head, n_slot, n_rate = n_group * c.choice(1, 3), n_seq + c.choice(0, 2), c.choice(1, n_state)
    return [
        c.tensor([n_state, dim, n_head, n_slot], plain=True),
        c.tensor([dim, n_head, n_token, n_seq], plain=True),
        c.tensor([n_head, n_token, n_seq], low=-3, high=3, plain=True),
        c.tensor([n_rate, n_head], low=-2, high=0, plain=True),
        c.tensor([n_state, n_group, n_token, n_seq], plain=True),
        c.tensor([n_state, n_group, n_token, n_seq], plain=True),
        c.values(c.random.sample(range(n_slot), n_seq), "i32"),
        c.up_to(n_token) if n_rate == 1 else 1,
    ]


def gated_delta_net(c: Case) -> list[Any]:
    n, n_head_k, n_seq, n_token = c.choice(16, 20, 64), c.choice(1, 2), c.choice(1, 2), c.dim()
    n_head = n_head_k * c.choice(1, 2)
    q, k = (c.tensor([n, n_head_k, n_token, n_seq], low=-0.2, high=0.2) for _ in range(2))
    return [
        q,
        k,
        c.tensor([n, n_head, n_token, n_seq]),
        c.tensor([c.choice(1, n), n_head, n_token, n_seq], low=-2, high=0, plain=True),
        c.tensor([1, n_head, n_token, n_seq], low=0, plain=True),
        c.tensor([n, n, n_head, n_seq], plain=True),
        c.up_to(n_token),
    ]


def linear_attention(op: str) -> Arguments:
    """Return arguments of RWKV_WKV6, RWKV_WKV7 or GATED_LINEAR_ATTN: heads of 64, as the library's kernels need."""

    def arguments(c: Case) -> list[Any]:
        n, n_head, n_seq = 64, c.choice(1, 2, 3), c.choice(1, 2)
        n_token = n_seq * c.choice(1, 3)

        def tensor(low: float = -0.3, high: float = 0.3) -> dict[str, int]:
            return c.tensor([n, n_head, n_token], low=low, high=high, plain=True)

        state = [n * n * n_head, n_seq]
        if op == "rwkv_wkv7":
            sources = [tensor(), tensor(0.2, 0.95), *(tensor() for _ in range(4))]
            return [*sources, c.tensor(state, plain=True)]
        sources = [tensor() for _ in range(3)]
        if op == "rwkv_wkv6":
            sources.append(c.tensor([n, n_head], plain=True))
        scale = [c.choice(0.125)] if op == "gated_linear_attn" else []
        return [*sources, tensor(0.2, 0.95), c.tensor(state, plain=True), *scale]

    return arguments


def dsv4_hc_comb(c: Case) -> list[Any]:
    n = c.choice(24, also=(15,))
    mixes, base = c.tensor([n, c.dim()], low=-3, high=3), c.tensor([n], plain=True)
    scale = c.tensor([c.choice(3, 4, also=(2,))], plain=True)
    return [mixes, scale, base, c.choice(1e-6, 1e-2), c.choice(1, 2, 20, also=(0,))]


def dsv4_hc_pre(c: Case) -> list[Any]:
    n_stream, n_token = c.choice(1, 4), c.dim()
    return [c.tensor([c.choice(33, 600), n_stream, n_token]), c.tensor([n_stream, n_token])]


def dsv4_hc_pre_gated(c: Case) -> list[Any]:
    ne = [c.choice(33, 600), c.choice(1, 4), c.dim()]
    return [c.tensor(ne), c.tensor(ne, low=-3, high=3), c.choice(0.5)]


def dsv4_hc_post(c: Case) -> list[Any]:
    n, n_stream, n_token = c.choice(33, 600), c.choice(1, 4), c.dim()
    x, residual = c.tensor([n, n_token]), c.tensor([n, n_stream, n_token])
    comb = c.tensor([n_stream, n_stream, n_token]) if c.choice(True, True, False) else None
    return [x, residual, c.tensor([n_stream, n_token]), comb]


def solve_tri(c: Case) -> list[Any]:
    n, ne2, ne3 = c.choice(1, 5, 33), c.dim(), c.choice(1, 2)
    matrix = np.tril(c.numbers.uniform(-0.3, 0.3, (ne3, ne2, n, n))) + np.eye(n)
    is_as_kernels = [c.choice(kind, also=(not kind,)) for kind in (True, True, False)]
    return [c.values(matrix), c.tensor([c.choice(1, 7, 70), n, ne2, ne3], plain=True), *is_as_kernels]


UNARY = [op.name.lower() for op in UnaryOp if op is not UnaryOp.XIELU]
GLU = [op.name.lower() for op in GluOp if op not in (GluOp.SWIGLU_OAI, GluOp.SWIGLU_CLAMP)]

#: The arguments of each builder; those of builders in place are added below.
OPS: dict[str, Arguments] = {
    **{op: broadcast for op in ("add", "sub", "mul", "div")},
    **{op: any_one for op in ("dup", "cont", "sqr", "sum_rows", "mean", "transpose")},
    **{op: plain_one for op in (*UNARY, "sin", "cos", "sum", "cumsum", "soft_max")},
    **{op: rows for op in ("norm", "rms_norm", "l2_norm")},
    **{op: halves for op in (*GLU, *(f"{op}_swapped" for op in GLU))},
    **{f"{op}_split": split for op in GLU},
    **{op: with_numbers(-0.3, 0.4) for op in ("clamp", "clamp_inplace")},
    **{op: lambda c: [*plain_one(c), c.choice(0, 3)] for op in ("diag_mask_inf", "diag_mask_zero")},
    "sqrt": positive,
    "log": positive,
    "add_id": add_id,
    "add1": lambda c: [c.tensor(c.ne(), plain=True), c.tensor([1], plain=True)],
    "add_cast": add_cast,
    "acc": into(4),
    **{f"set{dims}": into(n) for dims, n in (("", 4), ("_1d", 1), ("_2d", 2))},
    "scale": with_numbers(0.7),
    "scale_bias": lambda c: [*plain_one(c), c.choice(0.7), c.choice(0.0, -3.0)],
    "leaky_relu": lambda c: [*plain_one(c), c.choice(0.1), c.choice(False, True)],
    "xielu": lambda c: [*plain_one(c), *(c.choice(a, also=(-2.0, 0.0, 3.0, 30.0)) for a in (0.3, 0.8, 0.5, -1e-6))],
    "unary": lambda c: [*plain_one(c), c.choice(*UnaryOp)],
    "glu": lambda c: [*halves(c), c.choice(*range(6)), c.choice(False, True)],
    "glu_split": lambda c: [*split(c), c.choice(*range(6))],
    "swiglu_oai": lambda c: [*split(c), c.choice(1.702), c.choice(7.0, 2.0)],
    "swiglu_clamp": lambda c: [*split(c), c.choice(7.0, 2.0)],
    "mul_mat": mul_mat,
    "mul_mat_id": mul_mat_id,
    "mul_mat_set_prec": setter("mul_mat", 0, 10),
    "mul_mat_set_hint": setter("mul_mat", 0, also=(1,)),
    "prec_set_acc": setter("mul_mat_id", 0, 10),
    "prec_set_src": setter("mul_mat_id", 0, 10, then=[1]),
    "out_prod": out_prod,
    "cpy": cpy,
    "cast": lambda c: [c.tensor([64, c.dim(), c.dim()]), c.choice("f32", "f16", "bf16", "q8_0", also=("i32",))],
    "reshape": lambda c: [c.tensor([4, 6, 3, 2], plain=True), c.tensor([12, 12])],
    **{f"{op}_{n}d": folded(n) for op in ("cont", "reshape") for n in (1, 2, 3, 4)},
    **{f"view_{n}d": view(n) for n in (1, 2, 3, 4)},
    "permute": lambda c: [
        c.tensor([4, 6, 3, 2]),
        *c.choice(c.random.sample(range(4), 4), also=([0, 1, 1, 2], [-1, 4, 0, 1])),
    ],
    "get_rows": get_rows,
    "set_rows": set_rows,
    "repeat": lambda c: broadcast(c)[::-1],
    "repeat_4d": lambda c: [c.tensor([4, 2, 3, 1]), c.choice(8, also=(6,)), 4, 3, c.choice(1, 3)],
    "concat": concat,
    **{op: pad(8 if "ext" in op else 4) for op in ("pad", "pad_circular", "pad_ext", "pad_ext_circular")},
    "roll": lambda c: [c.tensor([6, 5, 4, 2], plain=True), *(c.choice(-1, 0, 1, also=(-3, 3)) for _ in range(4))],
    "diag": lambda c: [c.tensor([c.dim(), 1, c.dim(), 1], plain=True)],
    "tri": lambda c: [c.tensor([5, 5, c.dim(), 1], plain=True), c.choice(0, 1, 2, 3)],
    "fill": with_numbers(1.5),
    "arange": lambda c: [c.choice(start, also=(99.0,)) for start in (0.0, 5.0)] + [c.choice(1.0, 0.25, also=(20.0,))],
    "argmax": lambda c: [c.distinct([33, c.dim()])],
    "argsort": lambda c: [c.distinct(c.ne()), c.choice(0, 1)],
    "argsort_top_k": top_k,
    "top_k": top_k,
    "count_equal": lambda c: [c.integers([50, 3], 3), c.integers([50, 3], 3)],
    "group_norm": group_norm,
    "soft_max_ext": soft_max_ext,
    "soft_max_add_sinks": add_sinks("soft_max_ext"),
    "rope": rope,
    **{op: rope_ext for op in ("rope_ext", "rope_ext_back")},
    **{op: rope_multi for op in ("rope_multi", "rope_multi_back")},
    "rope_set_offset": setter("rope_ext", 0, also=(-1, 8)),
    "flash_attn_ext": flash_attn_ext,
    "flash_attn_ext_set_prec": setter("flash_attn_ext", 0, 10),
    "flash_attn_ext_set_n_kv_max": setter("flash_attn_ext", 0, 40, also=(-1,)),
    "flash_attn_ext_add_sinks": add_sinks("flash_attn_ext"),
    "lightning_indexer": lightning_indexer,
    "ssm_conv": ssm_conv,
    "ssm_scan": ssm_scan,
    "gated_delta_net": gated_delta_net,
    "solve_tri": solve_tri,
    **{op: linear_attention(op) for op in ("rwkv_wkv6", "rwkv_wkv7", "gated_linear_attn")},
    "dsv4_hc_comb": dsv4_hc_comb,
    "dsv4_hc_pre": dsv4_hc_pre,
    "dsv4_hc_pre_gated": dsv4_hc_pre_gated,
    "dsv4_hc_post": dsv4_hc_post,
}
OPS |= {f"{op}_inplace": arguments for op, arguments in OPS.items() if f"{op}_inplace" in ops.__all__}
#: All that are computed: not a view of a node that no step is.
COMPUTED = [op for op in OPS if op != "argsort_top_k"]
#: Builders that change a node.
SETTER = re.compile(r"_set_|_add_sinks|^prec_")
#: Ops with several kinds of arguments get more cases.
MANY = re.compile(r"mul_mat(_id)?|[gs]et_rows|cpy|flash_attn_ext|rope_(ext|multi)(_back)?")
#: Ops in place and nodes in which something is set are computed by kernels that have cases of their own.
FEW = re.compile(r".*_inplace|(cont|reshape|view)_.d|.*_set_.*")


def cases_of(op: str, n: int) -> range:
    """Return the numbers of cases to compute: n, or more or fewer by the number of the op's kinds."""
    return range(4 * n if MANY.fullmatch(op) else -(-n // 3) if FEW.fullmatch(op) else n)


def of_op(op: str, i: int) -> Case:
    """Return random case i of an op."""
    case = Case(zlib.crc32(f"{op} {i}".encode()))
    arguments = OPS[op](case)
    case.result = case.add(op, *arguments)["t"]
    if SETTER.search(op):
        case.result = arguments[0]["t"]
    return case


def product(op: str, type: Type, n_token: int) -> Case:
    """Return a product with weights of ``type``: ``"mul_mat"``, or ``"mul_mat_id"`` with 4 experts, 2 used."""
    case = Case(zlib.crc32(f"{op} {type.ggml_name} {n_token}".encode()))
    n_row, n_expert, n_used = 40, 4, 2
    arguments = [case.weight([256, n_row, n_expert if op == "mul_mat_id" else 1], type.ggml_name)]
    if op == "mul_mat_id":
        arguments.append(case.tensor([256, 1, n_token], plain=True))
        ids = [case.random.sample(range(n_expert), n_used) for _ in range(n_token)]
        arguments.append(case.values(ids, "i32"))
    else:
        arguments.append(case.tensor([256, n_token], plain=True))
    case.result = case.add(op, *arguments)["t"]
    return case
