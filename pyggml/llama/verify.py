"""Compares pyggml's plan of a model with llama.cpp's scheduler: both split the same graph and print it.

llama.cpp's scheduler runs in a child, in a context with the same flags, and prints its splits, their inputs with sizes,
and every node with its backend. pyggml's scheduler gets llama.cpp's graph and placement, to compare only the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..backend import Backend, Device
from ..errors import ModelError
from ..gguf import GGUFFile
from ..models.context import ContextFlags
from ..models.placement import PlacementFlags
from ..moe_cache import CacheRule
from ..plan_report import ggml_text
from ..planning import Planner
from ..sched.assign import OffloadOp
from .process import shared_process
from .source import CapturedSource

__all__ = ["DEVICE", "Difference", "Verification", "VerifiedPlan", "verify"]

#: A device that supports every op, and offers to run those with host weights and at least 32 rows.
DEVICE = "mock:CUDA0:offload=32"


@dataclass(frozen=True, slots=True)
class Difference:
    """The first line that differs between two texts; empty if a text has ended."""

    line: int
    llama: str
    pyggml: str


@dataclass(frozen=True, slots=True)
class VerifiedPlan:
    """The comparison of one micro-batch.

    Attributes
    ----------
    batch : int
        Tokens of its batch.
    n_tokens : int
        Tokens of the micro-batch.
    n_splits, n_lines : int
        Splits and lines that llama.cpp's scheduler printed.
    first_difference : Difference or None
        The first difference of the texts.
    """

    batch: int
    n_tokens: int
    n_splits: int
    n_lines: int
    first_difference: Difference | None

    @property
    def equal(self) -> bool:
        """Whether both texts are equal."""
        return self.first_difference is None

    def as_dict(self) -> dict[str, Any]:
        """Return the plan for JSON."""
        d = self.first_difference
        return {
            "batch": self.batch,
            "n_tokens": self.n_tokens,
            "splits": self.n_splits,
            "lines": self.n_lines,
            "equal": self.equal,
            "first_difference": None if d is None else {"line": d.line, "llama": d.llama, "pyggml": d.pyggml},
        }


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of a comparison.

    Attributes
    ----------
    build : dict
        llama.cpp's build: ``llama``, ``ggml`` and ``path``.
    plans : list of VerifiedPlan
        Micro-batches, in the order of batches.
    """

    model: str
    arch: str
    build: dict[str, str]
    plans: list[VerifiedPlan]

    @property
    def equal(self) -> bool:
        """Whether all texts are equal."""
        return all(plan.equal for plan in self.plans)

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return {
            "equal": self.equal,
            "model": self.model,
            "arch": self.arch,
            "build": self.build,
            "plans": [plan.as_dict() for plan in self.plans],
        }


def verify(
    model: str | Path | GGUFFile,
    sizes: Sequence[int] = (512, 1),
    *,
    devices: Sequence[str | Device | Backend] = (DEVICE,),
    placement: PlacementFlags | None = None,
    context: ContextFlags | None = None,
    outputs: Literal["last", "all"] = "last",
    offload_rule: OffloadOp | None = None,
    expert_cache: CacheRule | None = None,
) -> Verification:
    """Compare pyggml's splits of a model with those of llama.cpp's scheduler.

    Parameters
    ----------
    sizes : sequence of int
        Tokens of batches, each cut into micro-batches; the cache is assumed to be full.
    devices : sequence
        As for `Planner.open`. llama.cpp's devices support every op in their own memory, whatever these support.
    outputs : str
        Which tokens' logits are wanted: ``"last"`` or ``"all"``.
    offload_rule : callable, optional
        Rule of pyggml's scheduler only; a rule other than the devices' gives a difference.
    expert_cache : CacheRule, optional
        llama.cpp's expert cache (`pyggml.moe_cache.LlamaCache`), on both sides.

    Raises
    ------
    ModelError, DeviceUnavailableError, GraphError, FormatError
        As `Planner.open` with ``graph="llama"``.
    """
    with Planner.open(
        model, devices=devices, placement=placement, context=context, graph="llama", data=False,
        offload_rule=offload_rule, expert_cache=expert_cache,
    ) as planner:  # fmt: skip
        source = planner.source
        assert isinstance(source, CapturedSource)
        plans = []
        with shared_process(source.captures.process.library, prints=True) as real:
            for batch, n in _micro_batches(sizes, planner.params.n_ubatch):
                n_outputs = n if outputs == "all" or not source.reserves else 1
                size = [n, planner.params.n_seq_max, n_outputs]
                printed = real.ask(source.captures.request("printed", size=size))["lines"]
                planned = planner.plan_reserved(*size)
                own = [line for line in ggml_text(planner, planned).split("\n") if line]
                if not printed:
                    raise ModelError(planner.file.path, "llama.cpp's scheduler printed nothing")
                n_splits = sum(line.startswith("## SPLIT") for line in printed)
                plans.append(VerifiedPlan(batch, n, n_splits, len(printed), _difference(printed, own)))
        return Verification(planner.file.path, planner.hparams.arch, source.build, plans)


def _micro_batches(sizes: Sequence[int], n_ubatch: int) -> list[tuple[int, int]]:
    """Return each batch with each distinct size of its micro-batches."""
    out: list[tuple[int, int]] = []
    for batch in sizes:
        for n in (min(batch, n_ubatch), batch % n_ubatch):
            if n and (batch, n) not in out:
                out.append((batch, n))
    return out


def _difference(real: Sequence[str], own: Sequence[str]) -> Difference | None:
    for i in range(max(len(real), len(own))):
        theirs, ours = "", ""
        with suppress(IndexError):
            theirs = real[i]
        with suppress(IndexError):
            ours = own[i]
        if theirs != ours:
            return Difference(i, theirs, ours)
    return None
