"""The two partitions of the Hopper kernel over an e4m3 cache: a loader, and warpgroups in step.

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
    warpgroup_mma,
    warpgroup_mma_wait,
)
from mla_triton.kernels.sm90.pieces import LN_2, LOWEST, key_row, partial_row, row_offsets
from mla_triton.kernels.sm90.quantised_groups import (
    group_as_operand,
    group_as_rows_of_output,
    load_scales,
    load_words,
    multiply_grouped_keys,
    store_scaled_weights,
)
from mla_triton.kernels.sm90.quantised_operands import (
    CHUNK,
    INTERLEAVE,
    WARP_COLUMNS,
    WARP_KEYS,
    as_operand,
    as_rows_of_output,
    in_halves,
    in_row_order,
    key_bytes,
    largest_of_block,
    load_keys,
    of_all_warps,
    prepare_queries,
    value_bytes,
)

HALF_KEYS = gl.constexpr(64)
CLEARED = gl.constexpr(16)
"""Keys that are cleared at once."""
SLACK = gl.constexpr(8.0)
"""In powers of two, by how much a score may exceed the one whose weight is 1, so that most blocks
need not rescale accumulators: 2^8, and sums of it times e4m3 numbers, are far from the largest
float16 and float32. Times scales of groups, which are any numbers, they might not be."""


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


# -- a block of keys


@gluon.jit
def multiply_keys(
    shared, slot, zero, ROWS: gl.constexpr, VALUE: gl.constexpr, TAIL: gl.constexpr,
    WARPS: gl.constexpr, HALVES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Starts keys x queries^T of a block, `[keys, queries]`: of latents, and of rotary keys.

    These have a scale of their own, and so a product. One is under way while the bytes of the next
    are made operands: of 128 columns, or `HALVES` of that, which take half as many registers.
    """
    PARTS: gl.constexpr = 2 if HALVES else 1
    WIDTH: gl.constexpr = CHUNK // PARTS
    scores = gl.zeros([WARP_KEYS * WARPS, ROWS], gl.float32, LAYOUT)
    rope_scores = scores
    if TAIL > 0:
        keys = as_operand(shared.rope.index(slot).load(key_bytes(TAIL, WARPS)), LAYOUT)
        queries = shared.query_rope.index(zero).permute((1, 0))
        rope_scores = warpgroup_mma(keys, queries, scores, use_acc=False, is_async=True)
    for chunk in gl.static_range(VALUE // CHUNK):
        loaded = load_keys(shared, slot, chunk, WARPS)
        parts = in_halves(loaded) if HALVES else (loaded,)
        for part in gl.static_range(PARTS):
            keys = as_operand(parts[part], LAYOUT)
            queries = shared.query.index(zero + chunk).slice(part * WIDTH, WIDTH, dim=1)
            queries = queries.permute((1, 0))
            is_first = chunk == 0 and part == 0
            scores = warpgroup_mma(keys, queries, scores, use_acc=not is_first, is_async=True)
            if chunk < VALUE // CHUNK - 1 or part < PARTS - 1:
                scores = warpgroup_mma_wait(1, deps=(scores,))
    return scores, rope_scores


@gluon.jit
def load_values(shared, slot, turn, STEP: gl.constexpr, GROUPS: gl.constexpr, WARPS: gl.constexpr):
    """Bytes of the next columns of `STEP` keys of a block: of 32 a warp, or of a group."""
    TURNS: gl.constexpr = WARP_KEYS * WARPS // STEP
    if GROUPS > 0:
        return load_words(shared, slot, turn, STEP, WARPS)
    else:
        WIDTH: gl.constexpr = WARP_COLUMNS * WARPS
        part = shared.latent.index(slot).slice(turn // TURNS * WIDTH, WIDTH, dim=1)
        return part.slice(turn % TURNS * STEP, STEP, dim=0).load(value_bytes(STEP, WARPS))


@gluon.jit
def as_value_operand(
    loaded, STEP: gl.constexpr, GROUPS: gl.constexpr, WARPS: gl.constexpr, LAYOUT: gl.constexpr
):
    """The same, transposed, as the first operand of a product."""
    if GROUPS > 0:
        return group_as_operand(loaded, STEP, LAYOUT)
    else:
        values = gl.inline_asm_elementwise(
            INTERLEAVE, "=r,=r,=r,=r,r,r", [loaded], gl.float16, True, 8
        )
        operand: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
        return gl.convert_layout(in_row_order(values, STEP, WARPS), operand, assert_trivial=True)


@gluon.jit
def clear_past(shared, slot, valid, VALUE: gl.constexpr, WARPS: gl.constexpr):
    """Zeroes the latents of a block from `valid` on: what lies there may be NaN, and 0 x NaN is."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    rows = gl.expand_dims(gl.arange(0, CLEARED, gl.SliceLayout(1, LAYOUT)), 1)
    for row in gl.static_range(0, WARP_KEYS * WARPS, CLEARED):
        if row + CLEARED > valid:
            for column in gl.static_range(0, VALUE, CHUNK):
                part = shared.latent.index(slot).slice(row, CLEARED, dim=0)
                part = part.slice(column, CHUNK, dim=1)
                tile = part.load(LAYOUT)
                part.store(gl.where(row + rows < valid, tile, gl.zeros_like(tile)))
    # TMA writes there next.
    fence_async_shared()
    sync_threads()


@gluon.jit
def store_rows(
    call, values, target, request, first_row, stride_b, stride_s, stride_h, COLUMN: gl.constexpr
):
    """Some columns of a tile's result, to the rows of `out`.

    As the product leaves them a thread has four columns side by side, and eight of them 32; with
    scales of groups, half as many.
    """
    LAYOUT: gl.constexpr = values.type.layout
    rows = gl.arange(0, call.ROWS, gl.SliceLayout(1, LAYOUT))
    columns = COLUMN + gl.arange(0, values.shape[1], gl.SliceLayout(0, LAYOUT))
    places = row_offsets(call, request, first_row, rows, stride_b, stride_s, stride_h)
    inside = rows < call.tokens(request)[1] * call.heads - first_row
    addresses = target + gl.expand_dims(places, 1) + gl.expand_dims(columns, 0)
    gl.store(addresses, values.to(target.dtype.element_ty), mask=gl.expand_dims(inside, 1))


@gluon.jit
def store_partial_rows(
    values, target, slot_row, count, COLUMN: gl.constexpr, ROWS: gl.constexpr, VALUE: gl.constexpr
):
    """The same to the partial results."""
    LAYOUT: gl.constexpr = values.type.layout
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    columns = COLUMN + gl.arange(0, values.shape[1], gl.SliceLayout(0, LAYOUT))
    places = (slot_row + rows).to(gl.int64) * VALUE
    addresses = target + gl.expand_dims(places, 1) + gl.expand_dims(columns, 0)
    inside = gl.expand_dims(rows < count, 1)
    gl.store(addresses, values, mask=inside, eviction_policy="evict_last")


@gluon.jit
def sums_of_thread(weights):
    """Sums over the two keys of a block that are a thread's own, `[keys / 16, 8, queries]`."""
    return gl.sum(weights.reshape([weights.shape[0] // 16, 2, 8, weights.shape[1]]), 1)


@gluon.jit
def as_factor(factor, SUMS: gl.constexpr):
    """A factor for each query as one of a thread's own sums."""
    each = gl.convert_layout(factor, gl.SliceLayout(0, gl.SliceLayout(0, SUMS)))
    return gl.expand_dims(gl.expand_dims(each, 0), 0)


@gluon.jit
def rescaled(accumulators, rescale):
    """Accumulators times a factor for each query; as a tuple, of however many."""
    results = ()
    for place in gl.static_range(len(accumulators)):
        results += (accumulators[place] * gl.expand_dims(rescale, 0),)
    return results


@gluon.jit
def waited(results):
    """Accumulators, once all products are done; as a tuple, of however many."""
    if len(results) == 1:
        return (warpgroup_mma_wait(0, deps=results),)
    else:
        return warpgroup_mma_wait(0, deps=results)


@gluon.jit
def attend(
    call, shared, q_nope, q_rope, scales, out, lse, partial_out, partial_lse, scale_log2,
    nope_stride_b, nope_stride_s, nope_stride_h, rope_stride_b, rope_stride_s, rope_stride_h,
    out_stride_b, out_stride_s, out_stride_h, lse_stride_b, lse_stride_s, lse_stride_h,
    VALUE: gl.constexpr, TAIL: gl.constexpr, GROUPS: gl.constexpr, WARPS: gl.constexpr,
    SLOTS: gl.constexpr, READY: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """All warps but the loader."""
    ROWS: gl.constexpr = call.ROWS
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, ROWS, 16])
    WEIGHTS: gl.constexpr = shared.weights.layout
    BY_ROW: gl.constexpr = gl.SliceLayout(0, PRODUCT)
    KEYS: gl.constexpr = WARP_KEYS * WARPS
    TURNS: gl.constexpr = KEYS // STEP
    WIDTH: gl.constexpr = CHUNK if GROUPS > 0 else WARP_COLUMNS * WARPS
    tile_rows = gl.arange(0, ROWS, BY_ROW)
    block_keys = gl.arange(0, KEYS, gl.SliceLayout(1, PRODUCT))
    cuts = call.groups()
    if GROUPS > 0:
        is_zero = False
    else:
        latent_scale = gl.load(scales)
        rope_scale = gl.load(scales + 1)
        is_zero = latent_scale == 0.0
        # What scores are multiples of: a scale of 0 is none.
        unit = gl.where(is_zero, 1.0, latent_scale)
        rope_ratio = rope_scale / unit
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
            rope_stride_b, rope_stride_s, rope_stride_h, VALUE // CHUNK, TAIL, GROUPS,
            WARPS,
        )  # fmt: skip
        if GROUPS == 0:
            factor = factor * (unit * scale_log2)
            rope_factor = factor * rope_ratio

        accumulators = ()
        for _ in gl.static_range(VALUE // WIDTH):
            accumulators += (gl.zeros([WIDTH, ROWS], gl.float32, PRODUCT),)  # type: ignore
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
                others, scores = multiply_grouped_keys(
                    shared, step, slot, zero, key_scales, factor, ROWS, GROUPS, WARPS, PRODUCT
                )
            else:
                if block + KEYS > end_key:
                    clear_past(shared, slot, end_key - block, VALUE, WARPS)
                scores, rope_scores = multiply_keys(
                    shared, slot, zero, ROWS, VALUE, TAIL, WARPS, ROWS // WARPS >= 8, PRODUCT
                )
            # What does not need the weights is made ready before they are waited for.
            ready = ()
            for turn in gl.static_range(READY):
                values = load_values(shared, slot, turn, STEP, GROUPS, WARPS)
                ready += (  # type: ignore
                    as_value_operand(values, STEP, GROUPS, WARPS, PRODUCT),
                )
            if GROUPS > 0:
                scores = warpgroup_mma_wait(0, deps=(scores,))
                scores = others + scores * gl.expand_dims(key_scales[GROUPS - 1] * factor, 1)
                scores *= scale_log2
            elif TAIL > 0:
                scores, rope_scores = warpgroup_mma_wait(0, deps=(scores, rope_scores))
                scores = scores * factor + rope_scores * rope_factor
            else:
                scores = warpgroup_mma_wait(0, deps=(scores,)) * factor
            if block + KEYS > seen_end:
                key = gl.expand_dims(block + block_keys, 1)
                hidden = key >= end_key
                if call.CAUSAL:
                    visible_end = before_queries + (first_row + tile_rows) // call.heads
                    hidden = hidden | (key >= gl.expand_dims(visible_end, 0))
                scores = gl.where(hidden, float("-inf"), scores)
            block_max = largest_of_block(scores, shared.exchange, WARPS)
            # Row by row: what else is in its tile changes no bit of a row.
            excess = block_max - running_max
            slack: gl.constexpr = 0.0 if GROUPS > 0 else SLACK
            if gl.max(excess, 0) > slack:
                new_max = gl.where(excess > slack, block_max, running_max)
                rescale = gl.exp2(running_max - new_max)
                running_max = new_max
                sums *= as_factor(rescale, SUMS)
                accumulators = rescaled(accumulators, rescale)
            weights = gl.exp2(scores - gl.expand_dims(running_max, 0))
            sums += sums_of_thread(weights)
            if GROUPS > 0:
                store_scaled_weights(shared, weights, key_scales, WEIGHTS)
            else:
                shared.weights.index(0).store(weights.to(gl.float16))
            following = load_values(shared, slot, READY, STEP, GROUPS, WARPS)
            fence_async_shared()
            sync_threads()
            results = ()
            for place in gl.static_range(VALUE // WIDTH):
                accumulator = accumulators[place]  # type: ignore
                for turn in gl.static_range(place * TURNS, (place + 1) * TURNS):
                    if turn < READY:
                        values = ready[turn]
                    else:
                        loaded = following
                        if turn + 1 < VALUE // WIDTH * TURNS:
                            following = load_values(shared, slot, turn + 1, STEP, GROUPS, WARPS)
                        values = as_value_operand(loaded, STEP, GROUPS, WARPS, PRODUCT)
                    own = shared.weights.index(zero + place if GROUPS > 0 else zero)
                    part = own.slice(turn % TURNS * STEP, STEP, dim=0)
                    accumulator = warpgroup_mma(values, part, accumulator, is_async=True)
                    if turn >= READY:
                        accumulator = warpgroup_mma_wait(1, deps=(accumulator,))
                results += (accumulator,)  # type: ignore
            accumulators = waited(results)
            mbarrier.arrive(shared.empty.index(slot), count=1)
            step += 1

        s_q = call.tokens(request)[1]
        count = s_q * call.heads - first_row
        slot_row = partial_row(call, begin_key == 0)
        running_sum = gl.sum(of_all_warps(gl.sum(sums, 1), shared.exchange), 0)
        running_sum = gl.convert_layout(running_sum, BY_ROW, assert_trivial=True)
        empty = running_sum == 0.0
        total = gl.where(empty, 1.0, running_sum)
        inverse = (1.0 if GROUPS > 0 else latent_scale) / total
        inverse = gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(0, PRODUCT)), 0)
        for place in gl.static_range(VALUE // WIDTH):
            if GROUPS > 0:
                result = group_as_rows_of_output(accumulators[place] * inverse, ROWS)
            else:
                result = as_rows_of_output(accumulators[place] * inverse, ROWS, WARPS)
            if whole:
                store_rows(
                    call, result, out, request, first_row, out_stride_b, out_stride_s,
                    out_stride_h, place * WIDTH,
                )  # fmt: skip
            else:
                store_partial_rows(result, partial_out, slot_row, count, place * WIDTH, ROWS, VALUE)
        inside = tile_rows < count
        lse_log2 = gl.where(empty, float("-inf"), running_max + gl.log2(total))
        if whole:
            lse_rows = row_offsets(
                call, request, first_row, tile_rows, lse_stride_b, lse_stride_s, lse_stride_h
            )
            gl.store(lse + lse_rows, lse_log2 * LN_2, mask=inside)
        else:
            gl.store(partial_lse + (slot_row + tile_rows), lse_log2, mask=inside)
