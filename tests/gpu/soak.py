"""Random problems for as long as one likes: every operation by every implementation and form.

    python tests/gpu/soak.py --seconds 300 --seed 1 --jobs 8
    python tests/gpu/soak.py --seed 1 --first 4711 --problems 1     one of them again

Each problem is computed twice by all that takes it: held against the float64 oracle and its budget
(operations on a cache to the byte), for equal bits, and for writing nothing but the result.
`soak_problems.py` has the problems. A mismatch prints a line that makes it again; the summary says
how many problems there were by what, and how close to its budget the worst result came. Exits with
1 where anything was wrong. Without a GPU set TRITON_INTERPRET=1: the problems are then tiny.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# The modules that tests share lie there.
sys.path.append(str(Path(__file__).parents[1]))

import torch
from soak_problems import INTERPRETED, ON_GPU, draw, judge


@dataclass
class Tally:
    """What was found, by label: (problems, those that were wrong, worst error over budget)."""

    problems: int = 0
    rows: dict[str, list[float]] = field(default_factory=dict)
    slowest: float = 0.0
    """Seconds of the slowest problem, compilation included."""

    def add(self, label: str, problems: float, wrong: float, ratio: float) -> None:
        row = self.rows.setdefault(label, [0, 0, 0.0])
        # Of a wrong result the ratio is NaN.
        worst = max(row[2], ratio) if ratio == ratio else row[2]
        self.rows[label] = [row[0] + problems, row[1] + wrong, worst]

    def merge(self, other: Tally) -> None:
        self.problems += other.problems
        self.slowest = max(self.slowest, other.slowest)
        for label, row in other.rows.items():
            self.add(label, *row)

    @property
    def wrong(self) -> int:
        return int(sum(row[1] for row in self.rows.values()))

    def __str__(self) -> str:
        lines = [f"{'by':20} {'problems':>9} {'wrong':>6} {'error/budget':>13}"]
        for label, (problems, wrong, ratio) in sorted(self.rows.items()):
            shown = "equal bits" if label in ("gather", "copy_pages") else f"{ratio:.3f}"
            lines.append(f"{label:20} {int(problems):9} {int(wrong):6} {shown:>13}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Share:
    """What one process does: problems `first`, `first + step` and so on."""

    seed: int
    first: int
    step: int
    problems: int | None
    until: float | None
    """By `time.time()`, which processes share."""


def soak(share: Share) -> Tally:
    """Problems until they or the time are over."""
    # A buffer that a kernel was to write and did not is then NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    warnings.filterwarnings("ignore", ".*does not have a deterministic implementation")
    warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = ON_GPU if device.type == "cuda" else INTERPRETED
    tally = Tally()
    for number in islice(count(share.first, share.step), share.problems):
        if share.until is not None and time.time() >= share.until:
            break
        drawn, begun = draw(share.seed, number, size), time.perf_counter()
        again = f"{Path(__file__).name} --seed {share.seed} --first {number} --problems 1"
        try:
            for label, ratio, wrong in judge(drawn, device):
                tally.add(label, 1, bool(wrong), ratio)
                if wrong:
                    print(f"WRONG {label}: {wrong}\n  {drawn}\n  {again}", flush=True)
        except Exception:
            print(f"RAISED\n  {drawn}\n  {again}", flush=True)
            raise
        tally.problems += 1
        tally.slowest = max(tally.slowest, time.perf_counter() - begun)
    return tally


def shares(arguments: argparse.Namespace) -> list[Share]:
    jobs, problems = arguments.jobs, arguments.problems
    until = None if problems is not None else time.time() + arguments.seconds
    return [
        Share(
            arguments.seed, arguments.first + job, jobs,
            None if problems is None else len(range(job, problems, jobs)), until,
        )
        for job in range(jobs)
    ]  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=300, help="how long (default: 300)")
    parser.add_argument("--problems", type=int, help="how many, however long they take")
    parser.add_argument("--seed", type=int, help="of all problems (default: another every time)")
    parser.add_argument("--first", type=int, default=0, help="number of the first problem")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    arguments = parser.parse_args(words)
    if arguments.jobs < 1:
        parser.error(f"argument --jobs: must be at least 1, got {arguments.jobs}")
    if arguments.seed is None:
        arguments.seed = time.time_ns() % 2**31
    begun, tally = time.perf_counter(), Tally()
    print(f"seed {arguments.seed}", flush=True)
    if arguments.jobs == 1:
        tally = soak(*shares(arguments))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            arguments.jobs, context, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            for done in as_completed(pool.submit(soak, share) for share in shares(arguments)):
                tally.merge(done.result())
    took = time.perf_counter() - begun
    print(tally)
    print(
        f"{tally.problems} problems in {took:.0f} s, the slowest took {tally.slowest:.1f} s; "
        f"{tally.wrong} wrong results"
    )
    return 1 if tally.wrong or not tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
