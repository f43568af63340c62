"""How the Hopper decode kernel is configured: validity with reasons, geometry, and the heuristic.

Nothing here imports Triton, so that it can be asked where Gluon cannot be imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mla_triton.device import Device
from mla_triton.kernels.common.tuning_key import Items, tuning_key
from mla_triton.plan import Geometry, cdiv, fitted
from mla_triton.problem import DecodeProblem

OP = "decode"
NAME = "sm90"
ROW_TILE = 64
"""What one warpgroup multiplies at once."""
BLOCK = 64
"""Keys of a block, and of a schedule tile. Two warpgroups that score e4m3 keys together have twice
as many in both."""
OVERHEAD = 5
"""Cost of beginning a group (its queries, its first load, its result), in blocks."""
QUANTISED_ROW_TILES = (16, 32, 64)
"""The same over a cache of e4m3 numbers, where the keys are a product's rows."""
QUANTISED_ROWS = 32
"""Of such a tile, where there are not `MANY_TILES`."""
PAIRED_ROWS = {False: QUANTISED_ROWS, True: 16}
"""Of a program at most, without scales of groups and with, of which an SM has place for two."""
FEW_TILES = 8
"""Tiles of rows in a batch up to which an SM has one program all the same: they leave most of it
idle, and one of two warpgroups is done sooner. 15.0 us against 18.4 for a request of 16384 keys and
16 heads on an H200, 32.6 against 35.8 for eight of them."""
MANY_TILES = 32
"""Tiles of 64 rows in a batch from which on they are used. They make more of the SM, and longer
ends: 562 us against 682 at 128 requests of 16384 keys and 64 heads on an H200, 44 against 39 at
four of 4096 and 128."""
GROUP = 128
"""Columns of a latent with a scale, where all do not share one."""
FEW_ROWS = 16
MANY_REQUESTS = 16
"""From here on a batch has more work than waiting, and two blocks at a time pay: 237 us against 267
at 128 requests of 4096 keys and 128 heads on an H200, 20 us against 17 at one of 1024."""
WIDTHS = ((512, 64), (512, 0), (256, 64))
"""(value, key columns behind it) that the kernel is written for."""
PAGES = (16, 32)
"""Page sizes below a block that a block can be put together from."""


@dataclass(frozen=True)
class Config:
    """Which of the two forms."""

    blocks: int
    """Key blocks that the two warpgroups have in hand: 1, whose softmax one of them does for both,
    or 2, one each."""


def why_not(problem: DecodeProblem, device: Device) -> str | None:
    """The reason this implementation cannot take a problem, or None."""
    if device.capability != (9, 0):
        return f"it is written for capability 9.0, this card has {device.label}"
    if problem.dtype not in (torch.float16, torch.bfloat16) or not problem.aligned:
        return "it reads aligned float16 or bfloat16"
    if (problem.value_dim, problem.key_tail) not in WIDTHS:
        widths = ", ".join(f"{value}+{tail}" for value, tail in WIDTHS)
        return f"it is written for {widths}, got {problem.value_dim}+{problem.key_tail}"
    if problem.rope_in_value:
        return "its queries come in one tensor where no key column is behind the value"
    if problem.storage is not None and problem.storage.group and not is_grouped(problem):
        return (
            "of quantised caches it reads those with one scale for all latents, or bfloat16 rotary "
            f"keys and a float32 scale for each {GROUP} of 512 columns"
        )
    if problem.storage is not None and problem.value_dim != WIDTHS[0][0]:
        return f"of e4m3 keys it reads latents of {WIDTHS[0][0]} columns, got {problem.value_dim}"
    if problem.storage is not None and gathers(problem):
        return "e4m3 keys come by TMA, from evenly spaced pages of 16, 32 or a multiple of 64"
    return None


def is_grouped(problem: DecodeProblem) -> bool:
    """Whether a cache has scales of groups as the kernel reads them: a TMA box of them is 16 bytes
    a key."""
    storage = problem.storage
    return (
        storage is not None
        and (storage.group, storage.scale) == (GROUP, torch.float32)
        and storage.scales_stride_slot % 4 == 0
        and (problem.dtype, storage.rope) == (torch.bfloat16, torch.bfloat16)
        and (problem.value_dim, problem.key_tail) == WIDTHS[0]
    )


def gathers(problem: DecodeProblem) -> bool:
    """Whether keys are copied row by row: a TMA box is 16, 32 or 64 keys of one page, and its
    descriptor needs all pages of the cache to be one evenly spaced row of slots."""
    is_box = problem.page_size % BLOCK == 0 or problem.page_size in PAGES
    return not is_box or not problem.page_slots


def why_slower(problem: DecodeProblem, device: Device) -> str | None:
    """The reason to prefer the next implementation for a problem that this one can take, or None.

    Looks at nothing that a plan does not know (page size, strides, lengths), so that a plan is cut
    as the calls that make their own schedule are.
    """
    if problem.in_any_batch().rows <= FEW_ROWS and problem.storage is None:
        return (
            f"portable is faster for up to {FEW_ROWS} rows: "
            "it is bound by memory alone, and its programs are shorter"
        )
    return None


def why_not_cut(problem: DecodeProblem, like: Geometry) -> str | None:
    """The reason this implementation cannot follow a plan of that geometry, or None."""
    if problem.storage is not None:
        return None
    if (like.kv_tile, like.row_tile) != (BLOCK, ROW_TILE):
        tiles = f"{like.kv_tile} keys x {like.row_tile} rows"
        return f"its tiles are {BLOCK} keys x {ROW_TILE} rows, those of the plan {tiles}"
    return None


def is_valid(
    config: Config, problem: DecodeProblem, device: Device, rows: int | None = None
) -> tuple[bool, str]:
    """Whether a config can be compiled and launched, with the rule that decides it."""
    reason = why_not(problem, device)
    if reason is not None:
        return False, reason
    if rows is not None and rows not in row_tiles(problem):
        tiles = " or ".join(map(str, row_tiles(problem)))
        return False, f"its tile has {tiles} rows, got {rows}"
    if config.blocks not in (1, 2):
        return False, f"blocks must be 1 or 2, got {config.blocks}"
    if config.blocks == 2 and problem.storage is not None:
        return False, "of e4m3 keys all warps have one block in hand, blocks = 1"
    if config.blocks == 2 and (gathers(problem) or problem.page_size < BLOCK // 2):
        size = f"pages of {problem.page_size}"
        return False, f"two blocks come by TMA, from at most four pages, got {size}"
    count = programs(problem, row_tile(problem, device) if rows is None else rows)
    return True, f"{('one program', 'two programs')[count - 1]} an SM"


def choose(problem: DecodeProblem, device: Device, rows: int | None = None) -> tuple[Config, str]:
    """The heuristic's config and its reason; ValueError where the problem cannot be taken."""
    two = Config(2)
    many = problem.rows > ROW_TILE and problem.batch >= MANY_REQUESTS
    # Two blocks do not go with every page size.
    if many and not problem.fixed_pieces and is_valid(two, problem, device, rows)[0]:
        return two, "many rows: the matrix units are kept busy by two blocks at a time"
    one = Config(1)
    valid, rule = is_valid(one, problem, device, rows)
    if not valid:
        raise ValueError(f"problem must be one that {NAME} takes, got {problem}: {rule}")
    if problem.storage is not None:
        is_apart = (row_tile(problem, device) if rows is None else rows) == ROW_TILE
        work = "makes weights while others make the output" if is_apart else "take a block together"
        who = "one warpgroup" if is_apart else "all warps"
        return one, f"e4m3 keys: {rule}, {who} of which {work}"
    return one, "few rows: memory is waited for, and one block at a time has the shorter ends"


def heuristic(problem: DecodeProblem, device: Device, rows: int | None = None) -> Config:
    """The config without a tuned row."""
    return choose(problem, device, rows)[0]


def row_tiles(problem: DecodeProblem) -> tuple[int, ...]:
    """Rows of a schedule tile that the kernel can have."""
    return (ROW_TILE,) if problem.storage is None else QUANTISED_ROW_TILES


def programs(problem: DecodeProblem, rows: int) -> int:
    """Programs with a tile of so many rows that an SM has at a time.

    Two of one warpgroup each have twice the programs to cut a batch for, and one of them has
    products under way while the other makes operands. What they need is place for two of all, and
    work for both.
    """
    storage = problem.storage
    if storage is None or rows > PAIRED_ROWS[storage.group > 0]:
        return 1
    few = problem.batch * cdiv(problem.rows, rows) <= FEW_TILES
    return 1 if few and not problem.fixed_pieces else 2


def kv_tile(problem: DecodeProblem, rows: int) -> int:
    """Keys of a schedule tile, as of a block: twice as many where two warpgroups score them."""
    is_one = problem.storage is None or rows == ROW_TILE or programs(problem, rows) == 2
    return BLOCK if is_one else 2 * BLOCK


def row_tile(problem: DecodeProblem, device: Device) -> int:
    """Rows of a program, where no plan says otherwise."""
    if problem.storage is None:
        return ROW_TILE
    rows = problem.in_any_batch().rows
    if rows <= FEW_ROWS:
        return FEW_ROWS
    many = problem.batch * cdiv(problem.rows, ROW_TILE) >= MANY_TILES and not problem.fixed_pieces
    return ROW_TILE if rows > QUANTISED_ROWS and many else QUANTISED_ROWS


def geometry(
    problem: DecodeProblem,
    device: Device,
    parts: int | None = None,
    like: Geometry | None = None,
) -> Geometry:
    """How the schedule cuts a problem; with `parts` of them, or as many as the plan `like` has."""
    if like is not None and why_not_cut(problem, like) is None:
        return fitted(problem, like.kv_tile, like.row_tile, 0, like.overhead, like.parts)
    parts = parts if like is None else like.parts
    rows = row_tile(problem, device)
    slots, keys = device.sm_count * programs(problem, rows), kv_tile(problem, rows)
    return fitted(problem, keys, rows, slots, cdiv(OVERHEAD * BLOCK, keys), parts)


def tuning_point(
    problem: DecodeProblem, device: Device, rows: int | None = None
) -> tuple[Items, int, int] | None:
    """(key, batch, length) that a problem is looked up by; None where a tuned row, which is of one
    batch, must not decide."""
    if problem.fixed_pieces:
        return None
    rows = row_tile(problem, device) if rows is None else rows
    return tuning_key(problem, rows), max(1, problem.batch), problem.max_kv_len


def search_space(problem: DecodeProblem, device: Device) -> Iterator[Config]:
    """Every config worth timing."""
    yield Config(1)
    yield Config(2)
