"""Operations and bytes of nodes, counted from shapes."""

from __future__ import annotations

import pytest

import pyggml as ggml
from pyggml.foresight.counts import product_work
from pyggml.foresight.shape import Product
from pyggml.hardware.formulas import Kind
from pyggml.opset import OPS, node_work
from pyggml.routing import LogNormal
from pyggml.types import Op, Type


def _no_experts(node) -> float:
    raise AssertionError(f"'{node.name}' has no experts")


def test_a_product_counts_two_operations_an_element_and_reads_its_weight_once():
    """MUL_MAT: 2·k·m·n operations; weight, activations and result in bytes."""
    with ggml.Graph() as graph:
        w, x = graph.input("f32", (64, 32), name="w"), graph.input("f32", (64, 5), name="x")
        y = ggml.mul_mat(w, x)
    work = node_work(y, _no_experts)
    assert (work.kind, work.type) == (Kind.PRODUCT, Type.F32)
    assert work.flops == 2 * 64 * 32 * 5
    assert work.read_bytes == w.nbytes
    assert work.moved_bytes == 4 * 5 * (0.75 * 64 + 1.5 * 32)
    assert (work.columns, work.matrices, work.n_tokens) == (5, 1, 5)


def test_nodes_and_layers_count_alike():
    """What a product in a graph asks equals what foresight counts of the same weight, but for the launch."""
    with ggml.Graph() as graph:
        y = ggml.mul_mat(graph.input("q8_0", (64, 32), name="w"), graph.input("f32", (64, 5), name="x"))
        w = graph.input("q4_0", (64, 32, 8), name="e")
        x, ids = graph.input("f32", (64, 1, 5), name="x1"), graph.input("i32", (2, 5), name="ids")
        z = ggml.mul_mat_id(w, x, ids)
    counted = product_work(Product(Type.Q8_0, 64, 32), 5, 2, LogNormal(1.0))
    assert node_work(y, _no_experts) == counted._replace(n_kernels=1)
    counted = product_work(Product(Type.Q4_0, 64, 32, 8, is_expert=True), 5, 2, LogNormal(1.0))
    assert node_work(z, lambda _: counted.matrices) == counted._replace(n_kernels=1)


def test_what_another_kernel_does_takes_nothing():
    """A norm's weight, a gate and the sum of experts are part of the kernel before; a residual sum is one of its own."""
    with ggml.Graph() as graph:
        x, w = graph.input("f32", (64, 5), name="x"), graph.input("f32", (64,), name="w")
        norm = ggml.rms_norm(x, 1e-5)
        scaled = ggml.mul(norm, w)
        gate = ggml.swiglu_split(scaled, x)
        added = ggml.add(gate, x)
        experts = graph.input("f32", (64, 2, 5), name="experts")
        first, second = (ggml.view_2d(experts, 64, 5, 512, i * 256) for i in range(2))
        summed = ggml.add(first, second)
    works = [node_work(t, _no_experts) for t in (norm, scaled, gate, added, summed)]
    assert [w.n_kernels for w in works] == [1, 0, 0, 1, 0]
    assert [w.moved_bytes > 0 for w in works] == [True, False, False, True, False]


def test_hidden_scores_take_nothing():
    """Flash attention over a causal mask computes half of the last tokens' scores; without a mask all."""
    with ggml.Graph() as graph:
        q, k = graph.input("f32", (64, 8, 4), name="q"), graph.input("f16", (64, 8, 2), name="k")
        v, mask = graph.input("f16", (64, 8, 2), name="v"), graph.input("f16", (8, 8), name="mask")
        masked, bare = (ggml.flash_attn_ext(q, k, v, m, 1.0, 0.0, 0.0) for m in (mask, None))
    assert node_work(bare, _no_experts).flops == 2 * 8 * 8 * 4 * 128
    assert node_work(masked, _no_experts).flops == node_work(bare, _no_experts).flops / 2


@pytest.mark.parametrize(("used", "share"), [(0, 0.0), (2, 0.25), (8, 1.0), (99, 1.0)])
def test_experts_that_are_not_used_are_not_read(used, share):
    """MUL_MAT_ID reads its weight in proportion to the experts that are used."""
    with ggml.Graph() as graph:
        w = graph.input("f32", (64, 32, 8), name="w")
        x, ids = graph.input("f32", (64, 1, 5), name="x"), graph.input("i32", (2, 5), name="ids")
        y = ggml.mul_mat_id(w, x, ids)
    work = node_work(y, lambda _: used)
    assert work.read_bytes == share * w.nbytes
    assert work.matrices == min(used, 8)
    assert work.flops == 2 * 64 * 32 * 2 * 5


def test_rows_that_are_picked_are_read_and_not_their_table():
    """GET_ROWS reads as many rows as it gives."""
    with ggml.Graph() as graph:
        table, ids = graph.input("f32", (64, 1000), name="table"), graph.input("i32", (3,), name="ids")
        y = ggml.get_rows(table, ids)
    assert node_work(y, _no_experts).moved_bytes == y.nbytes + 3 * 64 * 4 + ids.nbytes


def test_views_take_nothing():
    """A node that computes nothing is no kernel."""
    with ggml.Graph() as graph:
        y = ggml.reshape_1d(graph.input("f32", (64, 2), name="x"), 128)
    assert y.op is Op.RESHAPE
    assert node_work(y, _no_experts).n_kernels == 0


def test_recurrent_ops_count_their_state_for_each_token():
    """GATED_DELTA_NET takes eight operations, SSM_SCAN seven, for each element of the state and token; twice the tokens, twice as much."""

    def delta(n_token: int):
        with ggml.Graph() as graph:
            q, k, v = (graph.input("f32", (16, 4, n_token, 1), name=name) for name in "qkv")
            g, beta = (graph.input("f32", (1, 4, n_token, 1), name=name) for name in ("g", "beta"))
            state = graph.input("f32", (16, 16, 4, 1), name="state")
            return node_work(ggml.gated_delta_net(q, k, v, g, beta, state, 1), _no_experts)

    assert delta(3).flops == 8 * 16 * 16 * 4 * 3
    assert delta(6).flops == 2 * delta(3).flops
    with ggml.Graph() as graph:
        s = graph.input("f32", (8, 4, 2, 1), name="s")
        x, dt = graph.input("f32", (4, 2, 5, 1), name="x"), graph.input("f32", (2, 5, 1), name="dt")
        a = graph.input("f32", (1, 2), name="A")
        b, c = (graph.input("f32", (8, 1, 5, 1), name=name) for name in "BC")
        y = ggml.ssm_scan(s, x, dt, a, b, c, graph.input("i32", (1,), name="ids"), 1)
    assert node_work(y, _no_experts).flops == 7 * 8 * 4 * 2 * 5


def test_linear_attention_and_hyper_connections_count_what_they_add_up():
    """RWKV's ops and gated linear attention count each element of the state and token; hyper-connections each stream that is read."""
    with ggml.Graph() as graph:
        k, v, r, w, a, b = (graph.input("f32", (16, 4, 3), name=name) for name in "kvrwab")
        state, bonus = graph.input("f32", (16 * 16 * 4, 1), name="s"), graph.input("f32", (16, 4), name="f")
        six, gated = ggml.rwkv_wkv6(k, v, r, bonus, w, state), ggml.gated_linear_attn(k, v, r, w, state, 1.0)
        seven = ggml.rwkv_wkv7(r, w, k, v, a, b, state)
        streams, block = graph.input("f32", (32, 4, 3), name="x"), graph.input("f32", (32, 3), name="y")
        weights, mixed = graph.input("f32", (4, 3), name="w"), graph.input("f32", (4, 4, 3), name="c")
        pre, post = ggml.dsv4_hc_pre(streams, weights), ggml.dsv4_hc_post(block, streams, weights, mixed)
        kept = ggml.dsv4_hc_post(block, streams, weights, None)
    flops = [node_work(node, _no_experts).flops for node in (gated, six, seven)]
    assert flops == [n * 16 * 16 * 4 * 3 for n in (5, 7, 9)]
    assert [node_work(node, _no_experts).flops for node in (pre, post, kept)] == [n * 32 * 4 * 3 for n in (2, 10, 4)]


def test_products_that_are_no_mul_mat_count_what_they_sum_over():
    """OUT_PROD, SOLVE_TRI and LIGHTNING_INDEXER are charged by the length of their sums, not by the size of their result alone."""
    with ggml.Graph() as graph:
        outer = ggml.out_prod(graph.input("f32", (6, 32), name="a"), graph.input("f32", (5, 32), name="b"))
        a, b = graph.input("f32", (16, 16), name="A"), graph.input("f32", (3, 16), name="B")
        solved = ggml.solve_tri(a, b, True, True, False)
        q, k = graph.input("f32", (32, 4, 2, 1), name="q"), graph.input("f32", (32, 1, 7, 1), name="k")
        weights, mask = graph.input("f32", (4, 2, 1, 1), name="w"), graph.input("f16", (7, 2, 1, 1), name="m")
        scores = ggml.lightning_indexer(q, k, weights, mask)
    assert node_work(outer, _no_experts).flops == 2 * 32 * 6 * 5
    assert node_work(solved, _no_experts).flops == 16 * 3 * 16
    assert node_work(scores, _no_experts).flops == 2 * 33 * 4 * 7 * 2


def test_a_node_without_sources_has_work():
    """ARANGE writes its row and reads nothing."""
    row = ggml.arange(0.0, 5.0, 1.0)
    assert (node_work(row, _no_experts).flops, node_work(row, _no_experts).moved_bytes) == (5, 20)


def test_ops_that_are_declared_compute():
    """No view is declared, nor NONE."""
    assert not [op.name for op in OPS if op.is_empty]
