"""Random arguments for every op builder: mostly such that fit, and sometimes not."""
# ruff: noqa: D102 - arguments of a builder are named after it, or after what they are

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from oracle import programs

from pyggml.testing import op_cases
from pyggml.testing.op_cases import Step, ref
from pyggml.types import Type

__all__ = ["FAMILIES", "Arguments", "Draw"]

DIMS = (1, 2, 3, 4, 6, 8)
FLOATS = st.sampled_from([0.0, 1.0, -1.0, 0.125, 1e-5, 10000.0, 0.1, -3.7, 1e30])


class Draw:
    """A program in the making: arguments that mostly fit, and sometimes do not."""

    def __init__(self, data: st.DataObject) -> None:
        self.draw = data.draw
        self.steps: list[Step] = []

    def one_in(self, n: int) -> bool:
        return self.draw(st.integers(1, n)) == n

    def add(self, *step: Any) -> dict[str, int]:
        self.steps.append(list(step))
        return ref(len(self.steps) - 1)

    def dim(self) -> int:
        return 0 if self.one_in(60) else self.draw(st.sampled_from(DIMS))

    def ne(self) -> list[int]:
        return [self.dim() for _ in range(4)]

    def divisor(self, n: int) -> int:
        return self.draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0] or [n]))

    def type(self) -> str:
        return self.draw(st.sampled_from(["f32", "f32", "f32", "f16", "bf16", "i32", "i64", "q8_0", "q4_1"]))

    def tensor(self, ne: list[int], *, type: str = "f32", exact: bool = False) -> dict[str, int]:
        """A tensor of the given shape and type, nearly always; laid out in some way."""
        ne = [*ne, *[1] * (4 - len(ne))]
        if not exact and self.one_in(12):
            ne[self.draw(st.integers(0, 3))] = self.dim()
        if not exact and self.one_in(20):
            type = self.type()
        block = Type.of(type).block_size
        if block > 1:
            ne[0] = -(-ne[0] // block) * block
        return self._laid_out(ne, type, block)

    def _laid_out(self, ne: list[int], type: str, block: int) -> dict[str, int]:
        name = self.draw(st.sampled_from(["", "x", "blk.0"]))
        layout = self.draw(st.sampled_from(["plain", "plain", "plain", "permuted", "strided", "reshaped"]))
        if layout == "permuted":
            axes = self.draw(st.permutations(range(4)))
            if block > 1:
                axes = [0, *[i for i in axes if i != 0]]
            return self.add("permute", self.add("new", type, [ne[axis] for axis in axes], name), *axes)
        if layout == "strided":
            big = [ne[0] + block * self.draw(st.integers(0, 2)), *[n + self.draw(st.integers(0, 2)) for n in ne[1:]]]
            nb1 = Type.of(type).row_size(big[0])
            nb = [nb1, nb1 * big[1], nb1 * big[1] * big[2]]
            last = sum((n - 1) * b for n, b in zip(ne[1:], nb, strict=True)) + Type.of(type).row_size(ne[0])
            fits = [at for at in (0, Type.of(type).type_size, nb1, nb[1]) if at + last <= nb[2] * big[3]]
            offset = self.draw(st.sampled_from(fits or [0]))
            return self.add("view_4d", self.add("new", type, big, name), *ne, *nb, offset)
        if layout == "reshaped":
            return self.add("reshape_4d", self.add("new", type, [ne[0], ne[1] * ne[2] * ne[3]], name), *ne)
        return self.add("new", type, ne, name)

    def any_tensor(self) -> dict[str, int]:
        return self.tensor(self.ne(), type=self.type())


Arguments = Callable[[Draw], list[Any]]


def any_one(d: Draw) -> list[Any]:
    return [d.any_tensor()]


def with_float(d: Draw) -> list[Any]:
    return [d.any_tensor(), d.draw(FLOATS)]


def with_two_floats(d: Draw) -> list[Any]:
    return [d.any_tensor(), d.draw(FLOATS), d.draw(FLOATS)]


def broadcast(d: Draw) -> list[Any]:
    ne = d.ne()
    return [d.tensor(ne, type=d.type()), d.tensor([d.divisor(n) for n in ne])]


def broadcast_up(d: Draw) -> list[Any]:
    b, a = broadcast(d)
    return [a, b]


def same_shape(d: Draw) -> list[Any]:
    ne = d.ne()
    return [d.tensor(ne), d.tensor(ne)]


def add_cast(d: Draw) -> list[Any]:
    ne = [32, *d.ne()[1:]]
    a = d.tensor(ne, type=d.draw(st.sampled_from(["q8_0", "f16", "bf16", "f32"])))
    return [a, d.tensor([32, *[d.divisor(n) for n in ne[1:]]]), d.draw(st.sampled_from(["f32", "f16"]))]


def add_id(d: Draw) -> list[Any]:
    n, n_used, n_token = d.dim(), d.dim(), d.dim()
    return [d.tensor([n, n_used, n_token]), d.tensor([n, d.dim()]), d.tensor([n_used, n_token], type="i32")]


def add1(d: Draw) -> list[Any]:
    return [d.any_tensor(), d.tensor([1])]


def into(n_nb: int) -> Arguments:
    def arguments(d: Draw) -> list[Any]:
        ne = d.ne()
        a, b = d.tensor(ne), d.tensor([d.divisor(n) for n in ne])
        nb = [d.draw(st.sampled_from([4, 16, 64, 2**33])) for _ in range(n_nb)]
        return [a, b, *nb, d.draw(st.sampled_from([0, 4, 2**30 - 1, 2**30, 2**31]))]

    return arguments


def leaky_relu(d: Draw) -> list[Any]:
    return [d.any_tensor(), d.draw(FLOATS), d.draw(st.booleans())]


def tri(d: Draw) -> list[Any]:
    n = d.dim()
    return [d.tensor([n, n, d.dim(), 1]), d.draw(st.integers(0, 3))]


def glu_split(d: Draw) -> list[Any]:
    ne, type = d.ne(), d.draw(st.sampled_from(["f32", "f16"]))
    return [d.tensor(ne, type=type), d.tensor(ne, type=type)]


def mul_mat(d: Draw) -> list[Any]:
    k, b2, b3 = d.draw(st.sampled_from([32, 64])), d.dim(), d.dim()
    a = d.tensor(
        [k, d.dim(), d.divisor(b2), d.divisor(b3)], type=d.draw(st.sampled_from(["f32", "f16", "q8_0", "q4_1"]))
    )
    return [a, d.tensor([k, d.dim(), b2, b3])]


def mul_mat_id(d: Draw) -> list[Any]:
    k, n_used, n_token = d.draw(st.sampled_from([32, 64])), d.dim(), d.dim()
    a = d.tensor([k, d.dim(), d.dim()], type=d.draw(st.sampled_from(["f32", "f16", "q8_0", "q4_1"])))
    return [a, d.tensor([k, d.divisor(n_used), n_token]), d.tensor([n_used, n_token], type="i32")]


def out_prod(d: Draw) -> list[Any]:
    n, b2, b3 = d.dim(), d.dim(), d.dim()
    return [d.tensor([d.dim(), n, d.divisor(b2), d.divisor(b3)]), d.tensor([d.dim(), n, b2, b3])]


def set_on(make: str, arguments: Arguments, *values: int) -> Arguments:
    """Arguments of a function that changes a tensor which ``make`` made, or another did."""

    def setter(d: Draw) -> list[Any]:
        a = d.any_tensor() if d.one_in(5) else d.add(make, *arguments(d))
        return [a, d.draw(st.sampled_from(values))]

    return setter


def cpy(d: Draw) -> list[Any]:
    ne = d.ne()
    other = list(d.draw(st.permutations(ne)))
    return [d.tensor(ne, type=d.type()), d.tensor(other, type=d.type())]


def cast(d: Draw) -> list[Any]:
    return [d.tensor([32, *d.ne()[1:]]), d.draw(st.sampled_from(["f32", "f16", "bf16", "q8_0", "i32"]))]


def folded(n_dims: int) -> Arguments:
    """A tensor, and a shape of ``n_dims`` with as many elements, mostly."""

    def arguments(d: Draw) -> list[Any]:
        a = d.ne()
        ne = [*a[: n_dims - 1], 1]
        for n in a[n_dims - 1 :]:
            ne[-1] *= n
        if d.one_in(10):
            ne[d.draw(st.integers(0, n_dims - 1))] = d.dim()
        return [d.tensor(a, type=d.draw(st.sampled_from(["f32", "f16", "i32"]))), *ne]

    return arguments


def reshape(d: Draw) -> list[Any]:
    ne = d.ne()
    return [d.tensor(ne), d.tensor(list(d.draw(st.permutations(ne))))]


def view(n_dims: int) -> Arguments:
    """A tensor, sizes that may end in it, strides and an offset."""

    def arguments(d: Draw) -> list[Any]:
        a = d.ne()
        ne = [d.draw(st.integers(0, max(n, 1))) for n in a[:n_dims]]
        nb = [4 * a[0], 4 * a[0] * a[1], 4 * a[0] * a[1] * a[2]][: n_dims - 1]
        if nb and d.one_in(4):
            nb[-1] = d.draw(st.integers(0, 40))
        return [d.tensor(a), *ne, *nb, d.draw(st.sampled_from([0, 0, 4, 8, 4 * a[0], 1000]))]

    return arguments


def permute(d: Draw) -> list[Any]:
    axes = d.draw(st.permutations(range(4)))
    if d.one_in(6):
        axes = [d.draw(st.integers(-1, 4)) for _ in range(4)]
    return [d.any_tensor(), *axes]


def get_rows(d: Draw) -> list[Any]:
    n2, n3 = d.dim(), d.dim()
    return [d.tensor([d.dim(), d.dim(), n2, n3], type=d.type()), d.tensor([d.dim(), n2, n3], type="i32")]


def set_rows(d: Draw) -> list[Any]:
    n, n_index, n2, n3 = d.dim(), d.dim(), d.dim(), d.dim()
    a = d.tensor([n, d.dim(), n2, n3], type=d.draw(st.sampled_from(["f32", "f16"])))
    index = d.tensor([n_index, d.divisor(n2), d.divisor(n3)], type=d.draw(st.sampled_from(["i64", "i32"])))
    return [a, d.tensor([n, n_index, n2, n3], type=d.draw(st.sampled_from(["f32", "f32", "f16"]))), index]


def diag_mask(d: Draw) -> list[Any]:
    return [d.any_tensor(), d.draw(st.integers(0, 9))]


def soft_max_ext(d: Draw) -> list[Any]:
    ne = d.ne()
    mask = None
    if not d.one_in(4):
        rows = ne[1] + d.draw(st.integers(0, 2))
        type = d.draw(st.sampled_from(["f16", "f32"]))
        mask = d.tensor([ne[0], rows, d.divisor(ne[2]), d.divisor(ne[3])], type=type)
    return [d.tensor(ne), mask, d.draw(FLOATS), d.draw(st.sampled_from([0.0, 8.0]))]


def add_sinks(make: str, arguments: Arguments) -> Arguments:
    """A tensor that ``make`` made, perhaps with sinks, and one sink a head."""

    def setter(d: Draw) -> list[Any]:
        n_head = d.dim()
        base = arguments(d)
        a = d.any_tensor() if d.one_in(8) else d.add(make, *base)
        built = programs.run_and_describe(d.steps)
        if "tensors" in built and (scores := built["tensors"][a["t"]]["src"][0]) is not None:
            n_head = built["tensors"][scores]["ne"][2]
        sinks = None if d.one_in(8) else d.tensor([n_head])
        if d.one_in(5):
            d.add(f"{make.removesuffix('_ext')}_add_sinks" if make == "soft_max_ext" else f"{make}_add_sinks", a, sinks)
        return [a, sinks]

    return setter


def rope_base(d: Draw) -> tuple[Any, Any, int, int]:
    mode = d.draw(st.sampled_from([0, 0, 2, 8, 24, 40, 1]))
    n_dims, n_token = d.draw(st.sampled_from([2, 4, 8])), d.dim()
    a = d.tensor([8, d.dim(), n_token, d.dim()])
    return a, d.tensor([n_token * 4 if mode & 8 else n_token], type="i32"), n_dims, mode


def rope_ext(d: Draw) -> list[Any]:
    a, b, n_dims, mode = rope_base(d)
    c = d.tensor([n_dims // 2 + d.draw(st.integers(0, 1))]) if d.draw(st.booleans()) else None
    return [a, b, c, n_dims, mode, 4096, *[d.draw(FLOATS) for _ in range(6)]]


def rope_multi(d: Draw) -> list[Any]:
    a, b, c, n_dims, *rest = rope_ext(d)
    return [a, b, c, n_dims, [d.draw(st.integers(0, 4)) for _ in range(4)], *rest]


def flash_attn_ext(d: Draw) -> list[Any]:
    n_embd, n_kv, n_token, n_head, n_stream = d.dim(), d.dim(), d.dim(), d.dim(), d.dim()
    n_head_kv = d.divisor(n_head)
    q = d.tensor([n_embd, n_token, n_head, n_stream])
    k = d.tensor([n_embd, n_kv, n_head_kv, n_stream], type=d.draw(st.sampled_from(["f32", "f16"])))
    v = d.tensor([d.dim(), n_kv, n_head_kv, n_stream], type="f16")
    mask = None
    if not d.one_in(4):
        mask = d.tensor([n_kv, n_token, d.divisor(n_head), d.divisor(n_stream)], type="f16")
    return [q, k, v, mask, d.draw(FLOATS), d.draw(st.sampled_from([0.0, 8.0])), d.draw(FLOATS)]


def lightning_indexer(d: Draw) -> list[Any]:
    n, n_head, n_token, n_kv, n_stream = (d.dim() for _ in range(5))
    return [
        d.tensor([n, n_head, n_token, n_stream]),
        d.tensor([n, 1, n_kv, n_stream], type=d.draw(st.sampled_from(["f32", "f16"]))),
        d.tensor([n_head, n_token, 1, n_stream]),
        d.tensor([n_kv, n_token, 1, d.divisor(n_stream)], type="f16"),
    ]


def ssm_conv(d: Draw) -> list[Any]:
    n_tap, n_channel = d.dim(), d.dim()
    return [d.tensor([n_tap - 1 + d.dim(), n_channel, d.dim()]), d.tensor([n_tap, n_channel])]


def ssm_scan(d: Draw) -> list[Any]:
    n_state, dim, n_group, n_token, n_seq = (d.dim() for _ in range(5))
    n_head, k = n_group * d.draw(st.integers(1, 2)), d.draw(st.sampled_from([1, 1, 2, 0]))
    exact = not d.one_in(3)

    def tensor(*ne: int, type: str = "f32") -> dict[str, int]:
        return d.add("new", type, [*ne], "x") if exact else d.tensor([*ne], type=type)

    return [
        tensor(n_state, dim, n_head, n_seq),
        tensor(dim, n_head, n_token, n_seq),
        tensor(n_head, n_token, n_seq),
        tensor(d.draw(st.sampled_from([1, 1, n_state])), n_head),
        tensor(n_state, n_group, n_token, n_seq),
        tensor(n_state, n_group, n_token, n_seq),
        tensor(n_seq, type="i32"),
        k,
    ]


def gated_delta_net(d: Draw) -> list[Any]:
    n, n_head_k, n_token, n_seq = (d.dim() for _ in range(4))
    n_head, exact = n_head_k * d.draw(st.integers(1, 2)), not d.one_in(3)

    def tensor(*ne: int) -> dict[str, int]:
        return d.add("new", "f32", [*ne], "x") if exact else d.tensor([*ne])

    return [
        tensor(n, n_head_k, n_token, n_seq),
        tensor(n, n_head_k, n_token, n_seq),
        tensor(n, n_head, n_token, n_seq),
        tensor(d.draw(st.sampled_from([1, n])), n_head, n_token, n_seq),
        tensor(1, n_head, n_token, n_seq),
        tensor(n, n, n_head, n_seq),
        d.draw(st.sampled_from([1, 1, 3, 0])),
    ]


def linear_attention(op: str) -> Arguments:
    """Return arguments of an op of linear attention, at times with a source that does not fit."""

    def arguments(d: Draw) -> list[Any]:
        n, n_head, n_token, n_seq = (d.dim() for _ in range(4))
        exact = not d.one_in(3)

        def tensor(*ne: int) -> dict[str, int]:
            return d.add("new", "f32", [*ne], "x") if exact else d.tensor([*ne])

        sources = [tensor(n, n_head, n_token) for _ in range(6 if op == "rwkv_wkv7" else 3)]
        if op != "rwkv_wkv7":
            sources += (
                [tensor(n, n_head), tensor(n, n_head, n_token)] if op == "rwkv_wkv6" else [tensor(n, n_head, n_token)]
            )
        sources.append(tensor(n * n * n_head, n_seq))
        return [*sources, *([d.draw(FLOATS)] if op == "gated_linear_attn" else [])]

    return arguments


def dsv4_hc_comb(d: Draw) -> list[Any]:
    n = d.draw(st.sampled_from([24, 24, 15]))
    scale, base = d.tensor([d.draw(st.sampled_from([3, 4, 2]))]), d.tensor([n])
    return [d.tensor([n, d.dim()]), scale, base, d.draw(FLOATS), d.draw(st.sampled_from([1, 3, 0]))]


def dsv4_hc_post(d: Draw) -> list[Any]:
    n, n_stream, n_token = (d.dim() for _ in range(3))
    x, residual = d.tensor([n, n_token]), d.tensor([n, n_stream, n_token])
    return [x, residual, d.tensor([n_stream, n_token]), d.tensor([n_stream, n_stream, n_token])]


def solve_tri(d: Draw) -> list[Any]:
    n, ne2, ne3 = d.dim(), d.dim(), d.dim()
    kind = [False, True, True] if d.one_in(6) else [True, True, False]
    return [d.tensor([n, n, ne2, ne3]), d.tensor([d.dim(), n, ne2, ne3]), *kind]


def argsort(d: Draw) -> list[Any]:
    return [d.any_tensor(), d.draw(st.integers(0, 1))]


def top_k(d: Draw) -> list[Any]:
    return [d.any_tensor(), d.draw(st.integers(0, 8))]


def arange(d: Draw) -> list[Any]:
    return [*(d.draw(st.floats(-100, 100, width=32)) for _ in range(2)), d.draw(st.floats(0.125, 20, width=32))]


def repeat_4d(d: Draw) -> list[Any]:
    ne = d.ne()
    return [d.tensor([d.divisor(n) for n in ne]), *ne]


def concat(d: Draw) -> list[Any]:
    ne, dim, type = d.ne(), d.draw(st.integers(-1, 4)), d.draw(st.sampled_from(["f32", "f16", "i32"]))
    other = [d.dim() if i == dim else n for i, n in enumerate(ne)]
    return [d.tensor(ne, type=type), d.tensor(other, type=type), dim]


def diag(d: Draw) -> list[Any]:
    ne = d.ne()
    return [d.tensor([ne[0], 1, *ne[2:]], type=d.draw(st.sampled_from(["f32", "f16"])))]


def pad(n: int, least: int) -> Arguments:
    def arguments(d: Draw) -> list[Any]:
        return [d.tensor(d.ne()), *[d.draw(st.integers(least, 3)) for _ in range(n)]]

    return arguments


def group_norm(d: Draw) -> list[Any]:
    return [d.tensor(d.ne()), d.draw(st.integers(1, 4)), d.draw(FLOATS)]


#: What the library of ggml 0.20 has under the same names.
UNARY = [op for op in op_cases.UNARY if op not in ("hardswish", "hardsigmoid")]
GLU = op_cases.GLU

FAMILIES: dict[str, dict[str, Arguments]] = {
    "arithmetic": {
        **{f"{op}{suffix}": broadcast for op in ("add", "sub", "mul", "div") for suffix in ("", "_inplace")},
        **{
            f"{op}{suffix}": any_one
            for op in ["dup", "sqr", "sqrt", "log", "sin", "cos"]
            for suffix in ("", "_inplace")
        },
        **{f"{op}{suffix}": with_float for op in ("scale", "fill") for suffix in ("", "_inplace")},
        **{f"{op}{suffix}": into(3) for op in ("acc", "set") for suffix in ("", "_inplace")},
        **{f"set_1d{suffix}": into(0) for suffix in ("", "_inplace")},
        **{f"set_2d{suffix}": into(1) for suffix in ("", "_inplace")},
        "scale_bias": with_two_floats,
        "scale_bias_inplace": with_two_floats,
        "clamp_inplace": with_two_floats,
        "add1": add1,
        "add1_inplace": add1,
        "add_cast": add_cast,
        "add_id": add_id,
        "leaky_relu": leaky_relu,
        "tri": tri,
    },
    "activations": {
        **{f"{op}{suffix}": any_one for op in UNARY for suffix in ("", "_inplace")},
        **{f"{op}{suffix}": any_one for op in GLU for suffix in ("", "_swapped")},
        **{f"{op}_split": glu_split for op in GLU},
        "hardswish": any_one,
        "hardsigmoid": any_one,
        "unary": lambda d: [d.any_tensor(), d.draw(st.integers(0, 21))],
        "unary_inplace": lambda d: [d.any_tensor(), d.draw(st.integers(0, 21))],
        "glu": lambda d: [d.any_tensor(), d.draw(st.integers(0, 5)), d.draw(st.booleans())],
        "glu_split": lambda d: [*glu_split(d), d.draw(st.integers(0, 5))],
        "swiglu_oai": lambda d: [*glu_split(d), d.draw(FLOATS), d.draw(FLOATS)],
        "xielu": lambda d: [d.any_tensor(), *[d.draw(st.sampled_from([-2.0, 0.0, 0.5, 3.0, 30.0])) for _ in range(4)]],
    },
    "matrices": {
        "mul_mat": mul_mat,
        "mul_mat_id": mul_mat_id,
        "out_prod": out_prod,
        "mul_mat_set_prec": set_on("mul_mat", mul_mat, 0, 10),
        "mul_mat_set_hint": set_on("mul_mat", mul_mat, 0, 1),
    },
    "layout": {
        "cpy": cpy,
        "cast": cast,
        "cont": any_one,
        "reshape": reshape,
        **{f"{op}_{n}d": folded(n) for op in ("cont", "reshape") for n in (1, 2, 3, 4)},
        **{f"view_{n}d": view(n) for n in (1, 2, 3, 4)},
        "permute": permute,
        "transpose": any_one,
        "get_rows": get_rows,
        "set_rows": set_rows,
    },
    "attention": {
        **{f"diag_mask_{to}{suffix}": diag_mask for to in ("inf", "zero") for suffix in ("", "_inplace")},
        "soft_max": any_one,
        "soft_max_inplace": any_one,
        "soft_max_ext": soft_max_ext,
        "soft_max_ext_inplace": soft_max_ext,
        "soft_max_add_sinks": add_sinks("soft_max_ext", soft_max_ext),
        "rope": lambda d: list(rope_base(d)),
        "rope_inplace": lambda d: list(rope_base(d)),
        "rope_ext": rope_ext,
        "rope_ext_inplace": rope_ext,
        "rope_ext_back": rope_ext,
        "rope_multi": rope_multi,
        "rope_multi_inplace": rope_multi,
        "rope_multi_back": rope_multi,
        "flash_attn_ext": flash_attn_ext,
        "lightning_indexer": lightning_indexer,
        "flash_attn_ext_set_prec": set_on("flash_attn_ext", flash_attn_ext, 0, 10),
        "flash_attn_ext_add_sinks": add_sinks("flash_attn_ext", flash_attn_ext),
    },
    "rows": {
        **{op: any_one for op in ["sum", "sum_rows", "mean", "cumsum"]},
        **{f"{op}{suffix}": with_float for op in ("norm", "rms_norm", "l2_norm") for suffix in ("", "_inplace")},
        **{f"group_norm{suffix}": group_norm for suffix in ("", "_inplace")},
        "argmax": lambda d: [d.tensor([*d.ne()[:2], 1, 1])],
        "count_equal": same_shape,
        "argsort": argsort,
        "argsort_top_k": top_k,
        "top_k": top_k,
        "arange": arange,
        "repeat": broadcast_up,
        "repeat_4d": repeat_4d,
        "concat": concat,
        "diag": diag,
        "pad": pad(4, 0),
        "pad_circular": pad(4, 0),
        "pad_ext": pad(8, 0),
        "pad_ext_circular": pad(8, 0),
        "roll": pad(4, -3),
    },
    "recurrent": {
        "ssm_conv": ssm_conv,
        "ssm_scan": ssm_scan,
        "gated_delta_net": gated_delta_net,
        "solve_tri": solve_tri,
        **{op: linear_attention(op) for op in ("rwkv_wkv6", "rwkv_wkv7", "gated_linear_attn")},
        "dsv4_hc_comb": dsv4_hc_comb,
        "dsv4_hc_post": dsv4_hc_post,
    },
}
