"""The Hopper kernel over e4m3 keys as far as a machine without one can see it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mla_triton import device as devices
from mla_triton import select
from mla_triton.kernels.common.launch import Variant
from mla_triton.kernels.sm90 import decode
from mla_triton.kernels.sm90.decode import Config
from mla_triton.plan import Geometry
from mla_triton.problem import DecodeProblem, Storage
from mla_triton.testing import compilation
from mla_triton.tuning import workers
from mla_triton.tuning.workers import Job

CARD = devices.from_label("9.0")
ONE_SCALE = Storage(None, 0, torch.float32, 0)
TOKEN_SCALES = Storage(torch.bfloat16, 128, torch.float32, 164)


def problem(heads: int = 16, **changes: object) -> DecodeProblem:
    page_size = changes.pop("page_size", 64)
    dimensions = changes.pop("dimensions", (512, 64, 512))
    plain = compilation.problem(heads=heads, page_size=page_size, dimensions=dimensions)
    return replace(plain, **({"storage": ONE_SCALE} | changes))


PROBLEMS = {
    "16 rows": problem(),
    "32 rows": problem(32),
    "64 rows": problem(64),
    "float16": problem(dtype=torch.float16),
    "causal": problem(8, s_q=2, queries=128, causal=True),
    "ragged": problem(s_q=None, causal=True, csr=True),
    "pages of 16": problem(page_size=16),
    "pages of 128": problem(page_size=128),
    "without rotary keys": problem(dimensions=(512, 0, 512)),
    "narrow": problem(64, dimensions=(256, 64, 256)),
}
SPILLED = {64: 256}
"""Bytes of stack a thread by rows: 64 of them take more registers than there are."""
FEW_BYTES = 64


def variant(given: DecodeProblem, like: Geometry | None = None) -> Variant:
    return decode.variant(given, Config(1), decode.geometry(given, CARD, like=like), CARD)


@pytest.fixture(scope="module")
def compiled() -> dict[str, workers.Compiled]:
    names = list(PROBLEMS)
    jobs = [Job(variant(PROBLEMS[name]), CARD, with_spills=True) for name in names]
    return {names[number]: answer for number, answer in workers.run(jobs)}


def test_it_compiles_for_every_problem(compiled):
    assert len(compiled) == len(PROBLEMS)
    assert {name: answer.error for name, answer in compiled.items() if answer.error} == {}


def test_one_program_fits_an_sm(compiled):
    for name, answer in compiled.items():
        assert 90_000 < answer.shared_memory <= CARD.shared_memory, name


def test_little_spills(compiled):
    for name, answer in compiled.items():
        rows = decode.geometry(PROBLEMS[name], CARD).row_tile
        assert answer.spilled <= SPILLED.get(rows, FEW_BYTES), name


def ptx_of(name: str) -> str:
    return variant(PROBLEMS[name]).compile(CARD).asm["ptx"]


@pytest.fixture(scope="module")
def ptx() -> str:
    [text] = compilation.side_by_side(ptx_of, ["16 rows"])
    return text


def test_bytes_become_operands_in_registers(ptx):
    """As many conversions as a block has pairs of numbers for a thread, once for each product, and
    no 16-bit tile on its way back to shared memory."""
    pairs = 128 * (512 + 64) // 256 // 2 + 128 * 512 // 256 // 2
    assert ptx.count("cvt.rn.f16x2.e4m3x2") == pairs
    first, last = ptx.index("cvt.rn.f16x2.e4m3x2"), ptx.rindex("cvt.rn.f16x2.e4m3x2")
    stores = [line for line in ptx[first:last].splitlines() if "st.shared.v4" in line]
    # What is cleared past the last key.
    assert len(stores) <= 8 * 4


def test_products_are_of_sixteen_queries(ptx):
    assert ptx.count("wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16") == 36 + 32
    assert ptx.count("wgmma.mma_async") == 36 + 32


# -- what it takes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"storage": TOKEN_SCALES},
            "of quantised caches it reads those with one scale for all latents",
        ),
        (
            {"page_size": 48},
            "e4m3 keys come by TMA, from evenly spaced pages of 16, 32 or a multiple of 64",
        ),
        (
            {"page_slots": 0},
            "e4m3 keys come by TMA, from evenly spaced pages of 16, 32 or a multiple of 64",
        ),
        (
            {"dimensions": (448, 64, 512)},
            "its queries come in one tensor where no key column is behind the value",
        ),
    ],
)
def test_what_it_does_not_take(changes, reason):
    given = problem(**changes)
    assert decode.why_not(given, CARD) == reason
    assert select.name_decode(given, CARD)[0] == "portable"


@pytest.mark.parametrize(("heads", "rows"), [(1, 16), (16, 16), (17, 32), (33, 64), (128, 64)])
def test_it_comes_first_with_a_tile_for_the_rows(heads, rows):
    given = problem(heads)
    assert select.name_decode(given, CARD)[0] == "sm90"
    assert decode.geometry(given, CARD).row_tile == rows


@pytest.mark.parametrize("heads", [4, 16, 32, 128])
@pytest.mark.parametrize("impl", ["sm90", "portable"])
def test_it_follows_every_plan_that_knows_no_storage(impl, heads):
    given = problem(heads)
    planned = given.as_planned()
    if impl == "portable":
        from mla_triton.kernels.portable import decode as other
    else:
        other = decode
    like = other.geometry(planned, CARD)
    assert select.name_decode(given, CARD, None, like)[0] == "sm90"
    followed = decode.geometry(given, CARD, like=like)
    assert (followed.kv_tile, followed.row_tile, followed.parts) == (
        like.kv_tile, like.row_tile, like.parts,
    )  # fmt: skip
    made = variant(given, like)
    assert dict(made.constants)["ROWS"] == like.row_tile
    assert dict(made.constants)["TILE"] == like.kv_tile


def test_a_box_does_not_leave_the_tile_that_a_part_may_begin_at():
    planned = problem(4).as_planned()
    from mla_triton.kernels.portable import decode as other

    like = other.geometry(planned, CARD)
    assert like.kv_tile == 32
    types = dict(variant(problem(4), like).types)
    assert "fp8e4nv[32, 512]" in types["latent_map"]
    assert "fp8e4nv[64, 512]" in dict(variant(problem(4)).types)["latent_map"]


@pytest.mark.parametrize(
    ("config", "rows", "answer"),
    [
        (Config(1), None, (True, "one program an SM")),
        (Config(1), 32, (True, "one program an SM")),
        (Config(1), 128, (False, "its tile has 16 or 32 or 64 rows, got 128")),
        (
            Config(2),
            None,
            (False, "of e4m3 keys both warpgroups have one block in hand, blocks = 1"),
        ),
    ],
)
def test_which_configs_are_valid(config, rows, answer):
    assert decode.is_valid(config, problem(), CARD, rows) == answer
