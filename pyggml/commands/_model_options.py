"""Options that several commands share, with llama.cpp's names and meaning."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import cloup

from ..errors import DeviceUnavailableError
from ._console import warn
from ._llama_flags import translate
from ._options import choice, count, file_option, flag, option
from ._values import DeviceList

if TYPE_CHECKING:
    from ..backend import Backend
    from ..clock import VirtualClock
    from ..models.context import ContextFlags
    from ..models.placement import PlacementFlags
    from ..routing import Routing
    from ..sched.offload import CostOffload
    from ..sched.policies import CopyPolicy

__all__ = [
    "ModelCommand",
    "ModelFlags",
    "device_names",
    "flags_of",
    "is_model_option",
    "model_options",
    "open_backends",
    "parse_sizes",
    "placing_words",
]

#: What computes if nothing is asked for: a device that every machine has, and the CPU.
DEFAULT_DEVICES = "sim:rtx4090-pcie4,cpu"
EXPERT_COPIES = ("used", "overlap", "prefetch", "two-links", "upstream", "full")
PREFETCHER = "online"
#: What `models.context.CACHE_TYPES` holds, for the text of help, which imports no model.
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
_CACHE_TYPE = click.Choice(CACHE_TYPES, case_sensitive=False)


#: Options that say where weights go by name, of which the first in the command line that matches a name holds.
_PLACING = ("override_tensor", "cpu_moe", "n_cpu_moe", "n_cpu_ffn")


#: What `LayerCount` returns for ``auto``.
AUTO_LAYERS = -2


class LayerCount(click.ParamType[int]):
    """A number of layers, ``all``, or ``auto``: as many as fit, as llama.cpp's ``--fit`` finds them."""

    name = "N|all|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number; -1 for all, `AUTO_LAYERS` for auto."""
        if value in ("all", "auto"):
            return -1 if value == "all" else AUTO_LAYERS
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is not a number of layers", param, ctx)


@dataclass(frozen=True, slots=True)
class ModelFlags:
    """The values of the shared options."""

    n_gpu_layers: int
    overrides: tuple[str, ...]  #: -ot, --cpu-moe and the like, in their order
    n_ctx: int
    n_batch: int
    n_ubatch: int
    op_offload: bool
    type_k: str
    type_v: str
    threads: int | None
    device: str
    kv_offload: bool
    swa_full: bool
    flash_attn: Literal["on", "off", "auto"]
    tensor_split: str
    split_mode: str
    main_gpu: int
    use_mmap: bool
    n_seq_max: int | None
    kv_unified: bool
    expert_copy: str
    prefetcher: str
    prefetch_fit: Path | None
    peer_mib: int | None
    offload_by: str

    def placement(self) -> PlacementFlags:
        """Return the flags that place weights."""
        from ..models.placement import PlacementFlags

        try:
            shares = tuple(float(s) for s in re.split("[,/]", self.tensor_split) if s)
            if not all(map(math.isfinite, shares)):
                raise ValueError(self.tensor_split)
        except ValueError:
            raise click.UsageError(f"-ts {self.tensor_split}: shares are numbers, such as 3,1") from None
        return PlacementFlags(
            n_gpu_layers=max(self.n_gpu_layers, -1),
            fit=self.n_gpu_layers == AUTO_LAYERS,
            overrides=self.overrides,
            tensor_split=shares,
            use_mmap=self.use_mmap,
        )

    def context(self, *, n_ctx: int | None = None) -> ContextFlags:
        """Return the flags of the context; ``n_ctx`` is used if -c was not given."""
        from ..models.context import ContextFlags
        from ..types import Type

        n_seqs = 1 if self.n_seq_max is None else self.n_seq_max
        if n_seqs == 0:
            raise click.UsageError("-np 0: a server has at least one slot")
        return ContextFlags(
            n_ctx=self.n_ctx or n_ctx or 0,
            n_batch=self.n_batch,
            n_ubatch=self.n_ubatch,
            type_k=Type.of(self.type_k),
            type_v=Type.of(self.type_v),
            flash_attn=self.flash_attn,
            offload_kqv=self.kv_offload,
            op_offload=self.op_offload,
            swa_full=self.swa_full,
            n_seq_max=4 if n_seqs < 0 else n_seqs,
            kv_unified=self.kv_unified or n_seqs < 0,
        )

    def policy(self) -> CopyPolicy | Literal["used"]:
        """Return the copy policy; "used" is the scheduler's default."""
        from ..sched.links import TwoLinkExperts
        from ..sched.overlap import OverlappedExperts
        from ..sched.policies import FullCopier, UpstreamCopier

        if self.expert_copy != "prefetch" and (self.prefetch_fit is not None or self.prefetcher != PREFETCHER):
            raise click.UsageError("--prefetcher and --prefetch-fit need --expert-copy prefetch")
        if self.peer_mib is not None and self.expert_copy != "two-links":
            raise click.UsageError("--peer-mib needs --expert-copy two-links")
        if self.expert_copy == "used":
            return "used"
        if self.expert_copy == "two-links":
            return TwoLinkExperts(None if self.peer_mib is None else self.peer_mib << 20)
        if self.expert_copy == "prefetch":
            return self._prefetched()
        if self.expert_copy == "overlap":
            return OverlappedExperts()
        return UpstreamCopier() if self.expert_copy == "upstream" else FullCopier()

    def offload_rule(
        self, backends: Sequence[Backend], clock: VirtualClock | None, routing: Routing
    ) -> CostOffload | None:
        """Return what decides which ops devices run with host weights; None: the devices.

        Parameters
        ----------
        clock : VirtualClock or None
            Of these backends; None if their speeds are unknown.
        """
        from ..sched.offload import CostOffload

        if self.offload_by == "rows":
            return None
        if not self.op_offload:
            raise click.UsageError("--offload-by cost decides what is offloaded, and --no-op-offload forbids it")
        if clock is None:
            raise click.UsageError("--offload-by cost needs devices whose speeds are known: simulated ones")
        return CostOffload(backends, clock, routing)

    def _prefetched(self) -> CopyPolicy:
        from ..lab.formats import open_trace
        from ..lab.predict import PREFETCHERS
        from ..lab.running import RunningPredictor
        from ..sched.prefetch import ExpertPrefetch, PrefetchedExperts

        name, colon, n = self.prefetcher.rpartition(":")
        if not colon or (n.isidentifier() and name not in PREFETCHERS):  # a name alone, or module:Class
            name, colon, n = self.prefetcher, "", ""
        if colon and not (n.isdigit() and int(n)):
            raise click.UsageError(f"--prefetcher {self.prefetcher}: '{n}' is not a number of experts")
        trace = None if self.prefetch_fit is None else open_trace(self.prefetch_fit)
        return PrefetchedExperts(ExpertPrefetch(RunningPredictor(name, trace), n_guess=int(n) if colon else None))


_PLACEMENT = cloup.option_group(
    "Placement, as in llama.cpp",
    option("-dev", "--device", type=DeviceList(), shown=DEFAULT_DEVICES,
         help="Devices, separated by commas, the CPU last; `pyggml devices` lists them."),
    option("-ngl", "--gpu-layers", "--n-gpu-layers", "n_gpu_layers", type=LayerCount(), default=-1,
         help="Layers on devices, counted from the last. [all]"),
    flag("-cmoe", "--cpu-moe", help="Keep all experts in host memory."),
    count("-ncmoe", "--n-cpu-moe", multiple=True, help="Keep the experts of the first N layers in host memory."),
    count("-ncffn", "--n-cpu-ffn", multiple=True,
         help="Keep the dense feed-forward weights of the first N layers in host memory."),
    option("-ot", "--override-tensor", multiple=True, metavar="REGEX=BUFT",
         help="Put matching weights in a buffer type. Of -ot, -cmoe, -ncmoe and -ncffn, the first match counts."),
    option("-ts", "--tensor-split", default="", metavar="N,N", help="Share of each device. [by free memory]"),
    choice("-sm", "--split-mode", values=["layer", "none", "row", "tensor"], shown="layer",
         help="none: use only the device of -mg. row and tensor are not supported."),
    count("-mg", "--main-gpu", shown=0, help="With -sm none: the device to use, from 0."),
    cloup.option("--mmap/--no-mmap", "use_mmap", default=True,
                 help="Map the file and use host weights in place. [on]"),
)  # fmt: skip
_CONTEXT = cloup.option_group(
    "Context and KV cache, as in llama.cpp",
    count("-c", "--ctx-size", "n_ctx", default=0, help="Tokens of context. [as needed, or as trained]"),
    count("-b", "--batch-size", "n_batch", least=1, shown=2048, help="Maximum tokens per batch."),
    count("-ub", "--ubatch-size", "n_ubatch", least=1, shown=512, help="Maximum tokens per micro-batch (one graph)."),
    choice("-fa", "--flash-attn", values=["on", "off", "auto"], shown="auto", help="Flash attention."),
    option("-ctk", "--cache-type-k", "type_k", type=_CACHE_TYPE, shown="f16", metavar="TYPE",
         help=f"Type of K: {', '.join(CACHE_TYPES)}."),
    option("-ctv", "--cache-type-v", "type_v", type=_CACHE_TYPE, shown="f16", metavar="TYPE", help="Type of V."),
    cloup.option("--kv-offload/--no-kv-offload", default=True, help="Keep the KV cache on the device. [on]"),
    count("-np", "--parallel", "n_seq_max", least=-1,
         help="Sequences in the context; for splits: slots of llama-server. -1: 4 with a shared cache. [1]"),
    cloup.option("-kvu", "--kv-unified/--no-kv-unified", default=False, help="Use one KV cache for all sequences. [off]"),
    flag("--swa-full", help="Use a full-size cache for layers with a sliding window."),
)  # fmt: skip
_COMPUTING = cloup.option_group(
    "Computing",
    count("-t", "--threads", least=1, help="CPU threads. [cores]"),
    cloup.option("--op-offload/--no-op-offload", default=True, help="Let devices run ops with host weights. [on]"),
    choice("--offload-by", values=["rows", "cost"], shown="rows",
         help="rows: devices run ops with host weights from 32 rows on, as in ggml; cost: if copying and computing takes less time than on the CPU."),
    choice("--expert-copy", values=EXPERT_COPIES, shown="used",
         help="used: used experts; overlap: the same on a second queue while a layer computes (with --no-mmap); prefetch: also the next layer's, guessed; two-links: part of them from another device that holds a share and has a link of its own; upstream: as ggml; full: whole weights."),
    option("--prefetcher", shown=PREFETCHER, metavar="NAME[:N]",
         help="With --expert-copy prefetch: who guesses (see `pyggml experts predict`), and how many experts. [as many as are used]"),
    file_option("--prefetch-fit", exists=True, dir_okay=False, metavar="TRACE",
         help="Routing trace of other requests, for prefetchers that learn from them."),
    count("--peer-mib", least=1,
         help="With --expert-copy two-links: most memory for experts on another device. [as both links need]"),
)  # fmt: skip


class ModelCommand(cloup.Command):
    """A command with `model_options`. It accepts llama.cpp's flags and keeps the order of placing options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, and keep the order of placing options."""
        if not ctx.resilient_parsing:
            args = self.translate(ctx, args)
        values, _, order = self.make_parser(ctx).parse_args(args=list(args))
        taken = {name: iter(values.get(name) or ()) for name in _PLACING if name != "cpu_moe"}
        placing = ctx.meta.setdefault(__name__, [])
        for param in order:
            if param.name == "cpu_moe":
                placing.append("--cpu-moe")
            elif param.name == "override_tensor":
                placing.append(next(taken["override_tensor"]))
            elif param.name in _PLACING:
                placing.append(f"{param.opts[-1]} {next(taken[param.name])}")
        return super().parse_args(ctx, args)

    def translate(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Return a llama.cpp command line as this command's options; warn of flags without effect."""
        options = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]
        own = {name: not (o.is_flag or o.count) for o in options for name in (*o.opts, *o.secondary_opts)}
        try:
            found = translate(args, own)
        except click.UsageError as error:
            error.ctx = ctx
            raise
        if found.ignored:
            warn(f"no effect in pyggml: {', '.join(found.ignored)}")
        return found.words


def is_model_option(name: str) -> bool:
    """Return whether a parameter is one of `model_options`, except those of `placing_words`."""
    return name in ModelFlags.__slots__


def placing_words(ctx: click.Context) -> list[str]:
    """Return the options that place weights by name, in the order of the command line."""
    return [w if w.startswith("--") else f"--override-tensor {w}" for w in ctx.meta.get(__name__, ())]


def flags_of(ctx: click.Context) -> ModelFlags:
    """Return the shared options of a parsed command."""
    own = {f: ctx.params[f] for f in ModelFlags.__slots__ if f != "overrides"}
    return ModelFlags(overrides=tuple(ctx.meta[__name__]), **own)


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the shared options to a `ModelCommand`; the function gets them as ``flags: ModelFlags``."""

    @functools.wraps(function)
    def call(**given: Any) -> Any:
        flags = flags_of(click.get_current_context())
        rest = {name: value for name, value in given.items() if name not in (*_PLACING, *ModelFlags.__slots__)}
        return function(flags=flags, **rest)

    return _PLACEMENT(_CONTEXT(_COMPUTING(call)))


def parse_sizes(text: str) -> list[int]:
    """Return the batch sizes of a list such as ``512,1``."""
    try:
        sizes = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise click.UsageError(f"--batches {text}: give numbers above 0, separated by commas")
    return sizes


def device_names(flags: ModelFlags) -> list[str]:
    """Return the names of the requested devices, without the CPU.

    Raises
    ------
    DeviceUnavailableError
        The CPU is not the last device.
    """
    from ..backend import REGISTRY, split_devices

    names = split_devices(flags.device, REGISTRY.kinds())
    if names and names[-1] == "cpu":
        names.pop()
    if "cpu" in names:
        raise DeviceUnavailableError("cpu", "the CPU must be the last device in the list", hint=f"got {flags.device}")
    if names == ["none"]:
        names = []
    if flags.split_mode in ("row", "tensor"):
        raise click.UsageError(
            f"-sm {flags.split_mode}: not supported; pyggml splits weights by layers only (-sm layer)"
        )
    if flags.split_mode == "none" and names:
        if flags.main_gpu >= len(names):
            raise click.UsageError(
                f"-mg {flags.main_gpu}: devices besides the CPU are numbered from 0 to {len(names) - 1}"
            )
        names = [names[flags.main_gpu]]
    return names


def open_backends(flags: ModelFlags, *, data: bool = True) -> tuple[list[Backend], Backend]:
    """Return the backends of the requested devices, and the CPU's.

    Raises
    ------
    DeviceUnavailableError
        A device does not exist.
    """
    from ..backend import REGISTRY
    from ..backends.host import CPU

    backends = [device.backend() for device in REGISTRY.open_all(device_names(flags), data=data)]
    return backends, CPU(flags.threads) if data else REGISTRY.open_all(["cpu"], data=False)[0].backend()
