"""Split-KV absorbed attention over a paged latent cache, in Triton.

What: every row, a (query token, head) pair, attends over its request's latents; K is the latent
tile with its rotary columns, V is the same tile again, so each key is loaded once for all rows of a
program. Where: NVIDIA from capability 8.0 on, AMD CDNA3 and later, Triton's interpreter.

Work: program (lane, part) walks the groups of its part of the schedule, and in each group the row
tile of its lane. Lanes of a part run side by side and share its keys through the L2. A group that a
part holds whole is written to `out` at once; a piece of a group goes to the partial buffers in
float32 and `combine` merges it.

Budget at latent 512, rope 64, 16 bit: a key tile is `block_n` x 576 x 2 bytes (72 KiB at 64 keys),
times the tiles in flight: `num_stages - 1` with mma.sync, `num_stages` with wgmma. The accumulator
takes `row_tile` x 512 float32 registers over the program's threads.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from mla_triton.device import Device
from mla_triton.kernels.common.launch import TYPE_NAMES, Launcher, Variant, emulates_bf16
from mla_triton.kernels.common.paged import (
    key_rows,
    load_page_ids,
    request_keys,
    request_pages,
    request_queries,
)
from mla_triton.kernels.common.schedule import CUT, GROUP, HEADER
from mla_triton.kernels.common.tensors import DecodeTensors, strides
from mla_triton.kernels.common.tiles import (
    LN_2,
    LOG2_E,
    LOWEST,
    dot,
    finish_softmax,
    narrow,
    online_softmax_update,
)
from mla_triton.kernels.portable.decode_config import (
    Config,
    choose,
    geometry,
    heuristic,
    is_valid,
    precision,
    why_not,
)
from mla_triton.plan import Geometry
from mla_triton.problem import DecodeProblem

__all__ = [
    "Config",
    "choose",
    "compile",
    "geometry",
    "heuristic",
    "is_valid",
    "launch",
    "variant",
    "why_not",
]

ARGUMENTS = (
    ("q_nope", "*T"),
    ("q_rope", "*T"),
    ("ckv", "*T"),
    ("kpe", "*T"),
    ("pages", "*i32"),
    ("indptr", "*i32"),
    ("kv_lens", "*i32"),
    ("cu_seqlens_q", "*i32"),
    ("schedule", "*i32"),
    ("partial_out", "*fp32"),
    ("partial_lse", "*fp32"),
    ("out", "*T"),
    ("lse", "*fp32"),
    ("q_nope_stride_b", "i64"),
    ("q_nope_stride_s", "i64"),
    ("q_nope_stride_h", "i64"),
    ("q_rope_stride_b", "i64"),
    ("q_rope_stride_s", "i64"),
    ("q_rope_stride_h", "i64"),
    ("ckv_stride_page", "i64"),
    ("kpe_stride_page", "i64"),
    ("out_stride_b", "i64"),
    ("out_stride_s", "i64"),
    ("out_stride_h", "i64"),
    ("lse_stride_b", "i64"),
    ("lse_stride_s", "i64"),
    ("lse_stride_h", "i64"),
    ("table_size", "i64"),
    ("batch", "i32"),
    ("s_q", "i32"),
    ("queries", "i32"),
    ("heads", "i32"),
    ("max_kv_len", "i32"),
    ("planned_kv_len", "i32"),
    ("num_pages", "i32"),
    ("parts", "i32"),
    ("scale_log2", "fp32"),
)
ALIGNED = frozenset(
    name
    for name, _ in ARGUMENTS
    if name in ("q_nope", "q_rope", "ckv", "kpe", "out", "partial_out")
    or (name.startswith(("q_", "ckv_", "kpe_", "out_")) and "_stride_" in name)
)


@triton.jit
def load_queries(
    q_nope, q_rope, nope_rows, rope_rows, mask,
    VALUE: tl.constexpr, NOPE: tl.constexpr, ROPE_IN_VALUE: tl.constexpr,
):  # fmt: skip
    """The columns of a row tile's queries that meet the latent: `q_rope`'s too if V holds them."""
    columns = tl.arange(0, VALUE)
    if ROPE_IN_VALUE:
        # One load from either address, not a choice of two loads: what is loaded can go to shared
        # memory, what is computed stays in registers throughout the key loop.
        address = tl.where(
            (columns < NOPE)[None, :],
            q_nope + nope_rows[:, None] + columns[None, :],
            q_rope + rope_rows[:, None] + (columns - NOPE)[None, :],
        )
        return tl.load(address, mask=mask[:, None], other=0.0)
    else:
        return tl.load(
            q_nope + nope_rows[:, None] + columns[None, :], mask=mask[:, None], other=0.0
        )


@triton.jit
def decode_kernel(
    q_nope, q_rope, ckv, kpe, pages, indptr, kv_lens, cu_seqlens_q, schedule,
    partial_out, partial_lse, out, lse,
    q_nope_stride_b, q_nope_stride_s, q_nope_stride_h,
    q_rope_stride_b, q_rope_stride_s, q_rope_stride_h,
    ckv_stride_page, kpe_stride_page,
    out_stride_b, out_stride_s, out_stride_h, lse_stride_b, lse_stride_s, lse_stride_h,
    table_size, batch, s_q, queries, heads, max_kv_len, planned_kv_len,
    num_pages, parts, scale_log2,
    VALUE: tl.constexpr, NOPE: tl.constexpr, TAIL: tl.constexpr, ROPE_IN_VALUE: tl.constexpr,
    FUSED: tl.constexpr, CKV_SLOT: tl.constexpr, KPE_SLOT: tl.constexpr,
    PAGE_SIZE: tl.constexpr, CSR: tl.constexpr, RAGGED: tl.constexpr, CAUSAL: tl.constexpr,
    KV_TILE: tl.constexpr, ROW_TILE: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr, PROGRAMMATIC: tl.constexpr,
):  # fmt: skip
    if PROGRAMMATIC:
        gdc_launch_dependents()
    # A block that cannot leave its page needs one page id instead of one for each key.
    ONE_PAGE: tl.constexpr = PAGE_SIZE % BLOCK_N == 0
    lane = tl.program_id(0)
    part = tl.program_id(1)
    group_rows = tl.num_programs(0) * ROW_TILE
    tile_rows = tl.arange(0, ROW_TILE)
    block_keys = tl.arange(0, BLOCK_N)
    value_columns = tl.arange(0, VALUE)

    cuts = schedule + HEADER + CUT * part
    first_group = tl.load(cuts)
    first_tile = tl.load(cuts + 1)
    last_group = tl.load(cuts + 2)
    last_tile = tl.load(cuts + 3)
    for group in range(first_group, last_group + (last_tile > 0).to(tl.int32)):
        if RAGGED:
            entry = schedule + HEADER + CUT * (parts + 1) + GROUP * group
            request = tl.minimum(tl.maximum(tl.load(entry), 0), batch - 1)
            row = tl.load(entry + 1) * group_rows + lane * ROW_TILE + tile_rows
        else:
            request = tl.minimum(group, batch - 1)
            row = lane * ROW_TILE + tile_rows
        # The schedule may have been made under a higher bound than this call's.
        tiles = tl.cdiv(request_keys(kv_lens, request, planned_kv_len), KV_TILE)
        kv_len = request_keys(kv_lens, request, max_kv_len)
        first_query, request_s_q = request_queries(cu_seqlens_q, request, s_q, queries, RAGGED)
        page_row, kv_len = request_pages(pages, indptr, request, table_size, kv_len, PAGE_SIZE, CSR)
        begin = tl.where(group == first_group, first_tile, 0)
        end = tl.where(group == last_group, last_tile, tiles)
        begin_key = begin * KV_TILE
        end_key = tl.minimum(end * KV_TILE, kv_len)

        query = row // heads
        head = row % heads
        row_inside = (row >= 0) & (query < request_s_q)
        # Bottom-right: the last query sees every key.
        visible_end = kv_len - request_s_q + query + 1
        if CAUSAL:
            end_key = tl.minimum(end_key, tl.max(tl.where(row_inside, visible_end, 0), 0))
        else:
            end_key = tl.where(tl.max(row_inside.to(tl.int32), 0) > 0, end_key, 0)

        # Uniform queries have a batch stride; ragged ones count their tokens from the first.
        if RAGGED:
            token = (first_query + query).to(tl.int64)
            batch_index = tl.zeros([], tl.int64)
        else:
            token = query.to(tl.int64)
            batch_index = request.to(tl.int64)
        nope_rows = batch_index * q_nope_stride_b + token * q_nope_stride_s + head * q_nope_stride_h
        rope_rows = batch_index * q_rope_stride_b + token * q_rope_stride_s + head * q_rope_stride_h
        q_value = load_queries(
            q_nope, q_rope, nope_rows, rope_rows, row_inside, VALUE, NOPE, ROPE_IN_VALUE
        )
        if TAIL > 0:
            tail_columns = tl.arange(0, TAIL)
            q_tail = tl.load(
                q_rope + rope_rows[:, None] + tail_columns[None, :],
                mask=row_inside[:, None],
                other=0.0,
            )

        running_max = tl.full([ROW_TILE], LOWEST, tl.float32)
        running_sum = tl.zeros([ROW_TILE], tl.float32)
        accumulator = tl.zeros([ROW_TILE, VALUE], tl.float32)
        # The first page id need not wait for the length: past it, a dense table is still the table,
        # and what page the id names does not matter.
        reach = end_key if CSR else max_kv_len
        if ONE_PAGE:
            start = begin_key // BLOCK_N * BLOCK_N
            page = load_page_ids(page_row, start, reach, num_pages, PAGE_SIZE)
        else:
            start = begin_key
            page = load_page_ids(page_row, start + block_keys, reach, num_pages, PAGE_SIZE)
        for block in tl.range(start, end_key, BLOCK_N, num_stages=STAGES):
            key = block + block_keys
            # Keys past the end are zero, not hidden alone: 0 x NaN would reach the sum over V.
            key_inside = block_keys < end_key - block
            ckv_rows = key_rows(
                ckv, page, block, block_keys, ckv_stride_page, CKV_SLOT, PAGE_SIZE, ONE_PAGE
            )
            latent = tl.load(
                ckv_rows[:, None] + value_columns[None, :], mask=key_inside[:, None], other=0.0
            )
            scores = dot(
                q_value,
                tl.trans(latent),
                tl.zeros([ROW_TILE, BLOCK_N], tl.float32),
                PRECISION,
                EMULATE_BF16,
            )
            if TAIL > 0:
                if FUSED:
                    kpe_rows = ckv_rows + VALUE
                else:
                    kpe_rows = key_rows(
                        kpe, page, block, block_keys, kpe_stride_page, KPE_SLOT, PAGE_SIZE, ONE_PAGE
                    )
                rope_key = tl.load(
                    kpe_rows[:, None] + tail_columns[None, :], mask=key_inside[:, None], other=0.0
                )
                scores = dot(q_tail, tl.trans(rope_key), scores, PRECISION, EMULATE_BF16)
            # The next page id is on its way while this block is computed: an indirect load inside
            # the step would cost a stage of the pipeline.
            if ONE_PAGE:
                page = load_page_ids(page_row, block + BLOCK_N, end_key, num_pages, PAGE_SIZE)
            else:
                page = load_page_ids(page_row, key + BLOCK_N, end_key, num_pages, PAGE_SIZE)

            visible = key_inside[None, :]
            if ONE_PAGE and BLOCK_N > KV_TILE:
                visible = visible & (block_keys >= begin_key - block)[None, :]
            if CAUSAL:
                visible = visible & (key[None, :] < visible_end[:, None])
            scores = tl.where(visible, scores * scale_log2, float("-inf"))
            running_max, running_sum, rescale, probabilities = online_softmax_update(
                scores, running_max, running_sum
            )
            accumulator = dot(
                narrow(probabilities, latent.dtype, EMULATE_BF16),
                latent,
                accumulator * rescale[:, None],
                PRECISION,
                EMULATE_BF16,
            )

        result, lse_log2 = finish_softmax(accumulator, running_max, running_sum)
        if (begin == 0) & (end == tiles):
            out_rows = batch_index * out_stride_b + token * out_stride_s + head * out_stride_h
            lse_rows = batch_index * lse_stride_b + token * lse_stride_s + head * lse_stride_h
            tl.store(
                out + out_rows[:, None] + value_columns[None, :],
                narrow(result, out.dtype.element_ty, EMULATE_BF16),
                mask=row_inside[:, None],
            )
            tl.store(lse + lse_rows, lse_log2 * LN_2, mask=row_inside)
        else:
            # Only a part's first group can continue an earlier part, and only its last can begin
            # here and go on, so two slots are enough.
            slot = 2 * part + (begin == 0).to(tl.int32)
            partial_rows = slot.to(tl.int64) * group_rows + lane * ROW_TILE + tile_rows
            tl.store(
                partial_out + partial_rows[:, None] * VALUE + value_columns[None, :],
                result,
                mask=row_inside[:, None],
            )
            tl.store(partial_lse + partial_rows, lse_log2, mask=row_inside)


def variant(problem: DecodeProblem, config: Config, geometry: Geometry, device: Device) -> Variant:
    """The kernel for a problem: everything but sizes that change from step to step is constant."""
    pointer = f"*{TYPE_NAMES[problem.dtype]}"
    return Variant(
        decode_kernel,
        tuple((name, pointer if kind == "*T" else kind) for name, kind in ARGUMENTS),
        (
            ("VALUE", problem.value_dim),
            ("NOPE", problem.latent),
            ("TAIL", problem.key_tail),
            ("ROPE_IN_VALUE", problem.rope_in_value),
            ("FUSED", problem.fused),
            ("CKV_SLOT", problem.ckv_stride_slot),
            ("KPE_SLOT", problem.kpe_stride_slot),
            ("PAGE_SIZE", problem.page_size),
            ("CSR", problem.csr),
            ("RAGGED", problem.ragged),
            ("CAUSAL", problem.causal),
            ("KV_TILE", geometry.kv_tile),
            ("ROW_TILE", geometry.row_tile),
            ("BLOCK_N", config.block_n),
            ("STAGES", config.num_stages),
            ("PRECISION", precision(problem, device)),
            ("EMULATE_BF16", emulates_bf16(problem.dtype, device)),
            ("PROGRAMMATIC", device.has_programmatic_launch and geometry.parts > 1),
        ),
        ALIGNED if problem.aligned else frozenset({"partial_out"}),
        config.num_warps,
        config.num_stages,
    )


def arguments(problem: DecodeProblem, geometry: Geometry, tensors: DecodeTensors) -> list[Any]:
    """The run-time arguments, in the order of `ARGUMENTS`."""
    t = tensors
    return [
        t.q_nope,
        t.q_rope,
        t.ckv,
        t.kpe,
        t.pages,
        t.indptr,
        t.kv_lens,
        t.cu_seqlens_q,
        t.schedule,
        t.partial_out,
        t.partial_lse,
        t.out,
        t.lse,
        *strides(t.q_nope, problem.ragged),
        *strides(t.q_rope, problem.ragged),
        t.ckv.stride(0),
        0 if t.kpe is None else t.kpe.stride(0),
        *strides(t.out, problem.ragged),
        *strides(t.lse, problem.ragged),
        t.pages.shape[0] if problem.csr else t.pages.stride(0),
        problem.batch,
        problem.s_q or 0,
        problem.queries,
        problem.heads,
        min(problem.max_kv_len, t.planned_kv_len),
        t.planned_kv_len,
        problem.num_pages,
        geometry.parts,
        t.softmax_scale * LOG2_E,
    ]


def compile(problem: DecodeProblem, config: Config, geometry: Geometry, device: Device) -> Any:
    """Machine code for `device`; launches nothing and needs no GPU."""
    return variant(problem, config, geometry, device).compile(device)


def launch(
    launcher: Launcher, problem: DecodeProblem, geometry: Geometry, tensors: DecodeTensors
) -> None:
    """Writes `out` and `lse`, or partial results where the schedule cuts a group."""
    launcher((geometry.lanes, geometry.parts, 1), arguments(problem, geometry, tensors))
