"""A table of tuned configurations: its rows, its file format, and what makes a file unusable.

The file is JSON with one row a line, sorted, so that a change of it can be read in a diff:

    {
      "schema": 1,
      "header": {"capability": "9.0", "gpu": "NVIDIA H200", ...},
      "rows": [
        {"op": "decode", "impl": "portable", "key": {...}, "batch": 16, "length": 4096, ...},
        ...
      ]
    }

A row holds for one `key` (what cannot be interpolated, by the names that its operation gives), one
batch and one length. Nothing in a file is executed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

SCHEMA = 1
SOURCES = ("tuned", "modelled")
"""Where a row is from: timed on the card of the header, or made of heuristic and resource check."""

Scalar = str | int | bool
Items = tuple[tuple[str, Scalar], ...]
"""A small mapping that can be hashed, sorted by name."""


class FormatError(ValueError):
    """A file that is not a table this version can use; the message says why."""


class NewerSchemaError(FormatError):
    """A file that a newer version of the package wrote, which it will want to read again."""


def items(mapping: Mapping[str, Scalar]) -> Items:
    return tuple(sorted(mapping.items()))


@dataclass(frozen=True)
class Header:
    """Where a table is from."""

    capability: str
    """As `Device.label`: "9.0", "gfx942"."""
    gpu: str
    """Name of the card as its driver gives it; of the usual card where nothing was timed."""
    sm_count: int
    mla_triton: str
    torch: str
    triton: str
    date: str
    protocol: str
    """How the microseconds were measured."""
    commit: str
    """Of the source that was run; "" where it was an installed package."""


class Point(NamedTuple):
    """What a row holds for."""

    op: str
    impl: str
    key: Items
    batch: int
    length: int


@dataclass(frozen=True)
class Row:
    """One tuned point: which config runs it, and how long it took."""

    point: Point
    config: Items
    us: float | None
    """Microseconds of a call; None for a modelled row."""
    heuristic_us: float | None
    """The same with the heuristic's config, measured beside it."""
    source: str

    @property
    def order(self) -> tuple[Any, ...]:
        """What rows are sorted by."""
        op, impl, key, batch, length = self.point
        # A name has values of one type, but a broken file may not: types are compared first.
        values = [(type(value).__name__, value) for _, value in key]
        return op, impl, [name for name, _ in key], values, batch, length

    def plain(self) -> dict[str, Any]:
        """As the file has it."""
        op, impl, key, batch, length = self.point
        return {
            "op": op,
            "impl": impl,
            "key": dict(key),
            "batch": batch,
            "length": length,
            "config": dict(self.config),
            "us": self.us,
            "heuristic_us": self.heuristic_us,
            "source": self.source,
        }


class Found(NamedTuple):
    """A row that a look-up came to."""

    row: Row
    exact: bool
    """Whether batch and length are those that were asked for."""


@dataclass(frozen=True)
class Table:
    header: Header
    rows: tuple[Row, ...]

    @cached_property
    def _index(self) -> dict[tuple[str, str, Items], list[Row]]:
        index: dict[tuple[str, str, Items], list[Row]] = {}
        for row in self.rows:
            index.setdefault(row.point[:3], []).append(row)
        return index

    def find(self, op: str, impl: str, key: Items, batch: int, length: int) -> Found | None:
        """The row for a call, or None where its key was never tuned.

        Exact on `key`; of the tuned batches the smallest that is not below the call's, else the
        largest; of that batch's lengths likewise.
        """
        same_key = self._index.get((op, impl, key))
        if same_key is None:
            return None
        near = _nearest((row.point.batch for row in same_key), batch)
        same_batch = [row for row in same_key if row.point.batch == near]
        far = _nearest((row.point.length for row in same_batch), length)
        row = next(row for row in same_batch if row.point.length == far)
        return Found(row, (near, far) == (batch, length))

    def at(self, point: Point) -> Row | None:
        """The row of exactly this point."""
        same_key = self._index.get(point[:3], [])
        return next((row for row in same_key if row.point == point), None)

    def with_rows(self, rows: Iterable[Row]) -> Table:
        """The table with these rows in place of its own at the same points."""
        merged = {row.point: row for row in (*self.rows, *rows)}
        return Table(self.header, tuple(merged.values()))

    def dumps(self) -> str:
        """The text of the file."""
        lines = [json.dumps(row.plain()) for row in sorted(self.rows, key=lambda row: row.order)]
        rows = "".join(f"\n    {line}," for line in lines).removesuffix(",")
        header = json.dumps(asdict(self.header), indent=4)[:-1].rstrip() + "\n  }"
        return f'{{\n  "schema": {SCHEMA},\n  "header": {header},\n  "rows": [{rows}\n  ]\n}}\n'


def loads(text: str) -> Table:
    """The table that a file's text holds; FormatError where it holds none."""
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"it is not JSON ({error})") from error
    if not isinstance(plain, dict) or "schema" not in plain:
        raise FormatError("it is not a table of configurations: it has no schema")
    schema = plain["schema"]
    if type(schema) is not int or schema != SCHEMA:
        newer = type(schema) is int and schema > SCHEMA
        kind = NewerSchemaError if newer else FormatError
        raise kind(f"its schema is {schema!r}, this version reads {SCHEMA}")
    header = _header(plain.get("header"))
    rows = plain.get("rows")
    if not isinstance(rows, list):
        raise FormatError("it has no list of rows")
    made = tuple(_row(number, row) for number, row in enumerate(rows, 1))
    points = {row.point for row in made}
    if len(points) < len(made):
        raise FormatError("it has several rows for one point")
    return Table(header, made)


def _header(plain: Any) -> Header:
    wanted = {field.name: int if field.name == "sm_count" else str for field in fields(Header)}
    if not isinstance(plain, dict) or set(plain) != set(wanted):
        raise FormatError(f"its header must have {', '.join(wanted)}")
    for name, kind in wanted.items():
        if type(plain[name]) is not kind:
            raise FormatError(f"header.{name} must be {kind.__name__}, got {plain[name]!r}")
    return Header(**plain)


def _row(number: int, plain: Any) -> Row:
    wanted = {"op", "impl", "key", "batch", "length", "config", "us", "heuristic_us", "source"}
    if not isinstance(plain, dict) or set(plain) != wanted:
        raise FormatError(f"row {number} must have {', '.join(sorted(wanted))}")
    for name in ("op", "impl"):
        if not isinstance(plain[name], str):
            raise FormatError(f"row {number}: {name} must be a string, got {plain[name]!r}")
    for name in ("batch", "length"):
        if type(plain[name]) is not int or plain[name] < 1:
            raise FormatError(
                f"row {number}: {name} must be a positive integer, got {plain[name]!r}"
            )
    if plain["length"] & (plain["length"] - 1):
        raise FormatError(f"row {number}: length must be a power of two, got {plain['length']}")
    for name in ("us", "heuristic_us"):
        us = plain[name]
        if us is not None and not (type(us) in (int, float) and 0 < us <= sys.float_info.max):
            raise FormatError(f"row {number}: {name} must be positive or null, got {us!r}")
    if plain["source"] not in SOURCES:
        raise FormatError(
            f"row {number}: source must be one of {', '.join(SOURCES)}, got {plain['source']!r}"
        )
    return Row(
        Point(
            plain["op"],
            plain["impl"],
            _scalars(number, "key", plain["key"]),
            plain["batch"],
            plain["length"],
        ),
        _scalars(number, "config", plain["config"]),
        plain["us"],
        plain["heuristic_us"],
        plain["source"],
    )


def _scalars(number: int, name: str, plain: Any) -> Items:
    if not isinstance(plain, dict) or not all(
        isinstance(value, (str, int)) for value in plain.values()
    ):
        raise FormatError(f"row {number}: {name} must map names to strings or integers")
    return items(plain)


def _nearest(tuned: Iterable[int], wanted: int) -> int:
    """The smallest that is not below `wanted`, else the largest."""
    return min(tuned, key=lambda size: (size < wanted, abs(size - wanted)))
