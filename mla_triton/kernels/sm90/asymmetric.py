"""One warpgroup does queries x keys, the softmax and the left half of the output; the other the
right half. For few rows: memory is what such a program waits for.

| barrier | who arrives | who waits | meaning |
| --- | --- | --- | --- |
| left_full, right_full | TMA | scores | half of a key block is in its slot |
| left_empty | scores | loader | the left half was used up |
| right_empty | right | loader | the right half and the rotary keys were used up |
| weights_ready | scores | right | a block's weights and rescale factors are there |
| weights_free | right | scores | they were used up |
| sum_ready | scores | right | a group's sums are there |
| query_free | right | scores | the group's sums and the place of its right queries were used up |

Shared memory at 512 + 64: queries 64 KiB (their rotary part passes through a slot of the weights
into registers), two key blocks of 72 KiB, weights 16 KiB: 224 KiB.
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
    wait_keys,
)

SLOTS = gl.constexpr(2)


@aggregate
class Shared:
    """Shared memory and its barriers."""

    query_left: gl.shared_memory_descriptor
    query_right: gl.shared_memory_descriptor
    left: gl.shared_memory_descriptor
    right: gl.shared_memory_descriptor
    rope: gl.shared_memory_descriptor
    weights: gl.shared_memory_descriptor
    factors: gl.shared_memory_descriptor
    left_full: gl.shared_memory_descriptor
    right_full: gl.shared_memory_descriptor
    left_empty: gl.shared_memory_descriptor
    right_empty: gl.shared_memory_descriptor
    weights_ready: gl.shared_memory_descriptor
    weights_free: gl.shared_memory_descriptor
    sum_ready: gl.shared_memory_descriptor
    query_free: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(
        self, query_left, query_right, left, right, rope, weights, factors, left_full, right_full,
        left_empty, right_empty, weights_ready, weights_free, sum_ready, query_free,
    ):  # fmt: skip
        self.query_left = query_left
        self.query_right = query_right
        self.left = left
        self.right = right
        self.rope = rope
        self.weights = weights
        self.factors = factors
        self.left_full = left_full
        self.right_full = right_full
        self.left_empty = left_empty
        self.right_empty = right_empty
        self.weights_ready = weights_ready
        self.weights_free = weights_free
        self.sum_ready = sum_ready
        self.query_free = query_free


@gluon.jit
def following(slot, phase):
    """The slot after one, and its phase: a counter that is a value, not a constant.

    With constant slots every descriptor of every slot would be kept in registers.
    """
    last = slot == SLOTS - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def load_keys(
    call, shared, half_map, rope_map, rope_column, page_rows, num_pages,
    HALF: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """The loader: every key block of every group into the slots, as they become free."""
    BOX: gl.constexpr = KEYS if call.PAGE_SIZE > KEYS else call.PAGE_SIZE
    BOXES: gl.constexpr = KEYS // BOX
    cuts = call.groups()
    slot = 0
    phase = 1
    end_group = cuts[2] + (cuts[3] > 0).to(gl.int32)
    for group in range(cuts[0], end_group):
        request, first_row = call.place(group)
        begin_key = call.begin(group, cuts)
        page_row, reach = call.page_row(request)
        page = call.first_page(page_row, reach, begin_key)
        end_key = call.keys(group, cuts, request, first_row, reach)[0]
        for block in range(begin_key, end_key, KEYS):
            mbarrier.wait(shared.left_empty.index(slot), phase)
            mbarrier.expect(shared.left_full.index(slot), KEYS * HALF * 2)
            mbarrier.wait(shared.right_empty.index(slot), phase)
            mbarrier.expect(shared.right_full.index(slot), KEYS * (HALF + TAIL) * 2)
            for box in gl.static_range(BOXES):
                first_key = block + box * BOX
                row = key_row(page, first_key, num_pages, page_rows, call.PAGE_SIZE)
                # On its way while this block is waited for.
                page = call.page(page_row, first_key + BOX, end_key)
                full = shared.left_full.index(slot)
                copy_rows(half_map, row, 0, full, shared.left.index(slot), BOX, box)
                full = shared.right_full.index(slot)
                copy_rows(half_map, row, HALF, full, shared.right.index(slot), BOX, box)
                if TAIL > 0:
                    copy_rows(rope_map, row, rope_column, full, shared.rope.index(slot), BOX, box)
            slot, phase = following(slot, phase)


@gluon.jit
def multiply_keys(call, scores, shared, rope_query, slot, phase, TAIL: gl.constexpr):
    """Starts queries x keys of a block, half by half as they come."""
    wait_keys(call, shared.left_full.index(slot), phase)
    keys = shared.left.index(slot).permute((1, 0))
    scores = warpgroup_mma(shared.query_left.index(0), keys, scores, use_acc=False, is_async=True)
    wait_keys(call, shared.right_full.index(slot), phase)
    keys = shared.right.index(slot).permute((1, 0))
    scores = warpgroup_mma(shared.query_right.index(0), keys, scores, is_async=True)
    if TAIL > 0:
        keys = shared.rope.index(slot).permute((1, 0))
        scores = warpgroup_mma(rope_query, keys, scores, is_async=True)
    return scores


@gluon.jit
def attend_scores(
    call, shared, q_nope, q_rope, out, lse, partial_out, partial_lse, scale_log2,
    nope_stride_b, nope_stride_s, nope_stride_h, rope_stride_b, rope_stride_s, rope_stride_h,
    out_stride_b, out_stride_s, out_stride_h, lse_stride_b, lse_stride_s, lse_stride_h,
    HALF: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    HALVES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_BY_ROW: gl.constexpr = gl.SliceLayout(1, HALVES)
    tile_rows = gl.arange(0, ROWS, BY_ROW)
    block_keys = gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
    dtype: gl.constexpr = out.dtype.element_ty
    cuts = call.groups()
    slot = 0
    phase = 0
    step = 0
    group_phase = 0
    end_group = cuts[2] + (cuts[3] > 0).to(gl.int32)
    for group in range(cuts[0], end_group):
        request, first_row = call.place(group)
        begin_key = call.begin(group, cuts)
        nope_rows = row_offsets(
            call, request, first_row, tile_rows, nope_stride_b, nope_stride_s, nope_stride_h
        )
        # The right one has written the group before it from the place of its queries.
        mbarrier.wait(shared.query_free.index(0), group_phase ^ 1)
        load_query(q_nope, nope_rows, 0, HALF, shared.query_left.index(0))
        load_query(q_nope, nope_rows, HALF, HALF, shared.query_right.index(0))
        if TAIL > 0:
            # The rotary queries pass through the weights' second slot: it has to be free.
            mbarrier.wait(shared.weights_free.index(1), ((step >> 1) & 1) ^ 1)
            rope_rows = row_offsets(
                call, request, first_row, tile_rows, rope_stride_b, rope_stride_s, rope_stride_h
            )
            load_query(q_rope, rope_rows, 0, TAIL, shared.weights.index(1))
        commit_copies()
        reach = call.page_row(request)[1]
        end_key, seen_end, before_queries, whole = call.keys(group, cuts, request, first_row, reach)
        wait_copies(0)
        fence_async_shared()
        sync_threads()
        if TAIL > 0:
            rope_query = shared.weights.index(1).load(gl.DotOperandLayout(0, SCORES, 2))
            sync_threads()
        else:
            rope_query = 0

        accumulator = gl.zeros([ROWS, HALF], gl.float32, HALVES)
        scores = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
        running_max = gl.full([ROWS], LOWEST, gl.float32, BY_ROW)
        running_sum = gl.zeros([ROWS], gl.float32, BY_ROW)
        for block in range(begin_key, end_key, KEYS):
            scores = multiply_keys(call, scores, shared, rope_query, slot, phase, TAIL)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            if block + KEYS > seen_end:
                key = gl.expand_dims(block + block_keys, 0)
                hidden = key >= end_key
                if call.CAUSAL:
                    visible_end = before_queries + (first_row + tile_rows) // call.heads
                    hidden = hidden | (key >= gl.expand_dims(visible_end, 1))
                scores = gl.where(hidden, float("-inf"), scores)
                if block + KEYS > end_key:
                    clear_past(shared.left.index(slot), end_key - block, HALF)
            new_max = gl.maximum(running_max, gl.max(scores, 1) * scale_log2)
            rescale = gl.exp2(running_max - new_max)
            weights = gl.exp2(scores * scale_log2 - gl.expand_dims(new_max, 1))
            running_max = new_max
            narrow = weights.to(dtype)
            turn = step & 1
            mbarrier.wait(shared.weights_free.index(turn), ((step >> 1) & 1) ^ 1)
            shared.factors.index(turn).store(rescale)
            shared.weights.index(turn).store(narrow)
            fence_async_shared()
            mbarrier.arrive(shared.weights_ready.index(turn), count=1)
            running_sum = running_sum * rescale + gl.sum(weights, 1)
            factor = gl.convert_layout(rescale, OUT_BY_ROW)
            accumulator = accumulator * gl.expand_dims(factor, 1)
            operand = gl.convert_layout(narrow, gl.DotOperandLayout(0, HALVES, 2))
            accumulator = warpgroup_mma(
                operand, shared.left.index(slot), accumulator, is_async=True
            )
            accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
            mbarrier.arrive(shared.left_empty.index(slot), count=1)
            slot, phase = following(slot, phase)
            step += 1

        shared.factors.index(2).store(running_sum)
        mbarrier.arrive(shared.sum_ready.index(0), count=1)
        group_phase = group_phase ^ 1
        empty = running_sum == 0.0
        total = gl.where(empty, 1.0, running_sum)
        inverse = gl.convert_layout(1.0 / total, OUT_BY_ROW)
        slot_row = partial_row(call, begin_key == 0)
        store_half(
            call, accumulator * gl.expand_dims(inverse, 1), request, first_row, slot_row, whole,
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
    call, shared, out, partial_out, out_stride_b, out_stride_s, out_stride_h, HALF: gl.constexpr
):
    HALVES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    BY_ROW: gl.constexpr = gl.SliceLayout(1, HALVES)
    cuts = call.groups()
    slot = 0
    step = 0
    group_phase = 0
    end_group = cuts[2] + (cuts[3] > 0).to(gl.int32)
    for group in range(cuts[0], end_group):
        request, first_row = call.place(group)
        begin_key = call.begin(group, cuts)
        reach = call.page_row(request)[1]
        end_key, _, _, whole = call.keys(group, cuts, request, first_row, reach)
        accumulator = gl.zeros([ROWS, HALF], gl.float32, HALVES)
        for block in range(begin_key, end_key, KEYS):
            turn = step & 1
            wait_keys(call, shared.weights_ready.index(turn), (step >> 1) & 1)
            if block + KEYS > end_key:
                clear_past(shared.right.index(slot), end_key - block, HALF)
            factor = shared.factors.index(turn).load(BY_ROW)
            accumulator = accumulator * gl.expand_dims(factor, 1)
            accumulator = warpgroup_mma(
                shared.weights.index(turn), shared.right.index(slot), accumulator, is_async=True
            )
            accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
            mbarrier.arrive(shared.right_empty.index(slot), count=1)
            mbarrier.arrive(shared.weights_free.index(turn), count=1)
            slot = gl.where(slot == SLOTS - 1, 0, slot + 1)
            step += 1

        mbarrier.wait(shared.sum_ready.index(0), group_phase)
        running_sum = shared.factors.index(2).load(BY_ROW)
        group_phase = group_phase ^ 1
        inverse = 1.0 / gl.where(running_sum == 0.0, 1.0, running_sum)
        store_half(
            call, accumulator * gl.expand_dims(inverse, 1), request, first_row,
            partial_row(call, begin_key == 0), whole, out, partial_out, shared.query_right.index(0),
            out_stride_b, out_stride_s, out_stride_h, HALF, HALF, HALVES,
        )  # fmt: skip
        mbarrier.arrive(shared.query_free.index(0), count=1)
