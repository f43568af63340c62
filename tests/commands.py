"""The command line, run in this process or as a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from mla_triton import cli


def run(*arguments: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; a variable set to None is taken out."""
    changed = os.environ | {n: v for n, v in environment.items() if v is not None}
    for name in (name for name, value in environment.items() if value is None):
        changed.pop(name, None)
    return subprocess.run(
        [sys.executable, "-m", "mla_triton", *arguments],
        env=changed,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that bad arguments give."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err.rstrip("\n")


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert cli.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)
