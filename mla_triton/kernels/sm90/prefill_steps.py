"""The three partitions of the Hopper prefill kernel: a loader, and two warpgroups that attend.

| barrier | who arrives | who waits | meaning |
| --- | --- | --- | --- |
| query_full | TMA | both warpgroups | the queries are there |
| full | TMA | both | a block's keys, and the values of the block before, are in their slots |
| free | both | loader | they were used up |
| cleared | both | both | what lay past a sequence's end is gone from its last values |
"""

# No `from __future__ import annotations`: an aggregate reads the types of its fields.

from mla_triton.kernels.sm90.gluon import (
    aggregate,
    copy_tile,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from mla_triton.kernels.sm90.prefill_config import CHUNK as CHUNK_COLUMNS
from mla_triton.kernels.sm90.prefill_config import WARPGROUP_ROWS

ROWS = gl.constexpr(WARPGROUP_ROWS)
"""Queries of a warpgroup."""
TILE = gl.constexpr(2 * WARPGROUP_ROWS)
"""Queries of a program's tile."""
CHUNK = gl.constexpr(CHUNK_COLUMNS)
CLEARED = gl.constexpr(32)
"""Rows of values that are cleared at once."""
LOWEST = gl.constexpr(-3.4028234663852886e38)
LN_2 = gl.constexpr(0.6931471805599453)


@aggregate
class Shared:
    """Shared memory and its barriers."""

    query: gl.shared_memory_descriptor
    key: gl.shared_memory_descriptor
    value: gl.shared_memory_descriptor
    query_full: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    cleared: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, query, key, value, query_full, full, free, cleared):
        self.query = query
        self.key = key
        self.value = value
        self.query_full = query_full
        self.full = full
        self.free = free
        self.cleared = cleared


@gluon.jit
def bounds(cu_seqlens, sequence, tokens):
    """(first token of a sequence, how many it has), inside the tensor whatever the offsets are."""
    first = gl.minimum(gl.maximum(gl.load(cu_seqlens + sequence), 0), tokens)
    end = gl.minimum(gl.maximum(gl.load(cu_seqlens + sequence + 1), first), tokens)
    return first, end - first


@aggregate
class Work:
    """What every partition finds its tile by."""

    cu_seqlens_q: gl.tensor
    cu_seqlens_k: gl.tensor
    batch: gl.tensor
    queries: gl.tensor
    keys: gl.tensor
    heads: gl.tensor
    slots: gl.tensor
    slots_each: gl.tensor
    abreast: gl.tensor
    CAUSAL: gl.constexpr
    BLOCK_N: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, cu_seqlens_q, cu_seqlens_k, batch, queries, keys, heads, slots, slots_each, abreast,
        CAUSAL, BLOCK_N,
    ):  # fmt: skip
        self.cu_seqlens_q = cu_seqlens_q
        self.cu_seqlens_k = cu_seqlens_k
        self.batch = batch
        self.queries = queries
        self.keys = keys
        self.heads = heads
        self.slots = slots
        self.slots_each = slots_each
        self.abreast = abreast
        self.CAUSAL = gl.constexpr(CAUSAL)
        self.BLOCK_N = gl.constexpr(BLOCK_N)

    @gluon.jit
    def first_slot(self, sequence):
        """Slot of a sequence's first tile: each has as many, or room for all that it has."""
        first = gl.minimum(gl.maximum(gl.load(self.cu_seqlens_q + sequence), 0), self.queries)
        following = (first + sequence * (TILE - 1)) // TILE
        return gl.where(self.slots_each > 0, sequence * self.slots_each, following)

    @gluon.jit
    def sequence_of(self, slot):
        """The last sequence whose tiles begin at a slot or before it."""
        low = slot * 0
        high = self.batch
        while high - low > 1:
            middle = (low + high) // 2
            is_before = self.first_slot(middle) <= slot
            low = gl.where(is_before, middle, low)
            high = gl.where(is_before, high, middle)
        return low

    @gluon.jit
    def tile(self):
        """Of the program's tile: (head, first query token, queries from it on, first key token,
        keys, keys that its first query sees, keys that any of them sees).

        `abreast` heads take turns, tile after tile from the last one on; then the next heads. No
        queries: there is no such tile.
        """
        program = gl.program_id(0)
        first_head = program // (self.abreast * self.slots) * self.abreast
        abreast_here = gl.minimum(self.abreast, self.heads - first_head)
        place = program - first_head * self.slots
        head = first_head + place % abreast_here
        slot = self.slots - 1 - place // abreast_here
        sequence = self.sequence_of(slot)
        first_query, query_count = bounds(self.cu_seqlens_q, sequence, self.queries)
        first_key, key_count = bounds(self.cu_seqlens_k, sequence, self.keys)
        first_row = (slot - self.first_slot(sequence)) * TILE
        rows = gl.where(first_row < 0, 0, query_count - first_row)
        row_end = key_count - query_count + 1 + first_row
        end_key = key_count
        if self.CAUSAL:
            last_row = gl.minimum(TILE, rows) - 1
            end_key = gl.minimum(gl.maximum(row_end + last_row, 0), key_count)
        return head, first_query + first_row, rows, first_key, key_count, row_end, end_key

    @gluon.jit
    def blocks(self, end_key):
        """Key blocks of a tile. One that sees no key has one, too, all of it hidden."""
        return gl.maximum(gl.cdiv(end_key, self.BLOCK_N), 1)


@gluon.jit
def load_columns(
    nope_map, rope_map, row, head, rope_head, full, target, first,
    NOPE: gl.constexpr, CHUNKS: gl.constexpr,
):  # fmt: skip
    """Starts copying all columns of a box of rows, chunk after chunk from target[first] on."""
    for chunk in gl.static_range(CHUNKS):
        into = target.index(first + chunk)
        if chunk * CHUNK < NOPE:
            copy_tile(nope_map, [row, head, chunk * CHUNK], full, into)
        else:
            copy_tile(rope_map, [row, rope_head, chunk * CHUNK - NOPE], full, into)


@gluon.jit
def load_tile(
    work, shared, q_map, q_rope_map, k_map, k_rope_map, v_map, group,
    CHUNKS: gl.constexpr, Q_NOPE: gl.constexpr, K_NOPE: gl.constexpr, VALUE: gl.constexpr,
    SLOTS: gl.constexpr,
):  # fmt: skip
    """The loader: the queries, and what they see, last keys first."""
    BLOCK_N: gl.constexpr = work.BLOCK_N
    KEY_BYTES: gl.constexpr = BLOCK_N * CHUNKS * CHUNK * 2
    VALUE_BYTES: gl.constexpr = BLOCK_N * VALUE * 2
    head, token, rows, first_key, _, _, end_key = work.tile()
    if rows > 0:
        blocks = work.blocks(end_key)
        kv_head = head // group
        rope_head = kv_head if K_NOPE == CHUNKS * CHUNK else 0
        key_row = first_key + (blocks - 1) * BLOCK_N
        for step in range(blocks + 1):
            # Keys are a block ahead of values, as they are used.
            turn = step // SLOTS
            slot = step - turn * SLOTS
            full = shared.full.index(slot)
            mbarrier.wait(shared.free.index(slot), (turn & 1) ^ 1)
            mbarrier.expect(full, KEY_BYTES, pred=step == 0)
            mbarrier.expect(full, KEY_BYTES + VALUE_BYTES, pred=(step > 0) & (step < blocks))
            mbarrier.expect(full, VALUE_BYTES, pred=step == blocks)
            if step == 0:
                mbarrier.expect(shared.query_full.index(0), TILE * CHUNKS * CHUNK * 2)
                for half in gl.static_range(2):
                    load_columns(
                        q_map, q_rope_map, token + half * ROWS, head, head,
                        shared.query_full.index(0), shared.query, half * CHUNKS, Q_NOPE, CHUNKS,
                    )  # fmt: skip
            if step < blocks:
                load_columns(
                    k_map, k_rope_map, key_row, kv_head, rope_head, full, shared.key,
                    slot * CHUNKS, K_NOPE, CHUNKS,
                )  # fmt: skip
            if step > 0:
                copy_tile(v_map, [key_row + BLOCK_N, kv_head, 0], full, shared.value.index(slot))
            key_row -= BLOCK_N


@gluon.jit
def flat(tile):
    """A box of one head's rows as a matrix."""
    return tile.reshape([tile.shape[0], tile.shape[2]])


@gluon.jit
def multiply_keys(scores, shared, first_query, first_key, CHUNKS: gl.constexpr):
    """Starts queries x keys of a block."""
    for chunk in gl.static_range(CHUNKS):
        query = flat(shared.query.index(first_query + chunk))
        key = flat(shared.key.index(first_key + chunk)).permute((1, 0))
        scores = warpgroup_mma(query, key, scores, use_acc=chunk > 0, is_async=True)
    return scores


@gluon.jit
def hidden_and_scaled(
    scores, scale_log2, block, seen_end, row_ends,
    BLOCK_N: gl.constexpr, NEGATIVE_SCALE: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """(scores with -inf where a row does not see a key, factor that they still need)."""
    if NEGATIVE_SCALE:
        scores = -scores
    factor = scale_log2
    if block + BLOCK_N > seen_end:
        key = block + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
        hidden = gl.expand_dims(key, 0) >= gl.expand_dims(row_ends, 1)
        scores = gl.where(hidden, float("-inf"), scores * scale_log2)
        factor = scale_log2 * 0.0 + 1.0
    return scores, factor


@gluon.jit
def softmax(scores, factor, running_max, running_sum):
    """One step of the online softmax: (maximum, sum, factor of what came before, weights)."""
    new_max = gl.maximum(running_max, gl.max(scores, 1) * factor)
    rescale = gl.exp2(running_max - new_max)
    weights = gl.exp2(scores * factor - gl.expand_dims(new_max, 1))
    running_sum = running_sum * rescale + gl.sum(weights, 1)
    return new_max, running_sum, rescale, weights


@gluon.jit
def clear_past(values, valid, FIRST: gl.constexpr, END: gl.constexpr, BLOCK_N: gl.constexpr):
    """Zeroes columns of the rows of values from `valid` on: what lies there may be NaN, and 0 x NaN
    is."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, CLEARED, gl.SliceLayout(1, LAYOUT))
    for row in gl.static_range(0, BLOCK_N, CLEARED):
        if row + CLEARED > valid:
            for column in gl.static_range(FIRST, END, CHUNK):
                part = values.slice(row, CLEARED, dim=0).slice(column, CHUNK, dim=1)
                tile = part.load(LAYOUT)
                inside = gl.expand_dims(row + rows, 1) < valid
                part.store(gl.where(inside, tile, gl.zeros_like(tile)))
    fence_async_shared()


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
def attend(
    work, shared, out, lse, scale_log2, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
    WHICH: gl.constexpr, CHUNKS: gl.constexpr, VALUE: gl.constexpr, SLOTS: gl.constexpr,
    NEGATIVE_SCALE: gl.constexpr,
):  # fmt: skip
    """A warpgroup: 64 queries of the tile."""
    BLOCK_N: gl.constexpr = work.BLOCK_N
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, VALUES, 2)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_BY_ROW: gl.constexpr = gl.SliceLayout(1, VALUES)
    LINES: gl.constexpr = line_layout(VALUE)
    dtype: gl.constexpr = out.dtype.element_ty
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

        mbarrier.wait(shared.query_full.index(0), 0)
        mbarrier.wait(shared.full.index(0), 0)
        scores = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
        scores = multiply_keys(scores, shared, WHICH * CHUNKS, 0, CHUNKS)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(shared.free.index(0), count=1)
        scores, factor = hidden_and_scaled(
            scores, scale_log2, block, seen_end, row_ends, BLOCK_N, NEGATIVE_SCALE, SCORES
        )
        running_max = gl.full([ROWS], LOWEST, gl.float32, BY_ROW)
        running_sum = gl.zeros([ROWS], gl.float32, BY_ROW)
        running_max, running_sum, rescale, weights = softmax(
            scores, factor, running_max, running_sum
        )
        operand = gl.convert_layout(weights.to(dtype), OPERAND)
        accumulator = gl.zeros([ROWS, VALUE], gl.float32, VALUES)
        mbarrier.wait(shared.full.index(1), 0)
        value_end = gl.where(end_key > 0, key_count, 0)
        if block + BLOCK_N > value_end:
            # A half of the columns each.
            values = flat(shared.value.index(1))
            HALF: gl.constexpr = VALUE // 2
            clear_past(values, value_end - block, WHICH * HALF, (WHICH + 1) * HALF, BLOCK_N)
            mbarrier.arrive(shared.cleared.index(0), count=1)
            mbarrier.wait(shared.cleared.index(0), 0)

        step = block * 0 + 1
        slot = step
        for _ in range(1, blocks):
            block -= BLOCK_N
            # Zero, but not to the compiler: descriptors of constant places would all be kept.
            zero = block >> 31
            scores = multiply_keys(scores, shared, zero + WHICH * CHUNKS, slot * CHUNKS, CHUNKS)
            accumulator = warpgroup_mma(
                operand, flat(shared.value.index(slot)), accumulator, is_async=True
            )
            scores = warpgroup_mma_wait(1, deps=(scores,))
            scores, factor = hidden_and_scaled(
                scores, scale_log2, block, seen_end, row_ends, BLOCK_N, NEGATIVE_SCALE, SCORES
            )
            running_max, running_sum, rescale, weights = softmax(
                scores, factor, running_max, running_sum
            )
            used = slot
            step += 1
            slot = step % SLOTS
            # Here, not where it is used: ptxas moves nothing across this wait, but would have moved
            # all of the softmax behind the next one.
            mbarrier.wait(shared.full.index(slot), (step // SLOTS) & 1)
            accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
            mbarrier.arrive(shared.free.index(used), count=1)
            accumulator = accumulator * gl.expand_dims(gl.convert_layout(rescale, OUT_BY_ROW), 1)
            operand = gl.convert_layout(weights.to(dtype), OPERAND)

        accumulator = warpgroup_mma(
            operand, flat(shared.value.index(slot)), accumulator, is_async=True
        )
        accumulator = warpgroup_mma_wait(0, deps=(accumulator,))

        empty = running_sum == 0.0
        total = gl.where(empty, 1.0, running_sum)
        inverse = gl.convert_layout(1.0 / total, OUT_BY_ROW)
        result = (accumulator * gl.expand_dims(inverse, 1)).to(dtype)
        line = WHICH * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LINES))
        columns = gl.arange(0, VALUE, gl.SliceLayout(0, LINES))
        out_rows = out + (token.to(gl.int64) * out_stride_t + head.to(gl.int64) * out_stride_h)
        places = out_rows + gl.expand_dims(line.to(gl.int64) * out_stride_t, 1)
        gl.store(
            places + gl.expand_dims(columns, 0),
            gl.convert_layout(result, LINES),
            mask=gl.expand_dims(line < rows, 1),
        )
        lse_log2 = gl.where(empty, float("-inf"), running_max + gl.log2(total))
        lse_rows = lse + (token.to(gl.int64) * lse_stride_t + head.to(gl.int64) * lse_stride_h)
        gl.store(
            lse_rows + tile_rows.to(gl.int64) * lse_stride_t, lse_log2 * LN_2, mask=tile_rows < rows
        )
