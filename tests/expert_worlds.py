"""Layers of gated experts in host memory over simulated devices, for tests of expert caches and copies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

import pyggml as ggml
from pyggml.backend import REGISTRY
from pyggml.models.context import ContextFlags
from pyggml.models.placement import PlacementFlags
from pyggml.moe_cache import MoeCache, MoeCachePolicy
from pyggml.planning import Planner, virtual_clock
from pyggml.routing import LogNormal
from pyggml.simulation import SimulatedBatch, simulate_batch

N, N_EXPERT, N_USED, N_LAYER = 32, 8, 2, 4
SLOT_BYTES = 3 * 4 * N * N
KINDS = ("gate", "up", "down")


class Layers:
    """Layers of gated experts in host memory over devices; with a rule, out of a cache."""

    def __init__(
        self,
        rule: Any = None,
        *,
        n_devices: int = 1,
        n_token: int = 1,
        seed: int | None = None,
        host_ids: bool = False,
        **options: Any,
    ) -> None:
        rng = np.random.default_rng(5)
        self.gpus = [ggml.Sim("rtx4090-pcie4", index=i, threads=1, seed=seed) for i in range(n_devices)]
        self.cpu = ggml.CPU(threads=1)
        self.n_token = n_token
        self.weights = ggml.Context()
        self.layers = {
            il: [self.weights.new_tensor("f32", (N, N, N_EXPERT), name=f"blk.{il}.ffn_{k}_exps.weight") for k in KINDS]
            for il in range(N_LAYER)
        }
        self.weights.alloc(self.cpu, usage="weights")
        for weight in self.weights.tensors:
            weight.set_array(rng.standard_normal(weight.shape).astype("f4") * 0.3)
        self.homes = {il: self.gpus[il * n_devices // N_LAYER] for il in range(N_LAYER)}
        self.cache, policy = None, options.pop("policy", "used")
        if rule is not None:
            backends = [*self.gpus, self.cpu]
            self.cache = MoeCache(self.layers, self.homes, backends, rule, n_used=N_USED)
            policy = MoeCachePolicy(self.cache, None if policy == "used" else policy)
        self.sched = ggml.Scheduler(
            [*self.gpus, self.cpu], policy=policy, debug=0, offload_rule=lambda _, op: op.op is ggml.Op.MUL_MAT_ID,
            **options,
        )  # fmt: skip
        self.lookups: dict[ggml.Tensor, Any] = {}
        self.graph = ggml.Graph()
        with self.graph:
            x = self.graph.input("f32", (N, n_token), name="x")
            self.inputs = [self.graph.input("i32", (N_USED, n_token), name=f"ids-{il}") for il in range(N_LAYER)]
            x = ggml.scale(x, 1.0)
            self.ids = [ggml.cont(ids) for ids in self.inputs]
            for il, ids in enumerate(self.ids):  # chosen before the layers, by their devices or by the host
                self.graph.expand(ids)
                self.lookups[ids] = self.cpu if host_ids else self.homes[il]
            for il in range(N_LAYER):
                x = self._layer(il, x)
            self.y = x.named("y").set_output()
        self.graph.expand(self.y)

    def _layer(self, il: int, x: ggml.Tensor) -> ggml.Tensor:
        gate, up, down = self.layers[il]
        ids = self.ids[il]
        row = ggml.reshape_3d(x, N, 1, self.n_token)
        if self.cache is not None and self.cache.host is not None:
            out = self._on_both_sides(il, row)
            first, second = (ggml.view_2d(out, N, self.n_token, out.nb[2], i * out.nb[1]) for i in range(2))
            return ggml.add(x, ggml.add(first, second))
        found = None if self.cache is None else self.cache.slots(il, ids, (gate, up, down))
        if found is not None:
            assert self.cache is not None
            ids, lookup = found
            self.lookups[lookup] = self.homes[il]
            gate, up, down = (self.cache.bank(w) for w in (gate, up, down))
        both = ggml.mul(ggml.mul_mat_id(gate, row, ids), ggml.mul_mat_id(up, row, ids))
        out = ggml.mul_mat_id(down, both, ids)
        first, second = (ggml.view_2d(out, N, self.n_token, out.nb[2], i * out.nb[1]) for i in range(2))
        return ggml.add(x, ggml.add(first, second))

    def _on_both_sides(self, il: int, row: ggml.Tensor) -> ggml.Tensor:
        """Return the outputs of a layer whose missing experts are the CPU's, as `models.experts` does."""
        assert self.cache is not None
        sides = self.cache.sides(il, self.ids[il], self.layers[il])
        assert sides is not None
        self.lookups |= dict.fromkeys(sides.on_device, self.homes[il]) | dict.fromkeys(sides.on_host, self.cpu)
        gate, up, down = map(self.cache.bank, self.layers[il])
        both = ggml.mul(ggml.mul_mat_id(gate, row, sides.slots), ggml.mul_mat_id(up, row, sides.slots))
        there = ggml.mul_mat_id(down, both, sides.slots)
        self.graph.expand(there)
        gate, up, down = (partial(ggml.mul_mat_id, w, ids=sides.missing, skip_negative=True) for w in self.layers[il])
        parts = [gate(row), up(row)]
        parts.append(ggml.mul(*parts))
        parts.append(down(parts[-1]))
        self.lookups |= dict.fromkeys(parts, self.cpu)
        n = N_USED * self.n_token
        rows = ggml.concat(ggml.reshape_3d(there, N, 1, n), ggml.reshape_3d(parts[-1], N, 1, n), 1)
        self.lookups[rows] = self.homes[il]
        return ggml.reshape_3d(ggml.get_rows(rows, sides.side), N, N_USED, self.n_token)

    def compute(self, chosen: Sequence[np.ndarray], x: np.ndarray, *, wait: bool = True) -> None:
        """Compute one batch; each layer has its ids."""
        self.sched.reset()
        for lookup, backend in self.lookups.items():
            self.sched.set_tensor_backend(lookup, backend)
        self.sched.alloc_graph(self.graph)
        self.graph["x"].set_array(x)
        for tensor, ids in zip(self.inputs, chosen, strict=True):
            tensor.set_array(ids)
        (self.sched.compute if wait else self.sched.compute_async)(self.graph)

    def run(self, n: int = 8) -> list[np.ndarray]:
        """Return the results of some batches, the same of each world."""
        found = []
        for chosen, x in batches(n, self.n_token):
            self.compute(chosen, x)
            found.append(self.y.numpy())
        return found

    def close(self) -> None:
        """Give all memory back."""
        self.sched.close()
        if self.cache is not None:
            self.cache.close()

    @property
    def hazards(self) -> list[Any]:
        """What devices that work late found."""
        return [h for gpu in self.gpus for h in gpu.device.hazards]


def batches(n: int, n_token: int) -> list[tuple[list[np.ndarray], np.ndarray]]:
    """Return ids by layer, each token's distinct and skewed, and rows."""
    rng = np.random.default_rng(7)
    liking = 1.0 / np.arange(1, N_EXPERT + 1)
    made = []
    for _ in range(n):
        ids = [
            np.stack([rng.choice(N_EXPERT, N_USED, replace=False, p=liking / liking.sum()) for _ in range(n_token)])
            for _ in range(N_LAYER)
        ]
        made.append(([i.astype("i4") for i in ids], rng.standard_normal((n_token, N)).astype("f4")))
    return made


def simulated_prompt(policy: Any, *, n_ubatch: int, use_mmap: bool) -> SimulatedBatch:
    """Return a prompt of 2,048 tokens of qwen3-30b-a3b with its experts in host memory, in virtual time."""
    backends = [d.backend() for d in REGISTRY.open_all(["sim:rtx4090-pcie4", "cpu"], data=False)]
    with Planner.open(
        "qwen3-30b-a3b", devices=backends[:1], cpu=backends[1], placement=PlacementFlags(cpu_moe=True, use_mmap=use_mmap),
        data=False, context=ContextFlags(n_ctx=2048, n_ubatch=n_ubatch), policy=policy, clock=virtual_clock(backends),
    ) as planner:  # fmt: skip
        return simulate_batch(planner, 2048, routing=LogNormal(2.4))
