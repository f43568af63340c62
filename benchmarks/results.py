"""The results file: what is in it, how it is written, read and shown."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cells import SUSTAINED_SECONDS

SCHEMA = 1
HERE = Path(__file__).parent
PROTOCOL = (
    "bfloat16, latent 512 + rope 64, page 64 where a cell names no other, pages of a request "
    "scattered at random, N(0,1) data, scale 192**-0.5; a CUDA graph of calls, each on its own "
    "slice of a cache of 200 MB or more, replayed; median of event-timed replays over the calls"
)
PEERS = HERE / "peers_h200.json"


def header(command: str, protocol: str = PROTOCOL) -> dict[str, Any]:
    """What a figure depends on. Needs a GPU."""
    import torch
    import triton

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "sm_count": properties.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "protocol": protocol,
        "commit": _output("git", "describe", "--always", "--dirty"),
        "command": command,
    }


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"


def record(
    name: str,
    about: str,
    measure: Callable[[], dict[str, Any]],
    lines: Callable[[dict[str, Any]], list[str]],
    argv: Sequence[str] | None,
    protocol: str = PROTOCOL,
) -> int:
    """The command of a benchmark without cells: measures, keeps figures if asked to, says them.

    2 where there is no GPU.
    """
    parser = argparse.ArgumentParser(prog=name, description=about.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    arguments = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print(f"{name}: error: this needs a GPU", file=sys.stderr)
        return 2
    figures = {"header": header(f"python benchmarks/{name}", protocol)} | measure()
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n")
    print("\n".join(lines(figures)))
    return 0


def write(path: Path, results: dict[str, Any]) -> None:
    """One cell per line, so that two runs can be compared by diff."""
    cells = ",\n".join("    " + json.dumps(cell) for cell in results["cells"])
    rest = {key: value for key, value in results.items() if key != "cells"}
    head = json.dumps({"schema": SCHEMA, **rest}, indent=2).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(f'{head},\n  "cells": [\n{cells}\n  ]\n}}\n')
    os.replace(scratch, path)


def read(path: Path) -> dict[str, Any]:
    """A results file; raises ValueError where it is none."""
    results = json.loads(path.read_text())
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise ValueError(f"{path} must be a results file of schema {SCHEMA}")
    return results


def peers() -> dict[str, dict[str, float]]:
    """Microseconds of each peer by cell, as recorded on an H200."""
    return {row["cell"]: row["us"] for row in json.loads(PEERS.read_text())["cells"]}


def columns(rows: Sequence[Sequence[str]], right_from: int = 1) -> str:
    """Rows as aligned text; columns from `right_from` on are numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.rjust(width) if i >= right_from else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(results: dict[str, Any], against: dict[str, dict[str, float]]) -> list[list[str]]:
    """Header and rows: our figures, and for each peer in `against` its time over ours."""
    names = sorted({name for peer in against.values() for name in peer})
    titles = ["cell", "floor", "us", "+schedule", "combine", "schedule", "GB/s", "TFLOP/s"]
    rows = [titles + [f"vs {name}" for name in names]]
    for cell in results["cells"]:
        if not cell["check"]["ok"]:
            rows.append([cell["cell"], "check failed"] + [""] * (len(rows[0]) - 2))
            continue
        ratios = (against.get(cell["cell"], {}).get(name) for name in names)
        rows.append(
            [
                cell["cell"],
                number(cell["floor_us"]),
                number(cell["us"]),
                number(cell["with_schedule_us"]),
                number(cell["combine_us"]),
                number(cell["schedule_us"]),
                number(cell["gbps"], 0),
                number(cell["tflops"], 0),
                *(number(r / cell["us"], 2) if r else "-" for r in ratios),
            ]
        )
    return rows


def sustained(results: dict[str, Any]) -> list[str]:
    """A sentence for each cell that was also measured under a long load, and for the matmul."""
    lines = []
    if "sustained_matmul_tflops" in results["ceilings"]:
        rate = results["ceilings"]["sustained_matmul_tflops"]
        lines.append(f"The matmul without a pause for {SUSTAINED_SECONDS} s: {rate:.0f} TFLOP/s.")
    return lines + [
        f"{cell['cell']} without a pause for {SUSTAINED_SECONDS} s: "
        f"{cell['sustained_us']:.1f} us a call, {cell['sustained_tflops']:.0f} TFLOP/s."
        for cell in results["cells"]
        if "sustained_us" in cell
    ]


def measured_peers(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Baselines that ran in the same run, by cell; those that failed their check left out."""
    return {
        cell["cell"]: {n: b["us"] for n, b in cell.get("baselines", {}).items() if b.get("us")}
        for cell in results["cells"]
    }


def recorded_ratios(results: dict[str, Any]) -> list[list[str]]:
    """Header and rows: our time, and each recorded peer's over it."""
    rows = table(results, peers())
    first = next(i for i, title in enumerate(rows[0]) if title.startswith("vs "))
    return [[row[0], row[2], *row[first:]] for row in rows]
