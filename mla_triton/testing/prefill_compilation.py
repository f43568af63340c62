"""Every variant of prefill that the heuristic can choose, compiled for its card without having it.

`compile_all` runs in processes of its own: a process in which Triton interprets cannot compile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from mla_triton import device as devices
from mla_triton.problem import LARGEST_TILE, PrefillProblem
from mla_triton.testing import resources
from mla_triton.testing.compilation import DTYPES, LABELS, side_by_side
from mla_triton.testing.resources import Resources

DIMENSIONS = ((192, 64, 128), (256, 64, 256), (128, 64, 128), (96, 32, 64))
"""(qk, rotary columns of it, v)"""
SHORT = 32
"""Query tokens of a sequence for which a smaller tile is chosen."""


@dataclass(frozen=True)
class PrefillCase:
    """One problem on one card."""

    label: str
    problem: PrefillProblem


@dataclass(frozen=True)
class PrefillCompiled:
    """What the compiler made of a case."""

    case: PrefillCase
    config: str
    limit: int
    """Bytes of shared memory a program may take on the card."""
    estimate: int
    """What `portable.prefill_config.shared_memory` expected."""
    resources: Resources


def problem(
    dtype: torch.dtype = torch.bfloat16, dimensions: tuple[int, int, int] = DIMENSIONS[0]
) -> PrefillProblem:
    """Long causal sequences with one rotary key for all heads."""
    qk, rope, value_dim = dimensions
    return PrefillProblem(
        dtype=dtype,
        heads=16,
        kv_heads=16,
        qk_dim=qk,
        value_dim=value_dim,
        q_nope=qk,
        k_nope=qk - rope,
        causal=True,
        usual_queries=LARGEST_TILE,
    )


def cases() -> Iterator[PrefillCase]:
    """All cases: dtypes and widths, long and short sequences, then the forms of a call."""
    for label in LABELS:
        for dimensions in DIMENSIONS:
            for dtype in DTYPES:
                yield PrefillCase(label, problem(dtype, dimensions))
            plain = problem(dimensions=dimensions)
            yield PrefillCase(label, replace(plain, usual_queries=SHORT))
            yield PrefillCase(label, replace(plain, k_nope=plain.qk_dim))
        plain = problem()
        yield PrefillCase(label, replace(plain, causal=False))
        yield PrefillCase(label, replace(plain, q_nope=plain.k_nope))
        yield PrefillCase(label, replace(plain, negative_scale=True))
        yield PrefillCase(label, replace(plain, aligned=False))


def compile_case(case: PrefillCase) -> PrefillCompiled:
    """Compiles one case in this process; Triton must not be interpreting.

    Raises RuntimeError, with the compiler's words, naming the case that does not compile.
    """
    try:
        return _compile(case)
    except Exception as error:
        raise RuntimeError(f"{case} does not compile: {error}") from error


def _compile(case: PrefillCase) -> PrefillCompiled:
    from mla_triton.kernels.portable import prefill, prefill_config

    device = devices.from_label(case.label)
    config = prefill.heuristic(case.problem, device)
    compiled = prefill.compile(case.problem, config, device)
    return PrefillCompiled(
        case,
        str(config),
        device.shared_memory,
        prefill_config.shared_memory(config, case.problem, device),
        resources.read(compiled),
    )


def compile_all(
    wanted: Sequence[PrefillCase], processes: int | None = None
) -> list[PrefillCompiled]:
    """Compiles cases side by side, by default one process a core."""
    return side_by_side(compile_case, wanted, processes)
