"""Random wrong uses of `LlamaModel`, in a process of their own: ``wrong_uses.py MODEL SEED COUNT OUT``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pyggml.errors import PyggmlError
from pyggml.llama import LlamaModel
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags

CONTEXT = ContextFlags(n_ctx=256, n_ubatch=64, n_seq_max=2)
PROMPT = [(32 + 53 * i) % 250 for i in range(40)]


class Mine(Exception):
    """An error of the caller's own function."""


def _mine(*_: object, **__: object) -> Any:
    raise Mine


def _open(path: Path, rng: np.random.Generator | None = None) -> LlamaModel:
    is_split = rng is not None and rng.random() < 0.5
    return LlamaModel(path, context=CONTEXT, placement=PlacementFlags(cpu_moe=is_split), threads=1)


def _in_batch(model: LlamaModel, call: Callable[..., Any]) -> None:
    """Let a call be made, or an error be raised, while a decode reports its batch."""
    model.on_batch = call
    try:
        model.decode([1])
    finally:
        model.on_batch = None


def _in_threads(model: LlamaModel) -> None:
    """Decode in two threads at once; raise one of their errors."""

    def decode() -> None:
        for _ in range(4):
            model.decode([1])

    with ThreadPoolExecutor(2) as threads:
        decodes = [threads.submit(decode) for _ in range(2)]
    model.rewind(0)
    for done in decodes:
        done.result()


def _closed_elsewhere(model: LlamaModel) -> None:
    with ThreadPoolExecutor(1) as threads:
        decodes = threads.submit(lambda: [model.decode([1]) for _ in range(100)])
        model.close()
        decodes.result()


def _lost(model: LlamaModel) -> None:
    """Lose the device, and bring it back, empty: the model is of no more use."""
    model.fail_at("lost")
    try:
        model.decode([1])
    finally:
        model.recover()
        model.close()


def _killed(model: LlamaModel) -> None:
    process = model._process._process
    assert process is not None
    process.kill()
    model.decode([1])


def _slow(model: LlamaModel) -> None:
    model._process.timeout_s = 0.0
    model.decode(PROMPT)


#: Uses by name; most are wrong, and what they raise must be told as what it is.
USES: dict[str, Callable[[LlamaModel, np.random.Generator], Any]] = {
    "right": lambda m, r: m.decode(PROMPT[: int(r.integers(1, 20))]),
    "right text": lambda m, r: list(m.generate("abc", 2)),
    "no tokens": lambda m, r: m.decode([]),
    "no such token": lambda m, r: m.decode([int(r.choice([-1, 10**6, 2**31, -(2**40)]))]),
    "no such sequence": lambda m, r: m.decode([1], seq=int(r.choice([-1, 2, 2**33]))),
    "too many tokens": lambda m, r: m.decode([1] * 300),
    "no such outputs": lambda m, r: m.decode([1], outputs="some"),
    "not a token": lambda m, r: m.decode(["a"]),
    "rewind ahead": lambda m, r: m.rewind(200),
    "rewind below": lambda m, r: m.rewind(-1 - int(r.integers(5))),
    "rewind where no sequence is": lambda m, r: m.rewind(0, seq=int(r.choice([-1, 2, 2**33]))),
    "past of no sequence": lambda m, r: m.n_past_of(7),
    "can rewind no sequence": lambda m, r: m.can_rewind(1, seq=9),
    "pieces of no token": lambda m, r: m.pieces([int(r.choice([-5, 10**7]))]),
    "text of no token": lambda m, r: m.detokenize([int(r.choice([-5, 10**7, 2**35]))]),
    "no text": lambda m, r: m.tokenize(5),
    "half a character": lambda m, r: m.tokenize("\ud800"),
    "no device": lambda m, r: m.hazards(int(r.choice([-1, 3]))),
    "no moment": lambda m, r: m.fail_at("sometimes"),
    "before now": lambda m, r: m.fail_at("copy", after=-3),
    "a failing copy": lambda m, r: (m.fail_at("copy", after=int(r.integers(20))), m.decode(PROMPT)),
    "a failing compute": lambda m, r: (m.fail_at("compute", after=int(r.integers(3))), m.decode(PROMPT)),
    "a failing compute of known calls": lambda m, r: (
        m.decode([1]),
        m.decode([1]),
        m.fail_at("compute"),
        m.decode([1]),
    ),
    "a lost device": lambda m, r: _lost(m),
    "an unknown wait": lambda m, r: m.decode_late([[1, 2]], seed=1, dropped=["sleep"]),
    "an empty chunk": lambda m, r: m.decode_late([[]], seed=1),
    "no chunk": lambda m, r: m.decode_late([], seed=1),
    "a chunk of no tokens": lambda m, r: m.decode_late([[10**6]], seed=1),
    "chunks that do not fit": lambda m, r: m.decode_late([[1] * 200, [1] * 200], seed=1),
    "a second model in the child": lambda m, r: m._process.ask(m.opened_with),
    "an unknown request": lambda m, r: m._ask("dance"),
    "an error in the callback": lambda m, r: _in_batch(m, _mine),
    "a decode in the callback": lambda m, r: _in_batch(m, lambda _: m.n_past > 100 or m.rewind(0)),
    "an error in the sampler": lambda m, r: list(m.generate([1], 2, _mine)),
    "a sampler of no token": lambda m, r: list(m.generate([1], 2, lambda _: -7)),
    "threads": lambda m, r: _in_threads(m),
    "closed": lambda m, r: (m.close(), m.decode([1])),
    "closed by another thread": lambda m, r: _closed_elsewhere(m),
    "closed in the callback": lambda m, r: _in_batch(m, lambda _: m.close()),
    "finished": lambda m, r: (m.finish(), m.decode([1])),
    "finished twice": lambda m, r: (m.finish(), m.finish()),
    "a killed child": lambda m, r: _killed(m),
    "too slow": lambda m, r: _slow(m),
}
#: Uses after which the model cannot be used, although the child may be there.
ENDS = {"finished", "finished twice"}
#: Uses that are right, or of which a result tells the error; with few calls a pending fault may not come, and threads may not meet.
MAY_PASS = {
    "right", "right text", "rewind ahead", "half a character", "an empty chunk", "no chunk", "a chunk of no tokens",
    "chunks that do not fit", "a decode in the callback", "closed in the callback", "threads", "a failing copy", "a failing compute",
}  # fmt: skip


def main(model: str, seed: str, count: str, out: str) -> None:
    """Use models wrongly, check after each use that they are as good as new or closed, and write what was raised."""
    rng, path = np.random.default_rng(int(seed)), Path(model)
    opened = _open(path)
    expected = opened.decode(PROMPT)
    opened.rewind(0)
    found: list[dict[str, Any]] = []
    names = list(USES)
    for i in range(int(count)):
        name = names[i] if i < len(names) else names[int(rng.integers(len(names)))]
        about: dict[str, Any] = {"use": name, "error": ""}
        try:  # an error of another kind ends this process, and its traceback is the report
            USES[name](opened, rng)
        except (PyggmlError, Mine) as error:
            about["error"] = f"{type(error).__name__}: {error}"
        if opened.is_closed or name in ENDS:
            opened.close()
            opened.close()
            opened = _open(path, rng)
            expected = opened.decode(PROMPT) if opened.opened_with["placement"]["overrides"] else expected
            opened.rewind(0)
        for device in range(len(opened.device_names)):
            opened._ask("device", index=device, call="clear_faults", arguments={})
        opened.reset()
        got = opened.decode(PROMPT)
        about["is_right"] = bool(np.allclose(got, expected, atol=1e-3))
        opened.reset()
        found.append(about)
    opened.close()
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
