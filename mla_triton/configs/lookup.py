"""From a problem to the config that runs it, with the reason. Total: the heuristic is always there.

The rows of one key come from one table: the user's if it has any, else the shipped one. Of them,
the nearest batch and length is taken (`Table.find`). A row whose config does not fit the problem on
this card is passed over, and the reason says so. Tables are read once in a process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

from mla_triton.configs import shipped, store
from mla_triton.configs.table import Found, Items, Row, Table
from mla_triton.device import Device


class Choice(NamedTuple):
    """A config and where it is from."""

    config: Any
    """An instance of the implementation's `Config`."""
    source: str
    """"user", "tuned" or "modelled" (shipped rows), or "heuristic"."""
    reason: str
    row: Row | None


@dataclass(frozen=True)
class Origin:
    """A table, and how to speak of it."""

    table: Table
    name: str
    is_user: bool
    note: str = ""
    """What to know of all of its rows."""


def length_bucket(length: int) -> int:
    """The power of two that a length is looked up as: the smallest that is not below it."""
    return 1 << max(0, length - 1).bit_length()


def choose(
    implementation: ModuleType, problem: Any, device: Device, row_tile: int | None = None
) -> Choice:
    """The config of a problem: a row of the user's, a shipped row, or the heuristic.

    `row_tile` is that of a plan which the problem is cut by, by default the implementation's own.

    `implementation` is a kernel module; it gives `OP`, `NAME`, `Config`, `is_valid`,
    `choose` (its heuristic with the reason) and `tuning_point(problem, device, rows)`: (key, batch,
    length), or None for a problem that is never tuned. Reads no tensor, times nothing.
    """
    passed_over = []
    point = implementation.tuning_point(problem, device, row_tile)
    if point is not None:
        key, batch, length = point
        for origin in origins(device):
            found = origin.table.find(
                implementation.OP, implementation.NAME, key, batch, length_bucket(length)
            )
            if found is None:
                continue
            config, rule = usable(implementation, found.row.config, problem, device, row_tile)
            if config is not None:
                source = "user" if origin.is_user else found.row.source
                return Choice(config, source, f"{_say(found, origin)}; {rule}", found.row)
            passed_over.append(f"passed over {dict(found.row.config)} of {origin.name}: {rule}")
    config, reason = implementation.choose(problem, device, row_tile)
    if point is not None and not passed_over:
        passed_over.append(f"no tuned row: {_why_no_row(device, key)}")
    return Choice(config, "heuristic", "; ".join((f"heuristic: {reason}", *passed_over)), None)


@lru_cache(maxsize=64)
def origins(device: Device) -> tuple[Origin, ...]:
    """The tables for a device, in the order in which they are asked."""
    return tuple(_origins(device))


def tables(device: Device) -> list[str]:
    """The tables that a card's configs come from, first to last, each in a line for a reader."""
    said = []
    for origin in origins(device):
        sources = {row.source for row in origin.table.rows}
        how = "modelled, never timed" if sources == {"modelled"} else "timed"
        on = "" if sources == {"modelled"} else f" on {origin.table.header.gpu}"
        text = f"{origin.name}: {len(origin.table.rows)} rows {how}{on}"
        said.append("; ".join(filter(None, (text, origin.note))))
    return said


def forget() -> None:
    """Lets the next look-up read the tables again."""
    origins.cache_clear()


def _origins(device: Device) -> Iterator[Origin]:
    if device.backend not in ("cuda", "hip"):
        return
    own = store.load(device)
    if own is not None:
        yield Origin(own, str(store.path(device)), is_user=True)
    capability = shipped.nearest(device)
    if capability is not None:
        name = shipped.file_name(capability)
        other = capability != device.capability
        note = f"{device.label} has no table, the nearest lower one serves" if other else ""
        yield Origin(shipped.load(capability), f"the shipped {name}", is_user=False, note=note)


def usable(
    implementation: ModuleType,
    row: Items,
    problem: Any,
    device: Device,
    row_tile: int | None = None,
) -> tuple[Any, str]:
    """(config, rule) of a row's values; (None, why not) where they are none for this problem."""
    names = {field.name for field in fields(implementation.Config)}
    values = dict(row)
    if set(values) != names or not all(type(value) is int for value in values.values()):
        return None, f"a config has the integers {', '.join(sorted(names))}"
    config = implementation.Config(**values)
    valid, rule = implementation.is_valid(config, problem, device, row_tile)
    return (config, rule) if valid else (None, rule)


def _say(found: Found, origin: Origin) -> str:
    """Where a row is from, for a reader."""
    point, header = found.row.point, origin.table.header
    where = f"{'row' if found.exact else 'nearest row'} (batch {point.batch}, "
    where += f"length {point.length}) of {origin.name}"
    if found.row.source == "modelled":
        how = "modelled: never timed"
    else:
        how = f"timed on {header.gpu}"
        if found.row.us is not None:
            how += f", {found.row.us:.1f} us"
        if found.row.heuristic_us is not None:
            how += f" (heuristic {found.row.heuristic_us:.1f})"
    return "; ".join(filter(None, (f"{where}, {how}", origin.note)))


def _why_no_row(device: Device, key: Items) -> str:
    if not origins(device):
        return f"{device.label} has no table"
    return f"no table has its key (implementation, {', '.join(name for name, _ in key)})"
