"""Decode speed on this machine's GPU, beside the ceilings and the peers measured in the same run.

    python benchmarks/decode.py
    python benchmarks/decode.py --cells 's4096-*' --baseline peers:flashmla
    python benchmarks/decode.py --output benchmarks/results/h200.json

A shape whose result is not within the error budget of the float64 reference has no speed.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cells as cell_list
import peers
import protocol
import results as results_file
import torch
from cells import LATENT, ROPE, SUSTAINED_CELL, SUSTAINED_SECONDS, Cell

import mla_triton
from mla_triton import AttentionState, timing
from mla_triton.testing import DecodeInputs, Report, compare, decode_budget

SAMPLE = 3
"""Requests of a batch that are compared with the oracle: first, last, and between."""


def sample(inputs: protocol.Inputs) -> tuple[torch.Tensor, DecodeInputs]:
    """Some requests of a cell, as indices and as a problem of their own."""
    batch = inputs.cell.batch
    rows = sorted({0, batch // SAMPLE, batch - 1})
    index = torch.tensor(rows, device=inputs.q.device)
    return index, DecodeInputs(
        q_nope=inputs.q_nope[index],
        q_rope=inputs.q_rope[index],
        cache=inputs.caches[0],
        page_table=inputs.page_table[index],
        kv_lens=inputs.kv_lens[index],
        softmax_scale=inputs.softmax_scale,
    )


def judge(inputs: protocol.Inputs, out: torch.Tensor, lse: torch.Tensor | None) -> Report:
    """Whether the result on the first copy of the cache is right. A peer's lse is not looked at."""
    index, problem = sample(inputs)
    budget = decode_budget(problem)
    lse = budget.exact.lse.float() if lse is None else lse[index]
    return compare(AttentionState(out[index], lse), problem, budget)


def check_facts(report: Report) -> dict[str, Any]:
    facts = {"ok": report.ok, "error": report.out_error, "budget": report.out_budget}
    return facts if report.ok else {"ok": False, "message": report.message}


def our_calls(inputs: protocol.Inputs, planned: bool) -> list[Callable[[], AttentionState]]:
    """One call for each copy of the cache; with a schedule made now, or made in every call."""
    plan = make_plan(inputs) if planned else None
    shape = inputs.q_nope.shape
    out = torch.empty(shape, dtype=inputs.q.dtype, device=inputs.q.device)
    lse = torch.empty(shape[:-1], dtype=torch.float32, device=inputs.q.device)

    def call_on(cache: torch.Tensor) -> Callable[[], AttentionState]:
        return lambda: mla_triton.decode(
            inputs.q_nope,
            inputs.q_rope,
            cache,
            inputs.page_table,
            inputs.kv_lens,
            softmax_scale=inputs.softmax_scale,
            plan=plan,
            out=out,
            lse=lse,
        )

    return [call_on(cache) for cache in inputs.caches]


def make_plan(inputs: protocol.Inputs) -> mla_triton.Plan:
    cell = inputs.cell
    return mla_triton.plan(
        inputs.kv_lens,
        heads=cell.heads,
        latent=LATENT,
        rope=ROPE,
        dtype=inputs.q.dtype,
        s_q=cell.s_q,
    )


def measure(
    cell: Cell,
    device: torch.device,
    ceilings: dict[str, float],
    baselines: dict[str, peers.Baseline],
) -> dict[str, Any]:
    """One row of the results."""
    inputs = protocol.make_inputs(cell, device)
    calls = our_calls(inputs, planned=True)
    state = calls[0]()
    row: dict[str, Any] = {"cell": cell.name, "check": check_facts(judge(inputs, *state))}
    row["floor_us"] = cell.floor(ceilings["read_gbps"], ceilings["matmul_tflops"])
    if row["check"]["ok"]:
        us = timing.microseconds(calls)
        row |= {
            "us": us,
            "gbps": cell.bytes / us / 1e3,
            "tflops": cell.flops / us / 1e6,
            "with_schedule_us": timing.microseconds(our_calls(inputs, planned=False)),
            "combine_us": protocol.kernel_microseconds(calls[0], "combine_kernel"),
            "schedule_us": protocol.kernel_microseconds(
                lambda: make_plan(inputs), "schedule_kernel"
            ),
            "host_us": protocol.host_microseconds(calls[0]),
        }
    if "us" in row and cell.name == SUSTAINED_CELL:
        us = protocol.sustained_microseconds(calls, SUSTAINED_SECONDS)
        row |= {"sustained_us": us, "sustained_tflops": cell.flops / us / 1e6}
    found = {name: measure_baseline(inputs, make) for name, make in baselines.items()}
    return row | ({"baselines": found} if found else {})


def measure_baseline(inputs: protocol.Inputs, make: peers.Baseline) -> dict[str, Any]:
    """A peer's time, or why there is none."""
    try:
        calls = make(inputs)
        report = judge(inputs, calls[0](), None)
    except NotImplementedError as error:
        return {"check": {"ok": False, "message": str(error)}}
    facts: dict[str, Any] = {"check": check_facts(report)}
    return facts | ({"us": timing.microseconds(calls)} if report.ok else {})


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="decode.py", description=__doc__.splitlines()[0])
    made.add_argument("--cells", nargs="+", default=[], metavar="PATTERN", help="such as 's4096-*'")
    made.add_argument("--baseline", action="append", default=[], metavar="MODULE:FUNCTION")
    made.add_argument("--output", type=Path, help="write the results file here")
    made.add_argument("--list", action="store_true", help="print the cells and stop")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        chosen = cell_list.select(arguments.cells)
        baselines = {name.rpartition(":")[2]: peers.load(name) for name in arguments.baseline}
    except ValueError as error:
        parser().error(str(error))
    if arguments.list:
        print("\n".join(cell.name for cell in chosen))
        return 0
    if not torch.cuda.is_available():
        print("decode.py: error: this needs a GPU: speed is not measured without", file=sys.stderr)
        return 2
    words = sys.argv[1:] if argv is None else argv
    if arguments.output:
        # The figures are the same wherever a machine keeps its files.
        words = [word.replace(str(arguments.output), arguments.output.name) for word in words]
    results = run(chosen, baselines, shlex.join(["python", "benchmarks/decode.py", *words]))
    if arguments.output:
        results_file.write(arguments.output, results)
    print("\n".join(summary(results)))
    return 0 if all(cell["check"]["ok"] for cell in results["cells"]) else 1


def run(
    chosen: Sequence[Cell], baselines: dict[str, peers.Baseline], command: str
) -> dict[str, Any]:
    """All chosen cells, each said on stderr as it is done."""
    device = torch.device("cuda", torch.cuda.current_device())
    results: dict[str, Any] = {
        "header": results_file.header(command),
        "ceilings": protocol.ceilings(device),
        "host_us": None,
        "host_add_us": protocol.host_microseconds(protocol.smallest_call(device)),
        "cells": [],
    }
    for cell in chosen:
        start = time.perf_counter()
        row = measure(cell, device, results["ceilings"], baselines)
        results["cells"].append(row)
        said = f"{row['us']:.1f} us" if "us" in row else row["check"]["message"]
        print(f"{cell.name}: {said} ({time.perf_counter() - start:.1f} s)", file=sys.stderr)
        torch.cuda.empty_cache()
    hosts = [row["host_us"] for row in results["cells"] if "host_us" in row]
    results["host_us"] = statistics.median(hosts) if hosts else None
    return results


def summary(results: dict[str, Any]) -> list[str]:
    """What is printed at the end."""
    head, ceilings = results["header"], results["ceilings"]
    lines = [
        f"{head['gpu']}, torch {head['torch']}, triton {head['triton']}, commit {head['commit']}",
        f"ceilings: read {ceilings['read_gbps']:.0f} GB/s, copy {ceilings['copy_gbps']:.0f} GB/s, "
        f"matmul {ceilings['matmul_tflops']:.0f} TFLOP/s",
        "",
        results_file.columns(results_file.table(results, results_file.measured_peers(results))),
        *results_file.sustained(results),
    ]
    if "H200" in head["gpu"]:
        lines += [
            "",
            "vs NAME: time of the peer, as recorded on another H200, over ours",
            results_file.columns(results_file.recorded_ratios(results)),
        ]
    return lines


if __name__ == "__main__":
    sys.exit(main())
