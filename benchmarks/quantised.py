"""Decode over quantised caches on this machine's GPU, beside the same decode over bfloat16.

    python benchmarks/quantised.py
    python benchmarks/quantised.py --output benchmarks/results/quantised/h200.json

Calls are captured in a CUDA graph, each on a cache of its own, together larger than any L2 cache. A
result that is not within the error budget of the float64 reference, over the numbers that the cache
stands for, has no speed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import results as results_file
import torch
from cells import LATENT, PAGE_SIZE, ROPE, SOFTMAX_SCALE

import mla_triton
from mla_triton import AttentionState, LatentCache, timing
from mla_triton.cache import FP8_DS_MLA
from mla_triton.cache.formats import E4M3
from mla_triton.cache.quantise import pack, quantise
from mla_triton.testing import DecodeInputs, compare, decode_budget, plan_of

PROTOCOL = (
    "bfloat16 queries, N(0,1) keys, pages of 64 of a request scattered at random; a CUDA graph of "
    "calls, each on a cache of its own, 200 MB or more together, replayed; median of event-timed "
    "replays over the calls; the schedule of every call inside, but in planned cells, whose calls "
    "share a plan made beforehand; ratios are the time of the same call over a bfloat16 cache, "
    "measured just before, to that of the quantised one"
)
SCALES = (0.0117, 0.0113)
"""Of latents and rotary keys with one each: N(0,1) reaches 5.2."""
PAGES_AT_ONCE = 2048


@dataclass(frozen=True)
class Cell:
    """Decode of `batch` requests of `kv_len` keys."""

    kv_len: int
    batch: int
    heads: int
    planned: bool = False
    """Whether calls share a plan that is made beforehand."""

    @property
    def name(self) -> str:
        return f"s{self.kv_len}-b{self.batch}-h{self.heads}" + "-planned" * self.planned

    @property
    def pages(self) -> int:
        return self.batch * (self.kv_len // PAGE_SIZE)


CELLS = (
    *(Cell(kv_len, 128, heads) for kv_len in (16384, 4096) for heads in (16, 32, 64, 128)),
    *(Cell(16384, batch, heads) for batch in (16, 1) for heads in (16, 128)),
    *(Cell(kv_len, 1, heads, planned=True) for kv_len in (2048, 16384) for heads in (16, 128)),
    Cell(16384, 4, 16, planned=True),
)
FORMS = ("fp8", "fp8_ds_mla")
IMPLEMENTATIONS = (None, "portable")
PORTABLE_HEADS = 16
"""Where the portable kernel is timed, too, beside what is chosen."""
TARGETS = {
    ("fp8", None): {16: 1.6, 32: 1.6, 64: 1.6, 128: 0.95},
    ("fp8_ds_mla", None): {16: 1.4, 32: 1.4, 64: 1.4},
    ("fp8", "portable"): {16: 1.0},
}
TARGET_CELLS = (16384, 128)
"""kv_len and batch of the cells that targets are of."""


def bytes_of(form: str) -> int:
    """Of a token."""
    return {"16bit": 2 * (LATENT + ROPE), "fp8": LATENT + ROPE}.get(form, FP8_DS_MLA.token_bytes)


def make_cache(
    cell: Cell, form: str, generator: torch.Generator, device: torch.device
) -> torch.Tensor | LatentCache:
    """A cache of random keys, some pages at a time: in float32 they take four times as much."""
    width = LATENT + ROPE
    dtype = {"16bit": torch.bfloat16, "fp8": E4M3}.get(form, torch.uint8)
    columns = width if dtype != torch.uint8 else FP8_DS_MLA.token_bytes
    pages = torch.empty(cell.pages, PAGE_SIZE, columns, dtype=dtype, device=device)
    scales = torch.tensor(SCALES, device=device)
    like = LatentCache(torch.empty(0, 0, width, dtype=E4M3), None, scales)
    for first in range(0, cell.pages, PAGES_AT_ONCE):
        part = pages[first : first + PAGES_AT_ONCE]
        keys = torch.randn(*part.shape[:2], width, generator=generator, device=device)
        latent, rope = keys[..., :LATENT], keys[..., LATENT:]
        if form == "16bit":
            part.copy_(keys)
        elif form == "fp8":
            part.copy_(quantise(latent, rope, like).ckv)
        else:
            part.copy_(pack(FP8_DS_MLA, latent, rope).view(part.shape))
    if form == "16bit":
        return pages
    if form == "fp8":
        return LatentCache(pages, None, scales)
    return FP8_DS_MLA.views(pages, PAGE_SIZE)


def make_calls(
    cell: Cell, form: str, device: torch.device
) -> tuple[DecodeInputs, dict[str | None, list[Any]]]:
    """The inputs of the first call; and by implementation calls, each on a cache of its own."""
    generator = torch.Generator(device).manual_seed(1)
    copies = timing.cold_copies(cell.batch * cell.kv_len * bytes_of(form))
    query = torch.randn(
        cell.batch, 1, cell.heads, LATENT + ROPE, generator=generator, device=device
    ).bfloat16()
    order = torch.randperm(cell.pages, generator=generator, device=device)
    inputs = [
        DecodeInputs(
            q_nope=query[..., :LATENT],
            q_rope=query[..., LATENT:],
            cache=make_cache(cell, form, generator, device),
            page_table=order.to(torch.int32).view(cell.batch, -1),
            kv_lens=torch.full((cell.batch,), cell.kv_len, dtype=torch.int32, device=device),
            softmax_scale=SOFTMAX_SCALE,
            max_kv_len=cell.kv_len,
        )
        for _ in range(copies)
    ]
    buffers = inputs[0].output_buffers()
    calls = {}
    for impl in IMPLEMENTATIONS:
        plan = plan_of(inputs[0], impl) if cell.planned else None
        calls[impl] = [
            partial(mla_triton.decode, *arguments, **options, **buffers, impl=impl, plan=plan)
            for arguments, options in (one.call_arguments() for one in inputs)
        ]
    return inputs[0], calls


def judged(inputs: DecodeInputs, state: AttentionState) -> dict[str, Any]:
    """The first and the last request against the oracle: that of all would take minutes."""
    rows = torch.tensor(sorted({0, len(inputs.kv_lens) - 1}), device=inputs.kv_lens.device)
    assert isinstance(inputs.page_table, torch.Tensor)
    sample = DecodeInputs(
        q_nope=inputs.q_nope[rows],
        q_rope=None if inputs.q_rope is None else inputs.q_rope[rows],
        cache=inputs.cache,
        page_table=inputs.page_table[rows],
        kv_lens=inputs.kv_lens[rows],
        softmax_scale=inputs.softmax_scale,
        max_kv_len=inputs.max_kv_len,
    )
    report = compare(
        AttentionState(state.out[rows], state.lse[rows]), sample, decode_budget(sample)
    )
    if not report.ok:
        return {"ok": False, "message": report.message}
    return {"ok": True, "error": report.out_error, "budget": report.out_budget}


def measure_cell(cell: Cell, device: torch.device) -> list[dict[str, Any]]:
    """Rows of the results: one for each form and implementation."""
    _, calls = make_calls(cell, "16bit", device)
    base = timing.microseconds(calls[None])
    del calls
    rows = []
    for form in FORMS:
        inputs, calls = make_calls(cell, form, device)
        for impl, own in calls.items():
            if impl == "portable" and cell.heads != PORTABLE_HEADS:
                continue
            row: dict[str, Any] = {"cell": cell.name, "form": form, "impl": impl or "chosen"}
            row["check"] = judged(inputs, own[0]())
            if row["check"]["ok"]:
                us = timing.microseconds(own)
                moved = cell.batch * cell.kv_len * bytes_of(form)
                row |= {"us": us, "gbps": moved / us / 1e3, "bf16_us": base, "ratio": base / us}
            if (cell.kv_len, cell.batch) == TARGET_CELLS:
                row["target"] = TARGETS.get((form, impl), {}).get(cell.heads)
            rows.append(row)
        del inputs, calls
        torch.cuda.empty_cache()
    return rows


def measure() -> dict[str, Any]:
    device = torch.device("cuda", torch.cuda.current_device())
    read_gbps = timing.read_bandwidth(device) / 1e9
    return {
        "ceilings": {"read_gbps": read_gbps},
        "cells": [row for cell in CELLS for row in measure_cell(cell, device)],
    }


def lines(figures: dict[str, Any]) -> list[str]:
    table = [["cell", "cache", "runs", "us", "GB/s", "bf16 us", "ratio", "target"]]
    for row in figures["cells"]:
        start = [row["cell"], row["form"], row["impl"]]
        if not row["check"]["ok"]:
            table.append([*start, "check failed", "", "", "", ""])
            continue
        numbers = [
            results_file.number(row["us"]),
            results_file.number(row["gbps"], 0),
            results_file.number(row["bf16_us"]),
            f"{row['ratio']:.2f}",
        ]
        target = row.get("target")
        met = "" if target is None else "met" if row["ratio"] >= target else "MISSED"
        table.append([*start, *numbers, "" if target is None else f"{target:.2f} {met}"])
    text = [f"read: {figures['ceilings']['read_gbps']:.0f} GB/s"]
    text += results_file.columns(table).splitlines()
    return text + [r["check"]["message"] for r in figures["cells"] if not r["check"]["ok"]]


def main(argv: Sequence[str] | None = None) -> int:
    return results_file.record("quantised.py", __doc__, measure, lines, argv, PROTOCOL)


if __name__ == "__main__":
    sys.exit(main())
