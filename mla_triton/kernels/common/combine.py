"""Merges the partial results of split groups by their log-sum-exp.

What: for every row of a group that fell into several parts, out = sum of exp(lse_i - lse) out_i.
Where: every GPU. Work: program (rows, columns) takes `ROWS` rows of one group and `COLUMNS` of its
columns, with `SPLITS` partials in one load; a group in one piece was written by `decode` and costs
one load here. Budget: ROWS x SPLITS x COLUMNS float32 registers over the program's threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from mla_triton.device import Device
from mla_triton.kernels.common.launch import TYPE_NAMES, Launcher, Variant, emulates_bf16
from mla_triton.kernels.common.paged import request_queries
from mla_triton.kernels.common.schedule import CUT, GROUP, HEADER
from mla_triton.kernels.common.tensors import DecodeTensors, strides
from mla_triton.kernels.common.tiles import LN_2, LOWEST, finish_softmax, narrow
from mla_triton.plan import Geometry, cdiv
from mla_triton.problem import DecodeProblem

ELEMENTS = 8192
"""Partial results of one load of a program: 64 registers a thread."""
NUM_WARPS = 4
SPLIT_BUCKETS = (8, 32, 128)
"""Splits of one load. A group with more takes another turn, so the bucket changes speed alone."""

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
    ("row_blocks", "i32"),
)
ALIGNED = frozenset({"partial_out", "out", "out_stride_b", "out_stride_s", "out_stride_h"})


@dataclass(frozen=True)
class Config:
    """The shape of one load: all three are powers of two."""

    rows: int
    splits: int
    columns: int


@triton.jit
def combine_kernel(
    schedule, cu_seqlens_q, partial_out, partial_lse, out, lse,
    out_stride_b, out_stride_s, out_stride_h, lse_stride_b, lse_stride_s, lse_stride_h,
    batch, s_q, queries, heads, parts, group_rows, row_blocks,
    VALUE: tl.constexpr, RAGGED: tl.constexpr,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
    EMULATE_BF16: tl.constexpr, PROGRAMMATIC: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) // row_blocks
    block_row = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    entry = schedule + HEADER + CUT * (parts + 1) + GROUP * group
    request = tl.load(entry)
    index = tl.load(entry + 1)
    splits = tl.load(entry + 2)
    first_part = tl.load(entry + 3)
    if RAGGED:
        # Rows of the table past the groups there are were never written.
        splits = tl.where(group < tl.load(schedule), splits, 0)
    # The schedule was there before decode began; the partial results are there after this. Every
    # program waits, also one with nothing to merge: this kernel's end stands for decode's.
    if PROGRAMMATIC:
        gdc_wait()
    if splits > 1:
        request = tl.minimum(tl.maximum(request, 0), batch - 1)
        row = index * group_rows + block_row
        first_query, request_s_q = request_queries(cu_seqlens_q, request, s_q, queries, RAGGED)
        query = row // heads
        head = row % heads
        row_inside = (block_row < group_rows) & (row >= 0) & (query < request_s_q)

        running_max = tl.full([ROWS], LOWEST, tl.float32)
        running_sum = tl.zeros([ROWS], tl.float32)
        accumulator = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, splits, SPLITS):
            split = start + tl.arange(0, SPLITS)
            part = first_part + split
            inside = (split < splits) & (part >= 0) & (part < parts)
            # The first piece of a group ends its part (second slot); later pieces begin theirs.
            slot = 2 * part + (split == 0).to(tl.int32)
            partial = slot.to(tl.int64)[None, :] * group_rows + block_row[:, None]
            mask = row_inside[:, None] & inside[None, :]
            partial_scale = tl.load(partial_lse + partial, mask=mask, other=float("-inf"))
            new_max = tl.maximum(running_max, tl.max(partial_scale, 1))
            rescale = tl.exp2(running_max - new_max)
            weights = tl.exp2(partial_scale - new_max[:, None])
            values = tl.load(
                partial_out + partial[:, :, None] * VALUE + columns[None, None, :],
                mask=mask[:, :, None],
                other=0.0,
            )
            running_sum = running_sum * rescale + tl.sum(weights, 1)
            accumulator = accumulator * rescale[:, None] + tl.sum(weights[:, :, None] * values, 1)
            running_max = new_max

        merged, merged_lse = finish_softmax(accumulator, running_max, running_sum)
        if RAGGED:
            token = (first_query + query).to(tl.int64)
            batch_index = tl.zeros([], tl.int64)
        else:
            token = query.to(tl.int64)
            batch_index = request.to(tl.int64)
        out_rows = batch_index * out_stride_b + token * out_stride_s + head * out_stride_h
        tl.store(
            out + out_rows[:, None] + columns[None, :],
            narrow(merged, out.dtype.element_ty, EMULATE_BF16),
            mask=row_inside[:, None],
        )
        if tl.program_id(1) == 0:
            lse_rows = batch_index * lse_stride_b + token * lse_stride_s + head * lse_stride_h
            tl.store(lse + lse_rows, merged_lse * LN_2, mask=row_inside)


def heuristic(problem: DecodeProblem, geometry: Geometry) -> Config:
    """As many splits as an even batch has; rows and columns take the room that is left."""
    expected = cdiv(geometry.parts, max(1, problem.batch))
    splits = next((n for n in SPLIT_BUCKETS if n >= expected), SPLIT_BUCKETS[-1])
    columns = min(problem.value_dim, ELEMENTS // splits)
    return Config(ELEMENTS // (splits * columns), splits, columns)


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
            ("ROWS", config.rows),
            ("SPLITS", config.splits),
            ("COLUMNS", config.columns),
            ("EMULATE_BF16", emulates_bf16(problem.dtype, device)),
            ("PROGRAMMATIC", device.has_programmatic_launch),
        ),
        ALIGNED if problem.aligned else frozenset({"partial_out"}),
        NUM_WARPS,
        programmatic=device.has_programmatic_launch,
    )


def compile(problem: DecodeProblem, config: Config, geometry: Geometry, device: Device) -> Any:
    """Machine code for `device`; launches nothing and needs no GPU."""
    return variant(problem, config, device).compile(device)


def launch(
    launcher: Launcher,
    problem: DecodeProblem,
    config: Config,
    geometry: Geometry,
    tensors: DecodeTensors,
) -> None:
    rows = geometry.group_rows if problem.ragged else problem.rows
    row_blocks = cdiv(rows, config.rows)
    launcher(
        (geometry.max_groups * row_blocks, problem.value_dim // config.columns, 1),
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
            row_blocks,
        ],
    )
