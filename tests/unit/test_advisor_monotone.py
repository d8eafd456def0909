"""`pyggml plan` with more hardware, or less to hold, is never predicted slower: a grid of plans, in chains from less to more."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from pyggml.advisor import plan

GIB = 1 << 30
#: What formulas and steps of settings may be off.
SLACK = 1.01
DDR4 = "ddr4-3200x2,cores=8,64GiB"
#: A model, and cards that hold only a part of it.
BASES = [("gpt-oss-20b", "rtx3060-8GiB"), ("llama-3-8b", "rtx3060-5GiB"), ("qwen3-30b-a3b", "rtx4090-10GiB")]
#: By what a chain varies: values from less to more. ``{}`` is the base's card.
CHAINS: dict[str, list[dict[str, Any]]] = {
    "memory": [{"devices": f"{{}}-{n}GiB"} for n in (5, 7, 8, 10, 13)],
    "context": [{"context": n} for n in (32768, 16384, 8192, 2560)],
    "RAM": [{"host": f"{ram},cores=8,64GiB"} for ram in ("ddr4-2133x2", "ddr4-3200x2", "ddr5-6400x4")],
    "cores": [{"host": f"ddr5-6000x2,cores={n},64GiB"} for n in (4, 8, 16)],
    "link": [{"devices": f"sim:{{}}-pcie{n}"} for n in (3, 4)],
    "margin": [{"margin_bytes": n} for n in (2 * GIB, GIB, GIB // 2)],
    "cards": [{"devices": f"{{}}{more}"} for more in ("", ",rtx2060", ",rtx3060,rtx2060")],
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize(("model", "card"), BASES)
def test_more_is_never_predicted_slower(model: str, card: str, chain: str) -> None:
    """More memory, RAM, cores, link or cards, and less context or margin, cost at most 1 %."""
    least = None
    for values in CHAINS[chain]:
        asked = {"devices": card, "host": DDR4, **values}
        named = card.partition("-")[0] if chain == "memory" else card
        made = plan(model, **{**asked, "devices": asked["devices"].format(named)})
        if made.plans:
            best = made.plans[0]
            assert least is None or best.seconds <= SLACK * least[0], (values, best.flags, least)
            least = min(least or (best.seconds, best.flags), (best.seconds, best.flags))
    assert least is not None


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("model", "chain"),
    [
        ("gpt-oss-120b", ["rtx4090", "rtx4090,rtx3060", "rtx4090,rtx3060,rtx3060"]),
        ("glm-4.5-air", ["rtx3090", "rtx3090,rtx2060", "rtx3090,rtx3060", "rtx3090,rtx3090"]),
    ],
)
def test_another_card_is_never_predicted_slower_than_a_cache_on_one(model: str, chain: list[str]) -> None:
    """Where an expert cache on one card is best, a second card has whole layers beside it, or none."""
    seconds = [plan(model, devices=d, host="ddr5-6000x2,cores=8,96GiB").plans[0].seconds for d in chain]
    assert all(more <= SLACK * less for less, more in pairwise(seconds)), seconds
