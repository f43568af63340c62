"""Attention of ragged sequences over their own keys and values: the definition, and what a
precision can give.

`prefill` is the oracle. `prefill_same_precision` rounds where any kernel of that precision has to
round and nowhere else, so that its distance from the oracle is the error a kernel cannot avoid.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch

from mla_triton.reference.decode import (
    attend_rounded,
    empty_state,
    full_float32,
    softmax,
    visible_keys,
)
from mla_triton.state import AttentionState


class Sequence(NamedTuple):
    """One sequence of a batch with one of its KV heads, and the query heads that share it."""

    rows: tuple[slice, slice]
    """Its place in the tokens and heads of q, out and lse."""
    query: torch.Tensor
    """`[s_q, heads, qk]`, at least one query."""
    keys: torch.Tensor
    """`[s_k, qk]`, at least one key."""
    values: torch.Tensor
    """`[s_k, v]`"""
    visible: torch.Tensor
    """`[s_q, s_k]` bool: whether a query sees a key."""


def offsets(cu_seqlens: torch.Tensor, tokens: int) -> list[slice]:
    """The rows of each sequence; offsets outside the tokens are moved inside, as kernels do it."""
    bounds = [max(0, min(bound, tokens)) for bound in cu_seqlens.tolist()]
    return [slice(first, max(first, end)) for first, end in pairwise(bounds)]


def sequences(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    causal: bool = True,
    q_rope: torch.Tensor | None = None,
    k_rope: torch.Tensor | None = None,
) -> Iterator[Sequence]:
    """The sequences of a batch that have both queries and keys, KV head after KV head."""
    group = q.shape[1] // k.shape[1]
    places = zip(offsets(cu_seqlens_q, q.shape[0]), offsets(cu_seqlens_k, k.shape[0]), strict=True)
    for queries, keys in places:
        s_q, s_k = queries.stop - queries.start, keys.stop - keys.start
        if not s_q or not s_k:
            continue
        visible = visible_keys(s_q, s_k, causal, k.device)
        for head in range(k.shape[1]):
            heads = slice(head * group, (head + 1) * group)
            query, key = q[queries, heads], k[keys, head]
            if q_rope is not None:
                query = torch.cat([query, q_rope[queries, heads]], dim=-1)
            if k_rope is not None:
                key = torch.cat([key, k_rope[keys]], dim=-1)
            yield Sequence((queries, heads), query, key, v[keys, head], visible)


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    softmax_scale: float,
    causal: bool = True,
    q_rope: torch.Tensor | None = None,
    k_rope: torch.Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> AttentionState:
    """Attention of ragged sequences over their own keys and values.

    Arguments are those of `mla_triton.prefill`. Returns out `[tokens, heads, v]` and lse `[tokens,
    heads]`, both in `compute_dtype`; a row of no sequence is one that sees no key.
    """
    state = empty_state(q, v.shape[-1], compute_dtype, compute_dtype)
    for rows, query, keys, values, visible in sequences(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, causal=causal,
        q_rope=q_rope, k_rope=k_rope,
    ):  # fmt: skip
        weights, lse = softmax(
            query.to(compute_dtype), keys.to(compute_dtype), visible, softmax_scale
        )
        state.out[rows] = weights @ values.to(compute_dtype)
        state.lse[rows] = lse
    return state


def prefill_same_precision(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    softmax_scale: float,
    causal: bool = True,
    q_rope: torch.Tensor | None = None,
    k_rope: torch.Tensor | None = None,
) -> AttentionState:
    """What q's precision can give: the same attention with a kernel's roundings.

    Operands of both products are in q's dtype, sums and softmax in float32; the probabilities,
    largest 1, are rounded to q's dtype before the second product and divided by their sum after it.
    Returns out in q's dtype and lse float32.
    """
    state = empty_state(q, v.shape[-1], q.dtype, torch.float32)

    def operand(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(q.dtype).float()

    with full_float32():
        for rows, query, keys, values, visible in sequences(
            q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, causal=causal,
            q_rope=q_rope, k_rope=k_rope,
        ):  # fmt: skip
            out, lse = attend_rounded(query, keys, values, visible, softmax_scale, operand)
            state.out[rows] = out.to(q.dtype)
            state.lse[rows] = lse
    return state
