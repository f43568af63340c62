"""Two partitions of the Hopper kernel over an e4m3 cache, for tiles of 64 rows: one warpgroup makes
weights, two the output.

The first product of a block is about as long as the second, so that each of the two partitions has
products under way while the other makes operands, or weights; and a byte is converted once for
each product, whatever the rows. Weights go from the one to the other by two places in turn, with
what accumulators are to be multiplied by before they are added to: also after the last block of a
group, where that is 1 / the sum of weights.

| barrier | who arrives | who waits | meaning |
| --- | --- | --- | --- |
| full | TMA | both | a block's keys are in their slot, and their scales |
| empty | both, as one each | loader | they were used up |
| ready | weights | output | weights of a block, and factors, are in their place |
| free | output | weights | they were used up |
"""

# No `from __future__ import annotations`: Triton reads the annotations.

from mla_triton.kernels.sm90.gluon import (
    aggregate,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    sync_threads,
)
from mla_triton.kernels.sm90.pieces import LOWEST, partial_row
from mla_triton.kernels.sm90.quantised_groups import load_scales
from mla_triton.kernels.sm90.quantised_operands import CHUNK, prepare_queries, row_each
from mla_triton.kernels.sm90.quantised_output import (
    add_block,
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
    load_sums,
    more_of_block,
    new_largest,
    product_factors,
    start_scores,
    store_sums,
    store_weights,
    sums_of_rows,
    sums_of_thread,
    tell_largest,
)

KEYS = gl.constexpr(64)
"""Of a block."""
MAKERS = gl.constexpr(4)
"""Warps that make weights."""
AVERAGERS = gl.constexpr(8)
"""Warps that make the output."""


@aggregate
class Handover:
    """What passes from one partition to the other, beside the weights; and the largest scores and
    the sums of the first, for which it has no registers."""

    factors: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    maxima: gl.shared_memory_descriptor
    sums: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, factors, ready, free, maxima, sums):
        self.factors = factors
        self.ready = ready
        self.free = free
        self.maxima = maxima
        self.sums = sums


@gluon.jit
def hand_over(handover, turn):
    """What is in the place of a turn is there."""
    sync_threads()
    mbarrier.arrive(handover.ready.index(turn & 1), count=1)


@gluon.jit
def wait_for_place(handover, turn):
    mbarrier.wait(handover.free.index(turn & 1), (turn >> 1 & 1) ^ 1)


@gluon.jit
def wait_for_weights(handover, turn):
    mbarrier.wait(handover.ready.index(turn & 1), turn >> 1 & 1)


@gluon.jit
def make_weights(
    call, shared, handover, q_nope, q_rope, scales, lse, partial_lse, scale_log2,
    nope_stride_b, nope_stride_s, nope_stride_h, rope_stride_b, rope_stride_s, rope_stride_h,
    lse_stride_b, lse_stride_s, lse_stride_h,
    VALUE: gl.constexpr, TAIL: gl.constexpr, GROUPS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """One warpgroup."""
    ROWS: gl.constexpr = call.ROWS
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [MAKERS, 1], [16, ROWS, 16])
    BY_ROW: gl.constexpr = gl.SliceLayout(0, PRODUCT)
    tile_rows = gl.arange(0, ROWS, BY_ROW)
    block_keys = gl.arange(0, KEYS, gl.SliceLayout(1, PRODUCT))
    cuts = call.groups()
    is_zero, unit, rope_ratio, out_scale = cache_scales(scales, GROUPS)
    step = cuts[0] * 0
    turn = cuts[0] * 0
    end_group = cuts[2] + (cuts[3] > 0).to(gl.int32)
    for group in range(cuts[0], end_group):
        request, first_row = call.place(group)
        begin_key = call.begin(group, cuts)
        reach = call.page_row(request)[1]
        end_key, seen_end, before_queries, whole = call.keys(group, cuts, request, first_row, reach)
        factor = prepare_queries(
            call, shared, q_nope, q_rope, request, first_row, is_zero,
            nope_stride_b, nope_stride_s, nope_stride_h,
            rope_stride_b, rope_stride_s, rope_stride_h, VALUE // CHUNK, TAIL, GROUPS, MAKERS,
        )  # fmt: skip
        factor, rope_factor = product_factors(factor, unit, rope_ratio, scale_log2, GROUPS)
        handover.maxima.index(0).store(gl.full([ROWS], LOWEST, gl.float32, BY_ROW))
        none = sums_of_thread(gl.zeros([KEYS, ROWS], gl.float32, PRODUCT))
        SUMS: gl.constexpr = none.type.layout
        store_sums(none, handover.sums.index(0))
        for block in range(begin_key, end_key, KEYS):
            slot = step % SLOTS
            mbarrier.wait(shared.full.index(slot), step // SLOTS & 1)
            # Zero, but not to the compiler: it would keep a descriptor for every step of a product.
            zero = block >> 31
            if GROUPS > 0:
                key_scales = load_scales(shared, slot, end_key - block, block_keys, MAKERS)
            else:
                key_scales = 0
            scores, rope_scores = start_scores(
                shared, step, slot, zero, key_scales, factor, ROWS, VALUE, TAIL, GROUPS, MAKERS,
                PRODUCT,
            )  # fmt: skip
            scores = finish_scores(shared, scores, rope_scores, factor, rope_factor, TAIL, GROUPS)
            mbarrier.arrive(shared.empty.index(slot), count=1)
            scores = hide_keys(
                call, scores, block, block_keys, tile_rows, first_row, end_key, seen_end,
                before_queries,
            )  # fmt: skip
            running_max = handover.maxima.index(0).load(BY_ROW)
            rescale = gl.full([ROWS], 1.0, gl.float32, BY_ROW)
            above = scores - gl.expand_dims(running_max, 0)
            more = more_of_block(key_scales, GROUPS)
            tell_largest(above, more, shared.exchange, MAKERS)
            # In most blocks these are the weights: warps wait for each other meanwhile.
            weights = gl.exp2(above)
            sums = load_sums(handover.sums.index(0), SUMS)
            of_block = sums_of_thread(weights)
            if largest_told(shared.exchange, MAKERS) > SLACK:
                new_max = new_largest(scores, more, running_max, shared.exchange, GROUPS, MAKERS)
                rescale = gl.exp2(running_max - new_max)
                handover.maxima.index(0).store(new_max)
                sums *= as_factor(rescale, SUMS)
                weights = gl.exp2(scores - gl.expand_dims(new_max, 0))
                of_block = sums_of_thread(weights)
            store_sums(sums + of_block, handover.sums.index(0))
            wait_for_place(handover, turn)
            handover.factors.index(turn & 1).store(rescale)
            store_weights(shared.weights.index(turn & 1), weights, key_scales, GROUPS)
            fence_async_shared()
            hand_over(handover, turn)
            step += 1
            turn += 1

        sums = load_sums(handover.sums.index(0), SUMS)
        total, is_empty = sums_of_rows(sums, shared.exchange, row_each(MAKERS))
        wait_for_place(handover, turn)
        handover.factors.index(turn & 1).store(out_scale / total)
        hand_over(handover, turn)
        turn += 1
        store_lse(
            call, request, first_row, whole, partial_row(call, begin_key == 0),
            handover.maxima.index(0).load(row_each(MAKERS)), total, is_empty, lse, partial_lse,
            lse_stride_b, lse_stride_s, lse_stride_h,
        )  # fmt: skip


@gluon.jit
def average(
    call, shared, handover, out, partial_out, out_stride_b, out_stride_s, out_stride_h,
    VALUE: gl.constexpr, GROUPS: gl.constexpr, SLOTS: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """Two warpgroups, each with half of the columns of a product."""
    ROWS: gl.constexpr = call.ROWS
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [AVERAGERS, 1], [16, ROWS, 16])
    BY_ROW: gl.constexpr = gl.SliceLayout(0, PRODUCT)
    cuts = call.groups()
    step = cuts[0] * 0
    turn = cuts[0] * 0
    end_group = cuts[2] + (cuts[3] > 0).to(gl.int32)
    for group in range(cuts[0], end_group):
        request, first_row = call.place(group)
        begin_key = call.begin(group, cuts)
        reach = call.page_row(request)[1]
        end_key, _, _, whole = call.keys(group, cuts, request, first_row, reach)
        accumulators = no_output(ROWS, VALUE, GROUPS, AVERAGERS, PRODUCT)
        for block in range(begin_key, end_key, KEYS):
            slot = step % SLOTS
            mbarrier.wait(shared.full.index(slot), step // SLOTS & 1)
            if GROUPS == 0:  # noqa: SIM102, which would make a value of a constant
                if block + KEYS > end_key:
                    # Once scores are made of them.
                    wait_for_weights(handover, turn)
                    clear_past(shared, slot, end_key - block, VALUE, KEYS, AVERAGERS)
            following = load_values(shared, slot, 0, KEYS, STEP, GROUPS, AVERAGERS)
            wait_for_weights(handover, turn)
            rescale = handover.factors.index(turn & 1).load(BY_ROW)
            if gl.min(rescale, 0) < 1.0:
                accumulators = rescaled(accumulators, rescale)
            accumulators = add_block(
                shared, shared.weights.index(turn & 1), slot, accumulators, (), following,
                KEYS, VALUE, GROUPS, AVERAGERS, STEP, PRODUCT,
            )  # fmt: skip
            mbarrier.arrive(handover.free.index(turn & 1), count=1)
            mbarrier.arrive(shared.empty.index(slot), count=1)
            step += 1
            turn += 1

        wait_for_weights(handover, turn)
        factor = handover.factors.index(turn & 1).load(BY_ROW)
        mbarrier.arrive(handover.free.index(turn & 1), count=1)
        turn += 1
        store_output(
            call, accumulators, factor, request, first_row, whole,
            partial_row(call, begin_key == 0), out, partial_out,
            out_stride_b, out_stride_s, out_stride_h, VALUE, GROUPS, AVERAGERS,
        )  # fmt: skip
