"""The portable kernel's geometry and configs: total over problems and cards, and independent of
what a plan does not know.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mla_triton import device as devices
from mla_triton.kernels.portable import decode_config
from mla_triton.testing import compilation

CARDS = tuple(devices.KNOWN)


def problems():
    dimensions = (*compilation.DIMENSIONS, compilation.ROPE_INSIDE)
    for dtype in compilation.DTYPES:
        for heads in (1, 5, 16, 17, 32, 33, 64, 100, 128):
            for widths in dimensions:
                yield compilation.problem(dtype, heads, dimensions=widths)


@pytest.mark.parametrize("label", CARDS)
def test_every_problem_has_a_valid_config(label):
    card = devices.from_label(label)
    for plain in problems():
        for problem in (
            plain,
            replace(plain, page_size=1),
            replace(plain, aligned=False),
            replace(plain, allow_tf32=True),
        ):
            config, reason = decode_config.choose(problem, card)
            tile = decode_config.row_tile(problem, card)
            tf32 = decode_config.precision(problem, card) == "tf32"
            seen = replace(problem, allow_tf32=tf32)
            valid, rule = decode_config.is_valid(config, seen, card, tile)
            assert valid, rule
            assert rule in reason


@pytest.mark.parametrize("label", CARDS)
def test_geometry_knows_nothing_that_a_plan_does_not(label):
    """A plan is made before page size, strides, causality and tf32 are known: it serves all."""
    card = devices.from_label(label)
    for plain in problems():
        expected = decode_config.geometry(plain, card)
        for other in (
            replace(plain, page_size=1),
            replace(plain, page_size=48, csr=True),
            replace(plain, causal=True),
            replace(plain, aligned=False),
            replace(plain, fused=False, ckv_stride_slot=512, kpe_stride_slot=64),
            replace(plain, allow_tf32=True, max_kv_len=77, num_pages=5),
        ):
            assert decode_config.geometry(other, card) == expected


@pytest.mark.parametrize("label", CARDS)
@pytest.mark.parametrize("s_q", [1, 2, 64, 5000])
def test_programs_fill_the_card(label, s_q):
    """Lanes times parts is at least three quarters of what the card holds, or of what there is."""
    card = devices.from_label(label)
    for heads in (1, 16, 48, 128):
        problem = replace(compilation.problem(heads=heads), s_q=s_q, queries=64 * s_q)
        geometry = decode_config.geometry(problem, card)
        assert geometry.lanes * geometry.row_tile >= problem.rows
        assert geometry.lanes * geometry.parts >= 0.75 * card.sm_count


def test_ragged_groups_are_bounded_without_reading_lengths():
    card = devices.from_label("9.0")
    for queries, batch in ((1, 1), (7, 3), (4096, 2), (100, 64)):
        problem = replace(
            compilation.problem(heads=20), s_q=None, queries=queries, batch=batch, causal=True
        )
        geometry = decode_config.geometry(problem, card)
        worst = [queries - batch + 1, *[1] * (batch - 1)] if queries >= batch else [queries]
        groups = sum(-(-n * 20 // geometry.group_rows) for n in worst)
        assert groups <= geometry.max_groups


def test_parts_can_be_asked_for():
    card = devices.from_label("8.9")
    assert decode_config.geometry(compilation.problem(), card, parts=7).parts == 7


def programs(problem, label) -> float:
    """Programs an SM that a plan counts on."""
    card = devices.from_label(label)
    shape = decode_config.geometry(problem, card)
    return shape.parts * shape.lanes / card.sm_count


def test_programs_share_an_sm_where_they_fit_and_have_work():
    many = compilation.problem()
    lone = replace(many, batch=1, queries=1)
    assert programs(many, "8.0") == 2
    assert programs(lone, "8.0") == 1, "a second program would only lengthen the merge"
    assert programs(many, "9.0") == 1, "two tiles in flight take the room of two programs"
    assert programs(replace(many, heads=32, batch=128), "9.0") == 2
    assert programs(replace(many, heads=32), "9.0") == 1, "as many merges as programs"


@pytest.mark.parametrize("label", CARDS)
@pytest.mark.parametrize("heads", [1, 16, 20, 32, 128])
def test_every_quantised_problem_has_a_valid_config_and_follows_a_plan(label, heads):
    """Of its format, or of a 16-bit cache, whose row tile must have a config, too."""
    card = devices.from_label(label)
    for plain in compilation.quantised_problems(heads=heads).values():
        own = decode_config.geometry(plain.as_planned(), card)
        unknown = decode_config.geometry(replace(plain, storage=None).as_planned(), card)
        for problem in (plain, replace(plain, page_size=1), replace(plain, aligned=False)):
            for planned in (own, unknown):
                config = decode_config.heuristic(problem, card, planned.row_tile)
                assert decode_config.is_valid(config, problem, card, planned.row_tile)[0]
                assert decode_config.geometry(problem, card, like=planned) == planned
            assert decode_config.geometry(problem, card) == own


def test_programs_that_convert_share_an_sm():
    """A plan of another format counts on what a 16-bit cache would get."""
    forms = compilation.quantised_problems()
    for label, shared in (("9.0", 2), ("8.0", 2)):
        for form, problem in forms.items():
            assert programs(problem, label) == shared, (label, form)
            lone = replace(problem, batch=1, queries=1)
            assert programs(lone, label) == 1, "a second program would only lengthen the merge"
    assert programs(forms["fp8"], "8.9") == 1, "two tiles in flight take the room of two programs"
    assert programs(forms["fp8_ds_mla"], "8.9") == 2
    assert programs(replace(forms["fp8"], storage=None).as_planned(), "9.0") == 1


def test_what_is_worth_timing_over_a_quantised_cache_holds_the_heuristics_choice():
    for label in ("8.0", "8.9", "9.0"):
        card = devices.from_label(label)
        for problem in compilation.quantised_problems().values():
            space = list(decode_config.search_space(problem, card))
            assert decode_config.heuristic(problem, card) in space
            assert any(decode_config.is_valid(config, problem, card)[0] for config in space)


def test_a_few_requests_are_read_by_several_short_programs():
    card = devices.from_label("9.0")
    for batch, heads, rows in ((1, 128, 16), (2, 64, 16), (2, 128, 64), (3, 64, 64), (1, 40, 16)):
        problem = replace(compilation.problem(heads=heads), batch=batch, queries=batch)
        assert decode_config.geometry(problem, card).row_tile == rows, (batch, heads)
        if rows == 16:
            assert programs(problem, "9.0") > 1.9


def test_tf32_is_used_only_where_it_is_allowed_there_and_fits():
    single = compilation.problem(torch.float32)
    allowed = replace(single, allow_tf32=True)
    names = {label: decode_config.precision(allowed, devices.from_label(label)) for label in CARDS}
    assert names["9.0"] == "tf32"
    assert names["8.9"] == "ieee", "the second copy of V does not fit into 99 KiB"
    assert names["gfx950"] == "ieee", "the card has no tf32"
    small = replace(allowed, latent=128, rope=32, value_dim=128)
    assert decode_config.precision(small, devices.from_label("8.9")) == "tf32"
    assert decode_config.precision(single, devices.from_label("9.0")) == "ieee"
