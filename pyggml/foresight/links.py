"""The link of a card: from its generation and lanes, what is measured, and the host's memory."""

from __future__ import annotations

import re

from ..hardware.cards import Card
from .engine import Link

__all__ = ["link_of"]

#: What large pinned copies carry of 0.985 GB/s a lane of PCIe 3.0 (25.6 GB/s of PCIe 4.0 x16, 56 of 5.0 x16, 13.3 of 3.0 x16).
_PINNED_SHARE = 0.83
_LANE = 0.985e9


def link_of(card: Card, pcie: str = "", measured_gbs: float | None = None) -> Link:
    """Return the link between host and card.

    Parameters
    ----------
    pcie : str
        ``"4.0 x16"``; empty: the card's own, in a host of the fourth generation at most.
    measured_gbs : float, optional
        What pinned copies were measured at.
    """
    if card.is_unified:
        return Link(card.bytes_per_s)
    found = re.search(r"(\d)\.0 ?x ?(\d+)", pcie)
    generation = int(found[1]) if found else min(card.pcie, 4)
    lanes = int(found[2]) if found else card.lanes
    pinned = _PINNED_SHARE * _LANE * 2 ** (min(generation, card.pcie) - 3) * min(lanes, card.lanes)
    if measured_gbs:
        pinned = measured_gbs * 1e9
    return Link(pinned)
