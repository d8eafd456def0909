"""Whole small models over a device and the CPU, held to the CPU alone; used-expert copies; repeated runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from ..backend import REGISTRY, Backend, Device
from ..errors import OutOfMemoryError, PyggmlError
from ..makers.make_moe import Recipe, Sizes, make_moe
from ..models.placement import PlacementFlags
from ..record import Recorder
from ..report import CopyAccount
from ..sched.policies import CopyPolicy, FullCopier
from ..session import ContextFlags, Session
from ..testing import ref
from ..types import Type
from .report import Outcome, Result

__all__ = ["RECIPES", "check_copies", "check_models", "check_races"]

_SIZES = Sizes(layers=2, embd=256, heads=4, kv_heads=2, ff_exp=256, experts=16, used=4, ctx=128)
#: Small models: experts of three kinds of weights, two routers, and sliding windows.
RECIPES = {
    "qwen3moe F32": Recipe("qwen3moe", Type.F32, sizes=_SIZES),
    "qwen3moe Q8_0": Recipe("qwen3moe", Type.Q8_0, sizes=_SIZES),
    "llama Q4_0": Recipe("llama", Type.Q4_0, sizes=_SIZES),
    "gpt-oss MXFP4": Recipe("gpt-oss", Type.MXFP4, sizes=_SIZES),
}
#: For copies: enough experts that the prompt does not use all of them in any layer.
FINE_GRAINED = Recipe("qwen3moe", Type.Q8_0, sizes=replace(_SIZES, experts=64, used=2, ff_exp=64))
#: From 32 tokens on a device takes ops whose experts are in host memory.
PROMPT = list(range(3, 43))
#: Allowed NMSE of logits: both sides sum floats in another order; activations are quantised for quantised weights.
BOUND, BOUND_QUANTISED = 1e-6, 5e-3
N_RUNS = 12

_T = TypeVar("_T")


def _decode(
    path: Path,
    device: Backend | None,
    *,
    placement: PlacementFlags | None = None,
    recorder: Recorder | None = None,
    policy: CopyPolicy | Literal["used"] = "used",
) -> npt.NDArray[np.float32]:
    """Return the logits of a prompt and of one more token."""
    cpu = REGISTRY.open("cpu").backend()
    try:
        with Session.open(
            path,
            devices=[] if device is None else [device],
            cpu=cpu,
            context=ContextFlags(n_ctx=128),
            placement=placement,
            recorder=recorder,
            policy=policy,
        ) as session:
            return np.concatenate([session.decode(PROMPT, outputs="all"), session.decode([5])])
    finally:
        cpu.close()


def _tried(stage: str, label: str, device: Device, work: Callable[[Backend], _T]) -> _T | Outcome:
    """Return what work over a new stream of a device gives; an outcome if the device is too small, or fails."""
    backend = device.backend()
    try:
        return work(backend)
    except OutOfMemoryError as error:
        return Outcome(stage, label, Result.SKIPPED, f"the device is too small: {error}")
    except PyggmlError as error:
        return Outcome(stage, label, Result.FAILED, str(error))
    finally:
        backend.close()


def check_models(device: Device, folder: Path) -> Iterator[Outcome]:
    """Compare logits over the device with the CPU's, with experts on the device and in host memory."""
    for name, recipe in RECIPES.items():
        path = folder / f"{name.replace(' ', '-')}.gguf"
        make_moe(path, recipe)
        expected = _decode(path, None)
        bound = BOUND if recipe.type is Type.F32 else BOUND_QUANTISED
        for where, flags in (
            ("all weights on the device", PlacementFlags()),
            ("experts in host memory", PlacementFlags(cpu_moe=True)),
        ):
            label = f"{name}, {where}"
            found = _tried("models", label, device, partial(_decode, path, placement=flags))
            if isinstance(found, Outcome):
                yield found
                continue
            nmse = float(ref.nmse(expected, found))
            result = Result.PASSED if nmse <= bound else Result.WRONG
            yield Outcome("models", label, result, f"logits of {len(found)} tokens: NMSE {nmse:.1e}", nmse, bound)


def check_copies(device: Device, folder: Path) -> Iterator[Outcome]:
    """Copy only the used experts, then whole weights: the logits must be equal bit for bit."""
    name = "qwen3moe Q8_0, 2 of 64 experts"
    path = folder / "copies.gguf"
    make_moe(path, FINE_GRAINED)
    flags, account = PlacementFlags(cpu_moe=True), CopyAccount()

    def both(backend: Backend) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        used = _decode(path, backend, placement=flags, recorder=account)
        return used, _decode(path, backend, placement=flags, policy=FullCopier())

    found = _tried("copies", name, device, both)
    if isinstance(found, Outcome):
        yield found
        return
    total = account.total()
    if not total.bytes_full:
        yield Outcome("copies", name, Result.SKIPPED, "the device takes no op whose weights are in host memory")
        return
    used, whole = found
    same = np.array_equal(used.view(np.uint32), whole.view(np.uint32))
    share = total.bytes_copied / total.bytes_full
    detail = f"used experts: {share:.0%} of the bytes of whole copies, logits {'equal' if same else 'differ'}"
    yield Outcome("copies", name, Result.PASSED if same else Result.WRONG, detail)


def check_races(devices: list[Device], folder: Path) -> Iterator[Outcome]:
    """Run the same batch again and again: a missing wait shows as a result that differs from run to run.

    Parameters
    ----------
    devices : list of Device
        One for each run. Simulated and emulated devices come with a seed each, so that their work is done in another
        order each time; a real device is given once for all runs.
    """
    name = "qwen3moe Q8_0, 2 of 64 experts"
    path = folder / "races.gguf"
    make_moe(path, FINE_GRAINED)
    first: npt.NDArray[np.float32] | None = None
    n_different = 0
    for device in devices:
        found = _tried("races", name, device, partial(_decode, path, placement=PlacementFlags(cpu_moe=True)))
        if isinstance(found, Outcome):
            yield found
            return
        first = found if first is None else first
        n_different += not np.array_equal(first.view(np.uint32), found.view(np.uint32))
    detail = f"{len(devices)} runs" + (f", {n_different} differ from the first" if n_different else ", all equal")
    yield Outcome("races", name, Result.WRONG if n_different else Result.PASSED, detail)
