"""How far a kernel may be from the truth: a budget for every row, derived from the problem itself.

A row is one (query, head). Its budget is twice the sum of

* the error of the same-precision run (`mla_triton.reference.decode_same_precision`, or
  `merge_same_precision`) in that row,
* one rounding of the output,
* what another order of float32 operations can do to that row. The same-precision run is one draw of
  those roundings and the kernel another, so a row where the run was lucky must not condemn the
  kernel. This part follows the probabilistic model of Higham and Mary (2019): n roundings of size u
  at magnitude m add up to sqrt(n) * u * m. It matters for float32 and for logits in the hundreds;
  beside the rounding of 16-bit operands it vanishes.

The error of `out` is judged twice, by its largest element and by its root mean square; there the
three add up in quadrature, as independent errors do. A small error in every element shows in the
second first. `mla_triton.testing.comparison` judges; `docs/accuracy.md` has the derivation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla_triton import reference
from mla_triton.reference.decode import requests, softmax
from mla_triton.reference.merge import stacked
from mla_triton.reference.prefill import sequences
from mla_triton.state import AttentionState
from mla_triton.testing.merges import MergeInputs
from mla_triton.testing.prefill_problems import PrefillInputs
from mla_triton.testing.problems import DecodeInputs

Inputs = DecodeInputs | MergeInputs | PrefillInputs

FACTOR = 2
FLOAT32 = torch.finfo(torch.float32).eps / 2
"""Largest relative error of one rounding to float32."""

LOGIT_ROUNDINGS = 6
"""Operations that each round at the magnitude of a logit or lse, and in the same direction for all
keys, so that they add up: the factor scale * log2(e), the product with it, the difference to the
running maximum, the lse of a part, the difference of two such, and the way back to base e."""
EXP2_ROUNDINGS = 8
"""A weight takes two exponentials, its own and that of a rescaling, each within 2 units in the last
place (CUDA C++ Programming Guide, ex2.approx), which are 4 roundings."""
DIFFERENCE_ROUNDINGS = 3
"""Operations of a merge that each round at the magnitude of a difference of two lse: it, the factor
log2(e) of its exponential and the product with that."""
LOG_ROUNDINGS = 4
"""A logarithm of a sum of weights, within 2 units in the last place of a number below 2."""
DIVISION_ROUNDINGS = 2
"""A reciprocal and the product with it."""


@dataclass(frozen=True)
class Budget:
    """The truth about a problem, and how far from it each row may be."""

    exact: AttentionState
    """The float64 oracle."""
    out: torch.Tensor
    """`[..., heads]`: largest error of an element."""
    out_rms: torch.Tensor
    """`[..., heads]`: root mean square of the errors of a row."""
    lse: torch.Tensor
    """`[..., heads]`"""


def decode_budget(inputs: DecodeInputs, *, allow_tf32: bool = False) -> Budget:
    """The oracle and the error budget of a problem, both on the device of `inputs`."""
    arguments, options = inputs.call_arguments()
    exact = reference.decode(*arguments, **options)
    same = reference.decode_same_precision(*arguments, **options, allow_tf32=allow_tf32)
    order = AttentionState(torch.zeros_like(exact.out), torch.zeros_like(exact.lse))
    softmax_scale = options.pop("softmax_scale")
    for rows, query, keys, visible in requests(*arguments, **options):
        values = keys[:, : inputs.value_dim or inputs.q_nope.shape[-1]]
        order.out[rows], order.lse[rows] = _reordering(query, keys, values, visible, softmax_scale)
    return _budget(exact, same, order)


def prefill_budget(inputs: PrefillInputs) -> Budget:
    """The same of a prefill."""
    arguments, options = inputs.call_arguments()
    exact = reference.prefill(*arguments, **options)
    same = reference.prefill_same_precision(*arguments, **options)
    order = AttentionState(torch.zeros_like(exact.out), torch.zeros_like(exact.lse))
    softmax_scale = options.pop("softmax_scale")
    for rows, query, keys, values, visible in sequences(*arguments, **options):
        order.out[rows], order.lse[rows] = _reordering(query, keys, values, visible, softmax_scale)
    return _budget(exact, same, order)


def merge_budget(inputs: MergeInputs) -> Budget:
    """The same of a merge."""
    (states,), options = inputs.call_arguments()
    exact = reference.merge(states, **options)
    same = reference.merge_same_precision(states, **options, dtype=inputs.dtype)
    return _budget(exact, same, _reordering_of_merge(inputs, exact))


def budget_of(inputs: Inputs) -> Budget:
    """The oracle and the budget of the operation that the inputs are for."""
    if isinstance(inputs, MergeInputs):
        return merge_budget(inputs)
    return decode_budget(inputs) if isinstance(inputs, DecodeInputs) else prefill_budget(inputs)


def _budget(exact: AttentionState, same: AttentionState, order: AttentionState) -> Budget:
    """The budget from the oracle, the same-precision run, and what another order can change."""
    error, truth = difference(same.out, exact.out), finite(exact.out)
    unit = torch.finfo(same.out.dtype).eps / 2
    # A rounding is at most one unit; spread evenly, its mean square is a third of that squared.
    largest = error.amax(-1) + unit * truth.abs().amax(-1) + order.out.amax(-1)
    rounding = unit / 3**0.5 * rms(truth)
    mean_square = rms(error).square() + rounding.square() + rms(order.out).square()
    lse = difference(same.lse, exact.lse) + FLOAT32 * finite(exact.lse).abs() + order.lse
    return Budget(exact, FACTOR * largest, FACTOR * mean_square.sqrt(), FACTOR * lse)


def _reordering(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What another order of float32 operations can change, of `out` per element and of `lse`.

    Of one request: `[s_q, heads, d]` queries over the `[n, d]` keys that these heads share.
    """
    query, keys, values = query.double(), keys.double(), values.double()
    weights, lse = softmax(query, keys, visible, softmax_scale)
    out, reach = weights @ values, lse.nan_to_num(0.0, neginf=0.0).abs()[..., None]

    # A partial sum of a logit has come as far as the logit and strays as far as its terms in
    # quadrature.
    logits = query @ keys.T * softmax_scale
    stray = (query.square() @ keys.T.square()).sqrt() * softmax_scale
    sums = keys.shape[1] ** 0.5 * (logits.square() + stray.square()).sqrt()
    logit_error = FLOAT32 * (sums + LOGIT_ROUNDINGS * (logits.abs() + reach) + EXP2_ROUNDINGS)

    # Common shifts of all logits cancel in out, the rest is independent from key to key.
    moved = (weights * logit_error).square()
    spread = moved @ values.square() - 2 * out * (moved @ values)
    spread += out.square() * moved.sum(-1, keepdim=True)
    drift = out.square() + weights.square() @ values.square()
    additions = keys.shape[0]
    independent = (spread.clamp_min(0) + additions * FLOAT32**2 * drift).sqrt()
    lse_change = (weights * logit_error).sum(-1) + FLOAT32 * additions**0.5

    # Equal terms round alike: over a sum that grows to what they have in common, an average of half
    # of it, their roundings add up one by one.
    alike = FLOAT32 * additions / 2 * _common_weight(weights, visible)
    out_change = independent + alike[..., None] * _common_value(values)
    return out_change, (lse_change + alike).masked_fill(lse == float("-inf"), 0.0)


def _reordering_of_merge(inputs: MergeInputs, exact: AttentionState) -> AttentionState:
    """The same of a merge, in which a state is what a key is in a decode."""
    outs, lses = stacked(inputs.given, torch.float64)
    is_empty = lses == float("-inf")
    values = finite(outs.masked_fill(is_empty[..., None], 0.0))
    largest = lses.amax(0).clamp_min(torch.finfo(torch.float64).min)
    weights = (lses - largest).exp()
    weights = finite(weights / weights.sum(0).masked_fill(is_empty.all(0), 1.0))
    below = finite(lses - largest).abs()
    weight_error = FLOAT32 * (DIFFERENCE_ROUNDINGS * below + EXP2_ROUNDINGS)
    out, additions = finite(exact.out), len(lses)
    moved = (weights * weight_error)[..., None] * (values - out)
    drift = out.square() + (weights[..., None] * values).square().sum(0)
    roundings = additions + DIVISION_ROUNDINGS
    independent = (moved.square().sum(0) + roundings * FLOAT32**2 * drift).sqrt()

    alike = FLOAT32 * additions / 2 * additions * weights.amin(0)
    common = torch.maximum(values.amin(0), -values.amax(0)).clamp_min(0)
    lse = (weights * weight_error).sum(0) + FLOAT32 * (additions**0.5 + LOG_ROUNDINGS) + alike
    if inputs.mask is not None:
        lse = lse.masked_fill(~inputs.mask[..., None], 0.0)
    out_change = independent + alike[..., None] * common
    return AttentionState(out_change, lse.masked_fill(is_empty.all(0), 0.0))


def _common_weight(weights: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """`[s_q, heads]`: the weight all visible keys would have if each had that of the least."""
    least = weights.masked_fill(~visible[:, None, :], float("inf")).amin(-1)
    count = visible.sum(-1)[:, None]
    return torch.where(count > 0, count * least, 0.0)


def _common_value(values: torch.Tensor) -> torch.Tensor:
    """`[value_dim]`: what is in every value, in absolute terms; 0 where signs differ."""
    return torch.maximum(values.amin(0), -values.amax(0)).clamp_min(0)


def difference(got: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """|got - truth| in float64, 0 where both are the same infinity or NaN."""
    return (finite(got.double()) - finite(truth)).abs()


def finite(tensor: torch.Tensor) -> torch.Tensor:
    return torch.where(tensor.isfinite(), tensor, 0.0)


def rms(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.square().mean(-1).sqrt()
