"""What it costs that a request's result does not depend on the batch: decode and prefill both ways.

    python benchmarks/invariant.py
    python benchmarks/invariant.py --output benchmarks/results/invariant/h200.json

Calls are captured in a CUDA graph, each on inputs of its own, together larger than any L2 cache,
the schedule of every call inside. A result that is not within the error budget of the float64
reference, or whose first request is not the same bit for bit when it is computed alone, has no
speed. What is printed is the table of docs/decode.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import prefill
import results as results_file
import torch
from cells import LATENT, SOFTMAX_SCALE, Cell, skewed
from protocol import Inputs, make_inputs

import mla_triton
from mla_triton import AttentionState, timing
from mla_triton.testing import DecodeInputs, Report, compare, decode_budget

PROTOCOL = (
    "bfloat16; decode: 512 + 64, page 64, pages of a request scattered at random; prefill: causal, "
    "qk 192, v 128, one rotary key for all heads; N(0,1) data; a CUDA graph of calls, each on its "
    "own slice of inputs of 200 MB or more, replayed; median of event-timed replays over the "
    "calls; the schedule of every call inside; times: the batch-invariant call over the ordinary "
    "one, measured just before"
)
DECODES = (
    *(
        Cell(kv_len, batch, heads)
        for heads in (16, 128)
        for batch, kv_len in (
            (1, 1024), (1, 16384), (16, 4096), (16, 16384), (128, 1024), (128, 4096), (128, 16384),
        )
    ),
    skewed(),
)  # fmt: skip
PREFILLS = tuple(
    prefill.Cell(length, batch, 16) for length, batch in ((16, 256), (64, 128), (4096, 4))
)
TITLES = ("cell", "ordinary, us", "batch-invariant, us", "times")

Calls = Sequence[Callable[[], AttentionState]]


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


def decode_calls(inputs: Inputs, **options: Any) -> Calls:
    device = inputs.q.device
    out = torch.empty(*inputs.q.shape[:-1], LATENT, dtype=inputs.q.dtype, device=device)
    lse = torch.empty(inputs.q.shape[:-1], device=device)
    (q_nope, q_rope, _, *rest), own = of_requests(inputs, inputs.cell.batch).call_arguments()
    return [
        partial(mla_triton.decode, q_nope, q_rope, cache, *rest, **own, **options, out=out, lse=lse)
        for cache in inputs.caches
    ]


def judge_decode(inputs: Inputs, state: AttentionState) -> Report:
    """The first request against the oracle."""
    alone = of_requests(inputs, 1)
    return compare(first_rows(state, 1), alone, decode_budget(alone))


def first_rows(state: AttentionState, count: int) -> AttentionState:
    return AttentionState(*(tensor[:count] for tensor in state))


def measure_cell(
    name: str, calls: Callable[..., Calls], judge: Callable[[AttentionState], Report], alone: Calls
) -> dict[str, Any]:
    """One row of the results.

    `calls` takes the option, `judge` holds a result against the oracle, `alone` is the
    batch-invariant call of the first request.
    """
    ordinary_us = timing.microseconds(calls())
    invariant = calls(batch_invariant=True)
    state, same = invariant[0](), alone[0]()
    report = judge(state)
    check = prefill.check_facts(report)
    first = first_rows(state, len(same.out))
    if not all(torch.equal(*pair) for pair in zip(first, same, strict=True)):
        check = {"ok": False, "message": f"{name}: the first request has other bits"}
    row = {"cell": name, "check": check}
    if check["ok"]:
        us = timing.microseconds(invariant)
        row |= {"ordinary_us": ordinary_us, "us": us, "times": us / ordinary_us}
    return row


def measure_decode(cell: Cell, device: torch.device) -> dict[str, Any]:
    inputs = make_inputs(cell, device)
    arguments, own = of_requests(inputs, 1).call_arguments()
    alone = [partial(mla_triton.decode, *arguments, **own, batch_invariant=True)]
    return measure_cell(
        cell.name, partial(decode_calls, inputs), partial(judge_decode, inputs), alone
    )


def measure_prefill(cell: prefill.Cell, device: torch.device) -> dict[str, Any]:
    rotation = prefill.make_inputs(cell, device)
    inputs = rotation[0]
    tokens = slice(cell.length)
    first = prefill.Inputs(
        replace(cell, batch=1), inputs.q[tokens], inputs.k_nope[tokens], inputs.k_rope[tokens],
        inputs.v[tokens], inputs.offsets[:2],
    )  # fmt: skip
    return measure_cell(
        f"prefill-{cell.name}",
        partial(prefill.our_calls, rotation),
        lambda state: prefill.judge(inputs, *state),
        prefill.our_calls([first], batch_invariant=True),
    )


def rows(device: torch.device) -> Iterator[dict[str, Any]]:
    for cell in DECODES:
        yield measure_decode(cell, device)
    for prompts in PREFILLS:
        yield measure_prefill(prompts, device)


def measure() -> dict[str, Any]:
    return {"cells": list(rows(torch.device("cuda", torch.cuda.current_device())))}


def lines(figures: dict[str, Any]) -> list[str]:
    """The table, and why rows of it have no speed."""
    text = [_line(TITLES), _line(("---", *["---:"] * (len(TITLES) - 1)))]
    for row in figures["cells"]:
        if not row["check"]["ok"]:
            text.append(_line((row["cell"], "check failed", "", "")))
            continue
        numbers = (results_file.number(row[name]) for name in ("ordinary_us", "us"))
        text.append(_line((row["cell"], *numbers, f"{row['times']:.2f}")))
    return text + [r["check"]["message"] for r in figures["cells"] if not r["check"]["ok"]]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    return results_file.record("invariant.py", __doc__, measure, lines, argv, PROTOCOL)


if __name__ == "__main__":
    sys.exit(main())
