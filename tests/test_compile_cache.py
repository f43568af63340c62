"""Machine code of append, gather and copy_pages for every card, without the cards."""

from __future__ import annotations

import re

import pytest

from mla_triton import device as devices
from mla_triton.kernels.portable import append, copy_pages, gather
from mla_triton.testing import cache_compilation
from mla_triton.testing.caches import FORMS
from mla_triton.testing.compilation import LABELS, Compiled, compile_all, side_by_side

MOST_SPILLED = 8
"""Bytes, of one variant on one card. No kernel but gather has a loop: it is paid once a program."""
MODULES = {"append": append, "gather": gather, "copy_pages": copy_pages}


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    return compile_all(list(cache_compilation.cases()))


def describe(row: Compiled) -> str:
    return f"{row.case} as {row.config}: {row.resources}"


def test_every_case_compiles_and_fits_its_card(compiled):
    assert {row.case.label for row in compiled} == set(LABELS)
    over = [describe(row) for row in compiled if row.resources.shared_memory > row.limit]
    assert not over


def test_no_more_than_two_registers_are_spilled(compiled):
    spilling = [describe(row) for row in compiled if row.resources.spilled > MOST_SPILLED]
    assert not spilling


def accesses_of(form: str) -> list[tuple[str, dict[str, int]]]:
    """(operation, how often each access to global memory stands in its code for 9.0)."""
    device, found = devices.from_label("9.0"), []
    problems = {
        "append": cache_compilation.append_problem(form),
        "gather": cache_compilation.gather_problem(form),
        "copy_pages": next(cache_compilation.copies()),
    }
    for name, problem in problems.items():
        module = MODULES[name]
        code = module.compile(problem, module.heuristic(problem, device), device).asm["ptx"]
        counts: dict[str, int] = {}
        for access in re.findall(r"\b(?:ld|st)\.global\S*", code):
            counts[access] = counts.get(access, 0) + 1
        found.append((name, counts))
    return found


def test_rows_are_accessed_16_bytes_at_a_time():
    """In each direction as often as a token's columns take, of two tokens to a warp."""
    for form, made in zip(FORMS, side_by_side(accesses_of, FORMS), strict=True):
        for name, counts in made:
            loads, stores = counts["ld.global.v4.b32"], counts["st.global.v4.b32"]
            assert min(loads, stores) >= 2, (form, name, counts)
            # Scales, slots and offsets are all that is narrower, and a rotary key in e4m3.
            narrow = {"ld.global.b16", "st.global.b16", "ld.global.v2.b16", "st.global.v2.b16"}
            assert not narrow & set(counts), (form, name, counts)
