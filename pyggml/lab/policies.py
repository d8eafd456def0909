"""The policies by name: how each is replayed and run.

A name is an eviction, optionally with ``+`` and an admission: ``lru``, ``lfu-decay:32``, ``lru+hotter:64``,
``lfru+2of8``. ``module:Class`` names a user's own `Eviction`, of a module in the current folder or on ``PYTHONPATH``.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .. import moe_cache
from ..errors import GraphError
from ..kernels.lab import slots, stack
from ..moe_cache import EvictionPolicy
from . import evictions
from .admissions import parse_admission
from .cache import Admission, Cache, Events, Eviction
from .llama import LlamaCache
from .pools import Pools

__all__ = ["OWN_MODULES", "POLICIES", "Batch", "Policy", "own_class", "parse_policy"]

#: See `Eviction.replay_events`.
Batch = Callable[[Events], npt.NDArray[np.bool_]]
_HALF_LIFE = 64.0
#: Modules of ``module:Class``: their errors are the policies'.
OWN_MODULES: set[str] = set()


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy that can be replayed and, unless it knows the future, run.

    Attributes
    ----------
    name : str
        The name as given.
    make : callable or None
        Makes the eviction of a pool with ``n_slot`` slots and ``n_key`` keys; None for policies that know the future.
    admission : str
        See `parse_admission`.
    code : int or None
        Number of the eviction in the compiled replays (`kernels.lab`); None if the `Eviction` itself is replayed.
    has_stack : bool
        Whether one pass gives the hits of all capacities.
    must_admit : bool
        Whether each event's misses always enter, so that a pool must hold an event.
    llama : type or None
        llama.cpp's rule, for its own policies.
    fit : str
        Counts that the policy needs: ``""`` none, ``"others"`` those of other requests, ``"same"`` the request's own.
    """

    name: str
    make: Callable[..., Eviction] | None
    meaning: str
    admission: str = ""
    code: int | None = None
    has_stack: bool = True
    must_admit: bool = True
    fit: str = ""
    half_life: float = _HALF_LIFE
    llama: type[EvictionPolicy] | None = None

    @property
    def batch(self) -> Batch | None:
        """The eviction's own replay of all events at once; None if it has none, or an admission that it does not know."""
        return None if self.make is None or self.admission or self.fit else getattr(self.make, "replay_events", None)

    def cache(self, n_slot: int, pools: Pools, counts: Mapping[int, int] | None = None) -> Cache | LlamaCache:
        """Return a pool of slots with this policy; raises as `eviction`."""
        if self.llama is not None:
            return LlamaCache(self.llama, n_slot, pools.n_expert)
        return Cache(n_slot, self.eviction(n_slot, pools.n_key, counts), self.new_admission())

    def eviction(self, n_slot: int, n_key: int, counts: Mapping[int, int] | None = None) -> Eviction:
        """Return the eviction of a pool.

        Raises
        ------
        GraphError
            The policy knows the future, and cannot run.
        """
        if self.make is None:
            raise GraphError(f"{self.name} knows the future: it is for replays")
        if self.fit:
            return self.make(n_slot, n_key, counts=counts or {})
        if self.make is evictions.LFUDecay:
            return self.make(n_slot, n_key, half_life=self.half_life)
        return self.make(n_slot, n_key)

    def new_admission(self) -> Admission:
        """Return the admission of a pool."""
        return parse_admission(self.admission)


#: Policies by name, in the order of reports.
POLICIES: dict[str, Policy] = {
    p.name: p
    for p in (
        Policy("lru", evictions.LRU, "the one used longest ago leaves", code=stack.LRU),
        Policy("lfu", evictions.LFU, "the one used least often leaves", code=stack.LFU),
        Policy("lfu-decay", evictions.LFUDecay, "LFU whose counts halve every 64 events", code=stack.LFU_DECAY),
        Policy("lfru", evictions.LFRU, "lowest count over age leaves", code=stack.LFRU),
        Policy("fifo", evictions.FIFO, "the one that entered first leaves", code=stack.FIFO, has_stack=False),
        Policy("slru", evictions.SLRU, "a second use protects, half of the slots at most", code=slots.SLRU, has_stack=False),
        Policy("clock", evictions.CLOCK, "LRU by one bit", code=slots.CLOCK, has_stack=False),
        Policy("arc", evictions.ARC, "recency and frequency, their shares learned", code=slots.ARC, has_stack=False),
        Policy("least-stale", evictions.LeastStale, "unused in this step leaves first", code=stack.LRU),  # without prefetch
        Policy("llama-lru", None, "llama.cpp b11549: one list a group", code=slots.LLAMA_LRU, has_stack=False, llama=moe_cache.LRU),
        Policy("llama-slru", None, "llama.cpp b11739: used twice is protected, half of the slots at most", code=slots.LLAMA_SLRU, has_stack=False, llama=moe_cache.SLRU),
        Policy("static", evictions.Static, "the most used of other requests stay", code=slots.STATIC, has_stack=False, must_admit=False, fit="others"),
        Policy("static-same-trace", evictions.Static, "the most used of this request stay: misleads", code=slots.STATIC, has_stack=False, must_admit=False, fit="same"),
        Policy("half-pinned", evictions.HalfPinned, "half static, half LRU", code=slots.HALF_PINNED, has_stack=False, must_admit=False, fit="others"),
        Policy("belady", None, "the one needed last leaves; all misses enter", code=stack.BELADY),
        Policy("belady-bypass", None, "the best there is: may decline", code=stack.BELADY_BYPASS, must_admit=False),
    )
}  # fmt: skip


def parse_policy(text: str) -> Policy:
    """Return the policy that a text names.

    Raises
    ------
    GraphError
        There is no such policy.
    """
    text = text.strip()
    base, _, admission = text.partition("+")
    name, _, value = base.partition(":")
    found = POLICIES.get("belady" if name == "oracle" else name)
    if found is None and ":" in base and "." not in value:
        found = _own(base)
    elif found is not None and value:
        try:
            half_life = float(value)
        except ValueError:
            half_life = 0.0
        if found.name != "lfu-decay" or not half_life > 0:
            raise GraphError(
                f"policy '{text}': {found.name} takes no '{value}'", hint="lfu-decay:HALF_LIFE has a number"
            )
        found = replace(found, half_life=half_life)
    if found is None:
        raise GraphError(
            f"there is no policy '{text}'",
            hint=f"{', '.join(POLICIES)}; +2of8, +hotter, +atmost:2, +next; module:Class, of a module in the current folder or "
            "on PYTHONPATH",
        )
    if admission:
        if found.make is None:
            raise GraphError(f"policy '{text}': {found.name} has its own admission")
        rule = parse_admission(admission)
        found = replace(found, admission=admission, has_stack=False, must_admit=found.must_admit and rule.must_admit)
    return replace(found, name=text)


def _own(text: str) -> Policy | None:
    """Return the policy of ``module:Class``, or None if there is no such module; raises as `own_class`."""
    made = own_class(text, "policy", Eviction, n_args=2)
    if made is None:
        return None
    assert issubclass(made, Eviction)
    return Policy(text, made, "own", must_admit=made.must_admit)


def own_class(text: str, what: str, base: type[object], *, n_args: int) -> type[object] | None:
    """Return the user's class ``module:Class``, or None if there is no such module.

    Parameters
    ----------
    what : str
        What errors call it: ``"policy"``.
    base : type
        What it is derived from.
    n_args : int
        It is made with so many arguments.

    Raises
    ------
    GraphError
        The module cannot be imported, or has no such class.
    """
    name, _, wanted = text.partition(":")
    try:
        with _current_folder_last():
            module = importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            return None
        raise GraphError(f"{what} '{text}': {name} cannot be imported: {type(error).__name__}: {error}") from error
    made = getattr(module, wanted, None)
    if not (isinstance(made, type) and issubclass(made, base)):
        article = "an" if base.__name__[0] in "AEIOU" else "a"
        raise GraphError(
            f"{what} '{text}': {getattr(module, '__file__', name)} has no class '{wanted}' that is {article} {base.__name__}"
        )
    if missing := sorted(getattr(made, "__abstractmethods__", ())):
        raise GraphError(
            f"{what} '{text}': {wanted} lacks {', '.join(missing)}", hint=f"see {base.__module__}.{base.__name__}"
        )
    try:
        inspect.signature(made).bind(*range(n_args))
    except TypeError:
        args = ", ".join(list(inspect.signature(base).parameters)[:n_args])
        raise GraphError(f"{what} '{text}': {wanted} must be made by {wanted}({args})") from None
    OWN_MODULES.add(made.__module__)
    return made


@contextmanager
def _current_folder_last() -> Iterator[None]:
    """Let a module of the current folder be imported, unless the path has one of its name."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path[:] = [path for path in sys.path if path is not folder]
