"""How kernels that take whole tokens share them, an append and a gather: validity and heuristic.

A warp alone has a token's columns, so that sums and maxima over them stay within it: several tokens
where there are many, so that loads of several are in flight together; one where there are few.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

from mla_triton.device import Device
from mla_triton.plan import cdiv
from mla_triton.problem_cache import AppendProblem, GatherProblem

MAX_ROWS = 16
WARPS = (1, 2, 4)
MAX_WORDS = 192
"""Registers of a thread for the columns that it holds; the rest is for addresses."""


@dataclass(frozen=True)
class Config:
    """How tokens are shared."""

    rows: int
    """Tokens of a program."""
    num_warps: int


def columns(problem: AppendProblem | GatherProblem) -> int:
    """Columns of the latents' tile: a power of two that holds a row."""
    return int(triton.next_power_of_2(problem.stored.latent))


def words(config: Config, problem: AppendProblem | GatherProblem, device: Device) -> int:
    """Registers of a thread that hold a latent's elements: as loaded, and in float32."""
    threads = config.num_warps * (64 if device.backend == "hip" else 32)
    elements = cdiv(config.rows * columns(problem), threads)
    return cdiv(elements * (problem.dtype.itemsize + 4), 4)


def is_valid(
    config: Config,
    problem: AppendProblem | GatherProblem,
    device: Device,
    rows: int | None = None,
) -> tuple[bool, str]:
    """Whether a config can be compiled and launched, with the rule that decides it.

    `rows` is of no meaning here: no plan is followed.
    """
    if not 1 <= config.rows <= MAX_ROWS or config.rows & (config.rows - 1):
        return False, f"rows must be a power of two in [1, {MAX_ROWS}], got {config.rows}"
    if config.num_warps not in WARPS:
        return False, f"num_warps must be one of {WARPS}, got {config.num_warps}"
    needed = words(config, problem, device)
    if needed > MAX_WORDS:
        return False, f"needs {needed} registers a thread for elements, at most {MAX_WORDS} are"
    return True, f"takes {needed} registers a thread for elements"


def choose(
    problem: AppendProblem | GatherProblem, device: Device, rows: int | None = None
) -> tuple[Config, str]:
    """The config of a problem, with its reason; ValueError where none is valid."""
    if device.backend == "interpreter":
        return Config(8, 1), "the interpreter has neither warps nor registers"
    refused = []
    # Elements of misaligned rows have an address each: of several rows, too many for a thread.
    rows = 1 if problem.few or not problem.aligned else 2
    for wanted, warps in ((rows, 1), (1, 1), (1, 2), (1, 4)):
        config = Config(wanted, warps)
        valid, rule = is_valid(config, problem, device)
        if valid:
            said = "few tokens: a program for each" if problem.few else "bound by memory"
            return config, f"{said}; {rule}"
        refused.append(f"{config}: {rule}")
    raise ValueError(f"problem must fit a config on {device.label}, got {problem}: {refused}")


def heuristic(
    problem: AppendProblem | GatherProblem, device: Device, rows: int | None = None
) -> Config:
    """The config: there are no tuned rows."""
    return choose(problem, device)[0]


def tuning_point(
    problem: AppendProblem | GatherProblem, device: Device, rows: int | None = None
) -> None:
    """None: there is nothing to look up, the heuristic serves every problem."""
