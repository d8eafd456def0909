"""Loads weights to their placement: host weights in place in the mapped file, others into device buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..alloc import alloc_tensors
from ..buffer import Buffer, BufferType, tensor_alloc, tensor_set
from ..edits import EDITS
from ..errors import OutOfMemoryError
from ..gguf import GGUFFile
from ..tensor import Tensor
from ..types import BufferUsage
from .context import ContextParams
from .hparams import HParams
from .kv_cache import KVCache
from .placement import Placement, WeightPlace
from .weights import Weights

__all__ = ["LoadedWeights", "Progress", "allocate_cache", "load_weights", "plan_cache", "plan_weights"]

#: Called with the bytes copied so far and in total; it may raise to stop the load.
Progress = Callable[[int, int], None]
#: Bytes copied between two calls of `Progress`.
_STEP_BYTES = 16 * 1024**2
#: Address of the first tensor of each buffer type in a plan; no process has memory there.
_NOWHERE = 1 << 60


@dataclass(eq=False, slots=True)
class LoadedWeights:
    """Weights and the buffers that hold them.

    Attributes
    ----------
    weights : Weights
        The tensors, by name and layer.
    buffers : list of Buffer
        Their buffers, including those over the mapped file.
    mapped_bytes, copied_bytes : int
        Bytes of weights used in place, and of those copied.
    """

    weights: Weights
    buffers: list[Buffer]
    mapped_bytes: int
    copied_bytes: int
    uses: Sequence[Tensor] = ()  #: the tensor of each use, in the order of the placement

    def close(self) -> None:
        """Free the memory; the weights have no buffer afterwards."""
        EDITS.note()
        for tensor in self.weights.tensors:
            tensor.buffer = tensor.data = None
        for buffer in self.buffers:
            buffer.close()
        self.buffers.clear()


def _make_tensors(
    placement: Placement, n_layer: int
) -> tuple[Weights, dict[tuple[BufferType, str], Tensor], list[Tensor]]:
    """Return the tensors without memory: as `Weights`, by buffer type and name, and by use."""
    made: dict[tuple[BufferType, str], Tensor] = {}
    in_order: list[Tensor] = []
    for w in placement.weights:
        key = (w.buft, w.spec.name)
        if key not in made:
            made[key] = Tensor(w.info.type, w.info.ne, name=w.spec.name)
        in_order.append(made[key])
    return Weights([w.spec for w in placement.weights], in_order, n_layer), made, in_order


def _same_tensors(
    placement: Placement, before: LoadedWeights | None
) -> tuple[Weights, dict[tuple[BufferType, str], Tensor], Sequence[Tensor]] | None:
    """Return the tensors of ``before`` for a new placement, or None if other uses would share a tensor."""
    if before is None or len(before.uses) != len(placement.weights):
        return None
    made: dict[tuple[BufferType, str], Tensor] = {}
    for w, tensor in zip(placement.weights, before.uses, strict=True):
        if made.setdefault((w.buft, w.spec.name), tensor) is not tensor:
            return None
    return (before.weights, made, before.uses) if len(made) == len(before.weights.tensors) else None


def plan_weights(placement: Placement, hparams: HParams, before: LoadedWeights | None = None) -> LoadedWeights:
    """Return weights in buffers without bytes, for plans: nothing is read or allocated.

    Each weight has an address that no process uses, because simulated computes calculate with addresses.

    Parameters
    ----------
    before : LoadedWeights, optional
        The same weights with another placement; their tensors are reused if possible.

    Notes
    -----
    Mirrors `llama_model_base::load_tensors` with ``no_alloc``.
    """
    weights, made, uses = _same_tensors(placement, before) or _make_tensors(placement, hparams.n_layer)
    EDITS.note()
    buffers = {buft: buft.alloc_buffer(0) for buft in placement.by_buft()}
    for buffer in buffers.values():
        buffer.set_usage(BufferUsage.WEIGHTS)
    ends: dict[BufferType, int] = {}
    for (buft, _), tensor in made.items():
        _place_nowhere(tensor, buffers[buft], ends)
    return LoadedWeights(weights, list(buffers.values()), 0, 0, uses)


def _place_nowhere(tensor: Tensor, buffer: Buffer, ends: dict[BufferType, int]) -> None:
    """Give a tensor the next address of a buffer without bytes."""
    buft = buffer.buft
    tensor.buffer = buffer
    tensor.data = ends.get(buft, _NOWHERE)
    ends[buft] = tensor.data + -(-buft.alloc_size(tensor) // buft.alignment) * buft.alignment


def load_weights(
    file: GGUFFile, placement: Placement, hparams: HParams, *, progress: Progress | None = None
) -> LoadedWeights:
    """Load the weights of a file to their placement.

    Parameters
    ----------
    progress : callable, optional
        Called with ``(done_bytes, total_bytes)`` of the copied weights; those used in place do not count.

    Raises
    ------
    OutOfMemoryError
        A device has too little free memory; everything is freed again.

    Notes
    -----
    Mirrors `llama_model_base::load_tensors` and `llama_model_loader::load_all_data`.
    """
    weights, made, _ = _make_tensors(placement, hparams.n_layer)
    loaded = LoadedWeights(weights, [], 0, 0)
    to_copy: list[tuple[WeightPlace, Tensor]] = []
    try:
        for buft, places in placement.by_buft().items():
            pairs = [(w, made[buft, w.spec.name]) for w in places]
            mapped = _map_weights(file, buft, pairs) if placement.is_mapped(buft) else []
            if mapped:
                loaded.buffers += mapped
                loaded.mapped_bytes += sum(w.info.nbytes for w, _ in pairs)
                continue
            loaded.buffers.append(_alloc_weights(buft, [t for _, t in pairs]))
            to_copy += pairs
        _copy_weights(file, to_copy, progress)
    except BaseException:
        loaded.close()
        raise
    loaded.copied_bytes = sum(w.info.nbytes for w, _ in to_copy)
    return loaded


def _map_weights(file: GGUFFile, buft: BufferType, pairs: Sequence[tuple[WeightPlace, Tensor]]) -> list[Buffer]:
    """Return buffers over the mapped file, one per part, from first to last weight; [] if that is not possible."""
    by_part: dict[int, list[tuple[WeightPlace, Tensor]]] = {}
    for pair in pairs:
        by_part.setdefault(pair[0].info.part, []).append(pair)
    buffers: list[Buffer] = []
    for _, in_part in sorted(by_part.items()):
        buffer = _map_part(file, buft, in_part)
        if buffer is None:
            return []
        buffers.append(buffer)
    return buffers


def _map_part(file: GGUFFile, buft: BufferType, pairs: Sequence[tuple[WeightPlace, Tensor]]) -> Buffer | None:
    assert buft.device is not None
    first = min(w.info.offset for w, _ in pairs)
    last = max(w.info.offset + w.info.nbytes for w, _ in pairs)
    name = pairs[0][0].spec.name
    base = file.address(name) - file.tensors[name].offset
    buffer = buft.device.buffer_from_host(base + first, last - first, file.data(name))
    if buffer is None:
        return None
    buffer.set_usage(BufferUsage.WEIGHTS)
    for w, tensor in pairs:
        tensor_alloc(buffer, tensor, base + w.info.offset)
    return buffer


def _alloc_weights(buft: BufferType, tensors: Sequence[Tensor]) -> Buffer:
    try:
        buffer = alloc_tensors(tensors, buft, usage=BufferUsage.WEIGHTS)
    except OutOfMemoryError as error:
        raise OutOfMemoryError(
            error.buft,
            error.requested_bytes,
            error.available_bytes,
            f"{len(tensors)} weights",
            hint="put fewer layers there (-ngl), or experts on the CPU (--cpu-moe)",
        ) from error
    assert buffer is not None
    return buffer


def _copy_weights(file: GGUFFile, pairs: Sequence[tuple[WeightPlace, Tensor]], progress: Progress | None) -> None:
    total = sum(w.info.nbytes for w, _ in pairs)
    done = 0
    for w, tensor in pairs:
        address, size = file.address(w.spec.name), w.info.nbytes
        for offset in range(0, size, _STEP_BYTES):
            n = min(_STEP_BYTES, size - offset)
            tensor_set(tensor, address + offset, offset, n)
            done += n
            if progress is not None:
                progress(done, total)


# -- the KV cache ------------------------------------------------------------


def _cache_groups(cache: KVCache, placement: Placement, params: ContextParams) -> dict[BufferType, list[Tensor]]:
    groups: dict[BufferType, list[Tensor]] = {}
    for layer, tensor in cache.tensors():
        groups.setdefault(placement.cache_buft(layer, params), []).append(tensor)
    return groups


def allocate_cache(cache: KVCache, placement: Placement, params: ContextParams) -> list[Buffer]:
    """Allocate the KV cache, zeroed: masked values must not be NaN.

    Raises
    ------
    OutOfMemoryError
        A device has too little free memory; everything is freed again.
    """
    buffers: list[Buffer] = []
    try:
        for buft, tensors in _cache_groups(cache, placement, params).items():
            buffer = alloc_tensors(tensors, buft)
            assert buffer is not None
            buffer.clear(0)
            buffers.append(buffer)
    except OutOfMemoryError as error:
        for buffer in buffers:
            buffer.close()
        raise OutOfMemoryError(
            error.buft,
            error.requested_bytes,
            error.available_bytes,
            f"a KV cache of {cache.n_cells} cells",
            hint="make the context smaller (-c), or keep the cache on the host (--no-kv-offload)",
        ) from error
    return buffers


def plan_cache(cache: KVCache, placement: Placement, params: ContextParams) -> dict[BufferType, int]:
    """Put the KV cache into buffers without bytes, and return the bytes that it would need, by buffer type."""
    sizes: dict[BufferType, int] = {}
    for buft, tensors in _cache_groups(cache, placement, params).items():
        buffer = buft.alloc_buffer(0)
        ends: dict[BufferType, int] = {}
        for tensor in tensors:
            _place_nowhere(tensor, buffer, ends)
        sizes[buft] = sum(-(-buft.alloc_size(t) // buft.alignment) * buft.alignment for t in tensors)
    return sizes
