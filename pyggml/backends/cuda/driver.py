"""What the CUDA backend asks of a driver: a few methods, with the real driver behind them, or a fake one.

Everything above this border is the same code on a card and in the tests (`pyggml.testing.fake_driver`). The real driver
is reached through ``cuda.bindings``, which the ``cuda`` extra brings; importing this module touches neither.
"""

from __future__ import annotations

import ctypes
import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Any

from ... import config
from ...errors import BackendError, DeviceUnavailableError, OutOfMemoryError

__all__ = ["Card", "DriverEvent", "Stream", "system_cards"]

#: Types of kernel parameters, by the names that kernels give them.
PARAM_TYPES: dict[str, Any] = {
    "u64": ctypes.c_uint64,
    "u32": ctypes.c_uint32,
    "i32": ctypes.c_int32,
    "f32": ctypes.c_float,
}

# a kernel as the driver names it; only the card that loaded it knows the type
Function = Any
Dim = tuple[int, int, int]


class DriverEvent(ABC):
    """A point in a stream."""

    __slots__ = ()

    @abstractmethod
    def synchronize(self) -> None:
        """Block the host until the recorded point is reached; at once if none was recorded."""


class Stream(ABC):
    """Work on a card, done in order, later. Host memory given to it must stay as it is until then."""

    __slots__ = ()

    @abstractmethod
    def copy_in(self, dst: int, src: int, size: int) -> None:
        """Copy from a host address to a device address."""

    @abstractmethod
    def copy_out(self, dst: int, src: int, size: int) -> None:
        """Copy from a device address to a host address."""

    @abstractmethod
    def copy(self, dst_card: Card, dst: int, src: int, size: int) -> None:
        """Copy from this card's memory to an address of the same or another card."""

    @abstractmethod
    def fill(self, dst: int, value: int, size: int) -> None:
        """Set bytes."""

    @abstractmethod
    def launch(self, function: Function, grid: Dim, block: Dim, args: Sequence[float], types: Sequence[str]) -> None:
        """Run a kernel; ``types`` are of `PARAM_TYPES`."""

    @abstractmethod
    def record(self, event: DriverEvent) -> None:
        """Let an event stand for all work given so far."""

    @abstractmethod
    def wait(self, event: DriverEvent) -> None:
        """Let work given from now on wait for an event, also of another card."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block the host until all work is done.

        Raises
        ------
        BackendError
            Some of it failed.
        """

    def close(self) -> None:
        """Give the stream back."""
        return


class Card(ABC):
    """One card.

    Attributes
    ----------
    index : int
        As the driver counts.
    name : str
        As the vendor calls it.
    cc : tuple of int
        Compute capability.
    """

    index: int
    name: str
    cc: tuple[int, int]

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Bytes free and in all."""

    @abstractmethod
    def alloc(self, size: int) -> int:
        """Return the address of device memory, at a multiple of 256.

        Raises
        ------
        OutOfMemoryError
            There is not so much.
        """

    @abstractmethod
    def free(self, address: int) -> None:
        """Give device memory back, when no work uses it any more."""

    @abstractmethod
    def alloc_host(self, size: int) -> int:
        """Return the address of pinned host memory.

        Raises
        ------
        OutOfMemoryError
            The system does not pin so much.
        """

    @abstractmethod
    def free_host(self, address: int) -> None:
        """Give pinned host memory back."""

    @abstractmethod
    def load(self, ptx: str, entry: str) -> Function:
        """Load a kernel."""

    @abstractmethod
    def stream(self) -> Stream:
        """Return a new stream."""

    @abstractmethod
    def event(self) -> DriverEvent:
        """Return a new event."""

    @abstractmethod
    def can_reach(self, other: Card) -> bool:
        """Whether memory can be copied straight to another card's."""


# -- the real driver -------------------------------------------------------------


class _Api:
    """The driver's functions: results are checked and unpacked."""

    def __init__(self, module: Any) -> None:  # a module without types
        self.module = module

    def __call__(self, function: str, *args: Any) -> Any:
        """Call a function of the driver; return its one result, a tuple of several, or None."""
        error, *results = getattr(self.module, function)(*args)
        if int(error) != 0:
            raise _DriverError(function, int(error), self._describe(error))
        return None if not results else results[0] if len(results) == 1 else tuple(results)

    def _describe(self, error: Any) -> str:
        failed, text = self.module.cuGetErrorString(error)
        return text.decode() if int(failed) == 0 and text else f"error {int(error)}"


class _DriverError(BackendError):
    def __init__(self, function: str, code: int, text: str) -> None:
        super().__init__("CUDA", f"{function}: {text}", hint="the card may be in an unknown state: start anew")
        self.code = code


_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


class _SystemEvent(DriverEvent):
    __slots__ = ("_card", "handle")

    def __init__(self, card: SystemCard) -> None:
        self._card = card
        card.enter()
        self.handle = card.api("cuEventCreate", 2)  # CU_EVENT_DISABLE_TIMING

    def synchronize(self) -> None:
        self._card.enter()
        self._card.api("cuEventSynchronize", self.handle)


class _SystemStream(Stream):
    __slots__ = ("_card", "handle")

    def __init__(self, card: SystemCard) -> None:
        self._card = card
        card.enter()
        self.handle: Any = card.api("cuStreamCreate", 1)  # CU_STREAM_NON_BLOCKING; a type of the bindings

    def _call(self, function: str, *args: Any) -> None:
        self._card.enter()
        self._card.api(function, *args)

    def copy_in(self, dst: int, src: int, size: int) -> None:
        self._call("cuMemcpyHtoDAsync", dst, src, size, self.handle)

    def copy_out(self, dst: int, src: int, size: int) -> None:
        self._call("cuMemcpyDtoHAsync", dst, src, size, self.handle)

    def copy(self, dst_card: Card, dst: int, src: int, size: int) -> None:
        assert isinstance(dst_card, SystemCard)
        if dst_card is self._card:
            self._call("cuMemcpyDtoDAsync", dst, src, size, self.handle)
        else:
            self._call("cuMemcpyPeerAsync", dst, dst_card.context, src, self._card.context, size, self.handle)

    def fill(self, dst: int, value: int, size: int) -> None:
        self._call("cuMemsetD8Async", dst, value, size, self.handle)

    def launch(self, function: Function, grid: Dim, block: Dim, args: Sequence[float], types: Sequence[str]) -> None:
        params = (tuple(args), tuple(PARAM_TYPES[t] for t in types))
        self._call("cuLaunchKernel", function, *grid, *block, 0, self.handle, params, 0)

    def record(self, event: DriverEvent) -> None:
        assert isinstance(event, _SystemEvent)
        self._call("cuEventRecord", event.handle, self.handle)

    def wait(self, event: DriverEvent) -> None:
        assert isinstance(event, _SystemEvent)
        self._call("cuStreamWaitEvent", self.handle, event.handle, 0)

    def synchronize(self) -> None:
        self._call("cuStreamSynchronize", self.handle)

    def close(self) -> None:
        if self.handle is not None:
            self._call("cuStreamDestroy", self.handle)
            self.handle = None


class SystemCard(Card):
    """A card of this machine, in its primary context, which other libraries share."""

    def __init__(self, api: _Api, index: int) -> None:
        self.api, self.index = api, index
        device = api("cuDeviceGet", index)
        self.name = api("cuDeviceGetName", 128, device).split(b"\0")[0].decode()
        attribute = api.module.CUdevice_attribute
        major = attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        minor = attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
        self.cc = (int(api("cuDeviceGetAttribute", major, device)), int(api("cuDeviceGetAttribute", minor, device)))
        self._device = device
        self._context: Any = None  # a type of the bindings; made when first needed, as it takes memory
        self._modules: list[Any] = []

    @property
    def context(self) -> Any:
        """The primary context."""
        if self._context is None:
            self._context = self.api("cuDevicePrimaryCtxRetain", self._device)
        return self._context

    def enter(self) -> None:
        """Make the card's context current in this thread."""
        self.api("cuCtxSetCurrent", self.context)

    def memory(self) -> tuple[int, int]:
        self.enter()
        free, total = self.api("cuMemGetInfo")
        return int(free), int(total)

    def alloc(self, size: int) -> int:
        self.enter()
        try:
            return int(self.api("cuMemAlloc", size))
        except _DriverError as error:
            raise self._no_memory(error, f"CUDA{self.index}", size, self.memory()[0]) from None

    def free(self, address: int) -> None:
        self.enter()
        self.api("cuMemFree", address)

    def alloc_host(self, size: int) -> int:
        self.enter()
        try:
            return int(self.api("cuMemHostAlloc", size, 1))  # CU_MEMHOSTALLOC_PORTABLE: pinned for every card
        except _DriverError as error:
            raise self._no_memory(error, "CUDA_Host", size, None) from None

    @staticmethod
    def _no_memory(error: _DriverError, buft: str, size: int, free: int | None) -> BackendError | OutOfMemoryError:
        if error.code != _OUT_OF_MEMORY:
            return error
        return OutOfMemoryError(buft, size, free, "a buffer", hint="place fewer layers or experts there")

    def free_host(self, address: int) -> None:
        self.enter()
        self.api("cuMemFreeHost", address)

    def load(self, ptx: str, entry: str) -> Function:
        self.enter()
        image = ctypes.create_string_buffer(ptx.encode())  # ends with a zero byte; the driver copies it
        module = self.api("cuModuleLoadData", ctypes.addressof(image))
        self._modules.append(module)
        return self.api("cuModuleGetFunction", module, entry.encode())

    def stream(self) -> Stream:
        return _SystemStream(self)

    def event(self) -> DriverEvent:
        return _SystemEvent(self)

    def can_reach(self, other: Card) -> bool:
        # without peer access cuMemcpyPeerAsync goes through the host by itself
        return isinstance(other, SystemCard)


@cache
def _system() -> tuple[tuple[SystemCard, ...], str]:
    """Return the cards of this machine, or none and the reason in one line."""
    try:
        module = importlib.import_module("cuda.bindings.driver")
    except ImportError:
        return (), f"the packages of the cuda extra are not installed ({config.install_hint('cuda')})"
    try:
        api = _Api(module)
        api("cuInit", 0)
        cards = tuple(SystemCard(api, i) for i in range(api("cuDeviceGetCount")))
    except BackendError as error:
        return (), f"the NVIDIA driver does not start: {error.message}"
    except (RuntimeError, OSError):  # what the bindings raise without libcuda
        return (), "no NVIDIA driver was found"
    return (cards, "") if cards else ((), "the NVIDIA driver has no card")


def system_cards() -> tuple[SystemCard, ...]:
    """Return the cards of this machine.

    Raises
    ------
    DeviceUnavailableError
        There is none; the text says why in one line.
    """
    cards, reason = _system()
    if not cards:
        raise DeviceUnavailableError("cuda", reason)
    return cards
