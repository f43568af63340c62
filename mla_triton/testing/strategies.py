"""Hypothesis strategies: small hostile decode problems for tests of your own kernels.

    from hypothesis import given
    from mla_triton import testing
    from mla_triton.testing.strategies import decode_problems

    @given(decode_problems(max_kv_len=200))
    def test_my_kernel(inputs):
        arguments, options = inputs.call_arguments()
        testing.assert_within_budget(my_decode(*arguments, **options), inputs)

A failing problem prints itself as the `decode_inputs(...)` call that makes it again. Needs
hypothesis, which comes with the extra `test`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from hypothesis import strategies as st

from mla_triton.testing.problems import DecodeInputs, Logits, decode_inputs


@st.composite
def decode_problems(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float16, torch.bfloat16, torch.float32),
    dims: Sequence[tuple[int, int]] = ((512, 64), (512, 0), (256, 64), (256, 32), (128, 32)),
    rope_in_value: Sequence[bool] = (False, True),
    page_sizes: Sequence[int] = (1, 16, 32, 64, 128, 5, 48),
    heads: Sequence[int] = (1, 2, 3, 5, 8, 16, 20, 33),
    logits: Sequence[Logits] = ("normal", "large", "equal_keys", "dominant_key"),
    tables: Sequence[Literal["dense", "csr"]] = ("dense", "csr"),
    layouts: Sequence[Literal["fused", "pair"]] = ("fused", "pair"),
    paddings: Sequence[int] = (0, 16, 1),
    ragged: Sequence[bool] = (False, True),
    max_batch: int = 3,
    max_s_q: int = 4,
    max_kv_len: int = 160,
    device: torch.device | str = "cpu",
) -> DecodeInputs:
    """Draws a problem that `mla_triton.decode` must get right.

    Each sequence is what the strategy may choose from, simplest first: hypothesis shrinks towards
    it. `dims` are (latent, rope) pairs; `paddings` columns between rows, 0 for contiguous tensors.
    Lengths reach from 0 to `max_kv_len` and favour the neighbourhood of page borders; a request may
    have more queries than keys, and a ragged one none.
    """
    page_size = draw(st.sampled_from(page_sizes))
    latent, rope = draw(st.sampled_from(dims))
    borders = [n for n in range(0, max_kv_len + 1, page_size) if n + 1 <= max_kv_len]
    near_border = st.builds(
        lambda n, off: max(0, n + off), st.sampled_from(borders), st.integers(-1, 1)
    )
    kv_lens = draw(
        st.lists(st.one_of(st.integers(0, max_kv_len), near_border), min_size=1, max_size=max_batch)
    )
    is_ragged = draw(st.sampled_from(ragged))
    s_q, q_lens = 1, None
    if is_ragged:
        count = len(kv_lens)
        q_lens = draw(st.lists(st.integers(0, max_s_q), min_size=count, max_size=count))
    else:
        s_q = draw(st.integers(1, max_s_q))
    layout = draw(st.sampled_from(layouts))
    # A value that reaches into the rope part needs it in the same tensor.
    inside = draw(st.sampled_from(rope_in_value)) and rope > 0 and layout == "fused"
    return decode_inputs(
        kv_lens=kv_lens,
        s_q=s_q,
        q_lens=q_lens,
        heads=draw(st.sampled_from(heads)),
        latent=latent,
        rope=rope,
        value_dim=latent + rope if inside else None,
        page_size=page_size,
        dtype=draw(st.sampled_from(dtypes)),
        causal=draw(st.booleans()),
        layout=layout,
        table=draw(st.sampled_from(tables)),
        strided=draw(st.sampled_from(paddings)),
        logits=draw(st.sampled_from(logits)),
        seed=draw(st.integers(0, 2**16)),
        device=device,
    )
