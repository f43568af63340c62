"""The merge of attention states: the definition, and what a precision can give."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mla_triton.state import AttentionState


def merge(
    states: Sequence[AttentionState] | AttentionState,
    *,
    mask: torch.Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> AttentionState:
    """Attention over all keys, from the states of attention over parts of them.

    Arguments are those of `mla_triton.merge`. Returns out `[..., heads, value_dim]` and lse
    `[..., heads]`, both in `compute_dtype`.
    """
    outs, lses = stacked(states, compute_dtype)
    # Of empty states alone the largest is -inf, and -inf less itself no number.
    largest = lses.amax(0).clamp_min(torch.finfo(compute_dtype).min)
    weights = (lses - largest).exp()
    is_empty = lses == float("-inf")
    # What an empty state holds is nobody's result: 0 x NaN would make it everybody's.
    values = outs.masked_fill(is_empty[..., None], 0.0)
    total = weights.sum(0)
    out = (weights[..., None] * values).sum(0) / total.masked_fill(is_empty.all(0), 1.0)[..., None]
    lse = largest + total.log()
    if mask is not None:
        merged = mask[..., None]
        out, lse = torch.where(merged[..., None], out, outs[0]), torch.where(merged, lse, lses[0])
    return AttentionState(out, lse)


def merge_same_precision(
    states: Sequence[AttentionState] | AttentionState,
    *,
    mask: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> AttentionState:
    """What float32 can give: the same merge in it, and out rounded once, to `dtype`.

    That is the first state's by default. lse is float32.
    """
    if dtype is None:
        dtype = states.out.dtype if isinstance(states, AttentionState) else states[0].out.dtype
    merged = merge(states, mask=mask, compute_dtype=torch.float32)
    return AttentionState(merged.out.to(dtype), merged.lse)


def stacked(
    states: Sequence[AttentionState] | AttentionState, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out `[n, ..., heads, value_dim]`, lse `[n, ..., heads]`) of n states, in `dtype`."""
    if isinstance(states, AttentionState):
        return states.out.to(dtype), states.lse.to(dtype)
    return (
        torch.stack([state.out.to(dtype) for state in states]),
        torch.stack([state.lse.to(dtype) for state in states]),
    )
