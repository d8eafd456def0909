"""What a user may replace: which ops are offloaded, and how the inputs of a split are copied.

An offload rule is a function ``(backend, tensor) -> bool``. A copy policy is a `CopyPolicy` with one method,
``copy(transfer) -> bool``; `Transfer` says what can be asked and sent. Four policies come with pyggml: `FullCopier`, the
default `UsedExpertCopier`, `UpstreamCopier`, which mends nothing, and `CallbackCopier`, which asks a function with the
arguments of ggml's copy callback.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from ..backend import Backend
from ..dialect import Dialect, Repairs
from ..errors import SchedError
from ..graph import GraphView
from ..tensor import Tensor
from .transfer import Transfer, is_host_weight

if TYPE_CHECKING:
    from .plan import Plan

__all__ = [
    "CallbackCopier", "CopyCallback", "CopyPolicy", "FullCopier", "UpstreamCopier", "UsedExpertCopier", "choose_policy",
    "default_offload",
    "is_host_weight", "plain_policy",
]  # fmt: skip

#: Called with the split's backend, a weight in host memory, its copy there and the split's graph, once the backend was
#: waited for. True: it has copied; False: the weight is copied whole.
CopyCallback = Callable[[Backend, Tensor, Tensor, GraphView], bool]


def default_offload(backend: Backend, op: Tensor) -> bool:
    """Offload what the device asks for."""
    return backend.offload_op(op)


class CopyPolicy(ABC):
    """Says how the inputs of splits are copied.

    Every input that is not flagged as a user's input is offered once its place on the split's backend is free. What the
    policy sends by the methods of the transfer is counted, recorded and charged to the virtual clock by the transfer.

    Attributes
    ----------
    repairs : Repairs or None
        Which of upstream's mistakes the run mends around this policy; None: those of the scheduler. Of use here are
        `stale_ids`, `host_weight_ids`, `written_weights` and `shared_experts`: for the last the experts that a later
        reader of a copy is missing are offered as a further transfer.

    Notes
    -----
    Upstream has such a hook since 0.27 (`ggml_backend_sched_set_copy_callback`).

    Examples
    --------
    >>> class OneCallIfSmall(UsedExpertCopier):
    ...     def copy(self, transfer):
    ...         if transfer.source.nbytes < 1 << 20:
    ...             return False                        # the run copies it whole
    ...         return super().copy(transfer)
    """

    repairs: Repairs | None = None

    @abstractmethod
    def copy(self, transfer: Transfer) -> bool:
        """Make a transfer; return False to have everything copied by `Transfer.send_all`."""

    def reserve(self, plan: Plan) -> None:
        """Look at a new plan, and ask for device memory (`Plan.memory`) or queues (`Plan.queue`); by default neither.

        Called when a graph was reserved or allocated. Memory and queues of the same name are the same from plan to
        plan, and belong to the scheduler until it is closed.
        """
        return

    def before_split(self, i_split: int) -> None:
        """Do something before a split's inputs are copied; by default nothing."""
        return

    def after_split(self, i_split: int) -> None:
        """Do something after a split was launched; by default nothing."""
        return

    @classmethod
    def overrides(cls, method: str) -> bool:
        """Whether the policy has an own body of one of the optional methods."""
        return getattr(cls, method) is not getattr(CopyPolicy, method)


class FullCopier(CopyPolicy):
    """Copies every input whole: what upstream did before the used-expert copy."""

    def copy(self, transfer: Transfer) -> bool:
        """Leave it to the run."""
        return False


class UsedExpertCopier(CopyPolicy):
    """The default: of a weight that is read by MUL_MAT_ID first, copies the used experts.

    Parameters
    ----------
    repairs : Repairs, optional
        See `CopyPolicy`; those of the scheduler if not given.

    Notes
    -----
    Mirrors the used-expert path of `ggml_backend_sched_compute_splits`, which became llama.cpp's copy callback
    `llama_context::sched_copy_experts` with ggml 0.27.
    """

    def __init__(self, repairs: Repairs | None = None) -> None:
        self.repairs = repairs

    def copy(self, transfer: Transfer) -> bool:
        """Send the experts that the ids name, one call for each run of neighbours."""
        if transfer.kind != "experts":
            return False
        transfer.send_experts(transfer.ids())
        return True


class UpstreamCopier(UsedExpertCopier):
    """Copies the used experts as upstream does, and nothing around it is mended, whatever the scheduler mends."""

    def __init__(self) -> None:
        super().__init__(Repairs.strict())


def choose_policy(
    policy: CopyPolicy | Literal["used"] | None,
    callback: CopyCallback | None,
    dialect: Dialect,
    repairs: Repairs,
    *,
    strict: bool,
) -> CopyPolicy:
    """Return the policy that a scheduler's arguments mean.

    Raises
    ------
    SchedError
        A policy and a copy callback are given.
    """
    if callback is not None:
        if policy != "used":
            raise SchedError("a policy and a copy callback are given", hint="a copy callback is a policy: give one")
        return CallbackCopier(callback)
    if policy is None:
        return plain_policy(dialect)
    if policy == "used":
        return UpstreamCopier() if strict else UsedExpertCopier(repairs)
    return policy


def plain_policy(dialect: Dialect) -> CopyPolicy:
    """Return what a program gets that sets no callback: from 0.27 on every expert is copied (`Dialect.expert_copy`)."""
    return UpstreamCopier() if dialect.expert_copy == "scheduler" else FullCopier()


class _Reporting:
    """A backend as a copy callback sees it: what is written to the weight's copy, and waits, are reported."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer

    def __getattr__(self, name: str) -> Any:  # whatever the backend has
        return getattr(self._transfer.backend, name)

    def set_tensor_async(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Write bytes, in stream order."""
        transfer = self._transfer
        start_s = transfer.now()
        transfer.backend.set_tensor_async(tensor, address, offset, size)
        if tensor is transfer.copy:
            transfer.report_sent(offset, size, start_s)

    def synchronize(self) -> None:
        """Wait for all work."""
        self._transfer.synchronize()


class CallbackCopier(CopyPolicy):
    """Asks a function about each weight in host memory, as ggml 0.27 asks its copy callback; all else is copied whole.

    Parameters
    ----------
    callback : callable
        See `CopyCallback`. Its backend is the split's; bytes that it writes to the copy are counted and recorded.

    Notes
    -----
    Mirrors `ggml_backend_sched_set_copy_callback`. Differs: it is asked in every dialect.
    """

    def __init__(self, callback: CopyCallback) -> None:
        self.callback = callback

    def copy(self, transfer: Transfer) -> bool:
        """Ask the callback, if the input is a weight in host memory that is not copied for a later reader."""
        if not transfer.is_host_weight or transfer.is_further:
            return False
        backend: Any = _Reporting(transfer)  # a Backend in all that it is asked for
        return bool(self.callback(backend, transfer.source, transfer.copy, transfer.graph))
