"""Records as JSON and back: columns by kind of record, each string once, so that 50,000 events need a few megabytes."""

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

#: Version of the layout; readers refuse a larger one. 2: records have their graph, run and clock.
VERSION = 2

_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Record)}  # classes of different fields

#: Functions from JSON's values to a field's, by the field's name.
_READERS: dict[str, Callable[[Any], Any]] = {
    "virtual": lambda span: None if span is None else Span(*span),
    "used": tuple,
    "engines": tuple,
    "causes": lambda pairs: tuple((str(cause), int(n)) for cause, n in pairs),
    "inputs": lambda rows: tuple(_input(row) for row in rows),
}


def _input(row: list[Any]) -> SplitInput:
    """Return an input; fields that its file does not have get their defaults."""
    values: dict[str, Any] = {
        f.name: tuple(v) if isinstance(v, list) else v for f, v in zip(fields(SplitInput), row, strict=False)
    }
    return SplitInput(**values)


def pack_records(records: Iterable[Record]) -> dict[str, Any]:
    """Return records as a JSON value.

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
    """Return a field's value for JSON; a string becomes an object with its number."""
    if isinstance(value, str):
        return {"s": strings.setdefault(value, len(strings))}
    if isinstance(value, SplitInput):
        return [_plain(v, strings) for v in astuple(value)]
    if isinstance(value, tuple):
        return [_plain(v, strings) for v in value]
    return value


def unpack_records(packed: Mapping[str, Any], path: str) -> list[Record]:
    """Return the records of a file, without kinds and fields that a later version added.

    Parameters
    ----------
    packed : mapping
        A value of `pack_records`.
    path : str
        The file's name, for errors.

    Raises
    ------
    FormatError
        The value is not from `pack_records`, or has an unknown version.
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
        raise FormatError(
            path, f"its records cannot be read: {type(error).__name__}: {error}", hint="write the timeline again"
        ) from error


def _unpack(kind: str, packed: Mapping[str, Any], strings: list[str]) -> Iterator[Any]:
    """Yield the records of one kind in order; None for each record of an unknown kind."""
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
