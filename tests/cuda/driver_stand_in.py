"""A stand-in for ``cuda.bindings.driver``, so that the code which calls the real driver runs without one."""

# ruff: noqa: D102 - the methods are the driver's functions

from __future__ import annotations

import ctypes
from enum import IntEnum
from types import SimpleNamespace

import pyggml as ggml
from pyggml.backends.cuda import driver as cuda_driver


class Result(IntEnum):
    """The few results that matter."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2


class Bindings:
    """A stand-in for ``cuda.bindings.driver`` over fake cards: the same calls, the same shapes of results."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major", CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor"
    )

    def __init__(self, machine):
        self.machine = machine
        self.current = None  # the card whose context is current
        self.images = {}

    @property
    def card(self):
        """The card of the current context."""
        assert self.current is not None, "no context is current"
        return self.machine.cards[self.current]

    def cuInit(self, flags):
        return (Result.CUDA_SUCCESS,)

    def cuGetErrorString(self, error):
        return Result.CUDA_SUCCESS, str(error).encode()

    def cuDeviceGetCount(self):
        return Result.CUDA_SUCCESS, len(self.machine.cards)

    def cuDeviceGet(self, index):
        return Result.CUDA_SUCCESS, index

    def cuDeviceGetName(self, length, device):
        return Result.CUDA_SUCCESS, b"Stand-in".ljust(length, b"\0")

    def cuDeviceGetAttribute(self, what, device):
        return Result.CUDA_SUCCESS, self.machine.cards[device].cc[what == "minor"]

    def cuDevicePrimaryCtxRetain(self, device):
        return Result.CUDA_SUCCESS, device

    def cuCtxSetCurrent(self, context):
        self.current = context
        return (Result.CUDA_SUCCESS,)

    def cuMemGetInfo(self):
        return Result.CUDA_SUCCESS, *self.card.memory()

    def cuMemAlloc(self, size):
        try:
            return Result.CUDA_SUCCESS, self.card.alloc(size)
        except ggml.errors.OutOfMemoryError:
            return Result.CUDA_ERROR_OUT_OF_MEMORY, None

    def cuMemFree(self, address):
        self.card.free(address)
        return (Result.CUDA_SUCCESS,)

    def cuMemHostAlloc(self, size, flags):
        return Result.CUDA_SUCCESS, self.card.alloc_host(size)

    def cuMemFreeHost(self, address):
        self.card.free_host(address)
        return (Result.CUDA_SUCCESS,)

    def cuModuleLoadData(self, image):
        return Result.CUDA_SUCCESS, ctypes.string_at(image).decode()

    def cuModuleGetFunction(self, module, name):
        return Result.CUDA_SUCCESS, self.card.load(module, name.decode())

    def cuStreamCreate(self, flags):
        return Result.CUDA_SUCCESS, self.card.stream()

    def cuStreamDestroy(self, stream):
        return (Result.CUDA_SUCCESS,)

    def cuStreamSynchronize(self, stream):
        stream.synchronize()
        return (Result.CUDA_SUCCESS,)

    def cuStreamWaitEvent(self, stream, event, flags):
        stream.wait(event)
        return (Result.CUDA_SUCCESS,)

    def cuEventCreate(self, flags):
        return Result.CUDA_SUCCESS, self.card.event()

    def cuEventRecord(self, event, stream):
        stream.record(event)
        return (Result.CUDA_SUCCESS,)

    def cuEventSynchronize(self, event):
        event.synchronize()
        return (Result.CUDA_SUCCESS,)

    def cuMemcpyHtoDAsync(self, dst, src, size, stream):
        stream.copy_in(dst, src, size)
        return (Result.CUDA_SUCCESS,)

    def cuMemcpyDtoHAsync(self, dst, src, size, stream):
        stream.copy_out(dst, src, size)
        return (Result.CUDA_SUCCESS,)

    def cuMemcpyDtoDAsync(self, dst, src, size, stream):
        stream.copy(stream.card, dst, src, size)
        return (Result.CUDA_SUCCESS,)

    def cuMemcpyPeerAsync(self, dst, dst_context, src, src_context, size, stream):
        assert self.machine.cards[src_context] is stream.card
        stream.copy(self.machine.cards[dst_context], dst, src, size)
        return (Result.CUDA_SUCCESS,)

    def cuMemsetD8Async(self, dst, value, size, stream):
        stream.fill(dst, value, size)
        return (Result.CUDA_SUCCESS,)

    def cuLaunchKernel(self, f, gx, gy, gz, bx, by, bz, shared, stream, params, extra):
        values, types = params
        names = {ctype: name for name, ctype in cuda_driver.PARAM_TYPES.items()}
        stream.launch(f, (gx, gy, gz), (bx, by, bz), values, [names[t] for t in types])
        return (Result.CUDA_SUCCESS,)
