"""A program's default dtype and default device are its own affair: no operation goes by them.

FlashMLA's tests, for one, set both. "meta" as the default device shows on any machine where a
tensor is made without saying where.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import mla_triton
from mla_triton.testing import decode_inputs, merge_inputs, prefill_inputs


@contextmanager
def odd_defaults() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(dtype)


@pytest.mark.parametrize("is_planned", [False, True])
def test_decode(is_planned, device):
    """Requests that are cut, so that there are partial results."""
    inputs = decode_inputs(
        kv_lens=[600, 3], heads=2, latent=128, rope=32, dtype=torch.float16, device=device
    )
    arguments, options = inputs.call_arguments()
    expected = mla_triton.decode(*arguments, **options)
    with odd_defaults():
        plan = mla_triton.plan(inputs.kv_lens, heads=2, latent=128, rope=32, dtype=torch.float16)
        state = mla_triton.decode(*arguments, **options, plan=plan if is_planned else None)
    assert plan.geometry is None or plan.partial_out.dtype == torch.float32
    assert plan.geometry is None or plan.partial_lse.dtype == torch.float32
    assert torch.equal(state.out, expected.out)
    assert torch.equal(state.lse, expected.lse)


def test_prefill(device):
    inputs = prefill_inputs(q_lens=[5, 9], heads=2, dtype=torch.float16, device=device)
    arguments, options = inputs.call_arguments()
    expected = mla_triton.prefill(*arguments, **options)
    with odd_defaults():
        state = mla_triton.prefill(*arguments, **options)
    assert torch.equal(state.out, expected.out)
    assert torch.equal(state.lse, expected.lse)


def test_merge_between_the_rows_of_a_state(device):
    """Where results lie between what is read, addresses are compared run by run, on the host."""
    inputs = merge_inputs(
        tokens=(4,), heads=2, value_dim=64, dtype=torch.float16, strided=64, device=device
    )
    (states,), _ = inputs.call_arguments()
    expected = mla_triton.merge(states)
    first = states[0].out
    out = first.as_strided(first.shape, first.stride(), first.storage_offset() + 64)
    with odd_defaults():
        state = mla_triton.merge(states, out=out)
    assert torch.equal(state.out, expected.out)
    assert torch.equal(state.lse, expected.lse)
