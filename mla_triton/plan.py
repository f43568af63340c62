"""The split-KV schedule as plain integers: the definition that its device twin computes.

The keys of a request are cut into tiles of `kv_tile` keys; its rows, (query, head) pairs, into
groups of `group_rows`. All groups stand in one line, request after request, and the line is cut
into `parts`. A part is worked on by `lanes` programs side by side, one for each row tile of the
group, so that they share its keys in the L2 cache. A group that falls into several parts is
merged afterwards.

Two ways of cutting, chosen by the lengths alone:

* even: every group is cut into equal pieces, each piece a part of its own. Taken where no piece is
  more than about 15 % above the mean and all pieces fit into the parts there are. An even batch is
  cut evenly, and no part pays for two groups.
* packed: parts of equal cost (tiles, plus a constant for each group begun), wherever that falls. A
  cut close to the end of a group moves to that end.

A third one depends on nothing but a request's own length, so that its sums are added in the same
order whatever else is in the batch (batch-invariant):

* fixed: every group is cut into pieces of `fixed_piece` keys, each piece a part of its own. There
  are as many parts as the longest keys could need, most of them empty where keys are short.

All are closed forms over prefix sums, so that a GPU computes every part and every group on its own
without a serial loop (`mla_triton.kernels.common.schedule`). Nothing here imports torch or Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isqrt
from typing import Protocol

TOLERANCE_PERCENT = 115
"""How far above the mean a piece or a whole request may be before the even cut is given up."""
SPLIT_BALANCE = 32
"""Pieces of t tiles pay for up to SPLIT_BALANCE * t * t tiles: longer requests take longer pieces,
because every piece adds to the merge."""
SPLIT_STEPS = 64
SNAP_LIMIT = 8
MAX_RAGGED_LANES = 64
FIXED_UNIT = 128
"""Keys by which fixed pieces grow: the longest step of any kernel, so that all of a piece's steps
but its last are whole ones, wherever pages end."""
FIXED_LEAST = 8
"""Units of a fixed piece at least: 1024 keys."""
MAX_PARTS = 65535
"""Parts are the second dimension of a launch, which CUDA bounds there."""
ENOUGH_PARTS = 4
"""With fewer parts than this in one wave of programs, several waves balance better than one."""


@dataclass(frozen=True)
class Geometry:
    """The shape of a schedule: how an implementation cuts a problem on a device."""

    kv_tile: int
    """Keys of a tile; cuts fall between tiles."""
    row_tile: int
    """Rows of one program."""
    lanes: int
    """Programs that work on a part side by side."""
    parts: int
    """Programs along the line; 1 where nothing is ever split."""
    overhead: int
    """Cost of beginning a group, in tiles."""
    max_groups: int
    """Upper bound of the number of groups, known without reading lengths."""
    fixed: bool = False
    """Whether a request is cut by its own length alone."""

    @property
    def group_rows(self) -> int:
        return self.lanes * self.row_tile

    @property
    def partial_rows(self) -> int:
        """Rows of the buffer of partial results: each part may leave two groups unfinished."""
        return 2 * self.parts * self.group_rows if self.parts > 1 else 0


class Batch(Protocol):
    """What a geometry depends on of a problem (`mla_triton.problem.DecodeProblem`)."""

    @property
    def batch(self) -> int: ...

    @property
    def queries(self) -> int:
        """Query tokens of the whole batch."""

    @property
    def heads(self) -> int: ...

    @property
    def rows(self) -> int:
        """(query token, head) pairs of an average request."""

    @property
    def ragged(self) -> bool: ...

    @property
    def fixed_pieces(self) -> int:
        """Pieces of a request at most, where these are fixed; else 0."""


def fitted(
    problem: Batch,
    kv_tile: int,
    row_tile: int,
    slots: int,
    overhead: int,
    parts: int | None = None,
) -> Geometry:
    """The geometry that fills `slots` programs, all resident at once; or that has so many parts.

    Raises ValueError where fixed pieces are more than a grid has room for.
    """
    lanes = max(1, cdiv(problem.rows, row_tile))
    max_groups = problem.batch
    if problem.ragged:
        lanes = min(lanes, MAX_RAGGED_LANES)
        max_groups += problem.queries * problem.heads // (lanes * row_tile)
    fixed = problem.fixed_pieces > 0
    if parts is None and fixed:
        parts = max(1, max_groups * problem.fixed_pieces)
        if parts > MAX_PARTS:
            raise ValueError(
                f"max_kv_len must leave at most {MAX_PARTS} pieces where batch_invariant is set, "
                f"got {max_groups} groups of up to {problem.fixed_pieces}"
            )
    elif parts is None:
        parts = slots // lanes
        if parts < ENOUGH_PARTS:
            parts = max(1, ENOUGH_PARTS * slots // lanes)
    return Geometry(kv_tile, row_tile, lanes, parts, overhead, max_groups, fixed)


@dataclass(frozen=True)
class Part:
    """From tile `first_tile` of `first_group` up to, without it, `last_tile` of `last_group`."""

    first_group: int
    first_tile: int
    last_group: int
    last_tile: int


@dataclass(frozen=True)
class Group:
    """A run of a request's rows, and the consecutive parts that hold its tiles."""

    request: int
    index: int
    splits: int
    first_part: int
    """The first of the `splits` parts; 0 for a group in one piece, which nothing has to find."""


@dataclass(frozen=True)
class Schedule:
    parts: tuple[Part, ...]
    groups: tuple[Group, ...]


def cdiv(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def even_up(tiles: int) -> int:
    """Two tiles make a step of the larger kernel block, so pieces above two tiles are even."""
    return tiles if tiles <= 2 else tiles + tiles % 2


def shortest_piece(longest: int) -> int:
    """Tiles that a piece has at least where the longest request has so many tiles."""
    return 1 + sum(SPLIT_BALANCE * t * t < longest for t in range(1, SPLIT_STEPS))


def fixed_piece(tiles: int, kv_tile: int) -> int:
    """Tiles of a fixed piece of a request of so many tiles.

    u units are cut into pieces of sqrt(2 u): 1024 keys of up to 4096, 2048 of 16384, 16384 of a
    million. Pieces of a longer request are longer, for each costs memory for its result.
    """
    units = cdiv(tiles, FIXED_UNIT // kv_tile)
    return max(FIXED_LEAST, isqrt(max(0, 2 * units - 1)) + 1) * (FIXED_UNIT // kv_tile)


def fixed_pieces(max_keys: int) -> int:
    """Pieces at most of a request of up to so many keys; at least 1."""
    units = cdiv(max_keys, FIXED_UNIT)
    if units <= FIXED_LEAST * FIXED_LEAST // 2:
        return max(1, cdiv(units, FIXED_LEAST))
    # The longest of each length of pieces has the most of them: (p * p / 2) / p.
    piece = isqrt(2 * units - 1) + 1
    return cdiv(piece, 2)


def schedule(
    kv_lens: Sequence[int], q_lens: Sequence[int], heads: int, geometry: Geometry
) -> Schedule:
    """Cuts a batch into parts.

    `kv_lens` and `q_lens` are keys and query tokens of each request; negative ones count as 0.
    """
    requests = list(zip(kv_lens, q_lens, strict=True))
    tiles = [cdiv(max(0, keys), geometry.kv_tile) for keys, _ in requests]
    groups = [cdiv(max(0, queries) * heads, geometry.group_rows) for _, queries in requests]
    busy = [b for b, count in enumerate(groups) if count]
    parts, overhead, count = geometry.parts, geometry.overhead, sum(groups)

    work = sum(groups[b] * tiles[b] for b in busy)
    longest = max((tiles[b] for b in busy), default=0)
    floor = shortest_piece(longest)
    target = max(floor, cdiv(work, parts))

    exact_piece = [max(1, cdiv(t, max(1, t // target))) for t in tiles]
    piece = [even_up(p) for p in exact_piece]
    splits = [max(1, cdiv(t, p)) for t, p in zip(tiles, piece, strict=True)]
    limit = max(target + 1, target * TOLERANCE_PERCENT // 100)
    if geometry.fixed:
        piece = [fixed_piece(t, geometry.kv_tile) for t in tiles]
        splits = [max(1, cdiv(t, p)) for t, p in zip(tiles, piece, strict=True)]
    even = geometry.fixed or (
        max((exact_piece[b] for b in busy), default=0) <= limit
        and sum(groups[b] * splits[b] for b in busy) <= parts
    )

    # The line: a group is as long as its pieces (even) or as its cost (packed).
    unit = splits if even else [t + overhead for t in tiles]
    before = list(accumulate((g * u for g, u in zip(groups, unit, strict=True)), initial=0))
    groups_before = list(accumulate(groups, initial=0))
    size = max(cdiv(before[-1], parts), floor + overhead)
    whole = cdiv(count, parts) * max((unit[b] for b in busy), default=0)
    if whole * 100 <= size * TOLERANCE_PERCENT:
        size = max(1, whole)
    if even:
        size = 1

    # A packed cut leaves at least `margin` tiles on either side of it inside a group.
    step = 2 if size > 4 else 1
    margin = max(1, min(SNAP_LIMIT, size // 16))
    lowest = cdiv(margin, step) * step
    highest = [min((t - margin) // step * step + step, t) - 1 for t in tiles]

    def cut(position: int) -> tuple[int, int]:
        if position >= before[-1]:
            return count, 0
        b = sum(end <= position for end in before[1:])
        index, offset = divmod(position - before[b], unit[b])
        group = groups_before[b] + index
        if even:
            return group, offset * piece[b]
        tile = offset - overhead
        if tile < lowest:
            return group, 0
        return (group, tile - tile % step) if tile <= highest[b] else (group + 1, 0)

    def find(b: int, index: int) -> Group:
        start = before[b] + index * unit[b]
        if even:
            return Group(b, index, splits[b], start if splits[b] > 1 else 0)
        first = cdiv(start + overhead + lowest, size)
        cuts = max(0, (start + overhead + highest[b]) // size - first + 1)
        return Group(b, index, 1 + cuts, first - 1 if cuts else 0)

    return Schedule(
        tuple(Part(*cut(p * size), *cut((p + 1) * size)) for p in range(parts)),
        tuple(find(b, index) for b in busy for index in range(groups[b])),
    )
