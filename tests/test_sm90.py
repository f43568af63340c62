"""The Hopper kernel as far as a machine without one can see it: code, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mla_triton import device as devices
from mla_triton.kernels.sm90 import decode
from mla_triton.kernels.sm90.decode import Config
from mla_triton.problem import DecodeProblem
from mla_triton.testing import compilation
from mla_triton.tuning import workers
from mla_triton.tuning.workers import Job

CARD = devices.from_label("9.0")
PLAIN = compilation.problem(heads=128)
RAGGED = replace(PLAIN, s_q=None, causal=True, csr=True)
PROBLEMS = {
    "plain": PLAIN,
    "float16": replace(PLAIN, dtype=torch.float16),
    "causal": replace(PLAIN, s_q=2, queries=128, causal=True),
    "ragged": RAGGED,
    "pages of 16": replace(PLAIN, page_size=16),
    "pages of 32": replace(PLAIN, page_size=32),
    "pages of 128": replace(PLAIN, page_size=128),
    "narrow": compilation.problem(heads=128, dimensions=(256, 64, 256)),
}
FEW_BYTES = 64
"""Of stack a thread: what the asymmetric form may spill, of which its key loop accesses one word at
most. The form for many rows spills nothing."""


def cases() -> list[tuple[str, Config]]:
    every = [(name, Config(in_pairs)) for name in PROBLEMS for in_pairs in (False, True)]
    return [(name, c) for name, c in every if decode.is_valid(c, PROBLEMS[name], CARD)[0]]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, bool], workers.Compiled]:
    wanted = cases()
    jobs = [Job(decode.variant(PROBLEMS[name], c), CARD, with_spills=True) for name, c in wanted]
    return {
        (wanted[number][0], wanted[number][1].in_pairs): answer
        for number, answer in workers.run(jobs)
    }


def test_both_forms_compile_for_every_problem(compiled):
    assert len(compiled) == 15
    assert {key: answer.error for key, answer in compiled.items() if answer.error} == {}


def test_one_program_fits_an_sm(compiled):
    for key, answer in compiled.items():
        assert 100_000 < answer.shared_memory <= CARD.shared_memory, key


def test_nothing_spills_in_pairs_and_little_otherwise(compiled):
    for (name, in_pairs), answer in compiled.items():
        assert answer.spilled <= (0 if in_pairs else FEW_BYTES), name


@pytest.mark.parametrize(
    ("problem", "label", "reason"),
    [
        (PLAIN, "10.0", "it is written for capability 9.0, this card has 10.0"),
        (PLAIN, "8.9", "it is written for capability 9.0, this card has 8.9"),
        (replace(PLAIN, dtype=torch.float32), "9.0", "it reads aligned float16 or bfloat16"),
        (replace(PLAIN, aligned=False), "9.0", "it reads aligned float16 or bfloat16"),
        (
            compilation.problem(dimensions=(512, 0, 512)),
            "9.0",
            "it is written for 512+64 or 256+64, got 512+0",
        ),
        (
            replace(PLAIN, page_size=48),
            "9.0",
            "a TMA box is 16, 32 or 64 keys of one page, got pages of 48",
        ),
    ],
)
def test_what_it_does_not_take(problem: DecodeProblem, label: str, reason: str):
    card = devices.from_label(label)
    assert decode.why_not(problem, card) == reason
    assert decode.is_valid(Config(in_pairs=False), problem, card) == (False, reason)


def test_what_it_takes():
    assert {name: decode.why_not(problem, CARD) for name, problem in PROBLEMS.items()} == (
        dict.fromkeys(PROBLEMS)
    )
    valid, rule = decode.is_valid(Config(in_pairs=True), PROBLEMS["pages of 16"], CARD)
    assert (valid, rule) == (False, "pairs are loaded from at most two pages a block, got 16")
