"""Copies and views: ops that move elements or show them in another shape, and rows by index.

Names are upstream's, because logs and traces contain them: a view is named after its source's name at that moment.
"""

from __future__ import annotations

from ..tensor import Tensor
from ..types import MAX_DIMS, Op, Type
from ._make import divides, i32, is_contiguous_rows, new, refuse, require_sizes, view_of

__all__ = [
    "cast", "cont", "cont_1d", "cont_2d", "cont_3d", "cont_4d", "cpy", "dup_tensor", "get_rows", "permute", "reshape",
    "reshape_1d", "reshape_2d", "reshape_3d", "reshape_4d", "set_rows", "transpose", "view_1d", "view_2d", "view_3d",
    "view_4d", "view_tensor",
]  # fmt: skip


def dup_tensor(src: Tensor) -> Tensor:
    """Return a new contiguous leaf of the same type and shape.

    Notes
    -----
    Mirrors `ggml_dup_tensor`.
    """
    return new(Op.NONE, src.type, src.ne, ())


def view_tensor(src: Tensor) -> Tensor:
    """Return a view of the whole tensor, as a leaf.

    Notes
    -----
    Mirrors `ggml_view_tensor`. `pyggml.tensor.view_tensor` is the same, but the active graph does not collect it.
    """
    return view_of(Op.NONE, src, src.ne, src.nb, (), name=src.name + " (view)")


# -- copies ----------------------------------------------------------------------


def cpy(a: Tensor, b: Tensor) -> Tensor:
    """Copy ``a`` into the memory of ``b``, converted to its type; the result is a view of ``b``.

    Raises
    ------
    ShapeError
        The numbers of elements differ.

    Notes
    -----
    Mirrors `ggml_cpy`.
    """
    if a.numel != b.numel:
        refuse("cpy", f"{a.numel} elements cannot be copied into {b.numel}", a=a, b=b)
    name = f"{b.name} (copy of {a.name})" if b.name else f"{a.name} (copy)"
    return view_of(Op.CPY, b, b.ne, b.nb, (a, b), name=name)


def cast(a: Tensor, type: Type | str) -> Tensor:
    """Convert to another type, in new memory.

    Notes
    -----
    Mirrors `ggml_cast`: the result is its own second source, because backends expect a destination there.
    """
    result = new(Op.CPY, Type.of(type), a.ne, (a,), name=a.name + " (copy)")
    result.src.append(result)
    return result


def cont(a: Tensor) -> Tensor:
    """Copy into contiguous memory.

    Notes
    -----
    Mirrors `ggml_cont`.
    """
    return new(Op.CONT, a.type, a.ne, (a,), name=a.name + " (cont)")


def cont_4d(a: Tensor, ne0: int, ne1: int, ne2: int, ne3: int) -> Tensor:
    """Copy into contiguous memory, with another shape.

    Raises
    ------
    ShapeError
        The shape has another number of elements.

    Notes
    -----
    Mirrors `ggml_cont_4d`.
    """
    require_sizes("cont", ne0, ne1, ne2, ne3)
    if a.numel != ne0 * ne1 * ne2 * ne3:
        refuse("cont", f"[{ne0}, {ne1}, {ne2}, {ne3}] has another number of elements", a=a)
    return new(Op.CONT, a.type, (ne0, ne1, ne2, ne3), (a,), name=a.name + " (cont)")


def cont_1d(a: Tensor, ne0: int) -> Tensor:
    """Mirror `ggml_cont_1d`: `cont_4d` with one dimension."""
    return cont_4d(a, ne0, 1, 1, 1)


def cont_2d(a: Tensor, ne0: int, ne1: int) -> Tensor:
    """Mirror `ggml_cont_2d`: `cont_4d` with two dimensions."""
    return cont_4d(a, ne0, ne1, 1, 1)


def cont_3d(a: Tensor, ne0: int, ne1: int, ne2: int) -> Tensor:
    """Mirror `ggml_cont_3d`: `cont_4d` with three dimensions."""
    return cont_4d(a, ne0, ne1, ne2, 1)


# -- reshape ---------------------------------------------------------------------


def _reshape(a: Tensor, ne: tuple[int, ...]) -> Tensor:
    require_sizes("reshape", *ne)
    if not a.is_contiguous():
        refuse("reshape", "a is not contiguous; copy it with cont first", a=a)
    numel = 1
    for n in ne:
        numel *= n
    if a.numel != numel:
        refuse("reshape", f"{list(ne)} has {numel} elements, not {a.numel}", a=a)
    return view_of(Op.RESHAPE, a, ne, None, (a,), name=a.name + " (reshaped)")


def reshape(a: Tensor, b: Tensor) -> Tensor:
    """Return a view of contiguous elements in the shape of ``b``.

    Raises
    ------
    ShapeError
        ``a`` is not contiguous, or the numbers of elements differ.

    Notes
    -----
    Mirrors `ggml_reshape`.
    """
    return _reshape(a, b.ne)


def reshape_1d(a: Tensor, ne0: int) -> Tensor:
    """Mirror `ggml_reshape_1d`: `reshape` to one dimension."""
    return _reshape(a, (ne0,))


def reshape_2d(a: Tensor, ne0: int, ne1: int) -> Tensor:
    """Mirror `ggml_reshape_2d`: `reshape` to two dimensions."""
    return _reshape(a, (ne0, ne1))


def reshape_3d(a: Tensor, ne0: int, ne1: int, ne2: int) -> Tensor:
    """Mirror `ggml_reshape_3d`: `reshape` to three dimensions."""
    return _reshape(a, (ne0, ne1, ne2))


def reshape_4d(a: Tensor, ne0: int, ne1: int, ne2: int, ne3: int) -> Tensor:
    """Mirror `ggml_reshape_4d`: `reshape` to four dimensions."""
    return _reshape(a, (ne0, ne1, ne2, ne3))


# -- views -----------------------------------------------------------------------


def _view(a: Tensor, ne: tuple[int, ...], nb: tuple[int, int, int, int] | None, offset: int) -> Tensor:
    require_sizes("view", *ne, offset)
    params = (i32(offset), i32(offset >> 32)) if offset else ()
    return view_of(Op.VIEW, a, ne, nb, (a,), params, name=a.name + " (view)", offset=offset)


def view_1d(a: Tensor, ne0: int, offset: int) -> Tensor:
    """Return a view of ``ne0`` elements from byte ``offset`` of ``a`` on.

    Raises
    ------
    ShapeError
        The view would end past the memory's owner.

    Notes
    -----
    Mirrors `ggml_view_1d`: the offset is the only parameter of the op, as a size in two words.
    """
    return _view(a, (ne0,), None, offset)


def view_2d(a: Tensor, ne0: int, ne1: int, nb1: int, offset: int) -> Tensor:
    """Return a view of ``ne1`` rows with stride ``nb1`` bytes; see `view_1d`. Mirrors `ggml_view_2d`."""
    nb2 = nb1 * ne1
    return _view(a, (ne0, ne1), (a.type.type_size, nb1, nb2, nb2), offset)


def view_3d(a: Tensor, ne0: int, ne1: int, ne2: int, nb1: int, nb2: int, offset: int) -> Tensor:
    """Return a view of ``ne2`` matrices with stride ``nb2`` bytes; see `view_1d`. Mirrors `ggml_view_3d`."""
    return _view(a, (ne0, ne1, ne2), (a.type.type_size, nb1, nb2, nb2 * ne2), offset)


def view_4d(a: Tensor, ne0: int, ne1: int, ne2: int, ne3: int, nb1: int, nb2: int, nb3: int, offset: int) -> Tensor:
    """Return a view with all strides given except the first; see `view_1d`. Mirrors `ggml_view_4d`."""
    return _view(a, (ne0, ne1, ne2, ne3), (a.type.type_size, nb1, nb2, nb3), offset)


def permute(a: Tensor, axis0: int, axis1: int, axis2: int, axis3: int) -> Tensor:
    """Return a view with dimensions in another order: dimension i of ``a`` becomes dimension ``axis i``.

    Raises
    ------
    ShapeError
        The axes are not 0, 1, 2, 3 in some order.

    Notes
    -----
    Mirrors `ggml_permute`.
    """
    axes = (axis0, axis1, axis2, axis3)
    if sorted(axes) != list(range(MAX_DIMS)):
        refuse("permute", f"axes {list(axes)} are not 0, 1, 2, 3 in some order", a=a)
    ne, nb = [0] * MAX_DIMS, [0] * MAX_DIMS
    for i, axis in enumerate(axes):
        ne[axis] = a.ne[i]
        nb[axis] = a.nb[i]
    return view_of(Op.PERMUTE, a, ne, nb, (a,), axes, name=a.name + " (permuted)")


def transpose(a: Tensor) -> Tensor:
    """Return a view with rows as columns: `permute` with 1, 0, 2, 3, but without parameters.

    Notes
    -----
    Mirrors `ggml_transpose`.
    """
    (ne0, ne1, ne2, ne3), (nb0, nb1, nb2, nb3) = a.ne, a.nb
    return view_of(Op.TRANSPOSE, a, (ne1, ne0, ne2, ne3), (nb1, nb0, nb2, nb3), (a,), name=a.name + " (transposed)")


# -- rows by index ---------------------------------------------------------------


def get_rows(a: Tensor, b: Tensor) -> Tensor:
    """Return the rows of ``a`` that ``b`` names.

    Parameters
    ----------
    a : Tensor, [n, n_row, ne2, ne3]
    b : Tensor, i32, [n_index, ne2, ne3]

    Returns
    -------
    Tensor
        f32, or i32 if ``a`` is, [n, n_index, ne2, ne3]

    Raises
    ------
    ShapeError
        The upper dimensions differ, or ``b`` is not i32.

    Notes
    -----
    Mirrors `ggml_get_rows`.
    """
    if a.ne[2] != b.ne[1] or a.ne[3] != b.ne[2] or b.ne[3] != 1:
        refuse("get_rows", "dimensions 2 and 3 of a are not dimensions 1 and 2 of b", a=a, b=b)
    if b.type is not Type.I32:
        refuse("get_rows", "b must be i32", a=a, b=b)
    type = Type.I32 if a.type is Type.I32 else Type.F32
    return new(Op.GET_ROWS, type, (a.ne[0], *b.ne[:3]), (a, b))


def set_rows(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Write the rows of ``b`` into ``a`` where ``c`` says, converted to a's type; the result is a view of ``a``.

    Parameters
    ----------
    a : Tensor, [n, n_row, ne2, ne3]
    b : Tensor, f32 or f16, [n, n_index, ne2, ne3]
    c : Tensor, i64 or i32, [n_index, divisor of ne2, divisor of ne3]

    Raises
    ------
    ShapeError
        Shapes or types do not fit, or a row of ``a`` or ``b`` has gaps.

    Notes
    -----
    Mirrors `ggml_set_rows`, whose sources are b, c, a in that order.
    """
    if a.ne[0] != b.ne[0] or a.ne[2] != b.ne[2] or a.ne[3] != b.ne[3]:
        refuse("set_rows", "a and b differ in more than rows", a=a, b=b)
    if b.ne[1] != c.ne[0] or not divides(c.ne[1], b.ne[2]) or not divides(c.ne[2], b.ne[3]) or c.ne[3] != 1:
        refuse("set_rows", "c has not one index for each row of b", b=b, c=c)
    if b.type is not Type.F32 and b.type is not Type.F16:
        refuse("set_rows", "b must be f32 or f16", b=b)
    if c.type is not Type.I64 and c.type is not Type.I32:
        refuse("set_rows", "c must be i64 or i32", c=c)
    if not is_contiguous_rows(a) or not is_contiguous_rows(b):
        refuse("set_rows", "the rows of a and b must be dense", a=a, b=b)
    return view_of(Op.SET_ROWS, a, a.ne, a.nb, (b, c, a), name=a.name + " (view)")
