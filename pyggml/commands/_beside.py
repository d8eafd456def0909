"""What llama.cpp loads beside the planned model: a draft model and a projector, of which only the memory counts."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from ..errors import FormatError, PyggmlError
from ._console import n_bytes, warn
from ._model_options import CACHE_TYPES, LayerCount, device_names
from ._options import file_option, flag, option
from ._values import ModelPath

if TYPE_CHECKING:
    from ..backend import Backend
    from ..memory_rows import Memory
    from ..planning import Planner
    from ._model_options import ModelFlags

_TYPE = click.Choice(CACHE_TYPES, case_sensitive=False)

__all__ = ["Beside", "Loaded", "beside_options"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """One model that is loaded beside the planned one, and its memory."""

    what: str
    path: str
    rows: tuple[Memory, ...]
    note: str = ""

    def line(self) -> str:
        """Return the sentence for people."""
        sizes = ", ".join(f"{n_bytes(m.total)} of {m.buft}" for m in self.rows if m.total)
        return f"Of this, the {self.what} {Path(self.path).name} takes {sizes}{self.note}."

    def as_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {"what": self.what, "path": self.path, "memory": [asdict(m) | {"total": m.total} for m in self.rows]}


@dataclass(frozen=True, slots=True)
class Beside:
    """The values of `beside_options`."""

    draft: Path | None
    draft_layers: int
    draft_devices: str
    draft_overrides: tuple[str, ...]
    draft_type_k: str
    draft_type_v: str
    projector: Path | None
    is_projector_on_host: bool

    def count(self, planner: Planner, flags: ModelFlags) -> tuple[list[Memory], list[Loaded]]:
        """Return the memory of a plan and of what is loaded beside it, one row for each buffer type, and what that is.

        Notes
        -----
        Mirrors `common_base_params_to_speculative` and `common_speculative_init_result`: the context of a draft model has the
        size, batches and sequences of the model's, and its own cache types. Differs: the compute buffer of a projector, which
        depends on the image, is not counted, and ``-ngl auto`` leaves no memory for what is beside the model.
        """
        loaded = [*self._loaded(planner, flags)]
        rows = {m.buft: m for m in planner.memory()}
        for m in (m for one in loaded for m in one.rows):
            old = rows.get(m.buft)
            rows[m.buft] = m if old is None else replace(
                old, weights=old.weights + m.weights, cache=old.cache + m.cache, compute=old.compute + m.compute
            )  # fmt: skip
        return [*rows.values()], loaded

    def _loaded(self, planner: Planner, flags: ModelFlags) -> Iterator[Loaded]:
        if self.draft is not None:
            yield self._draft(self.draft, planner, flags)
        if self.projector is not None:
            backend = planner.backends[-1 if self.is_projector_on_host else 0]
            note = "; its compute buffer, which depends on the image, is not counted"
            yield Loaded("projector", str(self.projector), (_weights(self.projector, backend),), note)

    def _draft(self, path: Path, planner: Planner, flags: ModelFlags) -> Loaded:
        from ..catalog import header_path
        from ..planning import Planner
        from ..types import Type

        devices, cpu = _chosen(self.draft_devices, planner.backends[:-1], flags), planner.backends[-1]
        target = planner.params
        context = replace(
            flags.context(), n_ctx=target.n_ctx, n_batch=target.n_batch, n_ubatch=target.n_ubatch,
            n_outputs_max=target.n_seq_max, type_k=Type.of(self.draft_type_k), type_v=Type.of(self.draft_type_v),
        )  # fmt: skip
        placement = replace(
            flags.placement(), n_gpu_layers=max(self.draft_layers, -1), fit=False, overrides=self.draft_overrides
        )
        try:
            with Planner.open(
                path, devices=devices, cpu=cpu, placement=placement, context=context, data=False
            ) as draft:
                return Loaded("draft model", str(path), tuple(draft.memory()))
        except FormatError:
            raise
        except PyggmlError as error:
            warn(f"only the weights of the draft model {path} are counted: {error}")
            file = path if os.path.lexists(path) else header_path(str(path))
            return Loaded(
                "draft model", str(path), (_weights(file, [*devices, cpu][0]),), "; its context is not counted"
            )


def _weights(path: Path, backend: Backend) -> Memory:
    """Return the bytes of a file's tensors, on one device."""
    from ..gguf import GGUFFile
    from ..memory_rows import Memory

    with GGUFFile.open(path) as file:
        return Memory(backend.device.buffer_type.name, sum(t.nbytes for t in file.tensors.values()), 0, 0)


def _chosen(names: str, backends: Sequence[Backend], flags: ModelFlags) -> list[Backend]:
    """Return the devices that ``-devd`` names, by their names in ``--device`` or in the plan; by default all."""
    if not names:
        return list(backends)
    known = {name: b for i, b in enumerate(backends) for name in (device_names(flags)[i], b.name, f"CUDA{i}")}
    wanted = [name for name in names.split(",") if name not in ("none", "cpu", "CPU")]
    if unknown := [name for name in wanted if name not in known]:
        raise click.UsageError(
            f"-devd {','.join(unknown)}: not in the plan, which has {', '.join(b.name for b in backends)}"
        )
    return [known[name] for name in wanted]


def beside_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options; the function gets their values as ``beside: Beside``."""

    @functools.wraps(function)
    def call(**given: Any) -> Any:
        values = {name: given.pop(name) for name in Beside.__slots__}
        return function(beside=Beside(**values), **given)

    options = cloup.option_group(
        "Beside the model (its memory is counted)",
        option("-md", "--model-draft", "--spec-draft-model", "draft", type=ModelPath(), metavar="MODEL",
               help="A draft model, with a context like the model's."),
        option("-ngld", "--gpu-layers-draft", "--n-gpu-layers-draft", "--spec-draft-ngl", "draft_layers", type=LayerCount(), default=-1,
               help="Layers of the draft model on devices. [all]"),
        option("-devd", "--device-draft", "--spec-draft-device", "draft_devices", default="", metavar="LIST",
               help="Devices of the draft model. [those of the model]"),
        option("-otd", "--override-tensor-draft", "--spec-draft-override-tensor", "draft_overrides", multiple=True, metavar="REGEX=BUFT",
               help="Where weights of the draft model go; -cmoed and -ncmoed N are understood, too."),
        option("-ctkd", "--cache-type-k-draft", "--spec-draft-type-k", "draft_type_k", type=_TYPE, shown="f16", metavar="TYPE",
               help="Type of the draft model's K cache."),
        option("-ctvd", "--cache-type-v-draft", "--spec-draft-type-v", "draft_type_v", type=_TYPE, shown="f16", metavar="TYPE",
               help="Type of the draft model's V cache."),
        file_option("-mm", "--mmproj", "projector", help="A projector of images or audio: its weights are on the first device."),
        flag("--no-mmproj-offload", "is_projector_on_host", help="The projector is in host memory."),
    )  # fmt: skip
    made: Callable[..., Any] = options(call)
    return made
