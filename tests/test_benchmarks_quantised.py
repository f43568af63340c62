"""The benchmark of quantised caches: its inputs, its verdicts, what it prints. Nothing is timed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import quantised  # noqa: E402

from mla_triton import AttentionState  # noqa: E402

CPU = torch.device("cpu")
SMALL = quantised.Cell(128, 2, 16)


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    """One call of each instead of a time; speeds are made up, and differ by form."""

    def call_each(calls):
        for call in calls:
            call()
        return 100.0

    monkeypatch.setattr(quantised.timing, "microseconds", call_each)
    monkeypatch.setattr(quantised.timing, "cold_copies", lambda size: 2)


def test_every_target_is_of_a_cell_that_is_measured():
    names = {(cell.kv_len, cell.batch, cell.heads) for cell in quantised.CELLS}
    for (form, impl), targets in quantised.TARGETS.items():
        assert form in quantised.FORMS
        assert impl in quantised.IMPLEMENTATIONS
        assert all((*quantised.TARGET_CELLS, heads) in names for heads in targets)


@pytest.mark.parametrize("form", ["16bit", *quantised.FORMS])
def test_a_cache_takes_the_bytes_that_are_counted(form):
    cache = quantised.make_cache(SMALL, form, torch.Generator().manual_seed(0), CPU)
    tensors = [cache] if isinstance(cache, torch.Tensor) else [t for t in cache if t is not None]
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert max(memory.values()) == 2 * 128 * quantised.bytes_of(form)


def test_results_are_judged_before_they_are_timed(monkeypatch):
    rows = quantised.measure_cell(SMALL, CPU)
    assert [(row["form"], row["impl"]) for row in rows] == [
        ("fp8", "chosen"),
        ("fp8", "portable"),
        ("fp8_ds_mla", "chosen"),
        ("fp8_ds_mla", "portable"),
    ]
    assert all(row["check"]["ok"] and row["ratio"] == 1.0 for row in rows)
    assert rows[0]["gbps"] == pytest.approx(2 * 128 * 576 / 100.0 / 1e3)

    def wrong(*arguments, out, lse, **options):
        return AttentionState(out.zero_(), lse.zero_())

    monkeypatch.setattr(quantised.mla_triton, "decode", wrong)
    for row in quantised.measure_cell(SMALL, CPU):
        assert not row["check"]["ok"]
        assert "us" not in row


def test_calls_of_planned_cells_share_a_plan():
    """Of the cache's format and the implementation: such a call would have cut alike."""
    cell = replace(SMALL, planned=True)
    assert cell.name == "s128-b2-h16-planned"
    for form in ("16bit", *quantised.FORMS):
        inputs, calls = quantised.make_calls(cell, form, CPU)
        for own in calls.values():
            first, *others = (call.keywords["plan"] for call in own)
            assert all(plan is first for plan in others)
            planned = own[0]()
            report = quantised.judged(inputs, AttentionState(planned.out, planned.lse))
            assert report["ok"], report
    _, calls = quantised.make_calls(SMALL, "fp8", CPU)
    assert {call.keywords["plan"] for own in calls.values() for call in own} == {None}


def test_lines_say_what_is_met():
    def row(ratio, target):
        return {
            "cell": "s16384-b128-h16", "form": "fp8", "impl": "chosen", "check": {"ok": True},
            "us": 100.0, "gbps": 1.0, "bf16_us": 100.0 * ratio, "ratio": ratio, "target": target,
        }  # fmt: skip

    bad = {"cell": "c", "form": "fp8", "impl": "portable"}
    bad["check"] = {"ok": False, "message": "out is wrong"}
    cells = [row(1.7, 1.6), row(1.5, 1.6), row(1.5, None), bad]
    text = quantised.lines({"ceilings": {"read_gbps": 4600.0}, "cells": cells})
    assert "1.60 met" in text[2]
    assert "1.60 MISSED" in text[3]
    assert text[4].endswith("1.50")
    assert "check failed" in text[5]
    assert text[-1] == "out is wrong"


def test_figures_of_the_docs_are_those_of_the_results():
    page = BENCHMARKS.parent / "docs" / "kernels-sm90-fp8.md"
    results = BENCHMARKS / "results" / "quantised" / "h200.json"
    text = page.read_text(encoding="utf-8")
    for row in json.loads(results.read_text())["cells"]:
        figures = f"{row['bf16_us']:.1f} | {row['us']:.1f} | {row['ratio']:.2f} |"
        assert f"| {row['cell']} | {row['form']} | {row['impl']} | {figures}" in text
