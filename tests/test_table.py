"""The file format of tuned configs, every message about a file, and the rule of the nearest row."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import tables
from hypothesis import given
from hypothesis import strategies as st

from mla_triton.configs import table as format_
from mla_triton.configs.table import (
    FormatError,
    Header,
    NewerSchemaError,
    Point,
    Row,
    Table,
    items,
    loads,
)

SCALARS = st.text() | st.integers(-(2**40), 2**40) | st.booleans()
MAPPINGS = st.dictionaries(st.text(), SCALARS, max_size=4).map(items)
MICROSECONDS = st.none() | st.floats(0, exclude_min=True, allow_infinity=False)
POINTS = st.builds(
    Point,
    st.text(),
    st.text(),
    MAPPINGS,
    st.integers(1, 2**31),
    st.integers(0, 31).map(lambda power: 1 << power),
)
ROWS = st.builds(
    Row, POINTS, MAPPINGS, MICROSECONDS, MICROSECONDS, st.sampled_from(format_.SOURCES)
)
HEADERS = st.builds(
    Header, *[st.integers() if name == "sm_count" else st.text() for name in Header.__annotations__]
)
TABLES = st.builds(
    Table, HEADERS, st.lists(ROWS, max_size=6, unique_by=lambda row: row.point).map(tuple)
)


# -- writing and reading


@given(TABLES)
def test_what_is_written_is_read_again(table):
    again = loads(table.dumps())
    assert again.header == table.header
    assert len(again.rows) == len(table.rows)
    assert set(again.rows) == set(table.rows)


@given(TABLES, st.randoms(use_true_random=False))
def test_the_text_does_not_depend_on_the_order_of_rows(table, shuffler):
    rows = list(table.rows)
    shuffler.shuffle(rows)
    assert Table(table.header, tuple(rows)).dumps() == table.dumps()
    assert loads(table.dumps()).dumps() == table.dumps()


@given(TABLES)
def test_a_row_has_a_line(table):
    lines = table.dumps().split("\n")
    begin = lines.index('  "rows": [') + 1
    body = lines[begin : begin + len(table.rows)]
    read = [json.loads(line.rstrip(",")) for line in body]
    assert sorted(map(str, read)) == sorted(str(row.plain()) for row in table.rows)
    assert lines[begin + len(table.rows) :] == ["  ]", "}", ""]


def test_rows_are_sorted_as_numbers():
    rows = [tables.row(batch, length) for batch in (16, 1, 128, 2) for length in (4096, 512)]
    random.Random(0).shuffle(rows)
    again = loads(tables.table(*rows).dumps())
    points = [(row.point.batch, row.point.length) for row in again.rows]
    assert points == [(b, n) for b in (1, 2, 16, 128) for n in (512, 4096)]


def test_values_of_different_types_can_be_sorted():
    """No operation writes such keys, but a file that was edited by hand has to be readable."""
    rows = [tables.row(key=items({"heads": value})) for value in ("16", 16, 8, "8")]
    again = loads(tables.table(*rows).dumps())
    assert [dict(row.point.key)["heads"] for row in again.rows] == [8, 16, "16", "8"]


def test_the_text_of_a_file():
    """What the module's docstring promises, to the letter."""
    text = tables.table(tables.row()).dumps()
    assert text.startswith('{\n  "schema": 1,\n  "header": {\n    "capability": "9.0",\n')
    assert text.endswith(
        '  "rows": [\n'
        '    {"op": "decode", "impl": "portable", "key": {"dtype": "bfloat16", "format": "16bit", '
        '"heads": 16, "latent": 512, "page_size": 64, "rope": 64, "row_tile": 16, "s_q": 1, '
        '"value_dim": 512}, "batch": 16, "length": 4096, "config": {"block_n": 32, '
        '"num_stages": 2, "num_warps": 4}, "us": 10.0, "heuristic_us": 10.0, "source": "tuned"}\n'
        "  ]\n}\n"
    )


# -- what is no table


def plain() -> dict[str, Any]:
    return json.loads(tables.table(tables.row(1), tables.row(2)).dumps())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is not JSON (Expecting value: line 1 column 1 (char 0))"),
        (tables.table(tables.row()).dumps()[:-20], "it is not JSON ("),
        ("[" * 200_000, "it is not JSON ("),
        ("[]", "it is not a table of configurations: it has no schema"),
        ("null", "it is not a table of configurations: it has no schema"),
        ('{"rows": []}', "it is not a table of configurations: it has no schema"),
        ('{"schema": 0}', "its schema is 0, this version reads 1"),
        ('{"schema": 2}', "its schema is 2, this version reads 1"),
        ('{"schema": "1"}', "its schema is '1', this version reads 1"),
        ('{"schema": true}', "its schema is True, this version reads 1"),
        ('{"schema": 1}', "its header must have capability, gpu, sm_count, mla_triton, torch, "),
    ],
)
def test_text_that_is_no_table(text, message):
    with pytest.raises(FormatError) as error:
        loads(text)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(("schema", "newer"), [(2, True), (99, True), (0, False), ("2", False)])
def test_a_newer_schema_is_told_from_a_broken_one(schema, newer):
    with pytest.raises(FormatError) as error:
        loads(json.dumps(plain() | {"schema": schema}))
    assert isinstance(error.value, NewerSchemaError) is newer


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sm_count", "132", "header.sm_count must be int, got '132'"),
        ("sm_count", True, "header.sm_count must be int, got True"),
        ("gpu", None, "header.gpu must be str, got None"),
        ("triton", 3.6, "header.triton must be str, got 3.6"),
        ("more", "", "its header must have capability, gpu, sm_count, mla_triton, torch, triton, "),
    ],
)
def test_a_header_that_is_none(name, value, message):
    given = plain()
    given["header"][name] = value
    with pytest.raises(FormatError) as error:
        loads(json.dumps(given))
    assert str(error.value).startswith(message)


def test_rows_must_be_a_list():
    for rows in ({}, None, "rows"):
        with pytest.raises(FormatError) as error:
            loads(json.dumps(plain() | {"rows": rows}))
        assert str(error.value) == "it has no list of rows"


NAMES = "batch, config, heuristic_us, impl, key, length, op, source, us"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("op", 1, "op must be a string, got 1"),
        ("impl", None, "impl must be a string, got None"),
        ("batch", 0, "batch must be a positive integer, got 0"),
        ("batch", True, "batch must be a positive integer, got True"),
        ("batch", 1.0, "batch must be a positive integer, got 1.0"),
        ("length", -4, "length must be a positive integer, got -4"),
        ("length", 48, "length must be a power of two, got 48"),
        ("us", 0, "us must be positive or null, got 0"),
        ("us", -1.5, "us must be positive or null, got -1.5"),
        ("us", "fast", "us must be positive or null, got 'fast'"),
        ("us", True, "us must be positive or null, got True"),
        ("us", float("nan"), "us must be positive or null, got nan"),
        ("heuristic_us", float("inf"), "heuristic_us must be positive or null, got inf"),
        ("us", 10**400, "us must be positive or null, got 1000"),
        ("source", "guessed", "source must be one of tuned, modelled, got 'guessed'"),
        ("source", ["tuned"], "source must be one of tuned, modelled, got ['tuned']"),
        ("key", [], "key must map names to strings or integers"),
        ("key", {"heads": 1.5}, "key must map names to strings or integers"),
        ("key", {"heads": None}, "key must map names to strings or integers"),
        ("config", {"block_n": [64]}, "config must map names to strings or integers"),
        ("config", 64, "config must map names to strings or integers"),
    ],
)
def test_a_row_that_is_none(name, value, message):
    given = plain()
    given["rows"][1][name] = value
    with pytest.raises(FormatError) as error:
        loads(json.dumps(given))
    assert str(error.value).startswith(f"row 2: {message}")


def test_a_row_has_exactly_its_names():
    for change in (lambda row: row.pop("us"), lambda row: row.update(note="")):
        given = plain()
        change(given["rows"][1])
        with pytest.raises(FormatError) as error:
            loads(json.dumps(given))
        assert str(error.value) == f"row 2 must have {NAMES}"
    with pytest.raises(FormatError, match=r"^row 1 must have "):
        loads(json.dumps(plain() | {"rows": [None]}))


def test_a_point_has_one_row():
    given = plain()
    given["rows"][1]["batch"] = given["rows"][0]["batch"]
    with pytest.raises(FormatError) as error:
        loads(json.dumps(given))
    assert str(error.value) == "it has several rows for one point"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(st.data())
def test_a_broken_file_gives_a_format_error_or_a_table(data):
    """Whatever stands in the place of one value: no other exception."""
    given = plain()
    place: Any = given
    while True:
        name = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else [0, 1]))
        if not isinstance(place[name], (dict, list)) or data.draw(st.booleans()):
            break
        place = place[name]
    place[name] = data.draw(JSON)
    with suppress(FormatError):
        loads(json.dumps(given)).dumps()


# -- which row


SIZES = st.integers(1, 40)
LENGTHS = st.integers(0, 8).map(lambda power: 1 << power)


def nearest(sizes: set[int], wanted: int) -> int:
    above = [size for size in sizes if size >= wanted]
    return min(above) if above else max(sizes)


@given(st.lists(st.tuples(SIZES, LENGTHS), min_size=1, max_size=12, unique=True), SIZES, LENGTHS)
def test_the_nearest_row(tuned, batch, length):
    table = tables.table(*(tables.row(*point, us=index + 1) for index, point in enumerate(tuned)))
    found = table.find("decode", "portable", tables.KEY, batch, length)
    near = nearest({b for b, _ in tuned}, batch)
    far = nearest({n for b, n in tuned if b == near}, length)
    assert found.row.point[3:] == (near, far)
    assert found.row.us == tuned.index((near, far)) + 1
    assert found.exact is ((near, far) == (batch, length))


def test_other_keys_are_other_rows():
    other = items(dict(tables.KEY) | {"heads": 32})
    table = tables.table(tables.row(1, key=other), tables.row(64))
    for batch in (1, 64):
        assert table.find("decode", "portable", tables.KEY, batch, 4096).row.point.batch == 64
        assert table.find("decode", "portable", other, batch, 4096).row.point.batch == 1
    assert table.find("decode", "portable", tables.KEY[1:], 64, 4096) is None
    assert table.find("prefill", "portable", tables.KEY, 64, 4096) is None
    assert table.find("decode", "sm90", tables.KEY, 64, 4096) is None


def test_at_is_exact():
    table = tables.table(tables.row(1), tables.row(2))
    assert table.at(tables.row(2).point) == tables.row(2)
    assert table.at(tables.row(3).point) is None


@given(
    st.lists(ROWS, max_size=5, unique_by=lambda row: row.point),
    st.lists(ROWS, max_size=5, unique_by=lambda row: row.point),
    st.integers(0, 3),
)
def test_merged_rows_come_in_the_place_of_their_own(old, new, shared):
    """Every point once; the new row where both have one."""
    again = [replace(row, config=()) for row in old[:shared]]
    kept = {row.point: row for row in new} | {row.point: row for row in again}
    merged = tables.table(*old).with_rows(kept.values())
    assert merged.header == tables.header()
    assert len(merged.rows) == len({row.point for row in (*old, *kept.values())})
    for row in kept.values():
        assert merged.at(row.point) == row
    for row in old:
        assert merged.at(row.point) == kept.get(row.point, row)
