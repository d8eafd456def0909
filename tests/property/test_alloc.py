"""The allocators: what lies where, and that nothing lies where something else is still needed."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle.port_alloc import PlainTensor, PortDynTallocr, PortGallocr

from pyggml.alloc import DynTallocr, Gallocr, Tallocr, alloc_tensors
from pyggml.backends.mock import BufferTypeAbilities, MockBufferType, MockMemory
from pyggml.buffer import MultiBuffer
from pyggml.dialect import DIALECTS
from pyggml.errors import AllocError
from pyggml.graph import Graph
from pyggml.tensor import Tensor
from pyggml.types import Op, TensorFlag

ALWAYS = settings(
    max_examples=150, derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
ALIGNMENTS = st.sampled_from([1, 32, 64, 128, 512])
MAX_SIZES = st.sampled_from([2**64 - 1, 4096, 1 << 16, 600])


def _buft(
    *, alignment: int = 64, max_size: int = 2**64 - 1, quant_row: int = 0, name: str = "M", limit: int = 0
) -> MockBufferType:
    abilities = BufferTypeAbilities(
        name, alignment=alignment, max_size=max_size, quant_row=quant_row, alloc_limit=limit
    )
    return MockBufferType(abilities, MockMemory())


# -- offsets that are given back -----------------------------------------------

#: Take so many bytes, or (negative) give back one of those taken.
ACTIONS = st.lists(st.integers(1, 3000) | st.integers(-40, -1), max_size=80)
#: The same with many empty tensors.
ACTIONS_WITH_EMPTY = st.lists(st.sampled_from([0, 0, 1, 64, 100, 128, 500]) | st.integers(-40, -1), max_size=80)


@ALWAYS
@given(ACTIONS | ACTIONS_WITH_EMPTY, ALIGNMENTS, MAX_SIZES)
def test_offsets_are_the_ports(actions: list[int], alignment: int, max_size: int) -> None:
    """Whatever is taken and given back, the next offset and the sizes in the end are upstream's."""
    ours, port = DynTallocr(alignment, max_size), PortDynTallocr(alignment, max_size)
    taken: list[tuple[int, int, int]] = []
    for action in actions:
        if action >= 0:
            at = ours.alloc(action)
            assert at == port.alloc(action)
            taken.append((*at, action))
        elif taken:
            given_back = taken.pop(action % len(taken))
            ours.free_bytes(*given_back)
            port.free_bytes(*given_back)
    assert [chunk.max_size for chunk in ours.chunks] == port.max_size


@ALWAYS
@given(ACTIONS, ALIGNMENTS, MAX_SIZES)
def test_taken_ranges_never_overlap(actions: list[int], alignment: int, max_size: int) -> None:
    """Ranges taken at the same time lie apart, at multiples of the alignment, and inside their chunk."""
    tallocr = DynTallocr(alignment, max_size)
    taken: list[tuple[int, int, int]] = []
    for action in actions:
        if action < 0:
            if taken:
                tallocr.free_bytes(*taken.pop(action % len(taken)))
            continue
        chunk, offset = tallocr.alloc(action)
        assert offset % alignment == 0
        assert offset + action <= tallocr.chunks[chunk].max_size
        for c, start, size in taken:
            assert c != chunk or offset + action <= start or start + size <= offset
        taken.append((chunk, offset, action))


@ALWAYS
@given(st.lists(st.integers(1, 5000), max_size=60), ALIGNMENTS)
def test_all_given_back_leaves_one_free_block(sizes: list[int], alignment: int) -> None:
    """When everything is given back, in any order, each chunk is one free block again."""
    tallocr = DynTallocr(alignment, 4096)
    taken = [(*tallocr.alloc(size), size) for size in sizes]
    for item in sorted(taken, key=lambda t: (t[2] * 7919 % 101, t)):
        tallocr.free_bytes(*item)
    assert all(len(chunk.free) == 1 and chunk.free[0][0] == 0 for chunk in tallocr.chunks)


def test_more_than_256_free_blocks_are_no_limit() -> None:
    """Where upstream runs out of free blocks and aborts, offsets are still given and taken back."""
    tallocr = DynTallocr(64, 2**64 - 1)
    taken = [(*tallocr.alloc(64), 64) for _ in range(1200)]
    for item in taken[::2]:
        tallocr.free_bytes(*item)
    assert len(tallocr.chunks[0].free) == 601
    assert tallocr.alloc(64) == (0, taken[-2][1])  # best fit, and the last of equals, as upstream


# -- tensors one after the other -------------------------------------------------


@ALWAYS
@given(st.lists(st.integers(1, 700), min_size=1, max_size=20), ALIGNMENTS)
def test_linear_placement(sizes: list[int], alignment: int) -> None:
    """Tensors follow each other at the next multiple of the alignment, and one too many is refused."""
    buft = _buft(alignment=alignment)
    tensors = [Tensor("f32", (n,), name=f"t{n}") for n in sizes]
    total = sum(-(-4 * n // alignment) * alignment for n in sizes)
    buffer = buft.alloc_buffer(total)
    tallocr = Tallocr(buffer)
    expected = 0
    for tensor in tensors:
        tallocr.alloc(tensor)
        assert tensor.data == buffer.base + expected
        expected += -(-tensor.nbytes // alignment) * alignment
    with pytest.raises(AllocError, match="'late' needs"):
        tallocr.alloc(Tensor("f32", (1,), name="late"))


@ALWAYS
@given(st.lists(st.integers(1, 700), min_size=1, max_size=20), st.sampled_from([256, 3000, 10_000]))
def test_weights_are_spread_over_buffers_of_maximum_size(sizes: list[int], max_size: int) -> None:
    """Tensors go into as many buffers as the maximum size makes necessary; one alone may exceed it."""
    buft = _buft(alignment=32, max_size=max_size)
    tensors = [Tensor("f32", (n,), name=f"t{i}") for i, n in enumerate(sizes)]
    view = Tensor("f32", (1,), name="view", view_src=tensors[0])
    whole = alloc_tensors([*tensors, view], buft)
    assert whole is not None
    parts = whole.buffers if isinstance(whole, MultiBuffer) else (whole,)
    for part in parts:
        inside = [t for t in tensors if t.buffer is part]
        assert part.size <= max_size or len(inside) == 1
        spans = sorted((t.data, t.data + t.nbytes) for t in inside if t.data is not None)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert (view.buffer, view.data) == (tensors[0].buffer, tensors[0].data)


# -- graphs ------------------------------------------------------------------------

KINDS = ("ADD", "MUL", "CONT", "RESHAPE", "SCALE", "CLAMP", "MUL_MAT", "ADD_ID", "SOFT_MAX")
#: Op, sources (counted back from the latest), elements if it makes its own size (-1: none), output flag, buffer id.
STEP = st.tuples(
    st.sampled_from(KINDS),
    st.integers(0, 9),
    st.integers(0, 9),
    st.sampled_from([0, 1, 40, 300, -1]),
    st.integers(0, 8),
)


def _both(program: list[tuple[str, int, int, int, int]], n_leaf: int) -> tuple[list[Tensor], list[PlainTensor], Graph]:
    """One random graph twice: for pyggml and for the port; results of one size can share memory."""
    ours: list[Tensor] = []
    plain: list[PlainTensor] = []

    def add(op: str, ne: list[int], src: list[int], flags: set[str], view: int | None = None) -> None:
        name = f"t{len(ours)}"
        flag_bits = sum(TensorFlag[f.upper()] for f in flags)
        view_src = None if view is None else ours[view]
        t = Tensor("f32", ne, name=name, op=Op[op], src=[ours[i] for i in src], flags=flag_bits, view_src=view_src)
        root = None if view is None else plain[view].view_src or plain[view]
        p = PlainTensor(name, "f32", t.ne, t.nb, op, [plain[i] for i in src], root, 0, set(flags))
        ours.append(t)
        plain.append(p)

    for i in range(n_leaf):
        add("NONE", [100], [], {"input"} if i % 2 else set())
    for op, i, j, own, flag in program:
        a, b = len(ours) - 1 - i % len(ours), len(ours) - 1 - j % len(ours)
        ne = [max(0, own)] if own else list(ours[a].ne)
        flags = {"output"} if flag == 8 else set()
        if op == "RESHAPE":
            add(op, list(ours[a].ne), [a], set(), view=a)
        else:
            add(op, ne, [a] if op in ("CONT", "SCALE", "CLAMP") else [a, b], flags)
    graph = Graph()
    graph.nodes = ours[n_leaf:]
    graph.leafs = ours[:n_leaf]
    return ours, plain, graph


@ALWAYS
@given(
    st.lists(STEP, max_size=40),
    st.integers(1, 4),
    ALIGNMENTS,
    MAX_SIZES,
    st.sampled_from(list(DIALECTS)),
    st.booleans(),
)
def test_graph_placement_is_the_ports(
    program: list[tuple[str, int, int, int, int]],
    n_leaf: int,
    alignment: int,
    max_size: int,
    version: str,
    shared: bool,
) -> None:
    """Sizes and the place of every tensor are the port's, with one, two or shared buffer types."""
    ours, plain, graph = _both(program, n_leaf)
    dialect = DIALECTS[version]
    first, second = _buft(alignment=alignment, max_size=max_size, name="A"), _buft(alignment=256, name="B")
    specs = {
        "A": {"name": "A", "alignment": alignment, "max_size": max_size},
        "B": {"name": "B", "alignment": 256, "max_size": None},
    }
    bufts = [first, first if shared else second]
    galloc = Gallocr(bufts, dialect=dialect, keeps_needed=False)
    port = PortGallocr([specs[b.name] for b in bufts], dialect)
    ids = [step[4] % 2 for step in program]
    leaf_ids = [i % 2 for i in range(n_leaf)]
    galloc.reserve_n(graph, ids, leaf_ids)
    assert port.reserve_n(plain[n_leaf:], plain[:n_leaf], ids, leaf_ids)
    assert [[b.size for b in galloc.chunks(i)] for i in range(2)] == port.chunk_sizes
    assert [galloc.buffer_size(i) for i in range(2)] == [port.buffer_size(i) for i in range(2)]
    assert galloc.alloc_graph(graph)
    assert port.alloc_graph(plain[n_leaf:], plain[:n_leaf])
    for tensor, expected in zip(ours, plain, strict=True):
        assert tensor.buffer is not None
        assert tensor.data is not None
        assert expected.data is not None
        where, chunk, offset = expected.data
        assert isinstance(where, int)
        assert tensor.buffer is galloc.chunks(where)[chunk]
        assert tensor.data - tensor.buffer.base == offset


def _assert_apart(ours: list[Tensor], graph: Graph, galloc: Gallocr, alignment: int) -> None:
    """Fail if a node writes where a tensor lies that a later node reads, or that is an output."""
    root = {t: t.view_src or t for t in ours}
    needed_until: dict[Tensor, int] = {}
    for i, node in enumerate(graph.nodes):
        for tensor in (node, *node.src):
            assert tensor is not None
            is_output = root[tensor].flags & TensorFlag.OUTPUT
            needed_until[root[tensor]] = len(graph.nodes) if is_output else max(i, needed_until.get(root[tensor], 0))
    for i, node in enumerate(graph.nodes):
        if node.view_src is not None:
            continue
        assert node.data is not None
        assert (node.data - galloc.chunks(0)[0].base) % alignment == 0 or len(galloc.chunks(0)) > 1
        made_before = [t for t in ours if t.view_src is None and (t in graph.leafs or t in graph.nodes[:i])]
        for other in made_before:
            if other is node or needed_until.get(other, -1) <= i or other.buffer is not node.buffer:
                continue
            if node.is_empty or other.is_empty:
                continue
            assert other.data is not None
            apart = node.data + node.nbytes <= other.data or other.data + other.nbytes <= node.data
            assert apart, f"{node.name} overwrites {other.name}"


@ALWAYS
@given(st.lists(STEP, max_size=40), st.integers(1, 4), ALIGNMENTS, MAX_SIZES)
def test_live_tensors_never_overlap(
    program: list[tuple[str, int, int, int, int]], n_leaf: int, alignment: int, max_size: int
) -> None:
    """No node writes where a tensor lies that a later node reads, or that is an output; all are aligned."""
    ours, _, graph = _both(program, n_leaf)
    galloc = Gallocr([_buft(alignment=alignment, max_size=max_size)])
    galloc.reserve_n(graph, None, None)
    assert galloc.alloc_graph(graph)
    _assert_apart(ours, graph, galloc, alignment)


#: A program, and for each step other sources and another flag, or None for those that it has.
REWIRED = st.lists(
    st.tuples(STEP, st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(7, 8))), max_size=25
)


def _rewired(
    pairs: list[tuple[tuple[str, int, int, int, int], tuple[int, int, int] | None]],
) -> tuple[list[tuple[str, int, int, int, int]], list[tuple[str, int, int, int, int]]]:
    """Return a program, and one with as many steps whose sources and outputs differ."""
    first = [step for step, _ in pairs]
    return first, [step if other is None else (step[0], other[0], other[1], step[3], other[2]) for step, other in pairs]


@ALWAYS
@given(REWIRED)
def test_a_graph_in_the_layout_of_another_overwrites_nothing(
    pairs: list[tuple[tuple[str, int, int, int, int], tuple[int, int, int] | None]],
) -> None:
    """A graph of the same sizes with other sources or outputs gets a new layout if the kept one would overwrite what it needs."""
    first, second = _rewired(pairs)
    *_, graph_a = _both(first, 2)
    ours, _, graph_b = _both(second, 2)
    galloc = Gallocr([_buft()])
    galloc.reserve_n(graph_a, None, None)
    assert galloc.alloc_graph(graph_b)
    _assert_apart(ours, graph_b, galloc, 64)


@ALWAYS
@given(REWIRED)
def test_strict_placement_in_the_layout_of_another_graph_is_the_ports(
    pairs: list[tuple[tuple[str, int, int, int, int], tuple[int, int, int] | None]],
) -> None:
    """If one tensor stands at positions of several places, it gets upstream's, which is the first, node by node."""
    first, second = _rewired(pairs)
    _, plain_a, graph_a = _both(first, 2)
    ours, plain_b, graph_b = _both(second, 2)
    galloc = Gallocr([_buft(name="A"), _buft(name="B")], keeps_needed=False)
    port = PortGallocr([{"name": n, "alignment": 64} for n in "AB"], DIALECTS["0.26"])
    galloc.reserve_n(graph_a, None, None)
    port.reserve_n(plain_a[2:], plain_a[:2], [0] * len(first), [0] * 2)
    is_placed = galloc.alloc_graph(graph_b)
    assert is_placed == port.alloc_graph(plain_b[2:], plain_b[:2])
    if is_placed:
        base = galloc.chunks(0)[0].base
        expected = [None if t.data is None else t.data[2] for t in plain_b]
        assert [None if t.data is None else t.data - base for t in ours] == expected


@ALWAYS
@given(st.lists(STEP, max_size=25), st.lists(STEP, max_size=25))
def test_a_layout_is_reused_only_where_it_fits(
    first: list[tuple[str, int, int, int, int]], second: list[tuple[str, int, int, int, int]]
) -> None:
    """After one graph is laid out, whether another fits that layout is the port's answer."""
    _, plain_a, graph_a = _both(first, 2)
    _, plain_b, graph_b = _both(second, 2)
    bufts = [_buft(name="A"), _buft(name="B")]
    galloc = Gallocr(bufts, keeps_needed=False)
    port = PortGallocr([{"name": b.name, "alignment": 64} for b in bufts], DIALECTS["0.26"])
    galloc.reserve_n(graph_a, None, None)
    port.reserve_n(plain_a[2:], plain_a[:2], [0] * len(first), [0] * 2)
    assert galloc.alloc_graph(graph_b) == port.alloc_graph(plain_b[2:], plain_b[:2])
