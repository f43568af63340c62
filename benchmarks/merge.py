"""Merge speed on this machine's GPU, beside the bandwidth of a copy measured in the same run.

    python benchmarks/merge.py
    python benchmarks/merge.py --output benchmarks/results/merge/h200.json

Calls are captured in a CUDA graph, each on states of its own, together larger than any L2 cache. A
shape whose result is not within the error budget of the float64 reference has no speed. The target
is the first cell at 85 % of the copy bandwidth or more.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import protocol
import results as results_file
import torch

import mla_triton
from mla_triton import AttentionState, timing, validate_merge
from mla_triton import device as devices
from mla_triton.kernels.portable import merge as portable
from mla_triton.ops import merge as operation
from mla_triton.testing import compare
from mla_triton.testing.merges import MergeInputs

PROTOCOL = (
    "N(0,1) states; a CUDA graph of calls, each on states of its own, 200 MB or more together, "
    "replayed; median of event-timed replays over the calls; bandwidth is that of every state read "
    "once and the result written once, beside that of a kernel that copies 4 GiB"
)
TARGET = 0.85
SAMPLE = 64
"""Tokens of a result that are compared with the oracle: half of them first, half last."""


@dataclass(frozen=True)
class Cell:
    """One merge."""

    tokens: int
    heads: int = 128
    value_dim: int = 512
    states: int = 2
    stacked: bool = False
    masked: bool = False
    in_place: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        said = f"t{self.tokens}-h{self.heads}-d{self.value_dim}-n{self.states}"
        said += "-stack" * self.stacked + "-masked" * self.masked + "-in_place" * self.in_place
        return said + f"-{str(self.dtype).removeprefix('torch.')}"

    @property
    def bytes(self) -> int:
        """What has to be moved: every state read once, the result written once."""
        row = self.value_dim * self.dtype.itemsize + 4
        rows = self.tokens * self.heads
        # Where the mask is False, which is half of the rows, the first state alone is read.
        read = 1 + (self.states - 1) * (0.5 if self.masked else 1)
        return int(rows * row * (read + 1) + self.masked * self.tokens)


CELLS = (
    Cell(8192),
    Cell(8192, in_place=True),
    Cell(8192, masked=True, in_place=True),
    Cell(8192, states=4),
    Cell(4096, states=8),
    Cell(4096, states=8, stacked=True),
    Cell(2048, states=16, stacked=True),
    Cell(8192, dtype=torch.float32),
    Cell(8192, dtype=torch.float16),
    Cell(16384, value_dim=128),
    Cell(128),
    Cell(16),
    Cell(1),
)
CONFIGS = tuple((rows, warps) for warps in (1, 2, 4, 8) for rows in (1, 2, 4, 8))
"""(rows, warps) that the first cell is also timed with, whatever the heuristic takes."""


def make_inputs(cell: Cell, device: torch.device) -> MergeInputs:
    rows = (cell.states, cell.tokens, cell.heads)
    out = torch.randn(*rows, cell.value_dim, device=device, dtype=cell.dtype)
    lse = torch.randn(rows, device=device)
    states = tuple(map(AttentionState, out.unbind(), lse.unbind()))
    if not cell.stacked:
        states = tuple(AttentionState(*(t.clone() for t in state)) for state in states)
    mask = torch.arange(cell.tokens, device=device) % 2 == 0 if cell.masked else None
    return MergeInputs(states, mask, cell.dtype, is_stack=cell.stacked)


def sampled(cell: Cell, inputs: MergeInputs) -> tuple[torch.Tensor, MergeInputs]:
    """Some tokens of a cell, as indices and as a merge of their own."""
    state = inputs.states[0].out
    ends = {*range(SAMPLE // 2), *range(cell.tokens - SAMPLE // 2, cell.tokens)}
    index = torch.tensor([n for n in sorted(ends) if 0 <= n < cell.tokens], device=state.device)
    states = tuple(AttentionState(s.out[index], s.lse[index]) for s in inputs.states)
    mask = None if inputs.mask is None else inputs.mask[index]
    return index, MergeInputs(states, mask, cell.dtype)


def call_on(cell: Cell, inputs: MergeInputs) -> Any:
    if cell.in_place:
        buffers = inputs.states[0]._asdict()
    else:
        buffers = {kind: torch.empty_like(t) for kind, t in inputs.states[0]._asdict().items()}
    return partial(mla_triton.merge, inputs.given, mask=inputs.mask, **buffers)


def measure_cell(cell: Cell, copy_gbps: float, device: torch.device) -> dict[str, Any]:
    """One row of the results."""
    inputs = make_inputs(cell, device)
    index, sample = sampled(cell, inputs)
    state = call_on(cell, inputs)()
    report = compare(AttentionState(state.out[index], state.lse[index]), sample)
    row: dict[str, Any] = {"cell": cell.name, "bytes": cell.bytes}
    row["check"] = {"ok": report.ok, "error": report.out_error, "budget": report.out_budget}
    if not report.ok:
        return row | {"check": {"ok": False, "message": report.message}}
    copies = [make_inputs(cell, device) for _ in range(timing.cold_copies(cell.bytes))]
    calls = [call_on(cell, copy) for copy in copies]
    us = timing.microseconds(calls)
    gbps = cell.bytes / us / 1e3
    return row | {
        "us": us,
        "gbps": gbps,
        "of_copy": gbps / copy_gbps,
        "host_us": protocol.host_microseconds(calls[0]),
    }


def measure_configs(cell: Cell, copy_gbps: float, device: torch.device) -> list[dict[str, Any]]:
    """Every config of `CONFIGS` that is valid, on one cell."""
    inputs, card = make_inputs(cell, device), devices.of(device)
    outs, lses = validate_merge.unpack(inputs.given)
    out, lse = (torch.empty_like(tensor) for tensor in inputs.states[0])
    problem, layout, *_ = validate_merge.merge(outs, lses, None, out, lse)
    tensors = portable.MergeTensors(outs, lses, None, out, lse)
    found = []
    for rows, warps in CONFIGS:
        config = portable.Config(rows, warps)
        if not portable.is_valid(config, problem, card)[0]:
            continue
        ready = operation.prepare_with(config, portable, problem, card, out.device.index)
        launch = partial(portable.launch, ready.kernel, problem, config, layout, tensors)
        us = timing.microseconds([launch])
        of_copy = cell.bytes / us / 1e3 / copy_gbps
        found.append({"rows": rows, "num_warps": warps, "us": us, "of_copy": of_copy})
    return found


def measure() -> dict[str, Any]:
    device = torch.device("cuda", torch.cuda.current_device())
    ceilings = protocol.ceilings(device)
    cells = [measure_cell(cell, ceilings["copy_gbps"], device) for cell in CELLS]
    configs = measure_configs(CELLS[0], ceilings["copy_gbps"], device)
    return {"ceilings": ceilings, "target": TARGET, "cells": cells, "configs": configs}


def lines(figures: dict[str, Any]) -> list[str]:
    copy_gbps = figures["ceilings"]["copy_gbps"]
    rows = [["cell", "us", "GB/s", "of copy", "host us"]]
    for cell in figures["cells"]:
        if not cell["check"]["ok"]:
            rows.append([cell["cell"], "check failed", "", "", ""])
            continue
        rows.append(
            [
                cell["cell"],
                results_file.number(cell["us"]),
                results_file.number(cell["gbps"], 0),
                f"{cell['of_copy']:.0%}",
                results_file.number(cell["host_us"]),
            ]
        )
    text = [f"copy: {copy_gbps:.0f} GB/s", *results_file.columns(rows).splitlines()]
    text += [cell["check"]["message"] for cell in figures["cells"] if not cell["check"]["ok"]]
    first = figures["cells"][0]
    if first["check"]["ok"]:
        met = "met" if first["of_copy"] >= figures["target"] else "MISSED"
        text.append(f"target of {figures['target']:.0%} for {first['cell']}: {met}")
    text += [
        f"{first['cell']} with rows {c['rows']}, num_warps {c['num_warps']}: {c['us']:.1f} us, "
        f"{c['of_copy']:.0%}"
        for c in figures["configs"]
    ]
    return text


def main(argv: Sequence[str] | None = None) -> int:
    return results_file.record("merge.py", __doc__, measure, lines, argv, PROTOCOL)


if __name__ == "__main__":
    sys.exit(main())
