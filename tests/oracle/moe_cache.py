"""Recordings of llama.cpp's expert cache, replayed: ``python -m tests.oracle.moe_cache FILE...``.

A recording has what went over the wire to a device while real llama.cpp decoded with a cache (``bs``: tokens of each
micro-batch, ``routing``: the ids by layer, ``budget``). pyggml's cache is given the same and must want the same writes, slot
maps and counts. Names of tensors, their bytes and the number of experts are taken from the writes, as a recording tells
them nowhere else; what is written where, and when, is only compared.

Each file gets a line; the first difference is printed, and ends the program with status 1.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyggml.moe_cache import EVICTIONS, CacheGroup, ExpertCache, ExpertTensor, slots_that_fit

__all__ = ["Difference", "Recording", "Replayed", "read", "replay"]

_BANK = re.compile(r"moe_cache\.(\d+)\.(.*)")
_SLOT_MAP = re.compile(r"(.*)#moe_cache\.slot_map-(\d+)#\d+")
_COPY = re.compile(r"(.*)#(blk\.(\d+)\.(\w+_exps)\.weight)#\d+")
#: Of the memory of a device whose alignment a recording does not tell: RPC servers that compute on a CPU.
_ALIGNMENT = 32

# notes and logs are JSON values
Note = list[Any]


class Difference(Exception):  # what was found, not what went wrong
    """Where a replay first does something else than the recording."""


@dataclass
class Recording:
    """A recording, and what its writes tell of the model.

    Attributes
    ----------
    kinds : list of str
        Expert tensors of a layer, in the order of the banks: ``ffn_gate_exps``, ...
    sizes : list of int
        Bytes of one expert of each.
    """

    path: Path
    lib: str
    log: list[str]
    sizes_of_batches: list[int]
    routing: list[dict[int, list[list[int]]]]
    notes: list[list[Note]]
    expert_bytes: int
    budget: int
    n_expert: int = 0
    kinds: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    alignment: int = _ALIGNMENT  #: of the device's memory

    @property
    def layers(self) -> list[int]:
        """The layers with experts."""
        return sorted({layer for batch in self.routing for layer in batch})

    @property
    def n_used(self) -> int:
        """Experts of a token."""
        return max(len(token) for batch in self.routing for rows in batch.values() for token in rows)


@dataclass
class Replayed:
    """What a replay went through."""

    eviction: str
    n_slots: int
    n_uploads: int = 0
    n_maps: int = 0
    n_past: int = 0  #: writes and copies of micro-batches that went past the cache
    lines: list[str] = field(default_factory=list)


def read(path: Path) -> Recording:
    """Read a recording.

    Raises
    ------
    ValueError
        It is none.
    """
    raw = path.read_bytes()
    try:
        data = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
        made = Recording(
            path, data["lib"], data["log"], data["bs"],
            [{int(layer): rows for layer, rows in batch.items()} for batch in data["routing"]],
            data["notes"], data["expert_bytes"], data["budget"], alignment=data.get("alignment", _ALIGNMENT),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError) as error:
        raise ValueError(f"{path}: no recording of an expert cache: {error!r}") from error
    _find_shape(made)
    return made


def _find_shape(made: Recording) -> None:
    """Take names, number of experts and bytes of an expert from the writes."""
    notes = [note for batch in made.notes for note in batch]
    for note in notes:
        if _SLOT_MAP.fullmatch(str(note[0])):
            made.n_expert = note[2] // 4
            break
    by_kind: dict[str, list[int]] = {}
    for note in notes:
        bank = _BANK.fullmatch(str(note[0]))
        if bank:
            kind = bank[2].split(".")[2]
            by_kind.setdefault(kind, []).extend(note[1:3])
    if not made.n_expert or not by_kind:
        raise ValueError(f"{made.path}: nothing was ever written to a cache, so its shape is not known")
    made.kinds = list(by_kind)
    alike = made.expert_bytes // len(by_kind)
    if all(n % alike == 0 for found in by_kind.values() for n in found):
        made.sizes = [alike] * len(by_kind)
    else:  # tensors of a layer differ in type: the step of each bank's offsets
        import math

        made.sizes = [math.gcd(*found) for found in by_kind.values()]
    if sum(made.sizes) != made.expert_bytes:
        raise ValueError(f"{made.path}: an expert has {made.expert_bytes} bytes, and its writes go by {made.sizes}")


def replay(recording: Recording, eviction: str) -> Replayed:
    """Give pyggml's cache what a recording's llama.cpp was given, and compare what it does.

    Raises
    ------
    Difference
        At the first difference.
    """
    layers, n_used = recording.layers, recording.n_used
    tensors = tuple(
        ExpertTensor(kind, (), recording.n_expert, n)
        for kind, n in zip(recording.kinds, recording.sizes, strict=True)
    )  # fmt: skip
    group = CacheGroup(0, tensors, layers=layers, n_slots=0)
    group.n_slots = slots_that_fit(group, recording.budget, recording.alignment)
    cache = ExpertCache(EVICTIONS[eviction](group.n_slots, recording.n_expert), recording.sizes, n_used=n_used)
    done = Replayed(eviction, group.n_slots)
    _compare_start(recording, group)
    for i, (n_tokens, routing) in enumerate(zip(recording.sizes_of_batches, recording.routing, strict=True)):
        notes = iter([n for n in recording.notes[i] if _is_of_cache(n)])
        past: list[Note] = []
        for layer, rows in sorted(routing.items()):
            where = f"micro-batch {i} of {n_tokens} tokens, layer {layer}"
            ids = [expert for row in rows for expert in row]
            if not cache.serves(len(rows), n_used):
                continue
            _, transfers = cache.update(layer, ids)
            for kind, size in zip(recording.kinds, recording.sizes, strict=True):
                for t in transfers:
                    note = next(notes, None)
                    _compare(where, _bank_write(note), (kind, t.slot * size, t.n_experts * size))
                    done.n_uploads += 1
            note = next(notes, None)
            found = None if note is None else _SLOT_MAP.fullmatch(str(note[0]))
            got = None if note is None or found is None else (int(found[2]), note[1], note[2], note[3])
            _compare(where, got, (layer, 0, 4 * recording.n_expert, cache.policy.slot_map(layer)))
            done.n_maps += 1
        past = list(notes)
        if past:  # the device took the experts of a micro-batch that goes past the cache
            done.n_past += _compare_past(recording, cache, routing, past, f"micro-batch {i} of {n_tokens} tokens")
    done.lines = cache.counters.lines()
    _compare("the counters", [line for line in recording.log if line.startswith("llama_moe_cache:")], done.lines)
    return done


def _is_of_cache(note: Note) -> bool:
    """Whether a note tells of experts or slots; biases and scales are copied as without a cache."""
    name = str(note[0])
    return bool(name == "COPY" or _BANK.fullmatch(name) or _SLOT_MAP.fullmatch(name) or _COPY.fullmatch(name))


def _bank_write(note: Note | None) -> tuple[str, int, int] | None:
    found = None if note is None else _BANK.fullmatch(str(note[0]))
    return None if note is None or found is None else (found[2].split(".")[2], note[1], note[2])


def _compare_start(recording: Recording, group: CacheGroup) -> None:
    """Compare layers, slots and their share with the log of the start."""
    found = next(
        (m for line in recording.log if (m := re.search(r"(\d+) layers, \S+: +(\d+) slots \((.*)%\)", line))), None
    )
    told = None if found is None else (int(found[1]), int(found[2]), found[3])
    _compare("the start", told, (len(group.layers), group.n_slots, f"{100 * group.share:.1f}"))


def _compare_past(
    recording: Recording,
    cache: ExpertCache,
    routing: dict[int, list[list[int]]],
    notes: Sequence[Note],
    where: str,
) -> int:
    """Compare the copies of weights of a micro-batch that goes past the cache; return how many there are."""
    got: dict[str, list[tuple[str, int, int]]] = {}
    for note in notes:
        name = str(note[2]).removesuffix(" (view)") if note[0] == "COPY" else str(note[0])
        found = _COPY.fullmatch(name)
        if found is None:
            raise Difference(f"{where}: {note[:3]} is written, and nothing was to be")
        step = ("within the device", 0, 0) if note[0] == "COPY" else ("from the host", note[1], note[2])
        got.setdefault(found[2], []).append(step)
    n = 0
    for layer, rows in sorted(routing.items()):
        if not rows or cache.serves(len(rows), recording.n_used):
            continue
        used = {expert for row in rows for expert in row}
        for k, (kind, size) in enumerate(zip(recording.kinds, recording.sizes, strict=True)):
            steps = [
                ("within the device", 0, 0)
                if part.slot is not None
                else ("from the host", part.expert * size, part.n_experts * size + part.pad_bytes)
                for part in cache.partial_copies(layer, used, k)
            ]
            name = f"blk.{layer}.{kind}.weight"
            _compare(f"{where}, {name}", got.pop(name, None), steps)
            n += len(steps)
    if got:
        raise Difference(f"{where}: {next(iter(got))} is copied, and was not to be")
    return n


def _compare(where: str, recorded: object, ours: object) -> None:
    if recorded != ours:
        raise Difference(f"{where}: recorded {_short(recorded)}, here {_short(ours)}")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 300 else text[:297] + "..."


def replay_any(recording: Recording) -> Replayed:
    """Replay with the rule of eviction that fits; a recording does not tell which it is, and versions are no key.

    Raises
    ------
    Difference
        None fits: the difference of the one that went furthest.
    """
    failures: list[tuple[int, Difference]] = []
    for eviction in EVICTIONS:
        try:
            return replay(recording, eviction)
        except Difference as difference:
            found = re.match(r"micro-batch (\d+)", str(difference))
            failures.append((int(found[1]) if found else -1, Difference(f"{eviction}: {difference}")))
    raise max(failures, key=lambda failure: failure[0])[1]


def _report(paths: Sequence[Path], eviction: str | None) -> Iterator[str]:
    for path in paths:
        recording = read(path)
        done = replay_any(recording) if eviction is None else replay(recording, eviction)
        yield (
            f"{path.name}: {done.eviction}, {len(recording.layers)} layers, {done.n_slots} slots: "
            f"{len(recording.notes)} micro-batches, {done.n_uploads:,} uploads, {done.n_maps:,} slot maps, "
            f"{done.n_past:,} copies past the cache and {len(done.lines)} lines of counts agree"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay files; 1 at the first difference."""
    parser = argparse.ArgumentParser(prog="python -m tests.oracle.moe_cache", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--eviction", choices=list(EVICTIONS), help="the rule; the one that fits if not given")
    options = parser.parse_args(arguments)
    path = options.files[0]
    try:
        for path in options.files:
            for line in _report([path], options.eviction):
                print(line, flush=True)
    except Difference as difference:
        print(f"{path.name}: {difference}")
        return 1
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
