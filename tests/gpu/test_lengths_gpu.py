"""Every number of queries with every number of keys: N(0,1) inputs, float16 and bfloat16.

One ragged batch of all pairs, so that short and long requests are beside each other. Some heads of
it are held against the oracle.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

import mla_triton
from mla_triton import AttentionState
from mla_triton.testing import (
    PrefillInputs,
    assert_within_budget,
    decode_inputs,
    prefill_budget,
    query_blocks,
)

QUERIES = (1, 3, 16, 63, 64, 65, 127, 129, 500, 1000, 4000)
KEYS = (0, 1, 31, 64, 65, 128, 500, 1000, 4000, 9000)
FEWER = ((1, 17, 64, 130, 1000), (0, 1, 65, 500, 9000))
"""For a cache and queries of many heads, which are made on the CPU."""
BLOCK = 512
by_half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def some_of(heads: int) -> list[int]:
    return sorted({0, heads // 2, heads - 1})


def offsets(lens: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lens], device="cuda").cumsum(0).to(torch.int32)


@by_half
@pytest.mark.parametrize("heads", [4, 16, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_prefill(causal, heads, dtype):
    """192 and 128 columns, as DeepSeek has them; the sequences are judged one by one."""
    q_lens, k_lens = ([pair[n] for pair in product(QUERIES, KEYS)] for n in (0, 1))
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("needs 32 GB of free GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)

    q, k = normal(sum(q_lens), heads, 192), normal(sum(k_lens), heads, 128)
    v, k_rope = normal(sum(k_lens), heads, 128), normal(sum(k_lens), 64)
    bounds = [offsets(lens) for lens in (q_lens, k_lens)]
    out = torch.full((*q.shape[:2], 128), float("nan"), device="cuda", dtype=dtype)
    lse = torch.full(q.shape[:2], float("nan"), device="cuda")
    mla_triton.prefill(
        q, k, v, k_rope=k_rope, cu_seqlens_q=bounds[0], cu_seqlens_k=bounds[1],
        softmax_scale=192**-0.5, causal=causal, out=out, lse=lse,
    )  # fmt: skip
    chosen = some_of(heads)
    for request in range(len(q_lens)):
        (a, b), (c, d) = (bound[request : request + 2].tolist() for bound in bounds)
        part = PrefillInputs(
            q[a:b, chosen], k[c:d, chosen], v[c:d, chosen], offsets([b - a]), offsets([d - c]),
            192**-0.5, causal, k_rope=k_rope[c:d],
        )  # fmt: skip
        state = AttentionState(out[a:b, chosen], lse[a:b, chosen])
        assert_within_budget(state, part, prefill_budget(part))


@by_half
@pytest.mark.parametrize("heads", [4, 16, 64, 128])
def test_decode(heads, dtype):
    """576 and 512 columns over pages of 64, causal."""
    pairs = list(product(*FEWER))
    inputs = decode_inputs(
        q_lens=[pair[0] for pair in pairs], kv_lens=[pair[1] for pair in pairs], heads=heads,
        dtype=dtype, device="cuda",
    )  # fmt: skip
    arguments, options = inputs.call_arguments()
    state = mla_triton.decode(*arguments, **options, **inputs.output_buffers())
    chosen = some_of(heads)
    assert inputs.q_rope is not None
    fewer = replace(inputs, q_nope=inputs.q_nope[:, chosen], q_rope=inputs.q_rope[:, chosen])
    for rows, part in query_blocks(fewer, BLOCK):
        found = AttentionState(state.out[rows][:, chosen], state.lse[rows][:, chosen])
        assert_within_budget(found, part)
