"""What two results may be apart, each being within its own budget of the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mla_triton import AttentionState
from mla_triton.testing import (
    Budget,
    DecodeInputs,
    MergeInputs,
    PrefillInputs,
    assert_within_budget,
    budget_of,
    compare,
    merge_budget,
)


def rows(state: AttentionState, chosen: Sequence[int]) -> AttentionState:
    """Of the first dimension."""
    return AttentionState(*(tensor[list(chosen)] for tensor in state))


def assert_is(
    state: AttentionState, truth: AttentionState, inputs: DecodeInputs | PrefillInputs
) -> None:
    """Whether a result over `inputs` is what is known by other means, within their budget."""
    budget = replace(budget_of(inputs), exact=truth)
    report = compare(state, inputs, budget)
    assert report.ok, report.message


def assert_merges_to(
    merged: AttentionState,
    whole: DecodeInputs | PrefillInputs,
    parts: Sequence[DecodeInputs | PrefillInputs],
    states: Sequence[AttentionState],
) -> None:
    """Whether what was merged is the whole, within the budgets of the parts and of the merge.

    Parts err by their budgets, by weight. Where an lse is d off, a weight is off by e^2d at most.
    In float32, where states are kept in what sums are made in, it is within that of the whole, too.
    """
    if whole.dtype == torch.float32:
        assert_within_budget(merged, whole)
    budgets = [budget_of(part) for part in parts]
    exact = budget_of(whole).exact
    own = merge_budget(MergeInputs(tuple(states), None, whole.dtype))
    lse = torch.stack([budget.exact.lse for budget in budgets])
    weights = (lse - exact.lse.nan_to_num(neginf=0.0)).exp()
    off = torch.stack([budget.lse for budget in budgets]).amax(0)
    # A part without keys has no weight, and an out that is not between the others'.
    apart = torch.stack([budget.exact.out for budget in budgets]) - exact.out
    apart = apart * (weights > 0)[..., None]

    def allowed(of_parts: Sequence[torch.Tensor], of_merge: torch.Tensor, reach: torch.Tensor):
        inherited = (weights * torch.stack(list(of_parts))).sum(0) * (2 * off).exp()
        return inherited + of_merge + (2 * off).expm1() * reach

    budget = Budget(
        exact,
        allowed([b.out for b in budgets], own.out, apart.abs().amax((0, -1))),
        allowed([b.out_rms for b in budgets], own.out_rms, apart.square().mean(-1).sqrt().amax(0)),
        off + own.lse,
    )
    report = compare(merged, whole, budget)
    assert report.ok, report.message
