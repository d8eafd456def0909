"""The text of `GGML_SCHED_DEBUG`: the backend of each node, and the inputs of each split.

Levels 1 and 2 are exactly upstream's, so that they can be compared with a log of llama.cpp. Level 3 adds causes.
"""

from __future__ import annotations

from ..tensor import Tensor
from ..types import TensorFlag
from .plan import Plan

__all__ = ["assignments_text"]


def assignments_text(plan: Plan, *, level: int) -> str:
    """Return what upstream prints after it split a graph.

    Parameters
    ----------
    level : int
        1: splits with their inputs; 2: also nodes; 3: also causes.

    Notes
    -----
    Mirrors `ggml_backend_sched_print_assignments`, whose causes are compiled out.
    """
    lines: list[str] = []
    starts = {split.i_start: i for i, split in reversed(list(enumerate(plan.splits)))}
    for i, node in enumerate(plan.graph.nodes):
        i_split = starts.get(i)
        if i_split is not None:
            lines.append(_split_line(i_split, plan))
        if level > 1 and not node.op.is_view:
            lines.append(_node_line(i, node, plan, level))
    return "".join(lines)


def _split_line(i_split: int, plan: Plan) -> str:
    split = plan.splits[i_split]
    inputs = "".join(f"[{t.name} ({_cut(_size(t), 5)})] " for t in split.inputs)
    name = plan.backends[split.backend_id].name
    return f"\n## SPLIT #{i_split}: {name} # {len(split.inputs)} inputs{': ' if inputs else ''}{inputs}\n"


def _node_line(i: int, node: Tensor, plan: Plan, level: int) -> str:
    flag = 1 if node.flags & TensorFlag.COMPUTE else 0
    head = (
        f"node #{i:3} ({_cut(node.op_desc, 10)}): {_what(node, plan, level)} "
        f"use={plan.graph.use_counts.get(node, 0)},c={flag}:"
    )
    return head + "".join(f" {_what(s, plan, level)}" for s in node.src if s is not None) + "\n"


def _what(tensor: Tensor, plan: Plan, level: int) -> str:
    at = plan.assignment.get(tensor)
    cause = plan.assignment.cause(tensor) if level > 2 else None
    name = "NULL" if at is None else plan.backends[at].name
    return (
        f"{_cut(tensor.name, 20)} ({_cut(_size(tensor), 5)}) "
        f"[{_cut(name, 5)} {_cut('' if cause is None else cause.value, 8)}]"
    )


def _cut(text: str, width: int) -> str:
    """Right-align and cut, as C's ``%5.5s``."""
    return f"{text[:width]:>{width}}"


def _size(tensor: Tensor) -> str:
    n = tensor.nbytes
    return f"{n // 1024**2}M" if n >= 1024**2 else f"{n // 1024}K"
