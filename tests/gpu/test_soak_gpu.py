"""The command that tries random problems, for a few seconds: so that it runs when it is wanted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from mla_triton import device as devices

COMMAND = Path(__file__).with_name("soak.py")
SECONDS = 20


def test_soak():
    """Another set of problems every time; a failure prints which."""
    done = subprocess.run(
        [sys.executable, str(COMMAND), "--seconds", str(SECONDS)],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = re.search(r"^(\d+) problems in ", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    assert int(found[1]) > 3
    assert re.search(r"^decode portable ", done.stdout, re.MULTILINE), done.stdout
    if devices.current().capability == (9, 0):
        assert re.search(r"^decode sm90-[12] ", done.stdout, re.MULTILINE), done.stdout
