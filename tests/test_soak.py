"""The command that tries random problems, on small ones in Triton's interpreter."""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys

import pytest
import soak
from soak_problems import INTERPRETED, OFTEN, ON_GPU, draw

import mla_triton
from mla_triton import device as devices

pytestmark = pytest.mark.skipif(not devices.interpreting(), reason="tests/gpu has it compiled")


def first_of(operation: str, seed: int = 0) -> int:
    """The number of the first problem of an operation."""
    numbers = itertools.count()
    return next(n for n in numbers if draw(seed, n, INTERPRETED).operation == operation)


@pytest.mark.parametrize("operation", OFTEN)
def test_an_operation_is_tried(operation, capsys):
    number = str(first_of(operation))
    assert soak.main(["--seed", "0", "--first", number, "--problems", "1"]) == 0
    said = capsys.readouterr().out
    assert any(line.startswith(operation) for line in said.splitlines())
    assert "1 problems in " in said
    assert "; 0 wrong results" in said


def test_a_wrong_result_is_told_and_made_again(capsys, monkeypatch):
    right, number = mla_triton.merge, str(first_of("merge"))

    def wrong(*arguments, **options):
        state = right(*arguments, **options)
        state.out.mul_(1.1)
        return state

    with monkeypatch.context() as patch:
        patch.setattr(mla_triton, "merge", wrong)
        assert soak.main(["--seed", "0", "--first", number, "--problems", "1"]) == 1
    said = capsys.readouterr().out
    assert "WRONG merge: out error " in said
    assert "; 1 wrong results" in said
    (line,) = [line for line in said.splitlines() if line.startswith("  soak.py ")]
    assert soak.main(shlex.split(line)[1:]) == 0


def test_a_run_of_nothing_is_no_success():
    assert soak.main(["--seconds", "0"]) == 1


def test_processes_share_the_problems():
    one = f"--seed 0 --first {first_of('copy_pages')} --problems 1"
    done = subprocess.run(
        [sys.executable, soak.__file__, *one.split(), "--jobs", "2"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("seed 0\n")
    assert "1 problems in " in done.stdout


def test_a_problem_is_its_number():
    """Whatever came before it; and a long run has every kind of problem."""
    drawn = [draw(7, number, ON_GPU) for number in range(2000)]
    assert drawn[1234] == draw(7, 1234, ON_GPU)
    assert drawn[1234] != draw(8, 1234, ON_GPU)
    assert {each.operation for each in drawn} == set(OFTEN)
    for each in drawn:
        lengths = each.recipe.get("kv_lens", [0])
        assert sum(lengths) <= ON_GPU.keys
