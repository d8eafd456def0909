"""A later ggml against the newest rules known here: ``python -m tests.oracle.keep_up PATH``.

``PATH`` is a shared object that holds ggml, a folder with ``libggml-base.so`` (and ``libllama.so``, whose own copy callback
is then asked), or a source tree, of which ``ggml-base`` is built with CMake into the cache folder.

Every recorded case runs in the library and here. For each that differs the first difference is printed, and the rules of
`Dialect` that no longer hold: other known values of these rules, and no fewer, make the replay agree. Where none do, a new
rule is needed. Status 0 if all agree, 1 if not, 2 if the library cannot be asked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from cases.graph import Json

from pyggml import config
from pyggml.dialect import DIALECTS, Dialect
from pyggml.replay import Replay, parse_case, replay
from pyggml.replay.case import Step

from .compare import load
from .live_sched import LiveScheduler
from .traces import differences

__all__ = ["Verdict", "broken_rules", "build", "judge", "main"]

CASES = Path(__file__).parents[1] / "replay" / "cases"
#: As many rules may change together in one case before a new rule is thought of.
MAX_RULES = 4


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a case.

    Attributes
    ----------
    case : str
    differences : list of str
        Empty: the library goes by the rules known here.
    rules : dict or None
        Rules with the values that hold instead; None: no known values explain it.
    """

    case: str
    differences: list[str]
    rules: dict[str, object] | None = None


def build(tree: Path) -> Path:
    """Return the folder of ``libggml-base.so``, built from a source tree of ggml or llama.cpp.

    Raises
    ------
    RuntimeError
        It is no such tree, there is no CMake, or it does not build.
    """
    source = next((p for p in (tree / "ggml", tree) if (p / "src" / "ggml-backend.cpp").exists()), None)
    if source is None:
        raise RuntimeError(f"{tree}: no libggml-base.so and no src/ggml-backend.cpp here")
    if shutil.which("cmake") is None:
        raise RuntimeError("a source tree is built with CMake, which is not on the path")
    parts = sorted([*(source / "src").glob("ggml*.[ch]*"), *(source / "include").glob("*.h")])
    key = hashlib.sha256(b"".join(p.read_bytes() for p in parts)).hexdigest()[:16]
    target = config.cache_dir() / "keep_up" / key
    if not (target / "libggml-base.so").exists():
        copy, made = target / "source", target / "build"
        shutil.copytree(source, copy, dirs_exist_ok=True)
        (copy / "ggml.pc.in").touch()  # source packages lack it
        options = ["-DGGML_CPU=OFF", "-DBUILD_SHARED_LIBS=ON", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_BUILD_TESTS=OFF"]
        for command in (
            ["cmake", "-S", str(copy), "-B", str(made), *options, "-DGGML_BUILD_EXAMPLES=OFF"],
            ["cmake", "--build", str(made), "--target", "ggml-base", "-j", "2"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stderr or done.stdout)[-2000:]}")
        found = next(made.rglob("libggml-base.so"))
        shutil.copy(found, target / "libggml-base.so")
    return target


def _replayed(case: Json, dialect: Dialect) -> list[Json]:
    records: list[Json] = json.loads(json.dumps(replay(parse_case(dict(case)), dialect=dialect)["steps"]))
    return records


def _n_agreeing(want: Sequence[Json], got: Sequence[Json]) -> int:
    """Return how many results and calls agree before the first that does not."""

    def flat(records: Sequence[Json]) -> Iterator[object]:
        for record in records:
            yield from record["calls"]
            yield {k: v for k, v in record.items() if k in ("op", "result", "state", "nodes", "leafs")}

    n = 0
    for a, b in zip(flat(want), flat(got), strict=False):
        if a != b:
            break
        n += 1
    return n


def broken_rules(case: Json, trace: Sequence[Json], dialect: Dialect) -> dict[str, object] | None:
    """Return rules, with other known values, under which the replay of a case agrees with a trace; None if there are none.

    Rules are added one by one, each time the one that moves the first difference furthest; those that are not needed in
    the end are left out.
    """
    values = {
        f.name: {getattr(d, f.name) for d in DIALECTS.values()} for f in fields(Dialect) if f.name != "version"
    }  # fmt: skip
    chosen: dict[str, object] = {}
    reached = _n_agreeing(trace, _replayed(case, dialect))
    for _ in range(MAX_RULES):
        best: tuple[int, str, object] | None = None
        for name, known in values.items():
            for value in known - {getattr(dialect, name)}:
                changed = replace(dialect, **chosen, **{name: value}) if name not in chosen else None
                if changed is None:
                    continue
                got = _replayed(case, changed)
                if not differences(trace, got):
                    return _needed(case, trace, dialect, {**chosen, name: value})
                n = _n_agreeing(trace, got)
                if n > reached and (best is None or n > best[0]):
                    best = (n, name, value)
        if best is None:
            return None
        reached = best[0]
        chosen[best[1]] = best[2]
    return None


def _needed(case: Json, trace: Sequence[Json], dialect: Dialect, rules: dict[str, object]) -> dict[str, object]:
    for name in list(rules):
        fewer = {k: v for k, v in rules.items() if k != name}
        if not differences(trace, _replayed(case, replace(dialect, **fewer))):
            rules = fewer
    return rules


def _reallocations(case: Json, dialect: Dialect) -> list[list[bool]]:
    """Return what the realloc callback of a replay is told."""
    told: list[list[bool]] = []
    run = Replay(parse_case(dict(case)), dialect)
    for step in (Step("sched_new"), *run.case.steps):
        run.step(step)
        if run.sched is not None:
            run.sched.realloc_callback = lambda _, __, ids, size: told.append([ids, size])
    return told


def judge(live: LiveScheduler, case: Json, dialect: Dialect) -> Verdict:
    """Run a case in a library and here."""
    name, trace = case["name"], live.trace(case)
    found = differences(trace, _replayed(case, dialect))
    if found:
        return Verdict(name, found, broken_rules(case, trace, dialect))
    if live.dialect.realloc_callback and not any("abort" in record for record in trace):
        # after a failure upstream splits the same graph once more, whose sources are the freed copies of before
        n = next((i + 1 for i, r in enumerate(trace) if r.get("result") is False), len(trace))
        told = [told for record in trace[:n] for told in record.get("reallocs", ())]
        ours = _reallocations(case, dialect)[: len(told) if n < len(trace) else None]
        if told != ours:
            return Verdict(
                name, [f"the realloc callback is told {told}, here {ours}"], {"realloc_callback": "otherwise"}
            )
    return Verdict(name, [])


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare a library with the rules known here."""
    parser = argparse.ArgumentParser(prog="python -m tests.oracle.keep_up", description=__doc__)
    parser.add_argument("path", type=Path, help="library, folder of libraries, or source tree")
    parser.add_argument("--cases", type=Path, default=CASES, help="folder of cases (default: those of the project)")
    parser.add_argument("--dialect", choices=list(DIALECTS), help="rules to hold it to (default: the newest)")
    options = parser.parse_args(arguments)
    path: Path = options.path
    try:
        if path.is_dir() and not list(path.glob("libggml-base.so*")):
            print(f"building ggml-base of {path}", file=sys.stderr)
            path = build(path)
        live = LiveScheduler(str(path.resolve()))
    except (RuntimeError, OSError) as error:
        print(f"{path} cannot be asked: {error}", file=sys.stderr)
        return 2
    dialect = DIALECTS[options.dialect or list(DIALECTS)[-1]]
    if options.dialect is None and not live.dialect.realloc_callback:
        dialect = replace(dialect, realloc_callback=False)
    paths = sorted(options.cases.glob("*.case.json.gz"))
    print(f"{path}: says that it is {live.says}; held to the rules of {dialect.version}, {len(paths)} cases")
    broken: Counter[str] = Counter()
    with live:
        for case_path in paths:
            verdict = judge(live, load(case_path), dialect)
            if not verdict.differences:
                continue
            told = verdict.rules
            rules = ", ".join(f"{k} = {v}" for k, v in told.items()) if told else "no known rule: a new one is needed"
            broken[rules] += 1
            print(f"{case_path.name.split('.')[0]}: {rules}\n    {verdict.differences[0][:300]}", flush=True)
    n = sum(broken.values())
    print(f"{len(paths) - n} of {len(paths)} cases agree")
    for rules, n_cases in broken.most_common():
        print(f"{n_cases:5} cases: {rules}")
    return 1 if n else 0


if __name__ == "__main__":
    sys.exit(main())
