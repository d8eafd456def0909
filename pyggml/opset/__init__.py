"""The ops: what each of them refuses, how the host's kernel is called, and what it costs, declared in one place.

A module has the ops of one kind, like the builders in `pyggml.ops`. An op that no module declares has no kernel, and costs one pass over memory.
Nothing here needs Numba, until a kernel is called.
"""

from __future__ import annotations

import importlib
import pkgutil

from ..hardware.formulas import Work
from ..tensor import Tensor
from .calls import Layout
from .declaration import (
    EXPERT_OPS,
    OPS,
    Choice,
    Kernel,
    Role,
    UsedExperts,
    expert_sources,
    ids_of,
    reason_unsupported,
    role_of,
    uses_experts,
)
from .work import NOTHING, by_kind, in_other_kernel, one_pass

__all__ = [
    "EXPERT_OPS",
    "NOTHING",
    "OPS",
    "Choice",
    "Kernel",
    "Layout",
    "Role",
    "UsedExperts",
    "expert_sources",
    "ids_of",
    "node_work",
    "plans_op",
    "reason_malformed",
    "reason_unsupported",
    "role_of",
    "supports_op",
    "uses_experts",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def supports_op(t: Tensor) -> bool:
    """Return whether the host's kernels can run a node; views count as supported."""
    return not _is_refused(t) if t.op in OPS else t.op.is_empty


@by_kind
def _is_refused(t: Tensor) -> bool:
    return bool(reason_unsupported(t))


def plans_op(t: Tensor) -> bool:
    """Return whether a device that only plans counts as able to run a node.

    Ops without any kernel in pyggml, such as CONV_2D, count as supported, because ggml's backends run them.

    Notes
    -----
    Mirrors `ggml_backend_cpu_device_supports_op`, which accepts every op that it does not name.
    """
    return t.op not in OPS or supports_op(t)


def reason_malformed(t: Tensor) -> str:
    """Return why a supported node is malformed: wrong shape, or read-only memory; empty if it is not.

    Called once for each node of a plan, because kernels do not check shapes.
    """
    root = t.view_src
    if root is not None and root.buffer is not None and not root.buffer.is_writable:
        return f"it writes into '{root.name}', which is in read-only memory of {root.buffer.buft.name}"
    declared = OPS.get(t.op)
    return "" if declared is None or declared.fits(t) else f"shape {list(t.ne)} does not follow from its sources'"


def node_work(node: Tensor, used_experts: UsedExperts) -> Work:
    """Return the work of computing a node, counted from shapes.

    Parameters
    ----------
    node : Tensor
        With its sources; views, nodes without elements and what another node's kernel does take nothing.
    used_experts : callable
        Called for a product with experts; only these experts of its weight are read.

    Notes
    -----
    Weights count once per node, however often a kernel reads them from its caches.
    """
    op = node.op
    if op.is_empty:
        return NOTHING
    declared = OPS.get(op)
    rule = one_pass if declared is None else declared.work
    if rule is in_other_kernel or 0 in node.ne:
        return NOTHING
    return rule(node, used_experts)
