"""compute-sanitizer over every kernel: no access outside an allocation, no shared-memory race.

Races are looked for in the portable kernels alone: racecheck does not know what an mbarrier orders,
and reports every hand-over between the Hopper kernel's partitions, even those that start them.
There, a race would show as bits that move: `test_equal_bits_run_to_run`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ways import WAYS, Way

from mla_triton import device as devices

SCRIPT = Path(__file__).with_name("sanitized.py")
SANITIZER = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
TIME_LIMIT = 600


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize(
    ("kernel", "tool"),
    [
        *((way, "memcheck") for way in WAYS),
        (WAYS[0], "racecheck"),
        (Way("prefill-portable"), "memcheck"),
        (Way("prefill-sm90"), "memcheck"),
        (Way("merge"), "memcheck"),
        (Way("cache"), "memcheck"),
        (Way("prefill-portable"), "racecheck"),
        (Way("merge"), "racecheck"),
        (Way("cache"), "racecheck"),
    ],
    ids=str,
)
def test_sanitizer(kernel: Way, tool: str):
    if kernel.impl.endswith("sm90") and devices.current().capability != (9, 0):
        pytest.skip("the Hopper kernel needs capability 9.0")
    assert SANITIZER is not None
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "77", "--print-limit", "20"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [*command, sys.executable, str(SCRIPT), str(kernel)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )
    said = done.stdout + done.stderr
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, said[-4000:]
    assert "problems judged" in done.stdout
    assert "ERROR SUMMARY: 0 errors" in said or "RACECHECK SUMMARY: 0 hazards" in said
