"""`CapturedSource`: provides a planner with llama.cpp's graphs, placement and caches.

llama.cpp decides everything that depends on the model: the graph, the buffer type of each weight and cache, the device
of each layer, and whether flash attention and other fused ops stay on. pyggml's scheduler decides the rest.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .. import ops
from ..backend import Device
from ..buffer import Buffer, BufferType
from ..config import op_offload_min_batch
from ..errors import GraphError, ModelError, SchedError
from ..gguf import GGUFFile
from ..models.batch import Batch, MicroBatch, Outputs
from ..models.context import ContextFlags, ContextParams, check_context
from ..models.kv_cache import CacheFullError
from ..models.loading import Progress
from ..models.placement import (
    EXPERTS,
    Override,
    Placement,
    PlacementFlags,
    WeightPlace,
    check_shares,
    parse_overrides,
)
from ..models.source import N_GRAPHS, Build, GraphSource
from ..models.weights import Part, WeightSpec
from ..moe_cache import LlamaCache, MoeCache
from ..tensor import Tensor
from ..types import BufferUsage, Op, Type
from .answers import OF_LAYER, Answers, is_settled
from .graphs import CapturedGraph, CapturedTensor, UnknownError, read_graph, read_tensor
from .library import find_llama
from .process import shared_process

__all__ = ["CapturedFacts", "CapturedSource", "about_context", "about_placement"]

Message = dict[str, Any]  # what goes through JSON

_log = logging.getLogger("pyggml.llama")

#: Address of the first tensor of each buffer type in a plan; no process has memory there.
_NOWHERE = 1 << 60
#: Expert weights of a layer, in the order of llama.cpp's cache.
_EXPERT_KINDS = ("gate_up", "gate", "up", "down")
_EXPERT_WEIGHT = re.compile(rf"blk\.\d+\.ffn_({'|'.join(_EXPERT_KINDS)})_exps\.weight")
_TYPES = {t.ggml_name: t for t in Type}
_MAX_SEQ = 256  #: upstream's `LLAMA_MAX_SEQ`
_WEIGHTS = 1  #: upstream's `GGML_BACKEND_BUFFER_USAGE_WEIGHTS`


def _n_dense_lead(names: Iterable[str]) -> int:
    """Return the number of layers before the first with experts, from names, because not every family reads the key."""
    layers = (re.match(rf"blk\.(\d+){EXPERTS}", name) for name in names)
    return min((int(found[1]) for found in layers if found), default=0)


@dataclass(frozen=True, slots=True)
class CapturedFacts:
    """Facts about a model for plans, from llama.cpp and the header."""

    arch: str
    name: str
    n_vocab: int
    n_ctx_train: int
    n_layer: int
    n_expert: int
    n_expert_used: int
    n_layer_dense_lead: int

    @classmethod
    def read(cls, file: GGUFFile, n_vocab: int) -> CapturedFacts:
        """Read the keys that all architectures share."""
        arch = file.require("general.architecture", str)

        def number(key: str) -> int:
            """Return a number; of an array by layer, the largest."""
            value = file.metadata.get(f"{arch}.{key}", 0)
            if isinstance(value, str):
                return 0
            try:
                return int(value)
            except TypeError:
                return max((int(v) for v in value), default=0)

        return cls(
            arch=arch,
            name=file.require("general.name", str, ""),
            n_vocab=n_vocab,
            n_ctx_train=number("context_length"),
            n_layer=number("block_count") - number("nextn_predict_layers"),
            n_expert=number("expert_count"),
            n_expert_used=number("expert_used_count"),
            n_layer_dense_lead=_n_dense_lead(file.tensors),
        )


def about_placement(placement: PlacementFlags, devices: Sequence[Device], overrides: Sequence[Override]) -> Message:
    """Return devices and placement flags for the child.

    Raises
    ------
    GraphError
        The shares do not fit the devices.
    """
    check_shares(placement, devices)
    return {
        "devices": [
            {
                "name": d.buffer_type.name,
                "free": d.memory()[0],
                "total": d.memory()[1],
                "min_batch": op_offload_min_batch() if _offers(d) else None,
                "row_padding": _row_padding(d),
                # a mapped file is used in place
                "pinned": "" if placement.use_mmap or d.host_buffer_type is None else d.host_buffer_type.name,
            }
            for d in devices
        ],
        "n_gpu_layers": placement.n_gpu_layers,
        "tensor_split": list(placement.tensor_split) if devices else [],
        "overrides": [[o.regex, o.buft.name] for o in overrides],
    }


def _offers(device: Device) -> bool:
    """Return whether a device offers to run ops with host weights."""
    weight = Tensor(Type.F32, (32, 32), name="weight")
    return device.offload_op(ops.mul_mat(weight, Tensor(Type.F32, (32, 1 << 20))))


def _row_padding(device: Device) -> int:
    """Return the multiple to which a device pads the last row of a quantised tensor; 1 if it does not."""
    row = Tensor(Type.Q8_0, (32, 1))
    added = device.buffer_type.alloc_size(row) - row.nbytes
    return 32 + added * 32 // Type.Q8_0.row_size(32) if added else 1


def about_context(context: ContextFlags, moe_cache_bytes: int = 0) -> Message:
    """Return the context's flags for the child.

    Raises
    ------
    GraphError
        A flag is invalid.
    """
    check_context(context, max_seq=_MAX_SEQ)
    if moe_cache_bytes < 0:
        raise GraphError(f"an expert cache cannot have {moe_cache_bytes} bytes", hint="0 turns it off")
    return {
        "n_ctx": context.n_ctx,
        "n_batch": context.n_batch,
        "n_ubatch": context.n_ubatch or context.n_batch,
        "n_seq_max": context.n_seq_max,
        "kv_unified": context.kv_unified,
        "type_k": int(context.type_k),
        "type_v": int(context.type_v),
        "flash_attn": context.flash_attn,
        "offload_kqv": context.offload_kqv,
        "op_offload": context.op_offload,
        "swa_full": context.swa_full,
        "rope_freq_base": context.rope_freq_base,
        "rope_freq_scale": context.rope_freq_scale,
        "moe_cache_size": moe_cache_bytes,
        "moe_cache_free": {},
    }


class CapturedSource(GraphSource):
    """Graphs from llama.cpp, of any model that it loads; only for plans.

    Parameters
    ----------
    file : GGUFFile
        The model.
    devices, cpu
        As for `Planner`.
    placement, context
        Flags.

    Raises
    ------
    DeviceUnavailableError
        llama.cpp is not installed, or cannot be used.
    ModelError
        llama.cpp refuses the model, or fails on it.
    GraphError
        A flag is invalid.
    """

    hparams: CapturedFacts
    reserves: bool  #: whether the build exports `llama_graph_reserve`, for graphs of any size over a whole cache
    banks: MoeCache | None = None

    def __init__(
        self,
        file: GGUFFile,
        devices: Sequence[Device],
        cpu: Device,
        *,
        placement: PlacementFlags,
        context: ContextFlags,
    ) -> None:
        self.file, self.cpu = file, cpu
        self._bufts = {d.buffer_type.name: d.buffer_type for d in (*devices, cpu)}
        self._bufts |= {d.host_buffer_type.name: d.host_buffer_type for d in devices if d.host_buffer_type is not None}
        self._held = ExitStack()
        self._buffers: dict[tuple[str, int], Buffer] = {}
        self._ends: dict[str, int] = {}
        self._leafs: dict[tuple[str, str, int], Tensor] = {}
        self._graphs: dict[tuple[object, ...], CapturedGraph] = {}
        try:
            self.answers = Answers(self._held.enter_context(shared_process(find_llama())), file.paths, file.tensors)
            self._settle(devices, placement, context, derive=False)
        except BaseException:
            self._held.close()
            raise

    def _settle(
        self, devices: Sequence[Device], placement: PlacementFlags, context: ContextFlags, *, derive: bool
    ) -> None:
        """Take the flags; ``derive``: from what llama.cpp answered before, if that is possible."""
        self.tensor_split, self.banks = placement.tensor_split, None
        overrides = parse_overrides(placement, devices, self.cpu)
        about = {"placement": about_placement(placement, devices, overrides), "context": about_context(context)}
        if is_settled(about):  # then only the scheduler goes by this flag
            about["context"]["op_offload"] = True
        self.captures = self.answers.captures(about)
        facts, self._kind = self.answers.facts(about, [(o.pattern, o.buft.name) for o in overrides], derive=derive)
        self._largest = self.answers.largest(self._kind)
        self.build: dict[str, str] = facts["build"]
        self.reserves = facts["reserves"]
        self.hparams = CapturedFacts.read(self.file, facts["n_vocab"])
        self.placement = self._place(facts, devices, placement, overrides)
        places: dict[str, list[str]] = {}
        for weight in self.placement.weights:
            places.setdefault(weight.spec.name, []).append(weight.buft.name)
        self._home = {name: bufts[0] for name, bufts in places.items() if len(bufts) == 1}
        has_flash = any(t.op == "FLASH_ATTN_EXT" for t in self._largest["tensors"])
        self.params = ContextParams(
            n_ctx=facts["n_ctx"],
            n_ctx_seq=facts["n_ctx"] // (1 if context.kv_unified else facts["n_seq_max"]),
            n_batch=facts["n_batch"],
            n_ubatch=facts["n_ubatch"],
            n_seq_max=facts["n_seq_max"],
            kv_unified=context.kv_unified,
            n_outputs_max=context.n_outputs_max,
            type_k=context.type_k,
            type_v=context.type_v,
            flash_attn=has_flash,
            auto_flash_attn=False,
            offload_kqv=context.offload_kqv,
            op_offload=context.op_offload,
            swa_full=context.swa_full,
        )

    # -- placement -----------------------------------------------------------

    def _place(
        self, facts: Message, devices: Sequence[Device], flags: PlacementFlags, overrides: Sequence[Override]
    ) -> Placement:
        by_name = {d.buffer_type.name: d for d in (*devices, self.cpu)}
        layers = [by_name[name] for name in facts["layers"]]
        if not layers:
            raise ModelError(self.file.path, "llama.cpp does not tell which device each layer is on")
        weights = [place for w in self._weights(facts) if (place := self._weight_place(w, layers, overrides))]
        n_on_devices = sum(d is not self.cpu for d in layers)
        return Placement(
            devices=tuple(devices),
            cpu=self.cpu,
            layers=tuple(layers[:-1]),
            output=layers[-1],
            n_gpu_layers=n_on_devices,
            weights=tuple(weights),
            has_overrides=bool(overrides),
            use_mmap=flags.use_mmap,
        )

    def _weights(self, facts: Message) -> list[Message]:
        """Return the weights as llama.cpp loads them; if it does not report them, those of the graph."""
        told = [w for w in facts["weights"] if w["buft"] is not None]
        known = {(w["name"], self._memory(w["buft"])) for w in told}
        of_layers = {w["name"] for w in told if OF_LAYER.match(w["name"])}  # the graph may be of other overrides
        for t in self._largest["tensors"]:
            if t.where is None or t.where[1] != _WEIGHTS or t.name in of_layers:
                continue
            if (t.name, self._memory(t.where[0])) not in known:
                told.append({"name": t.name, "op": None, "buft": t.where[0], "moved": False})
        return told

    def _memory(self, buft: str) -> str:
        """Return the memory of a buffer type; pinned memory is host memory."""
        return "host" if self._bufts[buft].is_host else buft

    def _weight_place(
        self, weight: Message, layers: Sequence[Device], overrides: Sequence[Override]
    ) -> WeightPlace | None:
        name, op = weight["name"], weight["op"]
        info = self.file.tensors.get(name)
        if info is None:
            return None
        buft = self._bufts[weight["buft"]]
        part, layer, home, where = _home(name, op, layers, self.cpu, buft)
        override = next((o for o in overrides if o.pattern.search(name)), None) if weight["moved"] else None
        if override is not None:
            reason = override.text
        else:
            reason = f"{where} is on {home.name}"
            if buft is not home.buffer_type and not (home is self.cpu and buft.is_host):
                reason += f", which cannot use a {info.type.ggml_name} weight for {op} in {home.buffer_type.name}"
        spec = WeightSpec(name, info.ne, part, layer, Op.__members__.get(op or "", Op.NONE))
        return WeightPlace(spec, info, buft, reason)

    # -- memory --------------------------------------------------------------

    def changed(self, placement: PlacementFlags, context: ContextFlags) -> CapturedSource:
        """Return a source of the same model with other flags; graphs are reused if only the places of weights change."""
        made = copy(self)
        made._settle(self.placement.devices, placement, context, derive=True)
        for (name, _, _), tensor in self._leafs.items():
            home = made._home.get(name)
            if home is not None and tensor.buffer is not None and tensor.buffer.buft.name != home:
                made._put(tensor, home, _WEIGHTS)
        for graph in self._graphs.values():
            for node in graph.graph.nodes:
                if node.view_src is not None:  # what the scheduler wrote with the former places
                    node.buffer = node.data = None
        return made

    def forget_pipeline(self) -> None:
        """Keep no graph that was made before: which of its inputs llama.cpp flagged is not known."""
        self._graphs.clear()

    def load(self, *, data: bool, progress: Progress | None) -> None:
        """Put weights into buffers without bytes."""
        assert not data, "captured graphs are for plans"

    def expert_weights(self) -> dict[int, list[Tensor]]:
        """Return the expert weights of each layer."""
        of_layer: dict[int, dict[str, Tensor]] = {}
        for place in self.placement.weights:
            layer, found = place.spec.layer, _EXPERT_WEIGHT.fullmatch(place.spec.name)
            if found and layer < len(self.placement.layers):
                info = place.info
                made = Tensor(info.type, info.ne)
                about = CapturedTensor(
                    "NONE", place.spec.name, info.type.ggml_name, made.ne, made.nb, src=(), params=(), flags=0,
                    view=None, offs=0, where=(place.buft.name, _WEIGHTS), desc="NONE",
                )  # fmt: skip
                of_layer.setdefault(layer, {})[found[1]] = self._leaf(about, 0)
        return {il: [ws[kind] for kind in _EXPERT_KINDS if kind in ws] for il, ws in of_layer.items()}

    def read_banks(self, cache: MoeCache, free_bytes: Mapping[Device, int]) -> None:
        """Have llama.cpp build graphs with its expert cache, whose tensors are then those of ``cache``."""
        if not isinstance(cache.rule, LlamaCache):
            raise SchedError(
                f"graphs of {self.hparams.arch} come from llama.cpp, which has its own expert cache",
                hint="use --moe-cache-mib, or replay a trace: `pyggml experts compare --scope group`",
            )
        if cache.host is not None:
            raise SchedError(
                f"graphs of {self.hparams.arch} come from llama.cpp, which copies missing experts to the device",
                hint="leave out --moe-cache-misses cpu",
            )
        self.banks = cache
        context = self.captures.about["context"] | {
            "moe_cache_size": cache.rule.size_bytes,
            "moe_cache_free": {d.buffer_type.name: n for d, n in free_bytes.items()},
        }
        self.captures.about = self.captures.about | {"context": context}
        self._kind = self.answers.own_kind(self.captures.about)
        self._cached = {w.name: w for layer in self.expert_weights().values() for w in layer}
        self._largest = self.answers.largest(self._kind)

    def _bank(self, about: CapturedTensor) -> Tensor | None:
        """Return the tensor of the expert cache that a graph names; None for any other tensor."""
        assert self.banks is not None
        kind, _, name = about.name.partition(".")
        if kind != "moe_cache":
            return None
        if name.startswith("slot_map-"):
            found = self.banks.slot_map(int(name.removeprefix("slot_map-")))
        elif about.op == "VIEW":
            found = self.banks.bank(self._cached[name])
        else:
            found = self.banks.bank(self._cached[name.partition(".")[2]]).view_src
        if found is None or list(found.ne) != list(about.ne):
            shape = None if found is None else list(found.ne)
            raise SchedError(
                f"the expert cache of llama.cpp has {list(about.ne)} as '{about.name}', that of pyggml {shape}"
            )
        return found

    def make_cache(self, *, data: bool) -> Mapping[BufferType, int]:
        """Return the bytes that caches need, including recurrent states."""
        sizes: dict[BufferType, int] = {}
        seen = set()
        for t in self._largest["tensors"]:
            if t.where is None or t.where[1] == _WEIGHTS or t.name in seen:
                continue
            seen.add(t.name)
            buft = self._bufts[t.where[0]]
            size = buft.alloc_size(Tensor(_TYPES[t.type], tuple(t.ne), tuple(t.nb)))
            sizes[buft] = sizes.get(buft, 0) + -(-size // buft.alignment) * buft.alignment
        return sizes

    def _leaf(self, about: CapturedTensor, n_before: int) -> Tensor:
        """Return the tensor of a weight or cache, which is the same in every graph."""
        assert about.where is not None
        where, usage = about.where
        home = self._home.get(about.name)
        key = (about.name, where if home is None else "", n_before)
        made = self._leafs.get(key)
        if made is None:
            made = self._leafs[key] = read_tensor(about)
            self._put(made, home or where, usage)
        return made

    def _put(self, tensor: Tensor, where: str, usage: int) -> None:
        """Give a weight or cache an address of its own in a buffer type."""
        buffer = self._buffers.get((where, usage))
        if buffer is None:
            buffer = self._buffers[where, usage] = self._bufts[where].alloc_buffer(0)
            if usage == _WEIGHTS:
                buffer.set_usage(BufferUsage.WEIGHTS)
        tensor.buffer, tensor.data = buffer, self._ends.get(where, _NOWHERE)
        size = buffer.buft.alloc_size(tensor)
        self._ends[where] = tensor.data + -(-size // buffer.buft.alignment) * buffer.buft.alignment

    # -- graphs --------------------------------------------------------------

    def reserved(self, n_tokens: int, n_seqs: int, n_outputs: int) -> CapturedGraph:
        """Return a graph over the whole cache of ``n_tokens`` tokens, rounded up to as many for each sequence."""
        p, n_tokens = self.params, -(-n_tokens // n_seqs) * n_seqs
        largest = min(p.n_ctx, p.n_ubatch)
        if (n_tokens, n_seqs, n_outputs) == (largest, p.n_seq_max, min(largest, p.n_batch)):
            return self._graph("largest", 0, lambda: self._largest, n_tokens)
        size = [n_tokens, n_seqs, n_outputs]
        return self._graph(str(size), 0, lambda: self.answers.reserve(self._kind, size), n_tokens)

    def parts(
        self, n_tokens: int, outputs: Outputs, *, depth: int = 0, is_generated: bool = False
    ) -> Iterator[tuple[MicroBatch, Build]]:
        """Yield the micro-batches of a decode; in generation, all use the graph of the first."""
        if depth + n_tokens > self.params.n_ctx_seq:
            raise CacheFullError(n_tokens, depth, self.params.n_ctx_seq)
        if is_generated:
            about = self._decode(1, "last", depth)["graphs"][0]
            build = partial(self._graph, f"1 last {depth}", 0, lambda: about, 1)
            for i in range(n_tokens):
                yield _micro_batch(1, depth + i, 1), None if i else build
            return
        decoded = self._decode(n_tokens, outputs, depth)
        graphs, first, last = decoded["graphs"], 0, None
        which = f"{n_tokens} {outputs} {depth}"
        for about in decoded["parts"]:
            n, i = about["n_tokens"], about["graph"]
            part = _micro_batch(n, depth + first, about["n_outputs"])
            yield part, None if i == last else partial(self._graph, which, i, partial(graphs.__getitem__, i), n)
            first, last = first + n, i

    def _decode(self, n_tokens: int, outputs: Outputs, depth: int) -> Message:
        """Return the graphs of a decode; if llama.cpp fails on it, those over the whole cache."""
        decode = partial(self.answers.decode, self._kind, n_tokens=n_tokens, outputs=outputs, depth=depth)
        try:
            return decode(is_full=False)
        except ModelError as error:
            _log.info("%s; the graph of a full cache is taken", error)
            return decode(is_full=True)

    def _graph(self, which: str, index: int, captured: Callable[[], Message], n_tokens: int) -> CapturedGraph:
        """Return a graph; equal ones are the same object."""
        key = (self._kind, which, index)
        made = self._graphs.pop(key, None) or self._read(captured(), n_tokens)
        self._graphs[key] = made
        if len(self._graphs) > N_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return made

    def _read(self, captured: Message, n_tokens: int) -> CapturedGraph:
        try:
            made = read_graph(captured, n_tokens, self._leaf, None if self.banks is None else self._bank)
        except UnknownError as error:
            raise ModelError(
                self.file.path, f"llama.cpp's graph has {error}, which pyggml does not know", hint="a newer pyggml may"
            ) from None
        if self.banks is not None:
            layers = self.banks.layer_of  # by slot map
            made.pins = [
                (node, self.banks.backend(layers[node.src[0]]))
                for node in made.graph.nodes
                if node.op is Op.GET_ROWS and node.src[0] in layers
            ]
        return made

    def close(self) -> None:
        """Release the child and free the buffers."""
        self._held.close()
        for tensor in self._leafs.values():
            tensor.buffer = tensor.data = None
        for buffer in self._buffers.values():
            buffer.close()


def _home(
    name: str, op: str | None, layers: Sequence[Device], cpu: Device, buft: BufferType
) -> tuple[Part, int, Device, str]:
    """Return a weight's part of the model, layer, device and reason."""
    if found := OF_LAYER.match(name):
        layer = int(found[1])
        return "repeating", layer, layers[min(layer, len(layers) - 1)], f"layer {layer}"
    if op == "ROPE":  # factors of rotation, once on each device whose layers use them
        using = (i for i, d in enumerate(layers) if buft is d.buffer_type or (d is cpu and buft.is_host))
        layer = next(using, len(layers) - 1)
        return "repeating", layer, layers[layer], f"layer {layer}"
    if op == "GET_ROWS":
        return "input", -1, cpu, "the input embedding"
    return "output", -1, layers[-1], "the output"


def _micro_batch(n: int, first: int, n_outputs: int) -> MicroBatch:
    outputs: Outputs = "none" if n_outputs == 0 else "all" if n_outputs == n else "last"
    return Batch.of([0] * n, first, outputs=outputs).take(np.arange(n), n, equal_seqs=False)
