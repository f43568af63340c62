"""What the Hopper kernel over an e4m3 cache does otherwise where each 128 columns have a scale.

A token has 512 e4m3 numbers, a float32 scale for each 128 of them, and 64 rotary numbers that are
16-bit as they lie. Neither product can take a scale out of its sum over keys, so

* scores^T of a group of columns have an accumulator of their own, whose rows, keys, are multiplied
  by the scales of the group, in float32;
* latents^T of a group are multiplied by weights of their own: those of the keys times the scales of
  the group.

Scales are any float32 numbers, in one block of keys of any ratio. float16 would not hold a weight
times a scale, nor that by a common factor; bfloat16 holds it as precisely as it holds a weight. So
the second product is of bfloat16, in which e4m3 numbers are exact, too, and there is no rounding
that one over 16-bit keys does not have.
"""

# No `from __future__ import annotations`: Triton reads the annotations.

from mla_triton.kernels.sm90.gluon import (
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from mla_triton.kernels.sm90.quantised_operands import (
    CHUNK,
    WARP_KEYS,
    as_operand,
    in_halves,
    load_keys,
    warps_apart,
)

WORDS = gl.constexpr(64)
"""Pairs of columns of a group."""
LARGE_SCALE = gl.constexpr(2.0**64)
"""Far from the largest float32, times 2^8, an e4m3 number, and as many keys as there may be."""


@gluon.constexpr_function
def scale_numbers(keys, warps):
    """A layout of `[keys, 4]` scales: a thread has those of the two keys that are its rows of a
    product."""
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]],
        [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        warps_apart(warps, WARP_KEYS.value, 0),
        [],
        [keys, 4],
    )


@gluon.jit
def load_scales(shared, slot, valid, block_keys, WARPS: gl.constexpr):
    """The scales of a block, for each group `[keys]`; from key `valid` on 0: what lies there may be
    NaN, and a weight of 0 times NaN is."""
    LAYOUT: gl.constexpr = block_keys.type.layout
    scales = shared.scales.index(slot).load(scale_numbers(block_keys.shape[0], WARPS))
    even, odd = scales.reshape([block_keys.shape[0], 2, 2]).split()
    first, third = even.split()
    second, fourth = odd.split()
    inside = block_keys < valid
    return (
        gl.where(inside, gl.convert_layout(first, LAYOUT, assert_trivial=True), 0.0),
        gl.where(inside, gl.convert_layout(second, LAYOUT, assert_trivial=True), 0.0),
        gl.where(inside, gl.convert_layout(third, LAYOUT, assert_trivial=True), 0.0),
        gl.where(inside, gl.convert_layout(fourth, LAYOUT, assert_trivial=True), 0.0),
    )


@gluon.jit
def more_of_keys(scales, SLACK: gl.constexpr):
    """What scores of a key count as more than they are, where it is asked whether weights are to be
    of another largest score: with a scale that is not far from the largest float32 they may not
    exceed 1."""
    largest = gl.abs(scales[0])
    for group in gl.static_range(1, len(scales)):
        largest = gl.maximum(largest, gl.abs(scales[group]))
    return gl.where(largest > LARGE_SCALE, SLACK, 0.0)


@gluon.jit
def multiply_grouped_keys(
    shared, step, slot, zero, scales, factor, ROWS: gl.constexpr, GROUPS: gl.constexpr,
    WARPS: gl.constexpr, HALVES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Starts keys x queries^T of a block, `[keys, queries]`: (scores but for rotary keys, the
    products of those, which are under way).

    Scores are of the queries as they are: of a latent's columns their multiples by 1 / `factor`
    were multiplied. One product is under way while that before it is scaled and the next operand
    is made; by `HALVES`, operands take half as many registers, and a group is scaled at its end.
    """
    PARTS: gl.constexpr = 2 if HALVES else 1
    WIDTH: gl.constexpr = CHUNK // PARTS
    scores = gl.zeros([WARP_KEYS * WARPS, ROWS], gl.float32, LAYOUT)
    product = scores
    for group in gl.static_range(GROUPS):
        fresh = gl.zeros([WARP_KEYS * WARPS, ROWS], gl.float32, LAYOUT)
        following = load_keys(shared, slot, group, WARPS)
        parts = in_halves(following) if HALVES else (following,)
        for part in gl.static_range(PARTS):
            keys = as_operand(parts[part], LAYOUT)
            queries = shared.query.index(zero + group).slice(part * WIDTH, WIDTH, dim=1)
            queries = queries.permute((1, 0))
            fresh = warpgroup_mma(keys, queries, fresh, use_acc=part > 0, is_async=True)
            if part < PARTS - 1:
                fresh = warpgroup_mma_wait(1, deps=(fresh,))
        if HALVES:
            fresh = warpgroup_mma_wait(0, deps=(fresh,))
            scores += fresh * gl.expand_dims(scales[group] * factor, 1)
        else:
            if group > 0:
                product, fresh = warpgroup_mma_wait(1, deps=(product, fresh))
                scores += product * gl.expand_dims(scales[group - 1] * factor, 1)
            product = fresh
    mbarrier.wait(shared.rope_full.index(0), step & 1)
    queries = shared.query_rope.index(zero).permute((1, 0))
    fresh = gl.zeros([WARP_KEYS * WARPS, ROWS], gl.float32, LAYOUT)
    fresh = warpgroup_mma(shared.rope.index(0), queries, fresh, use_acc=False, is_async=True)
    if not HALVES:
        product, fresh = warpgroup_mma_wait(1, deps=(product, fresh))
        scores += product * gl.expand_dims(scales[GROUPS - 1] * factor, 1)
    return scores, fresh


@gluon.jit
def store_scaled_weights(target, weights, scales):
    """For each group the weights of a block times its scales, `[keys, queries]`.

    Together: between four stores to one allocation the compiler has the warps wait for each other.
    """
    first, second, third, fourth = scales
    outer = gl.join(scaled(weights, first), scaled(weights, third))
    inner = gl.join(scaled(weights, second), scaled(weights, fourth))
    every = gl.join(outer, inner).permute([2, 3, 0, 1])
    target.store(every.reshape([4 * weights.shape[0], weights.shape[1]]))


@gluon.jit
def scaled(weights, scales):
    return (weights * gl.expand_dims(scales, 1)).to(gl.bfloat16)


@gluon.constexpr_function
def value_words(keys, warps):
    """A layout of `[keys, 64]` pairs of columns as `ldmatrix` leaves them, transposed: a thread has
    the pairs that are two of its rows of a product, of every key that wgmma wants of it."""
    registers, key = [[1, 0]], 8
    while key < keys:
        registers.append([key, 0])
        key *= 2
    lanes = [[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]]
    if warps == 4:
        registers.append([0, 32])
    return gl.DistributedLinearLayout(
        registers, lanes, warps_apart(warps, 0, 8), [], [keys, WORDS.value]
    )


PAIRS = gl.constexpr("""{
    .reg .b32 even, odd, large;
    prmt.b32 even, $2, $2, 0xa280;
    prmt.b32 odd, $2, $2, 0xb391;
    shl.b32 even, even, 4;
    shl.b32 odd, odd, 4;
    and.b32 even, even, 0x87f087f0;
    and.b32 odd, odd, 0x87f087f0;
    mov.b32 large, 0x7b807b80;
    mul.rn.bf16x2 $0, even, large;
    mul.rn.bf16x2 $1, odd, large;
}""")
"""Two bytes of each of two keys as two pairs of bfloat16, each of one column.

`prmt` widens a byte to 16 bits by its sign. Four bits further left, sign, exponent and significand
are where bfloat16 has them, and the exponent is 120 too small: also of a number so small that
e4m3, and bfloat16 with it, has no leading one for it. A NaN becomes 480: the scores of its key are
NaN already.
"""


@gluon.jit
def load_words(shared, slot, turn, KEYS: gl.constexpr, STEP: gl.constexpr, WARPS: gl.constexpr):
    """Pairs of the 128 columns of a group of `STEP` keys of a block."""
    TURNS: gl.constexpr = KEYS // STEP
    part = shared.words.index(slot).slice(turn // TURNS * WORDS, WORDS, dim=1)
    return part.slice(turn % TURNS * STEP, STEP, dim=0).load(value_words(STEP, WARPS))


@gluon.jit
def group_as_operand(words, STEP: gl.constexpr, LAYOUT: gl.constexpr):
    """The same, as columns x keys, the first operand of a product."""
    even, odd = gl.inline_asm_elementwise(
        PAIRS, "=r,=r,r", [words], (gl.bfloat16, gl.bfloat16), True, 2
    )
    values = gl.join(even, odd).reshape([STEP, 8, 8, 2]).permute([1, 3, 2, 0])
    operand: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    return gl.convert_layout(values.reshape([CHUNK, STEP]), operand, assert_trivial=True)


@gluon.jit
def group_as_rows_of_output(accumulator, ROWS: gl.constexpr):
    """`[rows of the product, queries]` as `[queries, columns of the group]`."""
    return accumulator.reshape([8, 2, 8, ROWS]).permute([3, 0, 2, 1]).reshape([ROWS, CHUNK])
