"""Speed of append, gather and copy_pages on this machine's GPU, beside a copy's in the same run.

    python benchmarks/append.py
    python benchmarks/append.py --output benchmarks/results/append/h200.json

Calls are captured in a CUDA graph, each on tokens and pages of its own, together larger than any
L2 cache. A result that is not the reference's has no speed. Targets: 128 tokens in 2.5 us, 32768
tokens of bfloat16 at 3.1 TB/s, and 80 % of a copy's bandwidth where they are quantised, normed and
rotated on the way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import protocol
import results as results_file
import torch

import mla_triton
from mla_triton import LatentCache, reference, timing, validate_append, validate_stored
from mla_triton import device as devices
from mla_triton.kernels.portable import append as portable
from mla_triton.ops.plan import launcher
from mla_triton.testing import same_bits
from mla_triton.testing.caches import AppendInputs, append_excess, cache_memory

PROTOCOL = (
    "N(0,1) bfloat16 tokens of 512 + 64 columns, pages of 64 at random; a CUDA graph of calls, "
    "each on tokens and pages of its own, 200 MB or more together, replayed; median of event-timed "
    "replays over the calls; bandwidth is that of every token read once and written once, beside "
    "that of a kernel that copies 4 GiB; warm: the same tokens and pages again and again"
)
PAGE_SIZE = 64
LATENT, ROPE = 512, 64
POSITIONS = 163840
FEW_US, GBPS, OF_COPY = 2.5, 3100.0, 0.8
TOKEN_BYTES = {"fused": 1152, "one": 576, "fp8_ds_mla": 656, "fp8_v4": 584, "fp8_v41": 528}
"""Of a stored token; those of V4 and V4.1 have 448 columns of latent."""


@dataclass(frozen=True)
class Cell:
    """One call."""

    tokens: int
    form: str = "fused"
    operation: str = "append"
    fused: bool = False
    """Whether the latent is normed and the key rotated on the way."""

    @property
    def name(self) -> str:
        return f"{self.operation}-n{self.tokens}-{self.form}" + "-norm-rope" * self.fused

    @property
    def latent(self) -> int:
        return 448 if self.form in ("fp8_v4", "fp8_v41") else LATENT

    @property
    def bytes(self) -> int:
        """What has to be moved: every token read once and written once, and its slot."""
        stored = TOKEN_BYTES[self.form]
        if self.operation == "copy_pages":
            return self.tokens * 2 * stored
        plain = 2 * (self.latent + ROPE)
        more = 8 if self.operation == "append" else 0
        # A token's angles in float32, and its position.
        more += 4 * ROPE + 8 if self.fused else 0
        return self.tokens * (plain + stored + more)

    @property
    def target(self) -> tuple[str, float] | None:
        """(which figure, what it has to be)."""
        if self.operation != "append":
            return None
        if self.tokens == 128 and not self.fused and self.form == "fused":
            return "us", FEW_US
        if self.tokens < 32768:
            return None
        plain = self.form == "fused" and not self.fused
        return ("gbps", GBPS) if plain else ("of_copy", OF_COPY)


CELLS = (
    *(Cell(n, form) for n in (128, 1024, 32768) for form in ("fused", "one", "fp8_ds_mla")),
    *(Cell(n, form, fused=True) for n in (128, 32768) for form in ("fused", "fp8_ds_mla")),
    *(Cell(32768, form, fused=True) for form in ("fp8_v4", "fp8_v41")),
    *(Cell(n, form, "gather") for n in (1024, 32768) for form in ("fused", "one", "fp8_ds_mla")),
    *(Cell(n, "fp8_ds_mla", "copy_pages") for n in (1024, 32768)),
)
CONFIGURED = (Cell(128), Cell(32768), Cell(32768, "fp8_ds_mla", fused=True))
CONFIGS = tuple((rows, warps) for warps in (1, 2, 4) for rows in (1, 2, 4, 8))
"""(tokens of a program, warps) that some cells are also timed with."""
Call = Callable[[], object]


def make_append(cell: Cell, device: torch.device) -> AppendInputs:
    pages = max(2, -(-cell.tokens // PAGE_SIZE))
    memory = cache_memory(
        cell.form, pages=pages, page_size=PAGE_SIZE, latent=cell.latent, rope=ROPE, device=device
    )
    kind = {"device": device, "dtype": torch.bfloat16}
    slots = torch.arange(pages * PAGE_SIZE, device=device).view(pages, PAGE_SIZE)
    slots = slots[torch.randperm(pages, device=device)].flatten()[: cell.tokens]
    options: dict[str, Any] = {}
    if cell.fused:
        angles = torch.rand(POSITIONS, ROPE // 2, device=device)
        options = {
            "norm_weight": torch.randn(cell.latent, **kind),
            "cos_sin": torch.cat([angles.cos(), angles.sin()], -1),
            "positions": torch.randint(POSITIONS - cell.tokens, (), device=device)
            + torch.arange(cell.tokens, device=device),
        }
    latent = torch.randn(cell.tokens, cell.latent, **kind)
    return AppendInputs(memory, latent, torch.randn(cell.tokens, ROPE, **kind), slots, options)


def append_call(inputs: AppendInputs) -> Call:
    arguments, options = inputs.call_arguments()
    return partial(mla_triton.append, *arguments, **options)


def gather_call(cell: Cell, device: torch.device) -> tuple[Call, Call]:
    """(a gather into buffers, the reference's): requests of equal length, in pages at random."""
    inputs = make_append(Cell(cell.tokens, cell.form), device)
    append_call(inputs)()
    pages = inputs.memory.capacity // PAGE_SIZE
    batch = max(1, pages // 64)
    table = torch.randperm(pages, device=device).to(torch.int32).view(batch, -1)
    bounds = torch.arange(batch + 1, device=device, dtype=torch.int32) * (cell.tokens // batch)
    out, rope_out = (
        torch.empty(cell.tokens, width, device=device, dtype=torch.bfloat16)
        for width in (cell.latent, ROPE)
    )
    given = (inputs.memory.cache, table, bounds)
    made = {"out": out, "rope_out": rope_out}
    return partial(mla_triton.gather, *given, **made), partial(
        reference.gather, *given, out=out.clone(), rope_out=rope_out.clone()
    )


def copy_call(cell: Cell, device: torch.device) -> tuple[Call, tuple[torch.Tensor, ...]]:
    """(a copy of packed pages to other pages, its tensors)."""
    count = cell.tokens // PAGE_SIZE
    size = PAGE_SIZE * TOKEN_BYTES[cell.form]
    pages = torch.randint(256, (2 * count, size), dtype=torch.uint8, device=device)
    order = torch.randperm(2 * count, device=device)
    tensors = pages, order[:count].contiguous(), order[count:].contiguous()
    return partial(mla_triton.copy_pages, pages, pages, *tensors[1:]), tensors


def prepared(cell: Cell, device: torch.device) -> tuple[str, list[Call]]:
    """(what is wrong with a result, or nothing; calls each on inputs of its own)."""
    count = timing.cold_copies(cell.bytes)
    if cell.operation == "append":
        made = [make_append(cell, device) for _ in range(count)]
        calls = [append_call(inputs) for inputs in made]
        calls[0]()
        excess = append_excess(made[0].memory, made[0])
        return "" if excess <= 0 else f"{excess:.2e} past the budget", calls
    if cell.operation == "gather":
        pairs = [gather_call(cell, device) for _ in range(count)]
        found: Any = pairs[0][0]()
        expected = pairs[0][1]
        expected()
        right = same_bits(found, [expected.keywords[name] for name in ("out", "rope_out")])
        return "" if right else "other rows than the reference's", [call for call, _ in pairs]
    copies = [copy_call(cell, device) for _ in range(count)]
    call, (pages, source, target) = copies[0]
    before = pages.clone()
    call()
    before[target] = before[source]
    right = torch.equal(pages, before)
    return "" if right else "other pages than the source's", [call for call, _ in copies]


def measure_cell(cell: Cell, copy_gbps: float, device: torch.device) -> dict[str, Any]:
    """One row of the results."""
    message, calls = prepared(cell, device)
    row: dict[str, Any] = {"cell": cell.name, "bytes": cell.bytes, "check": {"ok": not message}}
    if message:
        return row | {"check": {"ok": False, "message": f"{cell.name}: {message}"}}
    us = timing.microseconds(calls)
    gbps = cell.bytes / us / 1e3
    row |= {
        "us": us,
        "warm_us": timing.microseconds(calls[:1] * 64),
        "gbps": gbps,
        "of_copy": gbps / copy_gbps,
        "host_us": protocol.host_microseconds(calls[0]),
    }
    if cell.target is not None:
        figure, wanted = cell.target
        met = row[figure] <= wanted if figure == "us" else row[figure] >= wanted
        row["target"] = {"figure": figure, "wanted": wanted, "met": met}
    return row


def measure_configs(cell: Cell, copy_gbps: float, device: torch.device) -> list[dict[str, Any]]:
    """Every config of `CONFIGS` that is valid, on one cell."""
    card, index = devices.of(device), device.index
    made = [make_append(cell, device) for _ in range(timing.cold_copies(cell.bytes))]
    found = []
    for rows, warps in CONFIGS:
        config, calls = portable.Config(rows, warps), []
        for inputs in made:
            (cache, latent, rope, slots), options = inputs.call_arguments()
            whole = LatentCache(cache) if isinstance(cache, torch.Tensor) else cache
            extra = [options.get(name) for name in ("norm_weight", "cos_sin", "positions")]
            problem = validate_append.append(
                whole, latent, rope, slots, *extra, "interleaved", True
            )
            if not portable.is_valid(config, problem, card)[0]:
                break
            kernel = launcher(portable.variant(problem, config, card), card, index)
            tensors = portable.AppendTensors(
                latent, rope, slots, *validate_stored.parts(whole, problem.stored), *extra, 1e-6
            )
            calls.append(partial(portable.launch, kernel, problem, config, tensors))
        if calls:
            us = timing.microseconds(calls)
            of_copy = cell.bytes / us / 1e3 / copy_gbps
            named = {"cell": cell.name, "rows": rows, "num_warps": warps}
            found.append(named | {"us": us, "of_copy": of_copy})
    return found


def measure() -> dict[str, Any]:
    device = torch.device("cuda", torch.cuda.current_device())
    ceilings = protocol.ceilings(device)
    copy_gbps = ceilings["copy_gbps"]
    cells = [measure_cell(cell, copy_gbps, device) for cell in CELLS]
    configs = [row for cell in CONFIGURED for row in measure_configs(cell, copy_gbps, device)]
    return {"ceilings": ceilings, "cells": cells, "configs": configs}


def lines(figures: dict[str, Any]) -> list[str]:
    rows = [["cell", "us", "warm us", "GB/s", "of copy", "host us", "target"]]
    for cell in figures["cells"]:
        if not cell["check"]["ok"]:
            rows.append([cell["cell"], "check failed", *[""] * 5])
            continue
        target = cell.get("target")
        verdict = "" if target is None else "met" if target["met"] else "MISSED"
        rows.append(
            [
                cell["cell"],
                results_file.number(cell["us"]),
                results_file.number(cell["warm_us"]),
                results_file.number(cell["gbps"], 0),
                f"{cell['of_copy']:.0%}",
                results_file.number(cell["host_us"]),
                verdict,
            ]
        )
    copy_gbps = figures["ceilings"]["copy_gbps"]
    text = [f"copy: {copy_gbps:.0f} GB/s", *results_file.columns(rows).splitlines()]
    text += [cell["check"]["message"] for cell in figures["cells"] if not cell["check"]["ok"]]
    text += [
        f"{c['cell']} with rows {c['rows']}, num_warps {c['num_warps']}: {c['us']:.2f} us, "
        f"{c['of_copy']:.0%}"
        for c in figures["configs"]
    ]
    return text


def main(argv: Sequence[str] | None = None) -> int:
    return results_file.record("append.py", __doc__, measure, lines, argv, PROTOCOL)


if __name__ == "__main__":
    sys.exit(main())
