"""The benchmark's own logic: which cells, which verdicts, which ratios. Nothing here is timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import chunked  # noqa: E402
import prefill  # noqa: E402

from mla_triton import reference  # noqa: E402
from mla_triton.kernels.portable import prefill as portable  # noqa: E402
from mla_triton.kernels.portable.prefill_config import Config  # noqa: E402

CPU = torch.device("cpu")
SMALL = prefill.Cell(130, 2, 3)


def inputs_of(cell: prefill.Cell, monkeypatch: pytest.MonkeyPatch) -> prefill.Inputs:
    monkeypatch.setattr(prefill.timing, "cold_copies", lambda size: 1)
    (inputs,) = prefill.make_inputs(cell, CPU)
    return inputs


def exact(inputs: prefill.Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    state = reference.prefill_same_precision(
        inputs.q, inputs.k_nope, inputs.v, k_rope=inputs.k_rope, cu_seqlens_q=inputs.offsets,
        cu_seqlens_k=inputs.offsets, softmax_scale=inputs.cell.scale,
    )  # fmt: skip
    return state.out, state.lse


def test_every_cell_has_its_recorded_peers():
    *names, wide = [cell.name for cell in prefill.CELLS]
    assert names == list(prefill.recorded())
    assert wide == "s8192-b1-h64-d256"
    head = json.loads(prefill.PEERS.read_text())["header"]
    for peers in prefill.recorded().values():
        assert set(peers) <= set(head)


def test_work_of_a_cell():
    cell = prefill.Cell(8192, 4, 128)
    assert cell.flops == 4 * 128 * 8192**2 * 320
    inputs = prefill.make_inputs(prefill.Cell(64, 2, 3), CPU)
    one = inputs[0]
    read = sum(t.nbytes for t in (one.q, one.k_nope, one.k_rope, one.v))
    assert one.cell.bytes == read + one.v.nbytes
    assert (len(inputs) - 1) * one.cell.bytes < 200e6 <= len(inputs) * one.cell.bytes


def test_cells_are_selected_by_pattern():
    assert [c.name for c in prefill.select(["*-b4-*"])] == ["s8192-b4-h128"]
    assert prefill.select([]) == prefill.CELLS
    with pytest.raises(ValueError, match=r"cells must match one of .* got 's7-\*'"):
        prefill.select(["s7-*"])


def test_a_right_result_is_right(monkeypatch):
    inputs = inputs_of(SMALL, monkeypatch)
    out, lse = exact(inputs)
    report = prefill.judge(inputs, out, lse)
    assert report.ok, report.message
    assert prefill.judge(inputs, out, None).ok


@pytest.mark.parametrize("place", [(0, 0), (129, 2), (130 + 60, 0), (259, 2)])
def test_a_wrong_row_is_noticed(monkeypatch, place):
    inputs = inputs_of(SMALL, monkeypatch)
    out, lse = exact(inputs)
    out[place] += 0.5
    assert not prefill.judge(inputs, out, lse).ok


def test_a_sequence_that_sees_another_one_is_noticed(monkeypatch):
    inputs = inputs_of(SMALL, monkeypatch)
    wrong = prefill.Inputs(**(vars(inputs) | {"offsets": inputs.offsets[[0, 2]]}))
    assert not prefill.judge(inputs, *exact(wrong)).ok


def test_our_calls_are_what_is_judged(monkeypatch):
    inputs = inputs_of(prefill.Cell(33, 1, 2), monkeypatch)
    (call,) = prefill.our_calls([inputs])
    assert prefill.judge(inputs, *call()).ok


def test_a_config_can_be_forced():
    config = Config(64, 32, 4, 2)
    with prefill.forced(config):
        assert portable.choose(None, None) == (config, "said on the command line")
    assert portable.choose.__module__.endswith("prefill_config")


def results(gpu: str, **changes: Any) -> dict[str, Any]:
    row = {
        "cell": "s8192-b1-h128",
        "check": {"ok": True},
        "us": 100.0,
        "tflops": 758.0,
        "host_us": 15.0,
        "baselines": {"cudnn": {"check": {"ok": True}, "us": 1.0, "tflops": 379.0}},
    }
    return {"header": {"gpu": gpu}, "cells": [row | changes]}


def test_ratios_are_our_speed_over_the_peers():
    head, row = prefill.table(results("NVIDIA H200"))
    said = dict(zip(head, row, strict=True))
    assert said["vs cudnn"] == "2.00"
    assert said["vs recorded flashinfer_fa2"] == "2.00"
    assert said["vs recorded flashinfer_fa3"] == "1.01"


def test_recorded_peers_stand_beside_their_own_card_alone():
    head, _ = prefill.table(results("NVIDIA H100 80GB HBM3"))
    assert not any("recorded" in title for title in head)


def test_a_failed_check_has_no_speed():
    _, row = prefill.table(results("NVIDIA H200", check={"ok": False}, us=None, tflops=None))
    assert row[1] == "check failed"
    assert not any(row[2:])


def test_a_peer_without_a_figure_has_no_ratio():
    head, row = prefill.table(results("NVIDIA H200", baselines={"cudnn": {"check": {}}}))
    said = dict(zip(head, row, strict=True))
    assert said["cudnn TFLOP/s"] == said["vs cudnn"] == "-"


def test_without_a_gpu_nothing_is_measured():
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(BENCHMARKS.parent))
    command = [sys.executable, str(BENCHMARKS / "prefill.py")]
    listed, ran = (
        subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
        for options in (["--list"], [])
    )
    assert listed.stdout.split() == [cell.name for cell in prefill.CELLS]
    assert ran.returncode == 2
    assert "needs a GPU" in ran.stderr


# -- a cached prefix


def test_a_chunk_is_checked_and_timed_in_both_forms(monkeypatch):
    monkeypatch.setattr(chunked, "PART", 32)
    monkeypatch.setattr(chunked, "PAGE_SIZE", 16)
    monkeypatch.setattr(chunked.timing, "cold_copies", lambda size: 2)
    timed = []

    def microseconds(calls):
        timed.append(len(calls))
        assert all(call().out.isfinite().all() for call in calls)
        return 10.0 * len(timed)

    monkeypatch.setattr(chunked.timing, "microseconds", microseconds)
    cell = chunked.Cell(heads=2, prefix=70, chunk=9, widths=chunked.recipe.SMALL)
    row = chunked.measure_cell(cell, CPU)
    assert row["cell"] == "h2-prefix70-chunk9"
    assert row["expanded"]["ok"]
    assert row["absorbed"]["ok"]
    assert (row["expanded"]["us"], row["absorbed"]["us"]) == (10.0, 20.0)
    assert timed == [2, 2]

    monkeypatch.setattr(chunked.mla_triton, "merge", lambda states, **buffers: None)
    row = chunked.measure_cell(cell, CPU)
    assert not row["expanded"]["ok"]
    assert "us" not in row["expanded"]
    text = chunked.lines({"cells": [row]})
    assert "check failed" in text[1]


def test_where_expanding_becomes_faster():
    def cell(chunk: int, expanded: float, absorbed: float, prefix: int = 100) -> dict[str, Any]:
        return {
            "cell": "", "heads": 4, "prefix": prefix, "chunk": chunk,
            "expanded": {"us": expanded}, "absorbed": {"us": absorbed},
        }  # fmt: skip

    cells = [cell(16, 9, 2), cell(64, 9, 8), cell(128, 10, 16), cell(256, 11, 30)]
    cells += [cell(16, 9, 2, 200), cell(64, 9, 8, 200)]
    cells += [cell(16, 1, 2, 300)]
    assert chunked.cross_overs(cells) == [
        "4 heads, prefix 100: to expand is faster from a chunk of 65..128 on",
        "4 heads, prefix 200: to expand is not faster at any chunk that was measured",
        "4 heads, prefix 300: to expand is faster from a chunk of 1..16 on",
    ]


# -- what the docs say


def recorded_cells(operation: str) -> list[dict[str, Any]]:
    return json.loads((BENCHMARKS / "results" / operation / "h200.json").read_text())["cells"]


def test_figures_of_the_docs_are_those_of_the_results():
    docs = BENCHMARKS.parent / "docs"
    text = (docs / "prefill.md").read_text(encoding="utf-8")
    for row in recorded_cells("prefill"):
        portable_speed, cudnn = (row["baselines"][n]["tflops"] for n in ("portable", "cudnn"))
        figures = f"| {row['tflops']:.0f} | {portable_speed:.0f} | {cudnn:.0f} |"
        assert f"| {row['cell']} {figures}" in text
    for row in recorded_cells("chunked"):
        if row["chunk"] in (16, 64, 128, 192, 256, 512, 2048):
            assert f"| {row['expanded']['us']:.0f} / {row['absorbed']['us']:.0f} |" in text
    merges = (docs / "merge.md").read_text(encoding="utf-8")
    by_name = {row["cell"]: row for row in recorded_cells("merge")}
    for name in ("t8192-h128-d512-n2-bfloat16", "t2048-h128-d512-n16-stack-bfloat16"):
        row = by_name[name]
        assert f"| {row['us']:.1f} | {row['gbps']:.0f} | {100 * row['of_copy']:.0f} % |" in merges
