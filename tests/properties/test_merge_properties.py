"""What holds of a merge whatever its numbers.

Bit for bit: an empty state changes nothing, wherever it stands and whatever it holds (its weight is
0, and 0 is added); rows do not know of each other, so that some rows, rows in another order and NaN
in another row are of no matter; values scaled by a power of two.

Within the budgets: the order of states, merges of merges, and the parts of a decode, because sums
are made in another order; a shift of all lse, because float32 rounds it. That any partition of keys
is the whole is shown of the reference in float64, to its own roundings.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import bounds
import torch
from executions import (
    DEVICE,
    Execution,
    Shape,
    examples,
    executions,
    merge,
    over,
    reproduction,
    seeds,
)
from hypothesis import given
from hypothesis import strategies as st

from mla_triton import AttentionState, reference
from mla_triton.problem import MOST_APART
from mla_triton.reference.decode import softmax, visible_keys
from mla_triton.testing import (
    MergeInputs,
    assert_same_bits,
    assert_within_budget,
    decode_inputs,
    merge_budget,
    merge_inputs,
)

SHAPES: tuple[Shape, ...] = (
    {"states": 2, "heads": 16, "value_dim": 512, "dtype": torch.bfloat16},
    {"states": 5, "heads": 3, "value_dim": 24, "dtype": torch.float32},
    {"states": MOST_APART, "heads": 5, "value_dim": 128, "dtype": torch.float16},
    {"states": 3, "heads": 2, "value_dim": 7, "dtype": torch.bfloat16}
    | {"first_dtype": torch.float32},
    {"states": 11, "heads": 2, "value_dim": 96, "dtype": torch.float32, "stacked": True},
    {"states": 4, "heads": 3, "value_dim": 64, "dtype": torch.float16, "stacked": True}
    | {"strided": True},
)
EVERY = [
    (execution, shape)
    for execution in executions()
    for shape in (SHAPES[::2] if execution.label else SHAPES)
]
EXAMPLES = examples(EVERY)


@st.composite
def problems(draw: st.DrawFn, shape: Shape, **fixed: Any) -> MergeInputs:
    drawn = {
        "tokens": (draw(st.integers(1, 9)),),
        "empty": draw(st.sampled_from([0.3, 0.0, 1.0])),
        "spread": draw(st.sampled_from(["near", "far", "equal"])),
        "level": draw(st.sampled_from([0.0, 900.0, -900.0])),
        "seed": draw(seeds()),
    }
    return merge_inputs(**(drawn | fixed), **shape, device=DEVICE)


def run(inputs: MergeInputs, execution: Execution) -> AttentionState:
    return merge(inputs.given, execution, **inputs.output_buffers())


def with_states(inputs: MergeInputs, states: Sequence[AttentionState]) -> MergeInputs:
    """Other states, in a stack if there was one."""
    if inputs.is_stack:
        stack = (torch.stack(tensors) for tensors in zip(*states, strict=True))
        states = [*map(AttentionState, *stack)]
    return replace(inputs, states=tuple(states))


# -- bit for bit


@over(pair for pair in EVERY if pair[1].get("stacked"))
@EXAMPLES
@given(data=st.data())
def test_empty_states_are_neutral(execution, shape, data):
    """Of a stack: one of more than so many states is walked through in groups."""
    inputs = data.draw(problems(shape))
    place = data.draw(st.integers(0, len(inputs.states)))
    content = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 7.0]))
    reproduction(inputs, f"an empty state of {content} at {place}", execution)
    first = inputs.states[0]
    empty = AttentionState(
        torch.full_like(first.out, content), torch.full_like(first.lse, -torch.inf)
    )
    states = [*inputs.states]
    # In place of a state there is one that has no weight, so that sums have the same terms.
    before = [*states[:place], empty, *states[place + 1 :]]
    emptied = [AttentionState(first.out * 0, empty.lse) if s is empty else s for s in before]
    got = run(with_states(inputs, before), execution)
    assert_same_bits(got, run(with_states(inputs, emptied), execution))
    states.insert(place, empty)
    assert_within_budget(run(with_states(inputs, states), execution), inputs)


@over(pair for pair in EVERY if pair[1] in SHAPES[:2])
@EXAMPLES
@given(data=st.data())
def test_an_empty_state_beside_one_is_that_one(execution, shape, data):
    inputs = data.draw(problems(shape, empty=0.0))
    one = inputs.states[0]
    place = data.draw(st.integers(0, 1))
    reproduction(inputs, f"merge(its first state, with an empty one at {place})", execution)
    states = [one]
    nothing = torch.full_like(one.out, float("nan")), torch.full_like(one.lse, -torch.inf)
    states.insert(place, AttentionState(*nothing))
    assert_same_bits(merge(states, execution), one)


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_rows_do_not_know_of_each_other(execution, shape, data):
    """Some of the rows in any order, while another is NaN."""
    inputs = data.draw(problems(shape))
    tokens = data.draw(st.permutations(range(inputs.states[0].lse.shape[0])))
    reproduction(inputs, f"tokens {tokens}, the last of them NaN", execution)
    *chosen, broken = tokens
    expected = run(inputs, execution)
    states = [bounds.rows(state, tokens) for state in inputs.states]
    states[0].out[-1], states[0].lse[-1] = float("nan"), float("nan")
    got = run(with_states(inputs, states), execution)
    assert_same_bits(bounds.rows(got, range(len(chosen))), bounds.rows(expected, chosen))
    assert got.lse[-1].isnan().all()
    assert got.out[-1].isnan().all(), broken


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_values_may_be_scaled(execution, shape, data):
    """By powers of two; elements of out that are not normal numbers are left out, and the smallest
    that is one, which may be rounded from one that is not."""
    inputs = data.draw(problems(shape))
    exponent = data.draw(st.integers(1, 4))
    reproduction(inputs, f"out * 2**{exponent}", execution)
    larger = [state._replace(out=state.out * 2**exponent) for state in inputs.states]
    plain, got = run(inputs, execution), run(with_states(inputs, larger), execution)
    normal = plain.out.abs() > torch.finfo(inputs.dtype).tiny
    assert torch.equal((plain.out * 2**exponent)[normal], got.out[normal])
    assert torch.equal(plain.lse, got.lse)


# -- within the budget


@over(pair for pair in EVERY if "first_dtype" not in pair[1])
@EXAMPLES
@given(data=st.data())
def test_the_order_of_states_is_of_no_matter(execution, shape, data):
    inputs = data.draw(problems(shape))
    order = data.draw(st.permutations(range(len(inputs.states))))
    reproduction(inputs, f"states {order}", execution)
    turned = with_states(inputs, [inputs.states[n] for n in order])
    assert_within_budget(run(turned, execution), inputs)


@over(EVERY)
@EXAMPLES
@given(data=st.data())
def test_a_shift_of_all_lse(execution, shape, data):
    """The same out, and an lse that is shifted as far."""
    inputs = data.draw(problems(shape, level=0.0))
    by = float(data.draw(st.integers(-900, 900)))
    reproduction(inputs, f"lse + {by}", execution)
    moved = [state._replace(lse=state.lse.double() + by) for state in inputs.states]
    # float32 rounds a sum: what is merged is the rounded one, and the truth is about that.
    rounded = [state._replace(lse=state.lse.float()) for state in moved]
    level = [s._replace(lse=s.lse.double() - by) for s in rounded]
    exact = reference.merge(level)
    got = run(with_states(inputs, rounded), execution)
    budget = replace(
        merge_budget(with_states(inputs, rounded)), exact=exact._replace(lse=exact.lse + by)
    )
    assert_within_budget(got, inputs, budget)


@over(pair for pair in EVERY if pair[1]["dtype"] == torch.float32)
@EXAMPLES
@given(data=st.data())
def test_merging_is_associative_within_rounding(execution, shape, data):
    """Some of the states first: as far from the truth as the two merges may be together."""
    inputs = data.draw(problems(shape))
    states = inputs.states
    size = data.draw(st.sampled_from((2, min(len(states) - 1, MOST_APART))))
    reproduction(inputs, f"merge(merge(states[:{size}]), *states[{size}:])", execution)
    first = MergeInputs(states[:size], None, torch.float32)
    stack = [run(first, execution), *states[size:]]
    dense = [*map(AttentionState, *(torch.stack(kind) for kind in zip(*stack, strict=True)))]
    outer = MergeInputs(tuple(dense), None, torch.float32, is_stack=True)
    nested, exact = run(outer, execution), reference.merge(inputs.given)
    inner_budget, outer_budget = merge_budget(first), merge_budget(outer)
    values = torch.stack([s.out.double() for s in states]).nan_to_num(0.0)
    reach = 2 * values.abs().amax((0, -1))
    # An error of the inner lse moves weight between values as far apart as `reach`.
    allowed = inner_budget.out + outer_budget.out + inner_budget.lse * reach
    assert torch.equal(nested.lse == -torch.inf, exact.lse == -torch.inf)
    assert ((nested.out.double() - exact.out).abs().amax(-1) <= allowed).all()
    off = (nested.lse.double() - exact.lse).abs().nan_to_num(0.0)
    assert (off <= inner_budget.lse + outer_budget.lse).all()


@over(
    (execution, {"dtype": dtype, "parts": parts})
    for execution in executions()
    for dtype, parts in ((torch.float16, 2), (torch.bfloat16, 7), (torch.float32, 4))
)
@EXAMPLES
@given(data=st.data())
def test_the_parts_of_a_decode_are_the_whole(execution, shape, data):
    """Each request's pages in several runs, decoded apart by the oracle; partial results are
    float32 as the kernels' own are, and the result is in the dtype of the whole."""
    page_size, cut = 16, shape["parts"] - 1
    cuts = data.draw(st.lists(st.integers(0, 7), min_size=cut, max_size=cut))
    inputs = decode_inputs(
        kv_lens=data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=3)), heads=3,
        latent=32, rope=16, page_size=page_size, dtype=shape["dtype"], causal=False,
        seed=data.draw(seeds()), device=DEVICE,
    )  # fmt: skip
    reproduction(inputs, f"merge(its pages cut at {cuts})", execution)
    (q_nope, q_rope, cache, table, lengths), options = inputs.call_arguments()
    places = [0, *sorted(min(cut, table.shape[1]) for cut in cuts), table.shape[1]]
    parts = []
    for begin, end in itertools.pairwise(places):
        left = lengths - begin * page_size
        exact = reference.decode(q_nope, q_rope, cache, table[:, begin:end], left, **options)
        parts.append(AttentionState(exact.out.float(), exact.lse.float()))
    merged = merge(parts, execution, **inputs.output_buffers())
    assert_within_budget(merged, inputs)


# -- the reference


@given(st.integers(0, 70), st.integers(2, 9), st.booleans(), st.integers(0, 2**16))
def test_any_partition_of_the_keys_is_the_whole(length, count, causal, seed):
    """Each key belongs to a part by chance. By PyTorch alone, in float64: to its own roundings."""
    s_q, heads, width = 3, 2, 24
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(s_q, heads, width, generator=generator, dtype=torch.float64)
    keys = torch.randn(length, width, generator=generator, dtype=torch.float64)
    owner = torch.randint(count, (length,), generator=generator)
    visible = visible_keys(s_q, length, causal, keys.device)

    def attend(chosen: torch.Tensor) -> AttentionState:
        weights, lse = softmax(query, keys[chosen], visible[:, chosen], 1.0)
        return AttentionState(weights @ keys[chosen], lse)

    parts = [attend(owner == part) for part in range(count)]
    whole = attend(torch.ones(length, dtype=torch.bool))
    torch.testing.assert_close(reference.merge(parts), whole)
