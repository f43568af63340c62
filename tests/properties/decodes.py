"""Decodes for the properties: the shapes that kernels are compiled for, and how they are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from executions import COMPILED, DEVICE, Execution, Shape
from hypothesis import strategies as st
from ways import is_refused

import mla_triton
from mla_triton import AttentionState
from mla_triton.testing import DecodeInputs, decode_inputs, plan_of
from mla_triton.testing.decode_changes import page_size_of

LONGEST = 3000 if COMPILED else 70
"""Keys of a request."""
MOST_PARTS = 300 if COMPILED else 9
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


def page_sizes(inputs: DecodeInputs, execution: Execution) -> list[int]:
    """What its pages can be cut into, that the execution takes: at least what they are."""
    whole = page_size_of(inputs)
    # The Hopper kernel reads e4m3 in boxes of 16 keys and more.
    least = 16 if execution.impl == "sm90" and not is_16_bit(inputs.recipe) else 1
    return [whole, *(size for size in (32, 16, 1) if least <= size < whole and whole % size == 0)]


@st.composite
def problems(
    draw: st.DrawFn,
    execution: Execution,
    *,
    where: Callable[[Shape], bool] = lambda shape: True,
    batch: int = 4,
    s_q: Sequence[int] = (1, 2),
    causal: Sequence[bool] = (True, False),
    whole_pages: bool = False,
    at_least: int = 0,
) -> DecodeInputs:
    """A problem of one of the shapes; `whole_pages` leaves no page partly filled."""
    shape = draw(st.sampled_from([shape for shape in taken(execution) if where(shape)]))
    unit = shape["page_size"] if whole_pages else 1
    lengths = st.integers(-(-at_least // unit), max(2, LONGEST // unit)).map(lambda n: n * unit)
    return decode_inputs(
        kv_lens=draw(st.lists(lengths, min_size=min(2, batch), max_size=batch)),
        s_q=draw(st.sampled_from(s_q)),
        causal=draw(st.sampled_from(causal)),
        seed=draw(st.integers(0, 2**16)),
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
