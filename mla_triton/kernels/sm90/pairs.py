"""Each warpgroup does queries x keys and the softmax of every other block, and one half of the
output of all. For many rows: the matrix units are what such a program waits for, and each of them
has a product to do while the other warpgroup is at its softmax.

Of a pair of blocks the first is the *left* warpgroup's, the second the *right* one's:

    left    Q K0 | softmax 0 -> P0 | P0 V0 left            | P1 V1 left
    right   Q K1 |        wait P0  | P0 V0 right, softmax 1 -> P1 | P1 V1 right

The right one multiplies P0 before its own softmax, so that every half of a key block has other
products between its last use and its next.

| barrier | who arrives | who waits | meaning |
| --- | --- | --- | --- |
| left_full, right_full, rope_full | TMA | both | a part of a key block is in its slot |
| left_empty | left | loader | the left half was used up |
| right_empty | right | loader | the right half was used up |
| weights_ready | left: 0, right: 1 | the other | a block's weights and running maximum are there |
| query_ready | both | both | all of the queries are there |
| right_sum_ready | right | left | the right one's sums are there; it reads no queries any more |
| sum_ready | left | right | the group's sums are there; the left one reads no queries |

When both halves of a slot were used up, so were its rotary keys, and the weights in their place.
Where there are no rotary keys the weights have that place alone, in the same order.

Shared memory at 512 + 64: queries 72 KiB, two key blocks of 72 KiB: 216 KiB. Weights lie where the
rotary keys were, which are read first.
"""

# No `from __future__ import annotations`: an aggregate reads the types of its fields.

from mla_triton.kernels.sm90.gluon import (
    aggregate,
    commit_copies,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    sync_threads,
    wait_copies,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from mla_triton.kernels.sm90.pieces import (
    KEYS,
    LN_2,
    LOWEST,
    ROWS,
    clear_past,
    copy_rows,
    key_row,
    load_query,
    partial_row,
    row_offsets,
    store_half,
)

# Places among the vectors by which the warpgroups tell each other.
FIRST_MAX = gl.constexpr(0)
SECOND_MAX = gl.constexpr(1)
RIGHT_SUM = gl.constexpr(2)
SUM = gl.constexpr(3)


@aggregate
class Shared:
    """Shared memory and its barriers."""

    query_left: gl.shared_memory_descriptor
    query_right: gl.shared_memory_descriptor
    query_rope: gl.shared_memory_descriptor
    left: gl.shared_memory_descriptor
    right: gl.shared_memory_descriptor
    rope: gl.shared_memory_descriptor
    vectors: gl.shared_memory_descriptor
    left_full: gl.shared_memory_descriptor
    right_full: gl.shared_memory_descriptor
    rope_full: gl.shared_memory_descriptor
    left_empty: gl.shared_memory_descriptor
    right_empty: gl.shared_memory_descriptor
    weights_ready: gl.shared_memory_descriptor
    query_ready: gl.shared_memory_descriptor
    right_sum_ready: gl.shared_memory_descriptor
    sum_ready: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(
        self, query_left, query_right, query_rope, left, right, rope, vectors, left_full,
        right_full, rope_full, left_empty, right_empty, weights_ready, query_ready,
        right_sum_ready, sum_ready,
    ):  # fmt: skip
        self.query_left = query_left
        self.query_right = query_right
        self.query_rope = query_rope
        self.left = left
        self.right = right
        self.rope = rope
        self.vectors = vectors
        self.left_full = left_full
        self.right_full = right_full
        self.rope_full = rope_full
        self.left_empty = left_empty
        self.right_empty = right_empty
        self.weights_ready = weights_ready
        self.query_ready = query_ready
        self.right_sum_ready = right_sum_ready
        self.sum_ready = sum_ready


@gluon.jit
def load_part(
    source_map, row, other_row, column, full, target, BYTES: gl.constexpr, BOX: gl.constexpr
):
    """Starts copying some columns of a key block; from page to page where pages are smaller."""
    mbarrier.expect(full, BYTES)
    copy_rows(source_map, row, column, full, target, BOX, 0)
    if BOX < KEYS:
        copy_rows(source_map, other_row, column, full, target, BOX, 1)


@gluon.jit
def load_pairs(
    call, shared, half_map, rope_map, rope_column, page_rows, num_pages,
    HALF: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """The loader: every pair of key blocks of every group, part by part as parts become free."""
    gl.static_assert(call.PAGE_SIZE >= KEYS // 2)
    BOX: gl.constexpr = KEYS if call.PAGE_SIZE > KEYS else call.PAGE_SIZE
    HALF_BYTES: gl.constexpr = KEYS * HALF * 2
    cuts = call.groups()
    phase = 1
    end_group = cuts[2] + (cuts[3] > 0).to(gl.int32)
    for group in range(cuts[0], end_group):
        request, first_row = call.place(group)
        begin_key = call.begin(group, cuts)
        page_row, reach = call.page_row(request)
        first = call.first_page(page_row, reach, begin_key)
        second = call.first_page(page_row, reach, begin_key + KEYS)
        if BOX < KEYS:
            other_first = call.first_page(page_row, reach, begin_key + BOX)
            other_second = call.first_page(page_row, reach, begin_key + KEYS + BOX)
        end_key = call.keys(group, cuts, request, first_row, reach)[0]
        for block in range(begin_key, end_key, 2 * KEYS):
            rows = (
                key_row(first, block, num_pages, page_rows, call.PAGE_SIZE),
                key_row(second, block + KEYS, num_pages, page_rows, call.PAGE_SIZE),
            )
            other_rows = rows
            # The next ids are on their way while this pair is waited for.
            following = block + 2 * KEYS
            first = call.page(page_row, following, end_key)
            second = call.page(page_row, following + KEYS, end_key)
            if BOX < KEYS:
                other_rows = (
                    key_row(other_first, block + BOX, num_pages, page_rows, call.PAGE_SIZE),
                    key_row(other_second, block + KEYS + BOX, num_pages, page_rows, call.PAGE_SIZE),
                )
                other_first = call.page(page_row, following + BOX, end_key)
                other_second = call.page(page_row, following + KEYS + BOX, end_key)
            for which in gl.static_range(2):
                row = rows[which]
                other_row = other_rows[which]
                # Each block begins with the half that its warpgroup multiplies first.
                if which == 0:
                    mbarrier.wait(shared.left_empty.index(0), phase)
                    load_part(half_map, row, other_row, 0, shared.left_full.index(0),
                              shared.left.index(0), HALF_BYTES, BOX)  # fmt: skip
                    mbarrier.wait(shared.right_empty.index(0), phase)
                    load_part(half_map, row, other_row, HALF, shared.right_full.index(0),
                              shared.right.index(0), HALF_BYTES, BOX)  # fmt: skip
                else:
                    mbarrier.wait(shared.right_empty.index(1), phase)
                    load_part(half_map, row, other_row, HALF, shared.right_full.index(1),
                              shared.right.index(1), HALF_BYTES, BOX)  # fmt: skip
                    mbarrier.wait(shared.left_empty.index(1), phase)
                    load_part(half_map, row, other_row, 0, shared.left_full.index(1),
                              shared.left.index(1), HALF_BYTES, BOX)  # fmt: skip
                if TAIL > 0:
                    load_part(rope_map, row, other_row, rope_column, shared.rope_full.index(which),
                              shared.rope.index(which), KEYS * TAIL * 2, BOX)  # fmt: skip
            phase = phase ^ 1


@gluon.jit
def multiply(scores, query, keys, full, phase, FIRST: gl.constexpr):
    """Starts queries x keys of some columns, as soon as they are there."""
    mbarrier.wait(full, phase)
    return warpgroup_mma(query, keys.permute((1, 0)), scores, use_acc=not FIRST, is_async=True)


@gluon.jit
def hide(call, scores, block, end_key, seen_end, before_queries, first_row, LAYOUT: gl.constexpr):
    """Scores with -inf where a row does not see a key."""
    if block + KEYS > seen_end:
        key = gl.expand_dims(block + gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT)), 0)
        hidden = key >= end_key
        if call.CAUSAL:
            row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
            hidden = hidden | (key >= gl.expand_dims(before_queries + row // call.heads, 1))
        scores = gl.where(hidden, float("-inf"), scores)
    return scores


@gluon.jit
def clear_past_end(keys, block, end_key, WIDTH: gl.constexpr):
    if block + KEYS > end_key:
        clear_past(keys, end_key - block, WIDTH)


@gluon.jit
def rescaled(accumulator, factor, LAYOUT: gl.constexpr):
    return accumulator * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, LAYOUT)), 1)


@gluon.jit
def attend_left(
    call, shared, q_nope, q_rope, out, lse, partial_out, partial_lse, scale_log2,
    nope_stride_b, nope_stride_s, nope_stride_h, rope_stride_b, rope_stride_s, rope_stride_h,
    out_stride_b, out_stride_s, out_stride_h, lse_stride_b, lse_stride_s, lse_stride_h,
    HALF: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    HALVES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    tile_rows = gl.arange(0, ROWS, BY_ROW)
    cuts = call.groups()
    phase = 0
    group_phase = 0
    end_group = cuts[2] + (cuts[3] > 0).to(gl.int32)
    for group in range(cuts[0], end_group):
        request, first_row = call.place(group)
        begin_key = call.begin(group, cuts)
        nope_rows = row_offsets(
            call, request, first_row, tile_rows, nope_stride_b, nope_stride_s, nope_stride_h
        )
        load_query(q_nope, nope_rows, 0, HALF, shared.query_left.index(0))
        if TAIL > 0:
            rope_rows = row_offsets(
                call, request, first_row, tile_rows, rope_stride_b, rope_stride_s, rope_stride_h
            )
            load_query(q_rope, rope_rows, 0, TAIL, shared.query_rope.index(0))
        commit_copies()
        reach = call.page_row(request)[1]
        end_key, seen_end, before_queries, whole = call.keys(group, cuts, request, first_row, reach)
        wait_copies(0)
        fence_async_shared()
        sync_threads()
        mbarrier.arrive(shared.query_ready.index(0), count=1)
        mbarrier.wait(shared.query_ready.index(0), group_phase)

        accumulator = gl.zeros([ROWS, HALF], gl.float32, HALVES)
        scores = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
        running_max = gl.full([ROWS], LOWEST, gl.float32, BY_ROW)
        running_sum = gl.zeros([ROWS], gl.float32, BY_ROW)
        for block in range(begin_key, end_key, 2 * KEYS):
            # Zero, but not to the compiler: descriptors of constant slots would all be hoisted
            # out of the loop, and spill.
            zero = block >> 30
            left = shared.left.index(zero)
            scores = multiply(
                scores, shared.query_left.index(zero), left, shared.left_full.index(0), phase, True
            )
            right = shared.right.index(zero)
            scores = multiply(
                scores,
                shared.query_right.index(zero),
                right,
                shared.right_full.index(0),
                phase,
                False,
            )
            rope = shared.rope.index(zero)
            if TAIL > 0:
                query = shared.query_rope.index(zero)
                full = shared.rope_full.index(0)
                scores = multiply(scores, query, rope, full, phase, False)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            scores = hide(call, scores, block, end_key, seen_end, before_queries, first_row, SCORES)
            first_max = gl.maximum(running_max, gl.max(scores, 1) * scale_log2)
            weights = gl.exp2(scores * scale_log2 - gl.expand_dims(first_max, 1))
            narrow = weights.to(out.dtype.element_ty)
            shared.vectors.index(FIRST_MAX).store(first_max)
            rope.store(narrow)
            fence_async_shared()
            mbarrier.arrive(shared.weights_ready.index(0), count=1)
            factor = gl.exp2(running_max - first_max)
            running_sum = running_sum * factor + gl.sum(weights, 1)
            accumulator = rescaled(accumulator, factor, HALVES)
            clear_past_end(left, block, end_key, HALF)
            operand = gl.convert_layout(narrow, gl.DotOperandLayout(0, HALVES, 2))
            accumulator = warpgroup_mma(operand, left, accumulator, is_async=True)
            accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
            mbarrier.arrive(shared.left_empty.index(0), count=1)

            mbarrier.wait(shared.weights_ready.index(1), phase)
            running_max = shared.vectors.index(SECOND_MAX).load(BY_ROW)
            factor = gl.exp2(first_max - running_max)
            running_sum = running_sum * factor
            accumulator = rescaled(accumulator, factor, HALVES)
            left = shared.left.index(zero + 1)
            clear_past_end(left, block + KEYS, end_key, HALF)
            weights_of_right = shared.rope.index(zero + 1)
            accumulator = warpgroup_mma(weights_of_right, left, accumulator, is_async=True)
            accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
            mbarrier.arrive(shared.left_empty.index(1), count=1)
            phase = phase ^ 1

        mbarrier.wait(shared.right_sum_ready.index(0), group_phase)
        running_sum = running_sum + shared.vectors.index(RIGHT_SUM).load(BY_ROW)
        shared.vectors.index(SUM).store(running_sum)
        mbarrier.arrive(shared.sum_ready.index(0), count=1)
        group_phase = group_phase ^ 1
        empty = running_sum == 0.0
        total = gl.where(empty, 1.0, running_sum)
        slot_row = partial_row(call, begin_key == 0)
        store_half(
            call, rescaled(accumulator, 1.0 / total, HALVES), request, first_row, slot_row, whole,
            out, partial_out, shared.query_left.index(0),
            out_stride_b, out_stride_s, out_stride_h, 0, HALF, HALVES,
        )  # fmt: skip
        lse_log2 = gl.where(empty, float("-inf"), running_max + gl.log2(total))
        s_q = call.tokens(request)[1]
        inside = tile_rows < s_q * call.heads - first_row
        if whole:
            lse_rows = row_offsets(
                call, request, first_row, tile_rows, lse_stride_b, lse_stride_s, lse_stride_h
            )
            gl.store(lse + lse_rows, lse_log2 * LN_2, mask=inside)
        else:
            gl.store(partial_lse + (slot_row + tile_rows), lse_log2, mask=inside)


@gluon.jit
def attend_right(
    call, shared, q_nope, out, partial_out, scale_log2,
    nope_stride_b, nope_stride_s, nope_stride_h, out_stride_b, out_stride_s, out_stride_h,
    HALF: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    HALVES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    tile_rows = gl.arange(0, ROWS, BY_ROW)
    cuts = call.groups()
    phase = 0
    group_phase = 0
    end_group = cuts[2] + (cuts[3] > 0).to(gl.int32)
    for group in range(cuts[0], end_group):
        request, first_row = call.place(group)
        begin_key = call.begin(group, cuts)
        nope_rows = row_offsets(
            call, request, first_row, tile_rows, nope_stride_b, nope_stride_s, nope_stride_h
        )
        load_query(q_nope, nope_rows, HALF, HALF, shared.query_right.index(0))
        commit_copies()
        reach = call.page_row(request)[1]
        end_key, seen_end, before_queries, whole = call.keys(group, cuts, request, first_row, reach)
        wait_copies(0)
        fence_async_shared()
        sync_threads()
        mbarrier.arrive(shared.query_ready.index(0), count=1)
        mbarrier.wait(shared.query_ready.index(0), group_phase)

        accumulator = gl.zeros([ROWS, HALF], gl.float32, HALVES)
        scores = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
        running_max = gl.full([ROWS], LOWEST, gl.float32, BY_ROW)
        running_sum = gl.zeros([ROWS], gl.float32, BY_ROW)
        for block in range(begin_key, end_key, 2 * KEYS):
            zero = block >> 30
            right = shared.right.index(zero + 1)
            scores = multiply(
                scores,
                shared.query_right.index(zero),
                right,
                shared.right_full.index(1),
                phase,
                True,
            )
            left = shared.left.index(zero + 1)
            scores = multiply(
                scores, shared.query_left.index(zero), left, shared.left_full.index(1), phase, False
            )
            rope = shared.rope.index(zero + 1)
            if TAIL > 0:
                query = shared.query_rope.index(zero)
                full = shared.rope_full.index(1)
                scores = multiply(scores, query, rope, full, phase, False)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            scores = hide(
                call, scores, block + KEYS, end_key, seen_end, before_queries, first_row, SCORES
            )
            block_max = gl.max(scores, 1) * scale_log2

            mbarrier.wait(shared.weights_ready.index(0), phase)
            first_max = shared.vectors.index(FIRST_MAX).load(BY_ROW)
            first_factor = gl.exp2(running_max - first_max)
            accumulator = rescaled(accumulator, first_factor, HALVES)
            first_right = shared.right.index(zero)
            clear_past_end(first_right, block, end_key, HALF)
            weights_of_left = shared.rope.index(zero)
            accumulator = warpgroup_mma(weights_of_left, first_right, accumulator, is_async=True)

            running_max = gl.maximum(first_max, block_max)
            weights = gl.exp2(scores * scale_log2 - gl.expand_dims(running_max, 1))
            narrow = weights.to(out.dtype.element_ty)
            shared.vectors.index(SECOND_MAX).store(running_max)
            rope.store(narrow)
            fence_async_shared()
            mbarrier.arrive(shared.weights_ready.index(1), count=1)
            factor = gl.exp2(first_max - running_max)
            running_sum = running_sum * (first_factor * factor) + gl.sum(weights, 1)
            accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
            mbarrier.arrive(shared.right_empty.index(0), count=1)
            accumulator = rescaled(accumulator, factor, HALVES)
            clear_past_end(right, block + KEYS, end_key, HALF)
            operand = gl.convert_layout(narrow, gl.DotOperandLayout(0, HALVES, 2))
            accumulator = warpgroup_mma(operand, right, accumulator, is_async=True)
            accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
            mbarrier.arrive(shared.right_empty.index(1), count=1)
            phase = phase ^ 1

        shared.vectors.index(RIGHT_SUM).store(running_sum)
        mbarrier.arrive(shared.right_sum_ready.index(0), count=1)
        mbarrier.wait(shared.sum_ready.index(0), group_phase)
        total = shared.vectors.index(SUM).load(BY_ROW)
        group_phase = group_phase ^ 1
        inverse = 1.0 / gl.where(total == 0.0, 1.0, total)
        store_half(
            call, rescaled(accumulator, inverse, HALVES), request, first_row,
            partial_row(call, begin_key == 0), whole, out, partial_out, shared.query_right.index(0),
            out_stride_b, out_stride_s, out_stride_h, HALF, HALF, HALVES,
        )  # fmt: skip
