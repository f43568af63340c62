"""Plans cut for another implementation: which are followed, and that results are right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from quantised_forms import FORMS, inputs_of

import mla_triton
from mla_triton import device as devices
from mla_triton import select, testing, validate, validate_plan
from mla_triton.cache import named
from mla_triton.kernels.portable import decode as portable
from mla_triton.kernels.portable import decode_config
from mla_triton.kernels.portable.decode_config import Config
from mla_triton.kernels.sm90 import decode_config as sm90_config
from mla_triton.ops import decode as operation
from mla_triton.ops.plan import buffers, cut, known_cut
from mla_triton.plan import ENOUGH_PARTS, MAX_RAGGED_LANES, Geometry, cdiv, fitted
from mla_triton.problem import DecodeProblem, Storage
from mla_triton.testing import compilation
from mla_triton.testing.problems import DecodeInputs, decode_inputs

HOPPER = devices.from_label("9.0")
PLAIN = compilation.problem(heads=128)
ONE_SCALE = Storage(None, 0, torch.float32, 0)
SMALL = {"latent": 128, "rope": 32}
"""Widths that are soon interpreted."""


def of(heads: int, batch: int, s_q: int | None = 1, queries: int | None = None) -> DecodeProblem:
    queries = batch * (s_q or 1) if queries is None else queries
    return replace(PLAIN, heads=heads, batch=batch, s_q=s_q, queries=queries)


# -- the geometry of a problem


@pytest.mark.parametrize(
    ("problem", "lanes", "parts"),
    [
        (of(16, 8), 1, 132),
        (of(64, 8), 1, 132),
        (of(65, 8), 2, 66),
        (of(128, 8, 4), 8, 16),
        # Fewer than `ENOUGH_PARTS` in one wave: several waves.
        (of(128, 8, 17), 34, ENOUGH_PARTS * 132 // 34),
        (of(128, 8, 1000), 2000, 1),
    ],
)
def test_programs_fill_the_slots(problem, lanes, parts):
    made = fitted(problem, 64, 64, 132, 3)
    assert made == Geometry(64, 64, lanes, parts, 3, problem.batch)


def test_parts_that_are_given_are_taken():
    assert fitted(of(16, 8), 64, 64, 132, 3, parts=7).parts == 7
    assert fitted(of(128, 8, 1000), 64, 64, 0, 3, parts=7).parts == 7


@pytest.mark.parametrize(("queries", "heads"), [(100, 16), (5000, 128), (3, 1), (0, 20)])
def test_ragged_lanes_are_few_and_groups_enough(queries, heads):
    problem = of(heads, 4, None, queries)
    made = fitted(problem, 64, 64, 132, 3)
    assert 1 <= made.lanes <= MAX_RAGGED_LANES
    for q_lens in ([queries, 0, 0, 0], [queries // 4] * 4):
        groups = sum(cdiv(n * heads, made.group_rows) for n in q_lens)
        assert groups <= made.max_groups


# -- which plans are followed


@pytest.mark.parametrize("label", ["8.0", "8.9", "9.0", "10.0", "gfx942"])
def test_portable_follows_every_plan_that_it_has_a_config_for(label):
    card = devices.from_label(label)
    for problem in (of(16, 64), of(128, 1), of(20, 8, None, 30), of(16, 8, 3)):
        own = decode_config.geometry(problem, card)
        assert decode_config.geometry(problem, card, like=own) == own
        for kv_tile in decode_config.KV_TILES:
            for row_tile in decode_config.ROW_TILES:
                like = fitted(problem, kv_tile, row_tile, 99, 3)
                followed = decode_config.geometry(problem, card, like=like)
                if decode_config.fits(row_tile, problem, card):
                    assert followed == like
                    config, _ = decode_config.choose(problem, card, row_tile)
                    assert decode_config.is_valid(config, problem, card, row_tile)[0]
                else:
                    assert followed == replace(own, parts=like.parts)


def test_row_tiles_fit_where_there_is_a_config():
    fit = {
        label: [rows for rows in (8, 16, 32, 48, 64, 128) if decode_config.fits(rows, PLAIN, card)]
        for label, card in ((label, devices.from_label(label)) for label in ("8.9", "9.0"))
    }
    assert fit == {"8.9": [16, 32], "9.0": [16, 32, 64]}
    single = replace(PLAIN, dtype=torch.float32)
    assert [rows for rows in (16, 32, 64) if decode_config.fits(rows, single, HOPPER)] == [16]


@pytest.mark.parametrize("changes", [{"kv_tile": 256}, {"row_tile": 48}, {"row_tile": 128}])
def test_of_a_plan_that_cannot_be_followed_the_parts_alone_are_taken(changes):
    own = decode_config.geometry(PLAIN, HOPPER)
    like = replace(own, parts=5, **changes)
    assert decode_config.geometry(PLAIN, HOPPER, like=like) == replace(own, parts=5)


@pytest.mark.parametrize("width", sm90_config.WIDTHS)
@pytest.mark.parametrize("page_size", [1, 7, 16, 48, 64])
@pytest.mark.parametrize("aligned", [True, False])
def test_portable_follows_the_hopper_kernels_plans(width, page_size, aligned):
    """So that a plan, made without a cache, serves one that the Hopper kernel does not take."""
    value, rope = width
    for heads in (17, 64, 128):
        for dtype in (torch.float16, torch.bfloat16):
            many = replace(
                compilation.problem(dtype, heads, page_size, (value, rope, value)), aligned=aligned
            )
            few = replace(many, batch=1, queries=1)
            for problem, storage in ((many, None), (many, ONE_SCALE), (few, ONE_SCALE)):
                planned = replace(problem.as_planned(), storage=storage)
                like = sm90_config.geometry(planned, HOPPER)
                assert decode_config.geometry(problem, HOPPER, like=like) == like
                config, _ = decode_config.choose(problem, HOPPER, like.row_tile)
                assert decode_config.is_valid(config, problem, HOPPER, like.row_tile)[0]


# -- what a plan knows of a problem


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"s_q": 3, "heads": 20},
        {"q_lens": (2, 0, 1)},
        {"rope": 0},
        {"latent": 448, "value_dim": 512},
        {"layout": "pair", "page_size": 16, "table": "csr", "strided": True, "causal": False},
        {"strided": 3, "dtype": torch.float32},
        {"stored": "fp8"},
        {"stored": "fp8", "rope": 0, "dtype": torch.float16},
        {"stored": "fp8_ds_mla", "page_size": 16, "q_lens": (2, 0, 1)},
        {"stored": "fp8_v4", "latent": 448, "value_dim": 512},
        {"stored": "fp8_v41", "latent": 448, "value_dim": 512, "table": "csr"},
    ],
    ids=str,
)
def test_a_problem_as_planned_is_what_a_plan_is_made_for(recipe):
    inputs = decode_inputs(kv_lens=[70, 3, 0], **recipe)
    q_nope, q_rope = inputs.q_nope, inputs.q_rope
    ragged = inputs.cu_seqlens_q is not None
    buffers = inputs.output_buffers()
    problem = validate.decode(
        q_nope, q_rope, *validate.unpack_cache(inputs.cache),
        *validate.unpack_page_table(inputs.page_table), inputs.kv_lens, inputs.cu_seqlens_q,
        buffers["out"], buffers["lse"], softmax_scale=1.0, causal=inputs.causal,
        value_dim=inputs.value_dim, max_kv_len=None, allow_tf32=False,
    )  # fmt: skip
    planned = validate_plan.plan(
        inputs.kv_lens, inputs.cu_seqlens_q, heads=q_nope.shape[-2], latent=q_nope.shape[-1],
        rope=0 if q_rope is None else q_rope.shape[-1], dtype=q_nope.dtype,
        s_q=1 if ragged else q_nope.shape[1], queries=q_nope.shape[0] if ragged else None,
        value_dim=inputs.value_dim, max_kv_len=None, parts=None, batch_invariant=False,
        cache_format=recipe.get("stored", "16bit"), impl=None,
    )  # fmt: skip
    assert problem.as_planned() == planned
    assert planned.as_planned() == planned


# -- plans of a cache's format


def quantised(heads: int, **changes: Any) -> dict[str, tuple[str, DecodeProblem]]:
    """(format, problem) of each form of a quantised cache that has the name of a format."""
    formats = {
        "fp8": "fp8", "fp8 pair": "fp8", "fp8 rope inside": "fp8", "groups": "fp8_ds_mla",
        "fp8_ds_mla": "fp8_ds_mla", "fp8_v4": "fp8_v4", "fp8_v41": "fp8_v41",
    }  # fmt: skip
    problems = compilation.quantised_problems(heads=heads)
    assert set(problems) == set(formats)
    return {
        form: (formats[form], replace(problem, **changes)) for form, problem in problems.items()
    }


def told(problem: DecodeProblem, cache_format: str) -> DecodeProblem:
    """What a plan is made for that is told the sizes of a call and a format."""
    return named.over(replace(problem, storage=None).as_planned(), cache_format)


@pytest.mark.parametrize("fixed", [0, 13])
@pytest.mark.parametrize("label", ["8.0", "8.9", "9.0", "10.0", "gfx942"])
@pytest.mark.parametrize("impl", [None, "portable", "sm90"])
def test_a_plan_that_knows_the_format_is_cut_as_a_call_is(impl, label, fixed):
    """By the same implementation into the same tiles and parts, whatever a plan leaves open."""
    card, differing = devices.from_label(label), 0
    for batch in (1, 3, 64, 128):
        sizes = {"batch": batch, "queries": batch, "fixed_pieces": fixed}
        for heads in (1, 16, 24, 33, 64, 128):
            for cache_format, problem in quantised(heads, **sizes).values():
                planned = told(problem, cache_format)
                if impl == "sm90" and select.why_not_sm90(problem, card, impl, None):
                    with pytest.raises(NotImplementedError):
                        cut(planned, card, impl, None)
                    continue
                name, _ = select.name_decode(problem, card, impl)
                own = select.CONFIGURED[name].geometry(problem, card)
                like = cut(planned, card, impl, None)
                assert like == own
                assert select.name_decode(planned, card, impl)[0] == name
                # What follows it is what runs without it.
                assert select.name_decode(problem, card, impl, like)[0] == name
                for other in (
                    replace(problem, page_size=128, page_slots=384, csr=True, causal=True),
                    replace(problem, page_size=16, page_slots=16, max_kv_len=77),
                ):
                    module = select.CONFIGURED[name]
                    assert module.geometry(other, card, like=like) == like
                    assert module.geometry(other, card) == like
                differing += like != cut(replace(planned, storage=None), card, impl, None)
    assert differing or label != "9.0", "a format that changes nothing here shows nothing"


@contextmanager
def storage_decides() -> Iterator[None]:
    """Inside, the interpreter cuts a quantised cache otherwise, as cards do."""
    rows, programs = decode_config.row_tile, decode_config.programs_per_sm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            decode_config, "row_tile",
            lambda problem, card: 32 if problem.storage is not None else rows(problem, card),
        )  # fmt: skip
        patch.setattr(
            decode_config, "programs_per_sm",
            lambda problem, card: 2 if problem.storage is not None else programs(problem, card),
        )  # fmt: skip
        forget()
        yield
    forget()


def forget() -> None:
    """How problems were cut."""
    operation.forget()
    known_cut.cache_clear()


@pytest.mark.parametrize(
    ("form", "batch_invariant"),
    [*((form, False) for form in FORMS), ("fp8 fused", True), ("656", True)],
)
def test_a_plan_that_knows_the_format_changes_no_bit(form, batch_invariant):
    longest = 1100 if batch_invariant else 450
    inputs = inputs_of(form, kv_lens=[longest, 0, 33], heads=4, s_q=1)
    arguments, options = inputs.call_arguments()
    options["batch_invariant"] = batch_invariant
    more = {"batch_invariant": True, "max_kv_len": longest} if batch_invariant else {}
    with storage_decides():
        plan = testing.plan_of(inputs, **more)
        unaware = testing.plan_of(inputs, cache_format="16bit", **more)
        assert plan.geometry.row_tile == 32
        assert plan.geometry.parts > 1
        assert unaware.geometry.row_tile == 16
        own = mla_triton.decode(*arguments, **options)
        planned = mla_triton.decode(*arguments, **options, plan=plan)
        testing.assert_same_bits(planned, own)
        testing.assert_within_budget(planned, inputs)
        other = mla_triton.decode(*arguments, **options, plan=unaware)
        testing.assert_within_budget(other, inputs)
        if not batch_invariant:
            assert not testing.same_bits(other, own), "the parts are others"


@pytest.mark.parametrize("recipe", [{}, {"stored": "fp8"}, {"stored": "fp8_ds_mla"}], ids=str)
def test_a_plan_of_another_format_is_followed(recipe):
    inputs = decode_inputs(kv_lens=[150, 40], heads=4, **recipe)
    with storage_decides():
        for cache_format in ("16bit", "fp8", "fp8_ds_mla"):
            check(inputs, testing.plan_of(inputs, cache_format=cache_format))


# -- results, as far as the interpreter has them


def cut_like_hopper(
    inputs: DecodeInputs,
    parts: int,
    tile: tuple[int, int] = (64, 64),
    storage: Storage | None = None,
    **more: Any,
) -> mla_triton.Plan:
    """A plan as it is cut on a Hopper card, for a cache of 16-bit keys or another: tiles of so many
    keys and rows."""
    q_nope = inputs.q_nope
    usual = mla_triton.plan(
        inputs.kv_lens,
        heads=q_nope.shape[-2],
        latent=q_nope.shape[-1],
        rope=inputs.q_rope.shape[-1],
        dtype=q_nope.dtype,
        **more,
    )
    geometry = sm90_config.geometry(replace(usual.problem, storage=storage), HOPPER, parts)
    assert (geometry.kv_tile, geometry.row_tile) == tile
    made = mla_triton.Plan(
        usual.problem, geometry, *buffers(usual.problem, geometry, q_nope.device)
    )
    made.update(inputs.kv_lens, inputs.cu_seqlens_q)
    return made


def check(inputs: DecodeInputs, plan: mla_triton.Plan) -> None:
    arguments, options = inputs.call_arguments()
    for impl in (None, "portable"):
        state = mla_triton.decode(*arguments, **options, plan=plan, impl=impl)
        testing.assert_within_budget(state, inputs)


@pytest.mark.parametrize("parts", [1, 3, 9])
@pytest.mark.parametrize(
    "recipe",
    [
        {"heads": 20},
        {"heads": 128},
        {"heads": 17, "page_size": 1},
        {"heads": 70, "page_size": 48, "table": "csr"},
        {"heads": 33, "s_q": 3, "page_size": 16},
        {"heads": 24, "s_q": 2, "layout": "pair", "strided": 3},
        {"heads": 32, "dtype": torch.float16, "causal": False, "page_size": 96},
    ],
    ids=str,
)
def test_portable_over_a_plan_for_hopper(recipe, parts):
    """Also with the caches that the Hopper kernel does not take."""
    inputs = decode_inputs(kv_lens=[330, 0, 97, 64, 1, 129], **SMALL, **recipe)
    check(inputs, cut_like_hopper(inputs, parts, s_q=recipe.get("s_q", 1)))


@pytest.mark.parametrize("parts", [1, 3, 9])
@pytest.mark.parametrize(("heads", "rows"), [(5, 16), (20, 32)])
def test_portable_over_a_plan_for_few_requests_of_e4m3_keys(heads, rows, parts):
    """Which have SMs to themselves, and so tiles of twice as many keys."""
    inputs = decode_inputs(kv_lens=[330, 0, 97, 700], heads=heads, **SMALL)
    check(inputs, cut_like_hopper(inputs, parts, (128, rows), ONE_SCALE))


@pytest.mark.parametrize("parts", [1, 5])
def test_portable_over_a_ragged_plan_for_hopper(parts):
    q_lens = (3, 2, 0, 20, 1)
    inputs = decode_inputs(kv_lens=[330, 97, 64, 40, 129], q_lens=q_lens, heads=12, **SMALL)
    more = {"cu_seqlens_q": inputs.cu_seqlens_q, "queries": sum(q_lens)}
    check(inputs, cut_like_hopper(inputs, parts, **more))


@pytest.mark.parametrize("block_n", [16, 32, 64, 128])
@pytest.mark.parametrize("page_size", [64, 16])
def test_any_block_size_over_a_plan_for_hopper(monkeypatch, block_n, page_size):
    """The keys around whole blocks are taken in steps of 32, or of a block that is smaller."""
    asked = []

    def choose(problem: DecodeProblem, device: devices.Device, rows: int) -> tuple[Config, str]:
        asked.append(rows)
        return Config(block_n, 4, 1), "as the test says"

    monkeypatch.setattr(portable, "choose", choose)
    operation.prepare.cache_clear()
    inputs = decode_inputs(kv_lens=[330, 97, 40, 31], heads=20, page_size=page_size, **SMALL)
    try:
        check(inputs, cut_like_hopper(inputs, 9))
    finally:
        operation.prepare.cache_clear()
    assert set(asked) == {64}


def test_float32_does_not_follow_it():
    """One row tile of its own: the call says what is wrong with the plan."""
    inputs = decode_inputs(kv_lens=[70, 3], heads=20, dtype=torch.float32, **SMALL)
    plan = cut_like_hopper(inputs, 3)
    arguments, options = inputs.call_arguments()
    with pytest.raises(ValueError, match="plan must be cut as portable cuts") as error:
        mla_triton.decode(*arguments, **options, plan=plan)
    assert str(error.value) == (
        "plan must be cut as portable cuts this call, by kv_tile 32, row_tile 16, lanes 2, "
        "overhead 4, got kv_tile 64, row_tile 64, lanes 1, overhead 5"
    )
