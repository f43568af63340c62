"""Barriers of the Hopper kernels, as the compiler sees them.

Shared memory of a barrier that no partition waits for counts as free once it is initialised, and is
given to others, with nothing that orders their first store behind the initialisation. So decoding
over e4m3 keys once ended in a misaligned address, at one call of many thousands.
"""

from __future__ import annotations

import re

import pytest
import test_sm90
import test_sm90_prefill
import test_sm90_quantised
from test_sm90 import CARD, PLAIN, Config

from mla_triton.kernels.common.launch import Variant
from mla_triton.kernels.sm90 import prefill
from mla_triton.testing import compilation

BARRIERS = re.compile(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<\d+x1xi64")
CAPTURED = re.compile(r"ttg\.warp_specialize\(([^)]*)\)")
WITHOUT_ROPE = compilation.problem(heads=128, dimensions=(512, 0, 512))
DECODES = {
    "decode": (PLAIN, 1),
    "decode, pairs": (PLAIN, 2),
    "decode without rotary keys": (WITHOUT_ROPE, 1),
    "decode, pairs, without rotary keys": (WITHOUT_ROPE, 2),
    "decode, gathered": (test_sm90.PROBLEMS["pages of 1"], 1),
}
QUANTISED = (
    "16 rows", "32 rows", "32 rows, a whole SM", "64 rows", "without rotary keys", "groups",
    "groups, 64 rows",
)  # fmt: skip
PREFILLS = ("192/128", "full", "queries in two")


def variant_named(name: str) -> Variant:
    if name in DECODES:
        problem, blocks = DECODES[name]
        return test_sm90.variant(problem, Config(blocks))
    if name in PREFILLS:
        problem = test_sm90_prefill.PROBLEMS[name]
        return prefill.variant(problem, prefill.heuristic(problem, CARD), CARD)
    return test_sm90_quantised.variant_named(name)


def unused(text: str) -> set[str]:
    """Barriers that are allocated and are no partition's, in a kernel before it is machine code.

    What no partition uses is none of its arguments: the compiler drops those first.
    """
    made = set(BARRIERS.findall(text))
    assert made
    (captured,) = CAPTURED.findall(text)
    return made - set(captured.split(", "))


def text_of(name: str) -> str:
    return variant_named(name).compile(CARD).asm["ttgir"]


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    names = [*DECODES, *QUANTISED, *PREFILLS]
    return dict(zip(names, compilation.side_by_side(text_of, names), strict=True))


def test_each_is_waited_for(texts):
    for name, text in texts.items():
        assert unused(text) == set(), name


def test_one_that_nobody_waits_for_is_seen():
    text = """
    %made = ttg.local_alloc : () -> !ttg.memdesc<2x1xi64, #shared, #smem, mutable>
    %made_1 = ttg.local_alloc : () -> !ttg.memdesc<1x1xi64, #shared, #smem, mutable>
    %shared = ttg.memdesc_index %made_1[%c0] : !ttg.memdesc<1x1xi64> -> !ttg.memdesc<1xi64>
    ttng.init_barrier %shared, 1 : !ttg.memdesc<1xi64, #shared, #smem, mutable>
    ttg.warp_specialize(%pages, %made, %parts) attributes {requestedRegisters = array<i32: 24>}
    """
    assert unused(text) == {"%made_1"}
