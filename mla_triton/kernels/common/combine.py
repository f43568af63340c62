"""Merges the partial results of split groups by their log-sum-exp.

What: for every row of a group that fell into several parts, out = sum of exp(lse_i - lse) out_i.
Where: every GPU. Work: a part holds pieces of at most two split groups, the one it continues and
the one it begins, and merges a share of each: one of as many shares of its rows as the group has
pieces, so that the work is even however skewed the lengths are. A part without such a piece costs
one load. A batch of one request has one group, and all programs share it. A unit of a share is some
columns of some rows, with several pieces loaded before the first is looked at; how many is chosen
by how many parts a request has on average, and a group of more pieces takes several turns. Budget:
`ELEMENTS` float32 registers over the program's threads.

What a short problem waits for is not bytes but the way to them. So a program goes through its
instructions once before decode has ended, with nothing to load or store: they are in the SM's
cache when the results are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mla_triton.device import Device
from mla_triton.kernels.common.launch import TYPE_NAMES, Launch, Variant, emulates_bf16
from mla_triton.kernels.common.rows import request_queries, row_pointers
from mla_triton.kernels.common.schedule import CUT, GROUP, HEADER
from mla_triton.kernels.common.tensors import DecodeTensors, strides
from mla_triton.kernels.common.tiles import LN_2, LOWEST, finish_softmax, narrow
from mla_triton.plan import Geometry, cdiv, shortest_piece
from mla_triton.problem import DecodeProblem

ELEMENTS = tl.constexpr(4096)
"""Partial results of one turn of a program: 32 registers a thread."""
TURNS = tl.constexpr(8)
"""Loads in flight of a thread; those past it are of pieces abreast, in other threads."""
NUM_WARPS = 4
MAX_REGISTERS = 128
PROGRAMS_PER_SM = 4
"""As many as that many registers a thread allow."""
MOST_PIECES = 128
"""Pieces of a turn at most: less than 32 columns of each would be short reads."""
LEVELS_OF = {
    2: (2, 2, 3),
    4: (4, 2, 3),
    8: (8, 2, 2),
    16: (8, 2, 2),
    32: (16, 2, 2),
    64: (16, 2, 3),
    128: (64, 2, 2),
}
"""(pieces, step, levels) by what groups have on average. Every level is code to be fetched, so they
are as few as the groups of an uneven batch, or a short request, can do with."""

FIXED_LEVELS = (4, 4, 3)
"""Where a group's sum must not depend on how many pieces others have."""

ARGUMENTS = (
    ("schedule", "*i32"),
    ("cu_seqlens_q", "*i32"),
    ("partial_out", "*fp32"),
    ("partial_lse", "*fp32"),
    ("out", "*T"),
    ("lse", "*fp32"),
    ("out_stride_b", "i64"),
    ("out_stride_s", "i64"),
    ("out_stride_h", "i64"),
    ("lse_stride_b", "i64"),
    ("lse_stride_s", "i64"),
    ("lse_stride_h", "i64"),
    ("batch", "i32"),
    ("s_q", "i32"),
    ("queries", "i32"),
    ("heads", "i32"),
    ("parts", "i32"),
    ("group_rows", "i32"),
)
ALIGNED = frozenset({"partial_out", "out", "out_stride_b", "out_stride_s", "out_stride_h"})


@dataclass(frozen=True)
class Config:
    """How the merging is shared."""

    programs: int
    """Programs to a part, or in all where the batch is one request."""
    pieces: int
    """Pieces of a turn, of the smallest."""
    step: int
    """How many times as many pieces the next one takes."""
    levels: int
    """How many there are. A group takes the first that holds all of its pieces, or the last in
    several turns."""


@triton.jit
def merge_rows(
    partial_out, partial_lse, first_part, splits, group_rows, tile_rows, columns, inside,
    VALUE: tl.constexpr, TURNS: tl.constexpr, ABREAST: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """(out `[ROWS, COLUMNS]`, lse in base 2 `[ROWS]`) of some columns of rows of a group.

    `ABREAST` pieces are loaded side by side, `TURNS` times, all before the first is looked at.
    """
    running_max = tl.full([ROWS], LOWEST, tl.float32)
    running_sum = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, COLUMNS], tl.float32)
    stride = group_rows.to(tl.int64) * (2 * ABREAST)
    for start in range(0, splits, TURNS * ABREAST):
        # The first piece of a group ends its part (second slot); later pieces begin theirs.
        piece = start + tl.arange(0, ABREAST)
        slot = (2 * (first_part + piece)).to(tl.int64)[:, None] * group_rows + tile_rows[None, :]
        first = slot + tl.where(piece == 0, group_rows, 0)[:, None]
        lses = ()
        outs = ()
        for turn in tl.static_range(TURNS):
            rows = first if turn == 0 else slot + turn * stride
            wanted = (piece + turn * ABREAST < splits)[:, None] & inside[None, :]
            lses += (tl.load(partial_lse + rows, mask=wanted, other=float("-inf")),)  # type: ignore
            outs += (  # type: ignore
                tl.load(
                    partial_out + rows[:, :, None] * VALUE + columns[None, None, :],
                    mask=wanted[:, :, None],
                    other=0.0,
                ),
            )
        highest = lses[0]  # type: ignore
        for turn in tl.static_range(1, TURNS):
            highest = tl.maximum(highest, lses[turn])
        new_max = tl.maximum(running_max, tl.max(highest, 0))
        rescale = tl.exp2(running_max - new_max)
        total = tl.zeros([ABREAST, ROWS], tl.float32)
        merged = tl.zeros([ABREAST, ROWS, COLUMNS], tl.float32)
        for turn in tl.static_range(TURNS):
            weight = tl.exp2(lses[turn] - new_max[None, :])
            total += weight
            merged += weight[:, :, None] * outs[turn]
        running_sum = running_sum * rescale + tl.sum(total, 0)
        accumulator = accumulator * rescale[:, None] + tl.sum(merged, 0)
        running_max = new_max
    return finish_softmax(accumulator, running_max, running_sum)


@triton.jit
def merge_share(
    cu_seqlens_q, partial_out, partial_lse, out, lse,
    out_stride_b, out_stride_s, out_stride_h, lse_stride_b, lse_stride_s, lse_stride_h,
    request, index, splits, first_part, share, shares, s_q, queries, heads, parts, group_rows,
    rehearsals,
    VALUE: tl.constexpr, RAGGED: tl.constexpr, OUT_STEP: tl.constexpr, LSE_STEP: tl.constexpr,
    EMULATE_BF16: tl.constexpr, PROGRAMMATIC: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Merges every `shares`-th unit of a group, from unit `share` on: columns of some rows.

    With `rehearsals` of 1 the first turn does nothing, and then waits for decode.
    """
    IN_FLIGHT: tl.constexpr = TURNS if PIECES > TURNS else PIECES
    ABREAST: tl.constexpr = PIECES // IN_FLIGHT
    COLUMNS: tl.constexpr = VALUE if VALUE * PIECES < ELEMENTS else ELEMENTS // PIECES
    ROWS: tl.constexpr = ELEMENTS // (PIECES * COLUMNS)
    ACROSS: tl.constexpr = VALUE // COLUMNS
    first_token, request_s_q = request_queries(cu_seqlens_q, request, s_q, queries, RAGGED)
    first_row = index * group_rows
    rows = tl.minimum(tl.maximum(request_s_q * heads - first_row, 0), group_rows)
    units = tl.cdiv(rows, ROWS) * ACROSS
    for unit in range(share - rehearsals * shares, units, shares):
        # The interpreter counts in numbers of Python, which know no remainder by a constant.
        unit = tl.core.to_tensor(unit)
        tile_rows = unit // ACROSS * ROWS + tl.arange(0, ROWS)
        inside = (unit >= 0) & (tile_rows < rows)
        first_column = unit % ACROSS * COLUMNS
        columns = first_column + tl.arange(0, COLUMNS)
        merged, merged_lse = merge_rows(
            partial_out, partial_lse, first_part, splits, group_rows, tile_rows, columns, inside,
            VALUE, IN_FLIGHT, ABREAST, ROWS, COLUMNS,
        )  # fmt: skip
        out_rows = row_pointers(
            out, request, first_token, first_row, tile_rows, heads,
            out_stride_b, out_stride_s, out_stride_h, OUT_STEP,
        )  # fmt: skip
        result = narrow(merged, out.dtype.element_ty, EMULATE_BF16)
        tl.store(out_rows[:, None] + columns[None, :], result, mask=inside[:, None])
        lse_rows = row_pointers(
            lse, request, first_token, first_row, tile_rows, heads,
            lse_stride_b, lse_stride_s, lse_stride_h, LSE_STEP,
        )  # fmt: skip
        tl.store(lse_rows, merged_lse * LN_2, mask=inside & (first_column == 0))
        if PROGRAMMATIC:  # noqa: SIM102, which would make a value of a constant
            if unit < 0:
                gdc_wait()


@triton.jit
def group_row(schedule, parts, group, is_wanted):
    """(request, index, splits, first part) of a group in the schedule; zeros of one unwanted."""
    row = schedule + HEADER + CUT * (parts + 1) + GROUP * group
    request = tl.load(row, mask=is_wanted, other=0)
    index = tl.load(row + 1, mask=is_wanted, other=0)
    splits = tl.load(row + 2, mask=is_wanted, other=0)
    return request, index, splits, tl.load(row + 3, mask=is_wanted, other=0)


@triton.jit
def combine_kernel(
    schedule, cu_seqlens_q, partial_out, partial_lse, out, lse,
    out_stride_b, out_stride_s, out_stride_h, lse_stride_b, lse_stride_s, lse_stride_h,
    batch, s_q, queries, heads, parts, group_rows,
    VALUE: tl.constexpr, RAGGED: tl.constexpr, OUT_STEP: tl.constexpr, LSE_STEP: tl.constexpr,
    EMULATE_BF16: tl.constexpr, PROGRAMMATIC: tl.constexpr, PIECES: tl.constexpr,
    STEP: tl.constexpr, LEVELS: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    part = tl.program_id(1)
    if ALONE:
        begun = group_row(schedule, parts, 0, True)
        continued = begun
    else:
        cuts = schedule + HEADER + CUT * part
        first_group = tl.load(cuts)
        first_tile = tl.load(cuts + 1)
        last_group = tl.load(cuts + 2)
        last_tile = tl.load(cuts + 3)
        is_continued = first_tile > 0
        is_begun = (last_tile > 0) & ((last_group > first_group) | (first_tile == 0))
        continued = group_row(schedule, parts, first_group, is_continued)
        begun = group_row(schedule, parts, last_group, is_begun)
    # The schedule was there before decode let this kernel begin; the partial results are there
    # after the wait.
    rehearsals = 0
    if PROGRAMMATIC:
        gdc_launch_dependents()
        rehearsals = 1
    for which in range(1 if ALONE else 2):
        splits = tl.where(which == 0, begun[2], continued[2])
        if splits > 1:
            request = tl.where(which == 0, begun[0], continued[0])
            request = tl.minimum(tl.maximum(request, 0), batch - 1)
            index = tl.where(which == 0, begun[1], continued[1])
            first_part = tl.where(which == 0, begun[3], continued[3])
            first_part = tl.minimum(tl.maximum(first_part, 0), parts - 1)
            share = program if ALONE else (part - first_part) * programs + program
            shares = programs if ALONE else splits * programs
            splits = tl.minimum(splits, parts - first_part)
            for level in tl.static_range(LEVELS):
                is_above = (level == 0) | (splits * STEP > PIECES * STEP**level)
                if is_above & ((splits <= PIECES * STEP**level) | (level == LEVELS - 1)):
                    merge_share(
                        cu_seqlens_q, partial_out, partial_lse, out, lse,
                        out_stride_b, out_stride_s, out_stride_h,
                        lse_stride_b, lse_stride_s, lse_stride_h,
                        request, index, splits, first_part, share, shares, s_q, queries, heads,
                        parts, group_rows, rehearsals,
                        VALUE, RAGGED, OUT_STEP, LSE_STEP, EMULATE_BF16, PROGRAMMATIC,
                        PIECES * STEP**level,
                    )  # fmt: skip
            rehearsals = 0
    # What waits for this kernel waits for decode, too: one program sees to that, whatever there is
    # to merge. Others without work leave their SM to the next kernel.
    if PROGRAMMATIC:  # noqa: SIM102
        if (program == 0) & (part == 0):
            gdc_wait()


def heuristic(problem: DecodeProblem, geometry: Geometry, device: Device) -> Config:
    """Programs that run together, but no more than a part's share has units; those of a lone
    request one an SM, where its longest keys give them no more to do."""
    alone = is_alone(problem)
    together = max(1, PROGRAMS_PER_SM * device.sm_count // (1 if alone else geometry.parts))
    rows = geometry.group_rows if problem.ragged else min(geometry.group_rows, problem.rows)
    units = max(1, rows * problem.value_dim // ELEMENTS.value)
    average = geometry.parts // max(1, problem.batch)
    # A sixteenth more than a power of two is not worth the next one.
    most = min(max(2, power_of_two(average - average // 16)), MOST_PIECES)
    if alone and units * most > together:
        most = min(most, MOST_PIECES // 2)
    levels = FIXED_LEVELS if geometry.fixed else LEVELS_OF[most]
    if not alone:
        return Config(min(units, together), *levels)
    # Programs without a unit see to it that those with one are spread over all SMs.
    tiles = cdiv(problem.max_kv_len, geometry.kv_tile)
    longest = power_of_two(min(geometry.parts, cdiv(tiles, shortest_piece(tiles))))
    return Config(device.sm_count if units * longest <= device.sm_count else together, *levels)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


def is_alone(problem: DecodeProblem) -> bool:
    """Whether a problem is one group, whatever its lengths are."""
    return problem.batch == 1 and not problem.ragged


def variant(problem: DecodeProblem, config: Config, device: Device) -> Variant:
    return Variant(
        combine_kernel,
        tuple(
            (name, f"*{TYPE_NAMES[problem.dtype]}" if kind == "*T" else kind)
            for name, kind in ARGUMENTS
        ),
        (
            ("VALUE", problem.value_dim),
            ("RAGGED", problem.ragged),
            ("OUT_STEP", problem.row_steps.out),
            ("LSE_STEP", problem.row_steps.lse),
            ("EMULATE_BF16", emulates_bf16(problem.dtype, device)),
            ("PROGRAMMATIC", device.has_programmatic_launch),
            ("PIECES", config.pieces),
            ("STEP", config.step),
            ("LEVELS", config.levels),
            ("ALONE", is_alone(problem)),
        ),
        ALIGNED if problem.aligned else frozenset({"partial_out"}),
        NUM_WARPS,
        programmatic=device.has_programmatic_launch,
        max_registers=MAX_REGISTERS,
    )


def compile(problem: DecodeProblem, config: Config, device: Device) -> Any:
    """Machine code for `device`; launches nothing and needs no GPU."""
    return variant(problem, config, device).compile(device)


def launch(
    launcher: Launch,
    problem: DecodeProblem,
    config: Config,
    geometry: Geometry,
    tensors: DecodeTensors,
) -> None:
    launcher(
        (config.programs, 1 if is_alone(problem) else geometry.parts, 1),
        [
            tensors.schedule,
            tensors.cu_seqlens_q,
            tensors.partial_out,
            tensors.partial_lse,
            tensors.out,
            tensors.lse,
            *strides(tensors.out, problem.ragged),
            *strides(tensors.lse, problem.ragged),
            problem.batch,
            problem.s_q or 0,
            problem.queries,
            problem.heads,
            geometry.parts,
            geometry.group_rows,
        ],
    )
