"""What a user can replace: which ops are offloaded, and how the inputs of a split are copied.

An offload rule is a function ``(backend, tensor) -> bool``. A copy policy is a `CopyPolicy` with one method,
``copy(transfer) -> bool``; `Transfer` has what a policy can read and send. Four policies come with pyggml: `FullCopier`,
the default `UsedExpertCopier`, `UpstreamCopier`, which corrects nothing, and `CallbackCopier`, which calls a function with
the arguments of ggml's copy callback.
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
    """Return the device's own decision."""
    return backend.offload_op(op)


class CopyPolicy(ABC):
    """Decides how the inputs of splits are copied.

    It is called for every input that is not flagged as a user's, once the input copy is free. The transfer counts and
    records what the policy sends with the transfer's methods, and charges it to the virtual clock.

    Attributes
    ----------
    repairs : Repairs or None
        Which of upstream's errors are corrected around this policy; None: those of the scheduler. Four apply here:
        `stale_ids`, `host_weight_ids`, `written_weights` and `shared_experts`. With the last, experts that a later reader
        of an input copy lacks are offered as a further transfer.

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
        """Make a transfer, or return False: then `Transfer.send_all` copies everything."""

    def reserve(self, plan: Plan) -> None:
        """Read a new plan, and request device memory (`Plan.memory`) or queues (`Plan.queue`); by default neither.

        Called after a graph was reserved or allocated. Memory and queues of the same name are the same from plan to
        plan, and belong to the scheduler until it is closed.
        """
        return

    def before_split(self, i_split: int) -> None:
        """Run before a split's inputs are copied; do nothing by default."""
        return

    def after_split(self, i_split: int) -> None:
        """Run after a split was launched; do nothing by default."""
        return

    @classmethod
    def overrides(cls, method: str) -> bool:
        """Return whether the policy overrides an optional method."""
        return getattr(cls, method) is not getattr(CopyPolicy, method)


class FullCopier(CopyPolicy):
    """Copies every input whole, as upstream did before used-expert copies."""

    def copy(self, transfer: Transfer) -> bool:
        """Return False: everything is copied."""
        return False


class UsedExpertCopier(CopyPolicy):
    """The default: copies only the used experts of a weight whose first reader chooses experts.

    Parameters
    ----------
    repairs : Repairs, optional
        See `CopyPolicy`; by default those of the scheduler.

    Notes
    -----
    Mirrors the used-expert path of `ggml_backend_sched_compute_splits`, which became llama.cpp's copy callback
    `llama_context::sched_copy_experts` with ggml 0.27.
    """

    def __init__(self, repairs: Repairs | None = None) -> None:
        self.repairs = repairs

    def copy(self, transfer: Transfer) -> bool:
        """Send the experts that the ids name, with one call for each range of neighbours."""
        if transfer.kind != "experts":
            return False
        transfer.send_experts(transfer.ids())
        return True


class UpstreamCopier(UsedExpertCopier):
    """Copies the used experts as upstream does, without corrections, whatever the scheduler's repairs are."""

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
        A policy and a copy callback are given, or what is given is no policy.
    """
    if callback is not None:
        if policy != "used":
            raise SchedError("a policy and a copy callback are given", hint="a copy callback is a policy: give one")
        return CallbackCopier(callback)
    if policy is None:
        return plain_policy(dialect)
    if policy == "used":
        return UpstreamCopier() if strict else UsedExpertCopier(repairs)
    if not isinstance(policy, CopyPolicy):
        hint = "subclass CopyPolicy and give an object; a function with ggml's arguments is a copy_callback"
        raise SchedError(f"{policy!r} is not a copy policy", hint=hint)
    return policy


def plain_policy(dialect: Dialect) -> CopyPolicy:
    """Return the policy of a program that sets no callback: since 0.27 every expert is copied (`Dialect.expert_copy`)."""
    return UpstreamCopier() if dialect.expert_copy == "scheduler" else FullCopier()


class _Reporting:
    """The backend that a copy callback gets; it reports writes to the weight's input copy, and waits."""

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
    """Calls a function for each host weight, as ggml 0.27 calls its copy callback; all other inputs are copied whole.

    Parameters
    ----------
    callback : callable
        See `CopyCallback`. Its backend is the split's; bytes that it writes to the input copy are counted and recorded.

    Notes
    -----
    Mirrors `ggml_backend_sched_set_copy_callback`. Differs: it is called in every dialect.
    """

    def __init__(self, callback: CopyCallback) -> None:
        self.callback = callback

    def copy(self, transfer: Transfer) -> bool:
        """Call the callback if the input is a host weight and not a further transfer."""
        if not transfer.is_host_weight or transfer.is_further:
            return False
        backend: Any = _Reporting(transfer)  # a Backend in all that it is asked for
        return bool(self.callback(backend, transfer.source, transfer.copy, transfer.graph))
