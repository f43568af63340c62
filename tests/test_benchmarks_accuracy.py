"""The benchmark of errors: what it says of results that are known, and of the portable kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import accuracy

from mla_triton import AttentionState

SMALL = (accuracy.Cell("decode", 130, 2, 3), accuracy.Cell("prefill", 40, 1, 2))
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


@pytest.mark.parametrize("cell", SMALL, ids=lambda cell: cell.name)
def test_errors_are_a_little_above_the_floor(cell, device):
    found = list(accuracy.rows(cell, device))
    assert {row["dtype"] for row in found if row["impl"] == "portable"} == set(UNIT)
    for row in found:
        # A rounding is off by half a unit at most, and by a third of that squared on average.
        assert 0.3 * UNIT[row["dtype"]] < row["floor"] < 0.5 * UNIT[row["dtype"]]
        assert row["floor"] <= row["error"] < 2 * row["floor"]
        assert row["lse"] < 1e-5


@pytest.mark.parametrize("cell", SMALL, ids=lambda cell: cell.name)
def test_an_error_is_a_share_of_the_result(cell, device, monkeypatch):
    right = accuracy.compute

    def off(inputs, impl):
        _, exact = right(inputs, impl)
        return AttentionState(exact.out * 1.25, exact.lse + 0.5), exact

    monkeypatch.setattr(accuracy, "compute", off)
    for row in accuracy.rows(cell, device):
        assert (row["error"], row["lse"]) == pytest.approx((0.25, 0.5))


def test_lines_name_the_recorded_errors():
    row = {"cell": "c", "dtype": "float16", "impl": "sm90", "error": 2e-3, "floor": 1e-3, "lse": 0}
    text = accuracy.lines({"cells": [row]})
    assert "2.00" in text[1]
    assert "flashinfer 2.10e-03 to 2.50e-03" in text[-1]


def test_without_a_gpu_small_shapes_are_interpreted(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(accuracy, "INTERPRETED", SMALL)
    interprets = accuracy.devices.interpreting()
    assert accuracy.main([]) == (0 if interprets else 2)
    said = capsys.readouterr()
    expected = [cell.name for cell in SMALL] if interprets else ["needs a GPU"]
    assert all(text in said.out + said.err for text in expected)
