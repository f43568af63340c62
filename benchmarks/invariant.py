"""What it costs that a request's result does not depend on the batch: decode both ways.

    python benchmarks/invariant.py
    python benchmarks/invariant.py --output benchmarks/results/invariant/h200.json

Calls are captured in a CUDA graph, each on a cache of its own, together larger than any L2 cache,
the schedule of every call inside. A result that is not within the error budget of the float64
reference, or whose first request is not the same bit for bit when it is computed alone, has no
speed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import results as results_file
import torch
from cells import LATENT, SOFTMAX_SCALE, Cell, skewed
from protocol import Inputs, make_inputs

import mla_triton
from mla_triton import timing
from mla_triton.testing import DecodeInputs, compare, decode_budget

PROTOCOL = (
    "bfloat16, 512 + 64, page 64, pages of a request scattered at random, N(0,1) data; a CUDA "
    "graph of calls, each on its own slice of a cache of 200 MB or more, replayed; median of "
    "event-timed replays over the calls; the schedule of every call inside; ratio: time of the "
    "ordinary call, measured just before, to that of the batch-invariant one"
)
CELLS = (
    *(Cell(16384, 1, heads) for heads in (16, 64, 128)),
    *(Cell(kv_len, 128, heads) for kv_len in (1024, 4096, 16384) for heads in (16, 64, 128)),
    Cell(4096, 128, 128, s_q=2),
    skewed(),
)


def of_requests(inputs: Inputs, count: int) -> DecodeInputs:
    """The first requests, over the first copy of the cache."""
    return DecodeInputs(
        q_nope=inputs.q_nope[:count],
        q_rope=inputs.q_rope[:count],
        cache=inputs.caches[0],
        page_table=inputs.page_table[:count],
        kv_lens=inputs.kv_lens[:count],
        softmax_scale=SOFTMAX_SCALE,
        max_kv_len=inputs.cell.kv_len,
    )


def judged(inputs: Inputs, state: mla_triton.AttentionState) -> dict[str, Any]:
    """The first request against the oracle, and against itself alone."""
    alone = of_requests(inputs, 1)
    arguments, options = alone.call_arguments()
    same = mla_triton.decode(*arguments, **options, batch_invariant=True)
    first = mla_triton.AttentionState(state.out[:1], state.lse[:1])
    if not (torch.equal(same.out, first.out) and torch.equal(same.lse, first.lse)):
        return {"ok": False, "message": f"{inputs.cell.name}: the first request has other bits"}
    report = compare(first, alone, decode_budget(alone))
    if not report.ok:
        return {"ok": False, "message": report.message}
    return {"ok": True, "error": report.out_error, "budget": report.out_budget}


def measure_cell(cell: Cell, device: torch.device) -> dict[str, Any]:
    inputs = make_inputs(cell, device)
    whole = of_requests(inputs, cell.batch)
    out = torch.empty(*inputs.q.shape[:-1], LATENT, dtype=inputs.q.dtype, device=device)
    lse = torch.empty(inputs.q.shape[:-1], device=device)
    times = {}
    for invariant in (False, True):
        calls = []
        for cache in inputs.caches:
            (q_nope, q_rope, _, *rest), options = whole.call_arguments()
            calls.append(
                partial(
                    mla_triton.decode, q_nope, q_rope, cache, *rest, **options,
                    batch_invariant=invariant, out=out, lse=lse,
                )
            )  # fmt: skip
        check = judged(inputs, calls[0]()) if invariant else None
        times[invariant] = timing.microseconds(calls)
    row = {"cell": cell.name, "check": check}
    if check is not None and check["ok"]:
        row |= {"us": times[True], "ordinary_us": times[False], "ratio": times[False] / times[True]}
    return row


def measure() -> dict[str, Any]:
    device = torch.device("cuda", torch.cuda.current_device())
    return {"cells": [measure_cell(cell, device) for cell in CELLS]}


def lines(figures: dict[str, Any]) -> list[str]:
    table = [["cell", "ordinary us", "batch-invariant us", "ratio"]]
    for row in figures["cells"]:
        if not row["check"]["ok"]:
            table.append([row["cell"], "check failed", "", ""])
            continue
        numbers = [results_file.number(row[name]) for name in ("ordinary_us", "us")]
        table.append([row["cell"], *numbers, f"{row['ratio']:.2f}"])
    text = results_file.columns(table).splitlines()
    return text + [r["check"]["message"] for r in figures["cells"] if not r["check"]["ok"]]


def main(argv: Sequence[str] | None = None) -> int:
    return results_file.record("invariant.py", __doc__, measure, lines, argv, PROTOCOL)


if __name__ == "__main__":
    sys.exit(main())
