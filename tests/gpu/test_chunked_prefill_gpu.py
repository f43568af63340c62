"""Prompts in chunks at the sizes of an engine: expanded and merged, or absorbed."""

from __future__ import annotations

from typing import Any

import examples
import pytest
import torch
from test_chunked_prefill import FORMS
from ways import Way, is_refused, run

from mla_triton import AttentionState
from mla_triton.testing import assert_within_budget, decode_inputs, query_blocks

BLOCK = 512
"""Query tokens that are held against the oracle at a time: 16 heads of them over 8192 keys take
half a gigabyte in float64, several times."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("size", "prompts"),
    [
        (1, (70, 13, 0)),
        (7, (300, 64, 5)),
        (512, (3000, 700, 512)),
        (4096, (8192, 4097, 100)),
    ],
)
def test_chunks_are_the_whole(size, prompts, form, dtype):
    recipe = examples.load("chunked_prefill")
    reports = recipe.run(form, size, prompts, "cuda", dtype)
    assert [report.tokens for report in reports] == [length for length in prompts if length]
    assert all(report.ok for report in reports), reports


def judge(way: Way, **recipe: Any) -> None:
    inputs = decode_inputs(device="cuda", **recipe)
    if is_refused(inputs, way):
        return
    state = run(inputs, way, **inputs.output_buffers())
    for rows, part in query_blocks(inputs, BLOCK):
        assert_within_budget(AttentionState(state.out[rows], state.lse[rows]), part)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_thousands_of_query_tokens(way, dtype):
    """65536 rows over 8192 keys: the last 4096 tokens of a prompt."""
    judge(way, kv_lens=[8192], q_lens=[4096], heads=16, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_a_batch_of_chunks(way, causal, dtype):
    """With decodes, a prompt by itself, more queries than keys, and requests without any."""
    judge(
        way, kv_lens=[8000, 3000, 1, 700, 5, 0, 4000], q_lens=[2048, 1, 1, 700, 300, 9, 0],
        heads=16, dtype=dtype, causal=causal,
    )  # fmt: skip


@pytest.mark.parametrize("heads", [1, 5, 128])
def test_heads(way, heads):
    judge(way, kv_lens=[3000, 600], q_lens=[1000, 600], heads=heads, dtype=torch.bfloat16)
