"""What `mla_triton.testing` gives to others: a kernel held against its problem, draws, changes.

The worked example of a kernel that is not ours is in docs/testing.md; tests/test_docs.py runs it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import find, given, settings

import mla_triton
from mla_triton import AttentionState, reference, testing
from mla_triton.testing import decode_changes, prefill_changes
from mla_triton.testing.caches import FORMS, PACKED
from mla_triton.testing.strategies import append_problems, gather_problems, merge_problems

SMALL: dict[str, Any] = {"heads": 3, "latent": 32, "rope": 16, "page_size": 16}
INF = float("inf")


def small(**changes: Any) -> testing.DecodeInputs:
    return testing.decode_inputs(**{"kv_lens": [0, 1, 16, 37], **SMALL, **changes})


def by_reference(inputs: testing.DecodeInputs) -> AttentionState:
    arguments, options = inputs.call_arguments()
    return reference.decode_same_precision(*arguments, **options)


# -- one call


@pytest.mark.parametrize(
    "inputs",
    [
        small(strided=True),
        small(q_lens=[2, 0, 3, 1], table="csr"),
        testing.prefill_inputs(q_lens=[5, 3], heads=2, qk=96, v_dim=64, rope=32, strided=1),
        testing.merge_inputs(heads=2, value_dim=16, masked=True, strided=True),
        testing.merge_inputs(heads=2, value_dim=16, stacked=True),
    ],
    ids=["decode", "ragged", "prefill", "merge", "stack"],
)
def test_our_operations_are_correct(inputs, device):
    testing.assert_correct(inputs.to(device))
    testing.assert_correct(inputs.to(device), lambda i: testing.run(i, impl="reference"))


def test_an_operation_runs_in_parts(device):
    inputs = small(kv_lens=[300, 5]).to(device)
    testing.assert_within_budget(testing.run(inputs, parts=5), inputs)
    with pytest.raises(ValueError, match=r"^parts must be left out of all but a decode, got 2$"):
        testing.run(testing.merge_inputs(), parts=2)


def test_lse_may_be_left_out():
    inputs = small()
    out, lse = by_reference(inputs)
    testing.assert_correct(inputs, lambda i: (by_reference(i).out, None))
    assert testing.compare((out, None), inputs).ok
    assert set(testing.deviations((out, None), inputs)) == {"out", "out_rms"}
    assert not testing.compare((out + 1, None), inputs).ok
    assert testing.compare((out, lse), inputs).ok


def fails(message: str, compute: Any, inputs: testing.DecodeInputs, **options: Any) -> None:
    with pytest.raises(AssertionError, match=f"(?s)^{re.escape(message)}.*decode_inputs\\("):
        testing.assert_correct(inputs, compute, **options)


def test_what_is_read_must_stay():
    def rotates_in_place(inputs):
        state = by_reference(inputs)
        inputs.q_rope.mul_(2)
        inputs.cache[-1, -1] = 0
        return state

    fails("q_rope, cache must be read only, and changed", rotates_in_place, small())


def test_what_lies_between_rows_must_stay():
    def overshoots(inputs):
        buffers = inputs.output_buffers()
        for name, result in zip(buffers, by_reference(inputs), strict=True):
            buffers[name].copy_(result)
        out = buffers["out"]
        whole = out.as_strided((out.shape[-1] + 1,), (1,), out.storage_offset())
        whole[-1] = 0
        return tuple(buffers.values())

    fails("what lies between rows of out was written", overshoots, small(strided=True))


def test_columns_of_somebody_elses_buffer_may_hold_anything():
    def from_a_wider_buffer(inputs):
        out, lse = by_reference(inputs)
        return torch.cat([out, torch.zeros_like(out)], -1)[..., : out.shape[-1]], lse

    testing.assert_correct(small(strided=True), from_a_wider_buffer)


def test_every_call_must_give_the_same_bits():
    calls = []

    def drifts(inputs):
        calls.append(inputs)
        out, lse = by_reference(inputs)
        return out, lse + (len(calls) - 1) * 2.0**-22

    inputs = small(dtype=torch.bfloat16)
    testing.assert_correct(inputs, drifts, repeats=1)
    calls.clear()
    fails("two runs are not the same: ", drifts, inputs, repeats=2)
    with pytest.raises(ValueError, match=r"^repeats must be at least 1, got 0$"):
        testing.assert_correct(inputs, drifts, repeats=0)


# -- how far, and where


def test_shares_are_of_each_row():
    inputs = small(dtype=torch.float32)
    budget = testing.budget_of(inputs)
    out, lse = by_reference(inputs)
    lse[3, 0, 1] = budget.exact.lse[3, 0, 1] + 5 * budget.lse[3, 0, 1]
    out[2, 0, 2, 7] = float("nan")
    found = testing.deviations((out, lse), inputs, budget)
    assert found["lse"].worst == pytest.approx(5, rel=0.1)
    assert found["lse"].where == (3, 0, 1)
    assert found["lse"].over == 1
    assert found["lse"].got == lse[3, 0, 1].item()
    assert found["lse"].expected == budget.exact.lse[3, 0, 1].item()
    for name in ("out", "out_rms"):
        assert found[name].shares[2, 0, 2] == INF
        assert found[name].where == (2, 0, 2, 7)
        assert found[name].got != found[name].got
        assert found[name].over == 1
        # A row without keys is exact, and has used none of its budget.
        assert (found[name].shares[0] == 0).all()


def test_shares_of_nothing_and_of_another_shape():
    nothing = small(kv_lens=[4], q_lens=[0])
    found = testing.deviations(by_reference(nothing), nothing)
    assert [(each.worst, each.over, each.where) for each in found.values()] == [(0.0, 0, ())] * 3
    inputs = small()
    out, lse = by_reference(inputs)
    with pytest.raises(ValueError, match=r"^out is torch\.float32"):
        testing.deviations((out.float(), lse), inputs)


def test_bits_are_compared():
    one = AttentionState(torch.tensor([0.0, float("nan")]), torch.tensor([1.0]))
    assert testing.same_bits(one, [tensor.clone() for tensor in one])
    other = AttentionState(torch.tensor([-0.0, float("nan")]), torch.tensor([1.0]))
    assert not testing.same_bits(one, other)
    message = r"^1 of 2 elements of out differ, first at \[0\]: 0 and -0$"
    with pytest.raises(AssertionError, match=message):
        testing.assert_same_bits(one, other)
    with pytest.raises(AssertionError, match=r"^lse is torch.float32 \[1\] once and None once$"):
        testing.assert_same_bits(one, (one.out, None))


# -- draws


@settings(max_examples=15)
@given(merge_problems(max_states=4))
def test_drawn_merges_are_valid(inputs):
    arguments, options = inputs.call_arguments()
    testing.assert_within_budget(
        reference.merge_same_precision(*arguments, **options, dtype=inputs.dtype), inputs
    )


@given(
    merge_problems(
        dtypes=[torch.float16], first_dtypes=[None], out_dtypes=[torch.float32], heads=[7],
        value_dims=[24], stacked=[True], masked=[False], empty=[1.0], levels=[900.0], paddings=[5],
        max_rank=1, max_states=3,
    )
)  # fmt: skip
def test_drawn_merges_keep_their_restrictions(inputs):
    first = inputs.states[0]
    assert len(inputs.states) <= 3
    assert inputs.is_stack
    assert inputs.mask is None
    assert (first.out.dtype, inputs.dtype) == (torch.float16, torch.float32)
    assert first.out.dim() <= 3
    assert first.out.shape[-2:] == (7, 24)
    assert (first.lse == -INF).all()
    assert inputs.padding == 5


@settings(max_examples=15)
@given(append_problems(forms=["fused"], latents=[96], ropes=[32], max_tokens=3, max_pages=2))
def test_drawn_appends_keep_their_restrictions(inputs):
    assert inputs.latent.shape[0] <= 3
    assert (inputs.latent.shape[1], inputs.rope.shape[1]) == (96, 32)
    assert inputs.memory.form == "fused"
    assert inputs.expected().differs(inputs.expected()) == 0
    assert repr(inputs).startswith("append_inputs(form='fused', tokens=")


@settings(max_examples=15)
@given(gather_problems(max_batch=2, max_length=5, csr=[True], with_starts=[False]))
def test_drawn_gathers_keep_their_restrictions(inputs):
    assert len(inputs.cu_seqlens_k) <= 3
    assert inputs.reached <= 10
    assert inputs.starts is None
    assert isinstance(inputs.table, mla_triton.CSRPageTable)
    again = testing.gather_inputs(**inputs.recipe)
    assert testing.same_bits(again.expected(), inputs.expected())
    assert repr(again) == repr(inputs)
    assert "tensor(" not in repr(inputs)


# -- operations on a cache


@pytest.mark.parametrize("form", FORMS)
def test_our_operations_on_a_cache_are_correct(form, device):
    for inputs in (
        testing.append_inputs(form=form, norm=torch.bfloat16, rotation="half", device=device),
        testing.append_inputs(form=form, dtype=torch.float16, device=device),
        testing.gather_inputs(form=form, csr=True, device=device),
        testing.copy_inputs(form=form, device=device),
        testing.copy_inputs(form=form, apart=True, page_dtype=torch.int32, device=device),
    ):
        testing.assert_correct(inputs)
        testing.assert_correct(inputs, lambda i: testing.run(i, impl="reference"), repeats=1)
        with pytest.raises(
            ValueError, match=r"^parts must be left out of all but a decode, got 2$"
        ):
            testing.run(inputs, parts=2)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_copies_are_of_some_pages_to_others(form, apart):
    inputs = testing.copy_inputs(form=form, apart=apart, seed=3)
    again = testing.copy_inputs(**inputs.recipe)
    assert repr(again) == repr(inputs)
    assert again.expected().differs(inputs.expected()) == 0
    assert (inputs.source is inputs.target) is not apart
    assert inputs.target_pages[0] < 0
    assert inputs.source_pages[-1] > 2**31
    # Whole pages of latents, of the pairs between the first and the last.
    page = inputs.target.parts[0].of(inputs.target.buffers).view(torch.uint8)
    moved = inputs.expected().parts[0].of(inputs.expected().buffers).view(torch.uint8)
    source = inputs.source.parts[0].of(inputs.source.buffers).view(torch.uint8)
    pairs = list(zip(inputs.source_pages.tolist(), inputs.target_pages.tolist(), strict=True))
    assert len(pairs) == (8 if apart else 4)
    expected = page.clone()
    for one, other in pairs[1:-1]:
        expected[other] = source[one]
    assert torch.equal(moved, expected)
    assert not torch.equal(moved, page)


def test_a_gather_of_another_form_is_not_correct():
    inputs = testing.gather_inputs(lengths=(3, 2))
    out, rope_out = testing.run(inputs, impl="reference")
    found = testing.compare_cache((out.float(), rope_out), inputs)
    assert not found.ok
    assert found.message.endswith("torch.float32 [8, 512], expected torch.bfloat16 [8, 512]")
    assert not testing.compare_cache((out, None), inputs).ok
    assert testing.compare_cache((out.clone(), rope_out.clone()), inputs).ok


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_cache_is_drawn(form):
    assert find(append_problems(), lambda i: i.memory.form == form).memory.form == form
    found = find(gather_problems(), lambda i: i.recipe["form"] == form)
    assert (form in PACKED) <= (found.recipe["strided"] == 0)


# -- changes


def test_a_change_leaves_the_problem_as_it_is():
    inputs = small(kv_lens=[16, 32], causal=False, s_q=2, dtype=torch.float32)
    before = testing.calls.Snapshot(inputs)
    changed = [
        decode_changes.reordered(inputs, [1, 0]),
        decode_changes.relocated(inputs, 3),
        decode_changes.repaged(inputs, 4),
        decode_changes.of_heads(inputs, [2, 0]),
        decode_changes.truncated(replace(inputs, causal=True), causal=False),
        decode_changes.doubled(inputs),
        decode_changes.emptied(inputs, 1),
        decode_changes.joined_by_empty(inputs, [0, 2]),
        decode_changes.poisoned(inputs, 1, 30, 5),
        *decode_changes.partitioned(inputs, 3, 0),
    ]
    assert before.written() == []
    for made in changed:
        arguments, options = made.call_arguments()
        testing.check_inputs(*arguments, **options)
    parts = [by_reference(part) for part in changed[-3:]]
    testing.assert_within_budget(reference.merge_same_precision(parts, dtype=torch.float32), inputs)
    prompt = testing.prefill_inputs(q_lens=[5, 9], heads=2, qk=96, v_dim=64, rope=32)
    before = testing.calls.Snapshot(prompt)
    prefill_changes.poisoned(prompt, 0, 2, 1)
    prefill_changes.scaled(prompt, 3)
    prefill_changes.shifted(prompt, 2.0)
    assert before.written() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stored": "fp9"}, "stored must be one of 16bit, fp8, fp8_groups, "),
        ({"logits": "huge"}, "logits must be one of normal, large, equal_keys, dominant_key, got"),
        ({"layout": "triple"}, "layout must be one of fused, pair, got 'triple'"),
        ({"table": "tree"}, "table must be one of dense, csr, got 'tree'"),
    ],
)
def test_words_that_no_problem_is_made_of(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        small(**options)


def test_a_scale_of_ones_own_is_in_the_recipe():
    inputs = small(softmax_scale=0.25)
    assert inputs.softmax_scale == 0.25
    assert "softmax_scale=0.25" in repr(inputs)
    without = small()
    assert testing.same_bits([inputs.q_nope, inputs.cache], [without.q_nope, without.cache])
    assert replace(without, softmax_scale=0.25).softmax_scale == 0.25
