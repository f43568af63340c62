"""Decodes for the properties: the shapes that kernels are compiled for, and how they are run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from executions import COMPILED, DEVICE, Execution, Shape, is_half, seeds
from hypothesis import strategies as st
from ways import is_refused

import mla_triton
from mla_triton import AttentionState
from mla_triton.kernels.common import combine
from mla_triton.testing import DecodeInputs, decode_inputs, plan_of
from mla_triton.testing.decode_changes import page_size_of

LONGEST = 3000 if COMPILED else 70
"""Keys of a request."""
LONG = 2049 if COMPILED else 0
"""Keys that one request has at least: configs are those of the longest, by powers of two."""
MOST_PARTS = 9
"""Where a kernel is interpreted."""
SHAPES: tuple[Shape, ...] = (
    {"heads": 16, "latent": 512, "rope": 64, "page_size": 64, "dtype": torch.bfloat16},
    {"heads": 20, "latent": 512, "rope": 64, "page_size": 32, "dtype": torch.float16},
    {"heads": 2, "latent": 512, "rope": 0, "page_size": 1, "dtype": torch.float16},
    {"heads": 5, "latent": 128, "rope": 32, "page_size": 16, "dtype": torch.float32}
    | {"table": "csr"},
    {"heads": 3, "latent": 256, "rope": 64, "page_size": 16, "dtype": torch.bfloat16}
    | {"layout": "pair"},
    {"heads": 6, "latent": 448, "rope": 64, "page_size": 48, "dtype": torch.bfloat16}
    | {"value_dim": 512},
    {"heads": 8, "latent": 512, "rope": 64, "page_size": 64, "dtype": torch.bfloat16}
    | {"stored": "fp8"},
    {"heads": 3, "latent": 128, "rope": 32, "page_size": 16, "dtype": torch.float16}
    | {"stored": "fp8", "layout": "pair"},
    {"heads": 8, "latent": 512, "rope": 64, "page_size": 64, "dtype": torch.bfloat16}
    | {"stored": "fp8_ds_mla"},
)
if COMPILED:
    SHAPES += (
        {"heads": 128, "latent": 512, "rope": 64, "page_size": 64, "dtype": torch.bfloat16},
        {"heads": 64, "latent": 512, "rope": 64, "page_size": 64, "dtype": torch.float16}
        | {"stored": "fp8"},
    )


FEW_HEADS = (5, 8, 16)
"""Of shapes that stand for all where these are too many."""
OLDER_HEADS = (3, *FEW_HEADS)
"""Of those that older cards' code is tried with: every form of a cache, by few kernels."""


@cache
def taken(execution: Execution) -> tuple[Shape, ...]:
    """The shapes that it takes; the Hopper kernel says of the others that it does not."""
    if execution.impl != "sm90":
        return SHAPES
    made = [decode_inputs(kv_lens=[1], device=DEVICE, **shape) for shape in SHAPES]
    pairs = zip(SHAPES, made, strict=True)
    return tuple(shape for shape, inputs in pairs if not is_refused(inputs, execution.way))


def is_16_bit(shape: Shape) -> bool:
    """Whether the cache has q's dtype; of a problem, its recipe is asked."""
    return shape.get("stored", "16bit") == "16bit"


def pairs(executions: Sequence[Execution]) -> list[tuple[Execution, Shape]]:
    """Each with the shapes that it takes, or a few of them for older cards' code."""
    return [
        (execution, shape)
        for execution in executions
        for shape in taken(execution)
        if execution.label is None or shape["heads"] in OLDER_HEADS
    ]


def page_sizes(inputs: DecodeInputs, execution: Execution) -> list[int]:
    """What its pages can be cut into, that the execution takes: one size and what they are."""
    whole = page_size_of(inputs)
    # The Hopper kernel reads e4m3 in boxes of 16 keys and more.
    least = 16 if execution.impl == "sm90" and not is_16_bit(inputs.recipe) else 1
    smaller = [size for size in (32, 16, 1) if least <= size < whole and whole % size == 0]
    return [*(smaller[:1] if is_half(inputs.recipe) else smaller[-1:]), whole]


def parts(shape: Shape, requests: int) -> st.SearchStrategy[int]:
    """How many a batch is cut into. Pieces of a request decide how the merge is compiled: of each
    shape they are those of one kernel."""
    if not COMPILED:
        return st.integers(1, MOST_PARTS)
    levels = sorted(combine.LEVELS_OF)
    most = levels[SHAPES.index(shape) % len(levels)]
    return st.just(1) | st.integers((most * 5 // 8 + 1) * requests, most * requests)


def some_heads(count: int) -> st.SearchStrategy[list[int]]:
    """Less than half of them, which are of one tile of rows, or all, in any order."""
    least = max(count // 4 + 1, min(2, count - 1))
    some = st.lists(
        st.integers(0, count - 1), min_size=least, max_size=max(least, count // 2 - 1), unique=True
    )
    return some | st.permutations(range(count))


@st.composite
def problems(
    draw: st.DrawFn,
    shape: Shape,
    *,
    s_q: int | None = None,
    causal: Sequence[bool] = (True, False),
    whole_pages: bool = False,
    at_least: int = 0,
) -> DecodeInputs:
    """A problem of a shape; `whole_pages` leaves no page partly filled.

    How many requests there are and, unless it is said, how many query tokens each has, decides the
    tile of rows, so that it is not drawn. Two requests are few enough for the tile of few keys.
    """
    unit = shape["page_size"] if whole_pages else 1

    def lengths(least: int) -> st.SearchStrategy[int]:
        return st.integers(-(-least // unit), max(2, LONGEST // unit)).map(lambda n: n * unit)

    others = 2 if COMPILED and not is_half(shape) else 1
    return decode_inputs(
        kv_lens=[
            draw(lengths(max(LONG, at_least))),
            *draw(st.lists(lengths(at_least), min_size=others, max_size=others)),
        ],
        s_q=s_q or (2 if is_half(shape) else 1),
        causal=draw(st.sampled_from(causal)),
        seed=draw(seeds()),
        device=DEVICE,
        **shape,
    )


def run(inputs: DecodeInputs, execution: Execution, **options: Any) -> AttentionState:
    """Into buffers of NaN."""
    arguments, own = inputs.call_arguments()
    buffers = inputs.output_buffers()
    return mla_triton.decode(*arguments, **own, **buffers, impl=execution.impl, **options)


def in_one_part(inputs: DecodeInputs, execution: Execution) -> dict[str, mla_triton.Plan]:
    """Options under which no request is split, so that its result depends on it alone."""
    return {} if execution.impl == "reference" else {"plan": plan_of(inputs, execution.impl, 1)}
