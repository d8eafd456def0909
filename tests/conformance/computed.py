"""What the real library makes of a case of an op, in a child process."""

from __future__ import annotations

import base64
from typing import Any

from oracle.child import Child

from pyggml.tensor import Tensor
from pyggml.testing.op_cases import Case
from pyggml.values import decode_array


class Computed:
    """What the library made of a case, in a child process, and the values that its last op had before it."""

    def __init__(self, child: Child, case: Case) -> None:
        values = case.build()
        last = case.result
        result = values[last]
        assert result is not None
        self.result: Tensor = result
        made = [i for i, t in enumerate(values) if t is not None and t.view_src is None and i not in case.data]
        answer = child.ask(
            "compute",
            steps=case.steps,
            data={i: base64.b64encode(raw).decode() for i, raw in case.data.items()},
            result=last,
            read=[*made, last],
        )
        assert answer.get("status") == 0, answer
        read = {int(i): base64.b64decode(raw) for i, raw in answer["bytes"].items()}
        memory = {values[i]: raw for i, raw in {**read, **case.data}.items() if i != last}

        def source(t: Tensor | None) -> Any:
            if t is None or t is result:
                return None
            raw = memory[t if t.view_src is None else t.view_src]
            return decode_array(t, raw[t.view_offs : t.view_offs + t.nbytes])

        self.sources = [source(t) for t in result.src]
        self.found = decode_array(result, read[last])
