"""`flashinfer.cascade`: merges of attention states whose lse is to base 2."""

from __future__ import annotations

import torch

import mla_triton
from mla_triton import AttentionState
from mla_triton.compat.conventions import check_rank, check_tensors, natural, to_base_2

__all__ = ["merge_state", "merge_state_in_place", "merge_states"]


def merge_state(
    v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two states of the same queries over disjoint keys, as one.

    Args:
        v_a, v_b: `[tokens, heads, head_dim]` float16, bfloat16 or float32.
        s_a, s_b: `[tokens, heads]`, base-2 logarithms. A state with -inf is empty, and counts for
            nothing.

    Returns:
        v in v_a's dtype, and s float32; of empty states alone 0 and -inf.

    Raises TypeError and ValueError as `mla_triton.merge` does.
    """
    check_tensors(s_a=s_a, s_b=s_b)
    merged = mla_triton.merge(
        [AttentionState(v_a, natural(s_a)), AttentionState(v_b, natural(s_b))]
    )
    return merged.out, to_base_2(merged.lse)


def merge_state_in_place(
    v: torch.Tensor,
    s: torch.Tensor,
    v_other: torch.Tensor,
    s_other: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> None:
    """The same, into `v` and `s`; where `mask` `[tokens]` is False they stay, bit for bit."""
    check_tensors(s=s, s_other=s_other)
    mask = None if mask is None else mask.bool()
    merged = mla_triton.merge(
        [AttentionState(v, natural(s)), AttentionState(v_other, natural(s_other))],
        mask=mask,
        out=v,
    )
    lse = to_base_2(merged.lse)
    s.copy_(lse if mask is None else torch.where(mask[:, None], lse, s))


def merge_states(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Any number of states, side by side in `v` `[tokens, states, heads, head_dim]` and `s`
    `[tokens, states, heads]`, as one; also none, which is an empty state."""
    check_tensors(v=v, s=s)
    check_rank("v", v, "tokens, states, heads, head_dim")
    check_rank("s", s, "tokens, states, heads")
    if v.shape[1] < 2:
        # A sum of one or none, in which what an empty state holds does not count.
        out = v.masked_fill(s.isneginf()[..., None], 0.0).sum(1)
        return out, s.float().logsumexp(1)
    stack = AttentionState(v.movedim(1, 0), natural(s).movedim(1, 0))
    merged = mla_triton.merge(stack)
    return merged.out, to_base_2(merged.lse)
