"""Tables of tuned configs: which there are, what is in them, how two differ, whether they hold."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from mla_triton import device as devices
from mla_triton.cli.options import Commands, Parser, add_command, show
from mla_triton.configs import shipped, store
from mla_triton.configs.table import FormatError, Header, Items, Row, Table
from mla_triton.device import Device

GPUS = ("cuda", "hip")


def add_commands(commands: Commands) -> None:
    about = "list, show, compare, export and validate tables of tuned configs"
    group = commands.add_parser("configs", help=about, description=about)
    inner = group.add_subparsers(metavar="command", required=True)

    _add_card(add_command(inner, "list", list_tables, "every table, and which of them are in use"))

    command = add_command(inner, "show", show_rows, "the rows that a card's calls are looked up in")
    _add_card(command)
    command.add_argument("--source", choices=("user", "shipped"), help="of one table; default both")
    command.add_argument(
        "--where",
        type=_condition,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="only rows of this value: dtype=bfloat16 heads=16 batch=1",
    )

    about = "what two tables answer differently; 1 where they do"
    command = add_command(inner, "diff", diff, about)
    for name in "ab":
        command.add_argument(name, help='a file, or a shipped table: "sm90"')

    about = "write the rows that a card's calls are looked up in into one file"
    command = add_command(inner, "export", export, about)
    command.add_argument("path")
    _add_card(command)
    command.add_argument("--force", action="store_true", help="overwrite what is there")

    about = "hold every row against its implementation; 1 where one cannot be used"
    command = add_command(inner, "validate", validate, about)
    command.add_argument(
        "path", nargs="*", help="default: the shipped tables and the user's of this card"
    )


def _add_card(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--capability", metavar="LABEL", help='"8.9", "gfx942"; default: the card that is here')
    add("--gpu", metavar="NAME", help="the card's name as its driver gives it, for its user's rows")


def _condition(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return name, value


# -- the card and its tables


def _refuse(arguments: argparse.Namespace, message: str) -> NoReturn:
    parser: Parser = arguments.parser
    parser.error(message)


def _card(arguments: argparse.Namespace) -> Device | None:
    """The card that is asked for or here; None on a machine without a GPU."""
    label = arguments.capability
    try:
        device = devices.current() if label is None else devices.from_label(label)
    except ValueError as error:
        _refuse(arguments, str(error))
    if device.backend not in GPUS:
        if label is not None:
            _refuse(arguments, f"capability must be that of a GPU, got {label!r}")
        return None
    return device if arguments.gpu is None else replace(device, name=arguments.gpu)


def _needed_card(arguments: argparse.Namespace) -> Device:
    device = _card(arguments)
    if device is None:
        _refuse(arguments, "capability must be given where there is no GPU: --capability 9.0")
    return device


class Place(NamedTuple):
    """Where a table lies."""

    name: str
    """"sm90.json" of a shipped one, else its path."""
    capability: tuple[int, int] | None
    """None where it is not shipped."""

    @property
    def kind(self) -> str:
        return "user" if self.capability is None else "shipped"

    def read(self) -> Table:
        """Raises OSError or FormatError where there is no usable table."""
        if self.capability is None:
            return store.read_file(Path(self.name))
        return shipped.load(self.capability)


def _shipped_places() -> list[Place]:
    return [Place(shipped.file_name(at), at) for at in shipped.capabilities()]


def _reason(error: OSError | FormatError) -> str:
    return str(error.strerror if isinstance(error, OSError) else error)


def _tables(arguments: argparse.Namespace, device: Device, source: str | None) -> dict[str, Table]:
    """The tables that a card's calls are looked up in, the user's first; or that of one source.

    Leaves with an error where there is none, or where the user's file cannot be used.
    """
    tables, missing = {}, []
    file = store.path(device)
    if source != "shipped":
        try:
            own = store.read(device)
        except (OSError, FormatError) as error:
            _refuse(arguments, f"the user's file must be a table, got {file}: {_reason(error)}")
        if own is None:
            missing.append(f"there is no {file}")
        else:
            tables["user"] = own
    if source != "user":
        capability = shipped.nearest(device)
        if capability is None:
            missing.append("none is shipped")
        else:
            tables["shipped"] = shipped.load(capability)
    if not tables:
        rule = "capability must be of a card that has a table"
        _refuse(arguments, f"{rule}, got {device.label}: {', and '.join(missing)}")
    return tables


class Listed(NamedTuple):
    """A row and the table that has it: "user" or "shipped"."""

    table: str
    row: Row


def _looked_up(tables: Mapping[str, Table]) -> list[Listed]:
    """The rows that look-up sees: of a key that the user has rows of, none that is shipped."""
    rows: list[Listed] = []
    seen: set[tuple[str, str, Items]] = set()
    for name, table in tables.items():
        rows += [Listed(name, row) for row in table.rows if row.point[:3] not in seen]
        seen |= {row.point[:3] for row in table.rows}
    return sorted(rows, key=lambda listed: listed.row.order)


# -- list


def list_tables(arguments: argparse.Namespace) -> int:
    """Every table of the package and of the user, usable or not."""
    device = _card(arguments)
    places = [*_shipped_places(), *(Place(str(file), None) for file in _files_below(store.root()))]
    tables = [_facts(place, device) for place in places]
    card = None if device is None else {"name": device.name, "label": device.label}
    facts = {"device": card, "directory": str(store.root()), "tables": tables}
    unknown = "no GPU here; --capability says for which card a table is in use"
    names = ["capability", "gpu", "rows", "tuned", "modelled", "date", "mla_triton", "triton"]
    body = [
        ["*" if table["in_use"] else "", *(table[name] for name in names), table["file"]]
        for table in tables
    ]
    notes = [f"{table['file']}: {table['note']}" for table in tables if table["note"]]
    lines = [
        f"card    {card['name']} ({card['label']})" if card else f"card    {unknown}",
        f"user's  {store.root()}",
        *(["", *_aligned(["use", *names, "file"], body)] if body else ["no tables"]),
        *(["", *notes] if notes else []),
    ]
    show(facts, arguments, lines)
    return 0


def _files_below(directory: Path) -> list[Path]:
    """The user's tables and what was set aside; neither locks nor what is being written."""
    passing = (store.LOCK, store.TEMPORARY)
    found = (file for file in directory.rglob("*") if not file.name.endswith(passing))
    return sorted(file for file in found if file.suffix == ".json" or not file.is_dir())


def _facts(place: Place, device: Device | None) -> dict[str, Any]:
    """What is known of a table; `note` says why it is not in use, or what to know of it."""
    facts: dict[str, Any] = {"file": place.name, "table": place.kind, "in_use": False}
    names = ("capability", "gpu", "date", "mla_triton", "torch", "triton", "protocol", "commit")
    facts |= dict.fromkeys(("rows", "tuned", "modelled", *names, "note"))
    try:
        table = place.read()
    except (OSError, FormatError) as error:
        return facts | {"note": f"cannot be used: {_reason(error)}"}
    sources = Counter(row.source for row in table.rows)
    facts |= {"rows": len(table.rows), "tuned": sources["tuned"], "modelled": sources["modelled"]}
    facts |= {name: getattr(table.header, name) for name in names}
    if device is not None:
        in_use, note = _use(place, table.header, device)
        facts |= {"in_use": in_use, "note": note}
    return facts


def _use(place: Place, header: Header, device: Device) -> tuple[bool, str | None]:
    """(whether a card's calls are looked up in a table, what there is to say of it)."""
    if place.capability is not None:
        in_use = place.capability == shipped.nearest(device)
        other = in_use and place.capability != device.capability
        note = f"{device.label} has no table, the nearest lower one serves"
        return in_use, note if other else None
    file = store.path(device)
    reason = store.why_not(header, device)
    if reason is None and Path(place.name) != file:
        reason = f"only {file} is read"
    return reason is None, None if reason is None else f"not in use: {reason}"


# -- show


def show_rows(arguments: argparse.Namespace) -> int:
    """The rows of one table, or of both as look-up sees them."""
    device = _needed_card(arguments)
    tables = _tables(arguments, device, arguments.source)
    rows = _looked_up(tables)
    named = {name for listed in rows for name in _columns(listed)}
    for name, _ in arguments.where:
        if rows and name not in named:
            known = ", ".join(sorted(named))
            _refuse(arguments, f"where must name one of {known}, got {name!r}")
    rows = [
        listed
        for listed in rows
        if all(str(_columns(listed).get(name)) == value for name, value in arguments.where)
    ]
    headers = {name: asdict(table.header) for name, table in tables.items()}
    facts = {
        "headers": headers,
        "rows": [{"table": listed.table, **listed.row.plain()} for listed in rows],
    }
    lines = [
        f"{name:<9}{header['capability']}, {header['gpu']}, {header['date']}, "
        f"mla_triton {header['mla_triton']}, torch {header['torch']}, triton {header['triton']}"
        for name, header in headers.items()
    ]
    columns = list(dict.fromkeys(name for listed in rows for name in _columns(listed)))
    body = [[_columns(listed).get(name) for name in columns] for listed in rows]
    lines += ["", *_aligned(columns, body)] if rows else ["no rows"]
    show(facts, arguments, lines)
    return 0


def _columns(listed: Listed) -> dict[str, Any]:
    """A row's values by the names that it is shown and asked for with."""
    table, row = listed
    point = row.point
    return {
        "op": point.op,
        "impl": point.impl,
        **dict(point.key),
        "batch": point.batch,
        "length": point.length,
        **dict(row.config),
        "us": row.us,
        "heuristic_us": row.heuristic_us,
        "source": row.source,
        "table": table,
    }


# -- diff


def diff(arguments: argparse.Namespace) -> int:
    """Rows that one table has alone, and points at which the tables have other configs."""
    names = {"a": arguments.a, "b": arguments.b}
    tables = {which: _table_of(arguments, which, name) for which, name in names.items()}
    a, b = ({row.point: row for row in _sorted(table)} for table in tables.values())
    alone = {
        "a": [row for point, row in a.items() if point not in b],
        "b": [row for point, row in b.items() if point not in a],
    }
    both = [(row, b[point]) for point, row in a.items() if point in b]
    changed = [(here, there) for here, there in both if here.config != there.config]
    same = len(both) - len(changed)
    facts = {
        **{which: {"name": names[which], **asdict(tables[which].header)} for which in "ab"},
        **{f"only_{which}": [row.plain() for row in rows] for which, rows in alone.items()},
        "changed": [
            {"a": here.plain(), "b": there.plain(), "ratio": _ratio(here, there)}
            for here, there in changed
        ],
        "same": same,
    }
    lines = []
    for which, name in names.items():
        header = tables[which].header
        lines.append(f"{which}  {name}: {header.capability}, {header.gpu}, {header.date}")
    for which, rows in alone.items():
        lines += [f"only in {which}  {_point(row)}: {_config(row)}" for row in rows]
    lines += [
        f"changed    {_point(here)}: {_config(here)} -> {_config(there)}{_times(here, there)}"
        for here, there in changed
    ]
    lines.append(
        f"{same} rows have the same config, {len(changed)} another; "
        f"{len(alone['a'])} are in a alone, {len(alone['b'])} in b alone"
    )
    show(facts, arguments, lines)
    return 1 if changed or any(alone.values()) else 0


def _table_of(arguments: argparse.Namespace, which: str, name: str) -> Table:
    """A shipped table by its name, or a file."""
    places = {place.name.removesuffix(".json"): place for place in _shipped_places()}
    try:
        return places.get(name, Place(name, None)).read()
    except FileNotFoundError:
        known = f" or a shipped table ({', '.join(places)})" if places else ""
        _refuse(arguments, f"{which} must be a file{known}, got {name!r}")
    except (OSError, FormatError) as error:
        _refuse(arguments, f"{which} must be a table, got {name!r}: {_reason(error)}")


def _sorted(table: Table) -> list[Row]:
    return sorted(table.rows, key=lambda row: row.order)


def _ratio(here: Row, there: Row) -> float | None:
    """Time of the second over that of the first: above 1 it is slower."""
    return None if here.us is None or there.us is None else there.us / here.us


def _times(here: Row, there: Row) -> str:
    ratio = _ratio(here, there)
    return "" if ratio is None else f", {here.us:.1f} us -> {there.us:.1f} us (x{ratio:.3f})"


def _point(row: Row) -> str:
    op, impl, key, batch, length = row.point
    return f"{op} {impl} {_values(key)} batch={batch} length={length}"


def _config(row: Row) -> str:
    return f"[{_values(row.config)}]"


def _values(items: Items) -> str:
    return " ".join(f"{name}={value}" for name, value in items)


# -- export


def export(arguments: argparse.Namespace) -> int:
    """Writes the rows that look-up sees under the user's header, or that of the shipped table."""
    device = _needed_card(arguments)
    file = Path(arguments.path)
    tables = _tables(arguments, device, None)
    rows = _looked_up(tables)
    header = next(iter(tables.values())).header
    text = Table(header, tuple(listed.row for listed in rows)).dumps()
    if os.path.lexists(file) and not arguments.force:
        _refuse(arguments, f"path must not be there yet, got {file}: --force overwrites it")
    try:
        with store.beside(file, text) as new:
            os.replace(new, file)
    except OSError as error:
        reason = _reason(error)
        _refuse(arguments, f"path must be a file that can be written, got {file}: {reason}")
    counts = Counter(listed.table for listed in rows)
    facts = {"file": str(file), "user": counts["user"], "shipped": counts["shipped"]}
    line = f"wrote {counts['user']} rows of the user's and {counts['shipped']} shipped to {file}"
    show(facts, arguments, [line])
    return 0


# -- validate


class Problem(NamedTuple):
    """A rule that a table breaks."""

    file: str
    row: int | None
    """Its number in the file, from 1; None where it is not about one row."""
    rule: str


def validate(arguments: argparse.Namespace) -> int:
    """Holds tables against the implementations they are for; 0 where every row can be used."""
    found: list[Problem] = []
    places = [Place(path, None) for path in arguments.path] or _in_use()
    rows = 0
    for place in places:
        try:
            table = place.read()
        except OSError as error:
            reason = _reason(error)
            _refuse(arguments, f"path must be a file that can be read, got {place.name}: {reason}")
        except FormatError as error:
            found.append(Problem(place.name, None, str(error)))
            continue
        rows += len(table.rows)
        misplaced = None if arguments.path else _misplaced(place, table.header)
        if misplaced is not None:
            found.append(Problem(place.name, None, misplaced))
        found += [Problem(place.name, *broken) for broken in _broken_rules(table)]
    facts = {
        "ok": not found,
        "files": len(places),
        "rows": rows,
        "problems": [problem._asdict() for problem in found],
    }
    lines = [
        f"{file}: {rule}" if row is None else f"{file}: row {row}: {rule}"
        for file, row, rule in found
    ]
    verdict = f"{len(found)} rules are broken" if found else "every row can be found and run"
    summary = f"{len(places)} tables, {rows} rows: {verdict}" if places else "no tables"
    show(facts, arguments, [*lines, summary])
    return 1 if found else 0


def _in_use() -> list[Place]:
    """The shipped tables, and the user's of the card that is here."""
    device = devices.current()
    file = store.path(device)
    own = [Place(str(file), None)] if device.backend in GPUS and file.exists() else []
    return [*_shipped_places(), *own]


def _misplaced(place: Place, header: Header) -> str | None:
    """What a header has against the place that its table is looked for at."""
    if place.capability is None:
        return store.why_not(header, devices.current())
    label = ".".join(map(str, place.capability))
    if header.capability == label:
        return None
    return f"header.capability must be {label}, got {header.capability!r}"


def _broken_rules(table: Table) -> Iterator[tuple[int | None, str]]:
    # It imports kernels, which the other commands do without.
    from mla_triton.configs import validation

    return validation.broken_rules(table)


def _aligned(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Columns as wide as their widest value, numbers to the right; "-" for None."""
    texts = [[_text(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *texts, strict=True)]
    numbers = [
        all(isinstance(value, (int, float, type(None))) for value in column)
        for column in zip(*rows, strict=True)
    ] or [False] * len(names)
    return [
        "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(row, widths, numbers, strict=True)
        ).rstrip()
        for row in (list(names), *texts)
    ]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
