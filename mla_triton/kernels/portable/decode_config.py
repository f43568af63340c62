"""How the portable decode kernel is configured on a card: validity with reasons, and the heuristic.

Two kinds of choice. `Geometry` (row tile, lanes, parts) shapes the schedule; it follows from the
problem and the card alone, so that a plan can be shared by layers and survives tuning. `Config`
(keys a step, warps, stages) changes speed alone. Nothing here imports Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from mla_triton.device import KIB, Device
from mla_triton.kernels.common.tuning_key import Items, tuning_key
from mla_triton.plan import Geometry, cdiv, fitted
from mla_triton.problem import DecodeProblem

OP = "decode"
NAME = "portable"
KV_TILE = 32
"""Keys of a schedule tile. Any `block_n` works with it: what a piece has before and behind its
whole blocks is taken in steps of as many keys."""
KV_TILES = (32, 64, 128)
"""Tiles of plans that were made for another implementation, and serve this one, too."""
ROW_TILES = (16, 32, 64)
OVERHEAD = 4
"""Cost of beginning a group (its queries, its first load, its result), in tiles."""
MAX_BLOCK_N, MAX_STAGES = 256, 6
WARPS = (1, 2, 4, 8)
SCRATCH = KIB
"""Shared memory of reductions, page ids and changes of layout."""
SM_RESERVED = KIB
"""Shared memory that the driver keeps of every program."""


@dataclass(frozen=True)
class Config:
    """What may be tuned without moving a split boundary."""

    block_n: int
    """Keys of a step."""
    num_warps: int
    num_stages: int


def key_tile_bytes(problem: DecodeProblem, block_n: int) -> int:
    return block_n * problem.key_dim * problem.dtype.itemsize


def stored_tile_bytes(problem: DecodeProblem, block_n: int) -> int:
    """Of keys as a quantised cache has them, scales included."""
    storage = problem.storage
    assert storage is not None
    if not storage.group:
        return block_n * problem.key_dim
    # A tile of latents is as wide as the value, even where the last columns lie elsewhere.
    groups = problem.value_dim // storage.group
    rope = problem.rope * problem.dtype.itemsize if not problem.fused else 0
    return block_n * (problem.value_dim + groups * storage.scale.itemsize + rope)


def rope_is_apart_inside(problem: DecodeProblem) -> bool:
    """Whether the value holds rotary keys that lie in a tensor of their own."""
    return problem.rope_in_value and not problem.fused


def is_ordered(problem: DecodeProblem, rows: int, device: Device) -> bool:
    """Whether columns are multiplied in an order in which e4m3 is read from shared memory in wide
    pieces: where the matrix instructions take operands from registers (mma.sync)."""
    if problem.storage is None or device.backend == "hip":
        return False
    return rows < 64 or not (device.has_wgmma or device.has_tcgen05)


def shared_memory(config: Config, problem: DecodeProblem, device: Device, row_tile: int) -> int:
    """Bytes of shared memory a program takes, as Triton 3.6 lays it out: an upper estimate.

    `tests/test_compile.py` holds it against the machine code of every heuristic config.
    """
    item = problem.dtype.itemsize
    if problem.storage is not None:
        return quantised_shared_memory(config, problem, device, row_tile)
    tile = key_tile_bytes(problem, config.block_n)
    queries = row_tile * problem.key_dim * item
    probabilities = row_tile * config.block_n * item
    in_flight = max(1, config.num_stages - 1)
    if not problem.aligned and device.backend == "cuda" and item == 2:
        # Too narrow for an asynchronous copy: through registers, and a copy to change their layout.
        in_flight += 1
    if device.backend == "hip":
        return tile * in_flight + probabilities + SCRATCH
    values = config.block_n * problem.value_dim * item
    if problem.dtype == torch.float32:
        # The matrix instructions cannot read 32-bit K and V from one layout.
        copy = values if problem.allow_tf32 and device.has_tf32 else 0
        return tile * in_flight + copy + queries + probabilities + SCRATCH
    if row_tile < 64:
        return tile * in_flight + queries + probabilities + SCRATCH
    if device.has_tcgen05:
        return (tile + values) * (in_flight + 1) + queries + 2 * SCRATCH
    if device.has_wgmma:
        return tile * (in_flight + 1) + queries + SCRATCH
    return tile * in_flight + queries + probabilities + SCRATCH


def quantised_shared_memory(
    config: Config, problem: DecodeProblem, device: Device, row_tile: int
) -> int:
    """The same over a quantised cache: what is in flight, and, where operands are not made in
    registers, the tile as it is multiplied."""
    item = problem.dtype.itemsize
    stored = stored_tile_bytes(problem, config.block_n)
    queries = row_tile * (problem.key_dim + problem.value_dim - problem.latent) * item
    probabilities = row_tile * config.block_n * item
    whole = key_tile_bytes(problem, config.block_n)
    if device.backend == "hip":
        # In flight in registers. Queries pass through before the first keys come.
        return max(whole, queries) + probabilities + SCRATCH
    in_flight = max(1, config.num_stages - 1)
    if not problem.aligned:
        # Too narrow for an asynchronous copy: through registers, and a copy for either product.
        in_flight += 1
    if is_ordered(problem, row_tile, device):
        return stored * in_flight + queries + probabilities + SCRATCH
    if device.has_tcgen05:
        # Keys and values in layouts of their own.
        whole *= 2
    return stored * in_flight + whole + queries + probabilities + SCRATCH


def why_not(problem: DecodeProblem, device: Device) -> str | None:
    """The reason this implementation cannot take a problem, or None."""
    if not device.runs_triton:
        return "the tensors are on the CPU and Triton's interpreter is off (TRITON_INTERPRET=1)"
    if device.capability is not None and device.capability < (8, 0):
        return f"it needs capability 8.0 or later, this card has {device.label}"
    if not 16 <= problem.value_dim <= 512 or problem.value_dim & (problem.value_dim - 1):
        return f"value_dim must be a power of two in [16, 512], got {problem.value_dim}"
    storage = problem.storage
    if storage is not None and storage.group & (storage.group - 1):
        return f"a scale must be of a power of two columns, got {storage.group}"
    tail = problem.rope if rope_is_apart_inside(problem) else problem.key_tail
    if tail and (not 16 <= tail <= 128 or tail & (tail - 1)):
        return f"the rotary key must have 0, 16, 32, 64 or 128 columns, got {tail}"
    return None


def is_valid(
    config: Config, problem: DecodeProblem, device: Device, rows: int | None = None
) -> tuple[bool, str]:
    """Whether a config can be compiled and launched, with the rule that decides it.

    `rows` is the row tile, by default that of the problem.
    """
    if not 16 <= config.block_n <= MAX_BLOCK_N or config.block_n & (config.block_n - 1):
        rule = f"block_n must be a power of two in [16, {MAX_BLOCK_N}]"
        return False, f"{rule}, got {config.block_n}"
    if config.num_warps not in WARPS:
        return False, f"num_warps must be one of {WARPS}, got {config.num_warps}"
    if not 1 <= config.num_stages <= MAX_STAGES:
        return False, f"num_stages must be in [1, {MAX_STAGES}], got {config.num_stages}"
    rows = row_tile(problem, device) if rows is None else rows
    needed = shared_memory(config, problem, device, rows)
    if needed > device.shared_memory:
        return (
            False,
            f"needs {needed} bytes of shared memory, {device.label} has {device.shared_memory}",
        )
    return True, f"takes {needed} of {device.shared_memory} bytes of shared memory"


def row_tile(problem: DecodeProblem, device: Device) -> int:
    """Rows of a program: as many as registers and shared memory hold, so that keys are read once.

    float32 multiplies without tensor cores below tf32, and 16 rows fill the registers.
    """
    problem = problem.as_planned().in_any_batch()
    if problem.dtype == torch.float32 or device.backend == "interpreter":
        return 16
    if problem.rows <= 16 or is_alone(problem):
        return 16
    # AMD: 64 rows spill inside the key loop. 99 KiB cards: 64 rows of a 512-wide latent do not fit.
    if problem.rows <= 32 or device.backend == "hip":
        return 32
    if problem.storage is not None and not problem.storage.group and device.has_wgmma:
        # Queries that were computed, not loaded, stay in registers beside wgmma, and 64 rows spill.
        return 32
    return 64 if fits(64, problem, device) else 32


def fits(rows: int, problem: DecodeProblem, device: Device) -> bool:
    """Whether there is a config for a row tile."""
    if rows not in ROW_TILES or (problem.dtype == torch.float32 and rows > 16):
        return False
    return any(is_valid(c, problem, device, rows)[0] for c, _ in candidates(problem, device, rows))


def is_alone(problem: DecodeProblem) -> bool:
    """Whether there are so few keys that reading them again costs less than long programs do.

    One request of 128 heads over 1024 keys takes 13 us in tiles of 16 rows and 16 us in tiles of 64
    on an H200; over 16384 keys, 41 and 37 us.
    """
    return problem.batch * cdiv(problem.rows, 64) <= 2


def precision(problem: DecodeProblem, device: Device) -> str:
    """Triton's name for the products of a problem: tf32 where allowed, there, and with room."""
    if not (problem.allow_tf32 and device.has_tf32):
        return "ieee"
    config, _ = candidates(problem, device, 16)[0]
    return "tf32" if is_valid(config, problem, device, 16)[0] else "ieee"


def candidates(problem: DecodeProblem, device: Device, rows: int) -> list[tuple[Config, str]]:
    """Configs for a row tile, best first, with the reason for each."""
    problem = problem.in_any_batch()
    if device.backend == "interpreter":
        return [(Config(64, 4, 1), "the interpreter has neither warps nor stages")]
    if problem.dtype == torch.float32:
        warps = 4 if device.backend == "hip" else 8
        return [(Config(16, warps, 2), "float32 by FMA: more keys or fewer warps spill")]
    if device.backend == "hip":
        return [
            (Config(32, 4, 2), "one tile in LDS, the next in registers"),
            (Config(16, 4, 2), "half the keys where LDS is short"),
        ]
    if not problem.aligned:
        return [
            (Config(32, 8, 2), "misaligned rows pass through registers: 8 warps have more of them"),
            (Config(16, 8, 2), "half the keys where shared memory is short"),
        ]
    if problem.storage is not None:
        return quantised_candidates(problem, device, rows)
    # The keys of a block come from several pages: each key has an address of its own to keep.
    scattered = problem.page_size % 64 != 0
    if rows == 64:
        if device.has_tcgen05:
            return [(Config(32, 8, 2), "tcgen05 keeps a second copy of the keys: 32 a step fit")]
        if device.has_wgmma:
            return [(Config(64, 8, 2), "wgmma: one program an SM, its next tile in flight")]
        return [(Config(32, 8, 3), "mma.sync: one program an SM, two small tiles in flight")]
    if rows == 32:
        if device.shared_memory < 227 * KIB:
            return [(Config(32, 8, 2), "8 warps keep 32 rows in registers without a spill")]
        if scattered:
            return [(Config(32, 4, 2), "two programs an SM; 64 addresses a program would spill")]
        if 2 * problem.batch < device.sm_count:
            return [(Config(64, 4, 3), "two tiles in flight: one program an SM, half the merge")]
        return [(Config(64, 4, 2), "112 KiB at 512+64: two programs an SM hide each other's loads")]
    if device.shared_memory >= 227 * KIB:
        if problem.rows > 16:
            return [(Config(64, 4, 2), "tiles of one request side by side: two programs an SM")]
        return [(Config(64, 4, 3), "two tiles in flight in one program, one being computed")]
    if device.shared_memory >= 163 * KIB:
        return [(Config(32, 4, 2), "55 KiB at 512+64: two programs an SM hide each other's loads")]
    return [
        (Config(32, 4, 3), "one program an SM at 99 KiB: two tiles in flight"),
        (Config(32, 4, 2), "one tile in flight where shared memory is short"),
    ]


def quantised_candidates(
    problem: DecodeProblem, device: Device, rows: int
) -> list[tuple[Config, str]]:
    """The same over a quantised cache: a program converts as long as it multiplies, and two of them
    on an SM take turns. 128 requests, 16 heads, H200: 502 us with two, 656 with one."""
    assert problem.storage is not None
    has_groups = problem.storage.group > 0
    if rows == 64:
        if device.has_tcgen05 and has_groups:
            return [(Config(16, 8, 2), "tcgen05: 32 keys and their scales spill")]
        if device.has_wgmma:
            return [(Config(64, 8, 2), "wgmma: one program an SM, its next tile in flight")]
        return [(Config(32, 8, 2), "8 warps keep 64 rows in registers")]
    short = (Config(32, 8, 2), "one tile in flight where shared memory is short")
    if rows == 32:
        return [
            (Config(32, 8, 3), "8 warps keep 32 rows and what they convert in registers"),
            short,
        ]
    if has_groups and device.shared_memory >= 163 * KIB:
        return [(Config(32, 4, 3), "61 KiB at 512+64: two programs an SM convert in turns"), short]
    if has_groups:
        return [(Config(32, 4, 2), "41 KiB at 512+64: two programs an SM convert in turns"), short]
    if device.shared_memory >= 227 * KIB:
        return [(Config(64, 4, 3), "93 KiB at 512+64: two programs an SM convert in turns"), short]
    if device.shared_memory >= 163 * KIB:
        return [(Config(64, 4, 2), "57 KiB at 512+64: two programs an SM convert in turns"), short]
    return [(Config(64, 4, 3), "one program an SM at 99 KiB: two tiles in flight"), short]


def choose(problem: DecodeProblem, device: Device, rows: int | None = None) -> tuple[Config, str]:
    """The first candidate that is valid, with its reason; ValueError if none is.

    `rows` is the row tile, by default that of the problem.
    """
    rows = row_tile(problem, device) if rows is None else rows
    if problem.allow_tf32 and precision(problem, device) == "ieee":
        problem = replace(problem, allow_tf32=False)
    refused = []
    for config, reason in candidates(problem, device, rows):
        valid, rule = is_valid(config, problem, device, rows)
        if valid:
            return config, f"{reason}; {rule}"
        refused.append(f"{config}: {rule}")
    raise ValueError(f"problem must fit a config on {device.label}, got {problem}: {refused}")


def heuristic(problem: DecodeProblem, device: Device, rows: int | None = None) -> Config:
    """The config without a tuned row: by capability, never timed."""
    return choose(problem, device, rows)[0]


def programs_per_sm(problem: DecodeProblem, device: Device) -> int:
    """Programs that are resident on an SM together, as far as the schedule counts on it."""
    problem = problem.as_planned()
    config = heuristic(problem, device)
    # A request of one row tile has so little work, alone, that a second program only lengthens the
    # merge. More than four warps with all their registers leave no room for a second program.
    alone = problem.batch == 1 and problem.rows <= 16
    if alone or config.num_warps > 4 or device.backend != "cuda":
        return 1
    needed = shared_memory(config, problem, device, row_tile(problem, device)) + SM_RESERVED
    return 2 if 2 * needed <= device.shared_memory + SM_RESERVED else 1


def geometry(
    problem: DecodeProblem,
    device: Device,
    parts: int | None = None,
    like: Geometry | None = None,
) -> Geometry:
    """How the schedule cuts a problem on a card; `parts` overrides the number of parts.

    With `like`, a plan's geometry, the problem is cut as that was, if there is a config for it.
    """
    if like is not None and like.kv_tile in KV_TILES and fits(like.row_tile, problem, device):
        return fitted(problem, like.kv_tile, like.row_tile, 0, like.overhead, like.parts)
    parts = parts if like is None else like.parts
    slots = device.sm_count * programs_per_sm(problem, device)
    return fitted(problem, KV_TILE, row_tile(problem, device), slots, OVERHEAD, parts)


# -- tuning


def tuning_point(
    problem: DecodeProblem, device: Device, rows: int | None = None
) -> tuple[Items, int, int] | None:
    """(key, batch, length) that a problem is looked up by; None where only the heuristic serves.

    float32, misaligned rows and Triton's interpreter have one config each; a tuned row would be one
    batch's, and of two tables.
    """
    is_gpu = device.backend in ("cuda", "hip")
    if not is_gpu or problem.dtype == torch.float32 or not problem.aligned or problem.fixed_pieces:
        return None
    rows = row_tile(problem, device) if rows is None else rows
    return tuning_key(problem, rows), max(1, problem.batch), problem.max_kv_len


def search_space(problem: DecodeProblem, device: Device) -> Iterator[Config]:
    """Every config worth timing, valid or not; which are is for `is_valid` to say.

    Left out is what was far behind on every shape that was tried: one stage, 16 keys for 8 warps,
    and, where keys are converted, 128 keys for 4 warps.
    """
    common = (
        (32, 4, (2, 3, 4, 5)),
        (32, 8, (2, 3, 4)),
        (64, 4, (2, 3, 4)),
        (64, 8, (2, 3, 4)),
    )
    space: tuple[tuple[int, int, tuple[int, ...]], ...]
    if problem.storage is None:
        space = ((16, 4, (3, 4)), *common, (128, 4, (2,)), (128, 8, (2,)))
    else:
        space = (*common, (128, 8, (2, 3)))
    for block_n, num_warps, stages in space:
        for num_stages in stages:
            yield Config(block_n, num_warps, num_stages)
