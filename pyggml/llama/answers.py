"""`Answers`: what llama.cpp has answered about a model, and what follows from it for other flags without asking again.

llama.cpp's graph depends on the model, the context, the size, and on which fused ops stay on; where a weight is has no
effect on it. A fused op is switched off if the scheduler gives one to another device than that of its layer. Where a
weight is depends on its layer's device and on the first override that matches its name. So two placements that differ
only in overrides have equal graphs if the same fused ops stay on, and a weight is in the same memory with equal overrides.

If all layers are on devices and only experts are in host memory, each layer has weights on its device before its
experts, and ops between two such weights go to that device. What becomes of a fused op then depends on its own layer's
experts alone: if it stays on with no experts in host memory and with all of them, it stays on with any.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ..models.placement import EXPERTS
from .graphs import with_tensors
from .process import LlamaProcess
from .store import Captures

__all__ = ["OF_LAYER", "Answers", "Kind", "is_settled"]

Message = dict[str, Any]  # what goes through JSON
Overrides = Sequence[tuple[re.Pattern[str], str]]  # patterns and names of buffer types, in order

#: Most tokens of a sequence in graphs with which llama.cpp decides about fused ops; with fewer nothing is offloaded.
_N_PROBE = 16
#: Names of layers' weights. Each is in one place; others, such as a tied output, may be in several.
OF_LAYER = re.compile(r"(?:\w+\.)?blk\.(\d+)\.")
_EXPERT = re.compile(r"\.ffn_\w*_(?:ch|)exps\.")
#: Most decodes that are kept; each may have several MB.
_N_DECODES = 4


class Kind(NamedTuple):
    """What graphs depend on besides their size, as text: placement without overrides of layers' weights, context, fused ops."""

    placement: str
    context: str
    fused: str


class Answers:
    """Asks llama.cpp about one model, and derives answers from earlier ones.

    Parameters
    ----------
    process : LlamaProcess
        The child.
    paths : sequence of str
        The model's files.
    names : iterable of str
        The names of its weights.
    """

    def __init__(self, process: LlamaProcess, paths: Sequence[str], names: Iterable[str]) -> None:
        self.process, self.paths = process, tuple(paths)
        self._names = list(names)
        self._single = [name for name in self._names if not OF_LAYER.match(name)]
        self._matching: dict[re.Pattern[str], list[str]] = {}
        self.n_asked = 0  #: placements that llama.cpp was asked about
        self._facts: dict[tuple[str, str, str], Message] = {}
        self._of_kind: dict[Kind, tuple[Message, Message]] = {}  # flags that were asked, and facts
        self._fused: dict[tuple[str, str, str], list[list[str]]] = {}
        self._places: dict[tuple[str, str, int, str], Message] = {}
        self._single_homes: set[str] = set()
        self._decodes: dict[tuple[Kind, str], Message] = {}
        self._largest: dict[Kind, Message] = {}

    def captures(self, about: Message) -> Captures:
        """Return what asks with some flags."""
        return Captures(self.process, self.paths, about)

    def facts(self, about: Message, overrides: Overrides, *, derive: bool) -> tuple[Message, Kind]:
        """Return what a plan needs besides graphs, and the kind of all graphs.

        Parameters
        ----------
        about : dict
            ``placement`` and ``context``.
        derive : bool
            Answer without llama.cpp if possible. For placements of experts llama.cpp is then asked about two others
            first.
        """
        base, rows, context = (
            self._base(about, overrides),
            _text(about["placement"]["overrides"]),
            _text(about["context"]),
        )
        key = (base, rows, context)
        if key not in self._facts:
            found = self._derived(about, overrides) if derive else None
            self._facts[key] = self._asked(about, overrides) if found is None else found
        facts = self._facts[key]
        return facts, self._kind(about, overrides, facts["fused"])

    def own_kind(self, about: Message) -> Kind:
        """Return a kind of graphs that nothing else shares: those that read an expert cache."""
        kind = Kind(_text(about["placement"]), _text(about["context"]), f"expert cache {len(self._of_kind)}")
        self._of_kind[kind] = about, {}
        return kind

    def decode(self, kind: Kind, **how: object) -> Message:
        """Return the graphs of a decode; see `Capture.decode`."""
        key = (kind, _text(how))
        found = self._decodes.pop(key, None)
        if found is None:
            found = self.captures(self._of_kind[kind][0]).ask("decode", **how)
            found["graphs"] = [with_tensors(graph) for graph in found["graphs"]]
        self._decodes[key] = found
        if len(self._decodes) > _N_DECODES:
            del self._decodes[next(iter(self._decodes))]
        return found

    def largest(self, kind: Kind) -> Message:
        """Return the graph with which llama.cpp reserves memory."""
        if kind not in self._largest:
            self._largest[kind] = self.reserve(kind, None)
        return self._largest[kind]

    def reserve(self, kind: Kind, size: list[int] | None) -> Message:
        """Return the graph of a size over the whole cache; None: the largest."""
        return with_tensors(self.captures(self._of_kind[kind][0]).ask("reserve", size=size))

    def _kind(self, about: Message, overrides: Overrides, fused: object) -> Kind:
        """Return the kind of the graphs of some flags; pinned memory is like other host memory if each weight is in one place."""
        base = self._base(about, overrides)
        if base in self._single_homes:
            devices = [device | {"pinned": ""} for device in about["placement"]["devices"]]
            base = self._base(about | {"placement": about["placement"] | {"devices": devices}}, overrides)
        return Kind(base, _text(about["context"]), _text(fused))

    def _base(self, about: Message, overrides: Overrides) -> str:
        """Return a placement without overrides of layers' weights."""
        kept = [
            row
            for row, (pattern, _) in zip(about["placement"]["overrides"], overrides, strict=True)
            if any(map(pattern.search, self._single))
        ]
        return _text(about["placement"] | {"overrides": kept})

    def _asked(self, about: Message, overrides: Overrides) -> Message:
        facts, base = self.captures(about).ask("facts"), self._base(about, overrides)
        self.n_asked += 1
        told = [place["name"] for place in facts["weights"] if place["buft"] is not None]
        if "CPU" not in facts["layers"] and len(set(told)) == len(told):
            self._single_homes.add(base)
        self._fused[base, _text(about["placement"]["overrides"]), _probes(about)] = facts["fused"]
        self._of_kind[self._kind(about, overrides, facts["fused"])] = about, facts  # the latest is open in the child
        moved = self._moved(overrides)
        for place, n in _numbered(facts["weights"]):
            self._places[base, place["name"], n, moved.get(place["name"], "")] = place
        return facts

    def _derived(self, about: Message, overrides: Overrides) -> Message | None:
        """Return what follows from other placements; None if nothing does."""
        if not is_settled(about):
            return None
        base, fused = self._base(about, overrides), self._fused_ops(about, overrides)
        known = self._of_kind.get(self._kind(about, overrides, fused))
        if known is None:
            return None
        weights, moved = [], self._moved(overrides)
        for place, n in _numbered(known[1]["weights"]):
            found = self._places.get((base, place["name"], n, moved.get(place["name"], "")))
            if found is None:
                return None
            weights.append(found)
        return known[1] | {"weights": weights}

    def _fused_ops(self, about: Message, overrides: Overrides) -> list[list[str]] | None:
        """Return which fused ops stay on, if that is known or follows from placements with no and with all experts on the host."""
        base, probes = self._base(about, overrides), _probes(about)
        key = (base, _text(about["placement"]["overrides"]), probes)
        if key in self._fused or not overrides:
            return self._fused.get(key)
        some = next((facts for k, facts in self._facts.items() if k[0] == base), None)
        if some is None or "CPU" in some["layers"] or {where for _, where in overrides} != {"CPU"}:
            return None
        moved = self._moved(overrides)
        if not all(_EXPERT.search(place["name"]) for place in some["weights"] if place["name"] in moved):
            return None
        found = []
        for rows in ([], [[EXPERTS, "CPU"]]):
            end = (base, _text(rows), probes)
            if end not in self._fused:
                other = about | {"placement": about["placement"] | {"overrides": rows}}
                self.facts(other, [(re.compile(regex), buft) for regex, buft in rows], derive=False)
            found.append(self._fused[end])
        if found[0] == found[1]:
            self._fused[key] = found[0]
        return self._fused.get(key)

    def _moved(self, overrides: Overrides) -> dict[str, str]:
        """Return the buffer type of the first override that matches, for each name with one."""
        found: dict[str, str] = {}
        for pattern, buft in reversed(overrides):
            if pattern not in self._matching:
                self._matching[pattern] = list(filter(pattern.search, self._names))
            found |= dict.fromkeys(self._matching[pattern], buft)
        return found


def is_settled(about: Message) -> bool:
    """Return whether nothing is offloaded in the graphs with which llama.cpp decides about fused ops."""
    counts = [device["min_batch"] for device in about["placement"]["devices"]]
    few = all(n is None or n > _N_PROBE for n in counts)
    return few and about["context"]["n_seq_max"] == 1 and not about["context"]["moe_cache_size"]


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _probes(about: Message) -> str:
    """Return what of a context may change the decision about fused ops: the size of a micro-batch does not."""
    return _text({k: v for k, v in about["context"].items() if k not in ("n_batch", "n_ubatch", "op_offload")})


def _numbered(weights: list[Message]) -> Iterator[tuple[Message, int]]:
    """Yield weights with the number of earlier ones of the same name."""
    seen: Counter[str] = Counter()
    for place in weights:
        yield place, seen[place["name"]]
        seen[place["name"]] += 1
