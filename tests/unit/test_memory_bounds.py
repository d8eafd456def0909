"""No tensor and no transfer reaches past the memory that it was given: refused where it is made."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pyggml import CPU, Context, ops
from pyggml.buffer import tensor_copy, tensor_get, tensor_memset, tensor_set
from pyggml.errors import GraphError, PyggmlError, ShapeError
from pyggml.tensor import Tensor

FAR = 1 << 30
#: Builders of views that take strides or an offset: arguments that stay inside a tensor f32 [64, 4] (row 256 bytes), and how one of them goes wrong.
VIEWS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "view_1d": (ops.view_1d, (64, 768)),
    "view_2d": (ops.view_2d, (4, 4, 256, 240)),
    "view_3d": (ops.view_3d, (4, 2, 2, 256, 512, 240)),
    "view_4d": (ops.view_4d, (4, 2, 2, 1, 256, 512, 1024, 240)),
}
INTO: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "acc": (ops.acc, (256, 1024, 1024, 240)),
    "acc_inplace": (ops.acc_inplace, (256, 1024, 1024, 240)),
    "set": (ops.set, (256, 1024, 1024, 240)),
    "set_inplace": (ops.set_inplace, (256, 1024, 1024, 240)),
    "set_2d": (ops.set_2d, (256, 240)),
    "set_2d_inplace": (ops.set_2d_inplace, (256, 240)),
}


def _owner() -> Tensor:
    return Tensor("f32", (64, 4), name="owner")


@pytest.mark.parametrize("name", VIEWS)
def test_views_end_inside_their_owner(name: str) -> None:
    """A view whose last element is the owner's last is made; with any size, stride or offset larger it is refused."""
    build, arguments = VIEWS[name]
    view = build(_owner(), *arguments)
    assert view.view_offs + view.nbytes == 1024
    n_sizes = int(name[5])
    for i, value in enumerate(arguments):
        counts = i < n_sizes or i == len(arguments) - 1 or arguments[i - n_sizes + 1] > 1
        for wrong in (value + 4, FAR, -4) if counts else (-4,):
            changed = (*arguments[:i], wrong, *arguments[i + 1 :])
            with pytest.raises(ShapeError):
                build(_owner(), *changed)


@pytest.mark.parametrize("name", INTO)
def test_parts_that_are_written_end_inside(name: str) -> None:
    """ACC and SET take a part that ends with the tensor, and refuse one that ends past it or has negative strides."""
    build, arguments = INTO[name]
    part = Tensor("f32", (4, 4), name="part")
    assert build(_owner(), part, *arguments).ne == (64, 4, 1, 1)
    for i, changes in ((0, (260, FAR, -4)), (len(arguments) - 1, (244, FAR, -4))):
        for wrong in changes:
            with pytest.raises(ShapeError):
                build(_owner(), part, *arguments[:i], wrong, *arguments[i + 1 :])


def test_views_of_views_are_held_to_the_owner() -> None:
    """A view may go past the view that it is made of, but not past the tensor that owns the memory."""
    half = ops.view_1d(_owner(), 128, 0)
    assert ops.view_1d(half, 128, 512).view_offs == 512
    with pytest.raises(ShapeError, match="past the 1,024 bytes of 'owner'"):
        ops.view_1d(half, 128, 516)


def test_tensors_made_by_hand_are_held_to_the_same() -> None:
    """Without a builder, too, a view ends inside its owner, and no stride is negative."""
    with pytest.raises(ShapeError, match="ends past"):
        Tensor("f32", (4, 4), (4, 1024, 4096, 4096), view_src=_owner())
    with pytest.raises(ShapeError, match="cannot be negative"):
        Tensor("f32", (4, 4), (4, -16, 64, 64), view_src=_owner(), view_offs=64)


def test_transposed_blocks_are_inside_and_cannot_be_read() -> None:
    """A transposed tensor of blocks is no larger than its owner, whatever upstream's byte count says; its numbers are not read."""
    with Context() as context:
        x = context.new_tensor("q4_0", (64, 2), name="x")
        turned = context.add(ops.transpose(x))
        context.alloc(CPU(threads=1))
        assert turned.nbytes > turned.last_byte == x.nbytes
        with pytest.raises(GraphError, match="not along its rows"):
            turned.numpy()


TRANSFERS: dict[str, Callable[[Tensor, int], None]] = {
    "set, negative size": lambda t, at: tensor_set(t, at, 0, -1),
    "get, negative size": lambda t, at: tensor_get(t, at, 0, -1),
    "memset, negative size": lambda t, at: tensor_memset(t, 0, 0, -1),
    "set, negative offset": lambda t, at: tensor_set(t, at, -4, 8),
    "get, past the end": lambda t, at: tensor_get(t, at, 1020, 8),
    "copy of a larger tensor": lambda t, at: tensor_copy(Tensor("f32", (64, 5)), t),
}


@pytest.mark.parametrize("name", TRANSFERS)
def test_transfers_stay_inside_the_tensor(name: str) -> None:
    """Sizes and offsets that leave the tensor or the host's memory are refused, and nothing is written."""
    host = np.full(1024, 255, np.uint8)
    with Context() as context:
        t = context.new_tensor("f32", (64, 4), name="t")
        context.alloc(CPU(threads=1))
        t.set_array(np.ones((4, 64)))
        with pytest.raises(PyggmlError):
            TRANSFERS[name](t, host.ctypes.data)
        assert (t.numpy() == 1).all()
        assert (host == 255).all()
