"""Writes docs/mutations.md: which planted bugs are caught, by what, and which others would be not.

    python tests/mutations/mutation_table.py           runs every bug and writes the page
    python tests/mutations/mutation_table.py --check   exits with 1 if the page says something else

In Triton's interpreter, wherever it runs; takes two minutes. `tests/mutations/test_mutations.py`
holds every row against what it finds.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).parents[2] / "docs" / "mutations.md"
NONE = "–"
INTRODUCTION = """\
# Planted bugs

A suite is worth what it catches. `tests/mutations` plants bugs in the kernels of this package, one
at a time, by an edit of their own text, runs them, and asks the checks of the suite: each bug has
to be caught in float16 and in bfloat16, but for what is [named below](#what-is-not-caught), and the
same problem has to pass without it. How the budgets are made is in [accuracy](accuracy.md).

"""
COLUMNS = (
    "bug",
    "problem",
    "caught by",
    "error / budget, float16",
    "error / budget, bfloat16",
    "seen by allclose",
    "on ordinary data",
)
READING = """
* *problem*: one of a fixed set, `TRIALS` in `tests/mutations/trials.py`.
* *caught by*: `out` or `lse` past its budget, by most of the two; NaN or an infinity where there
  must be none; of a cache's tokens, numbers past their budget, or bytes and bits that are not the
  reference's.
* *error / budget*: of the row furthest past its budget, over 1 where that is what catches it; ∞
  where a number is NaN or infinite; – where every bit counts. Without a bug it was 0.5 at most.
* *seen by allclose*: whether `torch.allclose(..., atol=1e-2, rtol=1e-2)` of out and lse against
  the float64 reference would have told it from a right result, over the same problem.
* *on ordinary data*: the same over what many a test has: a query token a request, lengths of whole
  pages, a cache without NaN; – where there is no such problem.

Numbers come from Triton's interpreter on a CPU, in which `python tests/mutations/mutation_table.py`
writes this page; another order of float32 sums changes their second digit, and those of an lse
more. On a GPU the same tests plant the same bugs in what is compiled there, and
`tests/gpu/test_mutations_gpu.py` others in the kernels for Hopper, which have no interpreter
(`tests/mutations/hopper_mutants.py`). On an H200 every bug of the table was caught, in both dtypes,
and so was every one in the kernels for Hopper.
"""
LIMITS = """
## What is not caught

A row with a number below 1 in a dtype, and no check beside it, is beneath what a budget can tell
there:

* a partial result rounded to 16 bits is one rounding more than there has to be, within the factor
  of two;
* probabilities rounded to bfloat16 are right where bfloat16 is multiplied. In float16 they are
  caught over some hundred keys and not over thousands: their roundings are independent from key to
  key and average out, over 4000 keys to less than what the rounding of the result may cost.

Budgets alone would also let a quantiser pass that rounds towards zero, or that uses half of e4m3's
range: these are caught because the bytes in a cache have to be the reference's. And an accumulator
in float16 is finer than a bfloat16 result: it is caught by values so large that their sum is past
float16's range, not by its roundings.

## A path that is not run

No check of numbers catches what never runs. `tests/mutations/test_capabilities.py` gives a card the
config of another one: its shared memory refuses it, and where that rule is taken away, too, what is
compiled for the card does not fit. A step that only the config of 8.9 takes is right under every
other config, whatever it says: the same tests run decode and prefill under every card's.

What is generated for another card alone has no such config. A wrong conversion of e4m3 in the code
for capability 8.0 leaves every result of a Hopper card right, in float16 and in bfloat16, and every
result of the interpreter: `tests/gpu/test_mutations_gpu.py` asks that it is caught where the code
for 8.0 is what runs.
"""


class Row(NamedTuple):
    bug: str
    problem: str
    caught_by: str
    float16: str
    bfloat16: str
    allclose: str
    ordinary: str

    def __str__(self) -> str:
        return f"| {' | '.join(self)} |"


def ratio_cell(verdict: Any) -> str:
    """Of a `Verdict`, to two digits."""
    if verdict.caught_by and verdict.ratio == 0:
        return NONE
    if verdict.ratio == float("inf"):
        return "∞"
    return (
        f"{float(f'{verdict.ratio:.2g}'):,.6g}"
        if verdict.ratio < 10
        else (f"{int(float(f'{verdict.ratio:.2g}')):,}")
    )


def dtypes_cell(seen: Mapping[str, bool | None]) -> str:
    """Of which dtypes something is true."""
    if None in seen.values():
        return NONE
    named = [name for name, value in seen.items() if value]
    return "yes" if len(named) == len(seen) else (named[0] if named else "no")


def row_of(name: str, problem: str, found: Mapping[str, Any]) -> Row:
    """Of the `Finding` in each dtype, by its name."""
    verdicts = {dtype: finding.verdict for dtype, finding in found.items()}
    caught = dict.fromkeys(v.caught_by for v in verdicts.values() if v.caught_by)
    return Row(
        name,
        problem,
        "; ".join(caught) or NONE,
        *(ratio_cell(verdicts[dtype]) for dtype in ("float16", "bfloat16")),
        dtypes_cell({dtype: v.is_seen_by_allclose for dtype, v in verdicts.items()}),
        dtypes_cell({dtype: f.is_seen_on_ordinary_data for dtype, f in found.items()}),
    )


def page(rows: Sequence[Row]) -> str:
    compared = [row for row in rows if row.ordinary != NONE]
    unseen = sum(row.allclose != "yes" for row in rows)
    missed = sum(row.ordinary != "yes" for row in compared)
    summary = (
        f"Of {len(rows)} bugs, {unseen} would have gone unseen in one dtype at least under "
        "`torch.allclose` with\n1e-2, over the very problem that shows them here. Over ordinary "
        f"data it misses {missed} of {len(compared)}.\n\n"
    )
    head = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n"
    table = "".join(f"{row}\n" for row in rows)
    return INTRODUCTION + summary + head + table + READING + LIMITS


def rows_of(text: str) -> list[Row]:
    """Those of a page."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [Row(*line.strip("| ").split(" | ")) for line in lines[2:]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(arguments)
    sys.path.append(str(Path(__file__).parents[1]))
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    import torch
    from mutants import DTYPES, MUTANTS
    from trials import find

    # As the tests have it: what a kernel was to write and did not is NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    rows = []
    for name, mutant in MUTANTS.items():
        found = {dtype: find(name, getattr(torch, dtype)) for dtype in DTYPES}
        rows.append(row_of(name, mutant.trial, found))
        print(rows[-1], flush=True)
    if options.check:
        return int(PAGE.read_text(encoding="utf-8") != page(rows))
    PAGE.write_text(page(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
