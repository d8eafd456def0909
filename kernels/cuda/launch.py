"""The launches of an op: kernels, grids and arguments, from addresses, counts and strides.

Nothing here touches a device, and nothing waits for one: MUL_MAT_ID never reads its ids on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from . import mmvq, reduce, rows, tile
from . import rope as turned
from .formats import FORMATS

#: most tokens with which one warp per row is faster than a tile (ggml: `MMVQ_MAX_BATCH_SIZE`)
FEW_TOKENS = 8
FLOAT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
#: blocks that share one row, at most
MAX_PIECES = 64
#: largest grid in y and z
MAX_GRID_YZ = 65535


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor in memory: address, type (ggml's name), ``ne`` and ``nb`` in ggml order, 4 each."""

    address: int
    type: str
    ne: Sequence[int]
    nb: Sequence[int]

    def starts_at(self, n: int) -> bool:
        """Whether every row starts at a multiple of ``n`` bytes."""
        strides = (s for s, count in zip(self.nb[1:], self.ne[1:], strict=True) if count > 1)
        return self.address % n == 0 and all(s % n == 0 for s in strides)


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: kernel by name, grid, block, arguments in the order of its parameters."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    args: tuple[float, ...]


def _up(n: int, to: int) -> int:
    return -(-n // to)


#: places of a `Workspace`
_ACTIVATIONS, _GROUPING, _IDS = range(3)


class Workspace:
    """Additional memory for the products of one stream, and its contents.

    Gate and up of an expert read the same activations with the same ids, so data prepared for the first is used for the
    second until the activations are overwritten (`forget`). Each kind of data has a place with the size that the
    largest op needs. A first pass over the ops with ``Workspace()`` finds the sizes, a second makes the launches.

    Attributes
    ----------
    sizes : list of int
        Bytes that the places need for the largest op so far.
    """

    def __init__(self, address: int = 0, sizes: Sequence[int] = (0, 0, 0)) -> None:
        self._starts = (address, address + sizes[0], address + sizes[0] + sizes[1])
        self.sizes = [0, 0, 0]
        self._holds: list[tuple[object, int, int] | None] = [None, None, None]

    @property
    def size(self) -> int:
        """Bytes of all places."""
        return sum(self.sizes)

    def take(self, place: int, key: object, source: tuple[int, int], sizes: Sequence[int]) -> tuple[list[int], bool]:
        """Return addresses of pieces in a place, and whether they already contain the data of ``key``.

        Parameters
        ----------
        source : tuple of int
            First and end address of the data's source.
        """
        at = [self._starts[place]]
        for size in sizes:
            at.append(at[-1] + _up(size, 256) * 256)
        self.sizes[place] = max(self.sizes[place], at.pop() - at[0])
        held = self._holds[place]
        is_there = held is not None and held[0] == key
        self._holds[place] = (key, *source)
        return at, is_there

    def forget(self, start: int, end: int) -> None:
        """Drop data whose source was overwritten."""
        for i, held in enumerate(self._holds):
            if held is not None and held[1] < end and start < held[2]:
                self._holds[i] = None


# -- MUL_MAT_ID and MUL_MAT ------------------------------------------------------


def _is_few(src0: Operand, n_column: int, n_slot: int, n_token: int) -> bool:
    """Whether the product goes row by row; a tile needs rows of two blocks."""
    short = src0.type in FORMATS and src0.ne[0] < 32 * tile.STAGE
    return (n_column <= FEW_TOKENS or short) and n_slot <= MAX_GRID_YZ and n_token <= MAX_GRID_YZ


def _span(operand: Operand) -> tuple[int, int]:
    """Return the addresses that an operand's rows lie between."""
    last = sum((n - 1) * b for n, b in zip(operand.ne, operand.nb, strict=True))
    return operand.address, operand.address + last + operand.nb[0]


def _quantize(src1: Operand, work: Workspace) -> tuple[list[Launch], int, int]:
    """Return the launches that quantise activations, none if that was done, and where quants and scales lie."""
    n_k, n_y = src1.ne[0], src1.ne[1] * src1.ne[2]
    key = (src1.address, tuple(src1.ne), tuple(src1.nb))
    (yq, yd), is_there = work.take(_ACTIVATIONS, key, _span(src1), (n_y * n_k, n_y * n_k // 4))
    if is_there:
        return [], yq, yd
    name = "quantize_q8_1" if src1.starts_at(16) else "quantize_q8_1_any"
    args = (src1.address, src1.nb[1], src1.nb[2], src1.ne[1], n_k, yq, yd)
    return [Launch(name, (n_y, _up(n_k, rows.QUANTIZE_VALUES), 1), (rows.THREADS, 1, 1), args)], yq, yd


def _group(
    ids: tuple[int, int, int], counts: tuple[int, int], ne11: int, n_expert: int, work: Workspace
) -> tuple[list[Launch], list[int], int]:
    """Return the launches that sort pairs by expert, none if that was done; where the lists lie; places of tiles."""
    n_slot, n_token = counts
    n = n_slot * n_token
    places = n // tile.COLUMNS + n_expert
    span = (ids[0], ids[0] + (n_slot - 1) * ids[1] + (n_token - 1) * ids[2] + 4)
    sizes = (4 * n, 4 * n, 4 * n_expert + 4, 4 * places)
    lists, is_there = work.take(_GROUPING, (ids, counts, ne11, n_expert), span, sizes)
    args = (*ids, n, n_slot, ne11, *lists)
    made = [] if is_there else [Launch("group_ids", (n_expert, 1, 1), (32, 1, 1), args)]
    return made, lists, places


def _product(
    src0: Operand,
    src1: Operand,
    ids: tuple[int, int, int],
    dst: Operand,
    counts: tuple[int, int],
    n_column: int,
    work: Workspace,
) -> list[Launch]:
    """Return the launches of a product; ``ids``: address and strides by slot and token; ``counts``: slots, tokens."""
    n_k, n_row, n_expert = src0.ne[0], src0.ne[1], src0.ne[2]
    n_slot, n_token = counts
    ne11 = src1.ne[1]
    is_quantized = src0.type in FORMATS
    launches: list[Launch] = []
    suffix = ""
    own: tuple[float, ...]
    if is_quantized:
        launches, yq, yd = _quantize(src1, work)
        own = (yq, yd, n_k // 32)
    else:
        own = (src1.address, src1.nb[1], src1.nb[2])
        if n_k % (16 // FLOAT_BYTES[src0.type]) or not src0.starts_at(16) or not src1.starts_at(16):
            suffix = "_any"
    matrix = (src0.address, src0.nb[1], src0.nb[2])
    if _is_few(src0, n_column, n_slot, n_token):
        common = (*matrix, *ids, dst.address, dst.nb[1], dst.nb[2], n_row, ne11)
        own += () if is_quantized else (n_k,)
        name = f"{'mmvq' if is_quantized else 'mmv'}_{src0.type}{suffix}"
        grid = (_up(n_row, mmvq.WARPS), n_slot, n_token)
        return [*launches, Launch(name, grid, (32, mmvq.WARPS, 1), common + own)]
    grouping, lists, places = _group(ids, counts, ne11, n_expert, work)
    common = (*matrix, *lists, dst.address, dst.nb[1], n_row)
    if is_quantized:
        fmt = FORMATS[src0.type]
        if n_k // 32 % tile.STAGE and fmt.is_steady(tile.STAGE) and not fmt.is_steady(1):
            suffix = "_odd"
    else:
        own += (ne11, n_k)
    grid = (_up(n_row, tile.ROWS), places, 1)
    return [*launches, *grouping, Launch(f"tile_{src0.type}{suffix}", grid, (tile.THREADS, 1, 1), common + own)]


def mul_mat_id(src0: Operand, src1: Operand, ids: Operand, dst: Operand, work: Workspace) -> list[Launch]:
    """Return the launches of MUL_MAT_ID.

    Parameters
    ----------
    src0 : [k, n, n_expert]
    src1 : f32, [k, n_used or a divisor of it, n_token], rows dense
    ids : i32, [n_used, n_token]
        Every id is below ``n_expert``; the caller has checked, the device does not.
    dst : f32, [n, n_used, n_token], contiguous

    Notes
    -----
    Mirrors `ggml_cuda_mul_mat_id`. Differs: no path reads the ids on the host.
    """
    counts = (ids.ne[0], ids.ne[1])
    return _product(src0, src1, (ids.address, ids.nb[0], ids.nb[1]), dst, counts, counts[1], work)


def mul_mat(src0: Operand, src1: Operand, dst: Operand, work: Workspace) -> list[Launch]:
    """Return the launches of MUL_MAT: MUL_MAT_ID whose slots are the rows, whose tokens are the matrices of src1.

    Parameters
    ----------
    src0 : [k, n, n_matrix]
    src1 : f32, [k, n_column, a multiple of n_matrix], rows dense
    dst : f32, contiguous

    Notes
    -----
    Mirrors `ggml_cuda_mul_mat`. Differs: no path of its own.
    """
    n_matrix = src1.ne[2]
    n_repeat = n_matrix // src0.ne[2]
    (ids,), is_there = work.take(_IDS, (n_matrix, n_repeat), (0, 0), (4 * n_matrix,))
    fill = Launch("fill_ids", (1, _pieces(n_matrix, 1), 1), (rows.THREADS, 1, 1), (ids, n_matrix, n_repeat))
    product = _product(src0, src1, (ids, 0, 4), dst, (src1.ne[1], n_matrix), src1.ne[1], work)
    return product if is_there else [fill, *product]


# -- row by row ------------------------------------------------------------------


def _pieces(n: int, step: int) -> int:
    return max(1, min(MAX_PIECES, _up(n, rows.THREADS * step)))


def _by_row(kernel: str, n_row: int, n: int, is_wide: bool, args: tuple[float, ...]) -> Launch:
    step = 4 if is_wide else 1
    name = kernel if is_wide else f"{kernel}_any"
    return Launch(name, (n_row, _pieces(n, step), 1), (rows.THREADS, 1, 1), args)


def add_id(src0: Operand, src1: Operand, ids: Operand, dst: Operand) -> list[Launch]:
    """Return the launches of ADD_ID; src0 and dst [n, n_used, n_token], src1 [n, n_expert], all f32."""
    is_wide = src0.ne[0] % 4 == 0 and src0.starts_at(16) and src1.starts_at(16) and dst.starts_at(16)
    args = (src0.address, src0.nb[1], src0.nb[2], src1.address, src1.nb[1], ids.address, ids.nb[0], ids.nb[1])
    args += (dst.address, dst.nb[1], dst.nb[2], dst.ne[0], dst.ne[1])
    return [_by_row("add_id", dst.ne[1] * dst.ne[2], dst.ne[0], is_wide, args)]


def binary(kernel: str, src0: Operand, src1: Operand, dst: Operand) -> list[Launch]:
    """Return the launches of ``add``, ``sub``, ``mul`` or ``div`` of f32 tensors, src1 repeated as needed."""
    ne = dst.ne
    is_aligned = src0.starts_at(16) and src1.starts_at(16) and dst.starts_at(16)
    is_wide = ne[0] % 4 == 0 and src1.ne[0] == ne[0] and is_aligned
    args = (src0.address, *src0.nb[1:], src1.address, *src1.nb[1:], *src1.ne, dst.address, *dst.nb[1:], *ne[:3])
    return [_by_row(kernel, ne[1] * ne[2] * ne[3], ne[0], is_wide, args)]


def scale(src: Operand, dst: Operand, factor: float, bias: float) -> list[Launch]:
    """Return the launches of SCALE of a contiguous f32 tensor."""
    n = dst.ne[0] * dst.ne[1] * dst.ne[2] * dst.ne[3]
    is_wide = n % 4 == 0 and src.address % 16 == 0 and dst.address % 16 == 0
    return [_by_row("scale", 1, n, is_wide, (src.address, dst.address, n, factor, bias))]


def glu(kernel: str, gate: Operand, value: Operand, dst: Operand, alpha: float, limit: float) -> list[Launch]:
    """Return the launches of a gated unit; rows of each tensor are evenly apart."""
    args = (gate.address, gate.nb[1], value.address, value.nb[1], dst.address, dst.nb[1], dst.ne[0], alpha, limit)
    n_row = dst.ne[1] * dst.ne[2] * dst.ne[3]
    return [Launch(kernel, (n_row, _pieces(dst.ne[0], 1), 1), (rows.THREADS, 1, 1), args)]


def _by_value(kernel: str, ne: Sequence[int], args: tuple[float, ...]) -> list[Launch]:
    grid = (_up(ne[0] * ne[1], rows.THREADS), ne[2] * ne[3], 1)
    return [Launch(kernel, grid, (rows.THREADS, 1, 1), args)]


def _dense(operand: Operand, ne: Sequence[int]) -> Operand:
    """Return a contiguous operand as one of another shape with as many values."""
    nb = [operand.nb[0]]
    for n in ne[:-1]:
        nb.append(nb[-1] * n)
    return Operand(operand.address, operand.type, ne, nb)


def copy(src: Operand, dst: Operand, *, is_dst_dense: bool = True) -> list[Launch]:
    """Return the launches of a copy; the types are of `copies.COPIES`.

    Parameters
    ----------
    is_dst_dense : bool
        Of two shapes, whether dst is the contiguous one and takes src's; else src is, and takes dst's.
    """
    if list(src.ne) != list(dst.ne):
        src, dst = (src, _dense(dst, src.ne)) if is_dst_dense else (_dense(src, dst.ne), dst)
    args = (src.address, *src.nb, dst.address, *dst.nb, *dst.ne[:3])
    return _by_value(f"copy_{src.type}_{dst.type}", dst.ne, args)


def set_rows(src0: Operand, src1: Operand, dst: Operand) -> list[Launch]:
    """Return the launches of SET_ROWS: f32 rows ``src0`` go to rows ``src1`` (i64 or i32) of ``dst``."""
    args = (src0.address, *src0.nb[1:], src1.address, *src1.nb[:3], src1.ne[1], src1.ne[2], dst.address, *dst.nb[1:])
    return _by_value(f"set_rows_{dst.type}", src0.ne, (*args, *src0.ne[:3]))


def get_rows(src0: Operand, src1: Operand, dst: Operand) -> list[Launch]:
    """Return the launches of GET_ROWS: rows of a type of `copies.GETS`, named by i32 indices."""
    args = (src0.address, *src0.nb[1:], src1.address, *src1.nb[:3], dst.address, *dst.nb[1:], *dst.ne[:3])
    return _by_value(f"get_rows_{src0.type}", dst.ne, args)


def unary(kernel: str, src: Operand, dst: Operand, low: float = 0.0, high: float = 0.0) -> list[Launch]:
    """Return the launches of a function of `rows.UNARY` of a contiguous f32 tensor; CLAMP takes its limits."""
    n = dst.ne[0] * dst.ne[1] * dst.ne[2] * dst.ne[3]
    args = (src.address, dst.address, n, low, high)
    return [Launch(kernel, (1, _pieces(n, 1), 1), (rows.THREADS, 1, 1), args)]


# -- rows whose values meet ------------------------------------------------------


def _reduce(kernel: str, src: Operand, dst: Operand, *more: float, share: int = 4) -> list[Launch]:
    """Return the launch of a kernel of `reduce`: a block a row, no larger than if each thread has ``share`` values."""
    n_row = src.ne[1] * src.ne[2] * src.ne[3]
    threads = min(reduce.THREADS, _up(src.ne[0], 32 * share) * 32)
    args = (src.address, *src.nb[1:], dst.address, *dst.nb[1:], *src.ne[:3], *more)
    return [Launch(kernel, (n_row, 1, 1), (threads, 1, 1), args)]


def rms_norm(src: Operand, dst: Operand, eps: float) -> list[Launch]:
    """Return the launches of RMS_NORM of f32 rows."""
    return _reduce("rms_norm", src, dst, eps)


def sum_rows(src: Operand, dst: Operand) -> list[Launch]:
    """Return the launches of SUM_ROWS of f32 rows."""
    return _reduce("sum_rows", src, dst)


def argsort(src: Operand, dst: Operand, *, descending: bool) -> list[Launch]:
    """Return the launches of ARGSORT or, where dst has shorter rows, TOP_K; rows of at most `reduce.MAX_SORTED`."""
    return _reduce("argsort", src, dst, dst.ne[0], 0 if descending else 0xFFFFFFFF, share=1)


def soft_max(
    src: Operand, mask: Operand | None, sinks: Operand | None, dst: Operand, scale: float, max_bias: float
) -> list[Launch]:
    """Return the launches of SOFT_MAX of f32 rows; the mask is f32 or f16, and repeated over heads and streams."""
    more: tuple[float, ...] = (scale, 0 if sinks is None else sinks.address)
    if mask is None:
        return _reduce("soft_max_none", src, dst, *more)
    n_base0, base0, base1 = 0, 1.0, 1.0
    if max_bias > 0:  # mirrors the slopes of `soft_max_f32_cuda`
        n_base0 = 1 << (src.ne[2].bit_length() - 1)
        base0, base1 = (2.0 ** -(bias / n_base0) for bias in (max_bias, max_bias / 2))
    more += (mask.address, *mask.nb[1:], *mask.ne[2:], n_base0, base0, base1)
    return _reduce(f"soft_max_{mask.type}", src, dst, *more)


@dataclass(frozen=True, slots=True)
class Rope:
    """How pairs are turned: ``n_dims`` of a row, of halves (``is_neox``) or neighbours; the rest is YaRN's."""

    n_dims: int
    is_neox: bool
    n_ctx_orig: int
    freq_base: float
    freq_scale: float
    ext_factor: float
    attn_factor: float
    beta_fast: float
    beta_slow: float

    def mixed_pairs(self) -> tuple[float, float]:
        """Return the pairs between which interpolated and extrapolated angles are mixed.

        Notes
        -----
        Mirrors `ggml_rope_yarn_corr_dims`.
        """

        def pair(n_turns: float) -> float:
            turns = self.n_ctx_orig / (n_turns * 2 * math.pi)
            return self.n_dims * math.log(turns) / (2 * math.log(self.freq_base))

        return max(0.0, math.floor(pair(self.beta_fast))), min(self.n_dims - 1.0, math.ceil(pair(self.beta_slow)))


def rope(src: Operand, positions: Operand, factors: Operand | None, dst: Operand, how: Rope) -> list[Launch]:
    """Return the launches of ROPE of f32 or f16 rows, in the modes NORMAL and NEOX."""
    low = high = 0.0
    magnitude = how.attn_factor
    if how.ext_factor:
        low, high = how.mixed_pairs()
        magnitude *= 1 + 0.1 * math.log(1 / how.freq_scale)
    n_pair = how.n_dims // 2
    args = (src.address, *src.nb[1:], dst.address, *dst.nb[1:], *dst.ne[:3], positions.address, positions.nb[0])
    args += (0 if factors is None else factors.address, n_pair, *((1, n_pair) if how.is_neox else (2, 1)))
    args += (how.freq_base ** (-2 / how.n_dims), how.freq_scale, how.ext_factor, magnitude, low, high)
    n_row = dst.ne[1] * dst.ne[2] * dst.ne[3]
    grid = (n_row, _up(dst.ne[0], 2 * turned.THREADS), 1)
    return [Launch(f"rope_{src.type}", grid, (turned.THREADS, 1, 1), args)]
