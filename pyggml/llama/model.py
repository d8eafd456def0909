"""`LlamaModel`: a model that llama.cpp runs on pyggml's devices.

::

    with LlamaModel("model.gguf", devices=["sim:rtx4090-pcie4"]) as model:
        for text in model.generate("Once upon a time", 20):
            print(text, end="")
        model.stats, model.clock.host_s           # what was copied, and how long it would have taken

llama.cpp places weights, builds graphs and schedules them; pyggml's devices have the memory and run the kernels. Each
model has its own child process, so that a failed assertion or a crash in llama.cpp becomes a `ModelError`.
"""

from __future__ import annotations

import codecs
import logging
import operator
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, get_args, overload

from ..backend import REGISTRY
from ..backends.host.machine import threads_of
from ..backends.host.race_watch import Hazard
from ..backends.sim.faults import Moment
from ..backends.sim.memory import Traffic
from ..clock import Span, VirtualClock
from ..cost import CPU_PROFILE, DeviceProfile
from ..dialect import Dialect
from ..errors import AllocError, DeviceUnavailableError, GraphError, ModelError, PyggmlError, SchedError
from ..generation import Generator
from ..gguf import GGUFFile, require_model
from ..memory_rows import Memory, MemoryRows
from ..models.batch import Outputs
from ..models.context import ContextFlags
from ..models.placement import PlacementFlags, parse_overrides, warn_of_unmatched
from ..models.topk import TopK
from ..moe_cache import LlamaCache
from ..planning import Planner
from ..record import AllocPurpose, AllocRecord, Recorder, Recording, Statistics
from ..sampling import Sampler, greedy
from ..session import BatchRecord
from .causes import Causes
from .library import find_llama
from .process import LlamaProcess
from .source import about_context, about_placement

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .engine import LateRun

__all__ = ["WAITS", "LlamaModel", "RoutingTaker", "check_waits"]

_log = logging.getLogger("pyggml.llama")

#: Seconds that loading a model or one decode may take.
TIMEOUT_S = 600.0
#: Upstream's `GGML_SCHED_MAX_BACKENDS`.
_MAX_BACKENDS = 16
#: The waits of a scheduler, by the slots of ggml's interfaces.
WAITS = ("synchronize", "event_record", "event_wait", "event_synchronize")


class RoutingTaker(Protocol):
    """Receives the experts that tokens choose."""

    def take(self, chosen: Mapping[int, npt.NDArray[np.int32]], *, seq: int = 0) -> None:
        """Receive the experts of one micro-batch of a sequence: for each layer, int32, (n_token, n_used)."""


class LlamaModel(Generator):
    """A model and one context in llama.cpp, in a child process.

    Parameters
    ----------
    path : path-like
        The model's file.
    devices : str or sequence of str
        ``sim:PROFILE``, a card's name, or ``cuda:N``. llama.cpp's CPU is always the last device and must not be listed.
    placement : PlacementFlags, optional
        ``-ngl``, ``-ot``, ``--cpu-moe``, ``-ts``, ...
    context : ContextFlags, optional
        ``-c``, ``-b``, ``-ub``, ``-fa``, ...
    threads : int, optional
        Threads of llama.cpp's CPU, and of the kernels of simulated devices; by default one per core.
    seed : int, optional
        If given, simulated devices do their work late, in an order drawn from the seed; see `hazards`.
    recorder : Recorder, optional
        Receives a record of each copy, launch and wait of llama.cpp's scheduler; causes are from pyggml's plan.
    watches_experts : bool
        Let llama.cpp's eval callback read the experts that each layer chooses, for `watcher`, in parts of the graph.
    faults : sequence of (int, str, int)
        What fails while the model is loaded: index of a simulated device, moment, successes before; see `fail_at`.
    moe_cache_bytes : int
        Size of llama.cpp's expert cache (``--moe-cache-mib``); 0: none. Which experts stay is the library's rule.
    host : DeviceProfile or None
        Profile of llama.cpp's CPU on the virtual clock, which exists if all devices have a profile.
    library : str
        llama.cpp's shared object or its folder; if empty, ``PYGGML_LIBLLAMA``, else the installed package.
    timeout_s : float or None
        Seconds after which the child is ended while loading or in one decode; None: no limit.

    Attributes
    ----------
    stats : Statistics
        Counts of llama.cpp's scheduler, as those of a `Scheduler`.
    clock : VirtualClock or None
        The virtual clock after the latest call.
    on_batch : callable or None
        Called with a `BatchRecord` after each micro-batch.
    watcher : RoutingTaker or None
        Receives the experts of each micro-batch, such as a `pyggml.lab.recording.RoutingRecorder`; see
        ``watches_experts``.
    build : str
        llama.cpp's version, which several builds share.
    dialect : Dialect
        The rules of the build's scheduler.

    Raises
    ------
    DeviceUnavailableError
        llama.cpp is not installed, or there is no such device.
    FormatError
        The file is damaged or not a model.
    GraphError
        A flag is invalid.
    OutOfMemoryError
        A device has too little free memory.
    ModelError
        llama.cpp refuses the model, fails on it, or took too long.
    """

    on_batch: Callable[[BatchRecord], None] | None = None
    watcher: RoutingTaker | None = None

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        devices: Sequence[str] = ("sim:rtx4090-pcie4",),
        placement: PlacementFlags | None = None,
        context: ContextFlags | None = None,
        threads: int | None = None,
        seed: int | None = None,
        recorder: Recorder | None = None,
        watches_experts: bool = False,
        faults: Sequence[tuple[int, Moment, int]] = (),
        moe_cache_bytes: int = 0,
        host: DeviceProfile | None = CPU_PROFILE,
        library: str = "",
        timeout_s: float | None = TIMEOUT_S,
    ) -> None:
        self.path, self._recorder = Path(path), recorder
        placement, context = placement or PlacementFlags(), context or ContextFlags()
        names = _device_names(devices)
        here = REGISTRY.open_all(names, data=False)
        if placement.fit:
            with Planner.open(self.path, devices=names, placement=placement, context=context, data=False) as planner:
                assert planner.fit is not None
                placement, context = planner.fit.placement, planner.fit.context
        with GGUFFile.open(self.path) as file:
            require_model(file)
            cpu = REGISTRY.open_all(["cpu"], data=False)[0]
            overrides = parse_overrides(placement, here, cpu)
            warn_of_unmatched(placement, [*here, cpu], list(file.tensors))
            self.metadata = dict(file.metadata)
        self.device_names = [d.name for d in here]
        self._names, self._placement, self._context = names, placement, context
        self._cache_rule = LlamaCache(moe_cache_bytes, "lru") if moe_cache_bytes else None
        self._causes: Causes | None = None
        self._can_explain = recorder is not None and all(name.startswith("sim") for name in names)
        self._use, self._words = threading.Lock(), ""
        self._process = LlamaProcess(find_llama(library), kind="compute", timeout_s=timeout_s)
        self._request = {"model": str(self.path.absolute())}
        kinds = [name.partition(":")[0] for name in names]
        #: the request that opened the model in the child
        self.opened_with: dict[str, Any] = self._request | {
            "do": "open",
            "devices": [{"name": n, "index": kinds[:i].count(kinds[i]), "seed": seed} for i, n in enumerate(names)],
            "placement": about_placement(placement, here, overrides),
            "context": about_context(context, moe_cache_bytes),
            "threads": threads_of("CPU", threads),
            "host": host,
            "use_mmap": placement.use_mmap,
            "takes_records": recorder is not None,
            "watches_experts": watches_experts,
            "faults": list(faults),
        }
        try:
            facts = self._process.ask(self.opened_with)
        except BaseException:
            self._process.close()
            raise
        self.build: str = facts["build"]
        self.dialect: Dialect = facts["dialect"]
        self.n_vocab, self.n_ctx, self.n_batch = facts["n_vocab"], facts["n_ctx"], facts["n_batch"]
        self.n_ubatch, self.n_seq_max = facts["n_ubatch"], facts["n_seq_max"]
        self.eog_ids = frozenset(facts["eog"])
        self._memory: list[tuple[str, AllocPurpose, int]] = facts["memory"]
        self.stats, self.clock = Statistics(), None if facts["profiles"] is None else VirtualClock(facts["profiles"])
        self._splits: tuple[dict[str, int], int] = ({}, 0)
        self._take_state(facts)
        if recorder is not None:
            moment = None if self.clock is None else Span(0.0, 0.0)
            for buft, purpose, size in self._memory:
                backend = buft if buft in self.device_names else "CPU"
                recorder.record(AllocRecord("", backend, buft, size, purpose, virtual=moment))

    # -- requests ------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        """Whether the model was closed or its child has ended."""
        return not self._process.is_alive

    def _ask(self, do: str, **more: object) -> Any:
        if not self._use.acquire(blocking=False):
            raise SchedError("another thread uses the model", hint="give each thread a LlamaModel of its own")
        try:
            if self.is_closed:
                raise SchedError(f"the model is closed{self._words}")
            return self._process.ask({**self._request, "do": do, **more})
        except ModelError as error:
            if self.is_closed:
                self._words = f": {error}"
            raise
        finally:
            self._use.release()

    def _take_state(self, state: dict[str, Any]) -> None:
        self._n_past: list[int] = state["n_past"]
        self._reaches_back: list[int] = state["reaches_back"]
        self.stats = state["stats"]
        if self.clock is not None:
            self.clock.set_times(state["clock"])
        if self._recorder is not None and state["records"]:
            causes = self._explainer()
            for record in state["records"] if causes is None else causes.fill(state["records"]):
                self._recorder.record(record)

    def _explainer(self) -> Causes | None:
        """Return the `Causes` of a plan with the same flags, made with the first records."""
        if self._causes is None and self._can_explain:
            recording = Recording()
            try:
                planner = Planner.open(
                    self.path, devices=self._names, placement=self._placement, context=self._context, data=False,
                    recorder=recording, expert_cache=self._cache_rule, dialect=self.dialect,
                )  # fmt: skip
            except PyggmlError as error:
                _log.info("no plan tells why nodes are where they are: %s", error)
                self._can_explain = False
            else:
                self._causes = Causes(planner, recording)
        return self._causes

    # -- decoding ------------------------------------------------------------

    def _check_seq(self, seq: int) -> None:
        if not 0 <= seq < self.n_seq_max:
            raise GraphError(f"sequence {seq} is not in 0..{self.n_seq_max - 1}")

    def n_past_of(self, seq: int) -> int:
        """Return the number of tokens of a sequence in the cache."""
        self._check_seq(seq)
        return self._n_past[seq]

    @property
    def n_past(self) -> int:
        """Number of tokens of sequence 0 in the cache."""
        return self._n_past[0]

    def decode(
        self, tokens: Sequence[int], *, outputs: Outputs = "last", seq: int = 0, topk: TopK | None = None
    ) -> npt.NDArray[np.float32]:
        """Decode the next tokens of a sequence.

        Parameters
        ----------
        tokens : sequence of int
            Ids, which follow the sequence's tokens in the cache.
        outputs : str
            Which tokens' logits are wanted: ``"last"``, ``"all"`` or ``"none"``.
        topk : TopK, optional
            Receives the experts that each layer chose for each token; requires ``watches_experts``.

        Returns
        -------
        float32, (n_outputs, n_vocab)

        Raises
        ------
        GraphError
            An id or the sequence is out of range; nothing was computed.
        CacheFullError
            The tokens do not fit into the context; nothing was computed.
        BackendError, OutOfMemoryError
            A device failed. The tokens of the failed micro-batch and later ones are not in the cache.
        ModelError
            llama.cpp ended the child; the model is closed.
        SchedError
            The model is closed, or another thread uses it.
        """
        if outputs not in get_args(Outputs):
            raise GraphError(f"no outputs are called {outputs!r}", hint=f"there are {', '.join(get_args(Outputs))}")
        self._check_seq(seq)
        answer = self._ask("decode", tokens=_ids(tokens), outputs=outputs, seq=seq)
        self._take_state(answer)
        for batch in answer["batches"]:
            self._splits = batch.splits, batch.n_inputs
            if self.on_batch is not None:
                self.on_batch(
                    BatchRecord(
                        batch.n_tokens, batch.n_outputs, batch.n_past, sum(batch.splits.values()), batch.n_nodes,
                        batch.is_reused, batch.seconds, batch.bytes_copied, batch.bytes_full, batch.virtual_s,
                    )
                )  # fmt: skip
        for batch, chosen in zip(answer["batches"], answer["chosen"], strict=False):
            if self.watcher is not None:
                self.watcher.take(chosen, seq=seq)
            if topk is not None:
                topk.take(chosen, batch.n_tokens, len(chosen))
        logits: npt.NDArray[np.float32] = answer["logits"]
        return logits

    @overload
    def generate(
        self, prompt: str, n_predict: int, sampler: Sampler = ..., *, stop: Collection[int] | None = ..., seq: int = ...
    ) -> Iterator[str]: ...

    @overload
    def generate(
        self, prompt: Sequence[int], n_predict: int, sampler: Sampler = ..., *, stop: Collection[int] | None = ...,
        seq: int = ...,
    ) -> Iterator[int]: ...  # fmt: skip

    def generate(
        self,
        prompt: str | Sequence[int],
        n_predict: int,
        sampler: Sampler = greedy,
        *,
        stop: Collection[int] | None = None,
        seq: int = 0,
    ) -> Iterator[str] | Iterator[int]:
        """Evaluate a prompt and yield what follows, one token at a time: text after a text, ids after ids.

        Parameters
        ----------
        prompt : str or sequence of int
            A text, which llama.cpp tokenizes (with BOS if the sequence is empty), or ids.
        n_predict : int
            The maximum number of tokens.
        sampler : callable
            Takes logits, float32 ``(n_vocab,)``, and returns an id.
        stop : collection of int, optional
            Ids that end the generation; by default `eog_ids` after a text, and none after ids.

        Yields
        ------
        str or int
            A text ends with a whole character; it is empty while the character is incomplete.

        Raises
        ------
        GraphError, CacheFullError
            As `decode`, before the first token.
        """
        if not isinstance(prompt, str):
            return super().generate(prompt, n_predict, sampler, stop=stop or (), seq=seq)
        ids = self.tokenize(prompt, add_special=self.n_past_of(seq) == 0)
        stop = self.eog_ids if stop is None else stop
        return self._texts(super().generate(ids, n_predict, sampler, stop=stop, seq=seq))

    def _texts(self, ids: Iterator[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for id in ids:
            yield decoder.decode(self.pieces([id])[0])
        if rest := decoder.decode(b"", True):
            yield rest

    def count_splits(self) -> tuple[dict[str, int], int]:
        """Return the splits of the latest graph by backend, and the number of their inputs."""
        return self._splits

    def rewind(self, n_past: int, *, seq: int = 0) -> None:
        """Forget a sequence's tokens from position ``n_past`` on, so that decoding continues there.

        Raises
        ------
        AllocError
            llama.cpp's memory of this model cannot go back there; nothing was forgotten.
        GraphError
            There is no such sequence or position.
        """
        self._check_seq(seq)
        if n_past < 0:
            raise GraphError(f"{n_past} is no position of a token")
        answer = self._ask("keep", n_past=n_past, seq=seq)
        self._take_state(answer)
        if not answer["is_done"]:
            raise AllocError(f"llama.cpp's memory of this model cannot go back to {n_past} tokens", hint="rewind to 0")

    def can_rewind(self, n_past: int, *, seq: int = 0) -> bool:
        """Return whether decoding can continue at position ``n_past`` of a sequence.

        Notes
        -----
        If only llama.cpp can decide, the result is True, and `rewind` may raise.
        """
        self._check_seq(seq)
        return n_past == 0 or n_past >= self._reaches_back[seq]

    def reset(self) -> None:
        """Forget all tokens."""
        for seq in range(self.n_seq_max):
            self.rewind(0, seq=seq)

    # -- text ----------------------------------------------------------------

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return llama.cpp's ids of a text."""
        if not isinstance(text, str):
            raise GraphError(f"{text!r} is not a text")
        found: list[int] = self._ask("tokenize", text=text, add_special=add_special, parse_special=parse_special)
        return found

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Return llama.cpp's text of ids; bytes that are not UTF-8 become U+FFFD."""
        found: str = self._ask("detokenize", tokens=_ids(tokens), special=special)
        return found

    def pieces(self, tokens: Sequence[int], *, special: bool = False) -> list[bytes]:
        """Return the bytes of each id, as llama.cpp writes them."""
        found: list[bytes] = self._ask("pieces", tokens=_ids(tokens), special=special)
        return found

    # -- memory --------------------------------------------------------------

    def memory(self) -> MemoryRows:
        """Return llama.cpp's memory by buffer type."""
        names = dict.fromkeys(name for name, _, _ in self._memory)

        def held(name: str, purpose: AllocPurpose) -> int:
            return sum(size for n, p, size in self._memory if (n, p) == (name, purpose))

        return MemoryRows(
            Memory(name, held(name, "weights"), held(name, "kv_cache"), held(name, "compute")) for name in names
        )

    # -- simulated devices ---------------------------------------------------

    def _device(self, index: int, call: str, **arguments: object) -> Any:
        return self._ask("device", index=index, call=call, arguments=arguments)

    def hazards(self, index: int = 0) -> list[Hazard]:
        """Return the hazards of a simulated device's accesses to its memory and the host's; requires a seed."""
        found: list[Hazard] = self._device(index, "hazards")
        return found

    def decode_late(
        self, chunks: Sequence[Sequence[int]], *, seed: int | None, dropped: Collection[str] = ()
    ) -> LateRun:
        """Decode chunks of a new sequence and wait only after the last; simulated devices work late.

        Parameters
        ----------
        seed : int or None
            Seed of the order in which devices do their work; None: they work at once.
        dropped : collection of str
            Waits that devices skip although llama.cpp requests them: ``synchronize``, ``event_record``, ``event_wait``,
            ``event_synchronize``.
        """
        check_waits(dropped)
        found: LateRun = self._ask("late", seed=seed, chunks=[_ids(c) for c in chunks], dropped=sorted(dropped))
        return found

    def traffic(self, index: int = 0) -> Traffic:
        """Return the bytes copied to and from a simulated device's memory."""
        found: Traffic = self._device(index, "traffic")
        return found

    def fail_at(self, moment: Moment, *, after: int = 0, index: int = 0) -> None:
        """Let an allocation, copy or compute of a simulated device fail; see `SimDevice.fail_at`."""
        self._device(index, "fail_at", moment=moment, after=after)

    def recover(self, index: int = 0) -> None:
        """Restore a lost device, with empty memory."""
        self._device(index, "recover")

    # -- closing -------------------------------------------------------------

    def finish(self) -> list[str]:
        """Free llama.cpp's context and return its log of the expert cache; afterwards nothing can be decoded."""
        found: list[str] = self._ask("finish")
        return found

    def close(self) -> None:
        """End the child."""
        self._process.close()
        if self._causes is not None:
            self._causes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = " (closed)" if self.is_closed else ""
        return f"<LlamaModel {self.path.name} on {', '.join([*self.device_names, 'CPU'])}{state}>"


def check_waits(names: Collection[str]) -> None:
    """Check names of waits.

    Raises
    ------
    GraphError
        There is no such wait.
    """
    unknown = sorted(set(names) - set(WAITS))
    if unknown:
        raise GraphError(f"no wait is called {unknown[0]!r}", hint=f"there are {', '.join(WAITS)}")


def _ids(tokens: Sequence[int]) -> list[int]:
    """Return ids as integers of Python.

    Raises
    ------
    GraphError
        One is not an integer.
    """
    try:
        return [operator.index(t) for t in tokens]
    except TypeError as error:
        raise GraphError(f"a token id is not an integer: {error}") from None


def _device_names(devices: Sequence[str]) -> list[str]:
    """Return the names of devices that llama.cpp can use.

    Raises
    ------
    DeviceUnavailableError
        As `_device_name`, or there are too many.
    """
    names = [_device_name(d) for d in ([devices] if isinstance(devices, str) else devices)]
    if len(names) >= _MAX_BACKENDS:
        raise DeviceUnavailableError(
            names[-1],
            f"llama.cpp's scheduler has at most {_MAX_BACKENDS} devices, the CPU among them",
            hint=f"{len(names)} were given",
        )
    return names


def _device_name(device: object) -> str:
    """Return the name of a device that llama.cpp can use.

    Raises
    ------
    DeviceUnavailableError
        It is the CPU, an opened device, or of a kind that llama.cpp cannot use.
    """
    if not isinstance(device, str):
        raise DeviceUnavailableError(
            getattr(device, "name", str(device)), "was opened in this process, and llama.cpp runs in another",
            hint='give its name, as in devices=["sim:rtx4090-pcie4"]',
        )  # fmt: skip
    kind = device.partition(":")[0]
    if kind == "cpu":
        raise DeviceUnavailableError("cpu", "it is there without being asked for", hint="leave it out of the devices")
    if kind not in REGISTRY.modules:
        opened = REGISTRY.open_all([device], data=False)[0]  # a card by name alone, or the error that there is none
        return f"sim:{device}" if opened.name.startswith("SIM") else device
    if kind not in ("sim", "cuda"):
        raise DeviceUnavailableError(
            device,
            "such a device cannot be given to llama.cpp",
            hint="sim:PROFILE and cuda:N can, and the CPU is there",
        )
    return device
