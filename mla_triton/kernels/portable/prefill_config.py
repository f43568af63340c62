"""How the portable prefill kernel is configured on a card: validity with reasons, the heuristic.

There is no schedule: a program has a tile of one sequence's queries and all of their keys. So the
whole of the cutting is a `Config`. Nothing here imports Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mla_triton.device import KIB, Device
from mla_triton.kernels.common.tuning_key import SHORT_SEQUENCE, Items, prefill_key
from mla_triton.plan import cdiv
from mla_triton.problem import PrefillProblem

OP = "prefill"
NAME = "portable"
TILES = (16, 32, 64, 128, 256)
WARPS = (1, 2, 4, 8)
MAX_STAGES = 6
LEAST_WIDTH, MOST_QK, MOST_VALUE = 16, 256, 256
SCRATCH = 2 * KIB
"""Shared memory of reductions, barriers and the search for a program's sequence."""
L2_BYTES = 32 << 20
"""Keys and values that programs running side by side may share through an L2 cache of 40 MB or
more."""


@dataclass(frozen=True)
class Config:
    """What may be tuned."""

    block_m: int
    """Query tokens of a program."""
    block_n: int
    """Keys of a step."""
    num_warps: int
    num_stages: int


def parts_of(width: int) -> tuple[int, int]:
    """(power of two, rest) columns that a query or key is loaded and multiplied in."""
    first = 1 << (width.bit_length() - 1)
    return first, width - first


def shared_memory(config: Config, problem: PrefillProblem, device: Device) -> int:
    """Bytes of shared memory a program takes, as Triton 3.6 lays it out: an upper estimate.

    `tests/test_compile_prefill.py` holds it against the machine code of every heuristic config.
    """
    item = problem.dtype.itemsize
    tiles = config.block_n * (problem.qk_dim + problem.value_dim) * item
    queries = config.block_m * problem.qk_dim * item
    probabilities = config.block_m * config.block_n * item
    in_flight = max(1, config.num_stages - 1)
    if device.backend == "hip":
        # Queries pass through, a part at a time, before the first keys come.
        passing = config.block_m * parts_of(problem.qk_dim)[0] * item
        return max(passing, tiles * in_flight + probabilities) + SCRATCH
    is_half = problem.dtype != torch.float32
    if is_half and config.block_m >= 64 and (device.has_wgmma or device.has_tcgen05):
        return tiles * config.num_stages + queries + SCRATCH
    # Warps stand below each other where the tile is as high as it is wide. Else those of the first
    # product hold other rows than those of the second.
    if is_half and config.block_m >= max(problem.value_dim, config.block_n):
        probabilities = 0
    return tiles * in_flight + queries + probabilities + SCRATCH


def why_not(problem: PrefillProblem, device: Device) -> str | None:
    """The reason this implementation cannot take a problem, or None."""
    if not device.runs_triton:
        return "the tensors are on the CPU and Triton's interpreter is off (TRITON_INTERPRET=1)"
    if device.capability is not None and device.capability < (8, 0):
        return f"it needs capability 8.0 or later, this card has {device.label}"
    value = problem.value_dim
    if not LEAST_WIDTH <= value <= MOST_VALUE or value & (value - 1):
        return f"v must have 16, 32, 64, 128 or 256 columns, got {value}"
    width = problem.qk_dim
    is_in_range = LEAST_WIDTH <= width <= MOST_QK
    rest = parts_of(width)[1] if is_in_range else 0
    if not is_in_range or rest & (rest - 1) or 0 < rest < LEAST_WIDTH:
        rule = "queries and keys must have a power of two columns, or the sum of two of them"
        return f"{rule}, from 16 to 256, got {width}"
    return None


def is_valid(
    config: Config, problem: PrefillProblem, device: Device, row_tile: int | None = None
) -> tuple[bool, str]:
    """Whether a config can be compiled and launched, with the rule that decides it.

    `row_tile` is a plan's, and prefill has no plan.
    """
    for name, tile in (("block_m", config.block_m), ("block_n", config.block_n)):
        if tile not in TILES:
            return False, f"{name} must be one of {TILES}, got {tile}"
    if config.num_warps not in WARPS:
        return False, f"num_warps must be one of {WARPS}, got {config.num_warps}"
    if not 1 <= config.num_stages <= MAX_STAGES:
        return False, f"num_stages must be in [1, {MAX_STAGES}], got {config.num_stages}"
    needed = shared_memory(config, problem, device)
    if needed > device.shared_memory:
        return (
            False,
            f"needs {needed} bytes of shared memory, {device.label} has {device.shared_memory}",
        )
    return True, f"takes {needed} of {device.shared_memory} bytes of shared memory"


def candidates(problem: PrefillProblem, device: Device) -> list[tuple[Config, str]]:
    """Configs of a problem, best first, with the reason for each."""
    if device.backend == "interpreter":
        return [(Config(32, 32, 4, 1), "the interpreter has neither warps nor stages")]
    is_hip = device.backend == "hip"
    is_wide = problem.value_dim > 128 or problem.qk_dim > 192
    if problem.dtype == torch.float32:
        if is_hip:
            return [
                (Config(32, 16, 4, 2), "float32: keys and values of 16 tokens in LDS"),
                (Config(16, 16, 4, 2), "half the queries where LDS is short"),
            ]
        return [(Config(32, 16, 8, 2), "float32 by FMA: 8 warps hold the operands")]
    if not problem.aligned:
        rule = "misaligned rows pass through registers: small steps leave room for them"
        return [(Config(64 if is_wide or is_hip else 128, 32, 8, 2), rule)]
    is_short = problem.usual_queries <= SHORT_SEQUENCE
    if is_hip:
        small = (Config(64, 32, 4, 2), "a wave for every 16 queries, 32 keys in LDS")
        if is_short:
            return [small]
        if is_wide:
            return [(Config(128, 32, 4, 2), "a wave for every 32 queries: more waves spill"), small]
        return [(Config(128, 64, 8, 2), "a wave for every 16 queries, 64 keys in LDS"), small]
    if device.has_wgmma:
        if is_short:
            return [(Config(64, 64, 8 if is_wide else 4, 2), "sequences of few queries")]
        if is_wide:
            return [(Config(128, 64, 8, 2), "wgmma: a warpgroup for every 64 queries")]
        return [(Config(128, 128, 8, 2), "wgmma: a warpgroup for every 64 queries, wide steps")]
    if device.has_tcgen05:
        rows, reason = 64 if is_short else 128, "tcgen05: scores of 64 keys a step do not spill"
        return [
            (Config(rows, 64, 8, 3), f"{reason}; two steps in flight"),
            (Config(rows, 64, 8, 2), f"{reason}; one step in flight"),
        ]
    if is_wide:
        return [
            (Config(64, 32, 8, 3), "mma.sync: 8 warps hold 64 rows of 256 columns, fewer spill"),
            (Config(64, 32, 8, 2), "mma.sync: the same with one step of keys in flight"),
        ]
    if is_short:
        return [(Config(64, 32, 4, 3), "sequences of few queries: two steps of keys in flight")]
    return [
        (Config(128, 64, 8, 3), "mma.sync: 16 queries a warp, two steps of keys in flight"),
        (Config(128, 64, 8, 2), "mma.sync: 16 queries a warp, one step of keys in flight"),
    ]


def choose(
    problem: PrefillProblem, device: Device, row_tile: int | None = None
) -> tuple[Config, str]:
    """The first candidate that is valid, with its reason; ValueError if none is."""
    refused = []
    for config, reason in candidates(problem, device):
        valid, rule = is_valid(config, problem, device)
        if valid:
            return config, f"{reason}; {rule}"
        refused.append(f"{config}: {rule}")
    raise ValueError(f"problem must fit a config on {device.label}, got {problem}: {refused}")


def heuristic(problem: PrefillProblem, device: Device) -> Config:
    """The config without a tuned row: by capability, never timed."""
    return choose(problem, device)[0]


def tuning_point(
    problem: PrefillProblem, device: Device, row_tile: int | None = None
) -> tuple[Items, int, int] | None:
    """(key, sequences, mean keys of one) that a problem is looked up by; None where only the
    heuristic serves: float32, misaligned rows and Triton's interpreter have one config each, and a
    tuned row would be one batch's."""
    is_gpu = device.backend in ("cuda", "hip")
    is_one = problem.dtype == torch.float32 or not problem.aligned or problem.batch_invariant
    if not is_gpu or is_one:
        return None
    batch = max(1, problem.batch)
    return prefill_key(problem), batch, cdiv(problem.keys, batch)


def search_space(problem: PrefillProblem, device: Device) -> Iterator[Config]:
    """Every config worth timing, valid or not; which are is for `is_valid` to say.

    Fewer than 64 queries leave most of a tensor core's tile empty, more than 128 do not fit into
    registers beside the accumulator; with 16 keys a step there is more softmax than product.
    """
    for block_m in (64, 128):
        for block_n in (32, 64, 128):
            for num_warps in (4, 8):
                for num_stages in (2, 3, 4):
                    yield Config(block_m, block_n, num_warps, num_stages)


def tile_slots(problem: PrefillProblem, config: Config) -> int:
    """Query tiles that the sequences of a batch can have at most, whatever their lengths.

    Every sequence may end inside a tile; none has more tiles than the longest. At least one, so
    that there is something to launch.
    """
    slots = problem.queries // config.block_m + problem.batch
    if problem.max_seqlen_q is not None:
        slots = min(slots, problem.batch * cdiv(problem.max_seqlen_q, config.block_m))
    return max(1, slots)


def heads_abreast(problem: PrefillProblem) -> int:
    """Heads whose programs run side by side: as many as the L2 holds the keys and values of.

    The more heads are abreast, the more evenly long and short tiles are spread; the fewer, the less
    is read twice. Keys of all sequences are counted as if they were one's.
    """
    columns = problem.k_nope + problem.value_dim
    bytes_each = max(1, problem.keys * columns * problem.dtype.itemsize)
    return min(problem.heads, max(1, L2_BYTES // bytes_each) * problem.group)
