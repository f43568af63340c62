"""The oracle of prefill against attention written otherwise, and the budget against faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings

from mla_triton import reference, testing
from mla_triton.state import AttentionState
from mla_triton.testing.prefill_problems import PrefillInputs, prefill_inputs, whole
from mla_triton.testing.strategies import prefill_problems

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = {"qk": 48, "rope": 16, "v_dim": 32}


def oracle(inputs: PrefillInputs) -> AttentionState:
    arguments, options = inputs.call_arguments()
    return reference.prefill(*arguments, **options)


def by_torch(inputs: PrefillInputs) -> AttentionState:
    """PyTorch's own attention, sequence by sequence, in float64; its lse from a naive softmax."""
    inputs = whole(inputs)
    group = inputs.q.shape[1] // inputs.k.shape[1]
    q = inputs.q.double()
    k, v = (tensor.double().repeat_interleave(group, 1) for tensor in (inputs.k, inputs.v))
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    bounds = (pairwise(t.tolist()) for t in (inputs.cu_seqlens_q, inputs.cu_seqlens_k))
    for (q_first, q_end), (k_first, k_end) in zip(*bounds, strict=True):
        s_q, s_k = q_end - q_first, k_end - k_first
        for i in range(s_q):
            seen = max(0, s_k - s_q + i + 1) if inputs.causal else s_k
            if not seen:
                continue
            keys, values = k[k_first : k_first + seen], v[k_first : k_first + seen]
            query = q[q_first + i]
            out[q_first + i] = torch.nn.functional.scaled_dot_product_attention(
                query[:, None], keys.movedim(1, 0), values.movedim(1, 0),
                scale=inputs.softmax_scale,
            )[:, 0]  # fmt: skip
            logits = torch.einsum("hd,nhd->hn", query, keys) * inputs.softmax_scale
            peak = logits.max(1).values
            lse[q_first + i] = peak + (logits - peak[:, None]).exp().sum(1).log()
    return AttentionState(out, lse)


@given(prefill_problems(dims=((48, 16, 32), (40, 8, 24)), max_q_len=12, max_k_len=20))
@settings(max_examples=40)
def test_the_oracle_is_attention(inputs):
    torch.testing.assert_close(oracle(inputs), by_torch(inputs), rtol=1e-10, atol=1e-10)


def test_it_is_mla_before_absorption():
    """Keys and values expanded from latents, one rotary key for all heads."""
    generator = torch.Generator().manual_seed(0)
    heads, nope, rope, latent, v_dim, s_q, s_k = 3, 16, 8, 24, 12, 5, 9

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q_nope, q_rope = normal(s_q, heads, nope), normal(s_q, heads, rope)
    c_kv, k_pe = normal(s_k, latent), normal(s_k, rope)
    w_uk, w_uv = normal(heads, nope, latent), normal(heads, v_dim, latent)
    expected = reference.attention(q_nope, q_rope, c_kv, k_pe, w_uk, w_uv, softmax_scale=0.2)
    got = reference.prefill(
        q_nope,
        torch.einsum("nl,hdl->nhd", c_kv, w_uk),
        torch.einsum("nl,hvl->nhv", c_kv, w_uv),
        cu_seqlens_q=torch.tensor([0, s_q]),
        cu_seqlens_k=torch.tensor([0, s_k]),
        softmax_scale=0.2,
        q_rope=q_rope,
        k_rope=k_pe,
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# -- the data


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("strided", [0, True, 3])
def test_what_is_no_key_is_nan(strided, split):
    inputs = prefill_inputs(
        q_lens=[3, 4], k_lens=[5, 0], split_k=split, split_q=split, strided=strided, **SMALL
    )
    for tensor in (inputs.k, inputs.v, inputs.k_rope):
        if tensor is None:
            assert not split
            continue
        assert tensor[:5].isfinite().all()
        assert tensor[5:].isnan().all()
        memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        assert memory.isfinite().sum() == tensor[:5].numel()
    assert inputs.q.is_contiguous() is (not strided)


def test_the_same_recipe_gives_the_same_problem():
    made = prefill_inputs(q_lens=[3, 4], logits="dominant_key", seed=3, **SMALL)
    again = eval(repr(made), {"prefill_inputs": prefill_inputs, "torch": torch})
    assert torch.equal(made.q, again.q)
    assert torch.equal(made.k[:7], again.k[:7])
    assert repr(made) == repr(again)


def test_splitting_changes_no_value():
    plain = prefill_inputs(q_lens=[3, 4], **SMALL)
    split = whole(prefill_inputs(q_lens=[3, 4], split_q=True, split_k=True, **SMALL))
    assert torch.equal(plain.q, split.q)
    assert torch.equal(plain.k.nan_to_num(), split.k.nan_to_num())


# -- the budget


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logits", ["normal", "large", "equal_keys", "dominant_key"])
def test_another_order_of_the_keys_is_within_half_of_the_budget(logits, dtype):
    """What is right, computed in another order, is accepted with room to spare."""
    inputs = prefill_inputs(
        q_lens=[9, 30], k_lens=[60, 200], dtype=dtype, logits=logits, causal=False, **SMALL
    )
    order = [*range(59, -1, -1), *range(259, 59, -1)]
    turned = replace(inputs, k=inputs.k[order], v=inputs.v[order])
    arguments, options = turned.call_arguments()
    report = testing.compare(reference.prefill_same_precision(*arguments, **options), inputs)
    assert report.ok, report.message
    assert report.out_error <= report.out_budget / 2 * 1.01
    assert report.out_rms_error <= report.out_rms_budget / 2 * 1.01


FAULTS: dict[str, Callable[[PrefillInputs], PrefillInputs]] = {
    "a scale 0.1 % too large": lambda i: replace(i, softmax_scale=i.softmax_scale * 1.001),
    "a scale 0.1 % too small": lambda i: replace(i, softmax_scale=i.softmax_scale * 0.999),
    "no mask": lambda i: replace(i, causal=False),
    "queries shifted by one": lambda i: replace(i, q=i.q.roll(-1, 0)),
    "a key dropped": lambda i: replace(i, k=i.k[1:], v=i.v[1:], cu_seqlens_k=i.cu_seqlens_k - 1),
    "heads swapped": lambda i: replace(i, v=i.v.roll(1, 1)),
    "a rotary part left out": lambda i: replace(i, k=i.k * (torch.arange(48) < 32)),
    "another sequence's keys": lambda i: replace(i, cu_seqlens_k=i.cu_seqlens_k + 2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_rejected(name, dtype):
    inputs = prefill_inputs(q_lens=[9, 30], k_lens=[20, 40], dtype=dtype, **SMALL)
    inputs = replace(inputs, k=inputs.k.nan_to_num(), v=inputs.v.nan_to_num())
    arguments, options = FAULTS[name](inputs).call_arguments()
    state = reference.prefill_same_precision(*(t.to(dtype) for t in arguments), **options)
    assert not testing.compare(state, inputs).ok


def test_an_lse_in_base_2_is_rejected():
    inputs = prefill_inputs(q_lens=[9], **SMALL)
    arguments, options = inputs.call_arguments()
    state = reference.prefill_same_precision(*arguments, **options)
    assert testing.compare(state, inputs).ok
    assert not testing.compare(state._replace(lse=state.lse * 1.4427), inputs).ok
