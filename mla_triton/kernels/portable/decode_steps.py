"""Device functions of the portable decode kernel: its queries, and a step over a block of keys."""

import triton
import triton.language as tl

from mla_triton.kernels.common.paged import key_rows
from mla_triton.kernels.common.rows import row_pointers
from mla_triton.kernels.common.tiles import dot, narrow, online_softmax_update
from mla_triton.kernels.portable.tiles16 import (
    GROUPS,
    ONE_SCALE,
    half_of,
    key_order,
    load_keys,
    load_scaled_keys,
    value_order,
)


@triton.jit
def load_queries(
    q_nope, q_rope, request, first_token, first_row, tile_rows, mask, heads,
    nope_stride_b, nope_stride_s, nope_stride_h, rope_stride_b, rope_stride_s, rope_stride_h,
    VALUE: tl.constexpr, NOPE: tl.constexpr, TAIL: tl.constexpr, ROPE_IN_VALUE: tl.constexpr,
    NOPE_STEP: tl.constexpr, ROPE_STEP: tl.constexpr,
):  # fmt: skip
    """(columns of the queries that meet the latent, columns that meet the rotary keys behind it).

    Where the value holds the rotary keys, all columns meet the latent, and are returned twice.
    """
    columns = tl.arange(0, VALUE)[None, :]
    nope_rows = row_pointers(
        q_nope, request, first_token, first_row, tile_rows, heads,
        nope_stride_b, nope_stride_s, nope_stride_h, NOPE_STEP,
    )[:, None]  # fmt: skip
    if TAIL == 0 and not ROPE_IN_VALUE:
        q_value = tl.load(nope_rows + columns, mask=mask[:, None], other=0.0)
        return q_value, q_value
    else:
        rope_rows = row_pointers(
            q_rope, request, first_token, first_row, tile_rows, heads,
            rope_stride_b, rope_stride_s, rope_stride_h, ROPE_STEP,
        )[:, None]  # fmt: skip
        if ROPE_IN_VALUE:
            # One load from either address, not a choice of two loads: what is loaded can go to
            # shared memory, what is computed stays in registers throughout the key loop.
            address = tl.where(columns < NOPE, nope_rows + columns, rope_rows + (columns - NOPE))
            q_value = tl.load(address, mask=mask[:, None], other=0.0)
            return q_value, q_value
        else:
            wanted = mask[:, None]
            if NOPE < VALUE:
                wanted = wanted & (columns < NOPE)
            q_value = tl.load(nope_rows + columns, mask=wanted, other=0.0)
            tail_columns = tl.arange(0, TAIL)[None, :]
            return q_value, tl.load(rope_rows + tail_columns, mask=mask[:, None], other=0.0)


@triton.jit
def attend(
    q_value, q_tail, running_max, running_sum, accumulator, tail_accumulator,
    ckv, kpe, scales, page, block, end_key, visible_end,
    ckv_stride_page, kpe_stride_page, scales_stride_page, num_pages, value_factor, tail_factor,
    VALUE: tl.constexpr, TAIL: tl.constexpr, FUSED: tl.constexpr,
    CKV_SLOT: tl.constexpr, KPE_SLOT: tl.constexpr, PAGE_SIZE: tl.constexpr,
    STORED: tl.constexpr, LATENT: tl.constexpr, SCALED: tl.constexpr, SCALES_SLOT: tl.constexpr,
    DECODE: tl.constexpr,
    KEYS: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE_BF16: tl.constexpr,
    ORDERED: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The online softmax over one block of `KEYS` keys: its new (maximum, sum, accumulators).

    The second accumulator is of the rotary keys, where they are part of the value and lie apart
    (`LATENT` < `VALUE`).

    `value_factor` and `tail_factor` are what the products with the latents and with the rotary keys
    behind them are multiplied by: one number for both, or, with one scale for all latents, two for
    each row. Without `MASKED` every row sees every key of the block.
    """
    ONE_PAGE: tl.constexpr = PAGE_SIZE % KEYS == 0
    block_keys = tl.arange(0, KEYS)
    ckv_rows = key_rows(
        ckv, page, block, block_keys, ckv_stride_page, num_pages, CKV_SLOT, PAGE_SIZE, ONE_PAGE
    )
    key_inside = block_keys < end_key - block
    if STORED == GROUPS:
        scale_rows = key_rows(
            scales, page, block, block_keys, scales_stride_page, num_pages, SCALES_SLOT, PAGE_SIZE,
            ONE_PAGE,
        )  # fmt: skip
        latent = load_scaled_keys(
            ckv_rows, scale_rows, key_inside, LATENT, VALUE, SCALED, MASKED, DECODE
        )
        latent = narrow(latent, q_value.dtype, EMULATE_BF16)
    else:
        latent = load_keys(ckv_rows, key_inside, VALUE, VALUE, MASKED)
        if STORED == ONE_SCALE:
            latent = half_of(latent, DECODE)
    scores = dot(
        q_value,
        tl.trans(key_order(latent) if ORDERED else latent),
        tl.zeros([q_value.shape[0], KEYS], tl.float32),
        PRECISION,
        EMULATE_BF16,
    )
    if TAIL > 0:
        if FUSED:
            kpe_rows = ckv_rows + VALUE
        else:
            kpe_rows = key_rows(
                kpe, page, block, block_keys, kpe_stride_page, num_pages, KPE_SLOT, PAGE_SIZE,
                ONE_PAGE,
            )  # fmt: skip
        rope_key = load_keys(kpe_rows, key_inside, TAIL, TAIL, MASKED)
        if STORED == ONE_SCALE:
            rope_key = half_of(rope_key, DECODE)
            tail_scores = tl.zeros([q_tail.shape[0], KEYS], tl.float32)
            tail_scores = dot(q_tail, tl.trans(rope_key), tail_scores, PRECISION, EMULATE_BF16)
            scores = scores * value_factor[:, None] + tail_scores * tail_factor[:, None]
        else:
            scores = dot(q_tail, tl.trans(rope_key), scores, PRECISION, EMULATE_BF16)
    if STORED != ONE_SCALE:
        scores = scores * value_factor
    elif TAIL == 0:
        scores = scores * value_factor[:, None]
    if MASKED:
        visible = key_inside[None, :]
        if CAUSAL:
            visible = visible & ((block + block_keys)[None, :] < visible_end[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    running_max, running_sum, rescale, probabilities = online_softmax_update(
        scores, running_max, running_sum
    )
    accumulator = dot(
        narrow(probabilities, latent.dtype, EMULATE_BF16),
        value_order(latent, CHUNKS) if ORDERED else latent,
        accumulator * rescale[:, None],
        PRECISION,
        EMULATE_BF16,
    )
    if LATENT < VALUE:
        tail_accumulator = dot(
            narrow(probabilities, rope_key.dtype, EMULATE_BF16),
            rope_key,
            tail_accumulator * rescale[:, None],
            PRECISION,
            EMULATE_BF16,
        )
    return running_max, running_sum, accumulator, tail_accumulator


@triton.jit
def edge_block(begin_key, step, whole_begin, whole_end):
    """First key of a step over the keys of a piece that are not in `[whole_begin, whole_end)`."""
    block = begin_key + step
    return tl.where(block >= whole_begin, block + (whole_end - whole_begin), block)
