"""Plans are light: no kernel is imported to ask for support, and a batch that cannot be is refused before it is made."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from pyggml.models.batch import Batch
from pyggml.models.context import ContextFlags
from pyggml.models.kv_cache import CacheFullError
from pyggml.models.placement import PlacementFlags
from pyggml.planning import Planner

PLAN = """
import sys
import pyggml
from pyggml.planning import Planner, PlacementFlags, ContextFlags
from pyggml.backends.cuda.ops import reason_refused
with Planner.open(
    "gpt-oss-20b", devices=["sim:rtx4090-pcie4"], placement=PlacementFlags(n_cpu_moe=4),
    context=ContextFlags(n_ctx=512), data=False,
) as planner:
    (planned,) = planner.plan_batch(64)
    cpu = pyggml.CPU(1)
    nodes = planned.graph.graph.nodes
    assert all(cpu.supports_op(node) for node in nodes)
    assert any(not reason_refused(node) for node in nodes)
print(sorted(name for name in sys.modules if name.split(".")[0] in ("numba", "llvmlite")))
"""


def test_support_is_asked_without_numba() -> None:
    """Planning a model, and asking the CPU and CUDA for each of its nodes, import neither Numba nor LLVM."""
    done = subprocess.run([sys.executable, "-c", PLAN], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_a_batch_beyond_the_context_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred million tokens are refused by their number; no list of them is made."""
    with Planner.open(
        "qwen3-8b", devices=["sim:rtx4090-pcie4"], context=ContextFlags(n_ctx=512), data=False
    ) as planner:

        def made(*arguments: Any, **options: Any) -> Batch:
            raise AssertionError("a batch was made")

        monkeypatch.setattr(Batch, "of", made)
        with pytest.raises(CacheFullError) as caught:
            planner.plan_batch(99_999_999)
        assert "99,999,999" in str(caught.value) or "99999999" in str(caught.value)


def test_groups_of_experts_where_no_token_has_an_output() -> None:
    """The first micro-batches of a long prompt have no outputs, so the last layer has no tokens, and chooses no groups, as in llama.cpp."""
    with Planner.open(
        "deepseek-v3", devices=["sim:rtx3090"], placement=PlacementFlags(cpu_moe=True), data=False
    ) as planner:
        graphs = planner.plan_batch(1024)
    names = [{n.name for n in made.graph.graph.nodes} for made in graphs]
    assert len(names) == 2
    assert ["ffn_moe_group_topk-60" in found for found in names] == [False, True]
    assert all("ffn_moe_group_topk-59" in found for found in names)
