"""Merge as an operator: fakes, compilation, and what an eager call does on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_merge import merge, same_bits
from test_operators import fixed, launchers_made, needs_compiler, needs_kernels, no_waiting
from torch._subclasses.fake_tensor import FakeTensorMode

import mla_triton
from mla_triton import AttentionState, validate_merge
from mla_triton.kernels.common.launch import Launcher
from mla_triton.ops import merge as operation
from mla_triton.testing import MergeInputs, merge_inputs


def operands(inputs: MergeInputs) -> list[Any]:
    outs, lses = validate_merge.unpack(inputs.given)
    return [outs, lses, inputs.mask, *inputs.output_buffers().values(), None]


FORMS: dict[str, dict[str, Any]] = {
    "two": {},
    "masked": {"masked": True},
    "stack": {"states": 4, "stacked": True},
    "three, strided": {"states": 3, "strided": 3},
    "first in float32": {"dtype": torch.bfloat16, "first_dtype": torch.float32},
}
by_form = pytest.mark.parametrize("form", FORMS)


def made(form: str, device: torch.device | str, **more: Any) -> MergeInputs:
    plain = {"dtype": torch.float32, "heads": 3, "value_dim": 16, "empty": 0.0}
    return merge_inputs(**(plain | FORMS[form] | more), device=device)


@needs_compiler
@by_form
def test_opcheck(form, device):
    inputs = made(form, device)
    given = operands(inputs)
    for buffer in given[3:5]:
        buffer.zero_()
    torch.library.opcheck(torch.ops.mla_triton.merge.default, given)


def test_the_operator_is_defined_once_and_for_both_devices():
    for key in ("CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("mla_triton::merge", key)


@by_form
def test_the_operator_is_the_function(form, device):
    """Eager calls leave the dispatcher out."""
    inputs = made(form, device)
    outs, lses, mask, out, lse, impl = operands(inputs)
    torch.ops.mla_triton.merge(outs, lses, mask, out, lse, impl)
    assert same_bits(AttentionState(out, lse), merge(inputs))


@needs_compiler
@by_form
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_equals_eager(backend, form, device):
    inputs = made(form, device)

    def step(states, mask):
        state = mla_triton.merge(states, mask=mask)
        return state.out * 2, state.lse + 1

    expected = step(inputs.given, inputs.mask)
    got = fixed(step, backend)(inputs.given, inputs.mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@needs_compiler
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_merge_in_place(backend, device):
    """The compiler may move neither reads of the old state behind it, nor of the new before."""
    inputs, apart = made("two", device), made("two", device)
    expected = merge(apart)

    def step(one, other):
        before = one.out.sum()
        state = mla_triton.merge([one, other], out=one.out, lse=one.lse)
        return before, state.out + 1

    before, after = fixed(step, backend)(*inputs.states)
    assert same_bits(inputs.states[0], expected)
    assert torch.equal(after, expected.out + 1)
    torch.testing.assert_close(before, apart.states[0].out.sum())


@needs_compiler
def test_one_compilation_serves_every_batch(device):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = fixed(lambda states: mla_triton.merge(states).out, counter, dynamic=True)
    for tokens in (2, 3, 5, 8, 9):
        inputs = made("two", device, tokens=(tokens,))
        assert torch.equal(compiled(inputs.states), merge(inputs).out)
        if tokens == 2:
            compilations = counter.frame_count
    assert counter.frame_count == compilations


@needs_compiler
def test_a_compiler_tells_of_a_broken_rule(device):
    one, other = made("two", device).states

    def step(one, other):
        return mla_triton.merge([one, other._replace(lse=other.lse.double())]).out

    with pytest.raises(Exception, match=r"must be float32, got torch\.float64"):
        fixed(step, "eager")(one, other)


def test_no_gradient_flows_without_grad(device):
    one, other = made("two", device).states
    one.out.requires_grad_()
    with torch.no_grad():
        state = mla_triton.merge([one, other])
    assert not state.out.requires_grad


@by_form
def test_tensors_without_memory(form):
    inputs = made(form, "cpu")
    expected = merge(inputs)
    meta = merge(inputs.to("meta"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = merge(inputs)
    for state in (meta, fake):
        for got, like in zip(state, expected, strict=True):
            assert (got.shape, got.dtype) == (like.shape, like.dtype)


@needs_kernels
@by_form
def test_nothing_waits_for_the_device(form, device, monkeypatch):
    inputs, launched = made(form, device), []
    monkeypatch.setattr(Launcher, "__call__", lambda self, *_: launched.append(self))
    with monkeypatch.context() as patch:
        no_waiting(patch)
        merge(inputs)
    assert len(launched) == 1


@needs_kernels
def test_calls_that_differ_in_size_share_their_kernels(device, monkeypatch):
    made = launchers_made(monkeypatch)
    operation.prepare.cache_clear()
    for tokens in (5, 6, 1, 300):
        for masked in (False, True):
            merge(merge_inputs(tokens=(tokens,), heads=3, value_dim=32, masked=masked))
        if tokens == 5:
            made.clear()
    for states in (9, 10, 40):
        merge(merge_inputs(states=states, heads=3, value_dim=32, stacked=True))
        if states == 9:
            made.clear()
    assert made == []
