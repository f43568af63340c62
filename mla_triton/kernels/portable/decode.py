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

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mla_triton.device import Device
from mla_triton.kernels.common.launch import (
    ALIGNMENT,
    TYPE_NAMES,
    Launch,
    Variant,
    emulates_bf16,
)
from mla_triton.kernels.common.paged import (
    first_page_ids,
    next_page_ids,
    request_keys,
    request_pages,
)
from mla_triton.kernels.common.rows import request_queries, row_pointers
from mla_triton.kernels.common.schedule import CUT, GROUP, HEADER
from mla_triton.kernels.common.tensors import DecodeTensors, strides
from mla_triton.kernels.common.tiles import (
    LN_2,
    LOG2_E,
    LOWEST,
    finish_softmax,
    narrow,
)
from mla_triton.kernels.portable.decode_config import (
    KV_TILE,
    NAME,
    OP,
    Config,
    choose,
    geometry,
    heuristic,
    is_ordered,
    is_valid,
    precision,
    rope_is_apart_inside,
    row_tile,
    search_space,
    tuning_point,
    why_not,
)
from mla_triton.kernels.portable.decode_steps import attend, edge_block, load_queries
from mla_triton.kernels.portable.tiles16 import (
    BYTES,
    GROUPS,
    NATIVE,
    ONE_SCALE,
    SAME,
    WORDS,
    as_bytes,
    as_half_rows,
    column_order,
    key_order,
    times_factor,
)
from mla_triton.plan import Geometry
from mla_triton.problem import DecodeProblem

__all__ = [
    "NAME",
    "OP",
    "Config",
    "choose",
    "compile",
    "geometry",
    "heuristic",
    "is_valid",
    "launch",
    "row_tile",
    "search_space",
    "tuning_point",
    "variant",
    "why_not",
]

ARGUMENTS = (
    ("q_nope", "*T"),
    ("q_rope", "*T"),
    ("ckv", "*T"),
    ("kpe", "*T"),
    ("scales", "*S"),
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
    ("scales_stride_page", "i64"),
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
def decode_kernel(
    q_nope, q_rope, ckv, kpe, scales, pages, indptr, kv_lens, cu_seqlens_q, schedule,
    partial_out, partial_lse, out, lse,
    q_nope_stride_b, q_nope_stride_s, q_nope_stride_h,
    q_rope_stride_b, q_rope_stride_s, q_rope_stride_h,
    ckv_stride_page, kpe_stride_page, scales_stride_page,
    out_stride_b, out_stride_s, out_stride_h, lse_stride_b, lse_stride_s, lse_stride_h,
    table_size, batch, s_q, queries, heads, max_kv_len, planned_kv_len,
    num_pages, parts, scale_log2,
    VALUE: tl.constexpr, NOPE: tl.constexpr, TAIL: tl.constexpr, ROPE_IN_VALUE: tl.constexpr,
    FUSED: tl.constexpr, CKV_SLOT: tl.constexpr, KPE_SLOT: tl.constexpr,
    STORED: tl.constexpr, LATENT: tl.constexpr, SCALED: tl.constexpr, SCALES_SLOT: tl.constexpr,
    KPE_UNIT: tl.constexpr, DECODE: tl.constexpr,
    NOPE_STEP: tl.constexpr, ROPE_STEP: tl.constexpr,
    OUT_STEP: tl.constexpr, LSE_STEP: tl.constexpr,
    PAGE_SIZE: tl.constexpr, CSR: tl.constexpr, RAGGED: tl.constexpr, CAUSAL: tl.constexpr,
    FULL_TILES: tl.constexpr, KV_TILE: tl.constexpr, ROW_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr, EDGE: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr, PROGRAMMATIC: tl.constexpr,
    ORDERED: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    # What the kernel before this one writes is there now, and the merge may take its place.
    if PROGRAMMATIC:
        gdc_wait()
        gdc_launch_dependents()
    # A block that cannot leave its page needs one page id instead of one for each key.
    ONE_PAGE: tl.constexpr = PAGE_SIZE % BLOCK_N == 0
    EDGE_ONE_PAGE: tl.constexpr = PAGE_SIZE % EDGE == 0
    lane = tl.program_id(0)
    part = tl.program_id(1)
    group_rows = tl.num_programs(0) * ROW_TILE
    tile_rows = tl.arange(0, ROW_TILE)
    block_keys = tl.arange(0, BLOCK_N)
    edge_keys = tl.arange(0, EDGE)
    value_columns = tl.arange(0, VALUE)
    if LATENT < VALUE:
        tail_columns = tl.arange(0, TAIL)
    kpe_stride_page *= KPE_UNIT
    if STORED != SAME:
        ckv = as_bytes(ckv, DECODE)
    if STORED == ONE_SCALE and not FUSED:
        kpe = as_bytes(kpe, DECODE)
    # float16 is multiplied, whatever the queries are.
    EMULATE: tl.constexpr = EMULATE_BF16 and STORED != ONE_SCALE

    cuts = schedule + HEADER + CUT * part
    first_group = tl.load(cuts)
    first_tile = tl.load(cuts + 1)
    last_group = tl.load(cuts + 2)
    last_tile = tl.load(cuts + 3)
    # What is the same in every group, or in every step, is worked out each time: kept in registers
    # it slows the loop over whole blocks down, by 7 % with 64 rows, and makes the other one spill.
    # Rows that are not evenly spaced take so many registers that it is true of both.
    end_group = last_group + (last_tile > 0).to(tl.int32)
    for group in tl.range(first_group, end_group, disable_licm=True):
        if RAGGED:
            entry = schedule + HEADER + CUT * (parts + 1) + GROUP * group
            request = tl.minimum(tl.maximum(tl.load(entry), 0), batch - 1)
            first_row = tl.load(entry + 1) * group_rows + lane * ROW_TILE
        else:
            request = tl.minimum(group, batch - 1)
            first_row = lane * ROW_TILE
        # The schedule may have been made under a higher bound than this call's.
        tiles = tl.cdiv(request_keys(kv_lens, request, planned_kv_len), KV_TILE)
        kv_len = request_keys(kv_lens, request, max_kv_len)
        page_row, kv_len = request_pages(pages, indptr, request, table_size, kv_len, PAGE_SIZE, CSR)
        begin = tl.where(group == first_group, first_tile, 0)
        end = tl.where(group == last_group, last_tile, tiles)
        begin_key = begin * KV_TILE
        end_key = tl.minimum(end * KV_TILE, kv_len)

        first_token, request_s_q = request_queries(cu_seqlens_q, request, s_q, queries, RAGGED)
        rows = request_s_q * heads
        if FULL_TILES:
            row_inside = tl.full([ROW_TILE], 1, tl.int1)
        else:
            row_inside = tile_rows < rows - first_row
        # Bottom-right: the last query sees every key. `seen_end` is where the keys end that all
        # rows of the tile see.
        before_queries = kv_len - request_s_q + 1
        seen_end = end_key
        if CAUSAL:
            last_row = tl.minimum(first_row + (ROW_TILE - 1), rows - 1)
            end_key = tl.minimum(end_key, before_queries + last_row // heads)
            seen_end = tl.minimum(end_key, before_queries + first_row // heads)
        if RAGGED:
            end_key = tl.where(first_row < rows, end_key, 0)
            seen_end = tl.minimum(seen_end, end_key)

        # Whole blocks need no mask. The keys around them are taken in smaller steps.
        whole_begin = tl.cdiv(begin_key, BLOCK_N) * BLOCK_N if ONE_PAGE else begin_key
        whole_end = whole_begin + tl.maximum(seen_end - whole_begin, 0) // BLOCK_N * BLOCK_N
        edge_end = end_key - begin_key - (whole_end - whole_begin)
        # The first page ids need not wait for the length: past it, a dense table is still the
        # table, and what page the id names does not matter.
        reach = end_key if CSR else max_kv_len
        page = first_page_ids(page_row, whole_begin, block_keys, reach, PAGE_SIZE, ONE_PAGE)
        edge_begin = edge_block(begin_key, 0, whole_begin, whole_end)
        edge_page = first_page_ids(page_row, edge_begin, edge_keys, reach, PAGE_SIZE, EDGE_ONE_PAGE)
        q_value, q_tail = load_queries(
            q_nope, q_rope, request, first_token, first_row, tile_rows, row_inside, heads,
            q_nope_stride_b, q_nope_stride_s, q_nope_stride_h,
            q_rope_stride_b, q_rope_stride_s, q_rope_stride_h,
            VALUE, NOPE, TAIL, ROPE_IN_VALUE, NOPE_STEP, ROPE_STEP,
        )  # fmt: skip
        visible_end = before_queries + (first_row + tile_rows) // heads
        value_factor, tail_factor = scale_log2, scale_log2
        if ORDERED:
            q_value = key_order(q_value)
        if STORED == ONE_SCALE:
            value_scale = tl.load(scales)
            q_value, value_factor = as_half_rows(q_value)
            value_factor = times_factor(value_factor, DECODE) * value_scale * scale_log2
            tail_factor = value_factor
            if TAIL > 0:
                tail_scale = tl.load(scales + 1)
                q_tail, tail_factor = as_half_rows(q_tail)
                tail_factor = times_factor(tail_factor, DECODE) * tail_scale * scale_log2

        running_max = tl.full([ROW_TILE], LOWEST, tl.float32)
        running_sum = tl.zeros([ROW_TILE], tl.float32)
        accumulator = tl.zeros([ROW_TILE, VALUE], tl.float32)
        tail_accumulator = 0.0
        if LATENT < VALUE:
            tail_accumulator = tl.zeros([ROW_TILE, TAIL], tl.float32)
        for block in tl.range(
            whole_begin, whole_end, BLOCK_N, num_stages=STAGES, disable_licm=OUT_STEP == 0
        ):
            running_max, running_sum, accumulator, tail_accumulator = attend(
                q_value, q_tail, running_max, running_sum, accumulator, tail_accumulator,
                ckv, kpe, scales, page, block, end_key, visible_end,
                ckv_stride_page, kpe_stride_page, scales_stride_page, num_pages,
                value_factor, tail_factor, VALUE, TAIL, FUSED, CKV_SLOT, KPE_SLOT, PAGE_SIZE,
                STORED, LATENT, SCALED, SCALES_SLOT, DECODE,
                BLOCK_N, False, CAUSAL, PRECISION, EMULATE,
                ORDERED, CHUNKS,
            )  # fmt: skip
            # The next page id is on its way while this block is computed: an indirect load inside
            # the step would cost a stage of the pipeline.
            page = next_page_ids(
                page_row, block + BLOCK_N, block_keys, end_key - 1, PAGE_SIZE, ONE_PAGE
            )
        for step in tl.range(0, edge_end, EDGE, num_stages=STAGES, disable_licm=True):
            block = edge_block(begin_key, step, whole_begin, whole_end)
            running_max, running_sum, accumulator, tail_accumulator = attend(
                q_value, q_tail, running_max, running_sum, accumulator, tail_accumulator,
                ckv, kpe, scales, edge_page, block, end_key, visible_end,
                ckv_stride_page, kpe_stride_page, scales_stride_page, num_pages,
                value_factor, tail_factor, VALUE, TAIL, FUSED, CKV_SLOT, KPE_SLOT, PAGE_SIZE,
                STORED, LATENT, SCALED, SCALES_SLOT, DECODE,
                EDGE, True, CAUSAL, PRECISION, EMULATE,
                ORDERED, CHUNKS,
            )  # fmt: skip
            following = edge_block(begin_key, step + EDGE, whole_begin, whole_end)
            edge_page = next_page_ids(
                page_row, following, edge_keys, end_key - 1, PAGE_SIZE, EDGE_ONE_PAGE
            )

        result, lse_log2 = finish_softmax(accumulator, running_max, running_sum)
        if ORDERED:
            result = column_order(result, CHUNKS)
        if STORED == ONE_SCALE:
            # A row that saw nothing is 0 whatever the scale is.
            result = times_factor(result, DECODE) * value_scale
            result = tl.where((running_sum == 0.0)[:, None], 0.0, result)
        result_inside = row_inside[:, None]
        if LATENT < VALUE:
            tail_result, _ = finish_softmax(tail_accumulator, running_max, running_sum)
            result_inside = result_inside & (value_columns < LATENT)[None, :]
        if (begin == 0) & (end == tiles):
            out_rows = row_pointers(
                out, request, first_token, first_row, tile_rows, heads,
                out_stride_b, out_stride_s, out_stride_h, OUT_STEP,
            )  # fmt: skip
            lse_rows = row_pointers(
                lse, request, first_token, first_row, tile_rows, heads,
                lse_stride_b, lse_stride_s, lse_stride_h, LSE_STEP,
            )  # fmt: skip
            tl.store(
                out_rows[:, None] + value_columns[None, :],
                narrow(result, out.dtype.element_ty, EMULATE_BF16),
                mask=result_inside,
            )
            if LATENT < VALUE:
                tl.store(
                    out_rows[:, None] + (LATENT + tail_columns)[None, :],
                    narrow(tail_result, out.dtype.element_ty, EMULATE_BF16),
                    mask=row_inside[:, None],
                )
            tl.store(lse_rows, lse_log2 * LN_2, mask=row_inside)
        else:
            # Only a part's first group can continue an earlier part, and only its last can begin
            # here and go on, so two slots are enough.
            slot = 2 * part + (begin == 0).to(tl.int32)
            first_partial = slot.to(tl.int64) * group_rows + lane * ROW_TILE
            tl.store(
                partial_out
                + first_partial * VALUE
                + (tile_rows[:, None] * VALUE + value_columns[None, :]),
                result,
                mask=result_inside,
                eviction_policy="evict_last",
            )
            if LATENT < VALUE:
                tl.store(
                    partial_out
                    + first_partial * VALUE
                    + (tile_rows[:, None] * VALUE + (LATENT + tail_columns)[None, :]),
                    tail_result,
                    mask=row_inside[:, None],
                    eviction_policy="evict_last",
                )
            tl.store(partial_lse + first_partial + tile_rows, lse_log2, mask=row_inside)


def variant(problem: DecodeProblem, config: Config, geometry: Geometry, device: Device) -> Variant:
    """The kernel for a problem: everything but sizes that change from step to step is constant."""
    storage, is_apart = problem.storage, rope_is_apart_inside(problem)
    return Variant(
        decode_kernel,
        tuple(argument_types(problem, device).items()),
        (
            ("VALUE", problem.value_dim),
            ("NOPE", problem.latent),
            ("TAIL", problem.rope if is_apart else problem.key_tail),
            ("ROPE_IN_VALUE", problem.rope_in_value and not is_apart),
            ("FUSED", problem.fused),
            ("CKV_SLOT", problem.ckv_stride_slot),
            ("KPE_SLOT", problem.kpe_stride_slot),
            ("STORED", stored_as(problem)),
            ("LATENT", problem.latent if is_apart else problem.value_dim),
            ("SCALED", storage.group if storage is not None else 0),
            ("SCALES_SLOT", storage.scales_stride_slot if storage is not None else 0),
            ("KPE_UNIT", kpe_unit(problem)),
            ("DECODE", decoding(device)),
            ("NOPE_STEP", problem.row_steps.q_nope),
            ("ROPE_STEP", problem.row_steps.q_rope),
            ("OUT_STEP", problem.row_steps.out),
            ("LSE_STEP", problem.row_steps.lse),
            ("PAGE_SIZE", problem.page_size),
            ("CSR", problem.csr),
            ("RAGGED", problem.ragged),
            ("CAUSAL", problem.causal),
            ("FULL_TILES", not problem.ragged and problem.rows % geometry.row_tile == 0),
            ("KV_TILE", geometry.kv_tile),
            ("ROW_TILE", geometry.row_tile),
            ("BLOCK_N", config.block_n),
            # Steps outside whole blocks. Pieces of any plan begin at multiples of it.
            ("EDGE", min(config.block_n, KV_TILE)),
            ("STAGES", config.num_stages),
            ("PRECISION", precision(problem, device)),
            ("EMULATE_BF16", emulates_bf16(problem.dtype, device)),
            ("PROGRAMMATIC", device.has_programmatic_launch),
            ("ORDERED", is_ordered(problem, geometry.row_tile, device)),
            ("CHUNKS", 8 * config.num_warps),
        ),
        aligned_arguments(problem),
        config.num_warps,
        config.num_stages,
        programmatic=device.has_programmatic_launch,
    )


def argument_types(problem: DecodeProblem, device: Device) -> dict[str, str]:
    """Triton's types of the run-time arguments, by name."""
    pointer = f"*{TYPE_NAMES[problem.dtype]}"
    types = {name: pointer if kind == "*T" else kind for name, kind in ARGUMENTS}
    storage = problem.storage
    types["scales"] = "*u8" if storage is not None and storage.scale == torch.uint8 else "*fp32"
    if storage is not None:
        numbers = "*fp8e4nv" if decoding(device) == NATIVE.value else "*u8"
        types["ckv"] = numbers
        if not storage.group:
            types["kpe"] = numbers
    return types


def aligned_arguments(problem: DecodeProblem) -> frozenset[str]:
    """Those that are promised to be multiples of `ALIGNMENT`."""
    if not problem.aligned:
        return frozenset({"partial_out"})
    return ALIGNED if problem.storage is None else ALIGNED - {"kpe_stride_page"}


def stored_as(problem: DecodeProblem) -> str:
    if problem.storage is None:
        return SAME.value
    return GROUPS.value if problem.storage.group else ONE_SCALE.value


def kpe_unit(problem: DecodeProblem) -> int:
    """What `kpe_stride_page` is given in: rows of 16 bytes may be 8 numbers apart."""
    return ALIGNMENT // 2 if problem.storage is not None and problem.aligned else 1


def decoding(device: Device) -> str:
    """How e4m3 becomes float16 on a card."""
    if device.has_fp8:
        return NATIVE.value
    return BYTES.value if device.backend == "interpreter" else WORDS.value


def arguments(problem: DecodeProblem, geometry: Geometry, tensors: DecodeTensors) -> list[Any]:
    """The run-time arguments, in the order of `ARGUMENTS`."""
    t = tensors
    return [
        t.q_nope,
        t.q_rope,
        t.ckv,
        t.kpe,
        t.scales,
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
        0 if t.kpe is None else t.kpe.stride(0) // kpe_unit(problem),
        0 if t.scales is None or t.scales.dim() == 1 else t.scales.stride(0),
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
    launcher: Launch, problem: DecodeProblem, geometry: Geometry, tensors: DecodeTensors
) -> None:
    """Writes `out` and `lse`, or partial results where the schedule cuts a group."""
    launcher((geometry.lanes, geometry.parts, 1), arguments(problem, geometry, tensors))
