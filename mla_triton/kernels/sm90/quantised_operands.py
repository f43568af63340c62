"""How the Hopper kernel over an e4m3 cache makes operands of bytes, and of queries.

Products are turned round: keys, and latents^T, are the operand that is read from registers. The
order of rows and columns inside a product is free, as long as both operands have the same, and is
chosen so that a thread's bytes lie side by side.
"""

# No `from __future__ import annotations`: Triton reads the annotations.

from mla_triton.kernels.sm90.gluon import (
    commit_copies,
    copy_async,
    fence_async_shared,
    gl,
    gluon,
    sync_threads,
    wait_copies,
)
from mla_triton.kernels.sm90.pieces import row_offsets

CHUNK = gl.constexpr(128)
"""Columns of a latent that lie side by side in shared memory: the widest swizzle."""
WARP_KEYS = gl.constexpr(16)
"""Keys of a block that are a warp's rows of the first product."""
WARP_COLUMNS = gl.constexpr(32)
"""Columns of a latent that are a warp's rows of the second, at once."""
TOP_EXPONENT = gl.constexpr(14)
"""Of the largest query of a row, once it is in float16."""

# -- orders of rows and columns


@gluon.constexpr_function
def warps_apart(warps, rows, columns):
    """Bases of a layout in which each warp is so far from the one before it."""
    return [[rows << bit, columns << bit] for bit in range(3) if warps >> bit > 1]


@gluon.constexpr_function
def key_bytes(columns, warps):
    """A layout of `[keys of a block, columns]` bytes: a thread has a quarter of the columns of two
    rows, 16 or 32 bytes side by side, which `as_operand` makes those that wgmma wants of it."""
    registers, column = [], 1
    while column < columns // 4:
        registers.append([0, column])
        column *= 2
    lanes = [[0, column], [0, 2 * column], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(
        [*registers, [8, 0]],
        lanes,
        warps_apart(warps, WARP_KEYS.value, 0),
        [],
        [WARP_KEYS.value * warps, columns],
    )


@gluon.jit
def load_keys(shared, slot, chunk, WARPS: gl.constexpr):
    """Bytes of 128 columns of the keys of a block."""
    part = shared.latent.index(slot).slice(chunk * CHUNK, CHUNK, dim=1)
    return part.load(key_bytes(CHUNK, WARPS))


@gluon.jit
def in_product_order(rows, COLUMNS: gl.constexpr):
    """Columns of keys or queries as a product takes them: of each quarter four of every 16."""
    parts = rows.reshape([rows.shape[0], 4, COLUMNS // 16, 2, 2])
    return parts.permute([0, 2, 3, 1, 4]).reshape([rows.shape[0], COLUMNS])


@gluon.jit
def as_operand(keys, LAYOUT: gl.constexpr):
    """Bytes of keys in `key_bytes` as the first operand of a product."""
    rows = in_product_order(keys.to(gl.float16), keys.shape[1])
    return gl.convert_layout(rows, gl.DotOperandLayout(0, LAYOUT, 2), assert_trivial=True)


@gluon.jit
def in_halves(keys):
    """Bytes of keys in `key_bytes` as two tensors of half the columns each, in that layout."""
    quarters = keys.reshape([keys.shape[0], 4, 2, keys.shape[1] // 32, 2, 2])
    first, second = quarters.permute([0, 1, 3, 4, 5, 2]).split()
    shape: gl.constexpr = [keys.shape[0], keys.shape[1] // 2]
    return first.reshape(shape), second.reshape(shape)


@gluon.constexpr_function
def value_bytes(keys, warps):
    """A layout of bytes of latents, `[keys, 32 columns a warp]`: a thread has four side by side of
    every key that wgmma wants of it, so that `in_row_order` moves nothing from thread to thread."""
    registers, key = [[0, 1], [0, 2], [1, 0]], 8
    while key < keys:
        registers.append([key, 0])
        key *= 2
    lanes = [[2, 0], [4, 0], [0, 4], [0, 8], [0, 16]]
    columns = WARP_COLUMNS.value
    return gl.DistributedLinearLayout(
        registers, lanes, warps_apart(warps, 0, columns), [], [keys, columns * warps]
    )


INTERLEAVE = gl.constexpr("""{
    .reg .b32 low, high;
    .reg .b16 a, b, c, d;
    prmt.b32 low, $4, $5, 0x5140;
    prmt.b32 high, $4, $5, 0x7362;
    mov.b32 {a, b}, low;
    mov.b32 {c, d}, high;
    cvt.rn.f16x2.e4m3x2 $0, a;
    cvt.rn.f16x2.e4m3x2 $1, b;
    cvt.rn.f16x2.e4m3x2 $2, c;
    cvt.rn.f16x2.e4m3x2 $3, d;
}""")
"""Four bytes of each of two keys as four pairs of float16, each of one column: of the bits that say
which number it is, (key, column 2, column 1), the result has them as (column 2, column 1, key)."""


@gluon.jit
def in_row_order(values, STEP: gl.constexpr, WARPS: gl.constexpr):
    """`[keys, columns]` of latents, once interleaved, as `[rows of the product, keys]`."""
    column_2: gl.constexpr = 1
    column_1: gl.constexpr = 5
    key: gl.constexpr = 6
    parts = values.reshape([STEP // 2, 2, WARPS // 4, 4, 8, 2, 2])
    rows = parts.permute([column_2, 2, 3, column_1, 4, 0, key])
    return rows.reshape([WARP_COLUMNS * WARPS, STEP])


@gluon.jit
def as_rows_of_output(accumulator, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """`[rows of the product, queries]` as `[queries, columns of the latent]`."""
    parts = accumulator.reshape([2, WARPS // 4, 4, 2, 8, ROWS])
    return parts.permute([5, 1, 2, 4, 0, 3]).reshape([ROWS, WARP_COLUMNS * WARPS])


# -- queries


@gluon.constexpr_function
def row_each(warps):
    """A layout of queries of which a thread has one, if there are as many threads."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.constexpr_function
def query_lines(width, warps):
    """A layout of `[queries, columns]` whose threads have 16 bytes side by side."""
    across = width // 8
    return gl.BlockedLayout([1, 8], [32 // across, across], [warps, 1], [1, 0])


@gluon.jit
def load_columns(source, rows, COLUMN: gl.constexpr, WIDTH: gl.constexpr, WARPS: gl.constexpr):
    """Columns of the rows of a tile, from where the offsets are."""
    columns = COLUMN + gl.arange(0, WIDTH, gl.SliceLayout(0, query_lines(WIDTH, WARPS)))
    return gl.load(source + gl.expand_dims(rows, 1) + gl.expand_dims(columns, 0))


@gluon.jit
def copy_columns(
    source, rows, COLUMN: gl.constexpr, WIDTH: gl.constexpr, WARPS: gl.constexpr, target
):
    """Starts copying them to shared memory."""
    columns = COLUMN + gl.arange(0, WIDTH, gl.SliceLayout(0, query_lines(WIDTH, WARPS)))
    copy_async(target, source + gl.expand_dims(rows, 1) + gl.expand_dims(columns, 0))


@gluon.jit
def as_they_are(place, source):
    """The place of queries as one of numbers of their own type, of 16 bits as well."""
    return place._reinterpret(source.dtype.element_ty, place.shape, place.layout)


@gluon.jit
def magnitude(values):
    return gl.abs(values.to(gl.float32))


@gluon.jit
def store_queries(values, factor, target, WIDTH: gl.constexpr):
    """Queries times a factor, in float16 and in the order of the product."""
    values = values.to(gl.float32) * factor
    target.store(in_product_order(values.to(gl.float16), WIDTH))


@gluon.jit
def prepare_queries(
    call, shared, q_nope, q_rope, request, first_row, is_zero,
    nope_stride_b, nope_stride_s, nope_stride_h, rope_stride_b, rope_stride_s, rope_stride_h,
    CHUNKS: gl.constexpr, TAIL: gl.constexpr, GROUPS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Queries of a group into shared memory; returns what scores have to be multiplied by for it.

    A power of two brings the largest of the tile to 2^14, so that float16 holds it whatever it is,
    and the smallest of a row to its full precision if the row's largest is 2^-28 of that.
    `is_zero` is whether latents are, because their scale is. With scales of groups the rotary part
    stays what it is: its keys have no scale, nor its products the factor.
    """
    FLAT: gl.constexpr = row_each(WARPS)
    LINES: gl.constexpr = query_lines(CHUNK, WARPS)
    ROPE_LINES: gl.constexpr = query_lines(TAIL if TAIL > 0 else CHUNK, WARPS)
    # All that is loaded is on its way before the first of it is waited for: to registers, or, if
    # they do not hold it, to where it is to be.
    IS_HELD: gl.constexpr = call.ROWS <= 8 * WARPS
    tile_rows = gl.arange(0, call.ROWS, FLAT)
    rows = row_offsets(
        call, request, first_row, tile_rows, nope_stride_b, nope_stride_s, nope_stride_h
    )
    rows = gl.convert_layout(rows, gl.SliceLayout(1, LINES))
    chunks = ()
    for chunk in gl.static_range(CHUNKS):
        place = as_they_are(shared.query.index(chunk), q_nope)
        if IS_HELD:
            chunks += (load_columns(q_nope, rows, chunk * CHUNK, CHUNK, WARPS),)  # type: ignore
        else:
            copy_columns(q_nope, rows, chunk * CHUNK, CHUNK, WARPS, place)
            chunks += (place,)  # type: ignore
    if TAIL > 0:
        rope_rows = row_offsets(
            call, request, first_row, tile_rows, rope_stride_b, rope_stride_s, rope_stride_h
        )
        rope_rows = gl.convert_layout(rope_rows, gl.SliceLayout(1, ROPE_LINES))
        place = as_they_are(shared.query_rope.index(0), q_rope)
        if IS_HELD:
            rope = load_columns(q_rope, rope_rows, 0, TAIL, WARPS)
        else:
            copy_columns(q_rope, rope_rows, 0, TAIL, WARPS, place)
    if not IS_HELD:
        commit_copies()
        wait_copies(0)
        sync_threads()
        if TAIL > 0:
            rope = place.load(ROPE_LINES)
    largest = gl.zeros([call.ROWS, CHUNK], gl.float32, LINES)
    for chunk in gl.static_range(CHUNKS):
        values = chunks[chunk] if IS_HELD else chunks[chunk].load(LINES)  # type: ignore
        largest = gl.maximum(largest, magnitude(values))
    peak = gl.convert_layout(gl.max(largest, 1), FLAT)
    if TAIL > 0 and GROUPS == 0:
        peak = gl.maximum(peak, gl.convert_layout(gl.max(magnitude(rope), 1), FLAT))
    # Of 2^e <= peak < 2^(e + 1), from the bits: the power that brings it to 2^TOP_EXPONENT. Not of
    # what is so small that the power would be infinite, nor of what is infinite itself.
    exponent = (peak.to(gl.int32, bitcast=True) >> 23) & 0xFF
    exponent = gl.max(gl.where(exponent == 0xFF, 0, exponent), 0)
    exponent = gl.maximum(exponent, 2 * TOP_EXPONENT)
    factor = ((254 + TOP_EXPONENT - exponent) << 23).to(gl.float32, bitcast=True)
    inverse = (exponent - TOP_EXPONENT << 23).to(gl.float32, bitcast=True)
    for chunk in gl.static_range(CHUNKS):
        values = chunks[chunk] if IS_HELD else chunks[chunk].load(LINES)
        if is_zero:
            values = gl.zeros_like(values)
        store_queries(values, factor, shared.query.index(chunk), CHUNK)
    if GROUPS > 0:
        if IS_HELD:
            shared.query_rope.index(0).store(rope)
    elif TAIL > 0:
        store_queries(rope, factor, shared.query_rope.index(0), TAIL)
    fence_async_shared()
    sync_threads()
    return inverse
