"""How long the first call of a fresh process takes, before and after a warm-up, and the warm-up.

    python benchmarks/first_call.py
    python benchmarks/first_call.py --output benchmarks/results/tuning/first_call_h200.json

Every figure is of processes of their own over one new directory of Triton's cache, with the host's
file cache warm. The clock of a first call starts when torch and triton are imported and the GPU is
there, and stops when the result is; the import of mla_triton is inside.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import results as results_file

DEPLOYMENT = ("--model", "deepseek-v3", "--tp", "8", "--max-batch", "128", "--max-len", "131072")
REPEATS = 3
CHILD = """
import time
import torch, triton
torch.zeros(1, device="cuda").item()
began = time.perf_counter()
import mla_triton
imported = time.perf_counter()

def decode(batch, keys):
    pages = -(-keys // 64)
    cache = torch.zeros(batch * pages, 64, 576, dtype=torch.bfloat16, device="cuda")
    table = torch.arange(batch * pages, dtype=torch.int32, device="cuda").view(batch, pages)
    lens = torch.full((batch,), keys, dtype=torch.int32, device="cuda")
    q_nope = torch.zeros(batch, 1, 16, 512, dtype=torch.bfloat16, device="cuda")
    q_rope = torch.zeros(batch, 1, 16, 64, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    mla_triton.decode(q_nope, q_rope, cache, table, lens, softmax_scale=1.0)
    torch.cuda.synchronize()
    return time.perf_counter() - start

compiled = []
triton.knobs.compilation.listener = lambda cache_hit, **_: compiled.append(not cache_hit)
first = decode(16, 4096)
others = [decode(batch, keys) for batch, keys in ((1, 700), (2, 70000), (33, 3000), (128, 9000))]
print(__import__("json").dumps({
    "import": imported - began, "first": first, "others": others, "compiled": sum(compiled)
}))
"""


def child(environment: dict[str, str]) -> dict[str, Any]:
    """Seconds of a fresh process's calls."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, check=True
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def warmup(environment: dict[str, str], *options: str) -> dict[str, Any]:
    """What `mla-triton warmup` says of itself."""
    command = [sys.executable, "-m", "mla_triton", "warmup", *DEPLOYMENT, "--json", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def median(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of import and first call together, the median; of the others, the slowest of all."""
    return {
        "first_call_s": statistics.median(run["import"] + run["first"] for run in runs),
        "import_s": statistics.median(run["import"] for run in runs),
        "slowest_other_call_s": max(max(run["others"]) for run in runs),
        "compiled": max(run["compiled"] for run in runs),
    }


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {"TRITON_CACHE_DIR": directory}
        before = []
        for number in range(REPEATS):
            before.append(child(environment | {"TRITON_CACHE_DIR": f"{directory}/{number}"}))
        return {
            "before": median(before),
            "warmup_cold": warmup(environment),
            "warmup_warm": warmup(environment),
            "check": warmup(environment, "--check"),
            "after": median([child(environment) for _ in range(REPEATS)]),
        }


def lines(figures: dict[str, Any]) -> list[str]:
    text = []
    for name in ("before", "after"):
        run = figures[name]
        text.append(
            f"first call of a fresh process {name} warm-up: {run['first_call_s']:.2f} s, of which "
            f"import mla_triton {run['import_s']:.2f} s; slowest of four other shapes "
            f"{run['slowest_other_call_s'] * 1e3:.1f} ms; {run['compiled']} kernels compiled"
        )
    for name, said in (("warmup_cold", "cold"), ("warmup_warm", "warm"), ("check", "--check")):
        run = figures[name]
        text.append(
            f"warm-up {said}: {run['seconds']:.1f} s, {run['kernels']} kernels, "
            f"{run['compiled']} compiled, {run['size'] / 1e6:.1f} MB"
        )
    return text


def main(argv: Sequence[str] | None = None) -> int:
    return results_file.record("first_call.py", __doc__, measure, lines, argv)


if __name__ == "__main__":
    sys.exit(main())
