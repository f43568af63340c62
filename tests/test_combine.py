"""The merge of pieces: which of its kernels a problem gets, and that every one of them is right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import mla_triton
from mla_triton import device as devices
from mla_triton.kernels.common import combine
from mla_triton.kernels.portable import decode_config as portable
from mla_triton.kernels.sm90 import decode_config as sm90
from mla_triton.plan import Geometry
from mla_triton.testing import assert_within_budget, compilation, decode_inputs
from mla_triton.testing.compilation import DIMENSIONS

CARD = devices.from_label("9.0")


def config(batch: int, heads: int = 64, implementation=sm90, **changes) -> combine.Config:
    problem = replace(compilation.problem(heads=heads), batch=batch, queries=batch, **changes)
    return combine.heuristic(problem, implementation.geometry(problem, CARD), CARD)


# -- which


@pytest.mark.parametrize(
    ("batch", "heads", "implementation", "expected"),
    [
        (1, 16, portable, combine.Config(528, 64, 2, 2)),
        (1, 64, sm90, combine.Config(528, 16, 2, 3)),
        (1, 128, sm90, combine.Config(528, 16, 2, 3)),
        (4, 64, sm90, combine.Config(4, 16, 2, 2)),
        (8, 64, sm90, combine.Config(4, 8, 2, 2)),
        (16, 64, sm90, combine.Config(4, 8, 2, 2)),
        (16, 128, sm90, combine.Config(8, 4, 2, 3)),
        (128, 128, sm90, combine.Config(8, 2, 2, 3)),
        (5000, 64, sm90, combine.Config(4, 2, 2, 3)),
    ],
)
def test_pieces_of_a_turn_follow_the_parts_of_a_request(batch, heads, implementation, expected):
    assert config(batch, heads, implementation) == expected


@pytest.mark.parametrize(
    ("max_kv_len", "heads", "implementation", "expected"),
    [
        (0, 64, sm90, 132),
        (1024, 16, portable, 132),
        (1024, 64, sm90, 132),
        (1024, 128, sm90, 528),
        (4096, 16, portable, 132),
        (4096, 64, sm90, 528),
        (16384, 16, portable, 528),
        (2**31 - 1, 16, portable, 528),
    ],
)
def test_programs_of_a_lone_request_follow_its_longest_keys(
    max_kv_len, heads, implementation, expected
):
    found = config(1, heads, implementation, max_kv_len=max_kv_len)
    assert found.programs == expected


@pytest.mark.parametrize("heads", [1, 5, 16, 64, 128])
@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_a_turn_is_what_registers_hold(heads, dimensions):
    """Powers of two, and never more of a program's registers than there are."""
    for batch in (1, 2, 3, 7, 16, 33, 100, 1000):
        problem = replace(
            compilation.problem(heads=heads, dimensions=dimensions), batch=batch, queries=batch
        )
        found = combine.heuristic(problem, portable.geometry(problem, CARD), CARD)
        assert found.programs >= 1
        assert found.levels > 1
        for level in range(found.levels):
            pieces = found.pieces * found.step**level
            assert 2 <= pieces <= combine.MOST_PIECES
            assert pieces & (pieces - 1) == 0
        if batch > 1:
            together = found.programs * portable.geometry(problem, CARD).parts
            assert together <= combine.PROGRAMS_PER_SM * CARD.sm_count or found.programs == 1


def test_only_one_uniform_request_is_one_group():
    assert combine.is_alone(replace(compilation.problem(), batch=1, queries=1))
    assert not combine.is_alone(replace(compilation.problem(), batch=2, queries=2))
    ragged = replace(compilation.problem(), batch=1, queries=1, s_q=None)
    assert not combine.is_alone(ragged)


@pytest.mark.parametrize(
    ("number", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (8, 8), (9, 16), (124, 128)]
)
def test_power_of_two(number, expected):
    assert combine.power_of_two(number) == expected


# -- right


@pytest.mark.parametrize(
    ("pieces", "step", "levels"),
    [(128, 2, 1), (2, 2, 1), (2, 2, 3), (4, 4, 2), (8, 2, 2), (16, 4, 2), (64, 2, 2)],
)
@pytest.mark.parametrize("kv_lens", [[1200], [700, 3, 1200, 64]], ids=["alone", "uneven"])
def test_any_number_of_pieces_in_a_turn_gives_the_answer(
    monkeypatch, pieces, step, levels, kv_lens
):
    """Of groups with fewer pieces than a turn takes and with more."""

    def heuristic(problem, geometry: Geometry, device) -> combine.Config:
        return combine.Config(3, pieces, step, levels)

    monkeypatch.setattr(combine, "heuristic", heuristic)
    mla_triton.ops.decode.forget()
    try:
        for latent in (128, 32):
            inputs = decode_inputs(
                kv_lens=kv_lens, heads=3, latent=latent, rope=32, dtype=torch.float16, s_q=2
            )
            arguments, options = inputs.call_arguments()
            plan = mla_triton.plan(
                inputs.kv_lens, heads=3, latent=latent, rope=32, dtype=torch.float16, s_q=2,
                parts=40,
            )  # fmt: skip
            groups = plan.schedule[2 + 2 * 41 :].view(-1, 4)[: len(kv_lens)]
            assert groups[:, 2].max() > 8
            assert_within_budget(mla_triton.decode(*arguments, **options, plan=plan), inputs)
    finally:
        mla_triton.ops.decode.forget()
