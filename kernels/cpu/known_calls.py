"""Answers calls of a scheduler that it made before, without Python: copies, waits and computes of known graphs.

Python answers a call the first time and describes it in an *entry*. A later call with the same tensor, stream or graph
is answered here and noted as an *event* in a log, which Python reads after the decode. Any other call goes to Python.

An entry is found in a table by its *key*: an address or graph number and the kind of call. The entry of a tensor has a
copy of ggml's struct; if the struct has changed, the call is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .emit import I64, ir
from .kernel import device, kernel
from .memory import ask5, copy_bytes, cycles, ld_i64, st_i64
from .plan import run

from llvmlite import binding  # isort: skip

# -- kinds of calls, the low bits of a key
SET, GET, SET_ASYNC, GET_ASYNC, SYNCHRONIZE, COPY_ASYNC, COMPUTE = range(1, 8)
KIND_BITS = 3

# -- state, in words
ON = 0  #: 0: all calls go to Python
LOG, N_EVENTS, MAX_EVENTS = 1, 2, 3  #: the log's address, its events, and how many fit
TABLE, MASK = 4, 5  #: address of the table (a key and an entry's address each), and its number of places - 1
STRUCT_WORDS = 6  #: words of ggml's struct of a tensor
UID_AT, NODES_AT = 7, 8  #: byte offsets in ggml's struct of a graph
SCRATCH, SCRATCH_BYTES = 9, 10  #: memory for plans
REFUSED = 11  #: Python function that gets the number of an entry whose plan stopped
CYCLES = 12  #: cycles of the processor's counter that computes have taken
STATE = 13

# -- an event, in words
EVENT = 4
OF_ENTRY, AT_ADDRESS, AT_OFFSET, OF_SIZE = range(EVENT)

# -- an entry, in words
NUMBER = 0
PLACE, TELLS_ADDRESS, STRUCT = 1, 2, 3  #: a tensor: its memory, whether the log has the host's address, the struct
STREAM, NODES, FUNCTION = 1, 2, 3  #: a graph: its stream, its list of nodes, and a library's function, or 0 for a plan:
CONTROL, THREADS, SHARED_BYTES, THREAD_BYTES, N_PIECES, PIECES = 4, 5, 6, 7, 8, 9


@device
def place_of(key: int, mask: int) -> int:
    """Return the first place of the table for a key."""
    return ((key * 0x9E3779B97F4A7C1) >> 24) & mask


@device
def _find(state, key):
    """Return the address of a key's entry, or 0."""
    table, mask = ld_i64(state + 8 * TABLE), ld_i64(state + 8 * MASK)
    at = place_of(key, mask)
    while True:
        found = ld_i64(table + 16 * at)
        if found == key:
            return ld_i64(table + 16 * at + 8)
        if found == 0:
            return 0
        at = (at + 1) & mask


@device
def _is_same(state, entry, tensor):
    """Return whether a tensor's struct is the one of its entry."""
    for i in range(ld_i64(state + 8 * STRUCT_WORDS)):
        if ld_i64(entry + 8 * (STRUCT + i)) != ld_i64(tensor + 8 * i):
            return False
    return True


@device
def _note(state, number, address, offset, size):
    """Write an event into the log."""
    n = ld_i64(state + 8 * N_EVENTS)
    event = ld_i64(state + 8 * LOG) + 8 * EVENT * n
    st_i64(event + 8 * OF_ENTRY, number)
    st_i64(event + 8 * AT_ADDRESS, address)
    st_i64(event + 8 * AT_OFFSET, offset)
    st_i64(event + 8 * OF_SIZE, size)
    st_i64(state + 8 * N_EVENTS, n + 1)


@device
def _copy(state, entry, kind, address, offset, size):
    """Copy between a tensor of a device and host memory."""
    place = ld_i64(entry + 8 * PLACE) + offset
    if kind in (SET, SET_ASYNC):
        copy_bytes(place, address, size)
    else:
        copy_bytes(address, place, size)
    told = address if ld_i64(entry + 8 * TELLS_ADDRESS) != 0 else 0
    _note(state, ld_i64(entry + 8 * NUMBER), told, offset, size)


@device
def _took(state, start):
    """Add the cycles since a start to those of computes."""
    st_i64(state + 8 * CYCLES, ld_i64(state + 8 * CYCLES) + cycles(0) - start)


@device
def _compute(state, entry, stream, graph):
    """Compute a graph by its plan or the library's function; return its status."""
    function, number, start = ld_i64(entry + 8 * FUNCTION), ld_i64(entry + 8 * NUMBER), cycles(0)
    if function != 0:
        status = ask5(function, stream, graph, 0, 0, 0)
        _took(state, start)
        _note(state, number, 0, 0, 0)
        return status
    shared, scratch = ld_i64(entry + 8 * SHARED_BYTES), ld_i64(state + 8 * SCRATCH)
    threads, ctl = ld_i64(entry + 8 * THREADS), ld_i64(entry + 8 * CONTROL)
    for i in range(ld_i64(entry + 8 * N_PIECES)):
        plan, n = ld_i64(entry + 8 * (PIECES + 2 * i)), ld_i64(entry + 8 * (PIECES + 2 * i + 1))
        if run(threads, plan, n, ctl, 0, scratch, scratch + shared, ld_i64(entry + 8 * THREAD_BYTES)) != 0:
            return ask5(ld_i64(state + 8 * REFUSED), number, 0, 0, 0, 0)
    _took(state, start)
    _note(state, number, 0, 0, 0)
    return 0


@device
def _is_graph(state, entry, stream, graph):
    """Return whether a graph has the stream and the list of nodes of its entry."""
    nodes = ld_i64(graph + ld_i64(state + 8 * NODES_AT))
    return ld_i64(entry + 8 * STREAM) == stream and ld_i64(entry + 8 * NODES) == nodes


@device
def _fits(state, entry):
    """Return whether the memory for plans is large enough for a graph's."""
    need = ld_i64(entry + 8 * SHARED_BYTES) + ld_i64(entry + 8 * THREADS) * ld_i64(entry + 8 * THREAD_BYTES)
    return need <= ld_i64(state + 8 * SCRATCH_BYTES)


@kernel(8, rare=True, answers=True)
def known_call(state, kind, python, a, b, c, d, e):
    """Answer a call of a kind with its arguments, or let the function ``python`` answer it."""
    if ld_i64(state + 8 * ON) != 0 and ld_i64(state + 8 * N_EVENTS) < ld_i64(state + 8 * MAX_EVENTS):
        if kind == COMPUTE:
            uid = ld_i64(b + ld_i64(state + 8 * UID_AT))
            entry = _find(state, uid << KIND_BITS | COMPUTE) if uid != 0 else 0
            if entry != 0 and _is_graph(state, entry, a, b) and _fits(state, entry):
                return _compute(state, entry, a, b)
        elif kind in (SYNCHRONIZE, COPY_ASYNC):
            entry = _find(state, a | kind)
            if entry != 0:
                if kind == SYNCHRONIZE:
                    _note(state, ld_i64(entry + 8 * NUMBER), 0, 0, 0)
                return 0  # such a copy is refused, and the scheduler waits and copies otherwise
        else:
            entry = _find(state, b | kind)
            if entry != 0 and _is_same(state, entry, b):
                _copy(state, entry, kind, c, d, e)
                return 0
    return ask5(python, a, b, c, d, e)


_engines: list[Any] = []  # they own the code of `bound`


def bound(address: int, n: int, firsts: Sequence[Sequence[int]]) -> list[int]:
    """Return functions of n int64 arguments that call the one at an address, each with its own arguments before them."""
    target = binding.Target.from_default_triple().create_target_machine()
    module = ir.Module("bound")
    module.triple = target.triple
    for i, first in enumerate(firsts):
        body = ir.IRBuilder(ir.Function(module, ir.FunctionType(I64, [I64] * n), f"bound{i}").append_basic_block())
        signature = ir.FunctionType(I64, [I64] * (len(first) + n))
        called = body.inttoptr(I64(address), signature.as_pointer())
        body.ret(body.call(called, [*map(I64, first), *body.function.args]))
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), target)
    engine.finalize_object()
    _engines.append(engine)
    return [engine.get_function_address(f"bound{i}") for i in range(len(firsts))]
