"""Merges the partial results of split groups by their log-sum-exp.

What: for every row of a group that fell into several parts, out = sum of exp(lse_i - lse) out_i.
Where: every GPU. Work: a part holds pieces of at most two split groups, the one it continues and
the one it begins, and merges a share of each: one of as many shares of its rows as the group has
pieces, so that the work is even however skewed the lengths are. A part without such a piece costs
one load. A unit of a share is some columns of a row, with several pieces in one load; how many of
each follows from the number of pieces, found on the device. Budget: `ELEMENTS` float32 registers
over the program's threads.
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
from mla_triton.plan import Geometry
from mla_triton.problem import DecodeProblem

ELEMENTS = tl.constexpr(2048)
"""Partial results of one load of a program: 16 registers a thread."""
NUM_WARPS = 4
PROGRAMS_PER_SM = 8
"""As many as 64 registers a thread allow: what hides the latency of a unit is other units."""
LEVELS = tl.constexpr(6)
"""A unit takes 2, 4, 16, 32, 64 or 128 pieces in one load; the more, the fewer columns. Up to 4 are
added up within a thread, so 8 pieces are taken in two turns of 4. More than 128 take several turns,
too."""

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
    """How many programs share a part's merging."""

    programs: int


@triton.jit
def merge_row(
    partial_out, partial_lse, first_part, splits, parts, group_rows, tile_row, columns,
    VALUE: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(out `[1, COLUMNS]`, lse in base 2 `[1]`) of some columns of row `tile_row` of a group."""
    running_max = tl.full([1], LOWEST, tl.float32)
    running_sum = tl.zeros([1], tl.float32)
    accumulator = tl.zeros([1, COLUMNS], tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        part = first_part + split
        inside = (split < splits) & (part >= 0) & (part < parts)
        # The first piece of a group ends its part (second slot); later pieces begin theirs.
        slot = 2 * part + (split == 0).to(tl.int32)
        partial = slot.to(tl.int64) * group_rows + tile_row
        piece_lse = tl.load(partial_lse + partial, mask=inside, other=float("-inf"))
        piece_out = tl.load(
            partial_out + partial[:, None] * VALUE + columns[None, :],
            mask=inside[:, None],
            other=0.0,
        )
        new_max = tl.maximum(running_max, tl.max(piece_lse, 0, keep_dims=True))
        rescale = tl.exp2(running_max - new_max)
        weights = tl.exp2(piece_lse - new_max)
        running_sum = running_sum * rescale + tl.sum(weights, 0, keep_dims=True)
        merged = tl.sum(weights[:, None] * piece_out, 0, keep_dims=True)
        accumulator = accumulator * rescale[:, None] + merged
        running_max = new_max
    return finish_softmax(accumulator, running_max, running_sum)


@triton.jit
def merge_share(
    cu_seqlens_q, partial_out, partial_lse, out, lse,
    out_stride_b, out_stride_s, out_stride_h, lse_stride_b, lse_stride_s, lse_stride_h,
    request, index, splits, first_part, share, shares, s_q, queries, heads, parts, group_rows,
    VALUE: tl.constexpr, RAGGED: tl.constexpr, OUT_STEP: tl.constexpr, LSE_STEP: tl.constexpr,
    EMULATE_BF16: tl.constexpr, LEVEL: tl.constexpr,
):  # fmt: skip
    """Merges every `shares`-th unit of a group, from unit `share` on: some columns of a row."""
    SPLITS: tl.constexpr = 2 ** (LEVEL + 1 + (LEVEL > 1))
    COLUMNS: tl.constexpr = VALUE if VALUE * SPLITS < ELEMENTS else ELEMENTS // SPLITS
    UNITS: tl.constexpr = VALUE // COLUMNS
    first_token, request_s_q = request_queries(cu_seqlens_q, request, s_q, queries, RAGGED)
    first_row = index * group_rows
    rows = tl.minimum(tl.maximum(request_s_q * heads - first_row, 0), group_rows)
    for unit in range(share, rows * UNITS, shares):
        tile_row = unit // UNITS
        first_column = (unit - tile_row * UNITS) * COLUMNS
        columns = first_column + tl.arange(0, COLUMNS)
        merged, merged_lse = merge_row(
            partial_out, partial_lse, first_part, splits, parts, group_rows, tile_row, columns,
            VALUE, SPLITS, COLUMNS,
        )  # fmt: skip
        tile_rows = tile_row + tl.arange(0, 1)
        out_rows = row_pointers(
            out, request, first_token, first_row, tile_rows, heads,
            out_stride_b, out_stride_s, out_stride_h, OUT_STEP,
        )  # fmt: skip
        result = narrow(merged, out.dtype.element_ty, EMULATE_BF16)
        tl.store(out_rows[:, None] + columns[None, :], result)
        if first_column == 0:
            lse_rows = row_pointers(
                lse, request, first_token, first_row, tile_rows, heads,
                lse_stride_b, lse_stride_s, lse_stride_h, LSE_STEP,
            )  # fmt: skip
            tl.store(lse_rows, merged_lse * LN_2)


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
    EMULATE_BF16: tl.constexpr, PROGRAMMATIC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    part = tl.program_id(1)
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
    # after the wait. Every program waits, also one without work: its end stands for decode's.
    if PROGRAMMATIC:
        gdc_launch_dependents()
        gdc_wait()
    for which in range(2):
        splits = tl.where(which == 0, continued[2], begun[2])
        if splits > 1:
            request = tl.where(which == 0, continued[0], begun[0])
            request = tl.minimum(tl.maximum(request, 0), batch - 1)
            index = tl.where(which == 0, continued[1], begun[1])
            first_part = tl.where(which == 0, continued[3], begun[3])
            share = (part - first_part) * programs + program
            shares = splits * programs
            for level in tl.static_range(LEVELS):
                is_above = splits > 2 ** (level + (level > 1))
                is_within = (splits <= 2 ** (level + 1 + (level > 0))) | (level == LEVELS - 1)
                if is_above & is_within:
                    merge_share(
                        cu_seqlens_q, partial_out, partial_lse, out, lse,
                        out_stride_b, out_stride_s, out_stride_h,
                        lse_stride_b, lse_stride_s, lse_stride_h,
                        request, index, splits, first_part, share, shares, s_q, queries, heads,
                        parts, group_rows, VALUE, RAGGED, OUT_STEP, LSE_STEP, EMULATE_BF16,
                        level,
                    )  # fmt: skip


def heuristic(problem: DecodeProblem, geometry: Geometry, device: Device) -> Config:
    """Programs that run together, but no more than there are units in a part's share."""
    rows = geometry.group_rows if problem.ragged else min(geometry.group_rows, problem.rows)
    units = max(1, rows * problem.value_dim // ELEMENTS.value)
    return Config(min(units, max(1, PROGRAMS_PER_SM * device.sm_count // geometry.parts)))


def max_registers(problem: DecodeProblem, device: Device) -> int:
    """Registers of a thread: for eight programs an SM, or what it takes not to spill in a loop."""
    is_desktop_blackwell = device.has_tma and not (device.has_wgmma or device.has_tcgen05)
    return 80 if problem.value_dim < 512 or is_desktop_blackwell else 64


def variant(problem: DecodeProblem, device: Device) -> Variant:
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
        ),
        ALIGNED if problem.aligned else frozenset({"partial_out"}),
        NUM_WARPS,
        programmatic=device.has_programmatic_launch,
        max_registers=max_registers(problem, device),
    )


def compile(problem: DecodeProblem, device: Device) -> Any:
    """Machine code for `device`; launches nothing and needs no GPU."""
    return variant(problem, device).compile(device)


def launch(
    launcher: Launch,
    problem: DecodeProblem,
    config: Config,
    geometry: Geometry,
    tensors: DecodeTensors,
) -> None:
    launcher(
        (config.programs, geometry.parts, 1),
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
