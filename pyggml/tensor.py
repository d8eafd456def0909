"""`Tensor`: type, shape, layout and op of a piece of data, and the arithmetic of its layout.

A tensor is metadata. Its bytes are in a `Buffer`, at the address ``data`` of that buffer's own address space; only the
buffer can read or write them. Dimensions are in ggml's order (``ne[0]`` runs fastest, ``nb`` in bytes). Only ``shape``
and ``strides`` are in numpy's order.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum
from operator import index
from typing import TYPE_CHECKING, Any, cast

from .edits import EDITS, Sources
from .errors import GraphError, ShapeError
from .notebook import html_table
from .types import MAX_BYTES, MAX_DIMS, GluOp, Op, TensorFlag, Type, UnaryOp
from .values import decode_array, encode_array

if TYPE_CHECKING:
    import numpy.typing as npt

    from .buffer import Buffer

__all__ = ["Shape", "Tensor", "are_same_layout", "copy_node", "dup_layout", "pack_params", "view_tensor"]

Shape = tuple[int, int, int, int]
_Layout = tuple[Shape, Shape, int, int, int]
_ONES = (1,) * MAX_DIMS


def pad_ne(ne: Sequence[int]) -> Shape:
    """Return ``ne`` extended to four dimensions with ones."""
    n = len(ne)
    if n == MAX_DIMS and type(ne) is tuple and min(ne) >= 0:  # another tensor's, as most are
        return ne
    if not 1 <= n <= MAX_DIMS:
        raise ShapeError("tensor", f"1 to {MAX_DIMS} dimensions are possible, not {n}")
    if min(ne) < 0:
        raise ShapeError("tensor", f"a dimension cannot have {min(ne)} elements")
    ne0, ne1, ne2, ne3 = *map(int, ne), *_ONES[n:]
    return ne0, ne1, ne2, ne3


def contiguous_nb(type: Type, ne: Sequence[int]) -> Shape:
    """Return the strides in bytes of a contiguous tensor.

    Raises
    ------
    ShapeError
        Rows do not consist of whole blocks of the type.

    Notes
    -----
    Mirrors `ggml_new_tensor_impl`.
    """
    nb0, ne0, n_per_block = type.type_size, ne[0], type.block_size
    n_block = ne0 // n_per_block
    if n_block * n_per_block != ne0:
        raise ShapeError(
            "tensor",
            f"a row of {ne[0]} elements does not consist of whole {type.ggml_name} blocks of {type.block_size}",
        )
    nb1 = nb0 * n_block
    nb2 = nb1 * ne[1]
    return nb0, nb1, nb2, nb2 * ne[2]


def pack_params(*values: float) -> tuple[int, ...]:
    """Return op parameters as int32 words: ints unchanged, floats as their bits.

    Examples
    --------
    >>> pack_params(3, 1.0)
    (3, 1065353216)
    """
    return tuple(struct.unpack("<i", struct.pack("<f", v))[0] if isinstance(v, float) else int(v) for v in values)


#: Equal layouts and equal parameters are one object: quick to compare, and verified once.
_LAYOUTS: dict[tuple[Type, tuple[int, ...], tuple[int, ...] | None], _Layout] = {}
_numbers = itertools.count()
_SHAPES: dict[Shape, Shape] = {}
_PARAMS: dict[tuple[int, ...], tuple[int, ...]] = {}
_MOST_KEPT = 1 << 14


def _lay_out(op: Op, type: Type, ne: tuple[int, ...], nb: tuple[int, ...] | None) -> _Layout:
    """Return dimensions, strides, `nbytes`, the bytes that a view needs, and the layout's number; keep them."""
    try:
        shape = pad_ne(tuple(map(index, ne)))
    except TypeError:
        raise ShapeError(op.name.lower(), f"dimensions are whole numbers, not {list(ne)}") from None
    if nb is None:
        strides = contiguous_nb(type, shape)
        n_bytes = n_inside = strides[3] * shape[3]
        if n_bytes > MAX_BYTES or (n_bytes == 0 and max(ne) > MAX_BYTES):
            raise ShapeError(op.name.lower(), f"a tensor of {list(ne)} elements has more bytes than 64 bits can count")
    else:
        if min(nb) < 0:
            raise ShapeError(op.name.lower(), f"strides cannot be negative (nb {list(nb)})")
        strides = cast("Shape", nb)
        n_bytes, n_inside = _span_bytes(type, shape, strides), 0
        if 0 not in shape:
            dense = type.type_size * shape[0] // type.block_size * shape[1] * shape[2] * shape[3]
            n_inside = max(dense, _last_byte(type, shape, strides))
    if len(_LAYOUTS) >= _MOST_KEPT:
        _LAYOUTS.clear()
        _SHAPES.clear()
    shape, strides = _SHAPES.setdefault(shape, shape), _SHAPES.setdefault(strides, strides)
    found = _LAYOUTS[type, ne, nb] = shape, strides, n_bytes, n_inside, next(_numbers)
    return found


def _check_params(op: Op, op_params: tuple[int, ...]) -> tuple[int, ...]:
    """Refuse parameters that are no integers of 32 bits; keep them."""
    if not -(1 << 31) <= min(op_params) <= max(op_params) < 1 << 31:
        raise ShapeError(op.name.lower(), f"parameters are integers of 32 bits, not {list(op_params)}")
    if len(_PARAMS) >= _MOST_KEPT:
        _PARAMS.clear()
    return _PARAMS.setdefault(op_params, op_params)


class Tensor:
    """One tensor: a weight, an input, or the result of an op.

    Parameters
    ----------
    type : Type or str
        Element type.
    ne : sequence of int
        Elements in each dimension, fastest first; 1 to 4 of them.
    nb : sequence of int, optional
        Four strides in bytes; contiguous by default.
    name : str
        A name of any length; traces cut it to 63 bytes.
    op : Op
        The op that computes it; NONE for weights and inputs.
    src : iterable of Tensor or None
        Sources of the op, at most 10; None for an absent optional source.
    op_params : tuple of int
        Parameters of the op as int32 words (`pack_params`); missing ones are 0.
    view_src, view_offs : Tensor, int
        The tensor that owns the memory, never itself a view, and the offset in it in bytes.

    Raises
    ------
    ShapeError
        A dimension or stride is negative, or a view ends past the tensor that owns the memory.

    Notes
    -----
    Mirrors `struct ggml_tensor`. Compared and hashed by identity. ``ne``, ``nb``, ``nbytes`` and ``type`` never change.
    Differs: names have any length. The last element of a view must be inside its owner; upstream checks only the size of
    the same number of contiguous elements, so that strides can point outside.
    """

    __slots__ = (
        "__weakref__",
        "_op_params",
        "buffer",
        "data",
        "extra",
        "flags",
        "layout_id",
        "name",
        "nb",
        "nbytes",
        "ne",
        "op",
        "src",
        "type",
        "view_offs",
        "view_src",
    )

    type: Type
    ne: Shape
    nb: Shape
    layout_id: int  #: tensors with the same have the same type, `ne` and `nb`
    nbytes: int  #: from the start of the first to the end of the last element, including gaps (`ggml_nbytes`)
    op: Op
    flags: int  #: of `TensorFlag`
    src: list[Tensor | None]  #: at most 10; the scheduler rewrites entries to copies
    view_src: Tensor | None
    view_offs: int
    data: int | None  #: address in the buffer's own address space; None until allocated
    buffer: Buffer | None
    name: str
    extra: Any  # a backend's own note on the tensor: its type is the backend's

    def __init__(
        self,
        type: Type | str,
        ne: Sequence[int],
        nb: Sequence[int] | None = None,
        *,
        name: str = "",
        op: Op = Op.NONE,
        src: Iterable[Tensor | None] = (),
        op_params: tuple[int, ...] = (),
        flags: int = 0,
        view_src: Tensor | None = None,
        view_offs: int = 0,
    ) -> None:
        self.type = type = type if isinstance(type, Type) else Type.of(type)
        try:
            key = type, tuple(ne), None if nb is None else tuple(nb)
        except TypeError:
            raise ShapeError("tensor", f"dimensions cannot be {ne!r:.60}", hint="such as (4, 3)") from None
        self.ne, self.nb, self.nbytes, n_inside, self.layout_id = _LAYOUTS.get(key) or _lay_out(op, *key)
        self.name = name
        self.op = op
        self._op_params = op_params and (_PARAMS.get(op_params) or _check_params(op, op_params))
        self.src = Sources(src)
        self.flags = flags
        self.buffer = None
        self.data = None
        self.extra = None
        if view_src is not None and view_src.view_src is not None:
            view_offs += view_src.view_offs
            view_src = view_src.view_src
        self.view_src = view_src
        self.view_offs = view_offs
        if view_src is not None:
            if view_offs < 0 or (n_inside and n_inside + view_offs > view_src.nbytes):
                raise self._outside(view_src)
            if view_src.data is not None:
                # as in ggml: a view of a tensor with memory has its data at once, its buffer only at allocation
                self.data = view_src.data + view_offs

    def _outside(self, root: Tensor) -> ShapeError:
        """Return the error of a view that starts before or ends after the tensor that owns the memory."""
        gaps = "" if self.is_contiguous() else f" with nb {list(self.nb)}"
        n_bytes = _lay_out(self.op, self.type, self.ne, self.nb)[3]
        return ShapeError(
            self.op.name.lower(),
            f"a view of {list(self.ne)} elements{gaps} takes {n_bytes:,} bytes from byte {self.view_offs:,} on: "
            f"it ends past the {root.nbytes:,} bytes of {root.name!r}",
        )

    # -- sizes ---------------------------------------------------------------

    @property
    def last_byte(self) -> int:
        """The bytes from the start of the first to the end of the last element: `nbytes`, unless blocks are not in dimension 0.

        For a transposed tensor of a quantised type, `nbytes` counts each element as a block, as upstream does.
        """
        return _last_byte(self.type, self.ne, self.nb)

    @property
    def numel(self) -> int:
        """The number of elements."""
        a, b, c, d = self.ne
        return a * b * c * d

    @property
    def nrows(self) -> int:
        """The number of rows: the product of all dimensions except the first."""
        _, b, c, d = self.ne
        return b * c * d

    @property
    def n_dims(self) -> int:
        """The number of dimensions up to the last that is not 1; at least 1."""
        return next((i + 1 for i in range(MAX_DIMS - 1, 0, -1) if self.ne[i] > 1), 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """``ne`` in numpy's order: slowest first, leading ones dropped."""
        return self.ne[: self._n_shown][::-1]

    @property
    def strides(self) -> tuple[int, ...]:
        """``nb`` in numpy's order, in bytes."""
        return self.nb[: self._n_shown][::-1]

    @property
    def _n_shown(self) -> int:
        """The number of dimensions up to the last that is not 1, including empty ones; at least 1."""
        return next((i + 1 for i in range(MAX_DIMS - 1, 0, -1) if self.ne[i] != 1), 1)

    @property
    def row_size(self) -> int:
        """The bytes of one row's elements."""
        return self.type.row_size(self.ne[0])

    # -- layout --------------------------------------------------------------

    @property
    def is_view(self) -> bool:
        """Whether another tensor owns the memory."""
        return self.view_src is not None

    @property
    def is_stale_view(self) -> bool:
        """Whether it has the memory that the tensor that it views had before."""
        root = self.view_src
        if root is None or self.data is None:
            return False
        return root.data is None or self.data != root.data + self.view_offs

    @property
    def is_empty(self) -> bool:
        """Whether the tensor has no elements."""
        return 0 in self.ne

    @property
    def is_transposed(self) -> bool:
        """Mirrors `ggml_is_transposed`."""
        return self.nb[0] > self.nb[1]

    def is_contiguous(self, n: int = 0) -> bool:
        """Return whether elements are dense from dimension n on.

        Notes
        -----
        Mirrors `ggml_is_contiguous_n`.
        """
        ne, nb, type = self.ne, self.nb, self.type
        next_nb = type.type_size
        if ne[0] != type.block_size and nb[0] != next_nb:
            return False
        next_nb *= ne[0] // type.block_size
        for i in range(1, MAX_DIMS):
            if i > n:
                if ne[i] != 1 and nb[i] != next_nb:
                    return False
                next_nb *= ne[i]
            else:
                next_nb = ne[i] * nb[i]  # dimension i may have gaps
        return True

    # -- parameters ----------------------------------------------------------

    def param_i32(self, i: int) -> int:
        """Return parameter word i as an integer; 0 if it was never set."""
        return self._op_params[i] if i < len(self._op_params) else 0

    def param_f32(self, i: int) -> float:
        """Return parameter word i as a float; 0.0 if it was never set."""
        value: float = struct.unpack("<f", struct.pack("<i", self.param_i32(i)))[0]
        return value

    @property
    def op_desc(self) -> str:
        """The name of the op; for UNARY and GLU that of the sub-op.

        Notes
        -----
        Mirrors `ggml_op_desc`. Differs: an unknown sub-op is shown by its number.
        """
        kinds = UnaryOp if self.op is Op.UNARY else GluOp if self.op is Op.GLU else None
        if kinds is None:
            return self.op.name
        number = self.param_i32(0)
        return kinds(number).name if number in _NUMBERS[kinds] else f"{self.op.name} {number}"

    # -- parameters, name and flags ----------------------------------------------------

    @property
    def op_params(self) -> tuple[int, ...]:
        """The parameters of the op as int32 words; assign all at once."""
        return self._op_params

    @op_params.setter
    def op_params(self, op_params: tuple[int, ...]) -> None:
        EDITS.note()
        self._op_params = op_params

    def named(self, name: str) -> Tensor:
        """Set the name and return the tensor."""
        self.name = name
        return self

    def set_input(self) -> Tensor:
        """Flag as an input of the graph and return the tensor."""
        EDITS.note()
        self.flags |= TensorFlag.INPUT
        return self

    def set_output(self) -> Tensor:
        """Flag as an output of the graph, which is never overwritten, and return the tensor.

        Notes
        -----
        Mirrors `ggml_set_output`: for a view, the tensor that owns the memory is flagged as well.
        """
        EDITS.note()
        self.flags |= TensorFlag.OUTPUT
        if self.view_src is not None:
            self.view_src.flags |= TensorFlag.OUTPUT
        return self

    # -- data ----------------------------------------------------------------

    @property
    def storage(self) -> Buffer | None:
        """The buffer with the bytes: its own, or that of the tensor that it shows."""
        return self.buffer if self.view_src is None else self.view_src.buffer

    def set_array(self, array: npt.ArrayLike) -> None:
        """Write an array into the tensor, converted or quantised to its type.

        Parameters
        ----------
        array : array_like
            In numpy's order, with the tensor's ``shape``.

        Raises
        ------
        GraphError
            The tensor has no memory yet, is a view with gaps, or has integers and cannot hold a value.
        ShapeError
            The shapes differ, or values cannot be quantised to the type.
        """
        raw = encode_array(self, array)
        buffer = self._memory("written")
        if buffer.tenancy is not None:
            buffer.tenancy.note_write(self)
        if raw.nbytes:
            buffer.set_tensor(self, raw.ctypes.data, 0, raw.nbytes)

    def tobytes(self) -> bytes:
        """Return the tensor's ``nbytes`` bytes from its buffer.

        Raises
        ------
        GraphError
            The tensor has no memory yet, or its memory was given to another tensor when the graph was computed.
        """
        import numpy as np

        buffer = self._memory("read")
        if buffer.tenancy is not None:
            buffer.tenancy.check_read(self)
        if self.last_byte != self.nbytes:
            raise GraphError(
                f"'{self.name}' cannot be read: its blocks of {self.type.ggml_name} are not along its rows (nb {self.nb})"
            )
        raw = np.empty(self.nbytes, np.uint8)
        if raw.nbytes:
            buffer.get_tensor(self, raw.ctypes.data, 0, raw.nbytes)
        return raw.tobytes()

    def numpy(self) -> npt.NDArray[Any]:
        """Return the values as a new array: float32 for quantised types, F16 and BF16; other types unchanged.

        Raises
        ------
        GraphError
            See `tobytes`.
        """
        return decode_array(self, self.tobytes())

    def _memory(self, verb: str) -> Buffer:
        buffer = self.storage
        if buffer is None or self.data is None:
            raise GraphError(
                f"'{self.name}' cannot be {verb}: it has no memory yet",
                hint="allocate its context, or the graph it belongs to, first",
            )
        return buffer

    @property
    def dims(self) -> str:
        """`ne` in readable form: ``256×512×8``."""
        return "×".join(str(n) for n in self.ne[: self.n_dims])

    def __repr__(self) -> str:
        made = "" if self.op is Op.NONE else f" = {self.op_desc}"
        if made and self.src:
            made += "(" + ", ".join("None" if s is None else repr(s.name) for s in self.src) + ")"
        where = "" if (b := self.storage) is None else f" in {b.buft.name}"
        return f"<{self.type.ggml_name} {self.name!r} [{self.dims}]{made}{where}>"

    def _repr_html_(self) -> str:
        """Return a table of the tensor's metadata, for notebooks."""
        storage = self.storage
        rows: list[tuple[str, object]] = [
            ("type", self.type.ggml_name),
            ("ne", self.dims),
            ("nb", " ".join(str(n) for n in self.nb[: self.n_dims])),
            ("bytes", f"{self.nbytes:,}"),
            ("memory", "none yet" if storage is None else f"{storage.buft.name}, {storage.usage.name.lower()}"),
        ]
        if self.op is not Op.NONE:
            rows += [("op", self.op_desc), ("sources", ", ".join("-" if s is None else s.name for s in self.src))]
        if self.view_src is not None:
            rows.append(("view", f"of {self.view_src.name}, from byte {self.view_offs:,}"))
        return html_table(self.name or "(no name)", ("", ""), rows, n_rows=len(rows))


def _span_bytes(type: Type, ne: Shape, nb: Shape) -> int:
    if min(ne) <= 0:
        return 0
    size = (ne[1] - 1) * nb[1] + (ne[2] - 1) * nb[2] + (ne[3] - 1) * nb[3]
    if type.block_size == 1:
        return size + type.type_size + (ne[0] - 1) * nb[0]
    return size + ne[0] * nb[0] // type.block_size


def _last_byte(type: Type, ne: Shape, nb: Shape) -> int:
    if type.block_size == 1 or nb[0] == type.type_size or 0 in ne:
        return _span_bytes(type, ne, nb)
    n = list(ne)
    for i in range(MAX_DIMS):
        if nb[i] == type.type_size and ne[i] % type.block_size == 0:
            n[i] //= type.block_size
            break
    return type.type_size + sum((k - 1) * b for k, b in zip(n, nb, strict=True))


def are_same_layout(a: Tensor, b: Tensor) -> bool:
    """Return whether type, ``ne`` and ``nb`` are equal.

    Notes
    -----
    Mirrors `ggml_are_same_layout`: strides of dimensions with one element also count.
    """
    return a.type is b.type and a.ne == b.ne and a.nb == b.nb


def dup_layout(tensor: Tensor, name: str) -> Tensor:
    """Return a tensor with the same type and layout, without memory, op or flags.

    Notes
    -----
    Mirrors `ggml_dup_tensor_layout`.
    """
    made = Tensor.__new__(Tensor)  # all is as in a tensor that was verified when it was made
    made.type = tensor.type
    made.ne = tensor.ne
    made.nb = tensor.nb
    made.layout_id = tensor.layout_id
    made.nbytes = tensor.nbytes
    made.name = name
    made.op = _NONE
    made._op_params = ()
    made.src = Sources()
    made.flags = made.view_offs = 0
    made.buffer = made.data = made.extra = made.view_src = None
    return made


def copy_node(like: Tensor, name: str, flags: int, src: Iterable[Tensor | None], root: Tensor | None) -> Tensor:
    """Return a tensor with the op, parameters and layout of ``like``, but other sources and another owner of its memory."""
    made = dup_layout(like, name)
    made.op, made._op_params = like.op, like._op_params
    made.src, made.flags = Sources(src), flags
    made.view_src = root
    made.view_offs = offset = like.view_offs
    made.data = None if root is None or root.data is None else root.data + offset
    return made


def view_tensor(tensor: Tensor) -> Tensor:
    """Return a view of the whole tensor, as a leaf.

    Notes
    -----
    Mirrors `ggml_view_tensor`; the scheduler makes its dependency nodes with it.
    """
    made = dup_layout(tensor, f"{tensor.name} (view)")
    root = tensor.view_src
    made.view_src = root = tensor if root is None else root
    made.view_offs = offset = tensor.view_offs
    made.data = None if root.data is None else root.data + offset
    return made


_NONE = Op.NONE  # a name of a module is found sooner than a member
_NUMBERS: dict[type[IntEnum], frozenset[int]] = {kinds: frozenset(kinds) for kinds in (UnaryOp, GluOp)}
