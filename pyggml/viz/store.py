"""Records as JSON and back: columns by kind of record, each string once, so that 50,000 events stay a few megabytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, astuple, fields
from itertools import repeat
from typing import Any, get_args

from ..clock import Span
from ..errors import FormatError
from ..record import Record, SplitInput
from .numbering import number_records

__all__ = ["VERSION", "pack_records", "unpack_records"]

#: Of the layout; a reader refuses a larger one. 2: records carry their graph, run and clock.
VERSION = 2

_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Record)}  # classes of different fields

#: How JSON's values become a field's, by the field's name.
_READERS: dict[str, Callable[[Any], Any]] = {
    "virtual": lambda span: None if span is None else Span(*span),
    "used": tuple,
    "engines": tuple,
    "causes": lambda pairs: tuple((str(cause), int(n)) for cause, n in pairs),
    "inputs": lambda rows: tuple(_input(row) for row in rows),
}


def _input(row: list[Any]) -> SplitInput:
    values: dict[str, Any] = {
        f.name: tuple(v) if isinstance(v, list) else v for f, v in zip(fields(SplitInput), row, strict=True)
    }
    return SplitInput(**values)


def pack_records(records: Iterable[Record]) -> dict[str, Any]:
    """Return records as a value of JSON.

    Examples
    --------
    >>> from pyggml.record import CallbackRecord
    >>> record = CallbackRecord(0, "y", True, False, 1.0, 1.5)
    >>> unpack_records(pack_records([record]), "a file") == [record]
    True
    """
    strings: dict[str, int] = {}
    columns: dict[str, dict[str, Any]] = {}
    kinds: dict[str, int] = {}
    order: list[int] = []
    for record in records:
        kind = type(record).__name__
        if kind not in columns:
            columns[kind] = {f.name: [] for f in fields(record)}
            kinds[kind] = len(kinds)
        order.append(kinds[kind])
        for name, column in columns[kind].items():
            column.append(_plain(getattr(record, name), strings))
    for table in columns.values():
        for name, column in table.items():
            if all(isinstance(value, dict) for value in column):
                table[name] = {"s": [value["s"] for value in column]}
    return {
        "version": VERSION, "kinds": list(kinds), "order": order, "strings": list(strings), "columns": columns,
    }  # fmt: skip


def _plain(value: Any, strings: dict[str, int]) -> Any:
    """Return a field's value for JSON; a string becomes its number in an object, as nothing else is one."""
    if isinstance(value, str):
        return {"s": strings.setdefault(value, len(strings))}
    if isinstance(value, SplitInput):
        return [_plain(v, strings) for v in astuple(value)]
    if isinstance(value, tuple):
        return [_plain(v, strings) for v in value]
    return value


def unpack_records(packed: Mapping[str, Any], path: str) -> list[Record]:
    """Return the records of a file; kinds and fields that a later version added are left out.

    Parameters
    ----------
    packed : mapping
        As `pack_records` returned it.
    path : str
        Whose errors tell.

    Raises
    ------
    FormatError
        The value is none of `pack_records`, or of a version that is not known.
    """
    try:
        if packed["version"] > VERSION:
            raise FormatError(path, f"its records have layout {packed['version']}", hint="a newer pyggml wrote it")
        strings = packed["strings"]
        made = [_unpack(kind, packed["columns"][kind], strings) for kind in packed["kinds"]]
        records = [record for i in packed["order"] if (record := next(made[i])) is not None]
        return number_records(records) if packed["version"] < 2 else records
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, StopIteration, RuntimeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(path, f"its records cannot be read: {error!r}", hint="write the timeline again") from error


def _unpack(kind: str, packed: Mapping[str, Any], strings: list[str]) -> Iterator[Any]:
    """Yield the records of one kind in their order; None for each of a kind that is not known."""
    cls = _KINDS.get(kind)
    if cls is None:
        yield from repeat(None)
        return
    columns = {n: [{"s": i} for i in c["s"]] if isinstance(c, dict) else c for n, c in packed.items()}
    known = {f.name: f for f in fields(cls)}
    missing = [
        name
        for name, f in known.items()
        if name not in columns and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise KeyError(f"{kind} without {', '.join(missing)}")
    read = {name: _READERS.get(name, lambda value: value) for name in known}
    names = [name for name in columns if name in known]
    for values in zip(*(columns[name] for name in names), strict=True):
        yield cls(**{n: read[n](_restore(v, strings)) for n, v in zip(names, values, strict=True)})


def _restore(value: Any, strings: list[str]) -> Any:
    if isinstance(value, dict):
        return strings[value["s"]]
    if isinstance(value, list):
        return [_restore(v, strings) for v in value]
    return value
