"""The arithmetic of layouts, against numpy's own view of memory."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyggml.errors import GraphError, ShapeError
from pyggml.tensor import Tensor, are_same_layout, contiguous_nb, dup_layout, pack_params, view_tensor
from pyggml.types import Op, TensorFlag, Type, UnaryOp

SIZES = st.lists(st.integers(1, 5), min_size=4, max_size=4)
COMMON = settings(derandomize=True, deadline=None, max_examples=150, database=None)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Tensor, np.ndarray]:
    """Draw a tensor whose layout is a slice of permuted memory, and numpy's view of the same."""
    ne = draw(SIZES)
    memory = np.zeros(ne[::-1], draw(st.sampled_from(["f4", "f2", "i4", "i8"])))
    view = memory.transpose(draw(st.permutations(range(4))))
    view = view[tuple(slice(draw(st.integers(0, n - 1)), None) for n in view.shape)]
    type = {"f4": "f32", "f2": "f16", "i4": "i32", "i8": "i64"}[memory.dtype.str[1:]]
    return Tensor(type, view.shape[::-1], view.strides[::-1]), view


@COMMON
@given(layouts())
def test_layout_agrees_with_numpy(drawn: tuple[Tensor, np.ndarray]) -> None:
    """Counts, spans and orders are those of a numpy array with the same strides."""
    tensor, view = drawn
    assert tensor.numel == view.size
    assert tensor.nrows == view.size // view.shape[-1]
    low, high = np.lib.array_utils.byte_bounds(view)
    assert tensor.nbytes == high - low
    assert tensor.row_size == view.shape[-1] * view.itemsize
    squeezed = view
    while squeezed.ndim > 1 and squeezed.shape[0] == 1:
        squeezed = squeezed[0]
    assert (tensor.shape, tensor.strides, tensor.n_dims) == (squeezed.shape, squeezed.strides, squeezed.ndim)


@COMMON
@given(layouts())
def test_contiguous_means_what_numpy_means(drawn: tuple[Tensor, np.ndarray]) -> None:
    """A tensor is contiguous exactly if numpy's view of it is C-contiguous."""
    tensor, view = drawn
    assert tensor.is_contiguous() == view.flags.c_contiguous


@COMMON
@given(layouts(), st.integers(1, 3))
def test_contiguous_from_a_dimension_on(drawn: tuple[Tensor, np.ndarray], n: int) -> None:
    """Contiguous from dimension n on: rows are dense, and above n no further gaps are."""
    tensor, view = drawn
    # dimensions up to n seen as one element of the size that dimension n spans
    span = view.strides[3 - n] * view.shape[3 - n]
    dense_rows = view.shape[3] == 1 or view.strides[3] == view.itemsize
    upper, expected = span, dense_rows
    for axis in range(2 - n, -1, -1):
        expected = expected and (view.shape[axis] == 1 or view.strides[axis] == upper)
        upper *= view.shape[axis]
    assert tensor.is_contiguous(n) == expected


@COMMON
@given(layouts())
def test_transposed_compares_strides(drawn: tuple[Tensor, np.ndarray]) -> None:
    """Transposed: a step along a row is longer than one to the next row."""
    tensor, view = drawn
    assert tensor.is_transposed == (view.strides[3] > view.strides[2])


@pytest.mark.parametrize("type", list(Type))
def test_quantised_rows_are_whole_blocks(type: Type) -> None:
    """Strides and size of a contiguous tensor count blocks, in each type."""
    tensor = Tensor(type, (3 * type.block_size, 5, 2))
    row = 3 * type.type_size
    assert tensor.nb == (type.type_size, row, 5 * row, 10 * row) == contiguous_nb(type, tensor.ne)
    assert tensor.nbytes == 10 * row
    assert tensor.row_size == row
    assert tensor.is_contiguous()


def test_one_block_rows_may_have_any_first_stride() -> None:
    """A row of one block is dense whatever ``nb[0]`` says, as upstream has it."""
    assert Tensor("q8_0", (32, 2), (99, 34, 68, 68)).is_contiguous()
    assert Tensor("f32", (1, 2), (99, 4, 8, 8)).is_contiguous()


def test_an_empty_tensor_has_no_bytes() -> None:
    """A dimension of 0 makes a tensor empty, of 0 bytes."""
    tensor = Tensor("f32", (4, 0, 3))
    assert (tensor.is_empty, tensor.nbytes, tensor.numel) == (True, 0, 0)


@pytest.mark.parametrize("ne", [(2**61, 4), (2**80, 8, 1, 1), (0, 2**63, 1, 1)])
def test_a_tensor_has_no_more_bytes_than_can_be_counted(ne: tuple[int, ...]) -> None:
    """Sizes are 64-bit integers: what has more bytes, or more elements in a dimension, is refused."""
    with pytest.raises(ShapeError, match="64 bits"):
        Tensor("f32", ne)


@pytest.mark.parametrize("ne", [(), (1, 2, 3, 4, 5)])
def test_only_one_to_four_dimensions_are_possible(ne: tuple[int, ...]) -> None:
    """No tensor has fewer than one or more than four dimensions."""
    with pytest.raises(ShapeError, match="1 to 4"):
        Tensor("f32", ne)


@pytest.mark.parametrize("ne", [(2, -1), (2, -1, 1, 1), [4, 1, 1, -8]])
def test_no_dimension_is_negative(ne: tuple[int, ...]) -> None:
    """A negative number of elements is refused, however many dimensions are given."""
    with pytest.raises(ShapeError, match="cannot have -"):
        Tensor("f32", ne)


def test_an_unknown_type_is_refused_with_those_there_are() -> None:
    """A misspelt type is answered with the list of types."""
    with pytest.raises(ValueError, match="q4_K"):
        Tensor("q4", (1,))


def test_a_view_of_a_view_names_the_owner() -> None:
    """A view's source is never itself a view: offsets add up."""
    owner = Tensor("f32", (16,), name="owner")
    first = Tensor("f32", (8,), view_src=owner, view_offs=16)
    second = Tensor("f32", (4,), view_src=first, view_offs=8)
    assert (second.view_src, second.view_offs) == (owner, 24)


def test_layouts_are_the_same_in_type_shape_and_strides() -> None:
    """`dup_layout` and `view_tensor` keep the layout; another type, shape or stride is another."""
    a = Tensor("f32", (4, 3), (4, 32, 96, 96), name="a")
    copy, view = dup_layout(a, "copy"), view_tensor(a)
    assert are_same_layout(a, copy)
    assert are_same_layout(a, view)
    assert (copy.view_src, view.view_src, view.name) == (None, a, "a (view)")
    assert not are_same_layout(a, Tensor("f32", (4, 3)))
    assert not are_same_layout(a, Tensor("i32", a.ne, a.nb))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -(2.0**127), float("inf")])
def test_parameters_keep_a_float_s_bits(value: float) -> None:
    """A packed float reads back as itself, and words that were never set as 0."""
    tensor = Tensor("f32", (1,), op_params=pack_params(7, value))
    assert (tensor.param_i32(0), tensor.param_f32(1)) == (7, value)
    assert (tensor.param_i32(9), tensor.param_f32(9)) == (0, 0.0)


def test_tensors_are_compared_by_identity_and_die_alone() -> None:
    """Equal-looking tensors are different keys, and nothing keeps a tensor alive that nobody holds."""
    a, b = Tensor("f32", (2,), name="x"), Tensor("f32", (2,), name="x")
    assert a != b
    assert len({a, b}) == 2
    gone = weakref.ref(b)
    del b
    gc.collect()
    assert gone() is None


def test_repr_tells_type_name_shape_and_sources() -> None:
    """A repr reads like the op that made the tensor."""
    x = Tensor("q4_K", (256, 2), name="x")
    assert repr(x) == "<q4_K 'x' [256×2]>"
    y = Tensor("f32", (2,), name="y", op=Op.UNARY, src=[x, None], op_params=pack_params(UnaryOp.SILU))
    assert repr(y) == "<f32 'y' [2] = SILU('x', None)>"


def test_flags_and_names_chain() -> None:
    """Setters return the tensor, so that they can follow an op."""
    t = Tensor("f32", (1,)).named("t").set_input().set_output()
    assert (t.name, t.flags) == ("t", TensorFlag.INPUT | TensorFlag.OUTPUT)


def test_data_without_memory_is_refused_with_what_to_do() -> None:
    """Reading or writing a tensor that was never allocated tells to allocate it."""
    t = Tensor("f32", (2,), name="t")
    with pytest.raises(GraphError, match=r"'t' cannot be written.*allocate"):
        t.set_array([1.0, 2.0])
    with pytest.raises(GraphError, match="'t' cannot be read"):
        t.numpy()
