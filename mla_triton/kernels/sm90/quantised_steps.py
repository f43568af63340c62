"""Two partitions of the Hopper kernel over an e4m3 cache: the loader, which all forms of it have,
and warpgroups in step, for tiles of up to 32 rows.

Products are turned round: scores^T = keys x queries^T, output^T = latents^T x weights^T. The side
of a product that has 64 rows a warpgroup is then that of the keys, or of the latent's columns, and
what it reads there it may read from registers. So bytes go from shared memory to registers, become
float16 there, and are multiplied: a tile of 16-bit numbers is never written. The order of rows and
columns inside a product is free, as long as both operands have the same, and is chosen so that a
thread's bytes lie side by side.

Of a block each warp scores 16 keys, and then has 32 of every 128 or 256 columns of all of them.

| barrier | who arrives | who waits | meaning |
| --- | --- | --- | --- |
| full | TMA | warpgroups | a block's keys are in their slot, and their scales |
| empty | they, as one | loader | they were used up |

With scales of groups there is place for rotary keys, of 16 bits, of one block:

| barrier | who arrives | who waits | meaning |
| --- | --- | --- | --- |
| rope_full | TMA | warpgroups | a block's rotary keys are there |
| rope_empty | they, as one | loader | they were used up |
"""

# No `from __future__ import annotations`: an aggregate reads the types of its fields.

from mla_triton.kernels.sm90.gluon import (
    aggregate,
    copy_tile,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    sync_threads,
)
from mla_triton.kernels.sm90.pieces import LOWEST, key_row, partial_row
from mla_triton.kernels.sm90.quantised_groups import load_scales
from mla_triton.kernels.sm90.quantised_operands import CHUNK, WARP_KEYS, prepare_queries, row_each
from mla_triton.kernels.sm90.quantised_output import (
    add_block,
    as_value_operand,
    clear_past,
    load_values,
    no_output,
    rescaled,
    store_lse,
    store_output,
)
from mla_triton.kernels.sm90.quantised_scores import (
    SLACK,
    as_factor,
    cache_scales,
    finish_scores,
    hide_keys,
    largest_told,
    more_of_block,
    new_largest,
    product_factors,
    start_scores,
    store_weights,
    sums_of_rows,
    sums_of_thread,
    tell_largest,
)

HALF_KEYS = gl.constexpr(64)


@aggregate
class Shared:
    """Shared memory and its barriers."""

    query: gl.shared_memory_descriptor
    query_rope: gl.shared_memory_descriptor
    latent: gl.shared_memory_descriptor
    words: gl.shared_memory_descriptor
    rope: gl.shared_memory_descriptor
    scales: gl.shared_memory_descriptor
    weights: gl.shared_memory_descriptor
    exchange: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    rope_full: gl.shared_memory_descriptor
    rope_empty: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(
        self, query, query_rope, latent, words, rope, scales, weights, exchange, full, empty,
        rope_full, rope_empty,
    ):  # fmt: skip
        self.query = query
        self.query_rope = query_rope
        self.latent = latent
        self.words = words
        self.rope = rope
        self.scales = scales
        self.weights = weights
        self.exchange = exchange
        self.full = full
        self.empty = empty
        self.rope_full = rope_full
        self.rope_empty = rope_empty


@gluon.jit
def load_bytes(
    call, shared, latent_map, rope_map, scale_map, rope_column, page_rows, num_pages,
    VALUE: gl.constexpr, TAIL: gl.constexpr, GROUPS: gl.constexpr, WARPS: gl.constexpr,
    SLOTS: gl.constexpr,
):  # fmt: skip
    """The loader: every key block of every group into the slots, as they become free."""
    KEYS: gl.constexpr = WARP_KEYS * WARPS
    ROPE_BYTES: gl.constexpr = KEYS * TAIL * rope_map.dtype.primitive_bitwidth // 8
    PAGE: gl.constexpr = call.PAGE_SIZE if call.PAGE_SIZE < call.TILE else call.TILE
    BOX: gl.constexpr = HALF_KEYS if PAGE > HALF_KEYS else PAGE
    cuts = call.groups()
    step = cuts[0] * 0
    end_group = cuts[2] + (cuts[3] > 0).to(gl.int32)
    for group in range(cuts[0], end_group):
        request, first_row = call.place(group)
        begin_key = call.begin(group, cuts)
        page_row, reach = call.page_row(request)
        page = call.first_page(page_row, reach, begin_key)
        end_key = call.keys(group, cuts, request, first_row, reach)[0]
        for block in range(begin_key, end_key, KEYS):
            slot = step % SLOTS
            full = shared.full.index(slot)
            mbarrier.wait(shared.empty.index(slot), (step // SLOTS & 1) ^ 1)
            mbarrier.expect(full, KEYS * (VALUE + (4 * GROUPS if GROUPS > 0 else TAIL)))
            rows = ()
            for box in gl.static_range(KEYS // BOX):
                first_key = block + box * BOX
                row = key_row(page, first_key, num_pages, page_rows, call.PAGE_SIZE)
                # On its way while this block is waited for.
                page = call.page(page_row, first_key + BOX, end_key)
                into = shared.latent.index(slot).slice(box * BOX, BOX, dim=0)
                copy_tile(latent_map, [row, 0], full, into)
                if GROUPS > 0:
                    into = shared.scales.index(slot).slice(box * BOX, BOX, dim=0)
                    copy_tile(scale_map, [row, 0], full, into)
                    rows += (row,)  # type: ignore
                elif TAIL > 0:
                    into = shared.rope.index(slot).slice(box * BOX, BOX, dim=0)
                    copy_tile(rope_map, [row, rope_column], full, into)
            if GROUPS > 0:
                # Latents do not wait until the rotary keys before these are used up.
                rope_full = shared.rope_full.index(0)
                mbarrier.wait(shared.rope_empty.index(0), (step & 1) ^ 1)
                mbarrier.expect(rope_full, ROPE_BYTES)
                for box in gl.static_range(KEYS // BOX):
                    into = shared.rope.index(0).slice(box * BOX, BOX, dim=0)
                    copy_tile(rope_map, [rows[box], rope_column], rope_full, into)
            step += 1


@gluon.jit
def attend(
    call, shared, q_nope, q_rope, scales, out, lse, partial_out, partial_lse, scale_log2,
    nope_stride_b, nope_stride_s, nope_stride_h, rope_stride_b, rope_stride_s, rope_stride_h,
    out_stride_b, out_stride_s, out_stride_h, lse_stride_b, lse_stride_s, lse_stride_h,
    VALUE: gl.constexpr, TAIL: gl.constexpr, GROUPS: gl.constexpr, WARPS: gl.constexpr,
    SLOTS: gl.constexpr, READY: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """All warps but the loader's."""
    ROWS: gl.constexpr = call.ROWS
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, ROWS, 16])
    BY_ROW: gl.constexpr = gl.SliceLayout(0, PRODUCT)
    KEYS: gl.constexpr = WARP_KEYS * WARPS
    tile_rows = gl.arange(0, ROWS, BY_ROW)
    block_keys = gl.arange(0, KEYS, gl.SliceLayout(1, PRODUCT))
    cuts = call.groups()
    is_zero, unit, rope_ratio, out_scale = cache_scales(scales, GROUPS)
    step = cuts[0] * 0
    end_group = cuts[2] + (cuts[3] > 0).to(gl.int32)
    for group in range(cuts[0], end_group):
        request, first_row = call.place(group)
        begin_key = call.begin(group, cuts)
        reach = call.page_row(request)[1]
        end_key, seen_end, before_queries, whole = call.keys(group, cuts, request, first_row, reach)
        factor = prepare_queries(
            call, shared, q_nope, q_rope, request, first_row, is_zero,
            nope_stride_b, nope_stride_s, nope_stride_h,
            rope_stride_b, rope_stride_s, rope_stride_h, VALUE // CHUNK, TAIL, GROUPS, WARPS,
        )  # fmt: skip
        factor, rope_factor = product_factors(factor, unit, rope_ratio, scale_log2, GROUPS)
        accumulators = no_output(ROWS, VALUE, GROUPS, WARPS, PRODUCT)
        running_max = gl.full([ROWS], LOWEST, gl.float32, BY_ROW)
        sums = sums_of_thread(gl.zeros([KEYS, ROWS], gl.float32, PRODUCT))
        SUMS: gl.constexpr = sums.type.layout
        for block in range(begin_key, end_key, KEYS):
            slot = step % SLOTS
            mbarrier.wait(shared.full.index(slot), step // SLOTS & 1)
            # Zero, but not to the compiler: it would keep a descriptor for every step of a product.
            zero = block >> 31
            if GROUPS > 0:
                key_scales = load_scales(shared, slot, end_key - block, block_keys, WARPS)
            else:
                key_scales = 0
                if block + KEYS > end_key:
                    clear_past(shared, slot, end_key - block, VALUE, KEYS, WARPS)
            scores, rope_scores = start_scores(
                shared, step, slot, zero, key_scales, factor, ROWS, VALUE, TAIL, GROUPS, WARPS,
                PRODUCT,
            )  # fmt: skip
            # What does not need the weights is made ready before they are waited for.
            ready = ()
            for turn in gl.static_range(READY):
                values = load_values(shared, slot, turn, KEYS, STEP, GROUPS, WARPS)
                ready += (  # type: ignore
                    as_value_operand(values, STEP, GROUPS, WARPS, PRODUCT),
                )
            scores = finish_scores(shared, scores, rope_scores, factor, rope_factor, TAIL, GROUPS)
            scores = hide_keys(
                call, scores, block, block_keys, tile_rows, first_row, end_key, seen_end,
                before_queries,
            )  # fmt: skip
            above = scores - gl.expand_dims(running_max, 0)
            more = more_of_block(key_scales, GROUPS)
            tell_largest(above, more, shared.exchange, WARPS)
            # In most blocks these are the weights: warps wait for each other meanwhile.
            weights = gl.exp2(above)
            if largest_told(shared.exchange, WARPS) > SLACK:
                new_max = new_largest(scores, more, running_max, shared.exchange, GROUPS, WARPS)
                rescale = gl.exp2(running_max - new_max)
                running_max = new_max
                sums *= as_factor(rescale, SUMS)
                accumulators = rescaled(accumulators, rescale)
                weights = gl.exp2(scores - gl.expand_dims(new_max, 0))
            sums += sums_of_thread(weights)
            store_weights(shared.weights.index(0), weights, key_scales, GROUPS)
            following = load_values(shared, slot, READY, KEYS, STEP, GROUPS, WARPS)
            fence_async_shared()
            sync_threads()
            accumulators = add_block(
                shared, shared.weights.index(zero), slot, accumulators, ready, following,
                KEYS, VALUE, GROUPS, WARPS, STEP, PRODUCT,
            )  # fmt: skip
            mbarrier.arrive(shared.empty.index(slot), count=1)
            step += 1

        slot_row = partial_row(call, begin_key == 0)
        total, is_empty = sums_of_rows(sums, shared.exchange, row_each(WARPS))
        store_output(
            call, accumulators, gl.convert_layout(out_scale / total, BY_ROW), request, first_row,
            whole, slot_row, out, partial_out, out_stride_b, out_stride_s, out_stride_h,
            VALUE, GROUPS, WARPS,
        )  # fmt: skip
        store_lse(
            call, request, first_row, whole, slot_row,
            gl.convert_layout(running_max, row_each(WARPS)), total, is_empty, lse, partial_lse,
            lse_stride_b, lse_stride_s, lse_stride_h,
        )  # fmt: skip
