"""Is pyggml's plan of a model what llama.cpp's scheduler does? Both split the same graph; their texts are compared.

The real scheduler splits in a child of its own, in a context that was made with the flags in question, and prints its
splits, the inputs and sizes of each, and every node with its backend. pyggml's scheduler gets the graph that llama.cpp
built, and the placement that llama.cpp decided, so that only the scheduler is compared.
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
from ..plan_report import ggml_text
from ..planning import Planner
from ..sched.assign import OffloadOp
from .process import shared_process
from .source import CapturedSource

__all__ = ["DEVICE", "Difference", "Verification", "VerifiedPlan", "verify"]

#: One device that takes every op, and offers to run those of 32 rows or more whose weights are in host memory.
DEVICE = "mock:CUDA0:offload=32"


@dataclass(frozen=True, slots=True)
class Difference:
    """The first line in which two texts differ; empty where one has ended."""

    line: int
    llama: str
    pyggml: str


@dataclass(frozen=True, slots=True)
class VerifiedPlan:
    """One micro-batch, planned by both.

    Attributes
    ----------
    batch : int
        Of how many tokens the batch is that it belongs to.
    n_tokens : int
        Of the micro-batch.
    n_splits, n_lines : int
        What the real scheduler printed.
    first_difference : Difference or None
        Where the texts differ first.
    """

    batch: int
    n_tokens: int
    n_splits: int
    n_lines: int
    first_difference: Difference | None

    @property
    def equal(self) -> bool:
        """Whether both texts are the same."""
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
    """What a comparison came to.

    Attributes
    ----------
    build : dict
        Of llama.cpp: ``llama``, ``ggml`` and ``path``.
    plans : list of VerifiedPlan
        In the order of batches.
    """

    model: str
    arch: str
    build: dict[str, str]
    plans: list[VerifiedPlan]

    @property
    def equal(self) -> bool:
        """Whether all texts are the same."""
        return all(plan.equal for plan in self.plans)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
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
) -> Verification:
    """Compare pyggml's splits of a model with those of the real scheduler.

    Parameters
    ----------
    sizes : sequence of int
        Tokens of batches, each cut into micro-batches; the cache is taken to be full.
    devices : sequence
        As of `Planner.open`. The real devices run every op in their own memory, whatever these support.
    outputs : str
        Whose logits are wanted: ``"last"`` or ``"all"``.
    offload_rule : callable, optional
        Of pyggml's scheduler only: another rule than the devices' gives a difference.

    Raises
    ------
    ModelError, DeviceUnavailableError, GraphError, FormatError
        As `Planner.open` with ``graph="llama"``.
    """
    with Planner.open(
        model, devices=devices, placement=placement, context=context, graph="llama", data=False,
        offload_rule=offload_rule,
    ) as planner:  # fmt: skip
        source = planner.source
        assert isinstance(source, CapturedSource)
        plans = []
        with shared_process(source.captures.process.library, prints=True) as real:
            for batch, n in _micro_batches(sizes, planner.params.n_ubatch):
                n_outputs = n if outputs == "all" else 1
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
    """Return each batch with the sizes of its micro-batches, every size once."""
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
