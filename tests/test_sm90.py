"""The Hopper kernel as far as a machine without one can see it: code, configs, what is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton

from mla_triton import device as devices
from mla_triton.kernels.common.launch import Variant
from mla_triton.kernels.sm90 import decode, gluon
from mla_triton.kernels.sm90.decode import Config
from mla_triton.plan import Geometry
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
    "a pair": replace(PLAIN, fused=False, ckv_stride_slot=512, kpe_stride_slot=64),
    "pages of 16": compilation.problem(heads=128, page_size=16),
    "pages of 32": compilation.problem(heads=128, page_size=32),
    "pages of 128": compilation.problem(heads=128, page_size=128),
    "pages of 192": compilation.problem(heads=128, page_size=192),
    "pages of 1": compilation.problem(heads=128, page_size=1),
    "pages of 48": compilation.problem(heads=128, page_size=48),
    "pages in no row": replace(compilation.problem(heads=128), page_slots=0),
    "narrow": compilation.problem(heads=128, dimensions=(256, 64, 256)),
}
FEW_BYTES = 64
"""Of stack a thread: what the form of one block may spill. That of two blocks spills nothing."""


def variant(problem: DecodeProblem, config: Config) -> Variant:
    return decode.variant(problem, config, decode.geometry(problem, CARD), CARD)


def cases() -> list[tuple[str, Config]]:
    every = [(name, Config(blocks)) for name in PROBLEMS for blocks in (1, 2)]
    return [(name, c) for name, c in every if decode.is_valid(c, PROBLEMS[name], CARD)[0]]


# -- code


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, int], workers.Compiled]:
    wanted = cases()
    jobs = [Job(variant(PROBLEMS[name], c), CARD, with_spills=True) for name, c in wanted]
    return {
        (wanted[number][0], wanted[number][1].blocks): answer
        for number, answer in workers.run(jobs)
    }


def test_both_forms_compile_for_every_problem(compiled):
    assert len(compiled) == 2 * len(PROBLEMS) - 4
    assert {key: answer.error for key, answer in compiled.items() if answer.error} == {}


def test_one_program_fits_an_sm(compiled):
    for key, answer in compiled.items():
        assert 100_000 < answer.shared_memory <= CARD.shared_memory, key


def test_nothing_spills_with_two_blocks_and_little_otherwise(compiled):
    for (name, blocks), answer in compiled.items():
        assert answer.spilled <= (0 if blocks == 2 else FEW_BYTES), name


def test_what_changes_code_is_in_the_variant_and_nothing_else():
    """Sizes that change from step to step, and where pages lie, compile nothing anew."""
    for config in (Config(1), Config(2)):
        plain = variant(PLAIN, config)
        for same in (
            replace(PLAIN, batch=7, queries=7),
            replace(PLAIN, heads=40),
            replace(PLAIN, page_slots=61 * 64),
            replace(PLAIN, ckv_stride_slot=640),
            replace(PLAIN, max_kv_len=5, num_pages=9),
        ):
            assert variant(same, config) == plain
        others = [
            variant(problem, config)
            for name, problem in PROBLEMS.items()
            if name != "a pair" and decode.is_valid(config, problem, CARD)[0]
        ]
        assert len(set(others)) == len(others)
        assert variant(PROBLEMS["a pair"], config) == plain
    assert variant(PLAIN, Config(1)) != variant(PLAIN, Config(2))


# -- what it takes


@pytest.mark.parametrize(
    ("problem", "label", "reason"),
    [
        (PLAIN, "10.0", "it is written for capability 9.0, this card has 10.0"),
        (PLAIN, "8.9", "it is written for capability 9.0, this card has 8.9"),
        (PLAIN, "gfx942", "it is written for capability 9.0, this card has gfx942"),
        (PLAIN, "interpreter", "it is written for capability 9.0, this card has interpreter"),
        (replace(PLAIN, dtype=torch.float32), "9.0", "it reads aligned float16 or bfloat16"),
        (replace(PLAIN, aligned=False), "9.0", "it reads aligned float16 or bfloat16"),
        (
            compilation.problem(dimensions=(128, 32, 128)),
            "9.0",
            "it is written for 512+64, 512+0, 256+64, got 128+32",
        ),
        (
            compilation.problem(dimensions=compilation.ROPE_INSIDE),
            "9.0",
            "its queries come in one tensor where no key column is behind the value",
        ),
    ],
)
def test_what_it_does_not_take(problem: DecodeProblem, label: str, reason: str):
    card = devices.from_label(label)
    assert decode.why_not(problem, card) == reason
    assert decode.is_valid(Config(1), problem, card) == (False, reason)
    with pytest.raises(ValueError, match="problem must be one that sm90 takes") as error:
        decode.choose(problem, card)
    assert str(error.value).endswith(f": {reason}")


def test_what_it_takes():
    assert {name: decode.why_not(problem, CARD) for name, problem in PROBLEMS.items()} == (
        dict.fromkeys(PROBLEMS)
    )


@pytest.mark.parametrize(
    ("page_size", "page_slots", "expected"),
    [(16, 16, False), (32, 32, False), (64, 64, False), (192, 192, False), (64, 320, False)]
    + [(size, size, True) for size in (1, 2, 7, 8, 24, 48, 96)]
    + [(64, 0, True), (16, 0, True)],
)
def test_which_keys_are_copied_row_by_row(page_size, page_slots, expected):
    problem = replace(PLAIN, page_size=page_size, page_slots=page_slots)
    assert decode.gathers(problem) is expected
    config = decode.heuristic(problem, CARD)
    made = decode.variant(problem, config, decode.geometry(problem, CARD), CARD)
    assert dict(made.constants)["GATHER"] is expected


@pytest.mark.parametrize(
    ("config", "changes", "rows", "valid"),
    [
        (Config(1), {}, None, (True, "one program an SM")),
        (Config(2), {}, 64, (True, "one program an SM")),
        (Config(1), {"page_size": 16}, None, (True, "one program an SM")),
        (Config(2), {"page_size": 32}, None, (True, "one program an SM")),
        (
            Config(2),
            {"page_size": 16},
            None,
            (False, "two blocks come by TMA, from at most four pages, got pages of 16"),
        ),
        (
            Config(2),
            {"page_slots": 0},
            None,
            (False, "two blocks come by TMA, from at most four pages, got pages of 64"),
        ),
        (Config(0), {}, None, (False, "blocks must be 1 or 2, got 0")),
        (Config(3), {}, None, (False, "blocks must be 1 or 2, got 3")),
        (Config(1), {}, 32, (False, "its tile has 64 rows, got 32")),
    ],
)
def test_which_configs_are_valid(config, changes, rows, valid):
    assert decode.is_valid(config, replace(PLAIN, **changes), CARD, rows) == valid


@pytest.mark.parametrize("heads", [1, 16, 17, 64, 65, 128])
@pytest.mark.parametrize("s_q", [1, 2, 8])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
def test_the_heuristic_is_valid_and_says_why(page_size, s_q, heads):
    problem = replace(
        compilation.problem(heads=heads, page_size=page_size), s_q=s_q, queries=64 * s_q
    )
    config, reason = decode.choose(problem, CARD)
    assert decode.is_valid(config, problem, CARD) == (True, "one program an SM")
    assert decode.heuristic(problem, CARD) == config
    assert reason
    assert config in set(decode.search_space(problem, CARD)) == {Config(1), Config(2)}


# -- how it cuts


def test_geometry_knows_nothing_that_a_plan_does_not():
    for problem in PROBLEMS.values():
        expected = decode.geometry(problem.as_planned(), CARD)
        assert (expected.kv_tile, expected.row_tile) == (64, 64)
        for other in (problem, replace(problem, causal=True), replace(problem, max_kv_len=77)):
            assert decode.geometry(other, CARD) == expected


def test_one_program_an_sm():
    for heads, batch, lanes in ((64, 64, 1), (128, 64, 2), (128, 1, 2), (20, 3, 1)):
        problem = replace(compilation.problem(heads=heads), batch=batch, queries=batch)
        geometry = decode.geometry(problem, CARD)
        assert (geometry.lanes, geometry.parts) == (lanes, CARD.sm_count // lanes)
    assert decode.geometry(PLAIN, CARD, parts=7).parts == 7


def test_a_plan_of_its_own_tiles_is_followed():
    own = decode.geometry(PLAIN, CARD)
    for like in (own, replace(own, parts=5), replace(own, overhead=9)):
        assert decode.geometry(PLAIN, CARD, like=like) == like


def test_of_another_plan_the_parts_alone_are_taken():
    """So that the call which is given both is told what is wrong with the plan."""
    like = Geometry(32, 16, 8, 11, 4, 64)
    assert decode.geometry(PLAIN, CARD, like=like) == replace(
        decode.geometry(PLAIN, CARD), parts=11
    )


def test_rows_are_found_by_a_key_of_its_own_tile():
    key, batch, length = decode.tuning_point(PLAIN, CARD)
    assert dict(key)["row_tile"] == 64
    assert (batch, length) == (PLAIN.batch, PLAIN.max_kv_len)


# -- Gluon


def test_a_name_of_any_known_release_is_found():
    module = SimpleNamespace(newer=1, older=2)
    assert gluon._first(module, "newer", "older") == 1
    assert gluon._first(module, "newest", "older") == 2
    with pytest.raises(AttributeError) as error:
        gluon._first(module, "this", "that")
    assert str(error.value) == f"Triton {triton.__version__} has none of this, that"
