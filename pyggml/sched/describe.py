"""The splits of a graph as records and as a table: backend, cause, inputs."""

from __future__ import annotations

from ..notebook import html_table
from ..record import UNKNOWN, Identity, SplitInput, SplitRecord
from ..tensor import Tensor
from .plan import Plan
from .state import Split, is_computed

__all__ = ["split_records", "splits_table"]


def split_records(plan: Plan, of: Identity = UNKNOWN) -> list[SplitRecord]:
    """Return a record of each split of a plan.

    Parameters
    ----------
    of : Identity, optional
        The graph's number, and that of the run that it is cut for.

    Notes
    -----
    An input copy that several splits of a backend read is an input of the first, with the readers of all.
    """
    asg, backends = plan.assignment, plan.backends
    users: dict[tuple[Tensor, int], list[Tensor]] = {}
    for node, _, src in plan.replaced_sources:
        users.setdefault((src, asg.ids[node]), []).append(node)

    def cause(tensor: Tensor) -> str:
        found = asg.cause(tensor)
        return "" if found is None else found.value

    def describe(i: int, split: Split, tensor: Tensor) -> SplitInput:
        readers = users.get((tensor, split.backend_id), [])
        first = readers[0] if readers else None
        storage, transfer = tensor.storage, transfers[i][tensor]
        ids = transfer.ids_tensor if transfer.kind == "experts" else None
        return SplitInput(
            tensor=tensor.name,
            kind=transfer.kind,
            src=backends[asg.ids[tensor]].name,
            cause=cause(tensor),
            buft="" if storage is None else storage.buft.name,
            type=tensor.type.ggml_name,
            ne=tuple(tensor.ne),
            size_bytes=tensor.nbytes,
            user="" if first is None else first.name,
            user_op="" if first is None else first.op_desc,
            user_cause="" if first is None else cause(first),
            n_users=len(readers),
            ids_ne=() if ids is None else tuple(ids.ne),
        )

    transfers = [{t.source: t for t in own} for own in plan.transfers]
    records = []
    for i, split in enumerate(plan.splits):
        nodes = [n for n in split.graph.nodes if is_computed(n)]
        records.append(
            SplitRecord(
                split=i,
                backend=backends[split.backend_id].name,
                i_start=split.i_start,
                i_end=split.i_end,
                n_nodes=len(nodes),
                first=nodes[0].name if nodes else "",
                op=nodes[0].op_desc if nodes else "",
                cause=cause(nodes[0]) if nodes else "",
                inputs=tuple(describe(i, split, tensor) for tensor in split.inputs),
                causes=asg.cause_counts(split.graph),
                **of,
            )
        )
    return records


def splits_table(title: str, plan: Plan | None) -> str:
    """Return splits as an HTML table: backend, cause, and the bytes of their inputs."""
    columns = ("split", "backend", "nodes", "first", "because", "inputs", "bytes if whole")
    rows = [] if plan is None else [_split_row(i, split, plan) for i, split in enumerate(plan.splits)]
    return html_table(title, columns, rows, n_rows=len(rows), right=("split", "nodes", "bytes if whole"))


def _split_row(i: int, split: Split, plan: Plan) -> tuple[str, ...]:
    first = next((n for n in split.graph.nodes if not n.op.is_view), None)
    cause = None if first is None else plan.assignment.cause(first)
    return (
        str(i),
        plan.backends[split.backend_id].name,
        f"{split.i_start}..{split.i_end - 1}",
        "-" if first is None else f"{first.op_desc} {first.name}",
        "-" if cause is None else cause.text,
        ", ".join(t.name for t in split.inputs) or "-",
        f"{sum(t.nbytes for t in split.inputs):,}",
    )
