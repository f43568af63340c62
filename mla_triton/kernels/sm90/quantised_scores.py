"""How the Hopper kernel over an e4m3 cache makes weights of a block of keys.

Scores are `[keys, queries]`, in powers of two: a warp has 16 of a block's keys, a thread two of
them. What warps tell each other of queries goes through shared memory once.
"""

# No `from __future__ import annotations`: Triton reads the annotations.

from mla_triton.kernels.sm90.gluon import gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait
from mla_triton.kernels.sm90.quantised_groups import (
    more_of_keys,
    multiply_grouped_keys,
    store_scaled_weights,
)
from mla_triton.kernels.sm90.quantised_operands import (
    CHUNK,
    WARP_KEYS,
    as_operand,
    in_halves,
    key_bytes,
    load_keys,
)

SLACK = gl.constexpr(8.0)
"""In powers of two, by how much a score may exceed the one whose weight is 1, so that most blocks
need not rescale accumulators: 2^8, and sums of it times e4m3 numbers, are far from the largest
float16 and float32."""

# -- what scores are multiples of


@gluon.jit
def cache_scales(scales, GROUPS: gl.constexpr):
    """(whether latents are zero, because their scale is; that scale, or 1 for 0; rotary keys' scale
    by it; theirs as it is). With scales of groups, as if they were 1."""
    if GROUPS > 0:
        return False, 1.0, 1.0, 1.0
    else:
        latent_scale = gl.load(scales)
        is_zero = latent_scale == 0.0
        unit = gl.where(is_zero, 1.0, latent_scale)
        return is_zero, unit, gl.load(scales + 1) / unit, latent_scale


@gluon.jit
def product_factors(factor, unit, rope_ratio, scale_log2, GROUPS: gl.constexpr):
    """What products of a tile are multiplied by, those of latents and those of rotary keys;
    `factor` is that of its queries. With scales of groups the second is that of the sum."""
    if GROUPS > 0:
        return factor, scale_log2
    else:
        factor = factor * (unit * scale_log2)
        return factor, factor * rope_ratio


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
    following = load_keys(shared, slot, 0, WARPS)
    for chunk in gl.static_range(VALUE // CHUNK):
        loaded = following
        if chunk < VALUE // CHUNK - 1:
            following = load_keys(shared, slot, chunk + 1, WARPS)
        elif TAIL > 0:
            following = shared.rope.index(slot).load(key_bytes(TAIL, WARPS))
        parts = in_halves(loaded) if HALVES else (loaded,)
        for part in gl.static_range(PARTS):
            keys = as_operand(parts[part], LAYOUT)
            queries = shared.query.index(zero + chunk).slice(part * WIDTH, WIDTH, dim=1)
            queries = queries.permute((1, 0))
            is_first = chunk == 0 and part == 0
            scores = warpgroup_mma(keys, queries, scores, use_acc=not is_first, is_async=True)
            if TAIL > 0 or chunk < VALUE // CHUNK - 1 or part < PARTS - 1:
                scores = warpgroup_mma_wait(1, deps=(scores,))
    rope_scores = gl.zeros([WARP_KEYS * WARPS, ROWS], gl.float32, LAYOUT)
    if TAIL > 0:
        keys = as_operand(following, LAYOUT)
        queries = shared.query_rope.index(zero).permute((1, 0))
        rope_scores = warpgroup_mma(keys, queries, rope_scores, use_acc=False, is_async=True)
    return scores, rope_scores


@gluon.jit
def start_scores(
    shared, step, slot, zero, key_scales, factor, ROWS: gl.constexpr, VALUE: gl.constexpr,
    TAIL: gl.constexpr, GROUPS: gl.constexpr, WARPS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The two parts of a block's scores, which are under way."""
    # With as many rows accumulators leave too few registers for operands of all columns.
    HALVES: gl.constexpr = ROWS // WARPS >= 8
    if GROUPS > 0:
        return multiply_grouped_keys(
            shared, step, slot, zero, key_scales, factor, ROWS, GROUPS, WARPS, HALVES, LAYOUT
        )
    else:
        return multiply_keys(shared, slot, zero, ROWS, VALUE, TAIL, WARPS, HALVES, LAYOUT)


@gluon.jit
def finish_scores(
    shared, scores, rope_scores, factor, rope_factor, TAIL: gl.constexpr, GROUPS: gl.constexpr
):
    """Scores of a block, once its products are done."""
    if GROUPS > 0:
        rope_scores = warpgroup_mma_wait(0, deps=(rope_scores,))
        mbarrier.arrive(shared.rope_empty.index(0), count=1)
        return (scores + rope_scores) * rope_factor
    elif TAIL > 0:
        scores, rope_scores = warpgroup_mma_wait(0, deps=(scores, rope_scores))
        return scores * factor + rope_scores * rope_factor
    else:
        return warpgroup_mma_wait(0, deps=(scores,)) * factor


@gluon.jit
def hide_keys(
    call, scores, block, block_keys, tile_rows, first_row, end_key, seen_end, before_queries
):
    """Scores, but minus infinity of keys that a row does not see."""
    if block + scores.shape[0] > seen_end:
        key = gl.expand_dims(block + block_keys, 1)
        hidden = key >= end_key
        if call.CAUSAL:
            visible_end = before_queries + (first_row + tile_rows) // call.heads
            hidden = hidden | (key >= gl.expand_dims(visible_end, 0))
        scores = gl.where(hidden, float("-inf"), scores)
    return scores


# -- what warps tell each other of queries


@gluon.constexpr_function
def all_warps(rows, warps):
    """A layout of `[warps, queries]`: a thread has what all warps say of the queries that are its
    columns of a product."""
    registers, row = [[0, 1]], 8
    while row < rows:
        registers.append([0, row])
        row *= 2
    bits = range(warps.bit_length() - 1)
    registers += [[1 << bit, 0] for bit in bits]
    lanes = [[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0] for _ in bits], [], [warps, rows])


@gluon.jit
def of_all_warps(own, exchange):
    """What each warp says of the queries, `[warps, queries]`, to every thread.

    A reduction by the compiler would go through shared memory twice, and all warps wait for each
    other each time.
    """
    exchange.store(own)
    return exchange.load(all_warps(own.shape[1], own.shape[0]))


@gluon.jit
def largest_of_block(scores, exchange, WARPS: gl.constexpr):
    """Of each query the largest score of a block, `[keys, queries]`."""
    BY_ROW: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
    own = gl.max(scores.reshape([WARPS, WARP_KEYS, scores.shape[1]]), 1)
    return gl.convert_layout(gl.max(of_all_warps(own, exchange), 0), BY_ROW, assert_trivial=True)


@gluon.constexpr_function
def every_warp(warps):
    """A layout of `[warps, 1]`: every thread has all of it."""
    bits = range(warps.bit_length() - 1)
    return gl.DistributedLinearLayout(
        [[1 << bit, 0] for bit in bits], [[0, 0]] * 5, [[0, 0] for _ in bits], [], [warps, 1]
    )


@gluon.jit
def tell_largest(values, more, exchange, WARPS: gl.constexpr):
    """What is the largest of a warp's `[keys, queries]`, plus `more` of its key, to the others."""
    of_keys = gl.max(values, 1) + more
    own = gl.max(of_keys.reshape([WARPS, WARP_KEYS]), 1)
    exchange.slice(0, 1, dim=1).store(gl.expand_dims(own, 1))


@gluon.jit
def largest_told(exchange, WARPS: gl.constexpr):
    """The largest of all, to every thread."""
    return gl.max(gl.max(exchange.slice(0, 1, dim=1).load(every_warp(WARPS)), 1), 0)


@gluon.jit
def more_of_block(key_scales, GROUPS: gl.constexpr):
    """What scores of its keys count as more than they are, where it is asked if they are larger
    than others."""
    if GROUPS > 0:
        return more_of_keys(key_scales, SLACK)
    else:
        return 0.0


@gluon.jit
def new_largest(scores, more, running_max, exchange, GROUPS: gl.constexpr, WARPS: gl.constexpr):
    """Of each query the score whose weight is 1, where some are larger by more than `SLACK`.

    Row by row: what else is in its tile changes no bit of a row.
    """
    bounds = scores + gl.expand_dims(more, 1) if GROUPS > 0 else scores
    block_max = largest_of_block(bounds, exchange, WARPS)
    return gl.where(block_max - running_max > SLACK, block_max, running_max)


@gluon.jit
def store_weights(place, weights, key_scales, GROUPS: gl.constexpr):
    """The second operand of the second product."""
    if GROUPS > 0:
        store_scaled_weights(place, weights, key_scales)
    else:
        place.store(weights.to(gl.float16))


# -- sums of weights, which stay with their thread


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
def store_sums(sums, place):
    """A thread's own sums, `[4, 8, queries]`, where it finds them: four side by side at a time."""
    WAYS: gl.constexpr = sums.shape[2] // 16
    parts = sums.reshape([32, WAYS, 2, 4, 2]).permute([1, 0, 3, 2, 4])
    place.store(parts.reshape([32 * WAYS, 16]))


@gluon.constexpr_function
def sum_places(ways):
    """The layout of `[32 * ways, 16]` in which these are a thread's own."""
    registers, way = [[0, 1], [0, 2]], 1
    while way < ways:
        registers.append([32 * way, 0])
        way *= 2
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[8, 0], [16, 0]], [], [32 * ways, 16])


@gluon.jit
def load_sums(place, LAYOUT: gl.constexpr):
    WAYS: gl.constexpr = place.shape[0] // 32
    parts = place.load(sum_places(WAYS)).reshape([WAYS, 32, 4, 2, 2]).permute([1, 0, 3, 2, 4])
    return gl.convert_layout(parts.reshape([4, 8, 16 * WAYS]), LAYOUT, assert_trivial=True)


@gluon.jit
def sums_of_rows(sums, exchange, LAYOUT: gl.constexpr):
    """Over all keys: (of each query its sum, or 1 if that is 0; whether it is)."""
    total = gl.sum(of_all_warps(gl.sum(sums, 1), exchange), 0)
    total = gl.convert_layout(total, LAYOUT)
    is_empty = total == 0.0
    return gl.where(is_empty, 1.0, total), is_empty
