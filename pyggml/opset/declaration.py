"""What is declared of an op, in one place: what its kernel refuses, how the kernel is called, what it costs, what its indices choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..hardware.formulas import Work
from ..tensor import Tensor
from ..types import Op
from .work import one_pass

if TYPE_CHECKING:
    from ..backends.host.plan import HostPlan

__all__ = [
    "EXPERT_OPS",
    "OPS",
    "Choice",
    "Kernel",
    "OpDeclaration",
    "Role",
    "Rule",
    "UsedExperts",
    "declare",
    "expert_sources",
    "ids_of",
    "reason_unsupported",
    "role_of",
    "uses_experts",
]

#: Returns the number of distinct experts that a node's ids name.
UsedExperts = Callable[[Tensor], float]
#: Returns the work of a node.
Rule = Callable[[Tensor, UsedExperts], Work]

Plan = TypeVar("Plan")
Made = TypeVar("Made")


class Role(Enum):
    """What the ops around one need to know of it."""

    OTHER = 0
    PRODUCT = 1  #: its kernel does what follows it: a bias, a gate, a rotation
    NORM = 2  #: its kernel multiplies by the weight that follows it
    POSITIONS = 3  #: its results are positions in rows of its first source


@dataclass(frozen=True, slots=True)
class Choice:
    """How an op chooses rows or experts by indices."""

    indices: int  #: the source that has them
    chosen: int  #: the source that is chosen from; -1 for the result
    dim: int = 1  #: the dimension whose size the indices are below
    is_expert: bool = False
    used_only: bool = (
        False  #: of a host weight that is chosen from, the scheduler copies only the experts that are used
    )


def any_shape(t: Tensor) -> bool:
    """Allow any shape of a result."""
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel(Generic[Plan, Made]):
    """How devices of one kind compute an op.

    Attributes
    ----------
    refuses : callable
        Returns why a node with all its sources cannot be computed, for instance because of a type; empty if it can.
    call : callable
        Adds the node to a plan. It may import kernels; nothing else does.
    n_sources : int
        How many sources the op cannot be without.
    """

    refuses: Callable[[Tensor], str]
    call: Callable[[Plan, Tensor], Made]
    n_sources: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class OpDeclaration(Kernel["HostPlan", None]):
    """The kernel of the host, and what is known of an op on every device.

    Attributes
    ----------
    work : callable
        The cost rule: the work of a node that is neither empty nor a view.
    fits : callable
        Whether the shape of a node follows from its sources, as a builder would have it. Kernels trust shapes.
    """

    work: Rule
    fits: Callable[[Tensor], bool]
    chooses: Choice | None
    role: Role


#: The declaration of each op.
OPS: dict[Op, OpDeclaration] = {}
#: Ops that choose experts from a weight of which only the used ones need be copied (`uses_experts`).
EXPERT_OPS: set[Op] = set()


def declare(
    *ops: Op,
    refuses: Callable[[Tensor], str],
    call: Callable[[HostPlan, Tensor], None],
    n_sources: int = 1,
    work: Rule = one_pass,
    fits: Callable[[Tensor], bool] = any_shape,
    chooses: Choice | None = None,
    role: Role = Role.OTHER,
) -> None:
    """Declare ops that have all this in common; see `OpDeclaration`."""
    for op in ops:
        assert op not in OPS, f"{op.name} is declared twice"
        OPS[op] = OpDeclaration(
            refuses=refuses, call=call, n_sources=n_sources, work=work, fits=fits, chooses=chooses, role=role
        )
        if chooses is not None and chooses.used_only:
            EXPERT_OPS.add(op)


def role_of(op: Op) -> Role:
    """Return the role of an op; OTHER of one that is not declared."""
    found = OPS.get(op)
    return Role.OTHER if found is None else found.role


def uses_experts(op: Op) -> Choice | None:
    """Return how an op chooses experts from a weight of which only the used ones need be copied; None of other ops."""
    return OPS[op].chooses if op in EXPERT_OPS else None


def ids_of(node: Tensor, i_source: int) -> Tensor | None:
    """Return the ids that choose from source ``i_source`` of a node; None if the node needs the whole source."""
    choice = uses_experts(node.op)
    return node.src[choice.indices] if choice is not None and choice.chosen == i_source else None


def expert_sources(node: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight and the ids of a node that `uses_experts`."""
    choice = uses_experts(node.op)
    assert choice is not None
    weight, ids = node.src[choice.chosen], node.src[choice.indices]
    assert weight is not None
    assert ids is not None
    return weight, ids


def reason_unsupported(t: Tensor, kernels: Mapping[Op, Kernel[Any, Any]] = OPS) -> str:
    """Return why the kernels cannot compute a node; empty if they can. Needs neither kernels nor Numba.

    Parameters
    ----------
    kernels : mapping
        The kernels of a device; those of the host if not given.
    """
    op = t.op
    if op.is_empty:
        return ""
    kernel = kernels.get(op)
    if kernel is None:
        return f"there is no kernel for {op.name}"
    n = kernel.n_sources
    if len(t.src) < n or None in t.src[:n]:
        return f"it has not the {n} sources that it needs"
    return kernel.refuses(t)
