"""`HostMemory`: llama.cpp's buffers in host memory, by address; in the child."""

from __future__ import annotations

from collections.abc import Callable

from ..backend import Device
from ..backends.host.machine import HostBuffer
from ..backends.libggml.library import Handle
from ..buffer import BufferType
from ..types import BufferUsage
from .library import DeviceLibrary

__all__ = ["HostMemory"]

_WEIGHTS = 1  # upstream's `GGML_BACKEND_BUFFER_USAGE_WEIGHTS`


class HostMemory:
    """Finds llama.cpp's host buffers by address.

    Attributes
    ----------
    pageable, pinned : HostBuffer
        Stand for all CPU buffers, and for all pinned buffers of the first device.
    weights : HostBuffer
        Stands for host weights in pageable memory.
    """

    def __init__(self, library: DeviceLibrary, cpu: Device) -> None:
        self.library = library
        self._buffers: dict[int, tuple[int, int, str]] = {}  # base, size, name, by address of the buffer
        self._results = 0
        self.on_change: Callable[[], None] = lambda: None
        self.pageable = _stand_in(cpu.buffer_type)
        self.weights = _stand_in(cpu.buffer_type, BufferUsage.WEIGHTS)
        self.pinned = self.pinned_weights = self.pageable

    def use_pinned(self, buft: BufferType) -> None:
        """Use a buffer type for pinned memory."""
        self.pinned, self.pinned_weights = _stand_in(buft), _stand_in(buft, BufferUsage.WEIGHTS)

    def add(self, buffer: Handle, name: str) -> None:
        """Add a buffer."""
        lib = self.library.lib
        base = self.library.address(lib.ggml_backend_buffer_get_base(buffer))
        self._buffers[self.library.address(buffer)] = base, lib.ggml_backend_buffer_get_size(buffer), name
        self.on_change()

    def remove(self, address: int) -> None:
        """Remove a freed buffer."""
        self._buffers.pop(address, None)
        self.on_change()

    def holds_results(self) -> None:
        """Mark the latest buffer as the one for logits."""
        self._results = next(reversed(self._buffers), 0)

    def at(self, address: int) -> HostBuffer:
        """Return the stand-in for the buffer that contains an address."""
        for buffer, (base, size, name) in self._buffers.items():
            if base <= address < base + size:
                usage = self.library.lib.ggml_backend_buffer_get_usage(self.library.pointer(buffer))
                return self._stand_in_of(name, usage)
        return self.pageable

    def of(self, buffer: int) -> HostBuffer:
        """Return the stand-in for a buffer."""
        _, _, name = self._buffers.get(buffer, (0, 0, ""))
        return self._stand_in_of(name, self.library.lib.ggml_backend_buffer_get_usage(self.library.pointer(buffer)))

    def _stand_in_of(self, name: str, usage: int) -> HostBuffer:
        if name == self.pinned.buft.name and self.pinned is not self.pageable:
            return self.pinned_weights if usage == _WEIGHTS else self.pinned
        return self.weights if usage == _WEIGHTS else self.pageable

    def sizes(self) -> list[tuple[str, int, int]]:
        """Return name, size and usage of each buffer except the one for logits."""
        lib, pointer = self.library.lib, self.library.pointer
        return [
            (name, size, lib.ggml_backend_buffer_get_usage(pointer(buffer)))
            for buffer, (_, size, name) in self._buffers.items()
            if buffer != self._results
        ]


def _stand_in(buft: BufferType, usage: BufferUsage | None = None) -> HostBuffer:
    made = HostBuffer(buft, 0, 1 << 62, object())
    if usage is not None:
        made.set_usage(usage)
    return made
