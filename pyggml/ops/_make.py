"""How builders make tensors, and the conditions that they check.

Every builder ends in `new`, `like` or `view_of`, which pass the tensor to the graph whose ``with`` block is active. Builders
touch no data and cost microseconds, because a graph of a thousand nodes is built again for each new shape.
"""

from __future__ import annotations

import inspect
import struct
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import wraps
from math import inf
from numbers import Real
from typing import NoReturn, ParamSpec, TypeVar

from ..errors import ShapeError
from ..graph_context import current
from ..tensor import Tensor
from ..types import Op, Type

_FLOAT = struct.Struct("<f")
_WORD = struct.Struct("<i")

_Kind = TypeVar("_Kind", bound=IntEnum)
_P = ParamSpec("_P")

Sources = Sequence[Tensor | None]
Params = tuple[int, ...]


# -- parameters ------------------------------------------------------------------


def f32(value: float) -> int:
    """Return the bits of a number as a float32, read as an int32; a number that is too large becomes infinite."""
    try:
        raw = _FLOAT.pack(value)
    except OverflowError:
        raw = _FLOAT.pack(inf if value > 0 else -inf)
    word: int = _WORD.unpack(raw)[0]
    return word


def round_f32(value: float) -> float:
    """Return the float32 nearest to a number."""
    rounded: float = _FLOAT.unpack(_WORD.pack(f32(value)))[0]
    return rounded


def i32(value: int) -> int:
    """Return the low 32 bits of an integer as an int32, as a C conversion does."""
    return ((int(value) + 0x80000000) & 0xFFFFFFFF) - 0x80000000


def set_param(tensor: Tensor, i: int, word: int) -> None:
    """Set parameter word i of a tensor; earlier words that were never set become 0."""
    words = list(tensor.op_params)
    words.extend([0] * (i + 1 - len(words)))
    words[i] = word
    tensor.op_params = tuple(words)


# -- tensors ---------------------------------------------------------------------


def new(op: Op, type: Type, ne: Sequence[int], src: Sources, params: Params = (), name: str = "") -> Tensor:
    """Return a new contiguous tensor, the result of ``op`` with sources ``src``.

    Raises
    ------
    ShapeError
        A row is not a whole number of the type's blocks.

    Notes
    -----
    Mirrors `ggml_new_tensor_impl`. Differs: refuses rows with an incomplete block; ggml does so only in debug builds.
    """
    if type.block_size != 1 and ne[0] % type.block_size:
        raise ShapeError(
            op.name.lower(),
            f"a row of {ne[0]} elements does not consist of whole {type.ggml_name} blocks of {type.block_size}",
        )
    tensor = Tensor(type, ne, name=name, op=op, src=src, op_params=params)
    collector = current.get()
    if collector is not None:
        collector.add(tensor)
    return tensor


def view_of(
    op: Op,
    a: Tensor,
    ne: Sequence[int],
    nb: Sequence[int] | None,
    src: Sources,
    params: Params = (),
    *,
    name: str,
    offset: int = 0,
) -> Tensor:
    """Return the result of ``op`` as a view of ``a`` from byte ``offset`` on.

    Raises
    ------
    ShapeError
        The view would start before or end past the tensor that owns the memory; see `Tensor`.

    Notes
    -----
    Mirrors `ggml_new_tensor_impl` with a ``view_src``.
    """
    tensor = Tensor(a.type, ne, nb, name=name, op=op, src=src, op_params=params, view_src=a, view_offs=offset)
    collector = current.get()
    if collector is not None:
        collector.add(tensor)
    return tensor


def like(op: Op, a: Tensor, src: Sources, params: Params = (), inplace: bool = False) -> Tensor:
    """Return a contiguous tensor with the type and shape of ``a``, or a view of ``a`` if in place; see `in_place`.

    Notes
    -----
    Mirrors `ggml_dup_tensor` and `ggml_view_tensor`.
    """
    if inplace:
        return view_of(op, a, a.ne, a.nb, src, params, name=a.name + " (view)")
    return new(op, a.type, a.ne, src, params)


def in_place(build: Callable[_P, Tensor], *, flag: int | None = None) -> Callable[_P, Tensor]:
    """Return the builder ``NAME_inplace`` of a builder NAME, which ends in `like`: its result is a view of its first source.

    Parameters
    ----------
    flag : int, optional
        Word of the parameters that is 1 if the op is in place.
    """

    @wraps(build)
    def build_inplace(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        outside = current.set(None)  # the graph collects the view only
        try:
            made = build(*args, **kwargs)
        finally:
            current.reset(outside)
        if flag is not None:
            set_param(made, flag, 1)
        a = made.src[0]
        assert a is not None
        return like(made.op, a, made.src, made.op_params, inplace=True)

    build_inplace.__name__ = build_inplace.__qualname__ = f"{build.__name__}_inplace"
    build_inplace.__doc__ = f"`{build.__name__}` in place: the result is a view of ``a``."
    return build_inplace


# -- refusals --------------------------------------------------------------------


def refuse(op: str, why: str, **tensors: Tensor | None) -> NoReturn:
    """Raise a builder's error: what is wrong, then each tensor with its type and layout."""
    shown = "; ".join(f"{key} is {_describe(t)}" for key, t in tensors.items())
    raise ShapeError(op, f"{why}: {shown}" if shown else why)


def naming(build: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """Return a builder whose error names the argument that is no tensor or no number; all of `pyggml.ops` are made so.

    Nothing is looked at unless the builder fails: a call costs 0.15 µs more, building a graph 3 to 5 %.
    """

    @wraps(build)
    def builder(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        try:
            return build(*args, **kwargs)
        except (AttributeError, TypeError, struct.error):
            _refuse_kind(build, *args, **kwargs)
            raise

    return builder


def _refuse_kind(build: Callable[_P, Tensor], *args: _P.args, **kwargs: _P.kwargs) -> None:
    signature = inspect.signature(build)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:  # Python's own error says which argument is missing or too much
        return
    for name, value in given.items():
        wanted = str(signature.parameters[name].annotation)
        is_tensor = wanted.startswith("Tensor")
        if (value is None and "None" in wanted) or isinstance(
            value, Tensor if is_tensor else Real if wanted in ("int", "float") else object
        ):
            continue
        found = (
            repr(value)[:60] if value is None or isinstance(value, Real | str) else f"of type {type(value).__name__}"
        )
        raise ShapeError(
            build.__name__, f"{name} is {found}, not a {'tensor' if is_tensor else 'number'}",
            hint="" if not is_tensor else "scale and scale_bias take numbers" if isinstance(value, Real) else
            "Graph.input and Context.new_tensor make tensors, set_array fills them",
        ) from None  # fmt: skip


def _describe(t: Tensor | None) -> str:
    if t is None:
        return "None"
    gaps = "" if t.is_contiguous() else f", nb {list(t.nb)}"
    return f"{t.name!r} {t.type.ggml_name} {list(t.ne)}{gaps}"


def member(kinds: type[_Kind], number: int) -> _Kind:
    """Return the enum member of a value; refuse a value that has none."""
    try:
        return kinds(number)
    except ValueError:
        refuse(
            kinds.__name__,
            f"there is no {number!r}; the values are {', '.join(f'{k.value} ({k.name})' for k in kinds)}",
        )


def require_sizes(op: str, *ne: int) -> None:
    """Refuse negative dimensions."""
    if min(ne) < 0:
        refuse(op, f"a dimension cannot have {min(ne)} elements (got {list(ne)})")


# -- conditions ------------------------------------------------------------------


def divides(n: int, whole: int) -> bool:
    """Whether ``whole`` is a multiple of n; False if n is 0."""
    return n != 0 and whole % n == 0


def can_repeat(a: Tensor, b: Tensor) -> bool:
    """Whether repeating ``a`` gives the shape of ``b``.

    Notes
    -----
    Mirrors `ggml_can_repeat`.
    """
    if a.ne == b.ne:
        return True
    if a.is_empty:
        return b.is_empty
    a0, a1, a2, a3 = a.ne
    b0, b1, b2, b3 = b.ne
    return b0 % a0 == 0 and b1 % a1 == 0 and b2 % a2 == 0 and b3 % a3 == 0


def can_mul_mat(a: Tensor, b: Tensor) -> bool:
    """Whether rows have the same length and the matrices of ``a`` broadcast to those of ``b``.

    Notes
    -----
    Mirrors `ggml_can_mul_mat`.
    """
    return a.ne[0] == b.ne[0] and divides(a.ne[2], b.ne[2]) and divides(a.ne[3], b.ne[3])


def is_padded_1d(a: Tensor) -> bool:
    """Whether elements are dense in a row and all rows have the same distance.

    Notes
    -----
    Mirrors `ggml_is_padded_1d`.
    """
    ne, nb = a.ne, a.nb
    return nb[0] == a.type.type_size and nb[2] == nb[1] * ne[1] and nb[3] == nb[2] * ne[2]


def is_contiguous_rows(a: Tensor) -> bool:
    """Whether elements are dense in a row.

    Notes
    -----
    Mirrors `ggml_is_contiguous_rows`.
    """
    return a.nb[0] == a.type.type_size or a.ne[0] == a.type.block_size


def is_matrix(a: Tensor) -> bool:
    """Whether there are at most two dimensions."""
    return a.ne[2] == 1 and a.ne[3] == 1


def is_vector(a: Tensor) -> bool:
    """Whether there is at most one dimension."""
    return a.ne[1] == 1 and a.ne[2] == 1 and a.ne[3] == 1
