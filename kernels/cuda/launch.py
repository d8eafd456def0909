"""Which kernels an op is, with what grid and arguments: from addresses, counts and strides to a list of launches.

Nothing here touches a device, and nothing waits for one: MUL_MAT_ID never reads its ids on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import mmvq, rows, tile
from .formats import FORMATS

#: up to so many tokens one warp a row is better than a tile (ggml: `MMVQ_MAX_BATCH_SIZE`)
FEW_TOKENS = 8
FLOAT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
#: blocks that share one row, at most
MAX_PIECES = 64
#: largest grid in y and z
MAX_GRID_YZ = 65535


@dataclass(frozen=True, slots=True)
class Operand:
    """Where a tensor lies: address, type (ggml's name), ``ne`` and ``nb`` in ggml order, 4 each."""

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


class _Scratch:
    """Hands out pieces of scratch memory."""

    def __init__(self, address: int) -> None:
        self.start = self.end = address

    def take(self, size: int) -> int:
        at = self.end
        self.end += _up(size, 256) * 256
        return at


# -- MUL_MAT_ID and MUL_MAT ------------------------------------------------------


def can_mul_mat(type: str, n_expert: int, n_slot: int, n_token: int) -> bool:
    """Whether the kernels know the type and their grids reach so far."""
    known = type in FORMATS or type in FLOAT_BYTES
    return known and n_slot * n_token // tile.COLUMNS + n_expert <= MAX_GRID_YZ


def _is_few(src0: Operand, n_column: int, n_slot: int, n_token: int) -> bool:
    """Whether the product goes row by row; a tile needs rows of two blocks."""
    short = src0.type in FORMATS and src0.ne[0] < 32 * tile.STAGE
    return (n_column <= FEW_TOKENS or short) and n_slot <= MAX_GRID_YZ and n_token <= MAX_GRID_YZ


def _product(
    src0: Operand,
    src1: Operand,
    ids: tuple[int, int, int],
    dst: Operand,
    counts: tuple[int, int],
    n_column: int,
    scratch: _Scratch,
) -> list[Launch]:
    """Return the launches of a product; ``ids``: address and strides by slot and token; ``counts``: slots, tokens."""
    n_k, n_row, n_expert = src0.ne[0], src0.ne[1], src0.ne[2]
    n_slot, n_token = counts
    ne11 = src1.ne[1]
    is_quantized = src0.type in FORMATS
    launches: list[Launch] = []
    if is_quantized:
        n_y = ne11 * src1.ne[2]
        yq, yd = scratch.take(n_y * n_k), scratch.take(n_y * n_k // 4)
        name = "quantize_q8_1" if src1.starts_at(16) else "quantize_q8_1_any"
        grid = (n_y, _up(n_k, rows.QUANTIZE_VALUES), 1)
        args = (src1.address, src1.nb[1], src1.nb[2], ne11, n_k, yq, yd)
        launches.append(Launch(name, grid, (rows.THREADS, 1, 1), args))
        suffix = ""
    else:
        per_load = 16 // FLOAT_BYTES[src0.type]
        suffix = "" if n_k % per_load == 0 and src0.starts_at(16) and src1.starts_at(16) else "_any"
    matrix = (src0.address, src0.nb[1], src0.nb[2])
    if _is_few(src0, n_column, n_slot, n_token):
        common = (*matrix, *ids, dst.address, dst.nb[1], dst.nb[2], n_row, ne11)
        own = (yq, yd, n_k // 32) if is_quantized else (src1.address, src1.nb[1], src1.nb[2], n_k)
        name = f"{'mmvq' if is_quantized else 'mmv'}_{src0.type}{suffix}"
        grid = (_up(n_row, mmvq.WARPS), n_slot, n_token)
        return [*launches, Launch(name, grid, (32, mmvq.WARPS, 1), common + own)]
    n = n_slot * n_token
    places = n // tile.COLUMNS + n_expert
    row_src, row_dst = scratch.take(4 * n), scratch.take(4 * n)
    bounds, tiles = scratch.take(4 * n_expert + 4), scratch.take(4 * places)
    args = (*ids, n, n_slot, ne11, row_src, row_dst, bounds, tiles)
    launches.append(Launch("group_ids", (n_expert, 1, 1), (32, 1, 1), args))
    common = (*matrix, row_src, row_dst, bounds, tiles, dst.address, dst.nb[1], n_row)
    if is_quantized:
        fmt = FORMATS[src0.type]
        needs_odd = n_k // 32 % tile.STAGE != 0 and fmt.is_steady(tile.STAGE) and not fmt.is_steady(1)
        name, n_rows, own = f"tile_{src0.type}" + ("_odd" if needs_odd else ""), tile.ROWS, (yq, yd, n_k // 32)
    else:
        name, n_rows = f"tile_{src0.type}{suffix}", tile.FLOAT_ROWS
        own = (src1.address, src1.nb[1], src1.nb[2], ne11, n_k)
    launches.append(Launch(name, (_up(n_row, n_rows), places, 1), (tile.THREADS, 1, 1), common + own))
    return launches


def mul_mat_id(src0: Operand, src1: Operand, ids: Operand, dst: Operand, scratch: int) -> tuple[list[Launch], int]:
    """Return the launches of MUL_MAT_ID and the bytes of scratch memory that they use from address ``scratch``.

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
    pool = _Scratch(scratch)
    counts = (ids.ne[0], ids.ne[1])
    where = (ids.address, ids.nb[0], ids.nb[1])
    return _product(src0, src1, where, dst, counts, counts[1], pool), pool.end - pool.start


def mul_mat(src0: Operand, src1: Operand, dst: Operand, scratch: int) -> tuple[list[Launch], int]:
    """Return the launches of MUL_MAT: MUL_MAT_ID whose slots are the rows, whose tokens are the matrices of src1.

    Parameters
    ----------
    src0 : [k, n, n_matrix]
    src1 : f32, [k, n_column, a multiple of n_matrix], rows dense
    dst : f32, contiguous
    """
    pool = _Scratch(scratch)
    n_matrix = src1.ne[2]
    ids = pool.take(4 * n_matrix)
    fill = Launch(
        "fill_ids", (1, _pieces(n_matrix, 1), 1), (rows.THREADS, 1, 1), (ids, n_matrix, n_matrix // src0.ne[2])
    )
    product = _product(src0, src1, (ids, 0, 4), dst, (src1.ne[1], n_matrix), src1.ne[1], pool)
    return [fill, *product], pool.end - pool.start


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
