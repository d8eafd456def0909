"""A card for kernel tests: compiled kernels in the emulator, tensors as numpy arrays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from gguf import GGMLQuantizationType, quants
from pyggml.kernels.cuda import compiler, launch

from pyggml.testing.ptxemu import Memory, Program, Stats
from pyggml.types import Type

QUANTIZED = ("q8_0", "q4_0", "q4_1", "q5_0", "mxfp4", "q4_K", "q5_K", "q6_K")
FLOATS = ("f32", "f16", "bf16")
#: numpy's types of values that are read back
DTYPES = {"f32": "f4", "f16": "f2", "bf16": "u2", "i32": "i4"}


def weights(rng, type, shape):
    """Return packed rows of a type, (..., bytes), and their values in float64."""
    number = GGMLQuantizationType[type.upper()]
    try:
        rows = quants.quantize(rng.standard_normal(shape).astype("f4").reshape(-1, shape[-1]), number)
    except NotImplementedError:  # nothing here quantises to K-quants: any bytes are a block, with sensible factors
        block, size = Type.of(type).block_size, Type.of(type).type_size
        rows = rng.integers(0, 256, (np.prod(shape) // block, size), dtype=np.uint8)
        at, n = (208, 1) if type == "q6_K" else (0, 2)
        rows[:, at : at + 2 * n] = (rng.random((len(rows), n)) * 0.01 + 0.001).astype("f2").view("u1")
    rows = np.ascontiguousarray(rows).reshape(np.prod(shape[:-1]), -1)
    values = quants.dequantize(rows, number).astype("f8").reshape(shape)
    return rows.view("u1").reshape(*shape[:-1], -1), values


def nmse(got, want):
    """Return the normalised mean squared error."""
    return float(((got - want) ** 2).sum() / (want**2).sum())


class Bench:
    """Tensors on a card as numpy arrays, and launches.

    Attributes
    ----------
    launched : set of str
        Kernels that ran.
    """

    def put(self, array, name=""):
        """Return the address of a copy."""
        raise NotImplementedError

    def alloc(self, size):
        """Return the address of memory that nobody wrote."""
        raise NotImplementedError

    def run(self, launches):
        """Run launches in order."""
        raise NotImplementedError

    def bytes_of(self, operand, n):
        """Return ``n`` bytes from an operand's start, as uint8."""
        raise NotImplementedError

    def read(self, operand):
        """Return a dense operand's values; float32 as float64."""
        dtype = np.dtype(DTYPES[operand.type])
        shape = tuple(operand.ne[::-1])
        values = self.bytes_of(operand, int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)
        return values.astype("f8") if operand.type == "f32" else values

    def operand(self, array, type="f32", *, ne=None, gap=0, lead=0):
        """Return an operand; ``gap`` bytes lie between its rows, ``lead`` before the first; all are NaN."""
        array = np.ascontiguousarray(array)
        rows = array.view("u1").reshape(-1, array.shape[-1] * array.itemsize)
        padded = np.full((len(rows), rows.shape[1] + gap), 0xFF, "u1")
        padded[:, : rows.shape[1]] = rows
        at = self.put(np.concatenate([np.full(lead, 0xFF, "u1"), padded.reshape(-1)]), type) + lead
        ne = [*(ne or array.shape[::-1]), 1, 1, 1][:4]
        nb = [Type.of(type).type_size, rows.shape[1] + gap]
        nb += [nb[1] * ne[1], nb[1] * ne[1] * ne[2]]
        return launch.Operand(at, type, ne, nb)

    def result(self, *ne, type="f32"):
        """Return an operand that nobody wrote."""
        ne = [*ne, 1, 1, 1][:4]
        size = np.dtype(DTYPES[type]).itemsize
        nb = [size, size * ne[0], size * ne[0] * ne[1], size * ne[0] * ne[1] * ne[2]]
        return launch.Operand(self.alloc(nb[3] * ne[3]), type, ne, nb)

    def product(self, make, *operands):
        """Run an op that needs scratch memory."""
        needed = launch.Workspace()
        make(*operands, needed)
        self.run(make(*operands, launch.Workspace(self.alloc(max(4, needed.size)), needed.sizes)))


class Card(Bench):
    """The emulator: what nobody wrote must not be read, and every launch is counted."""

    def __init__(self, cc=(8, 6), **options):
        self.cc, self.options = cc, options
        self.mem = Memory(track_init=True)
        self.stats: dict[str, Stats] = {}

    @property
    def launched(self):
        """Kernels that ran."""
        return set(self.stats)

    def put(self, array, name=""):
        """Return the address of a copy, padded as allocations are."""
        raw = np.ascontiguousarray(array).view("u1").reshape(-1)
        return self.mem.upload(np.pad(raw, (0, -len(raw) % 4)), name).addr

    def alloc(self, size):
        """Return the address of memory that nobody wrote."""
        return self.mem.alloc(size).addr

    def bytes_of(self, operand, n):
        """Return bytes, checking that every one was written."""
        buffer, offset = self.mem.locate(operand.address)
        assert buffer.init[offset : offset + n].all(), "part of the result was not written"
        return self.mem.read(buffer, "u1", (buffer.nbytes,))[offset : offset + n].copy()

    def run(self, launches):
        """Run launches in order and keep their counts by kernel; none has a stack."""
        for one in launches:
            ptx = compiler.ptx(one.kernel, self.cc)
            kernel = Program(ptx.text, self.mem).kernel(ptx.entry)
            self.stats[one.kernel] = kernel.launch(one.grid, one.block, one.args, **self.options)
            assert not self.stats[one.kernel].local_accesses


class DriverBench(Bench):
    """A card behind the driver interface: a real one, or the fake one."""

    def __init__(self, device):
        self.device = device
        self.stream = device.card.stream()
        self.taken = []
        self.launched = set()

    def alloc(self, size):
        """Return the address of memory that is NaN."""
        address = self.device.card.alloc(size)
        self.taken.append(address)
        self.stream.fill(address, 0xFF, size)
        return address

    def put(self, array, name=""):
        """Return the address of a copy."""
        raw = np.ascontiguousarray(array).view("u1").reshape(-1)
        address = self.alloc(max(4, raw.nbytes))
        self.stream.copy_in(address, raw.ctypes.data, raw.nbytes)
        self.stream.synchronize()
        return address

    def bytes_of(self, operand, n):
        """Return bytes."""
        out = np.empty(n, "u1")
        self.stream.copy_out(out.ctypes.data, operand.address, n)
        self.stream.synchronize()
        return out

    def run(self, launches):
        """Put launches on the stream."""
        for one in launches:
            function, types = self.device.function(one.kernel)
            self.launched.add(one.kernel)
            self.stream.launch(function, one.grid, one.block, one.args, types)

    def close(self):
        """Give all memory back."""
        self.stream.synchronize()
        for address in self.taken:
            self.device.card.free(address)


def mul_mat_id_case(
    rng,
    card,
    type,
    *,
    n_expert,
    n_row,
    n_k,
    n_used,
    n_token,
    broadcast=True,
    ids=None,
    gap=0,
    lead=0,
    amax=0.0,
    n_row_apart=0,
):
    """Run MUL_MAT_ID; return the result and what it should be, both (token, used, row).

    Activations are normal, or uniform up to ``amax``. Experts are ``n_row_apart`` rows apart, if there are more than are
    used.
    """
    rows, values = weights(rng, type, (n_expert, n_row_apart or n_row, n_k))
    values = values[:, :n_row]
    shape = (n_token, 1 if broadcast else n_used, n_k)
    y = (rng.uniform(-amax, amax, shape) if amax else rng.standard_normal(shape)).astype("f4")
    if ids is None:
        ids = np.stack([rng.permutation(n_expert)[:n_used] for _ in range(n_token)])
    # as the router leaves them: a view of the whole sorted row
    wide = np.full((n_token, n_used + 3), -1, "i4")
    wide[:, :n_used] = ids
    stored = card.operand(rows, type, ne=(n_k, n_row_apart or n_row, n_expert))
    src0 = replace(stored, ne=[n_k, n_row, n_expert, 1])
    src1 = card.operand(y, gap=gap, lead=lead)
    chosen = replace(card.operand(wide, "i32"), ne=(n_used, n_token, 1, 1))
    dst = card.result(n_row, n_used, n_token)
    card.product(launch.mul_mat_id, src0, src1, chosen, dst)
    want = np.stack([np.einsum("umk,uk->um", values[ids[t]], np.broadcast_to(y[t].astype("f8"), (n_used, n_k)))
                     for t in range(n_token)])  # fmt: skip
    return card.read(dst)[0].reshape(want.shape), want
