"""Bugs in code for another capability: right on this card, caught where that code is run."""

from __future__ import annotations

import pytest
import torch
from mutants import TILES16
from planting import Edit, planted
from trials import TRIALS

from mla_triton import device as devices
from mla_triton.testing.foreign_code import code_of

here = devices.current()
pytestmark = pytest.mark.skipif(
    here.capability is None or here.capability < (9, 0), reason="needs capability 9.0 or later"
)

BUGS = {
    "exponents not moved down": Edit(TILES16, "    shr.u32 low, low, 1;\n", ""),
    "a sign left out": Edit(
        TILES16, "lop3.b32 $1, sign, 0x80008000, high, 0xEA;", "mov.b32 $1, high;"
    ),
}
"""In e4m3 by integer arithmetic on four bytes at once, which is for 8.0 and 8.6 alone."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("trial", ["decode, two scales", "decode, scales of groups"])
def test_code_for_80_has_to_run_to_be_caught(trial, bug, dtype):
    judge = TRIALS[trial]
    with code_of("8.0"):
        assert not judge(dtype).caught_by
    with planted([BUGS[bug]]):
        assert not judge(dtype).caught_by, "this card converts by an instruction"
        with code_of("8.0"):
            assert judge(dtype).caught_by
    assert not judge(dtype).caught_by
