"""Device functions that turn a request's keys into addresses of a paged cache, always in bounds.

Lengths, page ids and offsets are values of the engine's, on the device, that no host code has seen.
A wrong one gives a wrong result but never an address outside the tensors: lengths are clamped to
the table, table entries past a request's keys are not read, and page ids are clamped to the
cache where they become addresses.
"""

import triton
import triton.language as tl


@triton.jit
def request_keys(kv_lens, request, max_kv_len):
    """Number of keys of a request, in [0, max_kv_len]."""
    return tl.minimum(tl.maximum(tl.load(kv_lens + request), 0), max_kv_len)


@triton.jit
def request_pages(
    pages, indptr, request, table_size, kv_len, PAGE_SIZE: tl.constexpr, CSR: tl.constexpr
):
    """(pointer to a request's first page id, its number of keys as far as the table reaches).

    `table_size` is the row stride of a dense table (whose width bounds `kv_len` already), and the
    number of entries of a CSR one.
    """
    if CSR:
        first = tl.minimum(tl.maximum(tl.load(indptr + request), 0), table_size)
        end = tl.minimum(tl.maximum(tl.load(indptr + request + 1), first), table_size)
        reach = (end - first).to(tl.int64) * PAGE_SIZE
        return pages + first, tl.minimum(kv_len, reach).to(tl.int32)
    else:
        return pages + request.to(tl.int64) * table_size, kv_len


@triton.jit
def slot_offset(slot, STRIDE: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Elements from a page's first token to that in `slot`; int64 where int32 is too narrow."""
    if STRIDE * PAGE_SIZE >= 2**31:
        slot = slot.to(tl.int64)
    return slot * STRIDE


@triton.jit
def key_rows(
    base, page, block, block_keys, stride_page, num_pages,
    STRIDE: tl.constexpr, PAGE_SIZE: tl.constexpr, ONE_PAGE: tl.constexpr,
):  # fmt: skip
    """Pointers to keys `block + block_keys`: all in one page, or each in a page of its own."""
    # A negative id is a large unsigned one.
    page = tl.minimum(page.to(tl.uint32), (num_pages - 1).to(tl.uint32))
    pages = base + page.to(tl.int64) * stride_page
    if ONE_PAGE:
        first = pages + slot_offset(block % PAGE_SIZE, STRIDE, PAGE_SIZE)
        return first + slot_offset(block_keys, STRIDE, PAGE_SIZE)
    else:
        return pages + slot_offset((block + block_keys) % PAGE_SIZE, STRIDE, PAGE_SIZE)


@triton.jit
def first_page_ids(row, block, block_keys, reach, PAGE_SIZE: tl.constexpr, ONE_PAGE: tl.constexpr):
    """Page ids (int32) of a first block of keys, as the table has them; 0 from key `reach` on."""
    key = block if ONE_PAGE else block + block_keys
    return tl.load(row + key // PAGE_SIZE, mask=key < reach, other=0)


@triton.jit
def next_page_ids(
    row, block, block_keys, last_key, PAGE_SIZE: tl.constexpr, ONE_PAGE: tl.constexpr
):
    """Page ids of the block after the one at hand; past `last_key`, the page of that key.

    Carried from one step of a loop to the next as they are loaded: a mask here, or a clamp behind
    the load, would make Triton pass them through shared memory and wait for them in every step.
    """
    key = block if ONE_PAGE else block + block_keys
    return tl.load(row + tl.minimum(key, last_key) // PAGE_SIZE)
