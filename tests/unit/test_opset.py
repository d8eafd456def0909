"""An op is declared in one place: what its kernel refuses, how it is called, what it costs."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyggml as ggml
from pyggml.backends.cuda.ops import KERNELS
from pyggml.hardware.formulas import Work
from pyggml.opset import OPS, Role, kernels, node_work, reason_unsupported
from pyggml.opset.calls import by_elements, flat
from pyggml.opset.checks import not_f32_rows, source
from pyggml.opset.declaration import Choice, declare
from pyggml.tensor import Tensor
from pyggml.testing import op_cases, ref
from pyggml.types import Op

PACKAGE = Path(ggml.__file__).parent

#: Places in which an op is named because of what it is: its number, its builder, its declarations.
OWN = ("types.py", "ops/", "opset/", "backends/cuda/ops.py")
#: Places that name some ops for another reason; a new op is in none of them.
OTHERWISE = {
    "backends/host/ggml_safe.py": "where the CPU of a ggml library would end the process",
    "backends/libggml/": "the numbers of a library's ops are found by nodes that it makes",
    "llama/": "ops of captured graphs are found likewise",
    "models/": "a weight says which op reads it",
}
#: Ops that mean something to one who plans, and to whom.
MEANING = {
    "NONE": {"alloc", "backends", "graph.py", "replay", "sched", "tensor.py"},
    "VIEW": {"backends"},
    "PERMUTE": {"backends"},
    "CONT": {"backends"},  # passes on indices
    "DUP": {"backends"},
    "RESHAPE": {"backends"},
    "TRANSPOSE": {"backends"},
    "UNARY": {"tensor.py"},  # has sub-ops
    "GLU": {"tensor.py"},
    "CLAMP": {"alloc"},  # in place or not, by dialect
    "ADD_ID": {"sched"},
    "MUL_MAT": {"backend.py"},  # how many rows it works on
    "GET_ROWS": {"backend.py", "moe_cache"},
    "ROPE": {"backend.py", "sched"},
    "ROPE_BACK": {"backend.py"},
    "FLASH_ATTN_EXT": {"sched"},
}


def naming() -> dict[str, set[str]]:
    """Return the product files in which ``Op.X`` is, by X; the test kit aside."""
    files: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith("testing/"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Op":
                files.setdefault(node.attr, set()).add(name)
    return files


def test_an_op_is_named_in_few_files() -> None:
    """Beside its number and its builder, an op is in one module of `opset`, and in CUDA's if it has a kernel there."""
    left = {
        op: sorted(
            f for f in found if not f.startswith((*OWN, *OTHERWISE)) and f.split("/")[0] not in MEANING.get(op, ())
        )
        for op, found in naming().items()
    }
    assert {op: files for op, files in left.items() if files} == {}


def test_no_room_knows_the_op_of_experts() -> None:
    """Scheduler, caches, clock and commands ask what is declared: a second op with experts would be a declaration alone."""
    found = {f for f in naming()["MUL_MAT_ID"] if not f.startswith(OWN)}
    assert found == {"backends/host/ggml_safe.py", "backends/libggml/library.py", "models/weights.py"}


def test_an_op_is_declared_in_one_file() -> None:
    """No op is in two modules of `opset`, but for those that the rules of others look for."""
    in_opset = {op: {f for f in found if f.startswith("opset/")} for op, found in naming().items()}
    shared = {op for op, files in in_opset.items() if len(files) > 1}
    assert shared == {"MUL"}  # ROPE after a norm
    assert {op.name for op in OPS} <= {op for op, files in in_opset.items() if files}


def test_each_exception_is_needed() -> None:
    """Each place of the lists names an op."""
    found = naming()
    every = set().union(*found.values())
    assert not [place for place in OTHERWISE if not any(f.startswith(place) for f in every)]
    unused = {
        (op, m) for op, places in MEANING.items() for m in places if not any(f.split("/")[0] == m for f in found[op])
    }
    assert not unused


@pytest.mark.parametrize("table", [OPS, KERNELS], ids=["host", "cuda"])
def test_missing_sources_are_refused(table: Any) -> None:
    """Of each op with a kernel, a node without its sources is refused in words, on the host and on CUDA."""
    for op, kernel in table.items():
        if kernel.n_sources:
            assert "sources that it needs" in reason_unsupported(Tensor("f32", (4,), op=op), table), op.name
    assert reason_unsupported(Tensor("f32", (4,), op=Op.CONV_2D), table) == "there is no kernel for CONV_2D"


def test_each_kernel_has_a_case_and_a_definition() -> None:
    """Builders, kernels and definitions are tested with one table of cases, and no op with a kernel is missing in it."""
    made = {case.build()[case.result].op for case in (op_cases.of_op(op, 0) for op in op_cases.OPS)}
    assert set(OPS) <= made & ref.defined_ops()
    assert set(KERNELS) <= set(OPS)


def test_a_new_op_is_one_declaration() -> None:
    """Once an op is declared, the CPU plans and computes it, its cost rule holds, and a wrong type is refused in words."""
    with ggml.Graph() as graph:
        x = graph.input("f32", (8, 4), name="x")
        y = Tensor("f32", (8, 4), name="y", op=Op.MAP_CUSTOM1, src=(x,))
    assert reason_unsupported(y) == "there is no kernel for MAP_CUSTOM1"

    def call(plan: Any, t: Tensor) -> None:
        params = (kernels.elementwise.SQR, 0, 0, 0, 0)
        plan.add(kernels.elementwise.map_rows.address, t, flat(plan, t, source(t, 0)), params, **by_elements(t))

    declare(Op.MAP_CUSTOM1, refuses=not_f32_rows, call=call, work=lambda node, used: Work(flops=7.0))
    try:
        assert node_work(y, lambda node: 0.0).flops == 7.0
        assert reason_unsupported(Tensor("f16", (8,), op=Op.MAP_CUSTOM1, src=(x,))) == "dst '' is f16, not f32"
        graph.expand(y)
        sched = ggml.Scheduler([ggml.CPU(threads=1)])
        sched.alloc_graph(graph)
        x.set_array(np.arange(32, dtype="f4").reshape(4, 8))
        sched.compute(graph)
        assert (y.numpy() == np.arange(32, dtype="f4").reshape(4, 8) ** 2).all()
    finally:
        del OPS[Op.MAP_CUSTOM1]


def test_a_second_op_with_experts_is_one_declaration() -> None:
    """Of an op that is declared to use experts, wherever its sources are, the scheduler copies the experts that its ids name."""
    declare(
        Op.MAP_CUSTOM2, refuses=lambda t: "", call=lambda plan, t: None, n_sources=3, role=Role.PRODUCT,
        chooses=Choice(indices=1, chosen=2, dim=2, is_expert=True, used_only=True),
    )  # fmt: skip
    try:
        cpu, gpu = ggml.CPU(threads=1), ggml.Sim("rtx4090-pcie4", threads=1)
        weights = ggml.Context()
        up = weights.new_tensor("f32", (64, 8, 32), name="up")
        weights.alloc(cpu, usage="weights")
        with ggml.Graph() as graph:
            x, ids = graph.input("f32", (64, 1, 64), name="x"), graph.input("i32", (2, 64), name="ids")
            y = Tensor("f32", (8, 2, 64), name="y", op=Op.MAP_CUSTOM2, src=(x, ids, up))
            graph.expand(y)
        recording = ggml.Recording()
        sched = ggml.Scheduler([gpu, cpu], recorder=recording)
        sched.alloc_graph(graph)
        assert sched.tensor_backend(y) is gpu
        x.set_array(np.zeros((64, 1, 64)))
        ids.set_array(np.resize([3, 9, 4], (64, 2)))
        sched.compute(graph)
        sent = [r for r in recording.records if isinstance(r, ggml.CopyRecord) and r.tensor == "up"]
        assert {r.reason for r in sent} == {"experts"}
        assert up.nbytes * 3 / 32 <= sum(r.size_bytes for r in sent) < up.nbytes * 4 / 32
        (used,) = [r.used for r in recording.records if isinstance(r, ggml.UsedExpertsRecord)]
        assert list(used) == [3, 4, 9]
    finally:
        del OPS[Op.MAP_CUSTOM2]
