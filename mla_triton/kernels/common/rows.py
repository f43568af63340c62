"""Device functions that find a request's rows, its (query token, head) pairs, in q, out and lse."""

import triton
import triton.language as tl


@triton.jit
def request_queries(cu_seqlens_q, request, s_q, queries, RAGGED: tl.constexpr):
    """(a request's first token in the dimension of tokens, number of its query tokens)."""
    if RAGGED:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens_q + request), 0), queries)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens_q + request + 1), first), queries)
        return first, end - first
    else:
        return request * 0, s_q


@triton.jit
def row_pointers(
    base, request, first_token, first_row, tile_rows, heads, stride_b, stride_s, stride_h,
    STEP: tl.constexpr,
):  # fmt: skip
    """Pointers to rows `first_row + tile_rows` of a request whose tokens begin at `first_token`.

    `STEP` is the distance of one row to the next where that is the same throughout, else 0. With
    it a row's offset is a constant of the program; without, it takes a division and a register for
    each row.
    """
    if STEP > 0:
        first = (first_token.to(tl.int64) * heads + first_row) * STEP
        return base + (request.to(tl.int64) * stride_b + first) + tile_rows * STEP
    else:
        row = first_row + tile_rows
        token = (first_token + row // heads).to(tl.int64)
        return base + request.to(tl.int64) * stride_b + token * stride_s + row % heads * stride_h
