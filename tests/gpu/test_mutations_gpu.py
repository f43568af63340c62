"""Bugs that only a GPU can show: in the kernels for Hopper, and in code for another capability.

Those of the portable kernels are planted by tests/mutations, on a GPU in what is compiled there.
"""

from __future__ import annotations

import pytest
import torch
from hopper_mutants import MUTANTS
from mutants import TILES16
from planting import Edit, planted
from trials import TRIALS, Verdict, decode, judge_state, prefill
from ways import Way, forced

from mla_triton import device as devices
from mla_triton.testing import decode_inputs, prefill_inputs
from mla_triton.testing.budget import budget_of
from mla_triton.testing.foreign_code import code_of

here = devices.current()
by_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)

# -- the kernels for Hopper


def judged(form: str, dtype: torch.dtype) -> Verdict:
    """The result of a form of a Hopper kernel over a fixed problem."""
    if form == "prefill":
        recipe = {"q_lens": (300, 64, 3), "k_lens": (301, 200, 900)}
        sequences = prefill_inputs(**recipe, dtype=dtype, device="cuda")
        return judge_state(prefill(sequences, "sm90"), sequences, budget_of(sequences))
    kind = form.removeprefix("decode, ")
    is_e4m3 = kind.startswith("e4m3")
    changes = {"kv_lens": (300, 0, 128, 65), "heads": 8}
    if kind == "e4m3, 64 rows":
        # As many requests as such tiles are for, in which some scores grow by more than a little.
        changes = {"kv_lens": (300, 0, 128, 65) * 8, "heads": 32, "logits": "dominant_key"}
    inputs = decode_inputs(
        **changes, s_q=2, stored="fp8" if is_e4m3 else "16bit", dtype=dtype, device="cuda"
    )
    with forced(Way("sm90", None if is_e4m3 else int(kind))):
        # One part: what is cut has its lse in base 2 until it is merged.
        state = decode(inputs, 1, impl="sm90")
    return judge_state(state, inputs, budget_of(inputs))


@pytest.mark.skipif(here.capability != (9, 0), reason="needs capability 9.0")
@by_dtype
@pytest.mark.parametrize("name", MUTANTS)
def test_bugs_of_the_hopper_kernels_are_caught(name, dtype):
    form, edit = MUTANTS[name]
    assert not judged(form, dtype).caught_by
    with planted([edit]):
        assert judged(form, dtype).caught_by
    assert not judged(form, dtype).caught_by


# -- code for another capability

BUGS = {
    "exponents not moved down": Edit(TILES16, "    shr.u32 low, low, 1;\n", ""),
    "a sign left out": Edit(
        TILES16, "lop3.b32 $1, sign, 0x80008000, high, 0xEA;", "mov.b32 $1, high;"
    ),
}
"""In e4m3 by integer arithmetic on four bytes at once, which is for 8.0 and 8.6 alone."""


@pytest.mark.skipif((here.capability or (0, 0)) < (9, 0), reason="needs capability 9.0 or later")
@by_dtype
@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("trial", ["decode, two scales", "decode, scales of groups"])
def test_code_for_80_has_to_run_to_be_caught(trial, bug, dtype):
    judge = TRIALS[trial]
    with code_of("8.0"):
        assert not judge(dtype).caught_by
    with planted([BUGS[bug]]):
        assert not judge(dtype).caught_by, "this card converts by an instruction"
        # The same call again: what the one before it launched must not be launched again.
        with code_of("8.0"):
            assert judge(dtype).caught_by
    assert not judge(dtype).caught_by
