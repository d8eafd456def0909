"""`docs/ops.md`, the table of the support for each op and type, says what the code does.

``python tests/conformance/test_op_table.py --update`` writes it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pyggml import ops
from pyggml.opset import supports_op
from pyggml.tensor import Tensor
from pyggml.testing import ref
from pyggml.testing.op_cases import OPS, SETTER, of_op
from pyggml.types import Op, Type

PAGE = Path(__file__).parents[2] / "docs" / "ops.md"
#: Why an op is missing.
WHY = {
    "training": {
        "REPEAT_BACK", "SILU_BACK", "RMS_NORM_BACK", "GET_ROWS_BACK", "SOFT_MAX_BACK", "IM2COL_BACK", "POOL_2D_BACK",
        "FLASH_ATTN_BACK", "CROSS_ENTROPY_LOSS", "CROSS_ENTROPY_LOSS_BACK", "OPT_STEP_ADAMW", "OPT_STEP_SGD",
    },
    "images and audio": {
        "CONV_TRANSPOSE_1D", "IM2COL", "IM2COL_3D", "COL2IM_1D", "CONV_2D", "CONV_3D", "CONV_2D_DW",
        "CONV_TRANSPOSE_2D", "POOL_1D", "POOL_2D", "UPSCALE", "PAD_REFLECT_1D", "TIMESTEP_EMBEDDING", "WIN_PART",
        "WIN_UNPART", "GET_REL_POS", "ADD_REL_POS",
    },
    "a C function of the caller": {"MAP_CUSTOM1", "MAP_CUSTOM2", "MAP_CUSTOM3", "CUSTOM"},
}  # fmt: skip


def _result(op: str, i: int) -> Tensor:
    case = of_op(op, i)
    made = case.build()[case.result]
    assert made is not None
    return made


def builders_by_op() -> dict[Op, list[str]]:
    """Return the builders whose cases are nodes of each op."""
    table: dict[Op, list[str]] = {}
    for name in sorted(OPS):
        if not SETTER.search(name):
            table.setdefault(_result(name, 0).op, []).append(name)
    return table


def _op_rows() -> list[str]:
    builders = builders_by_op()
    kernels = {t.op for op in OPS for t in (_result(op, i) for i in range(6)) if supports_op(t)}
    why = {name: reason for reason, names in WHY.items() for name in names}
    rows = []
    for op in sorted(set(Op) - {Op.NONE}, key=lambda op: op.name):
        found = [f"`{name}`" for name in builders.get(op, ())]
        shown = ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
        kernel = "a view: nothing to do" if op.is_view else _yes(op in kernels)
        rows.append(
            f"| {op.name} | {shown or why[op.name]} | {kernel} | {_yes(op in ref.defined_ops())} | {_yes(op in builders)} |"
        )
    return rows


def _yes(there: bool) -> str:
    return "yes" if there else "-"


def _takes(type: Type) -> dict[str, bool]:
    """Return what the CPU backend does with rows of a type."""
    n, f32 = 256, Tensor("f32", (256, 4))
    a, matrices = Tensor(type, (n, 4)), Tensor(type, (n, 4, 2))
    ids, which = Tensor("i32", (3,)), Tensor("i32", (2, 1))
    q, kv = Tensor("f32", (n, 1, 1)), Tensor(type, (n, 4, 1))
    return {
        "MUL_MAT, MUL_MAT_ID": supports_op(ops.mul_mat(a, f32))
        and supports_op(ops.mul_mat_id(matrices, Tensor("f32", (n, 1, 1)), which)),
        "GET_ROWS": supports_op(ops.get_rows(a, ids)),
        "SET_ROWS": supports_op(ops.set_rows(a, Tensor("f32", (n, 3)), ids)),
        "CPY to": supports_op(ops.cpy(f32, a)),
        "CPY from": supports_op(ops.cpy(a, f32)),
        "keys and values of FLASH_ATTN_EXT": supports_op(ops.flash_attn_ext(q, kv, kv, None, 1.0, 0.0, 0.0)),
    }


def _type_rows() -> list[str]:
    kinds = [t for t in Type if t not in (Type.I8, Type.I16, Type.I64, Type.F64, Type.Q8_1, Type.Q8_K)]
    columns = list(_takes(Type.F32))
    rows = [f"| type | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    return rows + [
        f"| {type.ggml_name} | {' | '.join(_yes(there) for there in _takes(type).values())} |" for type in kinds
    ]


def page() -> str:
    """Return the page."""
    lines = [
        "# Ops and types",
        "",
        "The support for each op of ggml 0.26. *Kernel*: the CPU backend computes it; simulated devices use the same",
        "kernels. *Definition*: numpy code in `pyggml.testing.ref`. *Checked*: tests compare kernel and definition with",
        "libggml in random cases of shapes, views, broadcasts and types (`tests/conformance/test_cpu_ops.py`).",
        "[cuda.md](cuda.md) lists what the CUDA backend runs.",
        "`python tests/conformance/test_op_table.py --update` writes the tables; a test compares them with the code.",
        "",
        "| op | builders | kernel | definition | checked |",
        "| --- | --- | --- | --- | --- |",
        *_op_rows(),
        "",
        "## Types",
        "",
        "Rows of quantised types are equal byte for byte to those of ggml's CPU backend on x86-64",
        "(`tests/unit/kernels/test_quantise.py`). Row ids are I32 or I64. Other ops take F32, with these exceptions:",
        "ROPE also takes F16; masks are F16 or F32; CPY, CONT, DUP, REPEAT, CONCAT and GET_ROWS also move I32; products",
        "with float weights take activations of F32, F16 and BF16; ops that only move bytes (REPEAT, CONCAT, copies to the",
        "same type) take any type that is not quantised.",
        "",
        *_type_rows(),
        "",
        "Types without SET_ROWS and CPY to can only be read. Their floats are bit-equal to libggml's",
        "(`tests/unit/kernels/test_coded.py`). Their kernels are compiled and cached when a model first needs them.",
        "[perf.md](perf.md) has their speed.",
        "",
    ]
    return "\n".join(lines)


def test_page_says_what_the_code_does() -> None:
    """The page is what the tables' program writes now."""
    assert PAGE.read_text() == page(), "run: python tests/conformance/test_op_table.py --update"


def test_every_op_is_there_or_has_a_reason() -> None:
    """An op has a builder with cases and a definition, or none of them and a reason."""
    reasons = set().union(*WHY.values())
    defined, made = ref.defined_ops(), builders_by_op()
    for op in set(Op) - {Op.NONE}:
        assert (op.name in reasons) == (op not in made) == (op not in defined), op.name


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(__doc__)
    PAGE.write_text(page())
