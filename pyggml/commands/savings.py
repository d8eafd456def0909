"""`pyggml savings`: show how much copying only the used experts saves, by batch size."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from ..errors import GraphError
from ._cache_options import stated_routing
from ._console import Bar, n_bytes, print_json, progress, report, table
from ._kernels import warm_up
from ._model_options import ModelCommand, ModelFlags, model_options, open_backends, parse_sizes
from ._options import choice, json_option, option
from ._values import ModelPath

if TYPE_CHECKING:
    from rich.table import Table

    from ..backend import Backend
    from ..cost import LinkProfile
    from ..planning import GraphChoice
    from ..report import CopyAccount
    from ..tensor import Tensor

__all__ = ["Saving", "command", "measure", "savings_table"]

#: More than 64 tokens of plain text in any vocabulary.
TEXT = (
    "The lighthouse keeper counted the waves every evening, wrote the number into a thick blue book, and went to bed "
    "without a thought of what the numbers meant. Years later a student found the books in a box, drew the counts as "
    "a curve, and saw two storms that no newspaper had ever mentioned. She sent the curve to the harbour, where an "
    "old pilot looked at it for a long time before he said that he remembered both of them very well."
)


@dataclass(frozen=True, slots=True)
class Saving:
    """Expert weights that were copied for one batch."""

    n_tokens: int
    used_mean: float  #: distinct experts of a layer, on average
    n_expert: int
    bytes_copied: int
    bytes_full: int  #: of whole copies
    link_s: float | None  #: that the copies take on the device's link
    link_full_s: float | None
    routing: str | None = None  #: how tokens were assumed to choose experts, where nothing was computed

    @property
    def ratio(self) -> float:
        """Bytes copied, divided by the bytes of full copies."""
        return self.bytes_copied / self.bytes_full


EXAMPLES = """
\b
Examples:
  pyggml savings
  pyggml savings moe.gguf --batches 1,8,64 --json
  pyggml savings glm-4.5.gguf --routing zipf:1.0
"""


@cloup.command("savings", cls=ModelCommand, epilog=EXAMPLES)
@click.argument("model", type=ModelPath(), required=False)
@cloup.option_group(
    "Batches",
    option("--batches", shown="1,2,4,8,16,32,64", metavar="N,N", help="Batch sizes."),
    option("-p", "--prompt", default=TEXT, metavar="TEXT", help="Text that is cut into batches. [a paragraph]"),
    json_option("Print the rows as JSON."),
)
@cloup.option_group(
    "Without computing",
    option("--routing", default="", metavar="lognormal:SPREAD|zipf:SKEW|uniform|trace:FILE|counts:N,N",
         help="Plan instead of computing: how tokens are assumed to choose experts."),
    choice("--graph", values=["auto", "built", "llama"], shown="auto",
         help="Who builds the graph of a plan: pyggml, or llama.cpp, whose graphs are planned and not computed."),
)  # fmt: skip
@model_options
def command(
    flags: ModelFlags, model: Path | None, batches: str, prompt: str, as_json: bool, routing: str, graph: GraphChoice
) -> None:
    """Compare used-expert copies with full copies, for batches of several sizes with all experts in host memory.

    Nothing is computed if MODEL is a name from `pyggml models`, if pyggml does not build its graph, or with --routing:
    tokens then choose experts by the law that the title states. Without MODEL, an example with random weights is used:
    32 experts, 4 per token. In this command the device computes the experts of every batch, so that you can compare
    small ones; in others it does so from 32 tokens on.
    """
    path = fine_grained() if model is None else model
    sizes = parse_sizes(batches)
    if flags.offload_by != "rows":
        raise click.UsageError("--offload-by does not work with savings, which offloads every product")
    if path.exists() and not routing and graph != "llama" and _is_built(path):
        rows = measure(flags, path, sizes, prompt)
    elif prompt != TEXT:
        raise click.UsageError("a plan has no text: use --routing instead of --prompt")
    else:
        rows = planned_savings(flags, path, sizes, routing=routing, graph=graph)
    if as_json:
        print_json([{**asdict(row), "ratio": row.ratio} for row in rows])
    else:
        assumed = f" (routing: {rows[0].routing})" if rows[0].routing else ""
        report().print(savings_table(rows, f"Used-expert copies and full copies: {path.name}{assumed}"))


def _is_built(path: Path) -> bool:
    """Return whether pyggml builds the graph of a file."""
    from ..gguf import GGUFFile
    from ..models.architectures import ARCHITECTURES

    with GGUFFile.open(path) as file:
        return file.metadata.get("general.architecture") in ARCHITECTURES


def fine_grained() -> Path:
    """Return the fine-grained example; it is made once."""
    from ._fetch import cache_folder, fine_grained_model

    with progress() as bar:
        task = bar.add_task("", total=None)
        return fine_grained_model(
            cache_folder(), lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
        )


def measure(flags: ModelFlags, path: Path, sizes: list[int], prompt: str) -> list[Saving]:
    """Compute batches and return the copied expert weights.

    Raises
    ------
    GraphError
        The model has no experts, or the prompt is shorter than the largest batch.
    """
    from ..gguf import GGUFFile
    from ..models.architectures import read_hparams
    from ..models.placement import PlacementFlags
    from ..report import CopyAccount
    from ..session import Session
    from ..tokenizer import Tokenizer

    with GGUFFile.open(path) as file:
        if not read_hparams(file).n_expert:
            raise GraphError(f"{path}: the model has no experts", hint="`pyggml make-moe` makes models with experts")
        ids = Tokenizer.from_gguf(file).encode(prompt)
        if len(ids) < max(sizes):
            raise GraphError(
                f"a batch of {max(sizes)} tokens needs a longer text: this one has {len(ids)} tokens",
                hint="give a longer --prompt, or smaller --batches",
            )
        backends, cpu = open_backends(flags)
        warm_up()
        rows = []
        with Session.open(
            file, devices=backends, cpu=cpu, placement=PlacementFlags(cpu_moe=True),
            context=flags.context(n_ctx=max(sizes)), policy=flags.policy(), recorder=(account := CopyAccount()),
            offload_rule=_every_product,
        ) as session:  # fmt: skip
            for n in sizes:
                session.reset()
                account.clear()
                session.decode(ids[:n], outputs="all")
                rows.append(_row(n, account, backends))
    return rows


def planned_savings(
    flags: ModelFlags, name: Path, sizes: list[int], *, routing: str = "", graph: GraphChoice = "auto"
) -> list[Saving]:
    """Return the expert weights that batches would copy, from the header alone.

    Parameters
    ----------
    routing : str
        How tokens choose experts; by the law that fits the model if empty.
    graph : str
        Who builds the graph; see `Planner.open`.

    Raises
    ------
    FormatError
        There is no such model.
    GraphError
        The model has no experts, or there is no device besides the CPU.
    """
    from ..models.placement import PlacementFlags
    from ..planning import Planner
    from ..report import CopyAccount
    from ..routing import routing_of
    from ..simulation import simulate_batch

    stated = stated_routing(routing) if routing else None
    backends, cpu = open_backends(flags, data=False)
    with Planner.open(
        name, devices=backends, cpu=cpu, placement=PlacementFlags(cpu_moe=True), context=flags.context(n_ctx=max(sizes)),
        policy=flags.policy(), recorder=(account := CopyAccount()), offload_rule=_every_product, data=False, graph=graph,
    ) as planner:  # fmt: skip
        if not planner.hparams.n_expert:
            raise GraphError(
                f"{name}: the model has no experts", hint="`pyggml models` shows which models have experts"
            )
        assumed = stated or routing_of(planner.file.tensors)
        rows = []
        for n in sizes:
            account.clear()
            simulate_batch(planner, n, outputs="all", routing=assumed)
            rows.append(replace(_row(n, account, backends), routing=str(assumed)))
    return rows


def _row(n: int, account: CopyAccount, backends: list[Backend]) -> Saving:
    total = account.total()
    if not total.bytes_full:
        raise GraphError(
            "nothing was copied: there is no device besides the CPU", hint="use --device sim:rtx4090-pcie4,cpu"
        )
    profile: Any = getattr(backends[0].device, "profile", None)  # of simulated devices only
    link: LinkProfile | None = None if profile is None else profile.link
    sizes = total.bytes_copied, total.bytes_full
    copied_s, full_s = (None if link is None else link.seconds(size, n_copies=0) for size in sizes)
    return Saving(n, total.used_mean, total.n_expert, *sizes, copied_s, full_s)


def _every_product(backend: Backend, op: Tensor) -> bool:
    """Offload every product with expert weights, for any batch size."""
    from ..opset import uses_experts

    return uses_experts(op.op) is not None


def savings_table(rows: list[Saving], title: str) -> Table:
    """Return the rows as a table, with a bar for the share that was copied."""
    columns = ["batch", "experts used", "copied", "if whole", "ratio"]
    times = ["on the link", "if whole"] if rows[0].link_s is not None else []
    made = table(title, *columns, "", *times, right=(*columns, *times))
    for row in rows:
        made.add_row(
            str(row.n_tokens), f"{row.used_mean:.1f} of {row.n_expert}", n_bytes(row.bytes_copied),
            n_bytes(row.bytes_full), f"{row.ratio:.0%}", Bar(row.ratio),
            *(f"{s * 1e3:.2f} ms" for s in (row.link_s, row.link_full_s) if s is not None),
        )  # fmt: skip
    return made
