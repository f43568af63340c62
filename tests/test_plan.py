"""The schedule: its definition in integers, and its device twin held against that."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mla_triton import device as devices
from mla_triton.kernels.common import schedule as device_schedule
from mla_triton.kernels.common.launch import Launcher
from mla_triton.plan import (
    FIXED_LEAST,
    FIXED_UNIT,
    SNAP_LIMIT,
    SPLIT_STEPS,
    TOLERANCE_PERCENT,
    Geometry,
    Group,
    Part,
    Schedule,
    cdiv,
    fitted,
    fixed_piece,
    fixed_pieces,
    schedule,
)
from mla_triton.testing import compilation

CARD = devices.INTERPRETER

lengths = st.one_of(st.integers(-3, 300), st.integers(0, 200_000))
requests = st.lists(st.tuples(lengths, st.integers(0, 5)), min_size=1, max_size=40)


def geometry(
    parts: int, *, lanes: int = 1, overhead: int = 4, max_groups: int = 10_000, fixed: bool = False
) -> Geometry:
    return Geometry(32, 16, lanes, parts, overhead, max_groups, fixed)


def pieces(made: Schedule, tiles: list[int]) -> dict[int, list[tuple[int, int, int]]]:
    """(part, first tile, end) of every piece of every group, in order of the parts."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    for number, part in enumerate(made.parts):
        for group in range(part.first_group, part.last_group + (part.last_tile > 0)):
            begin = part.first_tile if group == part.first_group else 0
            whole = tiles[made.groups[group].request]
            end = part.last_tile if group == part.last_group else whole
            found.setdefault(group, []).append((number, begin, end))
    return found


def tiles_of(kv_lens: list[int], shape: Geometry) -> list[int]:
    return [cdiv(max(0, n), shape.kv_tile) for n in kv_lens]


@settings(max_examples=300)
@given(
    requests,
    st.integers(1, 20),
    st.integers(1, 300),
    st.integers(1, 8),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
)
def test_every_tile_of_every_group_once_in_order(batch, heads, parts, overhead, lanes, fixed):
    kv_lens, q_lens = [keys for keys, _ in batch], [queries for _, queries in batch]
    shape = geometry(parts, lanes=lanes, overhead=overhead, fixed=fixed)
    if fixed:
        parts = parts_for(kv_lens, q_lens, heads, shape)
        shape = replace(shape, parts=parts)
    made = schedule(kv_lens, q_lens, heads, shape)
    tiles = tiles_of(kv_lens, shape)

    assert len(made.parts) == parts
    expected_groups = [
        (b, i) for b, n in enumerate(q_lens) for i in range(cdiv(n * heads, shape.group_rows))
    ]
    assert [(g.request, g.index) for g in made.groups] == expected_groups
    ends = [(part.last_group, part.last_tile) for part in made.parts]
    begins = [(part.first_group, part.first_tile) for part in made.parts]
    assert begins == [(0, 0), *ends[:-1]]
    assert ends[-1] == (len(made.groups), 0)
    assert all(begin <= end for begin, end in zip(begins, ends, strict=True))

    found = pieces(made, tiles)
    assert sorted(found) == list(range(len(made.groups)))
    for number, group in enumerate(made.groups):
        mine, whole = found[number], tiles[group.request]
        assert mine[0][1] == 0
        assert mine[-1][2] == whole
        assert all(before[2] == after[1] for before, after in pairwise(mine))
        assert all(begin < end for _, begin, end in mine) or whole == 0
        assert len(mine) == group.splits
        if group.splits > 1:
            parts_of = [part for part, _, _ in mine]
            assert parts_of == list(range(group.first_part, group.first_part + group.splits))


@settings(max_examples=300)
@given(requests, st.integers(2, 300), st.integers(1, 8))
def test_two_partial_slots_a_part_are_enough(batch, parts, overhead):
    kv_lens, q_lens = [keys for keys, _ in batch], [queries for _, queries in batch]
    shape = geometry(parts, overhead=overhead)
    made = schedule(kv_lens, q_lens, 16, shape)
    tiles = tiles_of(kv_lens, shape)
    slots = [
        2 * part + (begin == 0)
        for group, mine in pieces(made, tiles).items()
        if made.groups[group].splits > 1
        for part, begin, _ in mine
    ]
    assert len(slots) == len(set(slots))


def parts_for(kv_lens: list[int], q_lens: list[int], heads: int, shape: Geometry) -> int:
    """As many as are enough for fixed pieces, whatever the lengths are."""
    groups = sum(cdiv(queries * heads, shape.group_rows) for queries in q_lens)
    return max(1, groups * fixed_pieces(max(0, *kv_lens, 0)))


@settings(max_examples=300)
@given(st.lists(lengths, min_size=1, max_size=10), st.sampled_from([32, 64, 128]))
def test_fixed_pieces_depend_on_a_request_alone(kv_lens, kv_tile):
    """Whatever else is in the batch, and whichever tiles lengths are counted in."""
    shape = replace(geometry(1, fixed=True), kv_tile=kv_tile)

    def cuts(lens: list[int]) -> list[list[int]]:
        """The keys at which each request's pieces begin."""
        ones = [1] * len(lens)
        made = schedule(lens, ones, 16, replace(shape, parts=parts_for(lens, ones, 16, shape)))
        found = pieces(made, tiles_of(lens, shape)).values()
        return [[begin * kv_tile for _, begin, _ in mine] for mine in found]

    for length, cut in zip(kv_lens, cuts(kv_lens), strict=True):
        (alone,) = cuts([length])
        assert cut == alone
        assert all(begin % FIXED_UNIT == 0 for begin in cut)
        distances = {end - begin for begin, end in pairwise(cut)}
        assert len(distances) <= 1
        assert all(distance >= FIXED_LEAST * FIXED_UNIT for distance in distances)


@settings(max_examples=1000)
@given(st.integers(1, 2**31 - 1), st.sampled_from([32, 64, 128]))
@example(4097, 32)
@example(2**31 - 1, 32)
def test_no_shorter_request_has_more_fixed_pieces(keys, kv_tile):
    tiles = cdiv(keys, kv_tile)
    count = cdiv(tiles, fixed_piece(tiles, kv_tile))
    assert count <= fixed_pieces(keys) <= fixed_pieces(keys + 1)
    if keys >= 4096:
        assert fixed_pieces(keys) <= 2 * (keys / FIXED_UNIT) ** 0.5


def test_more_fixed_pieces_than_a_grid_has_room_for_are_refused():
    one = replace(compilation.problem(), batch=1000, queries=1000)
    fitted(replace(one, fixed_pieces=65), 64, 16, 132, 4)
    message = (
        "max_kv_len must leave at most 65535 pieces where batch_invariant is set, "
        "got 1000 groups of up to 66"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        fitted(replace(one, fixed_pieces=66), 64, 16, 132, 4)


def cost(part: Part, made: Schedule, tiles: list[int], overhead: int) -> int:
    """Tiles of a part and `overhead` for every group it begins or goes on with."""
    total = 0
    for group in range(part.first_group, part.last_group + (part.last_tile > 0)):
        begin = part.first_tile if group == part.first_group else 0
        whole = tiles[made.groups[group].request]
        total += overhead + (part.last_tile if group == part.last_group else whole) - begin
    return total


@settings(max_examples=300)
@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=200), st.integers(1, 300))
@example([100] * 300 + [200_000], 264)
@example([1] * 500, 132)
def test_no_part_is_far_above_the_mean(kv_lens, parts):
    shape = geometry(parts)
    made = schedule(kv_lens, [1] * len(kv_lens), 16, shape)
    tiles = tiles_of(kv_lens, shape)
    total = sum(tiles) + shape.overhead * len(tiles)
    longest = max(tiles)
    floor = next(t for t in range(1, SPLIT_STEPS + 1) if 32 * t * t >= longest or t == 64)
    mean = max(cdiv(total, parts), floor + shape.overhead)
    # 15 % for whole or even pieces, or a snap at either end, and a step of two tiles.
    bound = mean * TOLERANCE_PERCENT / 100 + 2 * SNAP_LIMIT * (mean >= 16) + 2
    # A part that goes on with a group pays for it again: the line counts a group's overhead once.
    worst = max(cost(part, made, tiles, shape.overhead) for part in made.parts)
    assert worst <= bound + shape.overhead


@pytest.mark.parametrize(
    ("batch", "kv_len", "parts", "splits"),
    [
        (1, 1024, 132, 32),
        (1, 4096, 132, 64),
        (1, 16384, 132, 128),
        (16, 4096, 264, 16),
        (128, 4096, 264, 2),
        (1024, 512, 264, 1),
    ],
)
def test_an_even_batch_is_cut_evenly(batch, kv_len, parts, splits):
    shape = geometry(parts)
    made = schedule([kv_len] * batch, [1] * batch, 16, shape)
    assert {group.splits for group in made.groups} == {splits}
    sizes = {
        end - begin
        for mine in pieces(made, tiles_of([kv_len] * batch, shape)).values()
        for _, begin, end in mine
    }
    assert len(sizes) == 1


def run_device_schedule(
    kv_lens: list[int], q_lens: list[int] | None, heads: int, shape: Geometry, s_q: int = 1
) -> Schedule:
    """The device twin's schedule; ragged where `q_lens` are given."""
    batch = len(kv_lens)
    bounds = list(accumulate(q_lens or [s_q] * batch, initial=0))
    ragged = q_lens is not None
    cu_seqlens_q = torch.tensor(bounds, dtype=torch.int32) if ragged else None
    result = torch.full((device_schedule.result_size(shape),), -7, dtype=torch.int32)
    device_schedule.launch(
        Launcher(
            device_schedule.variant(batch, ragged, shape.kv_tile, CARD, shape.fixed), CARD, None
        ),
        shape,
        batch,
        0 if ragged else s_q,
        bounds[-1],
        heads,
        2**31 - 1,
        torch.tensor(kv_lens, dtype=torch.int32),
        cu_seqlens_q,
        result,
    )
    count, _, *values = result.tolist()
    cuts, rows = values[: 2 * (shape.parts + 1)], values[2 * (shape.parts + 1) :]
    return Schedule(
        tuple(Part(*cuts[2 * p : 2 * p + 4]) for p in range(shape.parts)),
        tuple(Group(*rows[4 * g : 4 * g + 4]) for g in range(count)),
    )


@settings(max_examples=25)
@given(
    st.lists(st.tuples(lengths, st.integers(0, 5)), min_size=1, max_size=12),
    st.booleans(),
    st.integers(1, 20),
    st.integers(1, 24),
    st.integers(1, 6),
    st.booleans(),
)
@example([(200_000, 1), (0, 1), (-5, 1)], False, 16, 24, 4, False)
@example([(1000, 5), (0, 0), (70_000, 2)], True, 20, 9, 4, False)
@example([(1000, 5), (0, 0), (70_000, 2)], True, 20, 130, 4, True)
@example([(2**31 - 1, 1), (2**20, 1), (4097, 1), (1024, 1)], False, 16, 24, 4, True)
def test_device_twin_gives_the_same_schedule(batch, ragged, heads, parts, overhead, fixed):
    kv_lens = [keys for keys, _ in batch]
    q_lens = [queries for _, queries in batch] if ragged else None
    lanes = 1 if ragged else cdiv(heads, 16)
    queries = sum(q_lens) if q_lens is not None else len(batch)
    max_groups = len(batch) + queries * heads // (16 * lanes)
    shape = geometry(parts, lanes=lanes, overhead=overhead, max_groups=max_groups, fixed=fixed)
    expected = schedule(kv_lens, q_lens or [1] * len(batch), heads, shape)
    assert run_device_schedule(kv_lens, q_lens, heads, shape) == expected


def test_device_twin_adds_up_more_requests_than_a_block():
    kv_lens = [(37 * i) % 900 for i in range(1500)]
    shape = geometry(3, max_groups=1500)
    expected = schedule(kv_lens, [1] * 1500, 16, shape)
    assert run_device_schedule(kv_lens, None, 16, shape) == expected


@pytest.mark.parametrize("offsets", [[0, 2**30, -9, 3], [0, 4, 0, 4]], ids=["wild", "twice"])
def test_device_twin_stays_in_bounds_on_broken_cu_seqlens(offsets):
    """Query bounds that fall and exceed the batch write nothing past the schedule's end, and name
    no group past its last row."""
    shape = geometry(4, max_groups=3)
    size = device_schedule.result_size(shape)
    guarded = torch.full((size + 64,), -7, dtype=torch.int32)
    device_schedule.launch(
        Launcher(device_schedule.variant(3, True, 32, CARD), CARD, None),
        shape,
        3,
        0,
        4,
        16,
        2**31 - 1,
        torch.tensor([10, 2**31 - 1, 3000], dtype=torch.int32),
        torch.tensor(offsets, dtype=torch.int32),
        guarded,
    )
    assert (guarded[size:] == -7).all()
    groups, tiles = guarded[2 : 2 + 2 * 5].view(-1, 2).unbind(1)
    assert ((groups >= 0) & (groups <= 3)).all()
    assert (tiles[groups == 3] == 0).all(), "a tile of a group that has no row"
