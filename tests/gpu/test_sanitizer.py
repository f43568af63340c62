"""compute-sanitizer over every kernel: no access outside an allocation, no shared-memory race, no
memory that is read before it was written.

Races are looked for in the portable kernels alone: racecheck does not know what an mbarrier orders,
and reports every hand-over between the Hopper kernel's partitions, even those that start them.
There, a race would show as bits that move: `test_equal_bits_run_to_run`.

What a kernel may read before it was written is nothing: what problems are made of is initialised to
its last byte, padding and unused pages by NaN, so only a call's own buffers are not (schedule,
partial results, results), and all that is read of them was written by the kernels before.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mla_triton.kernels
from mla_triton import device as devices

SCRIPT = Path(__file__).with_name("sanitized.py")
SANITIZER = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
TIME_LIMIT = 600
KERNELS = Path(mla_triton.kernels.__file__).parent
LAUNCHED = {
    "portable": {"schedule_kernel", "decode_kernel", "combine_kernel"},
    "sm90-1": {"schedule_kernel", "decode_kernel", "quantised_kernel", "combine_kernel"},
    "sm90-2": {"schedule_kernel", "decode_kernel", "combine_kernel"},
    "prefill-portable": {"prefill_kernel"},
    "prefill-sm90": {"prefill_kernel"},
    "merge": {"merge_kernel"},
    "cache": {"append_kernel", "gather_kernel", "copy_kernel"},
}
"""Kernels that a case has to have launched."""


def test_every_kernel_is_in_a_case():
    found = set()
    for file in KERNELS.rglob("*.py"):
        found |= set(re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE))
    assert set().union(*LAUNCHED.values()) == found


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize(
    ("kernel", "tool"),
    [
        *((kernel, "memcheck") for kernel in LAUNCHED),
        *((kernel, "racecheck") for kernel in LAUNCHED if "sm90" not in kernel),
        *((kernel, "initcheck") for kernel in LAUNCHED),
    ],
)
def test_sanitizer(kernel: str, tool: str):
    if "sm90" in kernel and devices.current().capability != (9, 0):
        pytest.skip("the Hopper kernel needs capability 9.0")
    assert SANITIZER is not None
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "77", "--print-limit", "20"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [*command, sys.executable, str(SCRIPT), kernel],
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
    (launched,) = re.findall(r"^launched: (.*)$", done.stdout, re.MULTILINE)
    assert LAUNCHED[kernel] <= set(launched.split())
    assert "ERROR SUMMARY: 0 errors" in said or "RACECHECK SUMMARY: 0 hazards" in said
