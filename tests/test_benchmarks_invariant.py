"""The logic of the benchmark of batch-invariant calls. Nothing here is timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import invariant  # noqa: E402
import prefill  # noqa: E402
import results  # noqa: E402
from cells import Cell  # noqa: E402

CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize(
    ("measure", "cell", "operation"),
    [
        (invariant.measure_decode, Cell(130, 3, 2), "decode"),
        (invariant.measure_prefill, prefill.Cell(40, 2, 2), "prefill"),
    ],
    ids=["decode", "prefill"],
)


@pytest.fixture
def clock(monkeypatch):
    """It makes the first call and says 10 us, and the next time 15."""
    says = iter((10.0, 15.0))
    monkeypatch.setattr(invariant.timing, "microseconds", lambda calls: calls[0]() and next(says))
    monkeypatch.setattr("protocol.timing.cold_copies", lambda _: 2)


@BOTH
def test_a_cell_is_checked_and_timed_both_ways(measure, cell, operation, clock):
    row = measure(cell, CPU)
    assert row["check"]["ok"], row
    assert (row["ordinary_us"], row["us"], row["times"]) == (10.0, 15.0, 1.5)
    assert invariant.lines({"cells": [row]})[-1] == f"| {row['cell']} | 10.0 | 15.0 | 1.50 |"


@BOTH
def test_the_option_makes_the_difference(measure, cell, operation, clock, monkeypatch):
    right, asked = getattr(invariant.mla_triton, operation), []

    def call(*arguments, batch_invariant=False, **options):
        asked.append(batch_invariant)
        return right(*arguments, batch_invariant=batch_invariant, **options)

    monkeypatch.setattr(invariant.mla_triton, operation, call)
    measure(cell, CPU)
    assert asked == [False, True, True, True]


@BOTH
def test_other_bits_have_no_speed(measure, cell, operation, clock, monkeypatch):
    right = getattr(invariant.mla_triton, operation)
    whole = cell.batch if operation == "decode" else cell.tokens

    def by_batch(query, *rest, **options):
        state = right(query, *rest, **options)
        state.lse.add_(2.0**-20 * state.lse.abs() * (len(query) == whole))
        return state

    monkeypatch.setattr(invariant.mla_triton, operation, by_batch)
    row = measure(cell, CPU)
    assert "us" not in row
    assert "the first request has other bits" in invariant.lines({"cells": [row]})[-1]


@BOTH
def test_a_wrong_result_has_no_speed(measure, cell, operation, clock, monkeypatch):
    right = getattr(invariant.mla_triton, operation)

    def wrong(*arguments, **options):
        state = right(*arguments, **options)
        state.out.mul_(1.5)
        return state

    monkeypatch.setattr(invariant.mla_triton, operation, wrong)
    row = measure(cell, CPU)
    assert "us" not in row
    assert not row["check"]["ok"]


def test_a_folder_for_the_figures_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(results, "header", lambda *_: {})
    path = tmp_path / "invariant" / "h200.json"
    figures = {"cells": []}
    assert (
        results.record("x.py", "About.", lambda: figures, lambda _: [], ["--output", str(path)])
        == 0
    )
    assert json.loads(path.read_text()) == {"header": {}, "cells": []}


def test_figures_of_the_docs_are_those_of_the_results():
    """Before there are any the page says so."""
    text = (BENCHMARKS.parent / "docs" / "decode.md").read_text(encoding="utf-8")
    path = BENCHMARKS / "results" / "invariant" / "h200.json"
    measured = invariant.lines(json.loads(path.read_text())) if path.exists() else []
    assert [line for line in measured if line not in text] == []
    assert ("has not been measured yet" in text) == (not measured)
