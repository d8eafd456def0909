"""What changed between versions of ggml (`Dialect`), and what pyggml mends (`Repairs`).

Code asks for a field, never for a version. ``docs/upstream.md`` tells what each rule means to a user.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

__all__ = ["DEFAULT_DIALECT", "DIALECTS", "Dialect", "Repairs"]


@dataclass(frozen=True, slots=True)
class Dialect:
    """The rules of one version of ggml's scheduler and allocator; the defaults are 0.27's."""

    version: str = "0.27"
    #: compute: before a split without inputs the host waits for the previous split of another backend
    wait_previous_split: bool = True
    #: compute: the split's event is recorded after every split, else only after splits with inputs
    record_every_split: bool = True
    #: pass 5: a split is cut when its record of inputs is full; the record of a split that was pushed over doubles for good
    cut_at_input_capacity: bool = False
    #: which tensors get pipeline copies: input leafs, or flagged sources of computed nodes as they are met
    graph_inputs_from: Literal["leafs", "sources"] = "leafs"
    #: graph copy: a backend may ask that a tensor stay allocated until a node of the split
    alloc_deps: bool = True
    #: allocator: CLAMP may take over the memory of a source
    clamp_inplace: bool = True
    #: used-expert copy: ids without elements copy nothing and wait for nothing
    skip_empty_ids: bool = True
    #: alloc_graph: a reserve that fails inside is "returned" to the caller, or "ignored"
    reserve_failure: Literal["returned", "ignored"] = "returned"
    #: allocator: a buffer type may ask for more than `nbytes` only for some ops and types
    alloc_size_check: bool = True
    #: compute: who copies used experts: ggml's "scheduler", or a "callback" that llama.cpp sets and others do not
    expert_copy: Literal["callback", "scheduler"] = "callback"
    #: compute: inputs of a split that are weights in host memory are copied after all its others
    host_weights_last: bool = True
    #: used-expert copy: the backend of the weight is synchronized first
    wait_weight_backend: bool = False
    #: used-expert copy: ids are read from their "copy" on the split's backend, or from the "original" where that is
    #: copied later
    ids_from: Literal["copy", "original"] = "copy"
    #: used-expert copy: ids are read again for a weight of another number of experts
    ids_by_n_expert: bool = True
    #: alloc_graph: a callback is told of every reserve that becomes necessary
    realloc_callback: bool = True


_V0_20 = Dialect(
    version="0.20",
    wait_previous_split=False,
    record_every_split=False,
    cut_at_input_capacity=True,
    graph_inputs_from="sources",
    alloc_deps=False,
    clamp_inplace=False,
    skip_empty_ids=False,
    reserve_failure="ignored",
    alloc_size_check=False,
    expert_copy="scheduler",
    host_weights_last=False,
    wait_weight_backend=True,
    ids_from="original",
    ids_by_n_expert=False,
    realloc_callback=False,
)
_V0_21 = replace(_V0_20, version="0.21", wait_previous_split=True, record_every_split=True)
_V0_26 = Dialect(
    version="0.26",
    expert_copy="scheduler",
    host_weights_last=False,
    wait_weight_backend=True,
    ids_from="original",
    ids_by_n_expert=False,
    realloc_callback=False,
)
DEFAULT_DIALECT = Dialect()
#: The dialects by version, oldest first.
DIALECTS: dict[str, Dialect] = {d.version: d for d in (_V0_20, _V0_21, _V0_26, DEFAULT_DIALECT)}


@dataclass(frozen=True, slots=True)
class Repairs:
    """Where upstream computes wrongly and pyggml does not; all on by default, all off is `Repairs.strict()`.

    What aborts or crashes upstream is never replayed and has no field here.
    """

    #: a graph without computed nodes does not run on the backend that an earlier graph left behind
    empty_split: bool = True
    #: a host weight pinned to a device is copied there as any other input
    pinned_weight: bool = True
    #: ids that a node rewrote since they were read are read again
    stale_ids: bool = True
    #: ids that are themselves a weight in host memory, and not copied yet, are read where they lie (`ids_from`)
    host_weight_ids: bool = True
    #: a host weight that a node of the graph writes is waited for before its experts are copied (`wait_weight_backend`)
    written_weights: bool = True
    #: experts of a shared copy that a later user needs are added
    shared_experts: bool = True
    #: a copy whose source a node of another backend wrote since is made again for its later users
    stale_copies: bool = True
    #: computing another graph than the allocated one, or one that was changed since, is an error; so are nodes out of order
    other_graph: bool = True
    #: a node on a backend that cannot run it, or cannot write its memory, is moved to one that can, or is an error
    unsupported_ops: bool = True
    #: reading, or computing again from, memory that was given to something else is an error
    reused_memory: bool = True

    @classmethod
    def strict(cls) -> Repairs:
        """Return the value that replays upstream exactly."""
        return cls(**{f.name: False for f in fields(cls)})
