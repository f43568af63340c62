"""How long `mla-triton tune` takes for DeepSeek-V3 at TP 8, from empty caches, and what it finds.

python benchmarks/tune.py
python benchmarks/tune.py --output benchmarks/results/tuning/tune_h200.json
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import results as results_file

COMMAND = "mla-triton tune --model deepseek-v3 --tp 8 --max-batch 128 --max-len 131072"


def measure() -> dict[str, Any]:
    """What the command says of itself, in directories of its own."""
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {
            "TRITON_CACHE_DIR": f"{directory}/triton",
            "MLA_TRITON_CACHE_DIR": f"{directory}/configs",
        }
        command = [sys.executable, "-m", "mla_triton", *shlex.split(COMMAND)[1:], "--json"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    facts: dict[str, Any] = json.loads(done.stdout)
    # Where the rows were put is gone.
    del facts["path"]
    return {"command": COMMAND, "cores": len(os.sched_getaffinity(0))} | facts


def lines(figures: dict[str, Any]) -> list[str]:
    return [
        f"{len(figures['rows'])} rows in {figures['seconds']:.1f} s, {figures['kernels']} kernels "
        f"compiled in {figures['compile_seconds']:.1f} s; gain over the heuristic, or over the row "
        f"that is shipped where it stays: {figures['mean_gain']:.3f}"
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return results_file.record("tune.py", __doc__, measure, lines, argv)


if __name__ == "__main__":
    sys.exit(main())
