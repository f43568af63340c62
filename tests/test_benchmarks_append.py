"""The logic of the benchmark of append, gather and copy_pages. Nothing here is timed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import append

CPU = torch.device("cpu")


@pytest.fixture
def ten_microseconds(monkeypatch):
    """A clock that makes each call and always says 10 us."""
    calls = []

    def timed(given):
        calls.extend(call() for call in given[:2])
        return 10.0

    monkeypatch.setattr(append.timing, "microseconds", timed)
    monkeypatch.setattr(append.timing, "cold_copies", lambda _: 2)
    monkeypatch.setattr(append.protocol, "host_microseconds", lambda call: 5.0)
    monkeypatch.setattr(append, "POSITIONS", 300)
    return calls


@pytest.mark.parametrize(
    "cell",
    [
        append.Cell(9),
        append.Cell(9, "one"),
        append.Cell(9, "fp8_ds_mla", fused=True),
        append.Cell(9, "fp8_v4", fused=True),
        append.Cell(9, "fp8_v41", fused=True),
        append.Cell(128, "fp8_ds_mla", "gather"),
        append.Cell(128, "one", "gather"),
        append.Cell(128, "fp8_ds_mla", "copy_pages"),
    ],
    ids=lambda cell: cell.name,
)
def test_a_cell_is_checked_and_timed(cell, ten_microseconds):
    row = append.measure_cell(cell, 0.1, CPU)
    assert row["check"]["ok"], row
    assert row["us"] == row["warm_us"] == 10.0
    assert row["of_copy"] == pytest.approx(row["bytes"] / 10 / 1e3 / 0.1)


def test_what_has_to_be_moved():
    assert append.Cell(1).bytes == 2 * 1152 + 8
    assert append.Cell(2, "fp8_ds_mla").bytes == 2 * (1152 + 656 + 8)
    assert append.Cell(1, "fp8_v4", fused=True).bytes == 1024 + 584 + 8 + 256 + 8
    assert append.Cell(3, "one", "gather").bytes == 3 * (1152 + 576)
    assert append.Cell(64, "fp8_ds_mla", "copy_pages").bytes == 2 * 64 * 656


@pytest.mark.parametrize(
    ("operation", "cell"),
    [
        ("append", append.Cell(9, "fp8_ds_mla")),
        ("gather", append.Cell(128, "fused", "gather")),
        ("copy_pages", append.Cell(128, "fp8_ds_mla", "copy_pages")),
    ],
)
def test_a_wrong_result_has_no_speed(operation, cell, monkeypatch, ten_microseconds):
    def nothing(*given, **options):
        return options.get("out"), options.get("rope_out")

    made = append.append_call
    if operation == "append":
        made = lambda _: nothing  # noqa: E731
    monkeypatch.setattr(append, "append_call", made)
    if operation != "append":
        monkeypatch.setattr(append.mla_triton, operation, nothing)
    row = append.measure_cell(cell, 1.0, CPU)
    assert not row["check"]["ok"]
    assert "us" not in row
    assert ten_microseconds == []


def test_cells_are_told_with_their_targets(ten_microseconds):
    assert append.Cell(128).target == ("us", 2.5)
    assert append.Cell(32768).target == ("gbps", 3100.0)
    assert append.Cell(32768, "fp8_v4", fused=True).target == ("of_copy", 0.8)
    assert append.Cell(1024).target is None
    row = append.measure_cell(append.Cell(128), 1.0, CPU)
    assert row["target"] == {"figure": "us", "wanted": 2.5, "met": False}
    cell = append.Cell(9, "fp8_ds_mla", fused=True)
    configs = append.measure_configs(cell, 0.1, CPU)
    figures = {"ceilings": {"copy_gbps": 0.1}, "cells": [row], "configs": configs}
    text = "\n".join(append.lines(figures))
    assert "MISSED" in text
    assert "append-n9-fp8_ds_mla-norm-rope with rows 4, num_warps 1: 10.00 us" in text
    row["target"]["met"] = True
    assert "MISSED" not in "\n".join(append.lines(figures))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_is_needed(capsys):
    assert append.main([]) == 2
    assert "append.py: error: this needs a GPU" in capsys.readouterr().err
