"""Prefill speed on this machine's GPU, beside cuDNN's attention in the same run and recorded peers.

    python benchmarks/prefill.py
    python benchmarks/prefill.py --cells 's8192-*' --output prefill.json
    python benchmarks/prefill.py --config 128 64 8 3

Causal, queries and keys 192 columns wide, values 128 (`-d256`: both 256), bfloat16. Ours reads the
rotary keys as one tensor for all heads; a peer is given keys with a copy for each head, made
outside of the timed calls. The portable kernel is measured beside the one that is chosen. A shape
whose result is not within the error budget of the float64 reference has no speed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from unittest.mock import patch

import protocol
import results as results_file
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import mla_triton
from mla_triton import AttentionState, timing
from mla_triton.kernels.portable import prefill as portable
from mla_triton.kernels.portable.prefill_config import Config
from mla_triton.ops import prefill as operation
from mla_triton.testing import PrefillInputs, Report, compare, prefill_budget

ROPE = 64
ELEMENT = 2
"""Bytes of a bfloat16."""
PEERS = Path(__file__).parent / "prefill_peers_h200.json"
PROTOCOL = (
    "bfloat16, causal, qk 192 (64 of it one rotary key for all heads), v 128, or both 256 where a "
    "cell says so, N(0,1) data, scale qk**-0.5; a CUDA graph of calls, each on tensors of its own "
    "of 200 MB or more together, replayed; median of event-timed replays over the calls"
)
WINDOW = 64
"""Queries that are compared with the oracle in one place of a sequence."""


@dataclass(frozen=True)
class Cell:
    """`batch` sequences of `length` tokens each."""

    length: int
    batch: int
    heads: int
    qk: int = 192
    value: int = 128

    @property
    def name(self) -> str:
        tail = "" if self.qk == Cell.qk else f"-d{self.qk}"
        return f"s{self.length}-b{self.batch}-h{self.heads}{tail}"

    @property
    def nope(self) -> int:
        return self.qk - ROPE

    @property
    def scale(self) -> float:
        scale: float = self.qk**-0.5
        return scale

    @property
    def tokens(self) -> int:
        return self.length * self.batch

    @property
    def bytes(self) -> int:
        """Queries, keys, values and result once."""
        return self.tokens * ELEMENT * (self.heads * (self.qk + self.nope + 2 * self.value) + ROPE)

    @property
    def flops(self) -> int:
        """What the mask hides is not counted, as in the peers' figures."""
        return self.batch * self.heads * self.length**2 * (self.qk + self.value)


CELLS = [
    *(Cell(length, 1, 16) for length in (2048, 8192, 16384)),
    *(Cell(length, 1, 128) for length in (2048, 8192)),
    Cell(8192, 4, 128),
    Cell(8192, 1, 64, 256, 256),
]


@dataclass(frozen=True)
class Inputs:
    """What one call reads; what a baseline is given."""

    cell: Cell
    q: torch.Tensor
    """`[tokens, heads, qk]`"""
    k_nope: torch.Tensor
    """`[tokens, heads, nope]`"""
    k_rope: torch.Tensor
    """`[tokens, 64]`"""
    v: torch.Tensor
    """`[tokens, heads, value]`"""
    offsets: torch.Tensor
    """int32 `[batch + 1]`"""


def make_inputs(cell: Cell, device: torch.device, seed: int = 0) -> list[Inputs]:
    """As many as keep each other's tensors out of the L2."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    offsets = torch.arange(cell.batch + 1, dtype=torch.int32, device=device) * cell.length
    return [
        Inputs(
            cell,
            normal(cell.tokens, cell.heads, cell.qk),
            normal(cell.tokens, cell.heads, cell.nope),
            normal(cell.tokens, ROPE),
            normal(cell.tokens, cell.heads, cell.value),
            offsets,
        )
        for _ in range(timing.cold_copies(cell.bytes))
    ]


def our_calls(
    rotation: Sequence[Inputs], impl: str | None = None, **options: Any
) -> list[Callable[[], AttentionState]]:
    cell, device = rotation[0].cell, rotation[0].q.device
    out = torch.empty(cell.tokens, cell.heads, cell.value, dtype=torch.bfloat16, device=device)
    lse = torch.empty(cell.tokens, cell.heads, dtype=torch.float32, device=device)

    def call_on(inputs: Inputs) -> Callable[[], AttentionState]:
        return lambda: mla_triton.prefill(
            inputs.q,
            inputs.k_nope,
            inputs.v,
            k_rope=inputs.k_rope,
            cu_seqlens_q=inputs.offsets,
            cu_seqlens_k=inputs.offsets,
            softmax_scale=cell.scale,
            max_seqlen_q=cell.length,
            impl=impl,
            out=out,
            lse=lse,
            **options,
        )

    return [call_on(inputs) for inputs in rotation]


def cudnn(rotation: Sequence[Inputs]) -> list[Callable[[], torch.Tensor]]:
    """PyTorch's attention by cuDNN: keys with the rotary part copied to every head."""

    def call_on(inputs: Inputs) -> Callable[[], torch.Tensor]:
        cell = inputs.cell
        copies = inputs.k_rope[:, None].expand(-1, cell.heads, -1)
        q, k, v = (
            tensor.unflatten(0, (cell.batch, cell.length)).transpose(1, 2)
            for tensor in (inputs.q, torch.cat([inputs.k_nope, copies], -1), inputs.v)
        )

        def call() -> torch.Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                out = torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=cell.scale
                )
            return out.transpose(1, 2)

        return call

    return [call_on(inputs) for inputs in rotation]


def portable_calls(rotation: Sequence[Inputs]) -> list[Callable[[], torch.Tensor]]:
    """The same call by the portable kernel."""
    cell = rotation[0].cell

    def call_on(call: Callable[[], AttentionState]) -> Callable[[], torch.Tensor]:
        return lambda: call().out.unflatten(0, (cell.batch, cell.length))

    return [call_on(call) for call in our_calls(rotation, "portable")]


BASELINES = {"cudnn": cudnn, "portable": portable_calls}


def sample(inputs: Inputs) -> tuple[torch.Tensor, list[int], PrefillInputs]:
    """(rows, heads, the problem that they are): some queries of some sequences and heads.

    A window of queries over the keys up to its last one is a sequence with a causal mask.
    """
    cell = inputs.cell
    heads = sorted({0, cell.heads - 1})
    window = min(WINDOW, cell.length)
    rows, keys, counts = [], [], []
    for sequence in sorted({0, cell.batch - 1}):
        begin = sequence * cell.length
        for first in sorted({0, (cell.length - window) // 2, cell.length - window}):
            rows.append(torch.arange(begin + first, begin + first + window))
            keys.append(torch.arange(begin, begin + first + window))
            counts.append(first + window)
    device = inputs.q.device
    row, key = (torch.cat(places).to(device) for places in (rows, keys))

    def offsets(lengths: Sequence[int]) -> torch.Tensor:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        return ends.to(device=device, dtype=torch.int32)

    problem = PrefillInputs(
        q=inputs.q[row][:, heads],
        k=inputs.k_nope[key][:, heads],
        v=inputs.v[key][:, heads],
        cu_seqlens_q=offsets([window] * len(rows)),
        cu_seqlens_k=offsets(counts),
        softmax_scale=cell.scale,
        k_rope=inputs.k_rope[key],
    )
    return row, heads, problem


def judge(inputs: Inputs, out: torch.Tensor, lse: torch.Tensor | None) -> Report:
    """Whether a result is right. A peer's lse is not looked at."""
    row, heads, problem = sample(inputs)
    budget = prefill_budget(problem)
    lse = budget.exact.lse.float() if lse is None else lse[row][:, heads]
    return compare(AttentionState(out[row][:, heads], lse), problem, budget)


def check_facts(report: Report) -> dict[str, Any]:
    facts = {"ok": report.ok, "error": report.out_error, "budget": report.out_budget}
    return facts if report.ok else {"ok": False, "message": report.message}


def measure(cell: Cell, device: torch.device, impl: str | None) -> dict[str, Any]:
    """One row of the results."""
    rotation = make_inputs(cell, device)
    calls = our_calls(rotation, impl)
    row: dict[str, Any] = {"cell": cell.name, "check": check_facts(judge(rotation[0], *calls[0]()))}
    if row["check"]["ok"]:
        us = timing.microseconds(calls)
        row |= {"us": us, "tflops": cell.flops / us / 1e6}
        row["host_us"] = protocol.host_microseconds(calls[0])
    row["baselines"] = {name: measure_baseline(rotation, make) for name, make in BASELINES.items()}
    return row


def measure_baseline(
    rotation: Sequence[Inputs], make: Callable[[Sequence[Inputs]], list[Callable[[], torch.Tensor]]]
) -> dict[str, Any]:
    """A peer's time, or why there is none."""
    try:
        calls = make(rotation)
        report = judge(rotation[0], calls[0]().flatten(0, 1), None)
    except RuntimeError as error:
        return {"check": {"ok": False, "message": str(error).splitlines()[0]}}
    facts: dict[str, Any] = {"check": check_facts(report)}
    if report.ok:
        us = timing.microseconds(calls)
        facts |= {"us": us, "tflops": rotation[0].cell.flops / us / 1e6}
    return facts


@contextmanager
def forced(config: Config | None) -> Iterator[None]:
    """Inside, the portable kernel runs with this config, if one is given."""
    if config is None:
        yield
        return
    operation.forget()
    try:
        with patch.object(portable, "choose", lambda *_: (config, "said on the command line")):
            yield
    finally:
        operation.forget()


def select(patterns: Sequence[str]) -> list[Cell]:
    """The cells whose name matches one of the shell patterns; all without.

    Raises ValueError for a pattern that matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(cell.name, pattern) for cell in CELLS):
            names = [cell.name for cell in CELLS]
            raise ValueError(f"cells must match one of {names}, got {pattern!r}")
    return [c for c in CELLS if not patterns or any(fnmatchcase(c.name, p) for p in patterns)]


def recorded() -> dict[str, dict[str, float]]:
    """TFLOP/s of each peer by cell, as recorded on an H200."""
    return {row["cell"]: row["tflops"] for row in json.loads(PEERS.read_text())["cells"]}


def table(results: dict[str, Any]) -> list[list[str]]:
    """Header and rows: ours, the peers of this run, and our speed over each recorded peer's."""
    on_h200 = "H200" in results["header"]["gpu"]
    peers = recorded() if on_h200 else {}
    names = sorted({name for row in peers.values() for name in row})
    rows = [["cell", "us", "TFLOP/s", "host us", *(f"{n} TFLOP/s" for n in BASELINES)]]
    rows[0] += [*(f"vs {n}" for n in BASELINES), *(f"vs recorded {n}" for n in names)]
    for cell in results["cells"]:
        if not cell["check"]["ok"]:
            rows.append([cell["cell"], "check failed"] + [""] * (len(rows[0]) - 2))
            continue
        here = [cell["baselines"].get(name, {}).get("tflops") for name in BASELINES]
        there = [peers.get(cell["cell"], {}).get(name) for name in names]
        rows.append(
            [
                cell["cell"],
                results_file.number(cell["us"]),
                results_file.number(cell["tflops"], 0),
                results_file.number(cell["host_us"]),
                *(results_file.number(speed, 0) for speed in here),
                *(results_file.number(s and cell["tflops"] / s, 2) for s in (*here, *there)),
            ]
        )
    return rows


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="prefill.py", description=__doc__.splitlines()[0])
    made.add_argument("--cells", nargs="+", default=[], metavar="PATTERN", help="such as 's8192-*'")
    made.add_argument(
        "--config", nargs=4, type=int, metavar=("BLOCK_M", "BLOCK_N", "WARPS", "STAGES"),
        help="the portable kernel with this config, instead of the kernel that is chosen",
    )  # fmt: skip
    made.add_argument("--output", type=Path, help="write the results file here")
    made.add_argument("--list", action="store_true", help="print the cells and stop")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        chosen = select(arguments.cells)
    except ValueError as error:
        parser().error(str(error))
    if arguments.list:
        print("\n".join(cell.name for cell in chosen))
        return 0
    if not torch.cuda.is_available():
        print("prefill.py: error: this needs a GPU: speed is not measured without", file=sys.stderr)
        return 2
    words = sys.argv[1:] if argv is None else argv
    if arguments.output:
        # The figures are the same wherever a machine keeps its files.
        words = [word.replace(str(arguments.output), arguments.output.name) for word in words]
    impl = "portable" if arguments.config else None
    with forced(Config(*arguments.config) if arguments.config else None):
        results = run(chosen, shlex.join(["python", "benchmarks/prefill.py", *words]), impl)
    if arguments.output:
        results_file.write(arguments.output, results)
    head = results["header"]
    print(f"{head['gpu']}, torch {head['torch']}, triton {head['triton']}, commit {head['commit']}")
    print(f"ceiling: matmul {results['ceilings']['matmul_tflops']:.0f} TFLOP/s\n")
    print(results_file.columns(table(results)))
    return 0 if all(cell["check"]["ok"] for cell in results["cells"]) else 1


def run(chosen: Sequence[Cell], command: str, impl: str | None) -> dict[str, Any]:
    """All chosen cells, each said on stderr as it is done."""
    device = torch.device("cuda", torch.cuda.current_device())
    results: dict[str, Any] = {
        "header": results_file.header(command) | {"protocol": PROTOCOL},
        "ceilings": protocol.ceilings(device),
        "cells": [],
    }
    for cell in chosen:
        start = time.perf_counter()
        row = measure(cell, device, impl)
        results["cells"].append(row)
        said = f"{row['tflops']:.0f} TFLOP/s" if "us" in row else row["check"]["message"]
        print(f"{cell.name}: {said} ({time.perf_counter() - start:.1f} s)", file=sys.stderr)
        torch.cuda.empty_cache()
    return results


if __name__ == "__main__":
    sys.exit(main())
