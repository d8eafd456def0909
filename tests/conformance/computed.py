"""What the real library makes of cases of an op, in a child process."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from oracle.child import Child, Message

from pyggml.tensor import Tensor
from pyggml.testing.op_cases import Case
from pyggml.values import decode_array


@dataclass(frozen=True, slots=True)
class Computed:
    """What the library made of a case, and the values that the case's last op had before it."""

    result: Tensor
    sources: list[Any]
    found: Any


def computed(child: Child, cases: Sequence[Case]) -> list[Computed]:
    """Have the library compute cases, all in one request."""
    built = [case.build() for case in cases]
    answers = child.ask_each("compute", list(map(_request, cases, built)))
    return list(map(_read, cases, built, answers))


def _request(case: Case, values: Sequence[Tensor | None]) -> Message:
    made = [i for i, t in enumerate(values) if t is not None and t.view_src is None and i not in case.data]
    return {
        "steps": case.steps,
        "data": {i: base64.b64encode(raw).decode() for i, raw in case.data.items()},
        "result": case.result,
        "read": [*made, case.result],
    }


def _read(case: Case, values: Sequence[Tensor | None], answer: Message) -> Computed:
    assert answer.get("status") == 0, (answer, case.steps)
    result = values[case.result]
    assert result is not None
    read = {int(i): base64.b64decode(raw) for i, raw in answer["bytes"].items()}
    memory = {values[i]: raw for i, raw in {**read, **case.data}.items() if i != case.result}

    def source(t: Tensor | None) -> Any:
        if t is None or t is result:
            return None
        raw = memory[t if t.view_src is None else t.view_src]
        return decode_array(t, raw[t.view_offs : t.view_offs + t.nbytes])

    return Computed(result, [source(t) for t in result.src], decode_array(result, read[case.result]))
