"""The benchmarks' own logic: which cells, which verdicts, which page. Nothing here is timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cells  # noqa: E402
import decode  # noqa: E402
import first_call  # noqa: E402
import merge  # noqa: E402
import peers  # noqa: E402
import protocol  # noqa: E402
import report  # noqa: E402
import report_tuning  # noqa: E402
import results as results_file  # noqa: E402
import targets  # noqa: E402
import tune  # noqa: E402

from mla_triton.configs import shipped  # noqa: E402


def row(cell: cells.Cell, us: float, **changes: Any) -> dict[str, Any]:
    figures = {
        "cell": cell.name,
        "check": {"ok": True, "error": 1e-4, "budget": 2e-4},
        "floor_us": cell.floor(4600, 800),
        "us": us,
        "with_schedule_us": us + 2,
        "combine_us": 2.0,
        "schedule_us": 1.5,
        "host_us": 15.0,
        "gbps": cell.bytes / us / 1e3,
        "tflops": cell.flops / us / 1e6,
    }
    if cell.name == cells.SUSTAINED_CELL:
        figures |= {"sustained_us": us, "sustained_tflops": cell.flops / us / 1e6}
    return figures | changes


def plain(cell: cells.Cell) -> str:
    """The same with the usual pages."""
    return replace(cell, page_size=cells.PAGE_SIZE).name


def recording(gpu: str = "NVIDIA H200", **changes: dict[str, Any]) -> dict[str, Any]:
    """Results in which every target is met: each cell at half of the strictest figure."""
    limits: dict[str, float] = {}
    for verdict in targets.evaluate({"cells": []}, results_file.peers()):
        if verdict.target not in ("combine", "schedule") and verdict.where:
            limits[verdict.where] = min(verdict.limit, limits.get(verdict.where, 1e9))
    return {
        "schema": results_file.SCHEMA,
        "header": {
            "gpu": gpu,
            "sm_count": 132,
            "torch": "2.11.0",
            "triton": "3.6.0",
            "driver": "580",
            "date": "2026-01-01",
            "protocol": results_file.PROTOCOL,
            "commit": "abcdef0",
            "command": "python benchmarks/decode.py",
        },
        "ceilings": {
            "read_gbps": 4600.0,
            "copy_gbps": 4270.0,
            "matmul_tflops": 800.0,
            "sustained_matmul_tflops": 680.0,
        },
        "host_us": 15.0,
        "host_add_us": 5.0,
        "cells": [
            row(cell, **{"us": limits.get(plain(cell), 200.0) / 2, **changes.get(cell.name, {})})
            for cell in cells.all_cells()
        ],
    }


def test_cells_are_those_of_the_protocol():
    names = [cell.name for cell in cells.all_cells()]
    assert len(names) == len(set(names)) == 27 + 3 + 1 + 1 + 8
    assert set(names) >= set(results_file.peers())
    assert "s65536-b16-h16" not in names
    assert [n for n in names if "-q" in n] == ["s4096-b128-h128-q2"]


def test_cells_are_selected_by_pattern():
    assert [c.name for c in cells.select(["*-b1-h16"])] == [
        "s1024-b1-h16",
        "s4096-b1-h16",
        "s16384-b1-h16",
        "s65536-b1-h16",
    ]
    assert cells.select([]) == cells.all_cells()
    with pytest.raises(ValueError, match=r"cells must match one of .* got 's7-\*'"):
        cells.select(["s7-*"])


def test_floor_is_that_of_the_recorded_table():
    recorded = json.loads(results_file.PEERS.read_text())["cells"]
    floors = {row["cell"]: row["floor"] for row in recorded if "floor" in row}
    assert len(floors) == 27
    for cell in cells.all_cells():
        if cell.name in floors:
            assert round(cell.floor(4600, 800), 1) == pytest.approx(floors[cell.name], abs=0.11)


def test_inputs_are_scattered_and_cold():
    inputs = protocol.make_inputs(cells.Cell(1024, 2, 16), torch.device("cpu"))
    copies, pages, page, width = inputs.caches.shape
    assert (pages, page, width) == (32, 64, 576)
    assert (copies - 1) * inputs.cell.cache_bytes < 200e6 <= copies * inputs.cell.cache_bytes
    assert sorted(inputs.page_table.flatten().tolist()) == list(range(32))
    assert inputs.page_table.flatten().tolist() != list(range(32))
    assert inputs.q_nope.shape == (2, 1, 16, 512)
    assert inputs.q_rope.shape == (2, 1, 16, 64)


def test_every_target_can_be_met():
    verdicts = list(targets.evaluate(recording(), results_file.peers()))
    assert [v for v in verdicts if not v.met] == []
    counts = {v.target: 0 for v in verdicts}
    for verdict in verdicts:
        counts[verdict.target] += 1
    assert counts == {
        "at least FlashInfer fa2": 27,
        "0.95 of the best peer": 6,
        "4 x SGLang Triton": 9,
        "combine": 27,
        "schedule": 27,
        "below every rival": 4,
        "host time of an eager call": 1,
        "the best peer": 27,
        "share of the best peer's time, mean": 1,
        "Hopper": 10,
        "4.4 TB/s": 2,
        "680 TFLOP/s": 1,
        "690 TFLOP/s": 1,
        "560 TFLOP/s for 1.5 s": 1,
        "0.85 of the speed at pages of 64": 6,
        "0.97 of the speed at pages of 64": 2,
    }


@pytest.mark.parametrize(
    ("cell", "change", "target", "said"),
    [
        ("s16384-b1-h128", {"us": 44.0}, "at least FlashInfer fa2", "7 % over"),
        ("s4096-b16-h16", {"us": 33.0}, "0.95 of the best peer", "6 % over"),
        ("s1024-b16-h128", {"us": 30.0}, "4 x SGLang Triton", "23 % over"),
        ("s1024-b1-h64", {"combine_us": 5.5}, "combine", "10 % over"),
        ("s1024-b1-h64", {"schedule_us": 4.5}, "schedule", "50 % over"),
        ("s65536-b1-h16", {"us": 54.0}, "below every rival", "50 % over"),
        ("s4096-b16-h16", {"us": 31.0}, "the best peer", "5 % over"),
        ("skewed-b64-h128", {"us": 143.0}, "Hopper", "10 % over"),
        ("s16384-b128-h64", {"us": 608.0}, "4.4 TB/s", "10 % over"),
        ("s16384-b128-h128", {"us": 951.0}, "680 TFLOP/s", "11 % over"),
        ("s4096-b128-h128", {"sustained_us": 300.0}, "560 TFLOP/s for 1.5 s", "15 % over"),
        ("s4096-b128-h64-p1", {"us": 100.0}, "0.85 of the speed at pages of 64", "15 % over"),
    ],
)
def test_a_missed_target_says_by_how_much(cell, change, target, said):
    verdicts = targets.evaluate(recording(**{cell: change}), results_file.peers())
    missed = [(v.target, v.where, v.text) for v in verdicts if not v.met]
    assert (target, cell, said) in missed


def test_targets_command(tmp_path, capsys):
    path = tmp_path / "h200.json"
    results_file.write(path, recording())
    assert targets.main([str(path)]) == 0
    assert "152 of 152 targets met" in capsys.readouterr().out

    slow = recording(**{"s1024-b1-h16": {"us": 9.0}})
    results_file.write(path, slow)
    assert targets.main([str(path), "--missed"]) == 1
    out = capsys.readouterr().out
    assert "20 % over" in out
    assert "151 of 152 targets met" in out

    with pytest.raises(SystemExit) as stopped:
        targets.main([str(tmp_path / "none.json")])
    assert stopped.value.code == 2


def test_a_cell_that_was_not_measured_or_failed_meets_nothing():
    results = recording()
    results["cells"] = [c for c in results["cells"] if c["cell"] != "s1024-b1-h16"]
    failed = results["cells"][0]
    failed["check"] = {"ok": False, "message": "wrong"}
    verdicts = list(targets.evaluate(results, results_file.peers()))
    for name in ("s1024-b1-h16", failed["cell"]):
        assert {v.text for v in verdicts if v.where == name} == {"not measured"}


def test_results_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "results" / "h200.json"
    results_file.write(path, recording())
    assert results_file.read(path) == recording()
    assert sum('"cell":' in line for line in path.read_text().splitlines()) == 40
    path.write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="must be a results file of schema 1"):
        results_file.read(path)


def test_page_without_a_run_says_so(tmp_path):
    text = report.page(tmp_path)
    assert "**No run is recorded.**" in text
    assert report.COMMAND in text
    assert " us" not in text.replace("`us`", "")


def test_page_of_a_run(tmp_path):
    results = recording(**{"s1024-b16-h64": {"check": {"ok": False, "message": "wrong"}}})
    results["cells"][0]["baselines"] = {"mine": {"check": {"ok": True}, "us": 21.0}}
    results_file.write(tmp_path / "h200.json", results)
    text = report.page(tmp_path)
    assert "No run is recorded" not in text
    assert "commit abcdef0, 2026-01-01" in text
    assert "vs mine" in text
    assert "The matmul without a pause for 1.5 s: 680 TFLOP/s." in text
    assert "vs flashinfer_fa2" in text
    assert "| s1024-b16-h64 | check failed |" in text
    assert "147 of 152 are met" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def test_page_of_another_card_is_not_held_against_the_h200_figures(tmp_path):
    results_file.write(tmp_path / "a100.json", recording(gpu="NVIDIA A100"))
    text = report.page(tmp_path)
    assert "flashinfer" not in text
    assert "Targets" not in text


def test_stale_page_fails_the_check(tmp_path, capsys):
    page, recorded = tmp_path / "docs" / "performance.md", tmp_path / "results"
    options = ["--results", str(recorded), "--page", str(page)]
    assert report.main([*options, "--check"]) == 1
    assert "is stale" in capsys.readouterr().err
    assert report.main(options) == 0
    assert report.main([*options, "--check"]) == 0
    results_file.write(recorded / "h200.json", recording())
    assert report.main([*options, "--check"]) == 1


def test_the_page_in_the_repository_is_up_to_date():
    assert report.main(["--check"]) == 0


def test_a_row_has_every_figure(monkeypatch):
    """The way of a measurement, on small shapes: calls take 10 us, a kernel alone takes 2."""

    def timed(calls: list[Any]) -> float:
        return 2.0 if calls[0]() is None else 10.0

    monkeypatch.setattr(decode.timing, "microseconds", timed)
    monkeypatch.setattr(protocol, "host_microseconds", lambda call: 15.0)
    monkeypatch.setattr(protocol.timing, "COLD_BYTES", 1)
    cell, device = cells.Cell(300, 2, 4, s_q=2), torch.device("cpu")

    def exact_peer(inputs: protocol.Inputs) -> list[peers.Call]:
        state = decode.our_calls(inputs, planned=True)[0]()
        return [lambda: state.out]

    ceilings = {"read_gbps": 4600.0, "matmul_tflops": 800.0}
    found = decode.measure(cell, device, ceilings, {"peer": exact_peer})
    assert found["cell"] == "s300-b2-h4-q2"
    assert found["check"]["ok"]
    assert 0 < found["check"]["error"] <= found["check"]["budget"]
    assert found["us"] == found["with_schedule_us"] == 10.0
    assert found["gbps"] == pytest.approx(cell.bytes / 1e4)
    assert found["schedule_us"] == 2.0
    assert found["combine_us"] == 2.0
    assert found["host_us"] == 15.0
    assert found["baselines"]["peer"]["us"] == 10.0
    head, shown = results_file.table({"cells": [found]}, {cell.name: {"peer": 15.0}})
    assert len(head) == len(shown)
    assert shown[-1] == "1.50"


def test_kernels_of_a_call_can_be_launched_alone():
    inputs = protocol.make_inputs(cells.Cell(300, 1, 4), torch.device("cpu"))
    state = None

    def call() -> None:
        nonlocal state
        state = decode.our_calls(inputs, planned=True)[0]()

    again = protocol.launches(call)
    assert set(again) == {"schedule_kernel", "decode_kernel", "combine_kernel"}
    expected = state.out.clone()
    state.out.fill_(float("nan"))
    again["combine_kernel"]()
    assert torch.equal(state.out, expected)


def test_host_time_is_measured_without_a_gpu():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "host.py"), "--batch", "2"],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(BENCHMARKS.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "validate.decode" in done.stdout


def test_no_speed_where_the_check_fails(monkeypatch):
    """A wrong result stops before anything is timed, ours as well as a peer's."""

    def timed(*_: Any) -> float:
        raise AssertionError("a wrong result was timed")

    cell = cells.Cell(64, 2, 4)
    monkeypatch.setattr(decode.timing, "microseconds", timed)
    monkeypatch.setattr(protocol.timing, "COLD_BYTES", 1)
    right = decode.mla_triton.decode
    monkeypatch.setattr(
        decode.mla_triton,
        "decode",
        lambda *a, **k: right(*a[:4], a[4] - 1, **k),
    )

    def wrong_peer(inputs: protocol.Inputs) -> list[peers.Call]:
        return [lambda: torch.zeros(2, 1, 4, 512, dtype=torch.bfloat16)]

    ceilings = {"read_gbps": 4600.0, "matmul_tflops": 800.0}
    found = decode.measure(cell, torch.device("cpu"), ceilings, {"peer": wrong_peer})
    assert not found["check"]["ok"]
    assert "over its budget" in found["check"]["message"]
    assert "us" not in found
    assert not found["baselines"]["peer"]["check"]["ok"]
    assert "us" not in found["baselines"]["peer"]


def test_a_peer_that_does_not_run_a_cell_says_so():
    def refuses(inputs: protocol.Inputs) -> list[peers.Call]:
        raise NotImplementedError("one query token only")

    inputs = protocol.make_inputs(cells.Cell(64, 1, 4), torch.device("cpu"))
    found = decode.measure_baseline(inputs, refuses)
    assert found == {"check": {"ok": False, "message": "one query token only"}}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flashmla", "must be module:function or file.py:function"),
        ("peers:nothing", "must name a function"),
        ("no_such_module:f", "cannot be imported: No module named 'no_such_module'"),
        ("no/such/file.py:f", "cannot be imported: no file no/such/file.py"),
    ],
)
def test_a_baseline_that_cannot_be_loaded(name, message):
    with pytest.raises(ValueError, match=message):
        peers.load(name)


def test_a_baseline_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text("def run(inputs):\n    return [inputs]\n")
    assert peers.load(f"{tmp_path / 'mine.py'}:run")("x") == ["x"]


@pytest.mark.parametrize(
    ("name", "package"),
    [("flashmla", "flash_mla"), ("flashinfer_fa2", "flashinfer"), ("sglang", "sglang")],
)
def test_a_missing_peer_is_named(name, package):
    if peers.importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    inputs = protocol.make_inputs(cells.Cell(64, 1, 4), torch.device("cpu"))
    with pytest.raises(ImportError, match=f"baseline {name} needs the package '{package}'"):
        peers.load(f"peers:{name}")(inputs)


def test_command_line(capsys):
    assert decode.main(["--list", "--cells", "s1024-b1-*"]) == 0
    assert capsys.readouterr().out.split() == ["s1024-b1-h16", "s1024-b1-h64", "s1024-b1-h128"]
    with pytest.raises(SystemExit) as stopped:
        decode.main(["--cells", "nothing"])
    assert stopped.value.code == 2
    if not torch.cuda.is_available():
        assert decode.main([]) == 2
        assert "needs a GPU" in capsys.readouterr().err


# tuning and warm-up


def test_the_pages_of_tuning_and_warmup_say_what_the_table_and_the_results_say(capsys):
    assert report_tuning.main(["--check"]) == 0, capsys.readouterr().err


def test_a_changed_table_makes_the_pages_stale(monkeypatch, capsys):
    table = shipped.load((9, 0))
    faster = [replace(row, us=row.us / 2) for row in table.rows[:1]]
    monkeypatch.setattr(report_tuning.shipped, "load", lambda _: table.with_rows(faster))
    assert report_tuning.main(["--check"]) == 1
    said = capsys.readouterr().err
    assert "docs/tuning.md is stale" in said
    assert "docs/tuning-gain.svg is stale" in said
    assert "warmup" not in said


def test_the_picture_has_a_square_for_every_point_and_is_xml():
    table = shipped.load((9, 0))
    svg = ElementTree.fromstring(report_tuning.picture(table))
    squares = [node for node in svg.iter() if node.get("class") == "c"]
    points = [row for row in table.rows if dict(row.point.key)["dtype"] == "bfloat16"]
    legend = 11
    assert len(squares) == len(points) + legend
    assert len({(node.get("x"), node.get("y")) for node in squares}) == len(squares)


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="page must have the marks"):
        report_tuning.with_figures("# Tuned configs\n", "tuning", "figures")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
@pytest.mark.parametrize("benchmark", [first_call, merge, tune])
def test_tuning_and_first_calls_are_not_measured_without_a_gpu(benchmark, capsys):
    assert benchmark.main([]) == 2
    assert "this needs a GPU" in capsys.readouterr().err


# -- merge


@pytest.fixture
def ten_microseconds(monkeypatch):
    """A clock that makes each call and always says 10 us."""
    calls = []

    def timed(given):
        calls.extend(call() for call in given[:2])
        return 10.0

    monkeypatch.setattr(merge.timing, "microseconds", timed)
    monkeypatch.setattr(merge.timing, "cold_copies", lambda _: 2)
    monkeypatch.setattr(merge.protocol, "host_microseconds", lambda call: 5.0)
    return calls


@pytest.mark.parametrize(
    "changes",
    [{}, {"in_place": True}, {"masked": True}, {"states": 3}, {"states": 9, "stacked": True}],
    ids=str,
)
def test_a_merge_is_checked_and_timed(changes, ten_microseconds):
    cell = merge.Cell(tokens=5, heads=2, value_dim=16, **changes)
    row = merge.measure_cell(cell, 0.1, torch.device("cpu"))
    assert row["check"]["ok"], row
    assert len(ten_microseconds) == 2
    assert row["us"] == 10.0
    assert row["of_copy"] == pytest.approx(row["bytes"] / 10 / 1e3 / 0.1)


def test_a_merge_counts_what_has_to_be_moved():
    assert merge.Cell(1, 1, 512).bytes == 3 * (512 * 2 + 4)
    assert merge.Cell(2, 1, 512, masked=True).bytes == 2 * 2.5 * (512 * 2 + 4) + 2
    assert merge.Cell(1, 1, 128, states=8, dtype=torch.float32).bytes == 9 * (128 * 4 + 4)


def test_a_wrong_merge_has_no_speed(monkeypatch, ten_microseconds):
    monkeypatch.setattr(merge.mla_triton, "merge", lambda states, **_: states[0])
    row = merge.measure_cell(merge.Cell(5, 2, 16), 1.0, torch.device("cpu"))
    assert not row["check"]["ok"]
    assert "us" not in row
    assert ten_microseconds == []


def test_merges_are_told_with_the_target(ten_microseconds):
    cell, device = merge.Cell(5, 2, 16), torch.device("cpu")
    figures = {
        "ceilings": {"copy_gbps": 0.1},
        "target": merge.TARGET,
        "cells": [merge.measure_cell(cell, copy, device) for copy in (1.0, 0.0001)],
        "configs": merge.measure_configs(cell, 0.1, device),
    }
    text = "\n".join(merge.lines(figures))
    assert f"target of 85% for {cell.name}: MISSED" in text
    assert "with rows 4, num_warps 4: 10.0 us" in text
    figures["cells"].reverse()
    assert f"target of 85% for {cell.name}: met" in "\n".join(merge.lines(figures))
    figures["cells"][0] = {"cell": cell.name, "check": {"ok": False, "message": "off by one"}}
    assert "off by one" in "\n".join(merge.lines(figures))


def test_cells_of_merges_have_names_of_their_own():
    names = [cell.name for cell in merge.CELLS]
    assert len(names) == len(set(names))
    first = merge.CELLS[0]
    assert (first.tokens, first.heads, first.value_dim) == (8192, 128, 512)
