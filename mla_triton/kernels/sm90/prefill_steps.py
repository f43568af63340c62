"""The three partitions of the Hopper prefill kernel: a loader, and two warpgroups that attend.

| barrier | who arrives | who waits | meaning |
| --- | --- | --- | --- |
| first_full | TMA | both warpgroups | a chunk of the queries and of the first keys is there |
| full | TMA | both | a block's keys, and the values of the block before, are in their slots |
| free | both | loader | they were used up |
| cleared | both | both | what lay past a sequence's end is gone from its last values |
| passed | nobody | both | nothing: who waits for the phase before its first goes on at once |

There is a `first_full` for each chunk of 64 columns, and what it brings is not `full`'s.
"""

from __future__ import annotations

from mla_triton.kernels.sm90.gluon import (
    copy_tile,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from mla_triton.kernels.sm90.prefill_work import CHUNK, ROWS, TILE

CLEARED = gl.constexpr(32)
"""Rows of values that are cleared at once."""
LOWEST = gl.constexpr(-3.4028234663852886e38)
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def load_chunk(
    nope_map, rope_map, row, head, rope_head, full, target, first,
    NOPE: gl.constexpr, chunk: gl.constexpr,
):  # fmt: skip
    """Starts copying a chunk of the columns of a box of rows, to its place behind target[first]."""
    into = target.index(first + chunk)
    if chunk * CHUNK < NOPE:
        copy_tile(nope_map, [row, head, chunk * CHUNK], full, into)
    else:
        copy_tile(rope_map, [row, rope_head, chunk * CHUNK - NOPE], full, into)


@gluon.jit
def load_tile(
    work, shared, q_map, q_rope_map, k_map, k_rope_map, v_map, group,
    Q_NOPE: gl.constexpr, K_NOPE: gl.constexpr, VALUE: gl.constexpr,
):  # fmt: skip
    """The loader: the queries, and what they see, last keys first."""
    BLOCK_N: gl.constexpr = work.BLOCK_N
    CHUNKS: gl.constexpr = shared.CHUNKS
    KEY_BYTES: gl.constexpr = BLOCK_N * CHUNKS * CHUNK * 2
    VALUE_BYTES: gl.constexpr = BLOCK_N * VALUE * 2
    head, token, rows, first_key, _, _, end_key = work.tile()
    if rows > 0:
        blocks = work.blocks(end_key)
        kv_head = head // group
        rope_head = kv_head if K_NOPE == CHUNKS * CHUNK else 0
        key_row = first_key + (blocks - 1) * BLOCK_N
        # So the first product begins as soon as a chunk of both is there.
        for chunk in gl.static_range(CHUNKS):
            ready = shared.first_full.index(chunk)
            mbarrier.expect(ready, (TILE + BLOCK_N) * CHUNK * 2)
            for half in gl.static_range(2):
                load_chunk(
                    q_map, q_rope_map, token + half * ROWS, head, head, ready, shared.query,
                    half * CHUNKS, Q_NOPE, chunk,
                )  # fmt: skip
            load_chunk(
                k_map, k_rope_map, key_row, kv_head, rope_head, ready, shared.key, 0, K_NOPE, chunk
            )
        # Nobody waits for it; but it has to be as many phases on as the slot was filled.
        mbarrier.arrive(shared.full.index(0), count=1)
        for step in range(1, blocks + 1):
            # Keys are a block ahead of values, as they are used.
            turn = step // shared.SLOTS
            slot = step - turn * shared.SLOTS
            full = shared.full.index(slot)
            mbarrier.wait(shared.free.index(slot), (turn & 1) ^ 1)
            mbarrier.expect(full, KEY_BYTES + VALUE_BYTES, pred=step < blocks)
            mbarrier.expect(full, VALUE_BYTES, pred=step == blocks)
            if step < blocks:
                for chunk in gl.static_range(CHUNKS):
                    load_chunk(
                        k_map, k_rope_map, key_row - BLOCK_N, kv_head, rope_head, full, shared.key,
                        slot * CHUNKS, K_NOPE, chunk,
                    )  # fmt: skip
            copy_tile(v_map, [key_row, kv_head, 0], full, shared.value.index(slot))
            key_row -= BLOCK_N


@gluon.jit
def flat(tile):
    """A box of one head's rows as a matrix."""
    return tile.reshape([tile.shape[0], tile.shape[2]])


@gluon.jit
def wait_loaded(shared, step):
    """Waits for a step's keys, and for the values of the block before."""
    mbarrier.wait(shared.full.index(step % shared.SLOTS), (step // shared.SLOTS) & 1)


@gluon.jit
def multiply_chunk(scores, shared, first_query, first_key, chunk: gl.constexpr, KEYS: gl.constexpr):
    """Starts queries x the first keys of a block, over one chunk of their columns."""
    query = flat(shared.query.index(first_query + chunk))
    key = flat(shared.key.index(first_key + chunk)).slice(0, KEYS, dim=0)
    return warpgroup_mma(query, key.permute((1, 0)), scores, use_acc=chunk > 0, is_async=True)


@gluon.jit
def hidden(scores, scale_log2, block, row_ends, NEGATIVE_SCALE: gl.constexpr):
    """(scaled scores but for their sign, infinite where a row does not see a key; that sign)."""
    LAYOUT: gl.constexpr = scores.type.layout
    SIGN: gl.constexpr = -1.0 if NEGATIVE_SCALE else 1.0
    key = block + gl.arange(0, scores.shape[1], gl.SliceLayout(0, LAYOUT))
    is_hidden = gl.expand_dims(key, 0) >= gl.expand_dims(row_ends, 1)
    scores = gl.where(is_hidden, SIGN * float("-inf"), scores * scale_log2)
    return scores, scale_log2 * 0.0 + SIGN


@gluon.jit
def hidden_and_scaled(
    scores, scale_log2, block, seen_end, row_ends,
    NEGATIVE_SCALE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """(scores, factor that they still need, and that makes them -inf where a key is hidden).

    `MASK` says whether a key may be hidden from a row: "yes", "no", or "look" to find out.
    """
    factor = scale_log2
    if NEGATIVE_SCALE:
        factor = -scale_log2
    if MASK == "look":
        if block + scores.shape[1] > seen_end:
            scores, factor = hidden(scores, scale_log2, block, row_ends, NEGATIVE_SCALE)
    elif MASK == "yes":
        scores, factor = hidden(scores, scale_log2, block, row_ends, NEGATIVE_SCALE)
    return scores, factor


@gluon.jit
def softmax(scores, factor, running_max, running_sum, NEGATIVE_SCALE: gl.constexpr):
    """One step of the online softmax: (maximum, sum, factor of what came before, weights).

    The largest product with a negative factor is that of the smallest score.
    """
    extreme = gl.min(scores, 1) if NEGATIVE_SCALE else gl.max(scores, 1)
    new_max = gl.maximum(running_max, extreme * factor)
    rescale = gl.exp2(running_max - new_max)
    weights = gl.exp2(scores * factor - gl.expand_dims(new_max, 1))
    running_sum = running_sum * rescale + gl.sum(weights, 1)
    return new_max, running_sum, rescale, weights


@gluon.jit
def clear_past(values, valid, FIRST: gl.constexpr, END: gl.constexpr):
    """Zeroes columns of the rows of values from `valid` on: what lies there may be NaN, and 0 x NaN
    is."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    BLOCK_N: gl.constexpr = values.shape[0]
    rows = gl.arange(0, CLEARED, gl.SliceLayout(1, LAYOUT))
    for row in gl.static_range(0, BLOCK_N, CLEARED):
        if row + CLEARED > valid:
            for column in gl.static_range(FIRST, END, CHUNK):
                part = values.slice(row, CLEARED, dim=0).slice(column, CHUNK, dim=1)
                tile = part.load(LAYOUT)
                inside = gl.expand_dims(row + rows, 1) < valid
                part.store(gl.where(inside, tile, gl.zeros_like(tile)))
    fence_async_shared()


@gluon.jit
def wait_first_values(shared, block, value_end, WHICH: gl.constexpr, VALUE: gl.constexpr):
    """Waits for a tile's first values, and until what lay past the end is gone from them."""
    wait_loaded(shared, 1)
    values = flat(shared.value.index(1))
    if block + values.shape[0] > value_end:
        # A half of the columns each.
        HALF: gl.constexpr = VALUE // 2
        clear_past(values, value_end - block, WHICH * HALF, (WHICH + 1) * HALF)
        mbarrier.arrive(shared.cleared.index(0), count=1)
        mbarrier.wait(shared.cleared.index(0), 0)


@gluon.jit
def first_block(
    shared, scale_log2, block, seen_end, row_ends,
    WHICH: gl.constexpr, KEYS: gl.constexpr, NEGATIVE_SCALE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of the first keys of the tile's first block: (scores, maximum, sum,
    weights)."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    scores = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
    for chunk in gl.static_range(shared.CHUNKS):
        mbarrier.wait(shared.first_full.index(chunk), 0)
        scores = multiply_chunk(scores, shared, WHICH * shared.CHUNKS, 0, chunk, KEYS)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(shared.free.index(0), count=1)
    scores, factor = hidden_and_scaled(
        scores, scale_log2, block, seen_end, gl.convert_layout(row_ends, BY_ROW), NEGATIVE_SCALE,
        MASK,
    )  # fmt: skip
    running_max = gl.full([ROWS], LOWEST, gl.float32, BY_ROW)
    running_sum = gl.zeros([ROWS], gl.float32, BY_ROW)
    running_max, running_sum, _, weights = softmax(
        scores, factor, running_max, running_sum, NEGATIVE_SCALE
    )
    return scores, running_max, running_sum, weights


@gluon.jit
def as_operand(weights, accumulator, shared):
    """Weights as the second product takes them, if they are not that already."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, accumulator.type.layout, 2)
    if weights.dtype == gl.float32:
        weights = gl.convert_layout(weights.to(shared.value.dtype), OPERAND)
    return weights


@gluon.jit
def take_step(
    shared, scores, weights, accumulator, running_max, running_sum, scale_log2, block, seen_end,
    row_ends, step, WHICH: gl.constexpr, NEGATIVE_SCALE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """A block's scores and softmax, while the values of the block before are multiplied: of these
    as many as there are weights."""
    CHUNKS: gl.constexpr = shared.CHUNKS
    BLOCK_N: gl.constexpr = scores.shape[1]
    operand = as_operand(weights, accumulator, shared)
    slot = step % shared.SLOTS
    # Zero, but not to the compiler: descriptors of constant places would all be kept.
    zero = block >> 31
    wait_loaded(shared, step)
    for chunk in gl.static_range(CHUNKS):
        scores = multiply_chunk(
            scores, shared, zero + WHICH * CHUNKS, slot * CHUNKS, chunk, BLOCK_N
        )
    values = flat(shared.value.index(slot)).slice(0, weights.shape[1], dim=0)
    accumulator = warpgroup_mma(operand, values, accumulator, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    scores, factor = hidden_and_scaled(
        scores, scale_log2, block, seen_end, row_ends, NEGATIVE_SCALE, MASK
    )
    running_max, running_sum, rescale, weights = softmax(
        scores, factor, running_max, running_sum, NEGATIVE_SCALE
    )
    # Nothing to wait for. But ptxas moves nothing across a wait, and would have moved all of the
    # softmax behind the next one.
    mbarrier.wait(shared.passed.index(0), 1)
    accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
    mbarrier.arrive(shared.free.index(slot), count=1)
    OUT_BY_ROW: gl.constexpr = gl.SliceLayout(1, accumulator.type.layout)
    accumulator = accumulator * gl.expand_dims(gl.convert_layout(rescale, OUT_BY_ROW), 1)
    return scores, accumulator, running_max, running_sum, weights


@gluon.constexpr_function
def line_layout(columns):
    """wgmma's layout of 64 rows, but for eight columns side by side in a thread instead of two:
    the four threads of a row write 64 bytes of it at once."""
    registers = [[0, 1], [0, 2], [0, 4], [8, 0]]
    column = 32
    while column < columns:
        registers.append([0, column])
        column *= 2
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[16, 0], [32, 0]], [], [ROWS.value, columns]
    )


@gluon.jit
def store_result(result, out, token, head, rows, out_stride_t, out_stride_h, WHICH: gl.constexpr):
    """Rows of a result from registers to memory, those that the sequence has."""
    VALUE: gl.constexpr = result.shape[1]
    LINES: gl.constexpr = line_layout(VALUE)
    line = WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LINES))
    columns = gl.arange(0, VALUE, gl.SliceLayout(0, LINES))
    out_rows = out + (token.to(gl.int64) * out_stride_t + head.to(gl.int64) * out_stride_h)
    places = out_rows + gl.expand_dims(line.to(gl.int64) * out_stride_t, 1)
    gl.store(
        places + gl.expand_dims(columns, 0),
        gl.convert_layout(result, LINES),
        mask=gl.expand_dims(line < rows, 1),
    )


@gluon.jit
def attend(
    work, shared, out, lse, scale_log2, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
    WHICH: gl.constexpr, VALUE: gl.constexpr, NEGATIVE_SCALE: gl.constexpr,
):  # fmt: skip
    """A warpgroup: 64 queries of the tile."""
    BLOCK_N: gl.constexpr = work.BLOCK_N
    HALF_N: gl.constexpr = BLOCK_N // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE, 16])
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    tile_rows = WHICH * ROWS + gl.arange(0, ROWS, BY_ROW)
    head, token, rows, _, key_count, row_end, end_key = work.tile()
    if rows > 0:
        blocks = work.blocks(end_key)
        row_ends = gl.full([ROWS], 0, gl.int32, BY_ROW) + key_count
        seen_end = key_count
        if work.CAUSAL:
            row_ends = gl.minimum(row_end + tile_rows, row_ends)
            seen_end = gl.minimum(row_end + WHICH * ROWS, key_count)
        block = (blocks - 1) * BLOCK_N
        value_end = gl.where(end_key > 0, key_count, 0)
        accumulator = gl.zeros([ROWS, VALUE], gl.float32, VALUES)
        step = block * 0 + 1
        # On the diagonal half of a block may be hidden from all of the first warpgroup's queries,
        # from the last one as well, which sees the most: then it is not multiplied.
        is_narrow = (blocks > 1) & (row_end + (ROWS - 1) <= block + HALF_N)
        if work.CAUSAL and WHICH == 0 and is_narrow:
            _half_scores, half_max, half_sum, half_weights = first_block(
                shared, scale_log2, block, seen_end, row_ends, WHICH, HALF_N, NEGATIVE_SCALE, "yes"
            )
            running_max = gl.convert_layout(half_max, BY_ROW)
            running_sum = gl.convert_layout(half_sum, BY_ROW)
            wait_first_values(shared, block, value_end, WHICH, VALUE)
            # These weights are half as many as a loop hands on: their values have a step outside.
            block -= BLOCK_N
            scores = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
            scores, accumulator, running_max, running_sum, weights = take_step(
                shared, scores, half_weights, accumulator, running_max, running_sum, scale_log2,
                block, seen_end, row_ends, step, WHICH, NEGATIVE_SCALE, "yes",
            )  # fmt: skip
            step += 1
        else:
            scores, running_max, running_sum, weights = first_block(
                shared, scale_log2, block, seen_end, row_ends, WHICH, BLOCK_N, NEGATIVE_SCALE,
                "look",
            )  # fmt: skip
            wait_first_values(shared, block, value_end, WHICH, VALUE)

        left = block // BLOCK_N
        if work.CAUSAL:
            # Of the blocks that are left, numbers left - 1 to 0, those from the one on that holds
            # the first key that the first row does not see.
            masked = gl.maximum(left - gl.maximum(seen_end, 0) // BLOCK_N, 0)
            for _ in range(masked):
                block -= BLOCK_N
                scores, accumulator, running_max, running_sum, weights = take_step(
                    shared, scores, weights, accumulator, running_max, running_sum, scale_log2,
                    block, seen_end, row_ends, step, WHICH, NEGATIVE_SCALE, "yes",
                )  # fmt: skip
                step += 1
        else:
            masked = left * 0
            weights = as_operand(weights, accumulator, shared)
        # From one loop into another, and so out of both, weights go in float32: 16-bit numbers
        # would be taken apart on the way and packed again. Where there is but one, it carries
        # them as they are used, which takes fewer registers.
        for _ in range(masked, left):
            block -= BLOCK_N
            scores, accumulator, running_max, running_sum, weights = take_step(
                shared, scores, weights, accumulator, running_max, running_sum, scale_log2,
                block, seen_end, row_ends, step, WHICH, NEGATIVE_SCALE, "no",
            )  # fmt: skip
            if not work.CAUSAL:
                weights = as_operand(weights, accumulator, shared)
            step += 1
        operand = as_operand(weights, accumulator, shared)
        wait_loaded(shared, step)
        values = flat(shared.value.index(step % shared.SLOTS))
        accumulator = warpgroup_mma(operand, values, accumulator, is_async=True)
        accumulator = warpgroup_mma_wait(0, deps=(accumulator,))

        empty = running_sum == 0.0
        total = gl.where(empty, 1.0, running_sum)
        inverse = gl.convert_layout(1.0 / total, gl.SliceLayout(1, VALUES))
        result = (accumulator * gl.expand_dims(inverse, 1)).to(out.dtype.element_ty)
        store_result(result, out, token, head, rows, out_stride_t, out_stride_h, WHICH)
        lse_log2 = gl.where(empty, float("-inf"), running_max + gl.log2(total))
        lse_rows = lse + (token.to(gl.int64) * lse_stride_t + head.to(gl.int64) * lse_stride_h)
        gl.store(
            lse_rows + tile_rows.to(gl.int64) * lse_stride_t, lse_log2 * LN_2, mask=tile_rows < rows
        )
