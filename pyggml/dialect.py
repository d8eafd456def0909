"""What changed between versions of ggml (`Dialect`), and what pyggml corrects (`Repairs`).

Code tests a field, never a version. ``docs/upstream.md`` explains the effect of each rule.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

__all__ = ["DEFAULT_DIALECT", "DIALECTS", "Dialect", "Repairs"]


@dataclass(frozen=True, slots=True)
class Dialect:
    """The rules of one version of ggml's scheduler and allocator; the defaults are 0.27's."""

    version: str = "0.27"
    #: compute: before a split without inputs, the host waits for the previous split of another backend
    wait_previous_split: bool = True
    #: compute: an event is recorded after every split, otherwise only after splits with inputs
    record_every_split: bool = True
    #: pass 5: a split is cut when its list of inputs is full; the list of a split that overflowed stays twice as large
    cut_at_input_capacity: bool = False
    #: which tensors get pipeline copies: input leafs, or flagged sources of computed nodes as they are met
    graph_inputs_from: Literal["leafs", "sources"] = "leafs"
    #: graph copy: a backend can keep a tensor allocated until a node of the split
    alloc_deps: bool = True
    #: allocator: CLAMP can write over its source
    clamp_inplace: bool = True
    #: used-expert copy: ids without elements copy nothing and wait for nothing
    skip_empty_ids: bool = True
    #: alloc_graph: a reserve that fails inside is "returned" to the caller, or "ignored"
    reserve_failure: Literal["returned", "ignored"] = "returned"
    #: allocator: a buffer type may request more than `nbytes` only for some ops and types
    alloc_size_check: bool = True
    #: compute: used experts are copied by ggml's "scheduler", or by a "callback" that llama.cpp sets and others do not
    expert_copy: Literal["callback", "scheduler"] = "callback"
    #: compute: host weights are copied after all other inputs of a split
    host_weights_last: bool = True
    #: used-expert copy: the backend of the weight is synchronized first
    wait_weight_backend: bool = False
    #: used-expert copy: ids are read from their "copy" on the split's backend, or from the "original" if that is
    #: copied later
    ids_from: Literal["copy", "original"] = "copy"
    #: used-expert copy: ids are read again for a weight with another number of experts
    ids_by_n_expert: bool = True
    #: alloc_graph: a callback is called for every reserve that becomes necessary
    realloc_callback: bool = True


# each is its successor with the older rules
DEFAULT_DIALECT = Dialect()
_V0_26 = replace(
    DEFAULT_DIALECT, version="0.26", expert_copy="scheduler", host_weights_last=False, wait_weight_backend=True,
    ids_from="original", ids_by_n_expert=False, realloc_callback=False,
)  # fmt: skip
_V0_21 = replace(
    _V0_26, version="0.21", cut_at_input_capacity=True, graph_inputs_from="sources", alloc_deps=False, clamp_inplace=False,
    skip_empty_ids=False, reserve_failure="ignored", alloc_size_check=False,
)  # fmt: skip
_V0_20 = replace(_V0_21, version="0.20", wait_previous_split=False, record_every_split=False)
#: The dialects by version, oldest first.
DIALECTS: dict[str, Dialect] = {d.version: d for d in (_V0_20, _V0_21, _V0_26, DEFAULT_DIALECT)}


@dataclass(frozen=True, slots=True)
class Repairs:
    """Corrections of what upstream computes wrongly; all are on by default, `Repairs.strict()` has all off.

    Aborts and crashes of upstream are never repeated and have no field here.
    """

    #: a graph without computed nodes does not run on the backend of an earlier graph
    empty_split: bool = True
    #: a host weight pinned to a device is copied there like any other input
    pinned_weight: bool = True
    #: ids that a node rewrote after they were read are read again
    stale_ids: bool = True
    #: ids that are a weight in host memory and not copied yet are read from host memory (`ids_from`)
    host_weight_ids: bool = True
    #: before experts of a host weight that a node writes are copied, the host waits for that node (`wait_weight_backend`)
    written_weights: bool = True
    #: experts that a later user of a shared input copy needs are copied too
    shared_experts: bool = True
    #: if a node of another backend writes the source of an input copy, the copy is made again for later users
    stale_copies: bool = True
    #: computing a graph other than the allocated one, a changed graph, or nodes out of order is an error
    other_graph: bool = True
    #: a node on a backend that cannot run it, or cannot write its memory, is moved to one that can, or else is an error
    unsupported_ops: bool = True
    #: reading memory that was given to another tensor is an error; a graph does not get an earlier layout that overwrites it
    reused_memory: bool = True

    @classmethod
    def strict(cls) -> Repairs:
        """Return the value with all corrections off, which repeats upstream exactly."""
        return cls(**{f.name: False for f in fields(cls)})
