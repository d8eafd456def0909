"""`Engine`: a model and a context in llama.cpp that compute on pyggml's devices; in the child.

A process has one model. Requests come from `pyggml.llama.model.LlamaModel`; answers are plain data and numpy arrays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..backend import REGISTRY, Device
from ..backends.host.race_watch import Hazard
from ..backends.sim.device import SimDevice
from ..clock import VirtualClock
from ..cost import parse_profile
from ..errors import (
    BackendError,
    ComputeError,
    DeviceUnavailableError,
    GraphError,
    ModelError,
    OutOfMemoryError,
    PyggmlError,
    SchedError,
)
from ..models.kv_cache import CacheFullError
from .computing import ComputingCPU, ComputingDevice, Machine
from .ledger import Ledger
from .library import LlamaLibrary, reason_of
from .params import context_params, model_params

__all__ = ["Engine", "FoundHazard", "LateRun"]

Message = dict[str, Any]  # what a request or an answer holds
Outputs = Literal["last", "all", "none"]

#: First size of the buffer for a token's text, in bytes; it grows if the text does not fit.
_PIECE_BYTES = 256
#: The ids of the experts that a layer chose, and its number.
_CHOSEN = re.compile(rb"ffn_moe_topk-(\d+)")
_NAN_HINT = "a device that was lost has lost the weights, too: open the model again; else the file is damaged"
_USAGES = {0: "kv_cache", 1: "weights", 2: "compute"}
#: What `llama_decode` returns.
_STATUS = {
    1: "found no room in the cache",
    2: "was aborted",
    -1: "refused the batch",
    -2: "could not allocate its graph",
    -3: "could not compute its graph",
}


@dataclass(frozen=True, slots=True)
class FoundHazard:
    """A hazard, and the micro-batch and split at which it occurred."""

    device: str
    micro_batch: int  #: of the decode
    split: int  #: whose inputs were copied, or which was launched
    hazard: Hazard


@dataclass(frozen=True, slots=True)
class LateRun:
    """The result of a decode on late devices.

    Attributes
    ----------
    logits : float32, (n_vocab,), or None
        Logits of the last token; None if the decode failed.
    hazards : list of FoundHazard
        Accesses to memory that no wait orders, in the order in which they were found.
    error : PyggmlError or None
        The error of a failed decode.
    splits : dict of str to int
        Splits of the last micro-batch, by backend.
    """

    logits: npt.NDArray[np.float32] | None
    hazards: list[FoundHazard]
    error: BaseException | None
    splits: dict[str, int]


class _Noted(list[Hazard]):
    """Receives hazards of a device, and adds the scheduler's position."""

    def __init__(self, device: str, ledger: Ledger, into: list[FoundHazard]) -> None:
        super().__init__()
        self.device, self.ledger, self.into = device, ledger, into

    def append(self, hazard: Hazard) -> None:
        """Add a hazard with the scheduler's position."""
        super().append(hazard)
        self.into.append(FoundHazard(self.device, *self.ledger.place(), hazard))


class Engine:
    """llama.cpp in this process, with one model.

    Parameters
    ----------
    path : Path
        The library.
    """

    def __init__(self, path: Path) -> None:
        self.library = LlamaLibrary(path)
        self.ffi, self.lib = self.library.ffi, self.library.lib
        self.lines: list[str] = []
        self.library.on_line = self._take_line
        self.cpu = REGISTRY.open("cpu")
        self.machine = Machine(self.library, self.cpu)
        self.devices: list[Device] = []
        self._model = self._ctx = self._vocab = self.ffi.NULL
        self._path = ""
        self._kept: list[Any] = []
        self._chosen: list[dict[int, npt.NDArray[np.int32]]] = []

    def _take_line(self, line: str) -> None:
        self.lines.append(line)
        if "output buffer size" in line:
            self.machine.host.holds_results()

    def answer(self, request: Message) -> Any:
        """Return the answer to a request.

        Raises
        ------
        PyggmlError
            As the method named in the request.
        """
        do = request["do"]
        if do == "open":
            return self.open(request)
        if self._ctx == self.ffi.NULL:
            raise SchedError("no model is open in the child")
        methods: dict[str, Callable[..., Any]] = {
            "decode": self.decode, "keep": self.keep, "tokenize": self.tokenize, "detokenize": self.detokenize,
            "pieces": self.pieces,
            "device": self.device, "late": self.late, "finish": self.finish,
        }  # fmt: skip
        arguments = {k: v for k, v in request.items() if k not in ("do", "model", "timeout_s")}
        return methods[do](**arguments)

    # -- opening -------------------------------------------------------------

    def open(self, request: Message) -> Message:
        """Load a model onto devices and make a context.

        Raises
        ------
        ModelError
            llama.cpp refuses the model or the flags.
        PyggmlError
            A device failed; `OutOfMemoryError` if it has too little free memory.
        """
        if self._path:
            raise SchedError("the child has a model already", hint="open another LlamaModel, which has its own child")
        self._path = request["model"]
        self.devices = [_open_device(**about) for about in request["devices"]]
        for index, moment, after in request["faults"]:
            self.device(index, "fail_at", {"moment": moment, "after": after})
        profiles = [d.profile for d in self.devices]
        clock = None
        known = [p for p in profiles if p is not None]
        if request["host"] is not None and known and len(known) == len(profiles):
            clock = VirtualClock([*known, request["host"]])
        self.machine.ledger = Ledger(
            [*self.devices, self.cpu], self.machine.host.at, clock=clock, takes_records=request["takes_records"]
        )
        self.threads = request["threads"]
        made = [ComputingDevice(self.machine, d, i, threads=self.threads) for i, d in enumerate(self.devices)]
        self._hooks = ComputingCPU(self.machine)
        self._load(request, made)
        self._make_context(request)
        return self.facts()

    def _load(self, request: Message, devices: Sequence[ComputingDevice]) -> None:
        lib = self.lib
        bufts = {d.name: d.buft for d in devices} | {"CPU": lib.ggml_backend_cpu_buffer_type()}
        bufts |= {d.device.host_buffer_type.name: d.host_buft for d in devices if d.device.host_buffer_type is not None}
        p, kept = model_params(self.library, request["placement"], [d.handle for d in devices], bufts)
        p.load_mode = int(request["use_mmap"])
        self._kept = kept
        self._model = lib.llama_model_load_from_file(self._path.encode(), p)
        self._raise_of("load the model")
        if self._model == self.ffi.NULL:
            raise self._refusal("does not load the model")
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.n_vocab = lib.llama_vocab_n_tokens(self._vocab)

    def _make_context(self, request: Message) -> None:
        p = context_params(self.library, request["context"], threads=self.threads)
        if request["watches_experts"]:
            self._see = self.ffi.callback("bool(struct ggml_tensor *, bool, void *)", self._seen, onerror=self._failed)
            p.cb_eval = self.ffi.cast("void *", self._see)
        self._ctx = self.lib.llama_init_from_model(self._model, p)
        if self._ctx != self.ffi.NULL and isinstance(self.machine.error, OutOfMemoryError):
            self.machine.error = None  # llama.cpp continued without pipeline copies
        self._raise_of("make a context")
        if self._ctx == self.ffi.NULL:
            raise self._refusal("does not make a context")
        self._memory = self.lib.llama_get_memory(self._ctx)

    def _failed(self, _: object, error: BaseException, __: object) -> None:
        self.machine.failed(error)

    def _seen(self, t: Any, ask: bool, _: Any) -> bool:
        """Record the experts that a layer chose; llama.cpp's eval callback."""
        found = _CHOSEN.fullmatch(self.ffi.string(t.name))
        if ask:
            return found is not None
        if found is not None:
            whole = np.empty(self.lib.ggml_nbytes(t) // 4, np.int32)
            with self.machine.ledger.looks_away():
                self.lib.ggml_backend_tensor_get(t, self.ffi.from_buffer(whole), 0, whole.nbytes)
            rows = np.lib.stride_tricks.as_strided(whole, (t.ne[1], t.ne[0]), (t.nb[1], t.nb[0]))
            layer = int(found[1])
            if not self._chosen or layer in self._chosen[-1]:
                self._chosen.append({})
            self._chosen[-1][layer] = rows.copy()
        return True

    def _raise_of(self, what: str) -> None:
        """Raise the exception of a callback, if there was one."""
        error = self.machine.take_error()
        if error is not None:
            if isinstance(error, PyggmlError) and hasattr(error, "add_note"):
                error.add_note(f"llama.cpp was about to {what}")
            raise error

    def _refusal(self, what: str) -> ModelError:
        return ModelError(self._path, f"llama.cpp {what}", words=reason_of(self.lines))

    def facts(self) -> Message:
        """Return facts about the open model."""
        lib = self.lib
        return {
            "build": self.library.build,
            "dialect": self.library.dialect,
            "n_vocab": self.n_vocab,
            "n_ctx": lib.llama_n_ctx(self._ctx),
            "n_batch": lib.llama_n_batch(self._ctx),
            "n_ubatch": lib.llama_n_ubatch(self._ctx),
            "n_seq_max": lib.llama_n_seq_max(self._ctx),
            "eog": [t for t in range(self.n_vocab) if lib.llama_vocab_is_eog(self._vocab, t)],
            "memory": self.memory(),
            "profiles": None if self.machine.ledger.clock is None else self.machine.ledger.clock.profiles,
        } | self.state()

    def memory(self) -> list[tuple[str, str, int]]:
        """Return buffer type, purpose and bytes of all allocated memory."""
        lib, found = self.lib, []
        for address, buffer in self.machine.buffers.items():
            usage = lib.ggml_backend_buffer_get_usage(self.library.pointer(address))
            found.append((buffer.buft.name, _USAGES[usage], buffer.size))
        return found + [(name, _USAGES[usage], size) for name, size, usage in self.machine.host.sizes()]

    # -- decoding ------------------------------------------------------------

    def n_past(self, seq: int) -> int:
        """Return the number of tokens of a sequence in the context."""
        return int(self.lib.llama_memory_seq_pos_max(self._memory, seq)) + 1 if self._has_memory else 0

    @property
    def _has_memory(self) -> bool:
        return bool(self._memory != self.ffi.NULL)

    def decode(self, tokens: list[int], outputs: Outputs, seq: int) -> Message:
        """Decode the next tokens of a sequence. The next decode overwrites the logits.

        Raises
        ------
        GraphError
            There are no ids, or one is out of range; nothing was computed.
        CacheFullError
            The tokens do not fit; nothing was computed.
        ComputeError, BackendError
            llama.cpp or a device failed; the tokens from the failed micro-batch on are not in the cache.
        """
        lib = self.lib
        if not tokens:
            raise GraphError("a batch needs at least one token")
        self._check_ids(tokens)
        n_past, n_ctx = self.n_past(seq), lib.llama_n_ctx_seq(self._ctx)
        if n_past + len(tokens) > n_ctx:
            raise CacheFullError(len(tokens), n_past, n_ctx)
        n_batch, n_ubatch = lib.llama_n_batch(self._ctx), lib.llama_n_ubatch(self._ctx)
        rows: list[npt.NDArray[np.float32]] = []
        batches = []
        self._chosen = []
        self.machine.take_error()
        for first in range(0, len(tokens), n_batch):
            part = tokens[first : first + n_batch]
            n_out = len(part) if outputs == "all" else int(outputs == "last" and first + len(part) == len(tokens))
            cuts = [part[i : i + n_ubatch] for i in range(0, len(part), n_ubatch)]
            n_outs = [len(c) if outputs == "all" else 0 for c in cuts]
            if outputs == "last" and n_out:
                n_outs[-1] = 1
            starts = [n_past + first + i * n_ubatch for i in range(len(cuts))]
            self.machine.begin([(len(c), s, n) for c, s, n in zip(cuts, starts, n_outs, strict=True)])
            try:
                logits = self._decode(part, n_past + first, n_out, seq)
            finally:
                self.machine.end()
            batches += self.machine.ledger.batches
            rows.append(logits if len(part) == len(tokens) else logits.copy())
        if len(rows) > 1:
            logits = np.concatenate(rows)
        return {"logits": logits, "batches": batches, "chosen": self._chosen} | self.state()

    def _decode(self, tokens: list[int], start: int, n_out: int, seq: int) -> npt.NDArray[np.float32]:
        status = self.library.decode(self._ctx, tokens, start, n_out, seq)
        self.lib.llama_synchronize(self._ctx)
        error = self.machine.take_error()
        if error is not None or status:
            for device in self.devices:
                if isinstance(device, SimDevice):
                    device.finish()
            self.machine.take_error()
            if status == 0:
                self._forget_from(seq, start)
            raise error or ComputeError(
                "llama", f"llama_decode {_STATUS.get(status, f'returned {status}')}", status=status
            )
        logits = self._logits(n_out)
        if n_out and np.isnan(logits.max()):  # NaN if any is
            self._forget_from(seq, start)
            raise ComputeError("llama", "the logits are not numbers", node="result_output", hint=_NAN_HINT)
        return logits

    def _check_ids(self, tokens: Sequence[int]) -> None:
        bad = [t for t in tokens if not 0 <= t < self.n_vocab]
        if bad:
            raise GraphError(f"token {bad[0]} is not in 0..{self.n_vocab - 1}")

    def _forget_from(self, seq: int, start: int) -> None:
        if self._has_memory:
            self.lib.llama_memory_seq_rm(self._memory, seq, start, -1)

    def _logits(self, n_out: int) -> npt.NDArray[np.float32]:
        """Return llama.cpp's own rows, which the next decode overwrites."""
        if not n_out:
            return np.empty((0, self.n_vocab), np.float32)
        lib = self.lib
        bytes_ = self.ffi.buffer(lib.llama_get_logits(self._ctx), 4 * n_out * self.n_vocab)
        return np.frombuffer(bytes_, np.float32).reshape(n_out, self.n_vocab)

    def keep(self, n_past: int, seq: int) -> Message:
        """Forget a sequence's tokens from position ``n_past`` on; the answer says whether that was possible."""
        is_done = not self._has_memory or bool(self.lib.llama_memory_seq_rm(self._memory, seq, n_past, -1))
        return {"is_done": is_done} | self.state()

    def _reaches_back_to(self, seq: int) -> int:
        """Return the first position from which a sequence can continue; with a recurrent state, only the last."""
        if not self._has_memory:
            return 0
        first = int(self.lib.llama_memory_seq_pos_min(self._memory, seq))
        return first + 1 if first > 0 else 0

    def state(self) -> Message:
        """Return statistics, the clock, and the records since the last call."""
        ledger = self.machine.ledger
        seqs = range(self.lib.llama_n_seq_max(self._ctx))
        return {
            "n_past": [self.n_past(seq) for seq in seqs],
            "reaches_back": [self._reaches_back_to(seq) for seq in seqs],
            "stats": ledger.stats,
            "clock": None if ledger.clock is None else ledger.clock.times(),
            "records": ledger.take_records(),
        }

    def finish(self) -> list[str]:
        """Free the context and return llama.cpp's lines about the expert cache."""
        self.lib.llama_free(self._ctx)
        self._ctx = self.ffi.NULL
        return [line.strip() for line in self.lines if line.startswith("llama_moe_cache:")]

    # -- races ---------------------------------------------------------------

    def late(self, seed: int | None, chunks: list[list[int]], dropped: list[str]) -> LateRun:
        """Decode chunks of a new sequence one after another and wait only at the end, as a server does with a prompt.

        Parameters
        ----------
        seed : int or None
            Seed of the devices' order of work; None: they work at once.
        dropped : list of str
            Waits that devices skip.
        """
        found: list[FoundHazard] = []
        self.keep(0, 0)
        sims = [d for d in self.devices if isinstance(d, SimDevice)]
        for device in sims:
            device.reseed(seed)
            if device.watch is not None:
                device.watch.hazards = _Noted(device.name, self.machine.ledger, found)
        self.machine.take_error()
        self.machine.dropped = set(dropped)
        starts = [sum(map(len, chunks[:i])) for i in range(len(chunks))]
        n_outs = [1] * len(chunks)
        self.machine.begin([(len(c), s, n) for c, s, n in zip(chunks, starts, n_outs, strict=True)])
        status = 0
        try:
            for chunk, start, n_out in zip(chunks, starts, n_outs, strict=True):
                status = status or self.library.decode(self._ctx, chunk, start, n_out)
            self.lib.llama_synchronize(self._ctx)
        finally:
            self.machine.dropped = set()
            for device in sims:  # finish work that nothing waited for
                device.finish()
            self.machine.end()
            self.machine.ledger.take_records()
        error = self.machine.take_error()
        if error is None and status:
            error = ComputeError("llama", f"llama_decode {_STATUS.get(status, f'returned {status}')}", status=status)
        logits = self._logits(1)[0] if error is None else None
        return LateRun(logits, found, error, self.machine.ledger.count_splits()[0])

    # -- text ----------------------------------------------------------------

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Return the ids of a text."""
        data = text.encode("utf-8", "replace")  # lone surrogates, which a terminal may send
        n = len(data) + 8
        while True:
            into = self.ffi.new("int32_t[]", n)
            got = self.lib.llama_tokenize(self._vocab, data, len(data), into, n, add_special, parse_special)
            if got >= 0:
                return list(into[0:got])
            n = -got

    def detokenize(self, tokens: list[int], special: bool) -> str:
        """Return the text of ids."""
        self._check_ids(tokens)
        n = 8 * len(tokens) + _PIECE_BYTES
        while True:
            into = self.ffi.new("char[]", n)
            got = self.lib.llama_detokenize(self._vocab, tokens, len(tokens), into, n, not special, special)
            if got >= 0:
                return bytes(self.ffi.buffer(into, got)).decode("utf-8", "replace")
            n = -got

    def pieces(self, tokens: list[int], special: bool) -> list[bytes]:
        """Return the bytes of each id."""
        self._check_ids(tokens)
        found = []
        for token in tokens:
            n = _PIECE_BYTES
            while True:
                into = self.ffi.new("char[]", n)
                got = self.lib.llama_token_to_piece(self._vocab, token, into, n, 0, special)
                if got >= 0:
                    found.append(bytes(self.ffi.buffer(into, got)))
                    break
                n = -got
        return found

    # -- devices -------------------------------------------------------------

    def device(self, index: int, call: str, arguments: Message) -> Any:
        """Call a method of a simulated device, for hazards, traffic and faults.

        Raises
        ------
        BackendError
            There is no such device, or it is not simulated.
        """
        if not 0 <= index < len(self.devices):
            names = ", ".join(d.name for d in self.devices)
            raise DeviceUnavailableError(f"device {index}", "the model has no such device", hint=f"there are {names}")
        device = self.devices[index]
        if not isinstance(device, SimDevice):
            raise BackendError(device.name, "is not simulated", hint="name a device such as sim:rtx4090-pcie4")
        if call in ("hazards", "traffic", "is_lost"):
            return getattr(device, call)
        getattr(device, call)(**arguments)
        return None


def _open_device(name: str, index: int, seed: int | None) -> Device:
    """Return a pyggml device by name.

    Raises
    ------
    DeviceUnavailableError
        There is no such device.
    """
    kind, _, spec = name.partition(":")
    if kind == "sim":
        return SimDevice(parse_profile(spec or "rtx4090-pcie4"), index=index, seed=seed)
    return REGISTRY.load(kind).open_device(spec, index=index)
