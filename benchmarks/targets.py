"""Which of the project's speed targets a results file meets.

    python benchmarks/targets.py benchmarks/results/h200.json

The peers' figures are those recorded in `peers_h200.json`, taken on another day and another H200:
differences under 3 % are noise. Exit code 1 where a target is missed or was not measured.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cells as cell_list
import results as results_file

COMBINE_LIMIT = 5.0
SCHEDULE_LIMIT = 3.0
HOST_LIMIT = 15.0
BEST_PEER_SHARE = 0.95
SGLANG_SHARE = 4.0
ALONE = {"s1024-b1-h16": 7.5, "s4096-b1-h16": 9.0, "s16384-b1-h16": 16.0, "s65536-b1-h16": 36.0}
"""One request of 16 heads: below every rival with the portable kernel alone."""
GEOMETRIC_MEAN = 1.20
"""Of the best peer's time over ours, over all cells that peers were measured in."""
HOPPER = {
    "s16384-b1-h16": 13.0,
    "s16384-b1-h64": 18.0,
    "s16384-b1-h128": 22.0,
    "s65536-b1-h16": 30.0,
    "s65536-b1-h64": 34.0,
    "s65536-b1-h128": 44.0,
    "s4096-b16-h16": 26.0,
    "s4096-b16-h64": 31.0,
    "s4096-b16-h128": 40.0,
    "skewed-b64-h128": 130.0,
}
TERABYTES = {"s16384-b128-h16": 4.4, "s16384-b128-h64": 4.4}
TERAFLOPS = {"s16384-b128-h128": 680.0, "s4096-b128-h128-q2": 690.0}
SUSTAINED_TERAFLOPS = {cell_list.SUSTAINED_CELL: 560.0}
"""What the kernels for Hopper are to reach on an H200."""
PAGE_SHARES = {1: 0.85, 16: 0.85, 32: 0.85, 128: 0.97}
"""Of the speed at pages of 64 tokens, by page size."""


@dataclass(frozen=True)
class Verdict:
    target: str
    where: str
    limit: float
    got: float | None
    """Microseconds (a ratio where `where` is empty), or None where nothing was measured."""

    @property
    def met(self) -> bool:
        return self.got is not None and self.got <= self.limit

    @property
    def numbers(self) -> tuple[str, str]:
        """(limit, got) as text."""
        digits = 1 if self.where or self.limit > 2 else 2
        return results_file.number(self.limit, digits), results_file.number(self.got, digits)

    @property
    def text(self) -> str:
        if self.got is None:
            return "not measured"
        share = (self.got / self.limit - 1) * 100
        return f"{abs(share):.0f} % {'over' if share > 0 else 'under'}"


def evaluate(results: dict[str, Any], peers: dict[str, dict[str, float]]) -> Iterator[Verdict]:
    """Every target, in the order in which they are stated."""
    cells = {c["cell"]: c for c in results["cells"] if c["check"]["ok"]}

    def got(cell: str, field: str = "us") -> float | None:
        return cells.get(cell, {}).get(field)

    table = {cell: us for cell, us in peers.items() if "-q" not in cell}
    for cell, us in table.items():
        yield Verdict("at least FlashInfer fa2", cell, us["flashinfer_fa2"], got(cell))
    for cell, us in table.items():
        if cell.endswith("-h16") and "-b1-" not in cell:
            limit = min(us.values()) / BEST_PEER_SHARE
            yield Verdict("0.95 of the best peer", cell, limit, got(cell))
    for cell, us in table.items():
        if cell.endswith("-h128"):
            yield Verdict("4 x SGLang Triton", cell, us["sglang"] / SGLANG_SHARE, got(cell))
    for cell in table:
        yield Verdict("combine", cell, COMBINE_LIMIT, got(cell, "combine_us"))
    for cell in table:
        yield Verdict("schedule", cell, SCHEDULE_LIMIT, got(cell, "schedule_us"))
    for cell, limit in ALONE.items():
        yield Verdict("below every rival", cell, limit, got(cell))
    yield Verdict("host time of an eager call", "", HOST_LIMIT, results.get("host_us"))
    for cell, us in table.items():
        yield Verdict("the best peer", cell, min(us.values()), got(cell))
    ratios = [(got(cell), min(us.values())) for cell, us in table.items()]
    logs = [math.log(ours / best) for ours, best in ratios if ours is not None]
    mean = math.exp(sum(logs) / len(logs)) if len(logs) == len(ratios) else None
    yield Verdict("share of the best peer's time, mean", "", 1 / GEOMETRIC_MEAN, mean)
    for cell, limit in HOPPER.items():
        yield Verdict("Hopper", cell, limit, got(cell))
    sizes = {cell.name: cell for cell in cell_list.all_cells()}
    for cell, rate in TERABYTES.items():
        yield Verdict(f"{rate} TB/s", cell, sizes[cell].bytes / rate / 1e6, got(cell))
    for cell, rate in TERAFLOPS.items():
        yield Verdict(f"{rate:.0f} TFLOP/s", cell, sizes[cell].flops / rate / 1e6, got(cell))
    for cell, rate in SUSTAINED_TERAFLOPS.items():
        limit = sizes[cell].flops / rate / 1e6
        yield Verdict(
            f"{rate:.0f} TFLOP/s for {cell_list.SUSTAINED_SECONDS} s",
            cell,
            limit,
            got(cell, "sustained_us"),
        )
    for cell in cell_list.other_pages():
        plain = got(replace(cell, page_size=cell_list.PAGE_SIZE).name)
        share = PAGE_SHARES[cell.page_size]
        limit, us = (math.inf, None) if plain is None else (plain / share, got(cell.name))
        yield Verdict(f"{share} of the speed at pages of 64", cell.name, limit, us)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="targets.py", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--missed", action="store_true", help="print only the targets not met")
    arguments = parser.parse_args(argv)
    try:
        results = results_file.read(arguments.results)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    verdicts = list(evaluate(results, results_file.peers()))
    rows = [["target", "cell", "", "limit us", "got us", "by"]]
    for v in verdicts:
        if v.met and arguments.missed:
            continue
        limit, got = v.numbers
        rows.append([v.target, v.where, "pass" if v.met else "MISS", limit, got, v.text])
    print(results_file.columns(rows, right_from=3))
    met = sum(v.met for v in verdicts)
    print(f"{met} of {len(verdicts)} targets met")
    return 0 if met == len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
