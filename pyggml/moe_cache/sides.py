"""Graphs in which the device computes the experts that a cache holds, and the host those that it lacks.

A lookup gives each chosen expert two words. For the device these are its slot and whose row of the result is right; for the host
the expert, or -1 where the device has it, and the expert's number.
"""

from __future__ import annotations

from typing import NamedTuple

from .. import ops
from ..tensor import Tensor

__all__ = ["ExpertSides", "look_up", "make_sides"]


class ExpertSides(NamedTuple):
    """What a layer's products read if its device computes some of the chosen experts, and the host those that it lacks.

    Attributes
    ----------
    slots : Tensor
        Ids of the device's products: i32, [n_used, n_token]; of an expert that the device lacks any slot.
    side : Tensor
        Whose row is right: 0 the device's, 1 the host's; i32, [1, n_used * n_token].
    missing : Tensor
        Ids of the host's products, negative where the device has the expert: i32, [n_used, n_token].
    chosen : Tensor
        The chosen experts, in host memory: i32, [n_used, n_token].
    on_device, on_host : list of Tensor
        Nodes that must run there.
    """

    slots: Tensor
    side: Tensor
    missing: Tensor
    chosen: Tensor
    on_device: list[Tensor]
    on_host: list[Tensor]


def look_up(words: Tensor, ids: Tensor, name: str) -> Tensor:
    """Return the words that a map has for each id: i32, [n_word, n_used * n_token]."""
    dense = ids if ids.is_contiguous() else ops.cont(ids)
    found = ops.get_rows(words, ops.reshape_1d(dense, dense.numel))
    found.name = name
    return found


def make_sides(layer: int, ids: Tensor, slots: Tensor, missing: Tensor) -> ExpertSides:
    """Make the nodes that look up a layer's maps.

    Parameters
    ----------
    ids : Tensor
        The chosen experts: i32, [n_used, n_token].
    slots, missing : Tensor
        The two words of each expert for the device and for the host: i32, [2, n_expert].
    """
    n_used, n_token = ids.ne[:2]
    dense = ids if ids.is_contiguous() else ops.cont(ids)
    nodes, columns = [], []
    for words, name in ((slots, "slots"), (missing, "missing")):
        found = look_up(words, dense, f"ffn_moe_{name}-{layer}")
        apart = ops.cont(ops.transpose(found))
        apart.name = f"ffn_moe_{name}_apart-{layer}"
        nodes.append([found, apart])
        columns += [ops.view_1d(apart, n_used * n_token, i * apart.nb[1]) for i in (0, 1)]
    slot, side, absent, chosen = columns
    return ExpertSides(
        ops.reshape_2d(slot, n_used, n_token), ops.reshape_2d(side, 1, n_used * n_token),
        ops.reshape_2d(absent, n_used, n_token), ops.reshape_2d(chosen, n_used, n_token), *nodes,
    )  # fmt: skip
