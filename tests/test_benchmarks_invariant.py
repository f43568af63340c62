"""The logic of the benchmark of batch-invariant calls. Nothing here is timed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import invariant
from cells import Cell

CELL = Cell(130, 3, 2)


@pytest.fixture
def clock(monkeypatch):
    """It makes the first call and says 10 us, and the next time 5."""
    says = iter((10.0, 5.0))
    monkeypatch.setattr(invariant.timing, "microseconds", lambda calls: calls[0]() and next(says))
    monkeypatch.setattr("protocol.timing.cold_copies", lambda _: 2)


def test_a_cell_is_checked_and_timed_both_ways(clock):
    row = invariant.measure_cell(CELL, torch.device("cpu"))
    assert row["check"]["ok"], row
    assert (row["ordinary_us"], row["us"], row["ratio"]) == (10.0, 5.0, 2.0)
    assert "2.00" in invariant.lines({"cells": [row]})[-1]


def test_other_bits_have_no_speed(clock, monkeypatch):
    right = invariant.mla_triton.decode

    def by_batch(q_nope, *rest, **options):
        state = right(q_nope, *rest, **options)
        state.lse.add_(2.0**-10 * (len(q_nope) > 1))
        return state

    monkeypatch.setattr(invariant.mla_triton, "decode", by_batch)
    row = invariant.measure_cell(CELL, torch.device("cpu"))
    assert "us" not in row
    assert "the first request has other bits" in invariant.lines({"cells": [row]})[-1]
