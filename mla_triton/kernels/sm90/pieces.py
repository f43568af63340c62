"""What the Hopper kernels share: a piece of work, rows in and out, key tiles in shared memory."""

# No `from __future__ import annotations`: an aggregate reads the types of its fields.

from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

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
    """What is the same for all partitions: the sizes of a call, and where its work stands.

    `ROWS` are those of a program's tile, `TILE` the keys of a schedule tile.
    """

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
    GATHER: gl.constexpr
    ROWS: gl.constexpr
    TILE: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, pages, indptr, kv_lens, cu_seqlens_q, schedule, table_size, batch, s_q, queries,
        heads, max_kv_len, planned_kv_len, parts, PAGE_SIZE, CSR, RAGGED, CAUSAL, GATHER,
        ROWS, TILE,
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
        self.GATHER = gl.constexpr(GATHER)
        self.ROWS = gl.constexpr(ROWS)
        self.TILE = gl.constexpr(TILE)

    @gluon.jit
    def groups(self):
        """(first group of this program's part, tile it begins at, last group, tile it ends at).

        The first thing that is read of what the kernel before this one may have written. Only then
        may the merge take its place: it reads the schedule without waiting for this kernel's end.
        """
        gdc_wait()
        gdc_launch_dependents()
        cuts = self.schedule + HEADER + CUT * gl.program_id(1)
        return gl.load(cuts), gl.load(cuts + 1), gl.load(cuts + 2), gl.load(cuts + 3)

    @gluon.jit
    def place(self, group):
        """(request of a group, the first of its rows that are this program's)."""
        group_rows = gl.num_programs(0) * self.ROWS
        lane = gl.program_id(0)
        if self.RAGGED:
            entry = self.schedule + HEADER + CUT * (self.parts + 1) + GROUP * group
            request = gl.minimum(gl.maximum(gl.load(entry), 0), self.batch - 1)
            return request, gl.load(entry + 1) * group_rows + lane * self.ROWS
        else:
            # Zero, but not to the compiler: it would keep what follows from the rows in registers
            # from one group to the next.
            zero = group >> 30
            return gl.minimum(group, self.batch - 1), lane * self.ROWS + zero

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
    def page_row(self, request):
        """(pointer to a request's first page id, keys that its part of the table reaches)."""
        if self.CSR:
            table = self.table_size.to(gl.int32)
            first = gl.minimum(gl.maximum(gl.load(self.indptr + request), 0), table)
            end = gl.minimum(gl.maximum(gl.load(self.indptr + request + 1), first), table)
            reach = (end - first).to(gl.int64) * self.PAGE_SIZE
            return self.pages + first, gl.minimum(reach, self.max_kv_len.to(gl.int64)).to(gl.int32)
        else:
            return self.pages + request.to(gl.int64) * self.table_size, self.max_kv_len

    @gluon.jit
    def begin(self, group, cuts):
        """First key of a piece."""
        return gl.where(group == cuts[0], cuts[1], 0) * self.TILE

    @gluon.jit
    def keys(self, group, cuts, request, first_row, reach):
        """(end of the keys that any row of a piece sees, end of those that all rows see, keys
        before the first query sees its own, whether the piece is the whole group)."""
        length = gl.maximum(gl.load(self.kv_lens + request), 0)
        tiles = gl.cdiv(gl.minimum(length, self.planned_kv_len), self.TILE)
        kv_len = gl.minimum(length, reach)
        end = gl.where(group == cuts[2], cuts[3], tiles)
        end_key = gl.minimum(end * self.TILE, kv_len)
        _, s_q = self.tokens(request)
        before_queries = kv_len - s_q + 1
        seen_end = end_key
        if self.CAUSAL:
            last_row = gl.minimum(first_row + (self.ROWS - 1), s_q * self.heads - 1)
            end_key = gl.minimum(end_key, before_queries + last_row // self.heads)
            seen_end = gl.minimum(end_key, before_queries + first_row // self.heads)
        if self.RAGGED:
            end_key = gl.where(first_row < s_q * self.heads, end_key, 0)
        whole = (self.begin(group, cuts) == 0) & (end == tiles)
        return end_key, seen_end, before_queries, whole

    @gluon.jit
    def first_page(self, page_row, reach, key):
        """Id of the page of a key, perhaps of one past the length: it is not waited for here.

        A dense table is still the table there, and what page an id names does not matter.
        """
        last_page = (reach - 1) // self.PAGE_SIZE
        return gl.load(
            page_row + gl.minimum(key // self.PAGE_SIZE, last_page), mask=reach > 0, other=0
        )

    @gluon.jit
    def page(self, page_row, key, end_key):
        """Id of the page of a key, or of the last key before `end_key`."""
        last_page = (end_key - 1) // self.PAGE_SIZE
        return gl.load(page_row + gl.minimum(key // self.PAGE_SIZE, last_page))


@gluon.jit
def wait_keys(call, full, phase):
    """Waits for a part of a key block, so that wgmma may read it."""
    mbarrier.wait(full, phase)
    if call.GATHER:
        # Threads have written it, not TMA.
        fence_async_shared()


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


@gluon.constexpr_function
def wide_layout(columns):
    """wgmma's layout of 64 rows, but for four columns side by side in a thread instead of two:
    the four threads of a row write 64 bytes of it at once."""
    registers = [[0, 1], [0, 2], [8, 0]]
    column = 16
    while column < columns:
        registers.append([0, column])
        column *= 2
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[16, 0], [32, 0]], [], [ROWS.value, columns]
    )


@gluon.jit
def store_half(
    call, accumulator, request, first_row, slot_row, whole, out, partial_out, staging,
    stride_b, stride_s, stride_h, COLUMN: gl.constexpr, HALF: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Half of a tile's result, to `out` or to the partial results.

    Registers hold two columns of a row side by side: 8 bytes of a partial result, of which
    neighbouring threads make 16, but only 4 of `out`, which goes through shared memory.
    """
    _, s_q = call.tokens(request)
    rows = s_q * call.heads - first_row
    if whole:
        ACROSS: gl.constexpr = HALF // 8
        LINES: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
        staging.store(accumulator.to(out.dtype.element_ty))
        sync_threads()
        line = gl.arange(0, ROWS, gl.SliceLayout(1, LINES))
        places = row_offsets(call, request, first_row, line, stride_b, stride_s, stride_h)
        store_rows(staging.load(LINES), out + COLUMN, places, line < rows, HALF, LINES, "")
    else:
        PIECES: gl.constexpr = wide_layout(HALF)
        tile_rows = gl.arange(0, ROWS, gl.SliceLayout(1, PIECES))
        partial_places = (slot_row + tile_rows).to(gl.int64) * (2 * HALF)
        values = gl.convert_layout(accumulator, PIECES)
        store_rows(
            values, partial_out + COLUMN, partial_places, tile_rows < rows, HALF, PIECES,
            "evict_last",
        )  # fmt: skip


@gluon.jit
def store_rows(
    values, target, places, inside, WIDTH: gl.constexpr, LAYOUT: gl.constexpr,
    POLICY: gl.constexpr,
):  # fmt: skip
    """Rows of values to their places, those that are inside."""
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    addresses = target + gl.expand_dims(places, 1) + gl.expand_dims(columns, 0)
    gl.store(addresses, values, mask=gl.expand_dims(inside, 1), eviction_policy=POLICY)


@gluon.jit
def partial_row(call, is_first):
    """First row of this program's place among the partial results, for the piece that is the
    group's first, or continues an earlier one."""
    slot = 2 * gl.program_id(1) + is_first.to(gl.int32)
    return (slot * gl.num_programs(0) + gl.program_id(0)) * call.ROWS


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
    """A barrier for each slot, completed by so many arrivals.

    Only for a partition that waits for it: what nobody waits for counts as free once it is
    initialised, and is given to others, whose first store nothing orders behind that.
    """
    made = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(made.index(slot), count=ARRIVALS)
    return made
