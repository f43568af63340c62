"""Device functions that load a tile of keys as the 16-bit numbers that are multiplied: one for each
form that a cache is stored in.

What comes from a 16-bit cache is that. e4m3 numbers are exact in float16. With one scale for all of
them they stay so, and are multiplied as float16 whatever the queries' dtype is: the scale goes into
the logits and the result, and so does a power of two of each row of queries, which brings them into
float16's range. With a scale for each group of a token's columns a number is multiplied by it in
float32 and rounded once, to the queries' dtype.

Where a card cannot convert e4m3, its bytes become the bits of a float16 that is 2**-8 of their
value: exponent and mantissa are moved by one place, and all that differs is the bias. With one
scale the factor goes into logits and result, apart from the scale, which may be too large to be
multiplied by it; with groups it is undone in float16, two numbers at once.
"""

import triton
import triton.language as tl

SAME, ONE_SCALE, GROUPS = tl.constexpr("same"), tl.constexpr("one scale"), tl.constexpr("groups")
"""How a cache is stored: in the queries' dtype; e4m3 with one scale for all latents and one for all
rotary keys; e4m3 with a scale for each group of a latent's columns."""
NATIVE, WORDS, BYTES = tl.constexpr("native"), tl.constexpr("words"), tl.constexpr("bytes")
"""How e4m3 becomes float16: by the card's conversion; by integer arithmetic on four bytes at once
(PTX); or by that on one at a time (Triton's interpreter)."""

# Of four bytes: a number whose other bits are all set is NaN, and gets the eighth set as well, so
# that in a float16 the exponent is all ones. Bytes then go to the upper halves of 16 bits, and all
# but the sign down by one place.
FOUR_BYTES = tl.constexpr("""{
    .reg .b32 magnitude, carry, low, high, sign;
    and.b32 magnitude, $2, 0x7f7f7f7f;
    add.u32 carry, magnitude, 0x01010101;
    lop3.b32 magnitude, carry, 0x80808080, magnitude, 0xEA;
    prmt.b32 low, magnitude, 0, 0x1404;
    prmt.b32 sign, $2, 0, 0x1404;
    shr.u32 low, low, 1;
    lop3.b32 $0, sign, 0x80008000, low, 0xEA;
    prmt.b32 high, magnitude, 0, 0x3424;
    prmt.b32 sign, $2, 0, 0x3424;
    shr.u32 high, high, 1;
    lop3.b32 $1, sign, 0x80008000, high, 0xEA;
}""")
TIMES_256 = tl.constexpr("""{
    .reg .b32 factor;
    mov.b32 factor, 0x5c005c00;
    mul.rn.f16x2 $0, $1, factor;
}""")
BYTE_FACTOR = tl.constexpr(256.0)


@triton.jit
def half_of(stored, DECODE: tl.constexpr):
    """float16 of e4m3 numbers; with `WORDS` and `BYTES` of their bytes, 2**-8 of their value."""
    if DECODE == NATIVE:
        return stored.to(tl.float16)
    elif DECODE == WORDS:
        return tl.inline_asm_elementwise(
            FOUR_BYTES, "=r,=r,r", [stored], dtype=tl.float16, is_pure=True, pack=4
        )
    else:
        byte = stored.to(tl.uint16)
        magnitude = byte & 0x7F
        magnitude = tl.where(magnitude == 0x7F, 0xFF, magnitude)
        return (((byte & 0x80) << 8) | (magnitude << 7)).to(tl.float16, bitcast=True)


@triton.jit
def whole_of(half, DECODE: tl.constexpr):
    """The numbers themselves, of what `half_of` makes of them."""
    if DECODE == NATIVE:
        return half
    elif DECODE == WORDS:
        return tl.inline_asm_elementwise(
            TIMES_256, "=r,r", [half], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return (half * BYTE_FACTOR).to(tl.float16)


@triton.jit
def times_factor(value, DECODE: tl.constexpr):
    """What came of numbers of `half_of`, as it would have of the numbers themselves."""
    if DECODE == NATIVE:
        return value
    else:
        return value * BYTE_FACTOR


@triton.jit
def as_bytes(pointer, DECODE: tl.constexpr):
    """A pointer to e4m3 numbers, as one to what `half_of` takes."""
    if DECODE == NATIVE:
        return pointer
    else:
        return pointer.to(tl.pointer_type(tl.uint8), bitcast=True)


@triton.jit
def float32_scale(scale):
    """float32 of a scale; of an e8m0 byte 2**(byte - 127), and NaN of 255."""
    if scale.dtype == tl.uint8:
        exponent = scale.to(tl.uint32)
        bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
        return tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    else:
        return scale


@triton.jit
def load_keys(rows, key_inside, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """`[keys, WIDTH]` as they are stored, of which columns from `COLUMNS` on are zero.

    With `MASKED`, zero as well where keys are not inside: 0 x NaN would reach the sum over V.
    """
    columns = tl.arange(0, WIDTH)[None, :]
    if COLUMNS == WIDTH and not MASKED:
        return tl.load(rows[:, None] + columns)
    else:
        if COLUMNS == WIDTH:
            wanted = key_inside[:, None]
        elif MASKED:
            wanted = key_inside[:, None] & (columns < COLUMNS)
        else:
            wanted = columns < COLUMNS
        return tl.load(rows[:, None] + columns, mask=wanted, other=0.0)


@triton.jit
def load_scaled_keys(
    rows, scale_rows, key_inside, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SCALED: tl.constexpr,
    MASKED: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """float32 `[keys, WIDTH]` of e4m3 numbers of which `SCALED` columns each have a scale."""
    GROUPS: tl.constexpr = WIDTH // SCALED
    numbers = load_keys(rows, key_inside, COLUMNS, WIDTH, MASKED)
    scales = load_keys(scale_rows, key_inside, COLUMNS // SCALED, GROUPS, MASKED)
    scales = float32_scale(scales)
    values = whole_of(half_of(numbers, DECODE), DECODE).to(tl.float32)
    grouped = tl.reshape(values, [values.shape[0], GROUPS, SCALED]) * scales[:, :, None]
    return tl.reshape(grouped, [values.shape[0], WIDTH])


@triton.jit
def as_half_rows(query):
    """(rows of a query tile as float16, what each row is to be multiplied by to be itself again).

    The factors are powers of two: a number changes only if it is 2**-28 of its row's largest or
    smaller. An infinity or a NaN stays one.
    """
    # Exponent of the largest of a row as a float16, of which the largest exponent is 15.
    TOP: tl.constexpr = 14
    wide = query.to(tl.float32)
    largest = tl.max(tl.abs(wide), 1).to(tl.uint32, bitcast=True)
    # Both the factor and its reciprocal are normal numbers.
    exponent = tl.minimum(tl.maximum(largest >> 23, TOP + 1), 254)
    factor = ((2 * 127 + TOP - exponent) << 23).to(tl.float32, bitcast=True)
    back = ((exponent - TOP) << 23).to(tl.float32, bitcast=True)
    return (wide * factor[:, None]).to(tl.float16), back


# A tensor core's operands have neighbouring keys, or columns that are not all neighbours, in one
# thread; e4m3 lies in memory with 16 columns in as many bytes, and no instruction transposes bytes.
# But the order of columns is free: in the first product as long as queries have the same, in the
# second as long as the result is put right at the end. So a thread gets 16 neighbouring columns of
# each of its keys, which it reads from shared memory in one piece, and converts in registers.


@triton.jit
def key_order(tile):
    """Columns of queries and keys in the order of the first product: 16 of them to each of 4 lanes,
    which the layout of an operand deals out 4 at a time."""
    ROWS: tl.constexpr = tile.shape[0]
    WIDTH: tl.constexpr = tile.shape[1]
    if WIDTH < 64:
        return tile
    else:
        parts = tl.reshape(tile, [ROWS, WIDTH // 64, 4, 4, 4])
        return tl.reshape(tl.permute(parts, (0, 1, 3, 2, 4)), [ROWS, WIDTH])


@triton.jit
def value_order(tile, CHUNKS: tl.constexpr):
    """Columns of values in the order of the second product: neighbours that lie in one of so many
    chunks, one for each column of a warp's matrix instruction, are that far apart."""
    ROWS: tl.constexpr = tile.shape[0]
    WIDTH: tl.constexpr = tile.shape[1]
    if WIDTH <= CHUNKS:
        return tile
    else:
        parts = tl.reshape(tile, [ROWS, CHUNKS, WIDTH // CHUNKS])
        return tl.reshape(tl.permute(parts, (0, 2, 1)), [ROWS, WIDTH])


@triton.jit
def column_order(tile, CHUNKS: tl.constexpr):
    """Columns of a result as the cache has them: `value_order` undone."""
    WIDTH: tl.constexpr = tile.shape[1]
    if WIDTH <= CHUNKS:
        return tile
    else:
        return value_order(tile, WIDTH // CHUNKS)
