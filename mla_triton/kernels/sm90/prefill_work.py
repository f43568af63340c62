"""What the partitions of the Hopper prefill kernel share: which tile it is, memory and barriers."""

# No `from __future__ import annotations`: an aggregate reads the types of its fields.

from mla_triton.kernels.sm90.gluon import aggregate, gl, gluon
from mla_triton.kernels.sm90.prefill_config import CHUNK as CHUNK_COLUMNS
from mla_triton.kernels.sm90.prefill_config import WARPGROUP_ROWS

ROWS = gl.constexpr(WARPGROUP_ROWS)
"""Queries of a warpgroup."""
TILE = gl.constexpr(2 * WARPGROUP_ROWS)
"""Queries of a program's tile."""
CHUNK = gl.constexpr(CHUNK_COLUMNS)


@aggregate
class Shared:
    """Shared memory and its barriers, as `mla_triton.kernels.sm90.prefill_steps` has them.

    `CHUNKS` are those of a row of queries or keys, `SLOTS` blocks of keys and of values.
    """

    query: gl.shared_memory_descriptor
    key: gl.shared_memory_descriptor
    value: gl.shared_memory_descriptor
    first_full: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    cleared: gl.shared_memory_descriptor
    passed: gl.shared_memory_descriptor
    CHUNKS: gl.constexpr
    SLOTS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, query, key, value, first_full, full, free, cleared, passed, CHUNKS, SLOTS):
        self.query = query
        self.key = key
        self.value = value
        self.first_full = first_full
        self.full = full
        self.free = free
        self.cleared = cleared
        self.passed = passed
        self.CHUNKS = gl.constexpr(CHUNKS)
        self.SLOTS = gl.constexpr(SLOTS)


@gluon.jit
def bounds(cu_seqlens, sequence, tokens):
    """(first token of a sequence, how many it has), inside the tensor whatever the offsets are."""
    first = gl.minimum(gl.maximum(gl.load(cu_seqlens + sequence), 0), tokens)
    end = gl.minimum(gl.maximum(gl.load(cu_seqlens + sequence + 1), first), tokens)
    return first, end - first


@aggregate
class Work:
    """What every partition finds its tile by."""

    cu_seqlens_q: gl.tensor
    cu_seqlens_k: gl.tensor
    batch: gl.tensor
    queries: gl.tensor
    keys: gl.tensor
    heads: gl.tensor
    slots: gl.tensor
    slots_each: gl.tensor
    abreast: gl.tensor
    CAUSAL: gl.constexpr
    BLOCK_N: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, cu_seqlens_q, cu_seqlens_k, batch, queries, keys, heads, slots, slots_each, abreast,
        CAUSAL, BLOCK_N,
    ):  # fmt: skip
        self.cu_seqlens_q = cu_seqlens_q
        self.cu_seqlens_k = cu_seqlens_k
        self.batch = batch
        self.queries = queries
        self.keys = keys
        self.heads = heads
        self.slots = slots
        self.slots_each = slots_each
        self.abreast = abreast
        self.CAUSAL = gl.constexpr(CAUSAL)
        self.BLOCK_N = gl.constexpr(BLOCK_N)

    @gluon.jit
    def first_slot(self, sequence):
        """Slot of a sequence's first tile: each has as many, or room for all that it has."""
        first = gl.minimum(gl.maximum(gl.load(self.cu_seqlens_q + sequence), 0), self.queries)
        following = (first + sequence * (TILE - 1)) // TILE
        return gl.where(self.slots_each > 0, sequence * self.slots_each, following)

    @gluon.jit
    def sequence_of(self, slot):
        """The last sequence whose tiles begin at a slot or before it."""
        low = slot * 0
        high = self.batch
        while high - low > 1:
            middle = (low + high) // 2
            is_before = self.first_slot(middle) <= slot
            low = gl.where(is_before, middle, low)
            high = gl.where(is_before, high, middle)
        return low

    @gluon.jit
    def tile(self):
        """Of the program's tile: (head, first query token, queries from it on, first key token,
        keys, keys that its first query sees, keys that any of them sees).

        `abreast` heads take turns, tile after tile from the last one on; then the next heads. No
        queries: there is no such tile.
        """
        program = gl.program_id(0)
        first_head = program // (self.abreast * self.slots) * self.abreast
        abreast_here = gl.minimum(self.abreast, self.heads - first_head)
        place = program - first_head * self.slots
        head = first_head + place % abreast_here
        slot = self.slots - 1 - place // abreast_here
        sequence = self.sequence_of(slot)
        first_query, query_count = bounds(self.cu_seqlens_q, sequence, self.queries)
        first_key, key_count = bounds(self.cu_seqlens_k, sequence, self.keys)
        first_row = (slot - self.first_slot(sequence)) * TILE
        rows = gl.where(first_row < 0, 0, query_count - first_row)
        row_end = key_count - query_count + 1 + first_row
        end_key = key_count
        if self.CAUSAL:
            last_row = gl.minimum(TILE, rows) - 1
            end_key = gl.minimum(gl.maximum(row_end + last_row, 0), key_count)
        return head, first_query + first_row, rows, first_key, key_count, row_end, end_key

    @gluon.jit
    def blocks(self, end_key):
        """Key blocks of a tile. One that sees no key has one, too, all of it hidden."""
        return gl.maximum(gl.cdiv(end_key, self.BLOCK_N), 1)
