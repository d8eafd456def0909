"""`pyggml models`: list the models that can be planned by name, without a file."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

import click

from ._console import ROOMY_WIDTH, print_json, report, table
from ._options import json_option

__all__ = ["ModelRow", "command", "model_rows"]


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A row of the table."""

    name: str
    arch: str
    n_layer: int
    n_params: int
    n_params_active: int  #: of which a token uses, embeddings left out
    n_expert: int
    n_expert_used: int
    n_ctx: int
    quant: str
    file_bytes: int


def model_rows(pattern: str = "") -> list[ModelRow]:
    """Return the models whose name or architecture contains the text."""
    from ..catalog import MODELS, shapes, type_tensors

    rows = []
    for s in MODELS.values():
        if pattern.lower() not in s.name and pattern.lower() not in s.arch:
            continue
        tensors = shapes(s, nextn=False)
        active = sum(
            t.numel * (s.n_used / s.n_expert if "_exps." in t.name else 1.0)
            for t in tensors
            if not t.name.endswith("token_embd.weight") or (s.tied and t.name.startswith("token"))
        )
        file_bytes = sum(t.nbytes for t in type_tensors(s, shapes(s), s.quant))
        rows.append(
            ModelRow(
                s.name,
                s.arch,
                s.n_layer,
                sum(t.numel for t in tensors),
                int(active),
                s.n_expert,
                s.n_used,
                s.n_ctx,
                s.quant,
                file_bytes,
            )
        )
    return rows


@click.command("models")
@click.argument("pattern", default="")
@json_option("Print the rows as JSON.")
def command(pattern: str, as_json: bool) -> None:
    """List the models that commands accept as NAME[:QUANT] instead of a file, with their default quantisation.

    PATTERN shows only models whose name or architecture contains it.
    """
    from dataclasses import asdict

    rows = model_rows(pattern)
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    if not rows:
        from ..catalog import MODELS

        near = get_close_matches(pattern.lower(), MODELS, 3, 0.4)
        meant = f" (did you mean {', '.join(near)}?)" if near else ""
        raise click.ClickException(f"no model's name or architecture contains '{pattern}'{meant}")
    out = report()
    wide, is_narrow = ("architecture", "layers"), out.width < ROOMY_WIDTH
    columns = ("name", *(() if is_narrow else wide), "params", "of a token", "experts", "context", "default", "GiB")
    made = table("", *columns, right=("layers", "params", "of a token", "context", "GiB"))
    for r in rows:
        experts = f"{r.n_expert_used} of {r.n_expert}" if r.n_expert else ""
        made.add_row(
            r.name, *(() if is_narrow else (r.arch, str(r.n_layer))), f"{r.n_params / 1e9:.1f} B",
            f"{r.n_params_active / 1e9:.1f} B", experts, str(r.n_ctx), r.quant, f"{r.file_bytes / 1024**3:.1f}",
        )  # fmt: skip
    out.print(made)
    out.print("For another quantisation use NAME:QUANT, such as qwen3-30b-a3b:Q6_K or qwen3-30b-a3b:UD-Q4_K_XL.")
