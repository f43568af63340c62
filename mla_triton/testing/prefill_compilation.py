"""Every variant of prefill that the heuristic can choose, for `compilation.compile_all`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from mla_triton import device as devices
from mla_triton.kernels.sm90 import prefill_config as sm90_config
from mla_triton.problem import LARGEST_TILE, PrefillProblem
from mla_triton.testing.compilation import DTYPES, LABELS, Case

DIMENSIONS = ((192, 64, 128), (256, 64, 256), (128, 64, 128), (96, 32, 64))
"""(qk, rotary columns of it, v)"""
SHORT = 32
"""Query tokens of a sequence for which a smaller tile is chosen."""


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


def cases() -> Iterator[Case]:
    """All cases: those of `forms` on every card, and on Hopper by the kernel for it, too."""
    for label in LABELS:
        device = devices.from_label(label)
        for form in forms():
            yield Case(label, "portable", form)
            if sm90_config.why_not(form, device) is None:
                yield Case(label, "sm90", form)


def forms() -> Iterator[PrefillProblem]:
    """Dtypes and widths, long and short sequences, then the forms of a call."""
    for dimensions in DIMENSIONS:
        for dtype in DTYPES:
            yield problem(dtype, dimensions)
        plain = problem(dimensions=dimensions)
        yield replace(plain, usual_queries=SHORT)
        yield replace(plain, k_nope=plain.qk_dim)
    plain = problem()
    yield replace(plain, causal=False)
    yield replace(plain, q_nope=plain.k_nope)
    yield replace(plain, negative_scale=True)
    yield replace(plain, aligned=False)
