"""The splits of a graph as records and as a table: backend, cause, inputs."""

from __future__ import annotations

from collections.abc import Sequence

from ..backend import Backend
from ..notebook import html_table
from ..record import Identity, SplitInput, SplitRecord
from ..tensor import Tensor
from .split import Cutter
from .state import Assignment, Split, is_computed
from .transfer import input_kind

__all__ = ["split_records", "splits_table"]


def split_records(cutter: Cutter, of: Identity) -> list[SplitRecord]:
    """Return a record of each split of a graph that was just cut.

    Parameters
    ----------
    of : Identity
        The graph's number, and that of the run that it is cut for.

    Notes
    -----
    An input copy that several splits of a backend read is an input of the first, with the readers of all.
    """
    asg, machine = cutter.asg, cutter.machine
    users: dict[tuple[Tensor, int], list[Tensor]] = {}
    for node, _, src in cutter.replaced_sources:
        users.setdefault((src, asg.ids[node]), []).append(node)

    def cause(tensor: Tensor) -> str:
        found = asg.cause(tensor)
        return "" if found is None else found.value

    def describe(split: Split, tensor: Tensor) -> SplitInput:
        readers = users.get((tensor, split.backend_id), [])
        first = readers[0] if readers else None
        storage = tensor.storage
        return SplitInput(
            tensor=tensor.name,
            kind=input_kind(split, tensor, cutter.copies[tensor][split.backend_id][cutter.cur_copy]),
            src=machine.backends[asg.ids[tensor]].name,
            cause=cause(tensor),
            buft="" if storage is None else storage.buft.name,
            type=tensor.type.ggml_name,
            ne=tuple(tensor.ne),
            size_bytes=tensor.nbytes,
            user="" if first is None else first.name,
            user_op="" if first is None else first.op_desc,
            user_cause="" if first is None else cause(first),
            n_users=len(readers),
        )

    records = []
    for i, split in enumerate(cutter.splits):
        nodes = [n for n in split.graph.nodes if is_computed(n)]
        records.append(
            SplitRecord(
                split=i,
                backend=machine.backends[split.backend_id].name,
                i_start=split.i_start,
                i_end=split.i_end,
                n_nodes=len(nodes),
                first=nodes[0].name if nodes else "",
                op=nodes[0].op_desc if nodes else "",
                cause=cause(nodes[0]) if nodes else "",
                inputs=tuple(describe(split, tensor) for tensor in split.inputs),
                **of,
            )
        )
    return records


def splits_table(title: str, splits: Sequence[Split], asg: Assignment, backends: Sequence[Backend]) -> str:
    """Return splits as an HTML table: backend, cause, and the bytes of their inputs."""
    columns = ("split", "backend", "nodes", "first", "because", "inputs", "bytes if whole")
    rows = (_split_row(i, split, asg, backends) for i, split in enumerate(splits))
    return html_table(title, columns, rows, n_rows=len(splits), right=("split", "nodes", "bytes if whole"))


def _split_row(i: int, split: Split, asg: Assignment, backends: Sequence[Backend]) -> tuple[str, ...]:
    first = next((n for n in split.graph.nodes if not n.op.is_view), None)
    cause = None if first is None else asg.cause(first)
    return (
        str(i),
        backends[split.backend_id].name,
        f"{split.i_start}..{split.i_end - 1}",
        "-" if first is None else f"{first.op_desc} {first.name}",
        "-" if cause is None else cause.text,
        ", ".join(t.name for t in split.inputs) or "-",
        f"{sum(t.nbytes for t in split.inputs):,}",
    )
