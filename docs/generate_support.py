"""Writes docs/support.md: what every kernel takes of every card, compiled here and now.

    python docs/generate_support.py            compiles everything and writes the page
    python docs/generate_support.py --check    exits with 1 if the page says something else

Needs no GPU; takes some minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch
import triton

from mla_triton import device as devices
from mla_triton.problem import DecodeProblem, PrefillProblem
from mla_triton.testing import cache_compilation, prefill_compilation
from mla_triton.testing.compilation import (
    DIMENSIONS,
    LABELS,
    Case,
    Compiled,
    OfCache,
    cases,
    compile_all,
)

PAGE = Path(__file__).parent / "support.md"
INTRODUCTION = """\
# Supported cards

What runs where, and what was seen. Three kinds of evidence, weakest first:

* **compiled**: the machine code of every configuration that the heuristics can choose was made for
  the card, and its shared memory fits. The tables below are that; `tests/test_compile.py` holds
  every row.
* **interpreted**: the same kernels ran in Triton's interpreter against the float64 reference. This
  shows what they compute, not what a compiler makes of them.
* **executed**: the machine code ran on a card. `tests/gpu` does that where there is one, and on a
  Hopper card also runs the code made for 8.0, 8.6 and 8.9
  (see [below](#code-for-80-86-and-89-on-a-hopper-card)). Seen on an NVIDIA H200 with Triton 3.6.0
  and PyTorch 2.11.0: all tests of `tests/gpu`, in float16, bfloat16 and float32, some of them at an
  earlier revision; all properties of `tests/properties`; five minutes of
  `tests/gpu/soak.py`, 2860 random problems, none of them wrong; and compute-sanitizer's memcheck
  and initcheck over every kernel, and racecheck over those written in Triton, without a finding.
  No other card has been tried.

| capability | cards | shared memory a program | matrix instructions | variants compiled |
| --- | --- | --- | --- | --- |
"""
FOREIGN = """\
## Code for 8.0, 8.6 and 8.9 on a Hopper card

PTX made for an older card assembles for a newer one. `tests/gpu/test_sm8x_code.py` uses that: on a
Hopper card it executes the Ampere and Ada code (mma.sync and cp.async, `.target sm_80`, `sm_86` and
`sm_89`), with the row tiles and configurations of those cards, against the reference, in float16
and bfloat16. That shows that the code Triton makes for these capabilities computes the right thing.
It does not show that a real card has the shared memory (the tables below do), nor how fast the code
is there, nor a fault of the older card's assembler or hardware.
"""
TABLES = """\
## Resources

Made by `python docs/generate_support.py` with Triton {triton}, whose assembler it uses. *Rows* are
(query, head) pairs of a program; each line gives the worst of all its page sizes and forms of call.
*Over* names how a quantised cache is stored: `fp8` with one scale, else the columns that share one
and what it is.
*Shared memory* is in bytes a program, *registers* and *spills* (bytes of stack) are a thread's, and
*in the loop* counts the stack accesses among the instructions of a key loop, which every step pays
for: of the loops over whole blocks and over the keys around them, the one with the larger share.
"""
HOPPER = """\
The kernel for Hopper, `sm90`, in both of its forms. It is compiled to 168 registers a thread, which
its warps share out anew when they begin.
"""
PREFILL = """\
## Prefill

The kernels of prefill: the portable one, as it is chosen for long sequences and for short ones (64
query tokens on average, or fewer), and that for Hopper, whose config has no `block_m`. Each line
gives the worst of all forms of call. Those of 9.0 have run on an H200, and no others anywhere.

| capability | qk, v | dtype | queries | config | shared memory | registers | spills | in the loop |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""
CACHE = """\
## Append, gather and copies of pages

The kernels of [the cache](cache.md), as they are chosen. Each line gives the worst of every form of
cache and of call. Only gather has a loop, over requests, and it accesses no stack.

| capability | operation | variants | shared memory | registers | spills |
| --- | --- | --- | --- | --- | --- |
"""


def family(rows: Iterable[Compiled]) -> str:
    return ", ".join(sorted({name for row in rows for name in row.resources.instructions}))


def summary(compiled: Sequence[Compiled]) -> str:
    """One row a card."""
    lines = []
    for label in LABELS:
        device = devices.from_label(label)
        every = [row for row in compiled if row.case.label == label]
        rows = [row for row in every if row.case.is_attention]
        prefills = sum(map(is_prefill, rows))
        lines.append(
            f"| {label} | {device.name} and its kind | {device.shared_memory // 1024} KiB "
            f"| {family(rows)} | {len(rows) - prefills} of decode, {prefills} of prefill, "
            f"{len(every) - len(rows)} of combine, schedule and merge |"
        )
    return "\n".join(lines) + "\n"


def is_of_cache(row: Compiled) -> bool:
    return isinstance(row.case.problem, OfCache)


def cache_section(compiled: Sequence[Compiled]) -> str:
    """The worst of every form, a row for each operation on each card."""
    lines = []
    for label in LABELS:
        for operation in ("append", "gather", "copy_pages"):
            rows = [
                row.resources
                for row in compiled
                if (row.case.label, row.case.kernel) == (label, operation)
            ]
            shared, registers, spills = (
                max(getattr(row, name) for row in rows)
                for name in ("shared_memory", "registers", "spilled")
            )
            cells = (label, operation, len(rows), shared, registers, spills)
            lines.append("| " + " | ".join(map(str, cells)) + " |\n")
    return CACHE + "".join(lines)


def is_prefill(row: Compiled) -> bool:
    return isinstance(row.case.problem, PrefillProblem)


def resource_cells(rows: Sequence[Compiled]) -> list[str]:
    """The worst of several: shared memory, registers, spills, spills in the loop."""
    worst = [row.resources for row in rows]
    slowed = max(worst, key=lambda r: r.loop_spills / max(1, r.loop_instructions))
    return [
        str(max(r.shared_memory for r in worst)),
        str(max(r.registers for r in worst)),
        str(max(r.spilled for r in worst)),
        f"{slowed.loop_spills} of {slowed.loop_instructions}",
    ]


def decode_key(row: Compiled) -> tuple[str, str, str, int, str]:
    problem = row.case.problem
    inside = " (rope inside)" if problem.rope_in_value else ""
    width = f"{problem.latent}+{problem.rope}{inside}"
    return (
        width,
        str(problem.dtype).removeprefix("torch."),
        row.config,
        row.row_tile,
        " ".join(forms(problem)),
    )


def forms(problem: DecodeProblem) -> Iterator[str]:
    """What is said of a problem behind its dtype."""
    if problem.storage is not None:
        yield f"over {problem.storage.name}"
    if problem.allow_tf32:
        yield "tf32 allowed"
    if not problem.aligned:
        yield "misaligned"


def decode_table(rows: Sequence[Compiled]) -> str:
    """The worst of every page size and form of call, a row for each configuration."""
    lines = [
        "| latent+rope | dtype | rows | config | pages | shared memory | registers | spills "
        "| in the loop |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    order = [f"{latent}+{rope}" for latent, rope, _ in DIMENSIONS]

    def rank(row: Compiled) -> tuple[int, tuple[str, str, str, int, str]]:
        width = decode_key(row)[0]
        return (order.index(width) if width in order else len(order), decode_key(row))

    for (_, key), grouped in groupby(sorted(rows, key=rank), key=rank):
        same = list(grouped)
        width, dtype, config, row_tile, form = key
        pages = sorted({row.case.problem.page_size for row in same})
        cells = [
            width,
            f"{dtype} {form}".strip(),
            str(row_tile),
            f"`{config}`",
            ", ".join(map(str, pages)),
            *resource_cells(same),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def prefill_key(row: Compiled) -> tuple[str, ...]:
    problem = row.case.problem
    dtype = str(problem.dtype).removeprefix("torch.")
    return (
        row.case.label,
        f"{problem.qk_dim}, {problem.value_dim}",
        dtype if problem.aligned else f"{dtype} misaligned",
        "long" if problem.usual_queries > prefill_compilation.SHORT else "short",
        row.config,
    )


def prefill_section(compiled: Sequence[Compiled]) -> str:
    """The worst of every form of call, a row for each configuration."""
    grouped: dict[tuple[str, ...], list[Compiled]] = {}
    for row in compiled:
        grouped.setdefault(prefill_key(row), []).append(row)
    lines = []
    for (label, widths, dtype, queries, config), rows in grouped.items():
        cells = [label, widths, dtype, queries, f"`{config}`", *resource_cells(rows)]
        lines.append("| " + " | ".join(cells) + " |\n")
    return PREFILL + "".join(lines)


def every_case() -> list[Case]:
    """What the page is about."""
    return [*cases(), *prefill_compilation.cases(), *cache_compilation.cases()]


def page(compiled: Sequence[Compiled]) -> str:
    """The whole page as Markdown, from `every_case` compiled."""
    of_cache = [row for row in compiled if is_of_cache(row)]
    compiled = [row for row in compiled if not is_of_cache(row)]
    parts = [INTRODUCTION + summary(compiled), FOREIGN, TABLES.format(triton=triton.__version__)]
    for label in LABELS:
        rows = [row for row in compiled if row.case.label == label and not is_prefill(row)]
        small = [row for row in rows if not row.case.is_attention]
        hopper = [row for row in rows if row.case.kernel == "sm90"]
        parts.append(
            f"### {label}\n\n"
            + decode_table([row for row in rows if row.case.kernel == "portable"])
            + (f"\n{HOPPER}\n{decode_table(hopper)}" if hopper else "")
            + "\nCombine, schedule and merge: at most "
            f"{max(r.resources.shared_memory for r in small)} bytes of shared memory and "
            f"{max(r.resources.spilled for r in small)} bytes of spills.\n"
        )
    parts.append(prefill_section(list(filter(is_prefill, compiled))))
    return "\n".join([*parts, cache_section(of_cache)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(arguments)
    text = page(compile_all(every_case()))
    if options.check:
        if PAGE.read_text() == text:
            return 0
        print(f"{PAGE} is stale: run python docs/generate_support.py", file=sys.stderr)
        return 1
    PAGE.write_text(text)
    print(f"wrote {PAGE} (torch {torch.__version__}, triton {triton.__version__})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
