"""Machine code of every variant of prefill that the heuristic chooses, for every card, without the
cards.
"""

from __future__ import annotations

import re
from importlib import import_module

import ptxas
import pytest
import torch
import triton

from mla_triton import device as devices
from mla_triton.device import Device
from mla_triton.kernels.portable import prefill_config
from mla_triton.testing import prefill_compilation
from mla_triton.testing.compilation import LABELS, Case, Compiled, compile_all, side_by_side
from mla_triton.testing.prefill_compilation import problem

PINNED = "3.6.0"
"""The Triton that the configs were chosen by: other versions lay code out differently."""
ONE_IN = 50 if triton.__version__ == PINNED else 10
"""Instructions of the key loop, of which one at most may access the stack."""


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    return compile_all(list(prefill_compilation.cases()))


def describe(row: Compiled) -> str:
    return f"{row.case} as {row.config}: {row.resources}"


def test_every_case_compiles_and_fits_its_card(compiled):
    assert {row.case.label for row in compiled} == set(LABELS)
    over = [describe(row) for row in compiled if row.resources.shared_memory > row.limit]
    assert not over


def test_the_key_loop_does_not_spill(compiled):
    spilling = [
        describe(row)
        for row in compiled
        if row.resources.loop_spills * ONE_IN > row.resources.loop_instructions
    ]
    assert not spilling


def test_the_estimate_of_shared_memory_is_an_upper_bound(compiled):
    """The heuristic decides by the estimate: what does not fit must not seem to."""
    low = [describe(row) for row in compiled if row.resources.shared_memory > row.estimate]
    assert not low


def test_matrix_instructions_are_those_of_the_card(compiled):
    for row in compiled:
        device = devices.from_label(row.case.label)
        assert row.resources.instructions == {family_of(row.case, device)}, describe(row)


def family_of(case: Case, device: Device) -> str:
    if device.backend == "hip":
        return "mfma"
    if case.problem.dtype == torch.float32:
        return "fma"
    if device.has_tcgen05:
        return "tcgen05"
    return "wgmma" if device.has_wgmma else "mma.sync"


# -- what the speed stands on


def ptx_of(label: str, k_nope: int, qk: int = 192) -> str:
    from mla_triton.kernels.portable import prefill

    given = problem(dimensions=(qk, qk - k_nope, 256 if qk == 256 else 128))
    device = devices.from_label(label)
    compiled = prefill.compile(given, prefill_config.heuristic(given, device), device)
    return compiled.asm["ptx"]


def copies_of(arguments: tuple[str, int, int]) -> list[str]:
    """Bytes of every asynchronous copy of a variant."""
    copies = re.findall(
        r"cp\.async\.c[ag]\.shared\.global \[[^,]*\], \[[^,]*\], (\w+)", ptx_of(*arguments)
    )
    return [str(int(size, 16)) for size in copies]


def test_keys_in_two_parts_are_copied_16_bytes_at_a_time():
    """Wherever the border between the parts lies: beside a tile of columns, or inside one."""
    wanted = [
        (label, nope, qk) for label in ("8.9", "9.0") for nope, qk in ((128, 192), (192, 256))
    ]
    for sizes in side_by_side(copies_of, wanted):
        assert set(sizes) == {"16"}


def remarks_on(case: Case) -> str:
    """What ptxas says of a case."""
    prefill = import_module(f"mla_triton.kernels.{case.kernel}.prefill")
    device = devices.from_label(case.label)
    config = prefill.heuristic(case.problem, device)
    return ptxas.with_remarks(lambda: prefill.compile(case.problem, config, device))[1]


def test_wgmma_is_not_serialised():
    """Every config of a Hopper card: serialised, its tensor cores wait for each instruction."""
    wanted = [case for case in prefill_compilation.cases() if case.label == "9.0"]
    for case, remarks in zip(wanted, side_by_side(remarks_on, wanted), strict=True):
        assert "ptxas info" in remarks
        assert "serialized" not in remarks, case
