"""The tables that the package ships: every row can be found, fits its card, and compiles."""

from __future__ import annotations

from typing import Any

import pytest

from mla_triton import device as devices
from mla_triton.configs import shipped, validation
from mla_triton.configs.table import Row
from mla_triton.device import Device
from mla_triton.kernels.common.launch import Variant
from mla_triton.kernels.portable import decode, prefill
from mla_triton.problem import DecodeProblem, MergeProblem, PrefillProblem
from mla_triton.testing import compilation, prefill_compilation
from mla_triton.tuning import modelled, workers
from mla_triton.tuning.workers import Job

LABELS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def rows(label: str) -> tuple[Row, ...]:
    return shipped.load(devices.from_label(label).capability).rows


def test_there_is_a_table_for_every_capability_that_is_supported():
    assert shipped.capabilities() == tuple(devices.from_label(label).capability for label in LABELS)


@pytest.mark.parametrize("label", LABELS)
def test_every_row_can_be_found_and_run(label):
    table = shipped.load(devices.from_label(label).capability)
    assert table.header.capability == label
    assert not list(validation.broken_rules(table))


@pytest.mark.parametrize("label", LABELS)
def test_the_file_is_as_the_package_writes_it(label):
    """Sorted, one row a line: a change by hand or by tool shows as nothing but itself."""
    table = shipped.load(devices.from_label(label).capability)
    path = shipped.__file__.replace("shipped.py", f"{shipped.stem(devices.from_label(label))}.json")
    with open(path, encoding="utf-8") as file:
        assert file.read() == table.dumps()


@pytest.mark.parametrize("label", modelled.LABELS)
def test_modelled_rows_are_what_the_heuristic_says_today(label):
    assert set(rows(label)) == set(modelled.rows(devices.from_label(label)))


def test_the_hopper_table_was_timed_over_the_grid_it_claims():
    keys = [dict(row.point.key) for row in rows("9.0") if row.point.op == "decode"]
    assert {row.source for row in rows("9.0")} == {"tuned"}
    main = [key for key in keys if (key["latent"], key["rope"]) == (512, 64)]
    grid = {(key["dtype"], key["heads"], key["s_q"], key["page_size"]) for key in main}
    assert grid == {
        (dtype, heads, s_q, page)
        for dtype in ("bfloat16", "float16")
        for heads in (4, 8, 16, 32, 64, 128)
        for s_q in (1, 2, 4)
        for page in (1, 16, 64)
    }
    assert {row.point.length for row in rows("9.0")} == {512, 2048, 8192, 32768, 131072}
    assert {row.point.batch for row in rows("9.0")} == {1, 16, 128}
    # Never slower than the heuristic, by the timings of the row itself.
    assert all(row.us <= row.heuristic_us * 1.02 for row in rows("9.0"))


KERNELS = {"decode": decode, "prefill": prefill}
Problem = DecodeProblem | PrefillProblem


def machine_code(problem: Problem, config: Any, device: Device) -> Variant:
    if isinstance(problem, PrefillProblem):
        return prefill.variant(problem, config, device)
    return decode.variant(problem, config, decode.geometry(problem, device), device)


def what_decides(problem: Problem, config: Any, device: Device) -> tuple[Any, ...]:
    """What tells kernels of one form of call apart."""
    if isinstance(problem, PrefillProblem):
        widths = problem.qk_dim, problem.k_nope, problem.value_dim
        return device.label, problem.dtype, widths, problem.causal, config
    widths = problem.latent, problem.rope, problem.value_dim
    tile = decode.row_tile(problem, device)
    return device.label, problem.dtype, widths, problem.page_size, tile, config


def test_every_config_of_every_row_compiles_and_fits():
    """Once for each dtype, widths, page size and row tile; what tests/test_compile.py compiles is
    left to it."""
    there = set()
    for case in (*compilation.cases(), *prefill_compilation.cases()):
        if isinstance(case.problem, MergeProblem):
            continue
        device = devices.from_label(case.label)
        kernel = prefill if isinstance(case.problem, PrefillProblem) else decode
        there.add(what_decides(case.problem, kernel.heuristic(case.problem, device), device))
    jobs: dict[tuple[Any, ...], Job] = {}
    for label in LABELS:
        device = devices.from_label(label)
        for row in rows(label):
            config = KERNELS[row.point.op].Config(**dict(row.config))
            problem = validation.problem_of(row, device)
            decides = what_decides(problem, config, device)
            if decides not in there and decides not in jobs:
                jobs[decides] = Job(machine_code(problem, config, device), device, with_spills=True)
    assert len(jobs) > 100
    wrong = []
    wanted = list(jobs)
    for number, answer in workers.run(list(jobs.values())):
        limit = jobs[wanted[number]].device.shared_memory
        if answer.error is not None or answer.shared_memory > limit:
            wrong.append((wanted[number], answer))
    assert not wrong
