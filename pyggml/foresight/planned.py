"""What a plan would come to on real hardware: the foresight of a `Planner`, with its placement weight by weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..cost import DeviceProfile
from ..hardware.cards import Card, find_card
from ..hardware.hosts import DEFAULT_HOST, Host
from .api import Speed, speed_of
from .engine import Link
from .estimate import Machine, Placed, Setting
from .shape import ModelShape

if TYPE_CHECKING:
    from ..planning import Planner

__all__ = ["card_of", "foresee", "machine_around"]


def card_of(profile: DeviceProfile) -> Card:
    """Return the data sheet of a profile; a custom device without a generation is taken to run the kernels of ada."""
    card = find_card(profile.name.split("-pcie")[0]) if ":" not in profile.name else None
    if card is not None:
        return card
    return Card(
        profile.name, profile.generation or "ada", profile.memory_bytes, profile.memory_bytes_per_s, profile.f32_per_s,
        profile.flops_per_s, profile.int8_per_s, 4, 16,
    )  # fmt: skip


def machine_around(profiles: Sequence[DeviceProfile], host: Host) -> Machine:
    """Return the machine of simulated devices and a host."""
    links = [Link(p.link.bytes_per_s, p.link.latency_s) for p in profiles]
    return Machine([card_of(p) for p in profiles], links, host)


def foresee(planner: Planner, sizes: list[int], host: Host = DEFAULT_HOST) -> dict[int, Speed] | None:
    """Return tokens a second of decodes of some sizes, each from an empty cache; None unless all devices are simulated.

    Parameters
    ----------
    sizes : list of int
        Tokens; 1 is generation.
    host : Host
        The machine around the devices.
    """
    profiles = [b.device.profile for b in planner.backends[:-1]]
    known = [p for p in profiles if p is not None]
    if not known or len(known) < len(profiles):
        return None
    machine = machine_around(known, host)
    params = planner.params
    setting = Setting(
        n_gpu_layers=planner.placement.n_gpu_layers, n_ubatch=params.n_ubatch, n_batch=params.n_batch,
        flash_attn=params.flash_attn, type_k=params.type_k, type_v=params.type_v,
        is_pinned=not planner.placement.use_mmap, kv_offload=params.offload_kqv, op_offload=params.op_offload,
    )  # fmt: skip
    shape = ModelShape.from_header(planner.file.metadata, planner.file.tensors, planner.file.path)
    placed = _placed(planner, shape)
    return {n: speed_of(shape, machine, setting, n, 0, is_prompt=n > 1, placed=placed) for n in sizes}


def _placed(planner: Planner, shape: ModelShape) -> list[Placed]:
    """Return the layers of a plan where its placement has them, equal ones together."""
    devices = {b.device: i for i, b in enumerate(planner.backends[:-1])}
    on_host = {
        w.spec.layer for w in planner.placement.weights if "_exps" in w.info.name and w.buft.is_host
    }  # fmt: skip
    groups: dict[tuple[int, int, bool], Placed] = {}
    for i, layer in enumerate(shape.layers):
        device = devices.get(planner.placement.layers[i], -1)
        experts = layer.has_experts and (device < 0 or i in on_host)
        key = (id(layer), device, experts)
        if key in groups:
            groups[key].count += 1
        else:
            groups[key] = Placed(layer, device, experts)
    return list(groups.values())
