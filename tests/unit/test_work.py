"""Operations and bytes of nodes, counted from shapes."""

from __future__ import annotations

import pytest

import pyggml as ggml
from pyggml.types import Op
from pyggml.work import node_work


def _no_experts(node) -> float:
    raise AssertionError(f"'{node.name}' has no experts")


def test_a_product_counts_two_operations_an_element_and_reads_its_weight_once():
    """MUL_MAT: 2·k·m·n operations; weight, activations and result in bytes."""
    with ggml.Graph() as graph:
        w, x = graph.input("f32", (64, 32), name="w"), graph.input("f32", (64, 5), name="x")
        y = ggml.mul_mat(w, x)
    work = node_work(y, _no_experts)
    assert work.flops == 2 * 64 * 32 * 5
    assert work.n_bytes == w.nbytes + x.nbytes + y.nbytes
    assert work.is_f32
    assert not work.is_int8


def test_a_product_of_quantised_weights_quantises_its_activations_first():
    """Two launches, and products of 8 bits."""
    with ggml.Graph() as graph:
        y = ggml.mul_mat(graph.input("q8_0", (64, 32), name="w"), graph.input("f32", (64, 5), name="x"))
    work = node_work(y, _no_experts)
    assert work.is_int8
    assert work.n_kernels == 2


@pytest.mark.parametrize(("used", "share"), [(0, 0.0), (2, 0.25), (8, 1.0), (99, 1.0)])
def test_experts_that_are_not_used_are_not_read(used, share):
    """MUL_MAT_ID reads its weight in proportion to the experts that are used."""
    with ggml.Graph() as graph:
        w = graph.input("f32", (64, 32, 8), name="w")
        x, ids = graph.input("f32", (64, 1, 5), name="x"), graph.input("i32", (2, 5), name="ids")
        y = ggml.mul_mat_id(w, x, ids)
    work = node_work(y, lambda _: used)
    assert work.n_bytes == share * w.nbytes + x.nbytes + y.nbytes
    assert work.flops == 2 * 64 * 32 * 2 * 5


def test_rows_that_are_picked_are_read_and_not_their_table():
    """GET_ROWS reads as many rows as it gives."""
    with ggml.Graph() as graph:
        table, ids = graph.input("f32", (64, 1000), name="table"), graph.input("i32", (3,), name="ids")
        y = ggml.get_rows(table, ids)
    assert node_work(y, _no_experts).n_bytes == y.nbytes + 3 * 64 * 4 + ids.nbytes


def test_views_take_nothing():
    """A node that computes nothing is no kernel."""
    with ggml.Graph() as graph:
        y = ggml.reshape_1d(graph.input("f32", (64, 2), name="x"), 128)
    assert y.op is Op.RESHAPE
    assert node_work(y, _no_experts).n_kernels == 0
