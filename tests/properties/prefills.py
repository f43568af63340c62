"""Prefills for the properties: the shapes that kernels are compiled for, and how they are run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from executions import COMPILED, DEVICE, Execution, Shape, seeds
from hypothesis import strategies as st

import mla_triton
from mla_triton import AttentionState, select
from mla_triton import device as devices
from mla_triton.testing import PrefillInputs, prefill_inputs, problem_of

LONGEST = 600 if COMPILED else 40
"""Queries of a sequence, and keys; tiles have up to 128 of them, 32 in the interpreter."""
SMALL: Shape = {"qk": 96, "rope": 32, "v_dim": 64}
SHAPES: tuple[Shape, ...] = (
    {"qk": 192, "rope": 64, "v_dim": 128, "heads": 2, "split_q": True, "split_k": True}
    | {"dtype": torch.bfloat16},
    {"qk": 128, "rope": 64, "v_dim": 128, "heads": 4, "kv_heads": 2, "dtype": torch.float16},
    {"qk": 256, "rope": 64, "v_dim": 256, "heads": 1, "split_k": True, "dtype": torch.float16},
    {**SMALL, "heads": 3, "dtype": torch.float32},
    {**SMALL, "heads": 2, "split_k": True, "strided": True, "dtype": torch.bfloat16},
)
if COMPILED:
    SHAPES += ({**SHAPES[0], "heads": 32, "dtype": torch.float16},)


@cache
def taken(execution: Execution) -> tuple[Shape, ...]:
    """The shapes that it takes."""
    if execution.impl != "sm90":
        return SHAPES

    def takes(shape: Shape) -> bool:
        problem = problem_of(prefill_inputs(q_lens=[1], device=DEVICE, **shape))
        return select.why_not_sm90_prefill(problem, devices.current(), execution.impl) is None

    return tuple(shape for shape in SHAPES if takes(shape))


def pairs(executions: Sequence[Execution]) -> list[tuple[Execution, Shape]]:
    """Each with the shapes that it takes, or two of them for older cards' code."""
    return [
        (execution, shape)
        for execution in executions
        for shape in taken(execution)[: 2 if execution.label else None]
    ]


@st.composite
def problems(
    draw: st.DrawFn,
    shape: Shape,
    *,
    causal: Sequence[bool] = (True, False),
    at_least: int = 0,
    batch: int = 3 if COMPILED else 2,
) -> PrefillInputs:
    """A problem of a shape, of up to `batch` sequences with `at_least` so many keys."""
    pair = st.tuples(st.integers(1, LONGEST), st.integers(at_least, LONGEST))
    lens = draw(st.lists(pair, min_size=min(2, batch), max_size=batch))
    return prefill_inputs(
        q_lens=[q for q, _ in lens],
        k_lens=[k for _, k in lens],
        causal=draw(st.sampled_from(causal)),
        seed=draw(seeds()),
        device=DEVICE,
        **shape,
    )


def run(inputs: PrefillInputs, execution: Execution, **options: Any) -> AttentionState:
    """Into buffers of NaN."""
    arguments, own = inputs.call_arguments()
    buffers = inputs.output_buffers()
    return mla_triton.prefill(*arguments, **own, **buffers, impl=execution.impl, **options)
