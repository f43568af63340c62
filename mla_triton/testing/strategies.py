"""Hypothesis strategies: small hostile decode problems for tests of your own kernels.

    from hypothesis import given
    from mla_triton import testing
    from mla_triton.testing.strategies import decode_problems

    @given(decode_problems(max_kv_len=200))
    def test_my_kernel(inputs):
        arguments, options = inputs.call_arguments()
        testing.assert_within_budget(my_decode(*arguments, **options), inputs)

`prefill_problems` does the same for prefill. A failing problem prints itself as the
`decode_inputs(...)` or `prefill_inputs(...)` call that makes it again. Needs
hypothesis, which comes with the extra `test`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from hypothesis import strategies as st

from mla_triton.testing.prefill_problems import PrefillInputs, prefill_inputs
from mla_triton.testing.problems import PACKED, SERVED, DecodeInputs, Logits, Stored, decode_inputs


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
    stored: Sequence[Stored] = ("16bit",),
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
    `stored` says how the cache may be quantised: a packed format has its own dims, and of the
    dtypes those that it serves are drawn, which must be among them.
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
    form = draw(st.sampled_from(stored))
    # A value that reaches into the rope part needs it in the same tensor.
    inside = draw(st.sampled_from(rope_in_value)) and rope > 0 and layout == "fused"
    if form == "fp8_groups":
        inside, rope = False, rope or 64
    elif form in PACKED:
        inside = form != "fp8_ds_mla"
        latent, rope = (448, 64) if inside else (512, 64)
    return decode_inputs(
        kv_lens=kv_lens,
        s_q=s_q,
        q_lens=q_lens,
        heads=draw(st.sampled_from(heads)),
        latent=latent,
        rope=rope,
        value_dim=latent + rope if inside else None,
        page_size=page_size,
        dtype=draw(st.sampled_from([d for d in dtypes if d in SERVED.get(form, dtypes)])),
        causal=draw(st.booleans()),
        layout=layout,
        stored=form,
        table=draw(st.sampled_from(tables)),
        strided=draw(st.sampled_from(paddings)),
        logits=draw(st.sampled_from(logits)),
        seed=draw(st.integers(0, 2**16)),
        device=device,
    )


@st.composite
def prefill_problems(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float16, torch.bfloat16, torch.float32),
    dims: Sequence[tuple[int, int, int]] = ((96, 32, 64), (128, 64, 128), (192, 64, 128)),
    heads: Sequence[tuple[int, int]] = ((1, 1), (3, 3), (4, 2), (5, 1)),
    logits: Sequence[Logits] = ("normal", "large", "equal_keys", "dominant_key"),
    splits: Sequence[bool] = (False, True),
    paddings: Sequence[int] = (0, 16, 1),
    max_batch: int = 4,
    max_q_len: int = 70,
    max_k_len: int = 100,
    tile: int = 32,
    device: torch.device | str = "cpu",
) -> PrefillInputs:
    """Draws a problem that `mla_triton.prefill` must get right.

    `dims` are (qk, rotary columns of it, v), `heads` (query heads, KV heads), `splits` whether the
    rotary columns may be tensors of their own. Lengths favour the neighbourhood of multiples of
    `tile`; a sequence may have no queries, no keys, or more queries than keys.
    """

    def lengths(largest: int) -> st.SearchStrategy[int]:
        border = st.builds(
            lambda n, off: max(0, n * tile + off),
            st.integers(0, max(0, largest // tile - 1)),
            st.integers(-1, 1),
        )
        return st.one_of(st.integers(0, largest), border)

    pair = st.tuples(lengths(max_q_len), lengths(max_k_len))
    lens = draw(st.lists(pair, min_size=1, max_size=max_batch))
    qk, rope, v_dim = draw(st.sampled_from(dims))
    query_heads, kv_heads = draw(st.sampled_from(heads))
    return prefill_inputs(
        q_lens=[q for q, _ in lens],
        k_lens=[k for _, k in lens],
        heads=query_heads,
        kv_heads=kv_heads,
        qk=qk,
        v_dim=v_dim,
        rope=rope,
        split_q=draw(st.sampled_from(splits)),
        split_k=draw(st.sampled_from(splits)),
        dtype=draw(st.sampled_from(dtypes)),
        causal=draw(st.booleans()),
        strided=draw(st.sampled_from(paddings)),
        logits=draw(st.sampled_from(logits)),
        constant_values=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        device=device,
    )
