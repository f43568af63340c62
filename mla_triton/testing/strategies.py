"""Hypothesis strategies: small hostile decode problems for tests of your own kernels.

    from hypothesis import given
    from mla_triton import testing
    from mla_triton.testing.strategies import decode_problems

    @given(decode_problems(max_kv_len=200))
    def test_my_kernel(inputs):
        arguments, options = inputs.call_arguments()
        testing.assert_within_budget(my_decode(*arguments, **options), inputs)

`prefill_problems`, `merge_problems`, `append_problems` and `gather_problems` do the same for the
other operations. Each argument restricts what is drawn, for a kernel that does not take everything:
sequences hold what may be chosen, simplest first, since hypothesis shrinks towards the first.

A failing problem prints itself as the call that makes it again, `decode_inputs(...)` or its like.
Needs hypothesis, which comes with the extra `test`; the rest of `mla_triton.testing` does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from mla_triton.problem import MOST_APART
from mla_triton.testing.caches import FORMS, AppendInputs, append_inputs
from mla_triton.testing.caches import PACKED as PACKED_FORMS
from mla_triton.testing.gathers import GatherInputs, gather_inputs
from mla_triton.testing.merges import MergeInputs, Spread, merge_inputs
from mla_triton.testing.prefill_problems import PrefillInputs, prefill_inputs
from mla_triton.testing.problems import (
    PACKED,
    SERVED,
    DecodeInputs,
    Layout,
    Logits,
    Stored,
    Table,
    decode_inputs,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@st.composite
def decode_problems(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    dims: Sequence[tuple[int, int]] = ((512, 64), (512, 0), (256, 64), (256, 32), (128, 32)),
    rope_in_value: Sequence[bool] = (False, True),
    page_sizes: Sequence[int] = (1, 16, 32, 64, 128, 5, 48),
    heads: Sequence[int] = (1, 2, 3, 5, 8, 16, 20, 33),
    logits: Sequence[Logits] = ("normal", "large", "equal_keys", "dominant_key"),
    tables: Sequence[Table] = ("dense", "csr"),
    layouts: Sequence[Layout] = ("fused", "pair"),
    stored: Sequence[Stored] = ("16bit",),
    paddings: Sequence[int] = (0, 16, 1),
    ragged: Sequence[bool] = (False, True),
    max_batch: int = 3,
    max_s_q: int = 4,
    max_kv_len: int = 160,
    device: torch.device | str = "cpu",
) -> DecodeInputs:
    """Draws a problem that `mla_triton.decode` must get right.

    `dims` are (latent, rope) pairs; `paddings` columns between rows, 0 for contiguous tensors.
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
    dtypes: Sequence[torch.dtype] = DTYPES,
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


@st.composite
def merge_problems(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    first_dtypes: Sequence[torch.dtype | None] = (None, *DTYPES),
    out_dtypes: Sequence[torch.dtype | None] = (None, *DTYPES),
    heads: Sequence[int] = (1, 2, 3, 5, 16, 20),
    value_dims: Sequence[int] = (16, 1, 7, 24, 64, 96, 128, 192, 512),
    stacked: Sequence[bool] = (False, True),
    masked: Sequence[bool] = (False, True),
    empty: Sequence[float] = (0.0, 0.3, 1.0),
    spreads: Sequence[Spread] = ("near", "far", "equal"),
    levels: Sequence[float] = (0.0, 900.0, -900.0),
    paddings: Sequence[int] = (0, 16, 3),
    max_rank: int = 2,
    max_states: int = 17,
    device: torch.device | str = "cpu",
) -> MergeInputs:
    """Draws a problem that `mla_triton.merge` must get right.

    States are 2 to `max_states`, and no more than `mla_triton.merge` takes apart from each other
    unless they are one stack. `first_dtypes` and `out_dtypes` are of the first state and of the
    result, None for that of the others and of the first. Leading dimensions are 0 to `max_rank`, of
    0 to 4 tokens each; `empty` is the share of rows that saw no key.
    """
    is_stack = draw(st.sampled_from(stacked))
    most = max_states if is_stack else min(max_states, MOST_APART)
    return merge_inputs(
        states=draw(st.integers(2, most)),
        tokens=draw(st.lists(st.integers(0, 4), min_size=0, max_size=max_rank)),
        heads=draw(st.sampled_from(heads)),
        value_dim=draw(st.sampled_from(value_dims)),
        dtype=draw(st.sampled_from(dtypes)),
        first_dtype=draw(st.sampled_from(first_dtypes)),
        out_dtype=draw(st.sampled_from(out_dtypes)),
        stacked=is_stack,
        masked=draw(st.sampled_from(masked)),
        empty=draw(st.sampled_from(empty)),
        spread=draw(st.sampled_from(spreads)),
        level=draw(st.sampled_from(levels)),
        strided=draw(st.sampled_from(paddings)),
        seed=draw(st.integers(0, 2**16)),
        device=device,
    )


def _widths(form: str, latents: Sequence[int], ropes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Of the widths those that a form of cache has; a packed one has its own."""
    if form in ("fused", "pair"):
        return list(latents), list(ropes)
    return [n for n in latents if n % 128 == 0], [n for n in ropes if n % 32 == 0]


@st.composite
def append_problems(
    draw: st.DrawFn,
    *,
    forms: Sequence[str] = FORMS,
    dtypes: Sequence[torch.dtype] = DTYPES,
    cache_dtypes: Sequence[torch.dtype | None] = (None, *DTYPES),
    latents: Sequence[int] = (512, 256, 128, 96, 5),
    ropes: Sequence[int] = (64, 32, 1),
    page_sizes: Sequence[int] = (1, 2, 3, 7, 16),
    norms: Sequence[torch.dtype | None] = (None,),
    rotations: Sequence[str | None] = (None,),
    scales: Sequence[float] = (1.0, 1e-3, 300.0),
    paddings: Sequence[int] = (0, 16, 3),
    max_tokens: int = 40,
    max_pages: int = 5,
    device: torch.device | str = "cpu",
) -> AppendInputs:
    """Draws tokens for `mla_triton.append`, and a cache with canaries around it.

    `forms` are those of `mla_triton.testing.caches.FORMS`; `latents` that are no multiple of 128,
    and `ropes` that are none of 32, are for caches in 16 bit or float32 alone, and packed formats
    have widths of their own. `cache_dtypes` is None for the dtype of tokens. `norms` and
    `rotations` are as in `append_inputs`, None for an append without.
    """
    form = draw(st.sampled_from(forms))
    own_latents, own_ropes = _widths(form, latents, ropes)
    return append_inputs(
        form=form,
        tokens=draw(st.integers(0, max_tokens)),
        pages=draw(st.integers(1, max_pages)),
        page_size=draw(st.sampled_from(page_sizes)),
        latent=draw(st.sampled_from(own_latents)),
        rope=draw(st.sampled_from(own_ropes)),
        dtype=draw(st.sampled_from(dtypes)),
        cache_dtype=draw(st.sampled_from(cache_dtypes)) if form in ("fused", "pair") else None,
        slot_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        norm=draw(st.sampled_from(norms)),
        rotation=draw(st.sampled_from(rotations)),
        angles=draw(st.sampled_from(DTYPES)),
        power_of_two=draw(st.booleans()),
        scale=draw(st.sampled_from(scales)),
        strided=0 if form in PACKED_FORMS else draw(st.sampled_from(paddings)),
        seed=draw(st.integers(0, 2**16)),
        device=device,
    )


@st.composite
def gather_problems(
    draw: st.DrawFn,
    *,
    forms: Sequence[str] = FORMS,
    dtypes: Sequence[torch.dtype] = DTYPES,
    cache_dtypes: Sequence[torch.dtype] = DTYPES,
    latents: Sequence[int] = (512, 128),
    ropes: Sequence[int] = (64, 32),
    page_sizes: Sequence[int] = (1, 2, 3, 7, 16),
    csr: Sequence[bool] = (False, True),
    with_starts: Sequence[bool] = (False, True),
    paddings: Sequence[int] = (0, 16, 3),
    max_batch: int = 6,
    max_length: int = 23,
    device: torch.device | str = "cpu",
) -> GatherInputs:
    """Draws requests for `mla_triton.gather`, some of whose pages are none of the cache.

    `dtypes` are of the rows, `cache_dtypes` of caches in 16 bit or float32; `with_starts` says
    whether requests may begin somewhere in their keys, or before the first.
    """
    form = draw(st.sampled_from(forms))
    own_latents, own_ropes = _widths(form, latents, ropes)
    lengths = draw(st.lists(st.integers(0, max_length), min_size=1, max_size=max_batch))
    starts = None
    if draw(st.sampled_from(with_starts)):
        count = len(lengths)
        starts = tuple(draw(st.lists(st.integers(-5, 30), min_size=count, max_size=count)))
    return gather_inputs(
        form=form,
        lengths=tuple(lengths),
        starts=starts,
        page_size=draw(st.sampled_from(page_sizes)),
        latent=draw(st.sampled_from(own_latents)),
        rope=draw(st.sampled_from(own_ropes)),
        cache_dtype=draw(st.sampled_from(cache_dtypes)),
        dtype=draw(st.sampled_from(dtypes)),
        csr=draw(st.sampled_from(csr)),
        strided=0 if form in PACKED_FORMS else draw(st.sampled_from(paddings)),
        seed=draw(st.integers(0, 2**16)),
        device=device,
    )
