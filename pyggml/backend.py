"""`Device`, `Backend` and `Event`: the interfaces between the scheduler and a device.

A device says what it can run and which memory it can use; a backend is a stream of work on it. Optional methods have
upstream's fallback as their default, so callers never test whether they exist.
"""

from __future__ import annotations

import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Protocol, TypeVar

from .buffer import Buffer, BufferType, tensor_copy, tensor_get, tensor_set
from .cost import DeviceProfile
from .errors import BackendError, DeviceUnavailableError, UnsupportedOpError
from .graph import GraphView
from .hardware.cards import find_card
from .opset import uses_experts
from .tensor import Tensor
from .types import DeviceType, Op

__all__ = [
    "REGISTRY",
    "Backend",
    "Device",
    "Event",
    "Registry",
    "answers_by_kind",
    "is_answered_by_kind",
    "op_batch_size",
    "split_devices",
    "tensor_copy_async",
]

#: `graph_optimize` calls this with a tensor and the last node that needs the tensor's memory.
AddAllocDep = Callable[[Tensor, Tensor], None]


_Answer = TypeVar("_Answer", bound=Callable[..., bool])
#: Functions that `answers_by_kind` declared.
_BY_KIND: set[Callable[..., bool]] = set()


def answers_by_kind(answer: _Answer) -> _Answer:
    """Declare that a `Device.supports_op` or `offload_op` looks at nothing but ops, types, shapes, strides, parameters and buffers.

    Two nodes with the same answer to all of these get the same answer: the scheduler need not ask about a graph like the one
    before. Without it names and offsets of views must be the same, too.
    """
    _BY_KIND.add(answer)
    return answer


def is_answered_by_kind(answer: Callable[..., bool]) -> bool:
    """Return whether a function, or the function of a bound method, was declared by `answers_by_kind`."""
    return getattr(answer, "__func__", answer) in _BY_KIND


class Device(ABC):
    """A device: what it can run and which memory it can use.

    Attributes
    ----------
    name, description : str
        Short name in reports (``CPU``, ``SIM0``), and a description of one line.
    type : DeviceType
        The kind of device. A scheduler's last backend is of kind CPU.
    profile : DeviceProfile or None
        What its work costs on a virtual clock; None for real devices.
    has_data : bool
        False for plans: its memory has sizes and addresses but no bytes.

    Notes
    -----
    Mirrors `ggml_backend_device_i`.
    """

    name: str
    description: str
    type: DeviceType
    profile: DeviceProfile | None = None
    has_data: bool = True

    @property
    def only_counts(self) -> bool:
        """Whether copies and computes do nothing but count: there are no data, and no fault is pending."""
        return False

    def link_slowdown(self) -> float:
        """Return the factor by which the next copy is slower than the profile on a virtual clock, and count the copy."""
        return 1.0

    @property
    @abstractmethod
    def buffer_type(self) -> BufferType:
        """The memory for its results."""

    @property
    def host_buffer_type(self) -> BufferType | None:
        """Host memory from which it copies fastest (pinned), or None."""
        return None

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Return the free and the total memory, in bytes."""

    @abstractmethod
    def supports_op(self, op: Tensor) -> bool:
        """Return whether the device can run a node."""

    @abstractmethod
    def supports_buft(self, buft: BufferType) -> bool:
        """Return whether its kernels can read and write this kind of memory."""

    def offload_op(self, op: Tensor) -> bool:
        """Return whether the device should run ``op`` although its weights must first be copied from host memory."""
        return False

    def event_new(self) -> Event | None:
        """Return a new event, or None if it has no events; then the scheduler synchronizes instead."""
        return None

    def buffer_from_host(self, address: int, size: int, owner: object) -> Buffer | None:
        """Return a buffer over existing host memory, which ``owner`` keeps alive; None if the device cannot use it."""
        return None

    @abstractmethod
    def backend(self) -> Backend:
        """Return a new stream of work on this device."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {self.description}>"


class Event(ABC):
    """A point in a backend's work that others can wait for.

    Notes
    -----
    Mirrors `ggml_backend_event`. Recorded by `Backend.event_record`.
    """

    __slots__ = ()

    @abstractmethod
    def synchronize(self) -> None:
        """Block the host until the recorded point is reached."""


class Backend(ABC):
    """A stream of work on a device.

    Notes
    -----
    Mirrors `ggml_backend_i`. Work may be asynchronous; `synchronize` waits for all of it.
    """

    #: set by the constructor of the concrete backend
    device: Device
    name: str

    @abstractmethod
    def graph_compute(self, graph: GraphView) -> None:
        """Start computing nodes in order; nodes without the COMPUTE flag and view ops are skipped.

        Raises
        ------
        ComputeError
            A node failed. No node after it is computed.
        """

    def synchronize(self) -> None:
        """Wait until all work is done; by default work is done at once."""
        return

    def set_tensor_async(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy host memory into a tensor in stream order; the host memory must not change until then.

        Notes
        -----
        Mirrors `ggml_backend_tensor_set_async`: by default a synchronous copy after a synchronization.
        """
        self.synchronize()
        tensor_set(tensor, address, offset, size)

    def get_tensor_async(self, tensor: Tensor, address: int, offset: int, size: int) -> None:
        """Copy bytes of a tensor to host memory in stream order; by default synchronously, after a synchronization."""
        self.synchronize()
        tensor_get(tensor, address, offset, size)

    def cpy_tensor_async(self, backend_src: Backend, src: Tensor, dst: Tensor) -> bool:
        """Copy a tensor of another backend in stream order; return False, and do nothing, if that is not possible."""
        return False

    def event_record(self, event: Event) -> None:
        """Record an event after all work submitted so far."""
        raise BackendError(self.name, "has events but does not record them", hint="override event_record")

    def event_wait(self, event: Event) -> None:
        """Make work submitted from now on wait for an event."""
        raise BackendError(self.name, "has events but does not wait for them", hint="override event_wait")

    def graph_optimize(self, graph: GraphView, add_alloc_dep: AddAllocDep) -> None:
        """Reorder the nodes of a split, or keep the memory of tensors longer; by default neither."""
        return

    def will_read(self, tensor: Tensor, parts: Sequence[tuple[int, int]]) -> None:
        """Receive which bytes of a tensor nodes read from now on (offset, size), because their indices name no others.

        A device that looks for hazards would otherwise assume that they read the whole tensor; others ignore it.
        """
        return

    # -- questions, passed on to the device ----------------------------------

    @property
    def buffer_type(self) -> BufferType:
        """The device's default buffer type."""
        return self.device.buffer_type

    def supports_op(self, op: Tensor) -> bool:
        """Return whether the device can run a node."""
        return self.device.supports_op(op)

    def supports_buft(self, buft: BufferType) -> bool:
        """Return whether the device's kernels can use this kind of memory."""
        return self.device.supports_buft(buft)

    def offload_op(self, op: Tensor) -> bool:
        """Return whether the device should run ``op`` although its weights are in host memory."""
        return self.device.offload_op(op)

    def close(self) -> None:
        """Stop threads and free the stream's resources; by default nothing."""
        return

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


def tensor_copy_async(backend_src: Backend, backend_dst: Backend, src: Tensor, dst: Tensor) -> None:
    """Copy a tensor between backends, in stream order if the receiving backend supports it.

    Notes
    -----
    Mirrors `ggml_backend_tensor_copy_async`.
    """
    if src is dst:
        return
    if not backend_dst.cpy_tensor_async(backend_src, src, dst):
        backend_src.synchronize()
        backend_dst.synchronize()
        tensor_copy(src, dst)


def unsupported_op(
    node: Tensor, backends: Sequence[Backend], *, reason: str = "", hint: str = ""
) -> UnsupportedOpError:
    """Return the error for a node that none of the backends can run; the reason contains the types."""
    sources = ", ".join("nothing" if s is None else s.type.ggml_name for s in node.src) or "nothing"
    types = f"{node.type.ggml_name} from {sources}"
    return UnsupportedOpError(
        node.name,
        node.op_desc,
        tuple(b.name for b in backends),
        reason=f"{types}; {reason}" if reason else types,
        hint=hint,
    )


def op_batch_size(op: Tensor) -> int:
    """Return how many rows an op works on. Devices compare this with a minimum when they offer to run ops with host weights.

    Notes
    -----
    Mirrors `get_op_batch_size` of upstream's CUDA backend.
    """
    if op.op is Op.GET_ROWS:
        return 0
    if op.op is Op.MUL_MAT:
        return op.ne[1]
    if op.op in (Op.ROPE, Op.ROPE_BACK) or uses_experts(op.op) is not None:
        return op.ne[2]
    return op.nrows


def split_devices(text: str, kinds: list[str]) -> list[str]:
    """Split a list of devices at commas, except those inside ``sim:custom:...``.

    Examples
    --------
    >>> split_devices("sim:custom:8GiB,400GB/s,12GB/s,cpu", ["cpu", "sim"])
    ['sim:custom:8GiB,400GB/s,12GB/s', 'cpu']
    >>> split_devices("rtx3090,rtx3090", ["cpu", "sim"])
    ['rtx3090', 'rtx3090']
    """
    names: list[str] = []
    for part in text.split(","):
        starts = part.strip().partition(":")[0] in (*kinds, "none") or _is_simulated(part)
        if names and not starts:
            names[-1] += f",{part}"
        else:
            names.append(part)
    return [n.strip() for n in names if n.strip()]


def _is_simulated(name: str) -> bool:
    """Whether a name without a kind is a card of the table, or the file of a profile."""
    return (
        name.strip().endswith(".json") or find_card(name.strip().removesuffix("-nvlink").split("-pcie")[0]) is not None
    )


class DeviceModule(Protocol):
    """The functions of a module in ``pyggml.backends`` that the registry calls."""

    def devices(self) -> list[Device]:
        """Return the devices of this machine; an empty list, not an error, if there are none."""

    def open_device(self, spec: str, *, index: int = 0, data: bool = True) -> Device:
        """Return the device for the part of a name after ``kind:``.

        Parameters
        ----------
        index : int
            The number of devices of this kind before it in the list; simulated devices are numbered by it.
        data : bool
            False: for plans, without memory.
        """

    def why_missing(self) -> str:
        """Return one line that says why `devices` is empty; an empty text if it is not."""


class Registry:
    """Kinds of devices by name; the module of a kind is imported when it is first used.

    Examples
    --------
    >>> REGISTRY.open("sim:rtx4090-pcie4").type.name
    'GPU'
    """

    def __init__(self, modules: dict[str, str]) -> None:
        self.modules = modules

    def load(self, kind: str) -> DeviceModule:
        """Return the module of a kind of device.

        Raises
        ------
        DeviceUnavailableError
            The kind does not exist.
        """
        if kind not in self.modules:
            from .hardware.cards import CARDS, LLAMA_NAMES

            is_llamas = re.fullmatch(rf"({'|'.join(LLAMA_NAMES.values())})\d+", kind)
            several = re.fullmatch(r"(\d)x(\w+)|(\w+)[x*](\d)", kind)
            card = find_card(several[2] or several[3]) if several else None
            near = [] if is_llamas else get_close_matches(kind.lower(), [*self.modules, *CARDS], 3)
            there = (
                f"llama.cpp's name: give the card, such as rtx3090, or libggml:{kind} for one of this machine;"
                if is_llamas
                else f"name each card: {','.join([card.name] * min(int(several[1] or several[4]), 4))};"
                if card and several
                else f"did you mean {', '.join(near)}?"
                if near
                else f"kinds are {', '.join(self.modules)}, and cards by name;"
            )
            raise DeviceUnavailableError(kind, "no such device", hint=f"{there} see `pyggml devices`")
        module: DeviceModule = importlib.import_module(self.modules[kind])
        return module

    def open(self, name: str) -> Device:
        """Return the device of a name such as ``cpu`` or ``sim:h100-pcie5``.

        Raises
        ------
        DeviceUnavailableError
            There is no device of this name; the text says why.
        """
        return self.open_all([name])[0]

    def open_all(self, names: Sequence[str], *, data: bool = True) -> list[Device]:
        """Return the devices of several names; those of one kind are numbered in order.

        Parameters
        ----------
        data : bool
            False: for plans, without memory.

        Raises
        ------
        DeviceUnavailableError
            A device does not exist.
        """
        opened: list[Device] = []
        counts: dict[str, int] = {}
        for name in names:
            kind, _, spec = name.partition(":")
            if kind not in self.modules and "sim" in self.modules and not spec and _is_simulated(name):
                kind, spec = "sim", name  # a card by name alone, or a measured profile
            index = counts.get(kind, 0)
            opened.append(self.load(kind).open_device(spec, index=index, data=data))
            counts[kind] = index + 1
        return opened

    def kinds(self) -> list[str]:
        """Return the names of the kinds of devices, in order of preference."""
        return list(self.modules)


#: The kinds that come with pyggml.
REGISTRY = Registry(
    {
        "cpu": "pyggml.backends.host",
        "sim": "pyggml.backends.sim",
        "cuda": "pyggml.backends.cuda",
        "libggml": "pyggml.backends.libggml",
        "rpc": "pyggml.backends.rpc",
        "mock": "pyggml.backends.mock",
    }
)
