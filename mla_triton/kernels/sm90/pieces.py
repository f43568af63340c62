"""What the Hopper kernels share: a piece of work, rows in and out, key tiles in shared memory."""

# No `from __future__ import annotations`: an aggregate reads the types of its fields.

from mla_triton.kernels.common.schedule import CUT, GROUP, HEADER
from mla_triton.kernels.sm90.decode_config import BLOCK, ROW_TILE
from mla_triton.kernels.sm90.gluon import (
    aggregate,
    copy_async,
    copy_tile,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    sync_threads,
)

ROWS = gl.constexpr(ROW_TILE)
KEYS = gl.constexpr(BLOCK)
LOWEST = gl.constexpr(-3.4028234663852886e38)
LN_2 = gl.constexpr(0.6931471805599453)


@aggregate
class Call:
    """What is the same for all partitions: the sizes of a call, and where its work stands."""

    pages: gl.tensor
    indptr: gl.tensor
    kv_lens: gl.tensor
    cu_seqlens_q: gl.tensor
    schedule: gl.tensor
    table_size: gl.tensor
    batch: gl.tensor
    s_q: gl.tensor
    queries: gl.tensor
    heads: gl.tensor
    max_kv_len: gl.tensor
    planned_kv_len: gl.tensor
    parts: gl.tensor
    PAGE_SIZE: gl.constexpr
    CSR: gl.constexpr
    RAGGED: gl.constexpr
    CAUSAL: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, pages, indptr, kv_lens, cu_seqlens_q, schedule, table_size, batch, s_q, queries,
        heads, max_kv_len, planned_kv_len, parts, PAGE_SIZE, CSR, RAGGED, CAUSAL,
    ):  # fmt: skip
        self.pages = pages
        self.indptr = indptr
        self.kv_lens = kv_lens
        self.cu_seqlens_q = cu_seqlens_q
        self.schedule = schedule
        self.table_size = table_size
        self.batch = batch
        self.s_q = s_q
        self.queries = queries
        self.heads = heads
        self.max_kv_len = max_kv_len
        self.planned_kv_len = planned_kv_len
        self.parts = parts
        self.PAGE_SIZE = gl.constexpr(PAGE_SIZE)
        self.CSR = gl.constexpr(CSR)
        self.RAGGED = gl.constexpr(RAGGED)
        self.CAUSAL = gl.constexpr(CAUSAL)

    @gluon.jit
    def groups(self):
        """(first group of this program's part, tile it begins at, last group, tile it ends at)."""
        cuts = self.schedule + HEADER + CUT * gl.program_id(1)
        return gl.load(cuts), gl.load(cuts + 1), gl.load(cuts + 2), gl.load(cuts + 3)

    @gluon.jit
    def place(self, group):
        """(request of a group, the first of its rows that are this program's)."""
        group_rows = gl.num_programs(0) * ROWS
        lane = gl.program_id(0)
        if self.RAGGED:
            entry = self.schedule + HEADER + CUT * (self.parts + 1) + GROUP * group
            request = gl.minimum(gl.maximum(gl.load(entry), 0), self.batch - 1)
            return request, gl.load(entry + 1) * group_rows + lane * ROWS
        else:
            return gl.minimum(group, self.batch - 1), lane * ROWS

    @gluon.jit
    def tokens(self, request):
        """(first query token of a request in the dimension of tokens, how many it has)."""
        if self.RAGGED:
            first = gl.load(self.cu_seqlens_q + request)
            first = gl.minimum(gl.maximum(first, 0), self.queries)
            end = gl.load(self.cu_seqlens_q + request + 1)
            end = gl.minimum(gl.maximum(end, first), self.queries)
            return first, end - first
        else:
            return request * 0, self.s_q

    @gluon.jit
    def page_row(self, request, kv_len):
        """(pointer to a request's first page id, its keys as far as the table reaches)."""
        if self.CSR:
            table = self.table_size.to(gl.int32)
            first = gl.minimum(gl.maximum(gl.load(self.indptr + request), 0), table)
            end = gl.minimum(gl.maximum(gl.load(self.indptr + request + 1), first), table)
            reach = (end - first).to(gl.int64) * self.PAGE_SIZE
            return self.pages + first, gl.minimum(kv_len.to(gl.int64), reach).to(gl.int32)
        else:
            return self.pages + request.to(gl.int64) * self.table_size, kv_len

    @gluon.jit
    def keys(self, group, cuts, request, first_row):
        """(first key of a piece, end of the keys that any row sees, end of those that all rows see,
        keys before the first query sees its own, page ids, whether the piece is the whole group,
        whether it is the group's first)."""
        first_group, first_tile, last_group, last_tile = cuts
        length = gl.maximum(gl.load(self.kv_lens + request), 0)
        tiles = gl.cdiv(gl.minimum(length, self.planned_kv_len), KEYS)
        page_row, kv_len = self.page_row(request, gl.minimum(length, self.max_kv_len))
        begin = gl.where(group == first_group, first_tile, 0)
        end = gl.where(group == last_group, last_tile, tiles)
        begin_key = begin * KEYS
        end_key = gl.minimum(end * KEYS, kv_len)
        _, s_q = self.tokens(request)
        before_queries = kv_len - s_q + 1
        seen_end = end_key
        if self.CAUSAL:
            last_row = gl.minimum(first_row + (ROWS - 1), s_q * self.heads - 1)
            end_key = gl.minimum(end_key, before_queries + last_row // self.heads)
            seen_end = gl.minimum(end_key, before_queries + first_row // self.heads)
        if self.RAGGED:
            end_key = gl.where(first_row < s_q * self.heads, end_key, 0)
        whole = (begin == 0) & (end == tiles)
        return begin_key, end_key, seen_end, before_queries, page_row, whole, begin == 0


@gluon.jit
def row_offsets(call, request, first_row, tile_rows, stride_b, stride_s, stride_h):
    """Offsets of rows of the tile in a tensor; past the request's last row, that of the last."""
    first_token, s_q = call.tokens(request)
    row = gl.minimum(first_row + tile_rows, gl.maximum(s_q * call.heads - 1, 0))
    token = (first_token + row // call.heads).to(gl.int64)
    return request.to(gl.int64) * stride_b + token * stride_s + row % call.heads * stride_h


@gluon.jit
def load_query(source, offsets, COLUMN: gl.constexpr, WIDTH: gl.constexpr, target):
    """Starts copying columns of the tile's rows to shared memory."""
    # 16 bytes a thread: a warp takes whole rows, or 512 bytes of one.
    ACROSS: gl.constexpr = WIDTH // 8 if WIDTH < 256 else 32
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    columns = COLUMN + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    rows = gl.convert_layout(offsets, gl.SliceLayout(1, LAYOUT))
    copy_async(target, source + gl.expand_dims(rows, 1) + gl.expand_dims(columns, 0))


@gluon.jit
def clear_past(keys, valid, WIDTH: gl.constexpr):
    """Zeroes the rows of a key tile from `valid` on: what lies there may be NaN, and 0 x NaN is."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, KEYS, gl.SliceLayout(1, LAYOUT))
    for column in gl.static_range(0, WIDTH, 64):
        part = keys.slice(column, 64, dim=1)
        tile = part.load(LAYOUT)
        part.store(gl.where(gl.expand_dims(rows, 1) < valid, tile, gl.zeros_like(tile)))
    fence_async_shared()
    sync_threads()


@gluon.jit
def store_half(
    call, accumulator, request, first_row, slot_row, whole, out, partial_out,
    stride_b, stride_s, stride_h, COLUMN: gl.constexpr, HALF: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Half of a tile's result, to `out` or to the partial results."""
    tile_rows = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    columns = COLUMN + gl.arange(0, HALF, gl.SliceLayout(0, LAYOUT))
    _, s_q = call.tokens(request)
    inside = gl.expand_dims(tile_rows < s_q * call.heads - first_row, 1)
    if whole:
        rows = row_offsets(call, request, first_row, tile_rows, stride_b, stride_s, stride_h)
        in_out = out + gl.expand_dims(rows, 1) + gl.expand_dims(columns, 0)
        gl.store(in_out, accumulator.to(out.dtype.element_ty), mask=inside)
    else:
        places = (slot_row + tile_rows).to(gl.int64) * (2 * HALF)
        in_partial = partial_out + gl.expand_dims(places, 1) + gl.expand_dims(columns, 0)
        gl.store(in_partial, accumulator, mask=inside)


@gluon.jit
def partial_row(is_first):
    """First row of this program's place among the partial results, for the piece that is the
    group's first, or continues an earlier one."""
    slot = 2 * gl.program_id(1) + is_first.to(gl.int32)
    return slot * gl.num_programs(0) * ROWS + gl.program_id(0) * ROWS


@gluon.jit
def copy_rows(source_map, row, column, barrier, target, BOX: gl.constexpr, box: gl.constexpr):
    """Starts copying a box of rows into its place in a key tile."""
    copy_tile(source_map, [row, column], barrier, target.slice(box * BOX, BOX, dim=0))


@gluon.jit
def key_row(page, first_key, num_pages, page_rows, PAGE_SIZE: gl.constexpr):
    """Row of a key among all rows of the cache, inside it whatever the page id is."""
    inside = gl.minimum(page.to(gl.uint32), (num_pages - 1).to(gl.uint32)).to(gl.int32)
    return inside * page_rows + first_key % PAGE_SIZE


@gluon.jit
def barriers(SLOTS: gl.constexpr, ARRIVALS: gl.constexpr):
    """A barrier for each slot, completed by so many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(made.index(slot), count=ARRIVALS)
    return made
