"""Machine code of every variant that the heuristics choose, for every card, without the cards."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import triton

from mla_triton import device as devices
from mla_triton.kernels.portable import decode_config
from mla_triton.kernels.portable.decode_config import Config
from mla_triton.testing import compilation, resources
from mla_triton.testing.compilation import LABELS, Compiled

DOCS = Path(__file__).parents[1] / "docs"
PINNED = "3.6.0"
"""The Triton that docs/support.md was made with: other versions lay code out differently."""

ONE_IN = 50 if triton.__version__ == PINNED else 10
"""Instructions of the key loop, of which one at most may access the stack. The configs were chosen
by what the pinned Triton makes of them; other versions allocate registers differently."""


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    return compilation.compile_all(list(compilation.cases()))


def describe(row: Compiled) -> str:
    return f"{row.case} as {row.config}: {row.resources}"


def test_every_case_compiles_and_fits_its_card(compiled):
    assert len(compiled) == len(list(compilation.cases()))
    over = [describe(row) for row in compiled if row.resources.shared_memory > row.limit]
    assert not over


def test_the_key_loop_does_not_spill(compiled):
    """Stack accesses in the key loop are paid for at every step; elsewhere, once for each group."""
    spilling = [
        describe(row)
        for row in compiled
        # Misaligned rows are loaded an element at a time, into registers: slow, and it is said so.
        if row.case.problem.aligned
        and row.resources.loop_spills * ONE_IN > row.resources.loop_instructions
    ]
    assert not spilling


def test_the_merge_cannot_begin_before_the_schedule_is_there(compiled):
    """It reads the schedule before it waits for decode, and so decode lets it begin only after the
    schedule's end; whatever comes behind a merge waits for it."""
    for row in compiled:
        programmatic = devices.from_label(row.case.label).has_programmatic_launch
        begins_early = programmatic and row.case.kernel == "combine"
        assert row.resources.waits_first is not begins_early, describe(row)


def test_matrix_instructions_are_those_of_the_card(compiled):
    for row in compiled:
        if not row.case.is_attention:
            continue
        device = devices.from_label(row.case.label)
        families = row.resources.instructions
        single = row.case.problem.dtype == torch.float32
        if device.backend == "hip":
            expected = {"mfma"}
        elif single and decode_config.precision(row.case.problem, device) == "ieee":
            expected = {"fma"}
        elif single or row.row_tile < 64:
            expected = {"mma.sync"}
        elif device.has_tcgen05:
            expected = {"tcgen05"}
        else:
            expected = {"wgmma"} if device.has_wgmma else {"mma.sync"}
        assert families == expected, describe(row)


def test_the_estimate_of_shared_memory_is_an_upper_bound(compiled):
    """The heuristics decide by the estimate: what does not fit must not seem to."""
    decodes = [row for row in compiled if row.case.kernel == "portable"]
    low = [describe(row) for row in decodes if row.resources.shared_memory > row.estimate]
    assert not low


def test_every_card_and_row_tile_is_covered(compiled):
    tiles = {label: {r.row_tile for r in compiled if r.case.label == label} for label in LABELS}
    assert all(16 in found and 32 in found for found in tiles.values())
    assert all(64 in tiles[label] for label in ("8.0", "9.0", "10.0"))


def test_support_page_says_what_was_compiled(compiled):
    spec = importlib.util.spec_from_file_location("generate_support", DOCS / "generate_support.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    others = generator.every_case()[len(compiled) :]
    made = generator.page([*compiled, *compilation.compile_all(others)])
    on_disk = (DOCS / "support.md").read_text()
    if triton.__version__ != PINNED:
        # Other versions lay code out differently: the page's frame must still be the generator's.
        assert f"Triton {PINNED}" in on_disk
        on_disk, made = (re.sub(r"^\|.*$|Triton [\d.]+", "", text) for text in (on_disk, made))
    assert on_disk == made


def test_a_config_that_does_not_fit_is_refused_with_its_numbers():
    problem = compilation.problem(heads=128)
    card = devices.from_label("8.9")
    valid, rule = decode_config.is_valid(Config(64, 8, 2), problem, card, 64)
    assert not valid
    assert re.fullmatch(r"needs \d+ bytes of shared memory, 8\.9 has 101376", rule)
    valid, rule = decode_config.is_valid(Config(24, 4, 2), problem, card, 16)
    assert (valid, rule) == (False, "block_n must be a power of two in [16, 256], got 24")


def test_loop_finder_takes_the_innermost_matrix_loops():
    text = """\
.L_x_0:
STL [R1], R2 ;
.L_x_1:
LDL R2, [R1] ;
HMMA.16816 R4 ;
@P0 BRA `(.L_x_1) ;
@P1 BRA `(.L_x_0) ;
.L_x_2:
LDL R2, [R1] ;
@P0 BRA `(.L_x_2) ;
.L_x_3:
HMMA.16816 R4 ;
HMMA.16816 R8 ;
@P0 BRA `(.L_x_3) ;
""".splitlines()
    loops = resources.innermost_matrix_loops(
        text, r"\s*(\.L_x_\d+):", r"BRA.*`\((\.L_x_\d+)\)", r"\bHMMA\b"
    )
    assert loops == [text[2:5], text[10:13]]
    assert resources._most_spilling(loops, "LDL", ";") == (1, 2), "the worst of them is told"


def test_the_order_of_wait_and_signal_is_read_from_ptx():
    wait, signal = "\tgriddepcontrol.wait;\n", "\tgriddepcontrol.launch_dependents;\n"
    for right in ("", wait, wait + signal, (wait + signal) * 3):
        assert resources.waits_first(right)
    for wrong in (signal, signal + wait, wait + signal + signal):
        assert not resources.waits_first(wrong)
