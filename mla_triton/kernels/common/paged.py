"""Device functions that turn a request's keys into addresses of a paged cache, always in bounds.

Lengths, page ids and offsets are values of the engine's, on the device, that no host code has seen.
A wrong one gives a wrong result but never an address outside the tensors: lengths are clamped to
the table, table entries past a request's keys are not read, and page ids are clamped to the
cache.
"""

import triton
import triton.language as tl


@triton.jit
def request_queries(cu_seqlens_q, request, s_q, queries, RAGGED: tl.constexpr):
    """(first query token, number of query tokens) of a request."""
    if RAGGED:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens_q + request), 0), queries)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens_q + request + 1), first), queries)
        return first, end - first
    else:
        return request * s_q, s_q


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
    base, page, block, block_keys, stride_page,
    STRIDE: tl.constexpr, PAGE_SIZE: tl.constexpr, ONE_PAGE: tl.constexpr,
):  # fmt: skip
    """Pointers to keys `block + block_keys`: all in one page, or each in a page of its own."""
    pages = base + page.to(tl.int64) * stride_page
    if ONE_PAGE:
        first = pages + slot_offset(block % PAGE_SIZE, STRIDE, PAGE_SIZE)
        return first + slot_offset(block_keys, STRIDE, PAGE_SIZE)
    else:
        return pages + slot_offset((block + block_keys) % PAGE_SIZE, STRIDE, PAGE_SIZE)


@triton.jit
def load_page_ids(row, key, end_key, num_pages, PAGE_SIZE: tl.constexpr):
    """Page ids (int32) of `key`, a key or a vector of keys; page 0 for keys from `end_key` on."""
    page = tl.load(row + key // PAGE_SIZE, mask=key < end_key, other=0)
    return tl.minimum(tl.maximum(page, 0), num_pages - 1)
