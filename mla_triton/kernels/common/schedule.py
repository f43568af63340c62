"""The schedule of `mla_triton.plan`, made on the device: one program a cut, no serial loop over
parts.

What: kv_lens (and cu_seqlens_q) -> where the line of groups is cut, and which parts hold a group.
Where: every GPU. Work: program p <= parts computes cut p, which ends part p - 1 and begins part p;
the programs after them write the groups of `BLOCK_B` requests each. Every program adds up all
requests for itself (prefix sums over blocks of `BLOCK_B`), so none waits for another. Budget: no
shared memory but what the reductions take.

`mla_triton.plan.schedule` is the definition, and the names here are its names. Sums are int64: no
lengths that an engine could pass overflow them.

Layout of the result, int32: [number of groups, 0]; then [group, tile] of each of the parts + 1
cuts; then [request, index, splits, first part] of each group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mla_triton.device import Device
from mla_triton.kernels.common.launch import Launch, Variant
from mla_triton.kernels.common.paged import request_keys
from mla_triton.kernels.common.rows import request_queries
from mla_triton.plan import (
    FIXED_LEAST,
    FIXED_UNIT,
    SNAP_LIMIT,
    SPLIT_BALANCE,
    SPLIT_STEPS,
    TOLERANCE_PERCENT,
    Geometry,
    cdiv,
)

HEADER = tl.constexpr(2)
CUT = tl.constexpr(2)
GROUP = tl.constexpr(4)
TOLERANCE = tl.constexpr(TOLERANCE_PERCENT)
BALANCE = tl.constexpr(SPLIT_BALANCE)
STEPS = tl.constexpr(SPLIT_STEPS)
SNAP = tl.constexpr(SNAP_LIMIT)
UNIT_KEYS = tl.constexpr(FIXED_UNIT)
LEAST_UNITS = tl.constexpr(FIXED_LEAST)

BLOCKS = {32: 1, 128: 1, 512: 4, 2048: 16}
"""Warps by the requests of a block: up to four requests a thread. A larger batch takes several of
the largest blocks."""

ARGUMENTS = (
    ("kv_lens", "*i32"),
    ("cu_seqlens_q", "*i32"),
    ("result", "*i32"),
    ("batch", "i32"),
    ("s_q", "i32"),
    ("queries", "i32"),
    ("heads", "i32"),
    ("max_kv_len", "i32"),
    ("parts", "i32"),
    ("group_rows", "i32"),
    ("overhead", "i32"),
    ("max_groups", "i32"),
)


@triton.jit
def request_sizes(
    kv_lens, cu_seqlens_q, requests, batch, s_q, queries, heads, max_kv_len, group_rows,
    KV_TILE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """(tiles, groups) of a block of requests, int32; a request past the batch has no group."""
    inside = requests < batch
    safe = tl.where(inside, requests, 0)
    keys = request_keys(kv_lens, safe, max_kv_len)
    tiles = keys // KV_TILE + (keys % KV_TILE > 0).to(tl.int32)
    if RAGGED:
        _, tokens = request_queries(cu_seqlens_q, safe, s_q, queries, RAGGED)
        rows = tokens * heads
        groups = rows // group_rows + (rows % group_rows > 0).to(tl.int32)
    else:
        groups = tl.full(requests.shape, 1, tl.int32)
    return tiles, tl.where(inside, groups, 0)


@triton.jit
def divide(numerator, denominator, is_narrow):
    """Non-negative `numerator // denominator`, int64; in 32 bits where `is_narrow` says they fit.

    A division of 64 bits is a subroutine of a hundred instructions, and a batch that needs one has
    more than 2**30 tiles.
    """
    if is_narrow:
        quotient = (numerator.to(tl.int32) // denominator.to(tl.int32)).to(tl.int64)
    else:
        quotient = numerator // denominator
    return quotient


@triton.jit
def shortest_piece(longest):
    """1 + the number of t in [1, STEPS) with BALANCE * t * t < longest; int32."""
    # From above: the square root may be off by its last bit.
    t = tl.minimum(tl.sqrt(longest.to(tl.float32) / BALANCE).to(tl.int32) + 2, STEPS - 1)
    for _ in tl.static_range(3):
        t -= ((t > 0) & (BALANCE * t * t >= longest)).to(tl.int32)
    return 1 + t


@triton.jit
def fixed_piece(tiles, KV_TILE: tl.constexpr):
    """The smallest p of at least LEAST_UNITS with p * p >= 2 * units, in tiles."""
    EACH: tl.constexpr = UNIT_KEYS // KV_TILE
    doubled = 2 * (tiles // EACH + (tiles % EACH > 0).to(tl.int32))
    # From above: the square root may be off by its last bit.
    piece = tl.sqrt(doubled.to(tl.float32)).to(tl.int32) + 2
    for _ in tl.static_range(3):
        piece -= ((piece - 1) * (piece - 1) >= doubled).to(tl.int32)
    return tl.maximum(piece, LEAST_UNITS) * EACH


@triton.jit
def even_pieces(tiles, target, KV_TILE: tl.constexpr, FIXED: tl.constexpr):
    """(piece before it is made even, piece, number of pieces) of a group under the even cut, or
    under the fixed one."""
    if FIXED:
        fixed = fixed_piece(tiles, KV_TILE)
        return fixed, fixed, tl.maximum((tiles + fixed - 1) // fixed, 1)
    wanted = tl.maximum(tiles // target, 1)
    exact = tl.maximum((tiles + wanted - 1) // wanted, 1)
    piece = tl.where(exact > 2, exact + exact % 2, exact)
    return exact, piece, tl.maximum((tiles + piece - 1) // piece, 1)


@triton.jit
def highest_offset(tiles, margin, step):
    """The last tile offset at which a packed cut still falls inside a group; `step` is 1 or 2."""
    # The mask rounds down also below zero, where a division would round towards it.
    return tl.minimum(((tiles - margin) & -step) + step, tiles) - 1


@triton.jit
def schedule_kernel(
    kv_lens, cu_seqlens_q, result,
    batch, s_q, queries, heads, max_kv_len, parts, group_rows, overhead, max_groups,
    KV_TILE: tl.constexpr, RAGGED: tl.constexpr, BLOCK_B: tl.constexpr, ONE_BLOCK: tl.constexpr,
    FIXED: tl.constexpr, PROGRAMMATIC: tl.constexpr,
):  # fmt: skip
    # The lengths are there now. Decode waits for this kernel's end before it reads the result.
    if PROGRAMMATIC:
        gdc_wait()
        gdc_launch_dependents()
    program = tl.program_id(0)
    block = tl.arange(0, BLOCK_B)
    blocks = 1 if ONE_BLOCK else tl.cdiv(batch, BLOCK_B)

    work = tl.zeros([], tl.int64)
    longest = tl.zeros([], tl.int32)
    count = tl.zeros([], tl.int64)
    for number in range(blocks):
        tiles, groups = request_sizes(
            kv_lens, cu_seqlens_q, number * BLOCK_B + block, batch, s_q, queries, heads,
            max_kv_len, group_rows, KV_TILE, RAGGED,
        )  # fmt: skip
        work += tl.sum(groups.to(tl.int64) * tiles, 0)
        longest = tl.maximum(longest, tl.max(tl.where(groups > 0, tiles, 0), 0))
        if RAGGED:
            count += tl.sum(groups.to(tl.int64), 0)
    if not RAGGED:
        count += batch
    packed_length = work + count * overhead
    is_narrow = packed_length < 2**30
    floor = shortest_piece(longest)
    target = tl.maximum(floor, divide(work + (parts - 1), parts, is_narrow))
    # No request has as many tiles as that: past it, the target is the same to all of them.
    near_target = tl.minimum(target, 2**30).to(tl.int32)

    worst_piece = tl.zeros([], tl.int32)
    pieces_used = tl.zeros([], tl.int64)
    for number in range(blocks):
        tiles, groups = request_sizes(
            kv_lens, cu_seqlens_q, number * BLOCK_B + block, batch, s_q, queries, heads,
            max_kv_len, group_rows, KV_TILE, RAGGED,
        )  # fmt: skip
        exact, _, splits = even_pieces(tiles, near_target, KV_TILE, FIXED)
        worst_piece = tl.maximum(worst_piece, tl.max(tl.where(groups > 0, exact, 0), 0))
        pieces_used += tl.sum(groups.to(tl.int64) * splits, 0)
    limit = tl.maximum(target + 1, target * TOLERANCE // 100)
    even = (worst_piece <= limit) & (pieces_used <= parts)
    if FIXED:
        even = pieces_used >= 0

    size = tl.maximum(divide(packed_length + (parts - 1), parts, is_narrow), floor + overhead)
    largest = tl.where(count > 0, longest + overhead, 0)
    whole = divide(count + (parts - 1), parts, is_narrow) * largest
    size = tl.where(whole * 100 <= size * TOLERANCE, tl.maximum(whole, 1), size)
    size = tl.where(even, 1, size)
    is_narrow &= size < 2**30
    step = tl.where(size > 4, 2, 1)
    margin = tl.maximum(tl.minimum(size // 16, SNAP), 1).to(tl.int32)
    lowest = margin + (margin & (step - 1))

    is_cut = program <= parts
    position = program * size
    own_block = program - parts - 1
    line = tl.zeros([], tl.int64)
    groups_so_far = tl.zeros([], tl.int64)
    cut_unit = tl.zeros([], tl.int32)
    cut_before = tl.zeros([], tl.int64)
    cut_groups = tl.zeros([], tl.int64)
    cut_tiles = tl.zeros([], tl.int32)
    cut_piece = tl.zeros([], tl.int32)
    for number in range(blocks):
        requests = number * BLOCK_B + block
        tiles, groups = request_sizes(
            kv_lens, cu_seqlens_q, requests, batch, s_q, queries, heads, max_kv_len,
            group_rows, KV_TILE, RAGGED,
        )  # fmt: skip
        _, piece, splits = even_pieces(tiles, near_target, KV_TILE, FIXED)
        unit = tl.where(even, splits, tiles + overhead)
        length = groups.to(tl.int64) * unit
        before = line + tl.cumsum(length, 0) - length
        if RAGGED:
            groups_before = groups_so_far + tl.cumsum(groups.to(tl.int64), 0) - groups
        else:
            groups_before = requests.to(tl.int64)
        line += tl.sum(length, 0)
        groups_so_far += tl.sum(groups.to(tl.int64), 0)
        if is_cut:
            found = (before <= position) & (position < before + length)
            cut_unit += tl.sum(tl.where(found, unit, 0), 0)
            cut_before += tl.sum(tl.where(found, before, 0), 0)
            cut_groups += tl.sum(tl.where(found, groups_before, 0), 0)
            cut_tiles += tl.sum(tl.where(found, tiles, 0), 0)
            cut_piece += tl.sum(tl.where(found, piece, 0), 0)
        elif number == own_block:
            rows = result + HEADER + CUT * (parts + 1)
            for index in range(tl.max(groups, 0)):
                place = before + index * unit.to(tl.int64)
                first = divide(place + (overhead + lowest + size - 1), size, is_narrow)
                highest = highest_offset(tiles, margin, step)
                last = divide(place + (overhead + highest), size, is_narrow)
                cuts = tl.where(even, splits - 1, tl.maximum(last - first + 1, 0))
                first_part = tl.where(cuts > 0, tl.where(even, place, first - 1), 0)
                row = rows + (groups_before + index) * GROUP
                mask = (index < groups) & (groups_before + index < max_groups)
                tl.store(row, requests, mask=mask)
                tl.store(row + 1, index, mask=mask)
                tl.store(row + 2, (cuts + 1).to(tl.int32), mask=mask)
                tl.store(row + 3, first_part.to(tl.int32), mask=mask)

    if is_cut:
        past = position >= line
        unit = tl.maximum(cut_unit, 1).to(tl.int64)
        index = divide(tl.where(past, 0, position - cut_before), unit, is_narrow)
        group = cut_groups + index
        tile = (position - cut_before - index * unit).to(tl.int32)
        packed_tile = tile - overhead
        inside = packed_tile >= lowest
        after = inside & (packed_tile > highest_offset(cut_tiles, margin, step))
        packed_tile = tl.where(inside & ~after, packed_tile & -step, 0)
        group = tl.where(even, group, group + after.to(tl.int64))
        tile = tl.where(even, tile * cut_piece, packed_tile)
        group = tl.where(past, count, group)
        # Offsets that lie may ask for more groups than there are rows: none is cut then.
        past |= group >= max_groups
        tl.store(result + HEADER + CUT * program, tl.minimum(group, max_groups).to(tl.int32))
        tl.store(result + HEADER + CUT * program + 1, tl.where(past, 0, tile))
        if program == 0:
            tl.store(result, tl.minimum(count, max_groups).to(tl.int32))


def result_size(geometry: Geometry) -> int:
    """int32 elements of a schedule."""
    cuts = CUT.value * (geometry.parts + 1)
    return HEADER.value + cuts + GROUP.value * geometry.max_groups


def block_of(batch: int) -> int:
    return next((block for block in BLOCKS if batch <= block), max(BLOCKS))


def variant(batch: int, ragged: bool, kv_tile: int, device: Device, fixed: bool = False) -> Variant:
    """The schedule kernel: by size of the batch, for uniform or ragged queries, for pieces that
    the batch decides or fixed ones."""
    block = block_of(batch)
    return Variant(
        schedule_kernel,
        ARGUMENTS,
        (
            ("KV_TILE", kv_tile),
            ("RAGGED", ragged),
            ("BLOCK_B", block),
            # Without a request there is nothing to look at, not even once.
            ("ONE_BLOCK", 0 < batch <= block),
            ("FIXED", fixed),
            ("PROGRAMMATIC", device.has_programmatic_launch),
        ),
        frozenset(),
        num_warps=BLOCKS[block],
        programmatic=device.has_programmatic_launch,
    )


def launch(
    launcher: Launch,
    geometry: Geometry,
    batch: int,
    s_q: int,
    queries: int,
    heads: int,
    max_kv_len: int,
    kv_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    result: torch.Tensor,
) -> None:
    """Writes the schedule of the lengths that are on the device now into `result`."""
    launcher(
        (geometry.parts + 1 + cdiv(batch, block_of(batch)), 1, 1),
        [
            kv_lens,
            cu_seqlens_q,
            result,
            batch,
            s_q,
            queries,
            heads,
            max_kv_len,
            geometry.parts,
            geometry.group_rows,
            geometry.overhead,
            geometry.max_groups,
        ],
    )
