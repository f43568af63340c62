"""Every planted bug is caught in float16 and in bfloat16, and docs/mutations.md says by what."""

from __future__ import annotations

import mutation_table
import pytest
import torch
from mutants import DTYPES, MUTANTS
from trials import COMPILED, Finding, find, with_bug, without_bug

# What NaN and infinities a bug brings is what is looked for.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]

FAR_MEMORY = 13 * 2**30
"""Bytes that pages, or slots, that are 2**31 elements apart take of a GPU."""
PINNED = {
    row.bug: row for row in mutation_table.rows_of(mutation_table.PAGE.read_text(encoding="utf-8"))
}
RATIO_VARIES = 2
"""Budgets hold what roundings there were: a library that adds in another order has other ones."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MUTANTS)
def test_it_is_caught(name: str, dtype: str) -> None:
    mutant = MUTANTS[name]
    if COMPILED and "far" in mutant.trial:
        free, _ = torch.cuda.mem_get_info()
        if free < FAR_MEMORY:
            pytest.skip(f"needs {FAR_MEMORY} free bytes of the GPU, there are {free}")
    right = without_bug(mutant.trial, getattr(torch, dtype))
    assert not right.caught_by, f"{mutant.trial}: {right}"
    if COMPILED:
        # Compiled once for each bug: what another comparison makes of it is no matter here.
        wrong = with_bug(name, getattr(torch, dtype))
    else:
        found = find(name, getattr(torch, dtype))
        wrong = found.verdict
        says_the_page(name, dtype, found)
    assert bool(wrong.caught_by) is (dtype not in mutant.missed), wrong
    assert right.ratio < 1


def says_the_page(name: str, dtype: str, found: Finding) -> None:
    """Whether its row tells what was found in a dtype."""
    row, verdict = PINNED[name], found.verdict
    assert row.problem == MUTANTS[name].trial
    assert not verdict.caught_by or verdict.caught_by in row.caught_by.split("; ")
    written, fresh = getattr(row, dtype), mutation_table.ratio_cell(verdict)
    if "∞" in (written, fresh) or mutation_table.NONE in (written, fresh):
        assert written == fresh
    else:
        one, other = (float(cell.replace(",", "")) for cell in (written, fresh))
        assert 1 / RATIO_VARIES < one / other < RATIO_VARIES, (written, fresh)
    for cell, seen in (
        (row.allclose, verdict.is_seen_by_allclose),
        (row.ordinary, found.is_seen_on_ordinary_data),
    ):
        assert (None if cell == mutation_table.NONE else cell in ("yes", dtype)) == seen


def test_the_page_has_every_bug_in_order() -> None:
    text = mutation_table.PAGE.read_text(encoding="utf-8")
    assert list(PINNED) == list(MUTANTS)
    assert text == mutation_table.page(list(PINNED.values()))
