"""What the host knows of one call: sizes, dtypes and options, never a value that lives on the
device.

A problem decides which implementation runs, how its schedule is laid out and which kernel variant
is compiled. Sizes that change from one engine step to the next and change no code (how many pages
the cache has, how wide the page table is) are carried along but left out of equality, so that a
cache keyed on a problem is not missed because a table grew.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch


class RowSteps(NamedTuple):
    """Elements from one (query token, head) row of a tensor to the next, 0 where it varies."""

    q_nope: int = 0
    q_rope: int = 0
    out: int = 0
    lse: int = 0


UNEVEN = RowSteps()
ANY_BATCH = 128
"""Requests of the batch that stands for any."""
ANY_ROWS = 64
"""Rows that ragged requests of any batch have: those of the largest tile."""
USUAL_PAGE = 64
"""Slots of a page of the cache that a plan, which knows no sizes of pages, is made for."""


class Storage(NamedTuple):
    """How a quantised cache holds keys: latents as e4m3 numbers to be multiplied by scales."""

    rope: torch.dtype | None
    """Of rotary keys in a tensor of their own; None where they stand behind the latents."""
    group: int
    """Columns of a latent that share a scale; 0 where one is for all latents and one for all rotary
    keys."""
    scale: torch.dtype
    """float32, or uint8: the exponent of a power of two."""
    scales_stride_slot: int
    """Scales from one token's to the next one's in a page."""

    @property
    def name(self) -> str:
        """As keys of tuned configs have it."""
        if not self.group:
            return "fp8"
        return f"fp8-{self.group}-{'e8m0' if self.scale == torch.uint8 else 'float32'}"


@dataclass(frozen=True)
class DecodeProblem:
    """Absorbed attention of `queries` query tokens over a paged latent cache."""

    dtype: torch.dtype
    batch: int
    s_q: int | None
    """Query tokens of every request, or None for ragged queries (`cu_seqlens_q`)."""
    queries: int
    """Query tokens of the whole batch."""
    heads: int
    latent: int
    """Width of `q_nope`."""
    rope: int
    """Width of `q_rope`; 0 where there is none."""
    value_dim: int
    """Width of the value: `latent`, or `latent + rope` where the rope part is inside the value."""
    page_size: int
    csr: bool
    """Whether the page table is CSR (`indptr`, `indices`) rather than dense."""
    causal: bool
    fused: bool
    """Whether rotary keys, if any, stand behind the latents in one tensor."""
    ckv_stride_slot: int
    """Elements from one token's latent to the next one's in a page."""
    kpe_stride_slot: int
    """Likewise for rotary keys in a tensor of their own, else 0."""
    aligned: bool = True
    """Whether every address the kernels compute is a multiple of 16 bytes."""
    allow_tf32: bool = False
    row_steps: RowSteps = UNEVEN
    storage: Storage | None = None
    """How the cache is quantised; None where it has the queries' dtype."""
    page_slots: int = 0
    """Token slots from the begin of one page to that of the next, where all pages are one row of
    slots, and the same one for latents, rotary keys and their tokens' scales; else 0."""
    fixed_pieces: int = 0
    """Pieces that the keys of a request are cut into at most where its result must not depend on
    what else is in the batch; 0 where it may."""
    max_kv_len: int = field(default=2**31 - 1, compare=False)
    num_pages: int = field(default=2**31 - 1, compare=False)

    def as_planned(self) -> DecodeProblem:
        """The problem as far as a plan knows it: it is told how keys are stored, and serves any
        cache of that format."""
        is_quantised = self.storage is not None
        return replace(
            self,
            page_size=USUAL_PAGE,
            csr=False,
            causal=False,
            # Where scales are of groups, how parts lie follows from the format.
            fused=self.fused if is_quantised else True,
            ckv_stride_slot=self.ckv_stride_slot if is_quantised else self.key_dim,
            kpe_stride_slot=self.kpe_stride_slot if is_quantised else 0,
            aligned=True,
            allow_tf32=False,
            row_steps=UNEVEN,
            page_slots=USUAL_PAGE,
        )

    def in_any_batch(self) -> DecodeProblem:
        """What tiles and configs may depend on: the problem itself, or, where its result must not
        depend on the batch, one that stands for all batches and page sizes."""
        if not self.fixed_pieces:
            return self
        s_q = self.s_q or -(-ANY_ROWS // self.heads)
        return replace(
            self, batch=ANY_BATCH, queries=ANY_BATCH * s_q, page_size=1, csr=False, page_slots=0
        )

    @property
    def key_dim(self) -> int:
        return self.latent + self.rope

    @property
    def key_tail(self) -> int:
        """Key columns that are not part of the value."""
        return self.key_dim - self.value_dim

    @property
    def rope_in_value(self) -> bool:
        return self.rope > 0 and self.key_tail == 0

    @property
    def ragged(self) -> bool:
        return self.s_q is None

    @property
    def mean_s_q(self) -> int:
        """Query tokens of a request, rounded up to a whole number where they are ragged."""
        if self.s_q is not None:
            return self.s_q
        return -(-self.queries // max(1, self.batch))

    @property
    def rows(self) -> int:
        """(query, head) pairs of an average request: the rows that share its keys."""
        return self.mean_s_q * self.heads


Steps = tuple[int, int, int]
"""Elements from one index to the next, in each of the three dimensions that rows lie in."""
NO_STEPS = (0, 0, 0)
MOST_APART = 8
"""States in tensors of their own that one merge takes: each has an address among the arguments of
a launch."""


@dataclass(frozen=True)
class MergeProblem:
    """Attention states of the same queries over different keys, to be merged into one."""

    first_dtype: torch.dtype
    """Of the first state's `out`."""
    other_dtype: torch.dtype
    """Of that of all others."""
    out_dtype: torch.dtype
    """Of the result's."""
    states: int
    value_dim: int
    masked: bool
    """Whether some rows stay as they are in the first state."""
    rank: int
    """Dimensions that rows, (query token, head) pairs, lie in: 1 where each tensor is one evenly
    spaced line of them, at most 3."""
    aligned: bool
    """Whether every row begins at a multiple of 16 bytes."""
    rows: int


class MergeLayout(NamedTuple):
    """Where the rows of a merge lie: numbers that change no code."""

    middle: int
    """Size of the second of three dimensions that rows lie in."""
    inner: int
    """Size of the third."""
    first_out: Steps
    first_lse: Steps
    other_out: Steps
    """Of all states but the first."""
    other_lse: Steps
    mask: Steps
    out: Steps
    lse: Steps
    next_out: int = 0
    """Elements from one state of a stack to the next."""
    next_lse: int = 0


LARGEST_TILE = 128
"""Query tokens of a tile of prefill at most: sequences that have more are all alike to it."""


@dataclass(frozen=True)
class PrefillProblem:
    """Attention of ragged sequences over their own keys and values, a pair for every KV head.

    Lengths are on the device alone; of them the host knows the sums.
    """

    dtype: torch.dtype
    heads: int
    kv_heads: int
    qk_dim: int
    """Columns of a query and of a key, rotary part included."""
    value_dim: int
    q_nope: int
    """Columns of `q`: all of them, or those before `q_rope`."""
    k_nope: int
    """Columns of `k`: all of them, or those before `k_rope`."""
    causal: bool
    usual_queries: int
    """Query tokens of an average sequence, up to the next power of two; at most `LARGEST_TILE`."""
    batch_invariant: bool = False
    """Whether the result of a sequence must not depend on the others: tiles are then those of long
    sequences."""
    negative_scale: bool = False
    """Whether the largest logit is the smallest product."""
    aligned: bool = True
    """Whether every address the kernels compute is a multiple of 16 bytes."""
    distinct: bool = True
    """Whether every token and head has memory of its own: not so of what `expand` made."""
    batch: int = field(default=1, compare=False)
    queries: int = field(default=LARGEST_TILE, compare=False)
    """Rows of `q`: the query tokens of all sequences at most."""
    keys: int = field(default=LARGEST_TILE, compare=False)
    max_seqlen_q: int | None = field(default=None, compare=False)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads


def usual_queries(queries: int, batch: int) -> int:
    """Query tokens of an average sequence, as coarsely as a choice of tiles needs it."""
    mean = -(-queries // max(1, batch))
    return min(LARGEST_TILE, 1 << max(0, mean - 1).bit_length())
