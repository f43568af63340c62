"""How the Hopper prefill kernel is configured: validity with reasons, and the heuristic.

Nothing here imports Triton, so that it can be asked where Gluon cannot be imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mla_triton.device import KIB, Device
from mla_triton.kernels.common.tuning_key import Items, prefill_key
from mla_triton.plan import cdiv
from mla_triton.problem import PrefillProblem

OP = "prefill"
NAME = "sm90"
WARPGROUP_ROWS = 64
"""Queries that one warpgroup multiplies at once."""
BLOCK_M = 2 * WARPGROUP_ROWS
"""Queries of a tile: two warpgroups' worth."""
CHUNK = 64
"""Columns of a TMA box: 128 bytes, as wide as a swizzled one may be."""
WIDTHS = ((192, 128), (128, 128), (256, 256))
"""(query and key, value) columns that the kernel is written for."""
OTHERS = 5 * KIB
"""Shared memory of barriers, a tile's facts and the passage of results: an upper estimate."""
L2_BYTES = 32 << 20
"""Keys and values that programs running side by side may share through the L2 cache."""


@dataclass(frozen=True)
class Config:
    """What may be tuned."""

    block_n: int
    """Keys of a block."""
    stages: int
    """Blocks of keys, and of values, that are in shared memory at once."""

    @property
    def block_m(self) -> int:
        """Queries of a tile, which cannot be chosen."""
        return BLOCK_M


def shared_memory(config: Config, problem: PrefillProblem, device: Device) -> int:
    """Bytes of shared memory a program takes: an upper estimate."""
    block = config.block_n * (problem.qk_dim + problem.value_dim)
    elements = BLOCK_M * problem.qk_dim + config.stages * block
    return elements * problem.dtype.itemsize + OTHERS


def why_not(problem: PrefillProblem, device: Device) -> str | None:
    """The reason this implementation cannot take a problem, or None."""
    if device.capability != (9, 0):
        return f"it is written for capability 9.0, this card has {device.label}"
    if problem.dtype not in (torch.float16, torch.bfloat16) or not problem.aligned:
        return "it reads aligned float16 or bfloat16"
    if (problem.qk_dim, problem.value_dim) not in WIDTHS:
        widths = " or ".join(f"{qk} and {value}" for qk, value in WIDTHS)
        return f"it is written for {widths} columns, got {problem.qk_dim} and {problem.value_dim}"
    for name, columns in (("q", problem.q_nope), ("k", problem.k_nope)):
        if columns % CHUNK:
            rule = f"a TMA box is {CHUNK} columns of one tensor"
            return f"{rule}, got {columns} columns of {name} before its rotary ones"
    if not problem.distinct:
        return "a TMA descriptor has no strides of 0, as expand leaves them"
    return None


def why_slower(problem: PrefillProblem, device: Device) -> str | None:
    """The reason to prefer the next one for a problem that this one can take, or None."""
    if problem.usual_queries <= WARPGROUP_ROWS:
        return (
            f"portable has tiles for sequences of up to {WARPGROUP_ROWS} queries, which leave half "
            f"of {BLOCK_M} empty"
        )
    return None


def is_valid(
    config: Config, problem: PrefillProblem, device: Device, row_tile: int | None = None
) -> tuple[bool, str]:
    """Whether a config can be compiled and launched, with the rule that decides it.

    `row_tile` is a plan's, and prefill has no plan.
    """
    reason = why_not(problem, device)
    if reason is not None:
        return False, reason
    if config.block_n not in (64, 128):
        return False, f"block_n must be 64 or 128, got {config.block_n}"
    if config.stages not in (2, 3, 4):
        return False, f"stages must be 2, 3 or 4, got {config.stages}"
    if problem.value_dim > 128 and config.block_n > 64:
        rule = f"registers hold 64 keys beside {problem.value_dim} columns of values"
        return False, f"{rule}, got blocks of {config.block_n}"
    needed = shared_memory(config, problem, device)
    if needed > device.shared_memory:
        return (
            False,
            f"needs {needed} bytes of shared memory, {device.label} has {device.shared_memory}",
        )
    return True, f"takes {needed} of {device.shared_memory} bytes of shared memory"


def choose(
    problem: PrefillProblem, device: Device, row_tile: int | None = None
) -> tuple[Config, str]:
    """The heuristic's config and its reason; ValueError where the problem cannot be taken."""
    if problem.value_dim > 128:
        config, reason = Config(64, 2), "wide values: 64 keys a block fit registers"
    else:
        config, reason = Config(128, 2), "blocks of 128 keys, two of them in flight"
    valid, rule = is_valid(config, problem, device)
    if not valid:
        raise ValueError(f"problem must be one that {NAME} takes, got {problem}: {rule}")
    return config, f"{reason}; {rule}"


def heuristic(problem: PrefillProblem, device: Device) -> Config:
    """The config without a tuned row."""
    return choose(problem, device)[0]


def tuning_point(
    problem: PrefillProblem, device: Device, row_tile: int | None = None
) -> tuple[Items, int, int] | None:
    """(key, sequences, mean keys of one) that a problem is looked up by; None where a tuned row,
    which is of one batch, must not decide."""
    if problem.batch_invariant:
        return None
    batch = max(1, problem.batch)
    return prefill_key(problem), batch, cdiv(problem.keys, batch)


def search_space(problem: PrefillProblem, device: Device) -> Iterator[Config]:
    """Every config worth timing, valid or not; which are is for `is_valid` to say."""
    for block_n, stages in ((128, 2), (64, 2), (64, 3), (64, 4)):
        yield Config(block_n, stages)


def tile_slots(problem: PrefillProblem) -> tuple[int, int]:
    """(places for tiles in a row of all sequences' tiles, those of each sequence or 0).

    Where it is known how many queries a sequence has at most, each may have as many places as that.
    Else, or where that is fewer, sequence i begins at place
    `(tokens before it + i x (BLOCK_M - 1)) // BLOCK_M`: the places up to the next one are enough
    for its tiles, whatever the lengths are. In both it takes no sum to find a place's sequence.
    """
    following = max(1, (problem.queries + problem.batch * (BLOCK_M - 1)) // BLOCK_M)
    if problem.max_seqlen_q is not None:
        each = max(1, cdiv(problem.max_seqlen_q, BLOCK_M))
        if 0 < problem.batch * each <= following:
            return problem.batch * each, each
    return following, 0


def heads_abreast(problem: PrefillProblem) -> int:
    """Heads whose tiles are worked on side by side: as many as the L2 holds the keys and values of.

    The more heads are abreast, the more evenly long and short tiles are spread; the fewer, the less
    is read twice. Keys of all sequences are counted as if they were one's.
    """
    columns = problem.k_nope + problem.value_dim
    bytes_each = max(1, problem.keys * columns * problem.dtype.itemsize)
    return min(problem.heads, max(1, L2_BYTES // bytes_each) * problem.group)
