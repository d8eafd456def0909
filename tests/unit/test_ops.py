"""Names, views of views, slots, refusals and collection of what the builders make; shapes are tested in conformance."""

from __future__ import annotations

import inspect
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest

from pyggml import graph_context, ops
from pyggml.errors import GraphError, ShapeError
from pyggml.graph import Graph
from pyggml.tensor import Tensor
from pyggml.testing.op_cases import OPS, of_op, run
from pyggml.types import GluOp, Op, TensorFlag, Type, UnaryOp


def bits(value: float) -> int:
    """Return a float32's bits as an int32."""
    word: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return word


@pytest.fixture
def a() -> Tensor:
    """Return a leaf with four dimensions."""
    return Tensor("f32", (8, 6, 4, 2), name="a")


# -- names -----------------------------------------------------------------------


def test_views_are_named_after_their_source(a: Tensor) -> None:
    """Each kind of view and copy appends its own word to the name of its source."""
    made = {
        " (view)": ops.view_1d(a, 4, 0),
        " (reshaped)": ops.reshape_1d(a, 384),
        " (permuted)": ops.permute(a, 0, 2, 1, 3),
        " (transposed)": ops.transpose(a),
        " (cont)": ops.cont(a),
        " (copy)": ops.cast(a, "f16"),
    }
    assert [t.name for t in made.values()] == [f"a{suffix}" for suffix in made]


def test_names_pile_up_and_are_never_cut() -> None:
    """A view of a view carries both words, beyond the 63 bytes that upstream keeps."""
    a = Tensor("f32", (4, 4), name="x" * 60)
    assert ops.reshape_1d(ops.reshape_1d(a, 16), 16).name == "x" * 60 + " (reshaped) (reshaped)"


def test_a_name_is_taken_when_the_view_is_made(a: Tensor) -> None:
    """Renaming the source later does not rename its views."""
    view = ops.transpose(a)
    a.named("b")
    assert view.name == "a (transposed)"


def test_a_view_of_a_nameless_tensor_is_named_by_its_suffix(a: Tensor) -> None:
    """The suffix of a view of an unnamed tensor keeps its leading space."""
    assert ops.scale_inplace(ops.scale(a, 2.0), 2.0).name == " (view)"


def test_cpy_is_named_after_both(a: Tensor) -> None:
    """A copy into a named tensor names both, into a nameless one only the source."""
    assert ops.cpy(a, Tensor("f16", (8, 6, 4, 2), name="b")).name == "b (copy of a)"
    assert ops.cpy(a, Tensor("f16", (8, 6, 4, 2))).name == "a (copy)"


def test_computed_tensors_have_no_name(a: Tensor) -> None:
    """An op with new memory names nothing; the graph numbers it."""
    assert ops.add(a, a).name == ""


# -- views -----------------------------------------------------------------------


def test_a_view_of_a_view_belongs_to_the_owner(a: Tensor) -> None:
    """Views name the tensor that owns the memory, with offsets added up; their source is what they were made of."""
    first = ops.view_2d(a, 8, 4, a.nb[1], 2 * a.nb[1])
    second = ops.view_1d(first, 3, 8)
    assert second.view_src is a
    assert second.view_offs == 2 * 32 + 8
    assert second.src == [first]
    assert second.op_params == (8, 0)  # its own offset alone


def test_an_offset_beyond_32_bits_takes_two_words() -> None:
    """The offset of a view is a size: low word first."""
    huge = Tensor("f32", (2**20, 2**14), name="huge")
    assert ops.view_1d(huge, 4, 2**33 + 2**31).op_params == (-(2**31), 2)


def test_permuted_back_is_the_same_layout(a: Tensor) -> None:
    """Permuting there and back gives the source's shape and strides."""
    back = ops.permute(ops.permute(a, 2, 0, 3, 1), 1, 3, 0, 2)
    assert (back.ne, back.nb) == (a.ne, a.nb)


def test_in_place_ops_share_layout_and_memory(a: Tensor) -> None:
    """An op in place is a view with the source's strides, gaps included."""
    gaps = ops.view_2d(a, 4, 6, a.nb[1], 0)
    made = ops.add_inplace(gaps, gaps)
    assert (made.op, made.nb, made.view_src) == (Op.ADD, gaps.nb, a)


def test_views_of_allocated_memory_know_their_address(a: Tensor) -> None:
    """A view of a tensor that has memory has its address at once."""
    a.data = 4096
    assert ops.view_1d(a, 4, 16).data == 4112


def test_set_rows_is_a_view_of_its_last_source(a: Tensor) -> None:
    """SET_ROWS keeps rows, indices, destination in that order, and is the destination."""
    rows, index = Tensor("f32", (8, 3, 4, 2), name="rows"), Tensor("i64", (3, 4, 2), name="index")
    made = ops.set_rows(a, rows, index)
    assert made.src == [rows, index, a]
    assert (made.view_src, made.name) == (a, "a (view)")


def test_a_cast_is_its_own_second_source_and_can_be_expanded(a: Tensor) -> None:
    """CAST names itself as destination, and a graph takes it nevertheless."""
    made = ops.cast(a, Type.F16)
    assert made.src == [a, made]
    graph = Graph()
    graph.expand(made)
    graph.check()
    assert (graph.nodes, graph.use_counts[made]) == ([made], 1)


# -- slots and parameters --------------------------------------------------------


def test_absent_sources_keep_their_slots(a: Tensor) -> None:
    """Optional sources that are absent are None, so that others stay in upstream's places."""
    pos = Tensor("i32", (4,), name="pos")
    k = Tensor("f16", (8, 5, 2, 2), name="k")
    assert ops.soft_max(a).src == [a, None, None]
    assert ops.rope(a, pos, 8, ops.RopeType.NEOX).src == [a, pos, None]
    assert ops.swiglu(a).src == [a, None]
    assert ops.flash_attn_ext(a, k, k, None, 1.0, 0.0, 0.0).src == [a, k, k, None, None]


def test_sinks_enter_their_slot(a: Tensor) -> None:
    """Sinks are set once, taken away with None, and refused a second time."""
    made, sinks = ops.soft_max_ext(a, None, 1.0, 0.0), Tensor("f32", (4,), name="sinks")
    ops.soft_max_add_sinks(made, sinks)
    assert made.src[2] is sinks
    with pytest.raises(ShapeError, match="already has sinks"):
        ops.soft_max_add_sinks(made, sinks)
    ops.soft_max_add_sinks(made, None)
    assert made.src[2] is None


def test_parameters_that_only_0_26_has(a: Tensor) -> None:
    """Builders that the library at hand lacks keep their parameters where ggml 0.26 reads them."""
    clamped = ops.clamp(a, -1.0, 2.0)
    assert (clamped.op, clamped.view_src, clamped.op_params) == (Op.CLAMP, None, (bits(-1.0), bits(2.0)))
    gate = ops.swiglu_clamp(a, a, 7.0)
    assert gate.op_params == (GluOp.SWIGLU_CLAMP, 0, 0, bits(7.0))
    rope = ops.rope_set_offset(ops.rope(a, Tensor("i32", (4,)), 4, 0), 2)
    assert (len(rope.op_params), rope.param_i32(15)) == (16, 2)
    flash = ops.flash_attn_ext(a, a, a, None, 1.0, 0.0, 0.0)
    ops.flash_attn_ext_set_prec(flash, ops.Prec.F32)
    ops.flash_attn_ext_set_n_kv_max(flash, 9)
    assert (flash.param_i32(3), flash.param_i32(4)) == (10, 9)
    assert ops.flash_attn_ext_get_prec(flash) is ops.Prec.F32


def test_precision_of_a_multiplication() -> None:
    """`prec_set_acc` and `prec_set_src` set words 0 and 3 of a multiplication, and tell where there is none."""
    a = Tensor("f32", (8, 6), name="a")
    made = ops.mul_mat(a, a)
    assert ops.prec_set_acc(made, ops.Prec.F32)
    assert ops.prec_set_src(made, ops.Prec.Q8, 1)
    assert made.op_params == (10, 0, 0, 30)
    assert not ops.prec_set_src(made, ops.Prec.Q8, 0)
    assert not ops.prec_set_acc(a, ops.Prec.F32)
    with pytest.raises(ShapeError):
        ops.prec_set_src(made, ops.Prec.Q8, 10)


def test_numbers_too_large_for_a_float_become_infinite(a: Tensor) -> None:
    """A parameter beyond float32 is infinite, as C converts it."""
    assert ops.scale(a, 1e39).param_f32(0) == float("inf")
    assert ops.scale(a, -1e39).param_f32(0) == float("-inf")


def test_descriptions_name_the_function(a: Tensor) -> None:
    """UNARY and GLU are described by their function."""
    assert ops.silu(a).op_desc == "SILU"
    assert ops.unary(a, UnaryOp.EXP).op_desc == "EXP"
    assert ops.geglu_split(a, a).op_desc == "GEGLU"
    assert (ops.silu.__name__, ops.geglu_split.__name__) == ("silu", "geglu_split")


# -- refusals --------------------------------------------------------------------


def test_a_refusal_tells_op_tensors_and_shapes() -> None:
    """The error carries the builder's name and shows each tensor with its type, shape and gaps."""
    a, b = Tensor("q8_0", (32, 6), name="w"), Tensor("f32", (6, 32), name="x")
    with pytest.raises(ShapeError, match=r"mul_mat: .*'w' q8_0 \[32, 6, 1, 1\].*'x' f32 \[6, 32, 1, 1\]") as caught:
        ops.mul_mat(a, b)
    assert caught.value.op == "mul_mat"
    with pytest.raises(ShapeError, match=r"not contiguous.*nb \[24, 4, 768, 768\]"):
        ops.reshape_1d(ops.transpose(b), 192)


def test_refusals_survive_pickling() -> None:
    """An error sent to another process keeps its text and fields."""
    a = Tensor("f32", (4, 3), name="a")
    with pytest.raises(ShapeError) as caught:
        ops.concat(a, a, 7)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.op) == (str(caught.value), "concat")


def test_a_view_past_the_end_is_refused(a: Tensor) -> None:
    """A view must end within the tensor that owns the memory, not only within its source."""
    assert ops.view_1d(a, 384, 0).nbytes == a.nbytes
    with pytest.raises(ShapeError, match="past the 1,536 bytes of 'a'"):
        ops.view_1d(a, 384, 4)
    tail = ops.view_1d(a, 4, 1520)
    with pytest.raises(ShapeError, match="from byte 1,524 on"):
        ops.view_1d(tail, 4, 4)


@pytest.mark.parametrize("call", ["reshape_2d(a, -8, -48)", "view_1d(a, -1, 0)", "view_1d(a, 1, -4)", "top_k(a, -1)"])
def test_negative_sizes_are_refused(a: Tensor, call: str) -> None:
    """Sizes and offsets below 0 are refused even where their product fits."""
    with pytest.raises(ShapeError, match="a dimension cannot"):
        eval(f"ops.{call}", {"ops": ops, "a": a})


def test_a_row_of_broken_blocks_is_refused(a: Tensor) -> None:
    """A new quantised tensor has rows of whole blocks; upstream's release builds make one that reads out of bounds."""
    with pytest.raises(ShapeError, match="whole q8_0 blocks"):
        ops.cast(a, "q8_0")


def test_dimensions_of_nothing_divide_nothing() -> None:
    """Where upstream divides by an empty dimension and crashes, the builder refuses."""
    with pytest.raises(ShapeError):
        ops.mul_mat(Tensor("f32", (4, 3, 0)), Tensor("f32", (4, 3, 2)))
    with pytest.raises(ShapeError):
        ops.soft_max_ext(Tensor("f32", (4, 3, 2)), Tensor("f32", (4, 3, 0)), 1.0, 0.0)


@pytest.mark.parametrize(
    "setter", ["mul_mat_set_prec", "mul_mat_set_hint", "flash_attn_ext_set_prec", "flash_attn_ext_set_n_kv_max"]
)
def test_setters_refuse_other_ops(a: Tensor, setter: str) -> None:
    """A setter of one op's parameter refuses a tensor that another op made."""
    with pytest.raises(ShapeError, match="made by NONE"):
        getattr(ops, setter)(a, 0)


def test_rope_offsets_that_cannot_be_are_refused(a: Tensor) -> None:
    """A rope's offset is not negative, and VISION has none."""
    rope = ops.rope(a, Tensor("i32", (4,)), 4, 0)
    vision = ops.rope(a, Tensor("i32", (16,)), 4, ops.RopeType.VISION)
    for made, n_offs in ((rope, -2), (vision, 2), (a, 2)):
        with pytest.raises(ShapeError):
            ops.rope_set_offset(made, n_offs)


@pytest.mark.parametrize(
    ("start", "stop", "step"), [(0.0, 0.0, 1.0), (1.0, 0.0, 1.0), (0.0, 1.0, 0.0), (0.0, 1.0, -1.0)]
)
def test_an_arange_of_nothing_is_refused(start: float, stop: float, step: float) -> None:
    """An arange has at least one element."""
    with pytest.raises(ShapeError):
        ops.arange(start, stop, step)


# -- collection ------------------------------------------------------------------


def test_a_graph_collects_what_is_made_in_its_block(a: Tensor) -> None:
    """Every tensor that builders make inside the block is told to the graph, hidden ones too, and none after it."""
    graph = Graph()
    with graph:
        made = ops.argsort_top_k(a, 3)
    ops.scale(a, 2.0)
    assert graph.made == [made.src[0], made]
    assert graph_context.current.get() is None


def test_blocks_nest_and_end_with_errors(a: Tensor) -> None:
    """An inner block collects for itself, and a refusal leaves the outer one in place."""
    outer, inner = Graph(), Graph()
    with outer:
        with pytest.raises(GraphError), inner:
            ops.concat(a, a, 9)
        ops.scale(a, 2.0)
    assert (len(outer.made), len(inner.made)) == (1, 0)


def test_another_thread_is_not_collected(a: Tensor) -> None:
    """A block collects what its own thread makes."""
    graph = Graph()
    with graph, ThreadPoolExecutor(1) as pool:
        pool.submit(ops.scale, a, 2.0).result()
    assert graph.made == []


def test_flags_are_not_inherited(a: Tensor) -> None:
    """What an op makes of a flagged tensor, views included, has no flags."""
    a.flags |= TensorFlag.INPUT | TensorFlag.OUTPUT
    assert [t.flags for t in (ops.view_1d(a, 4, 0), ops.cont(a), ops.add_inplace(a, a))] == [0, 0, 0]


# -- arguments of another kind -----------------------------------------------------


@pytest.mark.parametrize("name", OPS)
def test_an_argument_that_is_no_tensor_is_named(name: str) -> None:
    """Each builder names the argument, says what it got, and takes it by keyword as well."""
    case = of_op(name, 0)
    last = max(i for i, step in enumerate(case.steps) if step[0] == name)
    values = run(case.steps[:last])
    given = [values[a["t"]] if isinstance(a, dict) else a for a in case.steps[last][1:]]
    build = getattr(ops, name)
    for parameter, value in zip(inspect.signature(build).parameters.values(), given, strict=False):
        if not str(parameter.annotation).startswith("Tensor"):
            continue
        for wrong, shown in ((3, "3"), ([1.0], "of type list")):
            arguments = dict(zip(inspect.signature(build).parameters, given, strict=False)) | {parameter.name: wrong}
            with pytest.raises(ShapeError, match=rf"{parameter.name} is {shown}, not a tensor") as caught:
                build(**arguments)
            assert caught.value.op == name
        assert value is None or isinstance(value, Tensor)


def test_a_missing_tensor_and_a_number_that_is_none_are_named(a: Tensor) -> None:
    """None stands for a tensor only where one may be absent; a wrong number of arguments is Python's own error."""
    with pytest.raises(ShapeError, match="mul_mat: b is None, not a tensor"):
        ops.mul_mat(a, None)
    with pytest.raises(ShapeError, match=r"scale: s is 'x', not a number$"):
        ops.scale(a, "x")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'b'"):
        ops.add(a)
