"""When to expand a cached prefix and when to absorb: a chunk of one prompt, both ways, on this GPU.

    python benchmarks/chunked.py
    python benchmarks/chunked.py --output benchmarks/results/chunked/h200.json

A chunk attends to itself and to a prefix in the paged latent cache. Expanded: the latents are
gathered, multiplied out, prefilled over without a mask, part by part, and merged. Absorbed: queries
are absorbed, decode goes over the cache, values are projected. Everything is in the time. A cell
whose result is not within the budget of the recipe (docs/examples/chunked_prefill.py) has no speed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import protocol
import results as results_file
import torch

import mla_triton
from mla_triton import AttentionState, timing
from mla_triton.reference import absorb_queries, project_values

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "examples"))

import chunked_prefill as recipe

PROTOCOL = (
    "bfloat16, N(0,1) data, pages of 64 scattered at random; a CUDA graph of calls, each on a "
    "cache of its own, 200 MB or more together, replayed; median of event-timed replays over the "
    "calls; expanded is gather, product, prefill and merge for each part of the prefix and for the "
    "chunk itself, absorbed is absorption, schedule, decode and projection"
)
PAGE_SIZE = 64
PART = 8192
"""Keys that are expanded at a time."""
SAMPLE = 32
"""Query tokens, the last ones, and heads, the first and the last, that are held against float64."""


DEEPSEEK = recipe.Widths()


@dataclass(frozen=True)
class Cell:
    """A chunk of one request, and what came before it."""

    heads: int
    prefix: int
    chunk: int
    widths: recipe.Widths = DEEPSEEK

    @property
    def name(self) -> str:
        return f"h{self.heads}-prefix{self.prefix}-chunk{self.chunk}"


CHUNKS = (16, 64, 128, 192, 256, 512, 2048)
CELLS = tuple(
    Cell(heads, prefix, chunk)
    for heads in (16, 128)
    for prefix in (4096, 32768)
    for chunk in CHUNKS
)


class Request:
    """The inputs of a cell; `keys` are those in the order of the tokens."""

    def __init__(self, cell: Cell, device: torch.device, seed: int = 0) -> None:
        generator, widths = torch.Generator(device).manual_seed(seed), cell.widths

        def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
            values = torch.randn(shape, generator=generator, device=device) * std
            return values.to(torch.bfloat16)

        std = widths.latent**-0.5
        self.layer = recipe.Layer(
            normal(cell.heads, widths.nope, widths.latent, std=std),
            normal(cell.heads, widths.v, widths.latent, std=std),
            (widths.nope + widths.rope) ** -0.5,
        )
        self.q_nope = normal(cell.chunk, cell.heads, widths.nope)
        self.q_rope = normal(cell.chunk, cell.heads, widths.rope)
        count = cell.prefix + cell.chunk
        pages = -(-count // PAGE_SIZE)
        self.cache = normal(pages, PAGE_SIZE, widths.latent + widths.rope)
        order = torch.randperm(pages, generator=generator, device=device)
        self.table = order[None].to(torch.int32)
        slots = order[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=device)
        self.slots = slots.flatten()[:count]
        self.kv_lens = self._int32(count)
        self.queries = self._int32(0, cell.chunk)
        bounds = [*range(0, cell.prefix, PART), cell.prefix]
        spans = [*pairwise(bounds), (cell.prefix, count)]
        self.spans = [(slice(a, b), self._int32(0, b - a)) for a, b in spans if a < b]
        self.prefix = cell.prefix

    def _int32(self, *values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.cache.device)

    @property
    def keys(self) -> torch.Tensor:
        return self.cache.flatten(0, 1)[self.slots]


def expanded(request: Request) -> AttentionState:
    layer, latent, state = request.layer, request.layer.w_uk.shape[-1], None
    for span, offsets in reversed(request.spans):
        keys = request.cache.flatten(0, 1).index_select(0, request.slots[span])
        k, v = layer.expand(keys[:, :latent])
        part = mla_triton.prefill(
            request.q_nope,
            k,
            v,
            q_rope=request.q_rope,
            k_rope=keys[:, latent:],
            cu_seqlens_q=request.queries,
            cu_seqlens_k=offsets,
            softmax_scale=layer.scale,
            causal=span.start == request.prefix,
        )
        if state is None:
            state = AttentionState(part.out.float(), part.lse)
        else:
            mla_triton.merge([state, part], out=state.out, lse=state.lse)
    assert state is not None
    return AttentionState(state.out.to(request.q_nope.dtype), state.lse)


def absorbed(request: Request) -> AttentionState:
    layer = request.layer
    state = mla_triton.decode(
        absorb_queries(request.q_nope, layer.w_uk),
        request.q_rope,
        request.cache,
        request.table,
        request.kv_lens,
        softmax_scale=layer.scale,
        cu_seqlens_q=request.queries,
    )
    return AttentionState(project_values(state.out, layer.w_uv), state.lse)


FORMS: dict[str, Callable[[Request], AttentionState]] = {
    "expanded": expanded,
    "absorbed": absorbed,
}


def judge(form: str, request: Request) -> recipe.Report:
    """Of the chunk's last tokens, and of two heads, what the recipe says."""
    state, layer = FORMS[form](request), request.layer
    heads = sorted({0, len(layer.w_uk) - 1})
    some = recipe.Layer(layer.w_uk[heads], layer.w_uv[heads], layer.scale)
    tokens = recipe.Tokens(
        request.q_nope[-SAMPLE:, heads], request.q_rope[-SAMPLE:, heads], request.keys
    )
    part = AttentionState(state.out[-SAMPLE:, heads], state.lse[-SAMPLE:, heads])
    return recipe.judge(form, some, tokens, part)


@torch.no_grad()
def measure_cell(cell: Cell, device: torch.device) -> dict[str, Any]:
    """One row of the results."""
    request = Request(cell, device)
    row: dict[str, Any] = {
        "cell": cell.name, "heads": cell.heads, "prefix": cell.prefix, "chunk": cell.chunk
    }  # fmt: skip
    copies = timing.cold_copies(request.cache.nbytes)
    requests = [request, *(Request(cell, device, seed) for seed in range(1, copies))]
    for form, call in FORMS.items():
        report = judge(form, request)
        row[form] = {"ok": report.ok, "error": report.error, "budget": report.budget}
        if report.ok:
            row[form]["us"] = timing.microseconds([partial(call, each) for each in requests])
    return row


def measure() -> dict[str, Any]:
    device = torch.device("cuda", torch.cuda.current_device())
    return {
        "ceilings": protocol.ceilings(device),
        "cells": [measure_cell(cell, device) for cell in CELLS],
    }


def cross_overs(cells: Sequence[dict[str, Any]]) -> list[str]:
    """For each number of heads and length of prefix, from which chunk on to expand is faster."""
    said = []
    for heads, prefix in dict.fromkeys((cell["heads"], cell["prefix"]) for cell in cells):
        mine = sorted(
            (cell["chunk"], cell["expanded"]["us"] < cell["absorbed"]["us"])
            for cell in cells
            if (cell["heads"], cell["prefix"]) == (heads, prefix)
            and all("us" in cell[form] for form in FORMS)
        )
        slower = [chunk for chunk, is_faster in mine if not is_faster]
        faster = [chunk for chunk, is_faster in mine if is_faster]
        beyond = [chunk for chunk in faster if chunk > max(slower, default=0)]
        where = f"{heads} heads, prefix {prefix}"
        if not beyond:
            said.append(f"{where}: to expand is not faster at any chunk that was measured")
        else:
            before = max(slower, default=0)
            said.append(
                f"{where}: to expand is faster from a chunk of {before + 1}..{beyond[0]} on"
            )
    return said


def lines(figures: dict[str, Any]) -> list[str]:
    rows = [["cell", "expanded us", "absorbed us", "absorbed / expanded"]]
    for cell in figures["cells"]:
        us = [cell[form].get("us") for form in FORMS]
        ratio = f"{us[1] / us[0]:.2f}" if all(us) else "-"
        texts = [results_file.number(each) if each else "check failed" for each in us]
        rows.append([cell["cell"], *texts, ratio])
    return [*results_file.columns(rows).splitlines(), *cross_overs(figures["cells"])]


def main(argv: Sequence[str] | None = None) -> int:
    return results_file.record("chunked.py", __doc__, measure, lines, argv, PROTOCOL)


if __name__ == "__main__":
    sys.exit(main())
