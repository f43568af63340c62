"""Tuned rows of the Hopper kernel: kept, held against it, found by its calls and by no other's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tables
from tables import CARD

from mla_triton import configs, explain
from mla_triton import device as devices
from mla_triton.configs import store, validation
from mla_triton.configs.table import Point, Row, items, loads
from mla_triton.kernels.portable import decode as portable
from mla_triton.kernels.sm90 import decode as sm90
from mla_triton.kernels.sm90.decode import Config
from mla_triton.testing import compilation
from mla_triton.tuning import tuner

PROBLEM = replace(compilation.problem(heads=128), max_kv_len=4096)
POINT: dict[str, Any] = {"heads": 128, "batches": [64], "lengths": [4096]}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("MLA_TRITON_CACHE_DIR", str(tmp_path))
    configs.forget()
    yield
    configs.forget()


def row(blocks: int = 1, impl: str = "sm90", **changes: Any) -> Row:
    key = items(dict(sm90.tuning_point(PROBLEM, CARD)[0]) | changes)
    return Row(Point("decode", impl, key, 64, 4096), items({"blocks": blocks}), 10.0, 11.0, "tuned")


def stored(*rows: Row) -> None:
    store.save(CARD, tables.header(CARD), rows)
    configs.forget()


# -- held against the kernel


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (row(1), None),
        (row(2), None),
        (row(1, page_size=16), None),
        (row(1, page_size=1), None),
        (row(1, latent=256, value_dim=256), None),
        (row(3), "config {'blocks': 3} cannot be used: blocks must be 1 or 2, got 3"),
        (
            row(2, page_size=16),
            "config {'blocks': 2} cannot be used: two blocks come by TMA, from at most four pages, "
            "got pages of 16",
        ),
        (
            replace(row(), config=tables.CONFIG),
            "config {'block_n': 32, 'num_stages': 2, 'num_warps': 4} cannot be used: a config has "
            "the integers blocks",
        ),
        (
            row(impl="portable"),
            "config {'blocks': 1} cannot be used: a config has the integers block_n, num_stages, "
            "num_warps",
        ),
        (
            row(row_tile=32),
            "key.row_tile must be 64 at batch 64 on 9.0, or no call finds the row, got 32",
        ),
        (
            row(latent=128, value_dim=128),
            "key must be of a problem that sm90 takes: it is written for 512+64, 512+0, 256+64, "
            "got 128+64",
        ),
    ],
)
def test_every_rule_of_a_row(given: Row, rule: str | None):
    assert validation.broken_rule(given, CARD) == rule


def test_another_card_has_no_use_for_them():
    assert validation.broken_rule(row(), devices.from_label("10.0")) == (
        "key must be of a problem that sm90 takes: it is written for capability 9.0, this card has "
        "10.0"
    )


def test_a_row_stands_for_a_problem_of_its_key():
    given = row(2)
    problem = validation.problem_of(given, CARD)
    assert sm90.tuning_point(problem, CARD) == (given.point.key, 64, 4096)


# -- found


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_call_finds_its_row(blocks):
    stored(row(blocks))
    choice = configs.choose(sm90, PROBLEM, CARD)
    assert (choice.config, choice.source, choice.row) == (Config(blocks), "user", row(blocks))
    facts = explain.decode(PROBLEM, CARD, 4096)
    assert facts["implementation"] == "sm90"
    assert facts["config"]["text"] == f"Config(blocks={blocks})"
    assert facts["config"]["blocks"] == blocks
    assert "row (batch 64, length 4096) of " in facts["config"]["reason"]
    assert facts["geometry"]["row_tile"] == facts["geometry"]["kv_tile"] == 64


def test_portable_does_not_find_it_nor_the_other_way_round():
    """The same key: rows are told apart by their implementation."""
    key = portable.tuning_point(PROBLEM, CARD)[0]
    assert key == sm90.tuning_point(PROBLEM, CARD)[0]
    stored(row(1))
    assert configs.choose(portable, PROBLEM, CARD).source != "user"
    stored(tables.row(64, 4096, key=key))
    assert configs.choose(portable, PROBLEM, CARD).source == "user"
    assert configs.choose(sm90, PROBLEM, CARD).row == row(1)


def test_a_row_that_does_not_suit_the_pages_is_passed_over():
    """Pages of 16 have one form."""
    pages = replace(PROBLEM, page_size=16, page_slots=16)
    stored(row(2, page_size=16))
    choice = configs.choose(sm90, pages, CARD)
    assert choice.config == Config(1)
    assert "passed over {'blocks': 2}" in choice.reason


def test_rows_survive_their_file():
    stored(row(1), tables.row())
    text = store.path(CARD).read_text()
    assert set(loads(text).rows) == {row(1), tables.row()}


# -- tuned


def test_both_forms_are_timed():
    ((work,), skipped) = tuner.list_work(device=CARD, **POINT)
    assert (work.implementation, skipped) == (sm90, 0)
    assert set(work.candidates) == {Config(1), Config(2)}
    assert work.candidates[0] == work.heuristic == sm90.heuristic(work.problem, CARD)
    assert work.pruned == ()
    assert work.point == row().point
    variants = {tuner.decode.variant(sm90, work.problem, c, CARD) for c in work.candidates}
    assert len(variants) == 2


def test_the_form_there_is_stands_to_be_beaten():
    other = ({Config(1), Config(2)} - {sm90.heuristic(PROBLEM, CARD)}).pop()
    stored(row(other.blocks))
    ((work,), _) = tuner.list_work(device=CARD, again=True, **POINT)
    assert work.incumbent == other
    assert tuner.list_work(device=CARD, **POINT) == ([], 1)


def test_pages_of_16_have_one_form():
    ((work,), _) = tuner.list_work(device=CARD, page_size=16, **POINT)
    assert work.candidates == (Config(1),)
    assert work.pruned == (
        (Config(2), "two blocks come by TMA, from at most four pages, got pages of 16"),
    )
