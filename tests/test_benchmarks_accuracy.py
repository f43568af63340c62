"""The benchmark of errors: what it says of results that are known, and of the portable kernels."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import accuracy

from mla_triton import AttentionState

ROOT = Path(__file__).parents[1]
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
    assert "flashmla 1.75e-03, flashinfer 2.10e-03 to 2.50e-03, rounding" in text[-1]


def written_rows() -> list[list[str]]:
    """The two columns of figures of the page's table."""
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    section = page.split("## In figures")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[2:4]] for line in lines[2:]]


def test_the_page_has_what_is_measured():
    """To the digits of the page; another BLAS adds in another order, which is far below them."""
    written = [[float(cell) for cell in row] for row in written_rows()[:4]]
    if not accuracy.devices.interpreting():
        pytest.skip("the page's rows are those of the interpreter")
    for number, cell in enumerate(accuracy.INTERPRETED):
        found = list(accuracy.rows(cell, "cpu"))
        for row, name in ((2 * number, "error"), (2 * number + 1, "floor")):
            assert [each[name] for each in found] == pytest.approx(written[row], rel=0.01)


def test_the_page_has_what_was_measured_on_a_card():
    path = ROOT / "benchmarks" / "results" / "accuracy" / "h200.json"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    expected = []
    for operation in ("decode", "prefill"):
        for impl, name in (("sm90", "error"), ("portable", "error"), ("portable", "floor")):
            expected.append([])
            for dtype in ("bfloat16", "float16"):
                found = [
                    cell[name]
                    for cell in cells
                    if cell["cell"].startswith(operation)
                    and (cell["impl"], cell["dtype"]) == (impl, dtype)
                ]
                expected[-1].append(" to ".join(map(short, (min(found), max(found)))))
    assert written_rows()[4:10] == expected


def short(error: float) -> str:
    return f"{error:.2e}".replace("e-0", "e-")


def test_without_a_gpu_small_shapes_are_interpreted(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(accuracy, "INTERPRETED", SMALL)
    interprets = accuracy.devices.interpreting()
    assert accuracy.main([]) == (0 if interprets else 2)
    said = capsys.readouterr()
    expected = [cell.name for cell in SMALL] if interprets else ["needs a GPU"]
    assert all(text in said.out + said.err for text in expected)
