"""The loader of key blocks that no TMA boxes make up: pages smaller than a box, or of a size that
does not divide a block, or pages that are not evenly spaced. Four warps copy row by row.

A thread copies 16 bytes of every 16th row at a time, and column after column of 128 bytes, so that
it keeps four addresses and the page ids of the next four.
"""

from mla_triton.kernels.sm90.asymmetric import following
from mla_triton.kernels.sm90.gluon import arrive_copies, copy_async, gl, gluon, mbarrier
from mla_triton.kernels.sm90.pieces import KEYS

WARPS = gl.constexpr(4)
ARRIVALS = gl.constexpr(128)
"""Of a block's half: every thread arrives when its copies are done."""
STRIP = gl.constexpr(64)
"""Columns of 128 bytes, as shared memory holds a tile."""


@gluon.jit
def row_addresses(base, page, slots, num_pages, stride_page, stride_slot):
    """Pointers to rows of the cache, inside it whatever the page ids are."""
    inside = gl.minimum(page.to(gl.uint32), (num_pages - 1).to(gl.uint32)).to(gl.int64)
    return base + (inside * stride_page + slots * stride_slot)


@gluon.jit
def copy_strips(rows, columns, target, WIDTH: gl.constexpr):
    """Starts copying columns of rows, from where the pointers are."""
    for strip in gl.static_range(WIDTH // STRIP):
        pointers = gl.expand_dims(rows, 1) + gl.expand_dims(columns + strip * STRIP, 0)
        copy_async(target.slice(strip * STRIP, STRIP, dim=1), pointers)


@gluon.jit
def load_rows(
    call, shared, ckv, kpe, ckv_stride_page, ckv_stride_slot, kpe_stride_page, kpe_stride_slot,
    num_pages, HALF: gl.constexpr, TAIL: gl.constexpr, FUSED: gl.constexpr,
):  # fmt: skip
    """Every key block of every group into the slots, as they become free."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    key_rows = gl.arange(0, KEYS, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, STRIP, gl.SliceLayout(0, LAYOUT))
    cuts = call.groups()
    slot = 0
    phase = 1
    end_group = cuts[2] + (cuts[3] > 0).to(gl.int32)
    for group in range(cuts[0], end_group):
        request, first_row = call.place(group)
        begin_key = call.begin(group, cuts)
        page_row, reach = call.page_row(request)
        pages = call.first_page(page_row, reach, begin_key + key_rows)
        end_key = call.keys(group, cuts, request, first_row, reach)[0]
        for block in range(begin_key, end_key, KEYS):
            slots = (block + key_rows) % call.PAGE_SIZE
            latents = row_addresses(ckv, pages, slots, num_pages, ckv_stride_page, ckv_stride_slot)
            if FUSED:
                ropes = latents + 2 * HALF
            else:
                ropes = row_addresses(
                    kpe, pages, slots, num_pages, kpe_stride_page, kpe_stride_slot
                )
            # On their way while this block is waited for.
            pages = call.page(page_row, block + KEYS + key_rows, end_key)
            mbarrier.wait(shared.left_empty.index(slot), phase)
            copy_strips(latents, columns, shared.left.index(slot), HALF)
            arrive_copies(shared.left_full.index(slot), increment_count=False)
            mbarrier.wait(shared.right_empty.index(slot), phase)
            copy_strips(latents + HALF, columns, shared.right.index(slot), HALF)
            if TAIL > 0:
                copy_strips(ropes, columns, shared.rope.index(slot), TAIL)
            arrive_copies(shared.right_full.index(slot), increment_count=False)
            slot, phase = following(slot, phase)
