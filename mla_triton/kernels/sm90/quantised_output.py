"""How the Hopper kernel over an e4m3 cache makes its output of weights, `[columns, queries]`."""

# No `from __future__ import annotations`: Triton reads the annotations.

from mla_triton.kernels.sm90.gluon import (
    fence_async_shared,
    gl,
    gluon,
    sync_threads,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from mla_triton.kernels.sm90.pieces import LN_2, row_offsets
from mla_triton.kernels.sm90.quantised_groups import (
    group_as_operand,
    group_as_rows_of_output,
    load_words,
)
from mla_triton.kernels.sm90.quantised_operands import (
    CHUNK,
    INTERLEAVE,
    WARP_COLUMNS,
    as_rows_of_output,
    in_row_order,
    row_each,
    value_bytes,
)

CLEARED = gl.constexpr(16)
"""Keys that are cleared at once."""


@gluon.constexpr_function
def width_of(groups, warps):
    """Columns of an accumulator: of a group, or as many as the warps have at once."""
    return CHUNK.value if groups > 0 else WARP_COLUMNS.value * warps


@gluon.jit
def no_output(
    ROWS: gl.constexpr, VALUE: gl.constexpr, GROUPS: gl.constexpr, WARPS: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Accumulators of the output, as a tuple."""
    WIDTH: gl.constexpr = width_of(GROUPS, WARPS)
    accumulators = ()
    for _ in gl.static_range(VALUE // WIDTH):
        accumulators += (gl.zeros([WIDTH, ROWS], gl.float32, LAYOUT),)  # type: ignore
    return accumulators


@gluon.jit
def rescaled(accumulators, rescale):
    """Accumulators times a factor for each query; as a tuple, of however many."""
    results = ()
    for place in gl.static_range(len(accumulators)):
        results += (accumulators[place] * gl.expand_dims(rescale, 0),)
    return results


@gluon.jit
def clear_past(shared, slot, valid, VALUE: gl.constexpr, KEYS: gl.constexpr, WARPS: gl.constexpr):
    """Zeroes the latents of a block from `valid` on: what lies there may be NaN, and 0 x NaN is."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    rows = gl.expand_dims(gl.arange(0, CLEARED, gl.SliceLayout(1, LAYOUT)), 1)
    for row in gl.static_range(0, KEYS, CLEARED):
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
def load_values(
    shared, slot, turn, KEYS: gl.constexpr, STEP: gl.constexpr, GROUPS: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Bytes of the next columns of `STEP` keys of a block: of 32 a warp, or of a group."""
    TURNS: gl.constexpr = KEYS // STEP
    if GROUPS > 0:
        return load_words(shared, slot, turn, KEYS, STEP, WARPS)
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
def weights_of(weights, turn, KEYS: gl.constexpr, STEP: gl.constexpr, GROUPS: gl.constexpr):
    """The weights that they are multiplied by: of `STEP` keys of a block, and of a group."""
    if GROUPS > 0:
        return weights.slice(turn * STEP, STEP, dim=0)
    else:
        return weights.slice(turn * STEP % KEYS, STEP, dim=0)


@gluon.jit
def add_block(
    shared, weights, slot, accumulators, ready, following,
    KEYS: gl.constexpr, VALUE: gl.constexpr, GROUPS: gl.constexpr, WARPS: gl.constexpr,
    STEP: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Accumulators plus latents^T x weights of a block. `ready` are its first operands, and
    `following` the bytes of the one after them: bytes are loaded a product ahead."""
    WIDTH: gl.constexpr = width_of(GROUPS, WARPS)
    TURNS: gl.constexpr = KEYS // STEP
    results = ()
    for place in gl.static_range(VALUE // WIDTH):
        accumulator = accumulators[place]
        for turn in gl.static_range(place * TURNS, (place + 1) * TURNS):
            if turn < len(ready):
                values = ready[turn]
            else:
                loaded = following
                if turn + 1 < VALUE // WIDTH * TURNS:
                    following = load_values(shared, slot, turn + 1, KEYS, STEP, GROUPS, WARPS)
                values = as_value_operand(loaded, STEP, GROUPS, WARPS, LAYOUT)
            own = weights_of(weights, turn, KEYS, STEP, GROUPS)
            accumulator = warpgroup_mma(values, own, accumulator, is_async=True)
            if turn >= len(ready):
                accumulator = warpgroup_mma_wait(1, deps=(accumulator,))
        results += (accumulator,)  # type: ignore
    return warpgroup_mma_wait(0, deps=results)


# -- results


@gluon.jit
def store_columns(result, places, COLUMN: gl.constexpr, count, whole, out, partial_out):
    """`[queries, columns]` to rows that begin at `places`."""
    LAYOUT: gl.constexpr = result.type.layout
    rows = gl.arange(0, result.shape[0], gl.SliceLayout(1, LAYOUT))
    columns = COLUMN + gl.arange(0, result.shape[1], gl.SliceLayout(0, LAYOUT))
    offsets = gl.expand_dims(places, 1) + gl.expand_dims(columns, 0)
    inside = gl.expand_dims(rows < count, 1)
    if whole:
        gl.store(out + offsets, result.to(out.dtype.element_ty), mask=inside)
    else:
        gl.store(partial_out + offsets, result, mask=inside, eviction_policy="evict_last")


@gluon.jit
def store_output(
    call, accumulators, factor, request, first_row, whole, slot_row, out, partial_out,
    stride_b, stride_s, stride_h, VALUE: gl.constexpr, GROUPS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """A tile's accumulators, times a factor for each query, to `out`, or, if it is not whole, to
    partial results.

    Where rows go is computed by a row a thread: a thread's rows of a product are up to 16. As the
    product leaves them a thread has four columns side by side, and eight of them 32; with scales
    of groups, half as many.
    """
    ROWS: gl.constexpr = call.ROWS
    WIDTH: gl.constexpr = width_of(GROUPS, WARPS)
    rows = gl.arange(0, ROWS, row_each(WARPS))
    places = row_offsets(call, request, first_row, rows, stride_b, stride_s, stride_h)
    places = gl.where(whole, places, (slot_row + rows).to(gl.int64) * VALUE)
    count = call.tokens(request)[1] * call.heads - first_row
    for place in gl.static_range(VALUE // WIDTH):
        result = accumulators[place] * gl.expand_dims(factor, 0)
        if GROUPS > 0:
            result = group_as_rows_of_output(result, ROWS)
        else:
            result = as_rows_of_output(result, ROWS, WARPS)
        if place == 0:
            places = gl.convert_layout(places, gl.SliceLayout(1, result.type.layout))
        store_columns(result, places, place * WIDTH, count, whole, out, partial_out)


@gluon.jit
def store_lse(
    call, request, first_row, whole, slot_row, running_max, total, is_empty, lse, partial_lse,
    stride_b, stride_s, stride_h,
):  # fmt: skip
    """Of a tile, a row a thread."""
    rows = gl.arange(0, call.ROWS, total.type.layout)
    inside = rows < call.tokens(request)[1] * call.heads - first_row
    lse_log2 = gl.where(is_empty, float("-inf"), running_max + gl.log2(total))
    if whole:
        places = row_offsets(call, request, first_row, rows, stride_b, stride_s, stride_h)
        gl.store(lse + places, lse_log2 * LN_2, mask=inside)
    else:
        gl.store(partial_lse + (slot_row + rows), lse_log2, mask=inside)
