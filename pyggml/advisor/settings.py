"""The settings of llama.cpp from which `plan` chooses, and their flags."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..foresight.estimate import Setting
from ..foresight.shape import ModelShape
from ..hardware.cards import Card, llama_names
from ..models.context import ContextFlags
from ..models.placement import PlacementFlags
from ..types import Type

__all__ = [
    "EXPLAIN",
    "Space",
    "command",
    "context_flags",
    "flags_of",
    "ik_flags_of",
    "is_experts_only",
    "last_experts",
    "last_ffn",
    "numbers_pattern",
    "placement_flags",
    "with_llama_names",
]

#: Micro-batches that are tried; llama.cpp's default is 512.
MICRO_BATCHES = (512, 1024, 2048, 4096)
DEFAULT_BATCH = 2048

#: What each flag does, for ``--explain``.
EXPLAIN = {
    "-ngl": "layers on the device, counted from the last; 'all' includes the output. The CPU computes the other layers for single "
    "tokens; for each micro-batch of 32 tokens or more they are copied to the device.",
    "-ncmoe": "layers, from the first, whose experts stay in host memory. Their other weights are on the device. For single "
    "tokens the CPU computes these experts, so generation waits for host memory; for prompts the used experts are copied once "
    "per micro-batch.",
    "-ncffn": "layers, from the first, whose dense feed-forward weights stay in host memory, while the device has their attention and KV "
    "cache. For single tokens the CPU computes them.",
    "-ub": "tokens of a micro-batch. Weights in host memory are copied once per micro-batch, so a larger one spreads the "
    "copies over more tokens. It costs compute buffer on the device.",
    "-b": "tokens that are prepared together; at least the micro-batch.",
    "-fa": "flash attention: no matrix of scores in memory. Needed for a quantised V cache.",
    "-ctk": "type of the K cache. q8_0 takes 53 % of f16; results change slightly.",
    "-ctv": "type of the V cache. q8_0 takes 53 % of f16; results change slightly.",
    "--no-mmap": "read the weights into memory instead of mapping the file. Host weights are then pinned, so copies to the "
    "device reach the link's rate instead of about half of the RAM's rate.",
    "-nkvo": "keep the KV cache in host memory. With flash attention the device computes attention with copies of K and V, without it the CPU does. "
    "It makes room for weights, which pays while the cache holds few tokens.",
    "--no-op-offload": "never copy host weights to the device for a micro-batch: the CPU computes with them at any size.",
    "-ts": "shares of several cards, in layers. By default llama.cpp shares by free memory; other shares make room for experts or "
    "a KV cache on one card, or give the faster card more layers; a share of 0 leaves a card out.",
    "-ot": "weights whose names fit a pattern go to a memory. With several cards it is used to keep the experts of the last layers in host "
    "memory, which makes room on the last card, where -ncmoe makes room on the first.",
    "-t": "threads: one for each physical core.",
    "--moe-cache-mib": "MiB of device memory in which experts of layers on the host are kept after their first use (llama.cpp from b11481 on; "
    "ik_llama.cpp at 007d6400 has no such flag). The device computes these layers for up to 32 tokens, and each expert that is absent "
    "crosses the link, where the CPU would have read it from host memory. So it pays if hits are many and the link is fast. It has no hits "
    "at all up to (layers - 1) * (experts per token) slots. More layers on the host make room for a larger cache.",
    "--moe-cache-misses": "what happens to experts that the cache lacks. llama.cpp copies them into it first (copy). With cpu the CPU computes "
    "them while the device computes the others; only pyggml's run and splits have that, so no llama-server line has it.",
    "-c": "tokens that the KV cache holds.",
}


@dataclass(frozen=True, slots=True)
class Space:
    """The settings that are tried; each field has the values of one flag.

    Attributes
    ----------
    n_cpu_moe : tuple of int
        Numbers of layers whose experts are on the host, from none to all; ``(0,)`` for a dense model.
    n_gpu_layers : tuple of int
        -1: all.
    tensor_split : tuple of tuple of float
        ``-ts``; empty: by the memory of the devices.
    n_cpu_moe_last : tuple of int
        Layers from the last whose experts are on the host (``-ot``); never beside layers from the first. With one
        device both ends are alike.
    moe_cache_mib : tuple of int
        Sizes of the expert cache. One is tried with experts on the host and all else on devices; with shares of cards by
        `shares.with_cache`.
    """

    n_gpu_layers: tuple[int, ...] = (-1,)
    n_cpu_moe: tuple[int, ...] = (0,)
    n_ubatch: tuple[int, ...] = MICRO_BATCHES
    is_pinned: tuple[bool, ...] = (False, True)
    op_offload: tuple[bool, ...] = (True, False)
    kv_offload: tuple[bool, ...] = (True, False)
    kv_types: tuple[Type, ...] = (Type.F16, Type.Q8_0)
    tensor_split: tuple[tuple[float, ...], ...] = ((),)
    n_cpu_moe_last: tuple[int, ...] = (0,)
    n_layer: int = 0
    moe_cache_mib: tuple[int, ...] = (0,)

    @classmethod
    def of(cls, model: ModelShape, *, n_ctx: int, n_devices: int, has_unified: bool, device_bytes: int = 0) -> Space:
        """Return the space of a model over a number of devices.

        Parameters
        ----------
        n_ctx : int
            Micro-batches above it are left out.
        has_unified : bool
            Whether a device's memory is the host's: then nothing is copied, and pinning changes nothing.
        device_bytes : int
            Memory of all devices, of which an expert cache takes a part; 0: none is tried.
        """
        n_layer = len(model.layers)
        n_moe = sum(layer.has_experts for layer in model.layers)
        sizes = tuple(n for n in MICRO_BATCHES if n <= max(n_ctx, MICRO_BATCHES[0]))
        if not n_devices:
            return cls((0,), (0,), sizes[:1], (False,), (False,), (True,))
        first = next((i for i, layer in enumerate(model.layers) if layer.has_experts), 0)
        moe = (0, *range(first + 1, n_layer + 1)) if n_moe else (0,)
        layers = (-1, 0) if n_moe else (-1, *range(n_layer, -1, -1))
        pinned = (False,) if has_unified else (False, True)
        offload = (True,) if has_unified else (True, False)
        caches = (0,) if has_unified else (0, *_cache_sizes(model, device_bytes, n_devices))
        if n_devices < 2:
            return cls(layers, moe, sizes, pinned, offload, moe_cache_mib=caches)
        few = tuple(n for n in sizes if n in (512, 2048))
        step = max(1, n_layer // 12)
        last = (0, *range(step, n_layer - first, step)) if n_moe else (0,)
        return cls(
            layers, moe, few or sizes[:1], pinned, offload, tensor_split=_splits(n_layer, n_devices), n_cpu_moe_last=last,
            n_layer=n_layer, moe_cache_mib=caches,
        )  # fmt: skip

    def __len__(self) -> int:
        n = 1
        for values in (
            self.n_gpu_layers, self.n_ubatch, self.is_pinned, self.op_offload, self.kv_offload, self.kv_types, self.tensor_split,
        ):  # fmt: skip
            n *= len(values)
        cached = (len(self.moe_cache_mib) - 1) * (len(self.n_cpu_moe) - 1) * len(self.n_ubatch) * len(self.is_pinned)
        return n * (len(self.n_cpu_moe) + len(self.n_cpu_moe_last) - 1) + cached * len(self.kv_types)

    def settings(self, threads: int) -> Iterator[Setting]:
        """Yield every distinct setting.

        Notes
        -----
        A setting without weights in host memory is given once: pinning and offloading change nothing there.
        """
        experts = [(n, 0) for n in self.n_cpu_moe] + [(0, n) for n in self.n_cpu_moe_last if n]
        for ngl, (ncmoe, last), ub, pinned, offload, kv, kv_type, split in product(
            self.n_gpu_layers, experts, self.n_ubatch, self.is_pinned, self.op_offload, self.kv_offload, self.kv_types,
            self.tensor_split,
        ):  # fmt: skip
            has_host_weights = ncmoe > 0 or last > 0 or ngl >= 0
            if not has_host_weights and (pinned is not self.is_pinned[0] or offload is not self.op_offload[0]):
                continue
            if ngl == 0 and (ncmoe or last or split):
                continue  # all is on the host already
            if not offload and pinned:
                continue  # nothing is copied
            made = Setting(
                n_gpu_layers=ngl, n_cpu_moe=ncmoe, overrides=(last_experts(last, self.n_layer),) if last else (), n_ubatch=ub,
                n_batch=max(ub, DEFAULT_BATCH), threads=threads, type_k=kv_type, type_v=kv_type, is_pinned=pinned,
                op_offload=offload, kv_offload=kv, tensor_split=split,
            )  # fmt: skip
            yield made
            if ngl < 0 and ncmoe and offload and kv and not split:
                yield from (replace(made, moe_cache_mib=mib) for mib in self.moe_cache_mib if mib)

    def around(self, setting: Setting) -> Iterator[Setting]:
        """Yield a setting with each micro-batch, load mode and KV type of the space."""
        for ub, pinned, kv_type in product(self.n_ubatch, self.is_pinned, self.kv_types):
            yield replace(
                setting, n_ubatch=ub, n_batch=max(ub, DEFAULT_BATCH), is_pinned=pinned, type_k=kv_type, type_v=kv_type
            )


def _splits(n_layer: int, n_devices: int) -> tuple[tuple[float, ...], ...]:
    """Return what ``-ts`` is tried: llama.cpp's default, an even split, and with two devices steps of an eighth of the layers."""
    even: tuple[float, ...] = (1.0,) * n_devices
    if n_devices > 2:
        return ((), even)
    n = n_layer + 1
    steps = sorted({round(n * k / 8) for k in range(1, 8)} - {0, n})
    return ((), *((float(k), float(n - k)) for k in steps))


def _cache_sizes(model: ModelShape, device_bytes: int, n_devices: int) -> tuple[int, ...]:
    """Return the sizes of an expert cache that are tried, in MiB: with the smallest a quarter of the layers has hits."""
    layer = next((layer for layer in model.layers if layer.has_experts), None)
    if layer is None or not device_bytes:
        return ()
    n_moe = sum(layer.has_experts for layer in model.layers)
    least = n_moe * model.n_used * layer.expert_bytes / model.n_expert / 4
    parts = (1, 2, 3, 4, 6, 8, 10, 12, 14) if n_devices < 2 else (4, 8, 12)
    sizes = (device_bytes * part / 16 for part in parts)
    return tuple(int(size) >> 20 for size in sizes if size >= least)


def placement_flags(setting: Setting) -> PlacementFlags:
    """Return the flags that place weights."""
    return PlacementFlags(
        n_gpu_layers=setting.n_gpu_layers, overrides=setting.overrides, n_cpu_moe=setting.n_cpu_moe,
        tensor_split=setting.tensor_split, use_mmap=not setting.is_pinned,
    )  # fmt: skip


def context_flags(setting: Setting, n_ctx: int) -> ContextFlags:
    """Return the flags of the context."""
    return ContextFlags(
        n_ctx=n_ctx, n_batch=setting.n_batch, n_ubatch=setting.n_ubatch, type_k=setting.type_k, type_v=setting.type_v,
        flash_attn="on" if setting.flash_attn else "off", offload_kqv=setting.kv_offload, op_offload=setting.op_offload,
    )  # fmt: skip


def flags_of(setting: Setting, n_ctx: int, *, has_devices: bool = True) -> list[str]:
    """Return the flags of a setting for `llama-server` and `pyggml splits`.

    Examples
    --------
    >>> flags_of(Setting(n_cpu_moe=24, n_ubatch=2048, is_pinned=True, threads=8), 32768)
    ['-c', '32768', '-ngl', 'all', '-ncmoe', '24', '-ub', '2048', '-fa', 'on', '--no-mmap', '-t', '8']
    """
    flags = ["-c", str(n_ctx)]
    if has_devices:
        flags += ["-ngl", "all" if setting.n_gpu_layers < 0 else str(setting.n_gpu_layers)]
    for text in setting.overrides:
        flags += text.split(" ") if text.startswith("--") else ["-ot", text]
    if setting.tensor_split:
        flags += ["-ts", ",".join(f"{share:g}" for share in setting.tensor_split)]
    if setting.n_cpu_moe:
        flags += ["-ncmoe", str(setting.n_cpu_moe)]
    if setting.n_ubatch != 512:
        flags += ["-ub", str(setting.n_ubatch)]
    if setting.n_batch != DEFAULT_BATCH:
        flags += ["-b", str(setting.n_batch)]
    flags += ["-fa", "on" if setting.flash_attn else "off"]
    if setting.type_k is not Type.F16:
        flags += ["-ctk", setting.type_k.ggml_name, "-ctv", setting.type_v.ggml_name]
    if not setting.kv_offload:
        flags.append("-nkvo")
    if setting.is_pinned:
        flags.append("--no-mmap")
    if not setting.op_offload and has_devices:
        flags.append("--no-op-offload")
    if setting.moe_cache_mib:
        flags += ["--moe-cache-mib", str(setting.moe_cache_mib)]
        if setting.moe_cache_misses != "copy":
            flags += ["--moe-cache-misses", setting.moe_cache_misses]
    if setting.threads:
        flags += ["-t", str(setting.threads)]
    return flags


def ik_flags_of(flags: Iterable[str]) -> list[str]:
    r"""Return flags of llama.cpp as ik_llama.cpp takes them.

    Notes
    -----
    By its ``common/common.cpp`` (commit 007d6400): ``-ngl`` takes a number only, and ``--no-op-offload`` does not
    exist; ``-op -1,0`` does the same. ``-ncmoe``, ``-ot``, ``-ts``, ``-ub``, ``-nkvo`` and ``--no-mmap`` are as in
    llama.cpp. Fused experts (``-fmoe``) and copies of used experts only are its defaults. ``-rtr`` is never given: its
    README warns that repacked weights are not offloaded. An expert cache (``--moe-cache-mib``) does not exist there,
    nor ``--n-cpu-ffn``, for which ``-ot`` stands.

    Examples
    --------
    >>> ik_flags_of(["-ngl", "all", "-ncmoe", "24", "--no-op-offload", "--moe-cache-mib", "4096"])
    ['-ngl', '999', '-ncmoe', '24', '-op', '-1,0']
    >>> ik_flags_of(["--n-cpu-ffn", "12"])
    ['-ot', 'blk\\.([0-9]|1[01])\\.ffn_(up|down|gate)\\.weight=CPU']
    """
    made: list[str] = []
    given = iter(flags)
    for flag in given:
        if flag == "--moe-cache-mib":
            next(given)
        elif flag == "--n-cpu-ffn":
            n = int(next(given))
            made += ["-ot", last_ffn(n, n)] if n else []
        elif flag == "--no-op-offload":
            made += ["-op", "-1,0"]
        elif flag == "all" and made[-1:] == ["-ngl"]:
            made.append("999")
        else:
            made.append(flag)
    return made


def last_experts(n: int, n_layer: int) -> str:
    """Return the override that keeps the experts of the last ``n`` layers in host memory."""
    return rf"blk\.({numbers_pattern(range(n_layer - n, n_layer))})\.ffn_(up|down|gate|gate_up)_exps=CPU"


def last_ffn(n: int, n_layer: int) -> str:
    """Return the override that keeps dense feed-forward weights of the last ``n`` layers in host memory."""
    return rf"blk\.({numbers_pattern(range(n_layer - n, n_layer))})\.ffn_(up|down|gate)\.weight=CPU"


def numbers_pattern(numbers: Iterable[int]) -> str:
    """Return alternatives of a regular expression that match these numbers.

    Examples
    --------
    >>> numbers_pattern([3, 7, *range(18, 62)])
    '[37]|1[89]|[2-5][0-9]|6[01]'
    """
    by_ten: dict[int, str] = {}
    for i in sorted(numbers):
        by_ten[i // 10] = by_ten.get(i // 10, "") + str(i % 10)
    alike: dict[str, str] = {}  # digits of ones: the digits of tens before them
    for ten, ones in by_ten.items():
        if 0 < ten < 10:
            alike[ones] = alike.get(ones, "") + str(ten)
    parts = [_digits(by_ten[0])] if 0 in by_ten else []
    parts += [_digits(tens) + _digits(ones) for ones, tens in alike.items()]
    return "|".join([*parts, *(f"{ten}{_digits(ones)}" for ten, ones in by_ten.items() if ten >= 10)])


def _digits(digits: str) -> str:
    """Return a pattern of one of some ascending digits."""
    if len(digits) < 2:
        return digits
    is_run = int(digits[-1]) - int(digits[0]) == len(digits) - 1 > 1
    return f"[{digits[0]}-{digits[-1]}]" if is_run else f"[{digits}]"


def is_experts_only(setting: Setting) -> bool:
    """Return whether the overrides of a setting are those of `last_experts`."""
    return all(
        re.fullmatch(r"blk\\\.\([\d|\[\]-]+\)\\\.ffn_\(up\|down\|gate\|gate_up\)_exps=CPU", o)
        for o in setting.overrides
    )


def with_llama_names(flags: Iterable[str], cards: Sequence[Card]) -> list[str]:
    """Return flags with the names of simulated devices as those of llama.cpp, which ``-ot`` takes, too.

    Examples
    --------
    >>> from pyggml.hardware.cards import CARDS
    >>> with_llama_names(["-ot", "output=SIM1,ffn_up=CPU"], [CARDS["rtx3090"], CARDS["rtx3060"]])
    ['-ot', 'output=CUDA1,ffn_up=CPU']
    """
    names = llama_names(cards)
    return [re.sub(r"=SIM(\d+)(?=$|,)", lambda found: f"={names[int(found[1])]}", flag) for flag in flags]


def command(program: str, model: str, flags: list[str]) -> str:
    """Return a command line; a model ``hf:REPO`` is named with ``-hf``."""
    named = ["-hf", model.removeprefix("hf:")] if model.startswith("hf:") else ["-m", model]
    return shlex.join([program, *named, *flags])
