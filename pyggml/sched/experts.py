"""The used experts of a micro-batch, and the byte ranges of a weight that contain them: pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import SchedError

__all__ = ["EXPERT_PAD_BYTES", "CopyRange", "expert_copy_ranges", "find_bad_id", "layer_of", "used_experts"]

#: MMQ reads past the last expert of a range; there must be no NaN (`ggml_backend_sched_compute_splits`).
EXPERT_PAD_BYTES = 512


@dataclass(frozen=True, slots=True)
class CopyRange:
    """Bytes of a weight to copy; offsets in source and copy are equal."""

    offset_bytes: int
    size_bytes: int

    @property
    def end_bytes(self) -> int:
        """The first byte after the range."""
        return self.offset_bytes + self.size_bytes


def used_experts(words: Sequence[int], *, n_used: int, n_token: int, strides: tuple[int, int]) -> set[int]:
    """Return the distinct ids of a micro-batch.

    Parameters
    ----------
    words : sequence of int32
        The ids tensor in words of 32 bits, including gaps.
    n_used, n_token : int
        The number of slots per token and of tokens: the tensor's ``ne[0]`` and ``ne[1]``.
    strides : (int, int)
        The strides of slot and token, in words.

    Examples
    --------
    >>> sorted(used_experts([3, 1, 9, 1, 0, 9], n_used=2, n_token=2, strides=(1, 3)))
    [0, 1, 3]
    """
    s0, s1 = strides
    used: set[int] = set()
    if n_used == 0:
        return used
    span = (n_used - 1) * s0 + 1
    for i1 in range(n_token):
        used.update(words[i1 * s1 : i1 * s1 + span : s0])
    return used


def find_bad_id(
    words: Sequence[int], *, n_used: int, n_token: int, strides: tuple[int, int], n_expert: int
) -> tuple[int, int, int] | None:
    """Return token, slot and id of the first id outside ``0 .. n_expert - 1``; None if there is none."""
    s0, s1 = strides
    for i1 in range(n_token):
        for i0 in range(n_used):
            id = words[i1 * s1 + i0 * s0]
            if not 0 <= id < n_expert:
                return i1, i0, id
    return None


def expert_copy_ranges(
    used: Iterable[int],
    n_expert: int,
    expert_bytes: int,
    *,
    pad_bytes: int = EXPERT_PAD_BYTES,
    tensor_bytes: int | None = None,
) -> list[CopyRange]:
    """Return the byte ranges of the used experts; ranges of neighbours are merged.

    Parameters
    ----------
    used : iterable of int
        Ids, each in ``0 .. n_expert - 1``.
    expert_bytes : int
        The distance from one expert to the next, ``nb[2]``.
    pad_bytes : int
        Bytes added to a range that does not end at the last expert; at most the size of an expert.
    tensor_bytes : int, optional
        The size of the weight; ranges end there.

    Returns
    -------
    list of CopyRange
        Ranges in ascending order.

    Raises
    ------
    SchedError
        There is no such expert.

    Notes
    -----
    Mirrors the grouping in `ggml_backend_sched_compute_splits`.
    Differs: without used experts there is no range; upstream assumes at least one expert. A range ends with the weight;
    upstream aborts at the last expert of a strided view.

    Examples
    --------
    >>> expert_copy_ranges({0, 1, 7}, 8, 1000)
    [CopyRange(offset_bytes=0, size_bytes=2512), CopyRange(offset_bytes=7000, size_bytes=1000)]
    """
    end = n_expert * expert_bytes if tensor_bytes is None else tensor_bytes
    pad = min(expert_bytes, pad_bytes)
    ranges = []
    ids = sorted(set(used))
    if ids and not 0 <= ids[0] <= ids[-1] < n_expert:
        wrong = next(i for i in ids if not 0 <= i < n_expert)
        raise SchedError(f"there is no expert {wrong}; they are 0 .. {n_expert - 1}")
    for first, last in _runs(ids):
        offset = first * expert_bytes
        size = (last - first + 1) * expert_bytes + (pad if last < n_expert - 1 else 0)
        ranges.append(CopyRange(offset, min(size, end - offset)))
    return ranges


def _runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and last id of each group of neighbours."""
    runs: list[tuple[int, int]] = []
    for id in ids:
        if runs and id == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], id)
        else:
            runs.append((id, id))
    return runs


def layer_of(name: str) -> int | None:
    """Return the layer number in a tensor's name, such as ``blk.3.ffn_up_exps.weight`` or ``ffn_inp-3``."""
    found = re.match(r"blk\.(\d+)\.", name) or re.search(r"-(\d+)(?: |$)", name)
    return int(found[1]) if found else None
