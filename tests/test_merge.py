"""Merge: within the budget of two oracles, whatever the states, their layout and what is empty."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mla_triton
from mla_triton import AttentionState, memory, reference, validate_merge
from mla_triton import device as devices
from mla_triton.kernels.portable import merge as portable
from mla_triton.testing import (
    MergeInputs,
    assert_within_budget,
    compare,
    merge_inputs,
    same_bits,
    untouched_padding,
)
from mla_triton.testing.strategies import merge_problems

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INF = float("inf")


def merge(inputs: MergeInputs, **options: Any) -> AttentionState:
    (states,), own = inputs.call_arguments()
    return mla_triton.merge(states, **own, **options)


# -- the definition


def naive(states: Sequence[AttentionState]) -> AttentionState:
    """A loop over rows and states in Python's own numbers."""
    out, lse = states[0].out.double().clone(), states[0].lse.double().clone()
    for row in itertools.product(*map(range, lse.shape)):
        weights = [torch.exp(state.lse[row].double()).item() for state in states]
        total = sum(weights)
        lse[row] = torch.tensor(total, dtype=torch.float64).log()
        out[row] = 0
        for state, weight in zip(states, weights, strict=True):
            if weight:
                out[row] += state.out[row].double() * weight / total
    return AttentionState(out, lse)


def test_the_reference_is_the_formula():
    inputs = merge_inputs(states=4, tokens=(2, 3), heads=2, value_dim=5, dtype=torch.float32)
    expected, got = naive(inputs.states), reference.merge(inputs.states)
    torch.testing.assert_close(got, expected)


# -- within the budget


@settings(max_examples=80)
@given(merge_problems(out_dtypes=[None]))
def test_merges_are_within_their_budget(inputs):
    assert_within_budget(merge(inputs), inputs)


@settings(max_examples=30)
@given(merge_problems())
def test_the_reference_runs_the_same_calls(inputs):
    got = merge(inputs, impl="reference")
    exact = reference.merge(inputs.given, mask=inputs.mask)
    expected = AttentionState(exact.out.to(inputs.states[0].out.dtype), exact.lse.float())
    assert same_bits(got, expected)


FAULTS: dict[str, Callable[[MergeInputs], AttentionState]] = {
    "a state is lost": lambda i: mla_triton.merge(i.given[:-1]),
    "lse in base 2": lambda i: state_of(merge(i).out, merge(i).lse * 1.4426950408889634),
    "weights in base 2": lambda i: state_of(
        mla_triton.merge([s._replace(lse=s.lse * 0.6931471805599453) for s in i.given]).out,
        merge(i).lse,
    ),
    "two states are swapped": lambda i: mla_triton.merge(
        [AttentionState(a.out, b.lse) for a, b in zip(i.given, reversed(i.given), strict=True)]
    ),
    "the mean": lambda i: state_of(torch.stack([s.out for s in i.given]).mean(0), merge(i).lse),
    "lse 0.01 off": lambda i: state_of(merge(i).out, merge(i).lse + 0.01),
    "a row not written": lambda i: state_of(merge(i).out.index_fill(0, torch.tensor([1]), INF)),
}


def state_of(out: torch.Tensor, lse: torch.Tensor | None = None) -> AttentionState:
    return AttentionState(out, torch.zeros(out.shape[:-1]) if lse is None else lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_budget_rejects(fault, dtype):
    inputs = merge_inputs(states=3, heads=4, value_dim=64, dtype=dtype, empty=0.0)
    assert compare(merge(inputs), inputs).ok
    assert not compare(FAULTS[fault](inputs), inputs).ok


def test_the_budget_rejects_sums_in_bfloat16():
    inputs = merge_inputs(states=8, heads=16, value_dim=64, dtype=torch.float32, empty=0.0)
    states = [AttentionState(s.out.bfloat16(), s.lse) for s in inputs.states]
    rounded = mla_triton.merge(states, out=torch.empty_like(inputs.states[0].out))
    assert not compare(rounded, inputs).ok


# -- empty states, and strange ones


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 1, 4])
def test_empty_states_are_neutral_to_the_bit(place, dtype, device):
    """Whatever an empty state holds: what is not empty comes out as it went in."""
    tokens, heads, value = 6, 3, 40
    alone = AttentionState(
        torch.randn(tokens, heads, value, device=device).to(dtype),
        torch.randn(tokens, heads, device=device) * 100,
    )
    strange = [float("nan"), INF, -INF, 7.0]
    states = [
        AttentionState(torch.full_like(alone.out, what), torch.full_like(alone.lse, -INF))
        for what in strange
    ]
    states.insert(place, alone)
    assert same_bits(mla_triton.merge(states), alone)
    stack = AttentionState(*(torch.stack(tensors) for tensors in zip(*states, strict=True)))
    assert same_bits(mla_triton.merge(stack), alone)


@pytest.mark.parametrize("states", [2, 8, 11])
@pytest.mark.parametrize("impl", [None, "reference"])
def test_empty_states_alone_stay_empty(impl, states, device):
    inputs = merge_inputs(states=states, heads=3, value_dim=24, empty=1.0, stacked=True)
    merged = merge(inputs.to(device), impl=impl)
    assert (merged.out == 0).all()
    assert (merged.lse == -INF).all()


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("strange", [float("nan"), INF])
@pytest.mark.parametrize("place", [0, 1, 2, 9])
def test_a_strange_lse_is_of_its_row_alone(place, strange, impl, device):
    """NaN, and +inf, which is no sum of finite logits: the row is NaN, all others are right."""
    inputs = merge_inputs(states=10, heads=3, value_dim=24, stacked=True, device=device)
    inputs.states[place].lse[2, 1] = strange
    merged = merge(inputs, impl=impl)
    assert merged.lse[2, 1].isnan()
    assert merged.out[2, 1].isnan().all()
    merged.lse[2, 1] = merged.out[2, 1] = 0.0
    assert not merged.lse.isnan().any()
    assert not merged.out.isnan().any()


@pytest.mark.parametrize("impl", [None, "reference"])
def test_a_nan_in_a_state_that_counts_is_of_its_element_alone(impl, device):
    inputs = merge_inputs(heads=3, value_dim=24, empty=0.0, device=device)
    inputs.states[1].out[2, 1, 5] = float("nan")
    merged = merge(inputs, impl=impl)
    assert merged.out[2, 1, 5].isnan()
    assert int(merged.out.isnan().sum()) == 1
    assert not merged.lse.isnan().any()


# -- masks


@settings(max_examples=30)
@given(merge_problems(masked=[True], out_dtypes=[None]))
def test_where_the_mask_is_false_the_first_state_stays_as_it_is(inputs):
    merged, first = merge(inputs), inputs.states[0]
    kept = ~inputs.mask
    assert same_bits(
        AttentionState(*(t[kept] for t in merged)), AttentionState(*(t[kept] for t in first))
    )
    plain = merge(replace(inputs, mask=None))
    assert same_bits(
        AttentionState(*(t[inputs.mask] for t in merged)),
        AttentionState(*(t[inputs.mask] for t in plain)),
    )


def test_a_mask_may_have_any_strides(device):
    inputs = merge_inputs(tokens=(4, 3), heads=2, value_dim=16, masked=True, device=device)
    expected = merge(inputs)
    spaced = inputs.mask.mT.contiguous().mT
    wide = torch.stack([inputs.mask, ~inputs.mask], -1)[..., 0]
    for mask in (spaced, wide):
        assert same_bits(merge(replace(inputs, mask=mask)), expected)
    row = torch.tensor([True, False, True], device=device).expand(4, 3)
    dense = merge(replace(inputs, mask=row.contiguous()))
    assert same_bits(merge(replace(inputs, mask=row)), dense)


# -- where things lie


@settings(max_examples=40)
@given(merge_problems(out_dtypes=[None], first_dtypes=[None]), st.data())
def test_in_place_is_as_apart(inputs, data):
    """In place of any state; padding between rows, and the other states, are left alone."""
    place = data.draw(st.integers(0, len(inputs.states) - 1))
    expected = merge(inputs)
    others = [AttentionState(*(t.clone() for t in s)) for s in inputs.states]
    own = inputs.states[place]
    merged = merge(inputs, out=own.out, lse=own.lse)
    assert merged.out is own.out
    assert merged.lse is own.lse
    assert same_bits(merged, expected)
    for at, (state, before) in enumerate(zip(inputs.states, others, strict=True)):
        assert at == place or same_bits(state, before)
    if inputs.padding and not inputs.is_stack:
        assert untouched_padding(own.out)
        assert untouched_padding(own.lse)


def test_out_and_lse_may_be_in_place_of_different_states(device):
    inputs = merge_inputs(states=3, heads=5, value_dim=24, device=device)
    expected = merge(inputs)
    merged = merge(inputs, out=inputs.states[2].out, lse=inputs.states[1].lse)
    assert same_bits(merged, expected)


@settings(max_examples=30)
@given(merge_problems())
def test_buffers_are_written_and_nothing_around_them(inputs):
    buffers = inputs.output_buffers()
    merged = merge(inputs, **buffers)
    assert merged.out is buffers["out"]
    assert merged.lse is buffers["lse"]
    assert_within_budget(merged, inputs)
    assert untouched_padding(merged.out)
    assert untouched_padding(merged.lse)


def test_interleaved_states_may_be_merged_in_place(device):
    """States side by side in one tensor, `[tokens, states, heads, value]`, share no memory."""
    inputs = merge_inputs(states=3, heads=2, value_dim=16, device=device)
    expected = merge(inputs)
    outs = torch.stack([s.out for s in inputs.states], 1)
    lses = torch.stack([s.lse for s in inputs.states], 1)
    stack = AttentionState(outs.movedim(1, 0), lses.movedim(1, 0))
    assert same_bits(mla_triton.merge(stack), expected)
    merged = mla_triton.merge(stack, out=outs[:, 0], lse=lses[:, 0])
    assert same_bits(merged, expected)
    states = [AttentionState(outs[:, n], lses[:, n]) for n in range(1, 3)]
    again = mla_triton.merge(states, out=outs[:, 0], lse=lses[:, 0])
    assert same_bits(again, mla_triton.merge(inputs.states[1:]))


def test_the_heads_of_an_lse_may_come_first(device):
    """As vLLM lays it out: `[heads, tokens]`."""
    inputs = merge_inputs(tokens=(6,), heads=4, value_dim=16, device=device)
    turned = tuple(s._replace(lse=s.lse.mT.contiguous().mT) for s in inputs.states)
    assert same_bits(merge(replace(inputs, states=turned)), merge(inputs))


def test_a_slice_of_query_tokens(device):
    """Rows in three dimensions that no tensor lets be one."""
    inputs = merge_inputs(tokens=(3, 4), heads=2, value_dim=16, device=device)
    some = tuple(AttentionState(s.out[:, 1:3], s.lse[:, 1:3]) for s in inputs.states)
    whole = merge(inputs)
    got = merge(replace(inputs, states=some))
    assert same_bits(got, AttentionState(whole.out[:, 1:3], whole.lse[:, 1:3]))


def test_a_state_may_be_merged_with_itself(device):
    inputs = merge_inputs(heads=2, value_dim=16, dtype=torch.float32, device=device)
    one = inputs.states[0]
    twice = mla_triton.merge([one, one])
    assert_within_budget(twice, replace(inputs, states=(one, one)))
    expanded = AttentionState(one.out.expand(9, *one.out.shape), one.lse.expand(9, *one.lse.shape))
    many = mla_triton.merge(expanded)
    assert_within_budget(many, replace(inputs, states=(one,) * 9))


@settings(max_examples=25)
@given(merge_problems())
def test_equal_bits_run_to_run(inputs):
    assert same_bits(merge(inputs), merge(inputs))


def test_a_stack_is_its_states(device):
    inputs = merge_inputs(states=5, heads=3, value_dim=24, stacked=True, device=device)
    assert same_bits(mla_triton.merge(inputs.given), mla_triton.merge(inputs.states))


# -- layouts, as the host sees them


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.data())
def test_collapsing_keeps_every_row(sizes, data):
    """Row after row, at the same elements as before."""
    storage = torch.arange(4**7).reshape([4] * 7)
    axes = data.draw(st.permutations(range(len(sizes))))
    tensors = [torch.zeros(sizes), storage[(0,) * (7 - len(sizes))].permute(axes)]
    tensors[1] = tensors[1][tuple(slice(0, size) for size in sizes)]
    strides = [tensor.stride() for tensor in tensors]
    fewer, collapsed = validate_merge.collapse(sizes, strides)
    assert len(fewer) <= len(sizes)
    for old, new in zip(strides, collapsed, strict=True):
        assert places(sizes, old) == places(fewer, new)


def places(sizes: Sequence[int], strides: Sequence[int]) -> list[int]:
    return [
        sum(i * step for i, step in zip(index, strides, strict=True))
        for index in itertools.product(*map(range, sizes))
    ]


def test_plain_states_are_one_line_of_rows():
    inputs = merge_inputs(tokens=(3, 4), heads=5, value_dim=16)
    outs, lses = validate_merge.unpack(inputs.given)
    found = validate_merge.merge(outs, lses, None, *inputs.output_buffers().values())
    assert (found.problem.rank, found.problem.rows, found.problem.aligned) == (1, 60, True)
    mask = torch.ones(3, 4, dtype=torch.bool)
    masked = validate_merge.merge(outs, lses, mask, *inputs.output_buffers().values())
    assert (masked.problem.rank, masked.problem.masked) == (2, True)


@pytest.mark.parametrize("broken", ["address", "rows", "step"])
def test_alignment_is_found(broken):
    inputs = merge_inputs(
        heads=2, value_dim=16, stacked=True, strided=3 if broken == "rows" else False
    )
    outs, lses = validate_merge.unpack(inputs.given)
    if broken == "address":
        outs = [torch.zeros(outs[0].numel() + 1).bfloat16()[1:].view(outs[0].shape)]
    if broken == "step":
        outs = [torch.zeros(2, outs[0][0].numel() + 1).bfloat16()[:, :-1].view(outs[0].shape)]
    found = validate_merge.merge(outs, lses, None, *inputs.output_buffers().values())
    assert not found.problem.aligned


def test_rows_past_two_to_the_31_elements_are_addressed():
    """Rows are numbered in 32 bits, and their places are in 64: `tests/gpu` goes there."""
    huge = 2**31 // 512
    out = torch.empty(2, huge, 1024, dtype=torch.bfloat16, device="meta")[..., :512]
    lse = torch.empty(2, huge, device="meta")
    problem = validate_merge.described([out] * 2, [lse] * 2, None, out, lse)
    assert problem.rows == 2 * huge
    assert problem.rows * problem.value_dim >= 2**31
    kinds = dict(portable.ARGUMENTS)
    names = [name for name, _ in portable.ARGUMENTS if name.endswith(("_inner", "_middle"))]
    assert names
    assert {kinds[name] for name in names} == {"i64"}


@given(st.data())
@settings(max_examples=60)
def test_memory_that_is_shared_is_found(data):
    """Against every byte by itself."""
    storage = torch.zeros(200, dtype=torch.int8)

    def view() -> torch.Tensor:
        sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
        strides = data.draw(st.lists(st.integers(0, 12), min_size=len(sizes), max_size=len(sizes)))
        return storage.as_strided(sizes, strides, data.draw(st.integers(0, 60)))

    one, other = view(), view()

    def taken(tensor: torch.Tensor) -> set[int]:
        start = tensor.storage_offset()
        return {start + place for place in places(tensor.shape, tensor.stride())}

    assert memory.share(memory.of(one), memory.of(other)) == bool(taken(one) & taken(other))


# -- kernels


@pytest.mark.parametrize("label", ["8.0", "8.9", "9.0", "gfx942"])
@pytest.mark.parametrize("states", [2, 8, 9])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value_dim", [1, 64, 96, 512, 4096])
def test_there_is_a_config_for_every_problem(value_dim, dtype, states, label):
    device = devices.from_label(label)
    out = torch.empty(states, 2, value_dim, dtype=dtype, device="meta")
    lse = torch.empty(states, 2, device="meta")
    problem = validate_merge.described([out], [lse], None, out[0], lse[0])
    config = portable.heuristic(problem, device)
    assert portable.is_valid(config, problem, device)[0]
    assert portable.why_not(problem, device) is None


def test_configs_that_cannot_be_are_refused():
    device = devices.from_label("9.0")
    out = torch.empty(2, 2, 512, dtype=torch.float32, device="meta")
    problem = validate_merge.described([out], [out[..., 0]], None, out[0], out[0, ..., 0])
    for config, rule in (
        (portable.Config(3, 4), "rows must be a power of two in [1, 128], got 3"),
        (portable.Config(4, 3), "num_warps must be one of (1, 2, 4, 8), got 3"),
        (portable.Config(128, 1), "needs 6144 registers a thread for elements, at most 192 are"),
    ):
        assert portable.is_valid(config, problem, device) == (False, rule)


def test_a_row_that_is_too_wide_runs_on_the_reference():
    wide = merge_inputs(tokens=(1,), heads=1, value_dim=4097, dtype=torch.float32)
    assert_within_budget(merge(wide), wide)
    if devices.interpreting():
        with pytest.raises(NotImplementedError, match="value_dim must be at most 4096, got 4097"):
            merge(wide, impl="portable")
