"""Where each tensor of a model goes, decided from the header alone: `place` returns a `Placement`, which is data.

Each layer has a device (`-ngl`, `-ts`). Its weights go to the first buffer type of the device's list that the device
can use for the op that reads the weight. `-ot`, `--cpu-moe` and `--n-cpu-moe` move single tensors by name. Loading uses
the placement, the KV cache is on the devices of the layers, and `pyggml splits` shows both without reading weights.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .. import ops
from ..alloc.offsets import pad
from ..backend import Device
from ..buffer import BufferType
from ..errors import GraphError, UnsupportedOpError, visible
from ..gguf import TensorInfo
from ..hardware.cards import LLAMA_NAMES, Card, llama_names
from ..tensor import Tensor
from ..types import Op, Type
from .context import ContextParams
from .hparams import MAX_LAYERS, HParams, round_f32
from .override_patterns import compile_pattern
from .weights import EXPERT_OP, WeightSpec

__all__ = [
    "EXPERTS",
    "Override",
    "Placement",
    "PlacementFlags",
    "WeightPlace",
    "layer_devices",
    "norm_pins",
    "parse_overrides",
    "place",
    "warn_of_unmatched",
]

_log = logging.getLogger(__name__)

#: Names of expert weights, as ``--cpu-moe`` matches them (`LLM_FFN_EXPS_REGEX`).
EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
#: Names of weights of dense feed-forward layers, as ``--n-cpu-ffn`` matches them (`LLM_FFN_DENSE_REGEX`).
DENSE_FFN = r"\.ffn_(up|down|gate)\."
#: Short forms in `PlacementFlags.overrides`, and the pattern that each stands for, in all or the first N layers.
_SHORTHANDS = {"--cpu-moe": EXPERTS, "--n-cpu-moe": EXPERTS, "--n-cpu-ffn": DENSE_FFN}
#: Tokens of the op with which a device's support is checked (`weight_buft_supported`).
_N_PROBE = 512
#: Micro-batches with fewer tokens have their norms pinned to the layer's device, even without full offload.
_PIN_BELOW = 32


@dataclass(frozen=True, slots=True)
class PlacementFlags:
    """The flags of placement, with llama.cpp's defaults.

    Attributes
    ----------
    n_gpu_layers : int
        ``-ngl``: layers on devices, counted from the last; the output counts as one; below 0: all.
    fit : bool
        ``-ngl auto``: layers, experts and the context become fewer until the model fits; see `pyggml.fit`.
    overrides : tuple of str
        In the order of the command line; the first that matches a name applies. Each is ``REGEX=BUFT`` of ``-ot``,
        several of them separated by commas, ``--cpu-moe``, ``--n-cpu-moe N`` or ``--n-cpu-ffn N``.
    cpu_moe : bool
        ``--cpu-moe``, applied after the overrides: experts stay in host memory.
    n_cpu_moe : int
        ``--n-cpu-moe``, applied after these: experts of the first N layers stay in host memory.
    tensor_split : tuple of float
        ``-ts``: shares of the devices; by default in proportion to their free memory.
    use_mmap : bool
        Map the file and use host weights in place.
    """

    n_gpu_layers: int = -1
    overrides: tuple[str, ...] = ()
    cpu_moe: bool = False
    n_cpu_moe: int = 0
    tensor_split: tuple[float, ...] = ()
    use_mmap: bool = True
    fit: bool = False


@dataclass(frozen=True, slots=True)
class Override:
    """Puts weights whose names match in a buffer type."""

    regex: str  #: as llama.cpp reads it
    pattern: re.Pattern[str]  #: as Python does
    buft: BufferType
    text: str  #: as the user gave it


class WeightPlace(NamedTuple):
    """The place of one weight, and why."""

    spec: WeightSpec
    info: TensorInfo
    buft: BufferType
    reason: str


@dataclass(frozen=True, slots=True)
class Placement:
    """The places of all parts of a model.

    Attributes
    ----------
    devices : tuple of Device
        The devices besides the CPU, in the scheduler's order.
    cpu : Device
        The CPU, the last device.
    layers : tuple of Device
        The device of each layer: of its weights, its KV cache and its norms.
    output : Device
        The device of the last norm and the head.
    n_gpu_layers : int
        The number of layers on devices, including the output.
    weights : tuple of WeightPlace
        In the order in which upstream creates them.
    has_overrides : bool
        Whether weights were moved by name.
    """

    devices: tuple[Device, ...]
    cpu: Device
    layers: tuple[Device, ...]
    output: Device
    n_gpu_layers: int
    weights: tuple[WeightPlace, ...]
    has_overrides: bool
    use_mmap: bool

    @property
    def is_full_offload(self) -> bool:
        """Whether all layers and the output are on devices."""
        return self.n_gpu_layers > len(self.layers)

    def cache_buft(self, layer: int, params: ContextParams) -> BufferType:
        """Return the buffer type of a layer's K and V: the host's with ``--no-kv-offload``."""
        return (self.layers[layer] if params.offload_kqv else self.cpu).buffer_type

    def by_buft(self) -> dict[BufferType, list[WeightPlace]]:
        """Return the weights of each buffer type; a tensor that is used twice is listed once."""
        out: dict[BufferType, dict[str, WeightPlace]] = {}
        for w in self.weights:
            out.setdefault(w.buft, {}).setdefault(w.spec.name, w)
        return {buft: list(by_name.values()) for buft, by_name in out.items()}

    def is_mapped(self, buft: BufferType) -> bool:
        """Return whether weights of a buffer type are used in place in the mapped file."""
        return self.use_mmap and buft.is_host and buft.device is not None and buft is buft.device.buffer_type

    def weight_bytes(self) -> dict[BufferType, int]:
        """Return the bytes of weights in each buffer type, as loading will allocate them.

        Notes
        -----
        Mirrors the sizes that `llama_model_base::load_tensors` reports: for mapped weights, from the first to the last
        in each file.
        """
        out: dict[BufferType, int] = {}
        for buft, places in self.by_buft().items():
            if self.is_mapped(buft):
                by_part: dict[int, list[TensorInfo]] = {}
                for w in places:
                    by_part.setdefault(w.info.part, []).append(w.info)
                out[buft] = sum(
                    max(i.offset + i.nbytes for i in p) - min(i.offset for i in p) for p in by_part.values()
                )
            else:
                counts = Counter((w.info.type, w.info.ne) for w in places)
                out[buft] = sum(
                    n * pad(buft.alloc_size(Tensor(type, ne)), buft.alignment) for (type, ne), n in counts.items()
                )
        return out

    def gap_bytes(self) -> int:
        """Return the bytes of mapped ranges that are in no host weight: `weight_bytes` counts them, but nothing keeps them in memory."""
        sizes, places = self.weight_bytes(), self.by_buft()
        return sum(sizes[b] - sum(w.info.nbytes for w in places[b]) for b in sizes if self.is_mapped(b))


# -- overrides ---------------------------------------------------------------


def parse_overrides(flags: PlacementFlags, devices: Sequence[Device], cpu: Device) -> list[Override]:
    """Return the overrides of ``-ot``, ``--cpu-moe`` and similar flags, in order of precedence.

    Raises
    ------
    GraphError
        An override has no ``=``, an unknown buffer type, or an invalid pattern.

    Notes
    -----
    Mirrors `parse_tensor_buffer_overrides` and `llm_add_n_cpu_ffn_overrides`: commas separate overrides, so a pattern
    cannot contain one. Differs: an empty pattern, which matches every name, is refused.
    """
    if flags.n_cpu_moe < 0:
        raise GraphError(f"--n-cpu-moe is {flags.n_cpu_moe}, at least 0 is needed")
    words = [*flags.overrides, *(["--cpu-moe"] if flags.cpu_moe else [])]
    words += [f"--n-cpu-moe {flags.n_cpu_moe}"] if flags.n_cpu_moe else []
    known = {device.buffer_type.name: device.buffer_type for device in (*devices, cpu)}
    theirs = _llama_bufts(devices)
    out: list[Override] = []
    for word in words:
        name, _, count = word.partition(" ")
        if name not in _SHORTHANDS:
            out += [_parse_override(text, known, theirs) for text in word.removesuffix(",").split(",")]
        elif name == "--cpu-moe":
            out.append(_override(_SHORTHANDS[name], cpu.buffer_type, word))
        elif count.isdecimal():
            patterns = (rf"blk\.{layer}{_SHORTHANDS[name]}" for layer in range(min(int(count), MAX_LAYERS)))
            out += [_override(pattern, cpu.buffer_type, word) for pattern in patterns]
        else:
            raise GraphError(f"'{word}' needs a number of layers", hint=f"such as '{name} 8'")
    return out


def _llama_bufts(devices: Sequence[Device]) -> dict[str, BufferType]:
    """Return buffer types of cards by llama.cpp's names, so that a pasted ``=CUDA1`` names a simulated device.

    Another backend's names count all cards: ``Vulkan1`` is the second one.
    """
    cards = {d.buffer_type: d.profile.sheet for d in devices if d.profile and isinstance(d.profile.sheet, Card)}
    out = {f"{kind}{i}": buft for i, buft in enumerate(cards) for kind in LLAMA_NAMES.values()}
    return out | dict(zip(llama_names(list(cards.values())), cards, strict=True))


def _parse_override(text: str, known: Mapping[str, BufferType], theirs: Mapping[str, BufferType]) -> Override:
    pattern, equals, name = text.partition("=")
    if not equals or not pattern:
        raise GraphError(
            f"-ot '{text}' is not of the form REGEX=BUFT",
            hint=f"such as '{EXPERTS}=CPU'; commas separate overrides, so that a pattern cannot hold one",
        )
    buft = known.get(name) or theirs.get(name)
    if buft is None:
        near = difflib.get_close_matches(name.upper(), known, 1, 0.5)
        meant = f"did you mean {near[0]}? " if near else ""
        raise GraphError(
            f"-ot '{text}': no buffer type is called '{name}'", hint=f"{meant}there are {', '.join(known)}"
        )
    return _override(pattern, buft, f"-ot {text}")


def _override(regex: str, buft: BufferType, text: str) -> Override:
    return Override(regex, compile_pattern(regex), buft, text)


def warn_of_unmatched(flags: PlacementFlags, devices: Sequence[Device], names: Sequence[str]) -> None:
    """Warn of each ``-ot`` that matches no weight, with the nearest names; the last device is the CPU."""
    for override in parse_overrides(flags, devices[:-1], devices[-1]):
        if not override.text.startswith("-ot ") or any(override.pattern.search(name) for name in names):
            continue
        wanted = override.text.removeprefix("-ot ").partition("=")[0].replace("\\", "").strip("^$.*")
        kinds = {re.sub(r"^blk\.\d+\.", "", name): name for name in reversed(names)}
        near = difflib.get_close_matches(re.sub(r"^blk\.[^a-z]*\.", "", wanted), kinds, 3, 0.4)
        nearest = ", ".join(kinds[kind] for kind in near) or ", ".join(list(dict.fromkeys(names))[:3])
        _log.warning("%s matches no weight of the model; the nearest names are %s", override.text, visible(nearest))


# -- layers ------------------------------------------------------------------


def layer_devices(
    n_layer: int, n_gpu_layers: int, flags: PlacementFlags, devices: Sequence[Device], cpu: Device
) -> list[Device]:
    """Return the device of each layer and, last, of the output.

    Notes
    -----
    Mirrors `llama_model_base::load_tensors`: the last layers go to devices, in shares of free memory or of ``-ts``.
    """
    if not devices:
        return [cpu] * (n_layer + 1)
    ends = _shares(flags, devices, cpu)
    first = max(n_layer + 1 - n_gpu_layers, 0)
    n_on_devices = min(n_gpu_layers, n_layer + 1)
    out: list[Device] = []
    for layer in range(n_layer + 1):
        if layer < first or layer - first >= n_on_devices:
            out.append(cpu)
        else:
            out.append(devices[bisect_right(ends, round_f32((layer - first) / n_on_devices))])
    return out


def _shares(flags: PlacementFlags, devices: Sequence[Device], cpu: Device) -> list[float]:
    """Return the end of each device's share of the layers, from 0 to 1."""
    check_shares(flags, devices)
    if any(flags.tensor_split):
        shares = [*flags.tensor_split, *([0.0] * (len(devices) - len(flags.tensor_split)))]
    else:
        shares = []
        for device in devices:
            free, total = device.memory()
            shares.append(float(free if free or total else cpu.memory()[0]))
    ends: list[float] = []
    total_share = 0.0
    for share in shares:
        total_share = round_f32(total_share + round_f32(share))
        ends.append(total_share)
    return [round_f32(end / total_share) if total_share else 1.0 for end in ends]


def check_shares(flags: PlacementFlags, devices: Sequence[Device]) -> None:
    """Check ``-ts``, which has no effect without devices.

    Raises
    ------
    GraphError
        There are more shares than devices, or one is negative or infinite.
    """
    if devices and (len(flags.tensor_split) > len(devices) or not all(0 <= s < math.inf for s in flags.tensor_split)):
        names = ", ".join(d.name for d in devices)
        raise GraphError(
            f"-ts {','.join(f'{s:g}' for s in flags.tensor_split)} does not fit {names}",
            hint="give one share for each device, none below 0",
        )


# -- weights -----------------------------------------------------------------


class _Support:
    """Whether devices can use a weight in a buffer type; each call of a device is made once."""

    def __init__(self, hparams: HParams) -> None:
        self.hparams = hparams
        self.known: dict[tuple[object, ...], bool] = {}

    def __call__(self, spec: WeightSpec, info: TensorInfo, buft: BufferType, device: Device) -> bool:
        key = (spec.op, info.type, info.ne, buft, device)
        if key not in self.known:
            self.known[key] = self._ask(spec, info, buft, device)
        return self.known[key]

    def _ask(self, spec: WeightSpec, info: TensorInfo, buft: BufferType, device: Device) -> bool:
        """Make the op that will use the weight, and check that the device supports it.

        Notes
        -----
        Mirrors `weight_buft_supported`. Differs: ROPE has all its factors and a base above 0. Upstream asks about ROPE
        without rotation, which a backend may refuse.
        """
        weight = Tensor(info.type, info.ne, name=spec.name)
        weight.buffer = buft.alloc_buffer(0)
        return device.supports_op(self._probe(spec.op, weight))

    def _probe(self, op: Op, w: Tensor) -> Tensor:
        hp, n_used = self.hparams, self.hparams.n_expert_used
        if op is Op.GET_ROWS:
            return ops.get_rows(w, Tensor(Type.I32, (_N_PROBE,)))
        if op is Op.MUL_MAT:
            return ops.mul_mat(w, Tensor(Type.F32, (w.ne[0], _N_PROBE, w.ne[2], w.ne[3])))
        if op is EXPERT_OP:
            ids = Tensor(Type.I32, (n_used, _N_PROBE))
            return ops.mul_mat_id(w, Tensor(Type.F32, (w.ne[0], n_used, _N_PROBE)), ids)
        if op is Op.ADD_ID:
            ids = Tensor(Type.I32, (n_used, _N_PROBE))
            return ops.add_id(Tensor(Type.F32, (w.ne[0], n_used, _N_PROBE)), w, ids)
        if op is Op.ADD:
            return ops.add(Tensor(Type.F32, w.ne), w)
        if op is Op.MUL:
            return ops.mul(Tensor(Type.F32, w.ne), w)
        if op is Op.SCALE:
            return ops.scale(w, 1.0)
        if op is Op.SSM_CONV:
            return ops.ssm_conv(Tensor(Type.F32, (w.ne[0] - 1 + _N_PROBE, w.ne[1], 3)), w)
        assert op is Op.ROPE, op
        rows = Tensor(Type.F32, (hp.n_embd_head_v, hp.n_head, _N_PROBE))
        positions = Tensor(Type.I32, (_N_PROBE,))
        return ops.rope_ext(rows, positions, w, 2 * w.ne[0], 0, 0, 1e4, 1.0, 0.0, 1.0, 0.0, 0.0)


BuftList = list[tuple[Device, BufferType]]


def _cpu_bufts(devices: Sequence[Device], cpu: Device) -> BuftList:
    """Return pinned memory of the first device that has it, then the CPU's own. Mirrors `make_cpu_buft_list`."""
    out: BuftList = []
    for device in devices:
        host = device.host_buffer_type
        if host is not None:
            out.append((device, host))
            break
    out.append((cpu, cpu.buffer_type))
    return out


def place(
    hparams: HParams,
    specs: Iterable[WeightSpec],
    infos: Mapping[str, TensorInfo],
    devices: Sequence[Device],
    cpu: Device,
    flags: PlacementFlags,
) -> Placement:
    """Choose a place for each weight of a model.

    Parameters
    ----------
    specs : iterable of WeightSpec
        From `resolve_specs`.
    infos : mapping of str to TensorInfo
        The tensors of the file.
    devices : sequence of Device
        The devices besides the CPU, in order; without devices everything stays on the CPU.

    Raises
    ------
    GraphError
        A flag or an override is invalid.
    UnsupportedOpError
        No buffer type of the device's list can hold a weight so that its op runs.

    Notes
    -----
    Mirrors `llama_model_base::load_tensors` and `llama_model_loader::create_tensor`.
    """
    n_layer = hparams.n_layer_all
    n_gpu_layers = flags.n_gpu_layers if flags.n_gpu_layers >= 0 else n_layer + 1
    by_layer = layer_devices(n_layer, n_gpu_layers, flags, devices, cpu)
    overrides = parse_overrides(flags, devices, cpu)
    supports = _Support(hparams)
    cpu_list = _cpu_bufts(devices, cpu)
    lists: dict[Device, BuftList] = {d: [(d, d.buffer_type), *cpu_list] for d in devices}
    lists[cpu] = cpu_list
    outside = {"input": (cpu, "the input embedding"), "output": (by_layer[n_layer], "the output")}
    placed: list[WeightPlace] = []
    for spec in specs:
        info = infos[spec.name]
        device, where = outside.get(spec.part) or (by_layer[spec.layer], f"layer {spec.layer}")
        override = next((o for o in overrides if o.pattern.search(spec.name)), None) if overrides else None
        if override is not None:
            reason = override.text
            # an override to the CPU still takes the best of the CPU's list
            choices = cpu_list if override.buft is cpu.buffer_type else [(device, override.buft)]
            buft = override.buft if override.buft is not cpu.buffer_type else _first(spec, info, choices, supports)
        else:
            choices = lists[device]
            buft = _first(spec, info, choices, supports)
            reason = f"{where} is on {device.name}"
            if buft is not choices[0][1]:
                reason += (
                    f", which cannot use a {info.type.ggml_name} weight for {spec.op.name} in {choices[0][1].name}"
                )
        owner = buft.device
        if flags.use_mmap and owner is not None and buft is owner.host_buffer_type:
            buft = cpu.buffer_type  # the file is mapped: no copy into pinned memory
        placed.append(WeightPlace(spec, info, buft, reason))
    return Placement(
        tuple(devices),
        cpu,
        tuple(by_layer[:n_layer]),
        by_layer[n_layer],
        n_gpu_layers if devices else 0,
        tuple(placed),
        bool(overrides),
        flags.use_mmap,
    )


def _first(spec: WeightSpec, info: TensorInfo, choices: BuftList, supports: _Support) -> BufferType:
    """Mirrors `select_weight_buft`."""
    for device, buft in choices:
        if supports(spec, info, buft, device):
            return buft
    names = tuple(device.name for device, _ in choices)
    raise UnsupportedOpError(
        spec.name,
        spec.op.name,
        names,
        reason=f"its type is {info.type.ggml_name}",
        hint="convert the model to another type, such as q8_0",
    )


# -- pins --------------------------------------------------------------------


def norm_pins(norms: Iterable[tuple[Tensor, int]], n_tokens: int, placement: Placement) -> list[tuple[Tensor, Device]]:
    """Return the norms that are pinned to their layers' devices in a graph of ``n_tokens`` tokens.

    Notes
    -----
    Mirrors `llama_context::graph_get_cb`: otherwise a norm may run on the previous layer's device, which needs a copy.
    """
    if n_tokens >= _PIN_BELOW and not placement.is_full_offload:
        return []
    pins = ((tensor, placement.layers[layer]) for tensor, layer in norms)
    return [(tensor, device) for tensor, device in pins if device.supports_op(tensor)]
