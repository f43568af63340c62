"""Decode over quantised caches: the reference, and the rules of what a cache may be."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from quantised_forms import (
    FORMS,
    FORMS_BY_DTYPE,
    SCALED,
    all_scales,
    inputs_of,
    owned_slots,
    spoilt,
    with_cache,
    wrong_bytes,
)

import mla_triton
from mla_triton import testing
from mla_triton.cache.quantise import dequantise
from mla_triton.testing.strategies import decode_problems


def run(inputs):
    arguments, options = inputs.call_arguments()
    return mla_triton.decode(*arguments, **options, **inputs.output_buffers(), impl="portable")


def judged(inputs):
    state = run(inputs)
    testing.assert_within_budget(state, inputs)
    return state


def dequantised(inputs):
    """The same problem over a float64 cache of the numbers that its cache stands for."""
    behind = 0
    if inputs.cache.kpe is None and inputs.value_dim is None and inputs.q_rope is not None:
        behind = inputs.q_rope.shape[-1]
    ckv, kpe = dequantise(inputs.cache, torch.float64, rope=behind)
    arguments, options = inputs.call_arguments()
    cache = ckv if kpe is None else torch.cat([ckv, kpe], -1)
    return (*arguments[:2], cache, *arguments[3:]), options


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_oracle_is_that_of_the_numbers_the_cache_stands_for(form, dtype):
    inputs = inputs_of(form, dtype=dtype)
    exact = testing.decode_budget(inputs).exact
    arguments, options = dequantised(inputs)
    plain = mla_triton.reference.decode(*arguments, **options)
    torch.testing.assert_close(exact.out, plain.out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(exact.lse, plain.lse, rtol=1e-12, atol=1e-12)
    assert exact.out.abs().max() > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_serves_every_form(form):
    inputs = inputs_of(form)
    arguments, options = inputs.call_arguments()
    state = mla_triton.decode(*arguments, **options, impl="reference")
    report = testing.compare(state, inputs, testing.decode_budget(inputs))
    assert report.ok, report.message


@pytest.mark.parametrize(("form", "dtype"), FORMS_BY_DTYPE, ids=str)
def test_the_portable_kernel_reads_every_form(form, dtype):
    judged(inputs_of(form, dtype=dtype))


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lens": (3, 0, 17), "heads": 3},
        {"table": "csr", "page_size": 1},
        {"page_size": 48},
        {"strided": True, "s_q": 1},
        {"strided": 3, "heads": 1},
        {"causal": False, "s_q": 3, "heads": 33},
        {"logits": "large"},
        {"logits": "dominant_key", "kv_lens": [200, 1, 64]},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_call(form, changes):
    judged(inputs_of(form, **changes))


def test_every_byte_becomes_its_number():
    assert not wrong_bytes("bytes", "cpu")


@settings(max_examples=15)
@given(
    decode_problems(
        dtypes=(torch.float16, torch.bfloat16),
        dims=((128, 32), (256, 64), (128, 0)),
        rope_in_value=(False,),
        stored=("fp8", "fp8_groups", "fp8_ds_mla", "fp8_v4", "fp8_v41"),
        heads=(1, 5, 16, 20),
        max_batch=2,
        max_s_q=2,
        max_kv_len=90,
    )
)
def test_any_quantised_problem(inputs):
    judged(inputs)


# -- what scales, bytes and queries may be


@pytest.mark.parametrize("exponent", [-110, 119, 120, 122])
@pytest.mark.parametrize("form", SCALED)
def test_tiny_and_huge_scales(form, exponent):
    inputs = all_scales(inputs_of(form, s_q=1, kv_lens=[40]), exponent)
    out = judged(inputs).out
    assert out.isfinite().all()
    assert out.abs().max() > 2.0 ** (exponent - 9)


@pytest.mark.parametrize("form", ["fp8 fused", "fp8 pair", "groups"])
def test_a_scale_of_zero_makes_every_key_alike(form):
    inputs = inputs_of(form)
    state = judged(with_cache(inputs, scales=torch.zeros_like(inputs.cache.scales)))
    assert (state.out == 0).all()


@pytest.mark.parametrize("form", SCALED)
def test_slots_of_others_are_not_read(form):
    """Neither behind the last key, nor where another request's keys are."""
    inputs = inputs_of(form, kv_lens=[70, 33])
    expected = judged(inputs)
    state = run(spoilt(inputs, ~owned_slots(inputs, [0, 1])))
    assert torch.equal(state.out, expected.out)
    assert torch.equal(state.lse, expected.lse)
    state = run(spoilt(inputs, ~owned_slots(inputs, [0])))
    assert torch.equal(state.out[0], expected.out[0])
    assert torch.equal(state.lse[0], expected.lse[0])
    assert state.out[1].isnan().all()


@pytest.mark.parametrize(("part", "number"), [("q_nope", float("inf")), ("q_rope", float("nan"))])
@pytest.mark.parametrize("form", SCALED)
def test_a_query_that_is_not_finite_is_alone_with_it(form, part, number):
    inputs = inputs_of(form, kv_lens=[70])
    expected = run(inputs)
    query = getattr(inputs, part).clone()
    query[0, 1, 2, 7] = number
    state = run(replace(inputs, **{part: query}))
    others = torch.ones(state.lse.shape, dtype=torch.bool)
    others[0, 1, 2] = False
    assert torch.equal(state.out[others], expected.out[others])
    assert torch.equal(state.lse[others], expected.lse[others])
    assert state.out[0, 1, 2].isnan().all()


def test_each_row_of_queries_has_a_factor_of_its_own():
    """One scale: queries are multiplied as float16, which bfloat16's range does not fit into."""
    inputs = inputs_of("fp8 fused", s_q=1, kv_lens=[50], heads=16)
    factors = 2.0 ** torch.linspace(-130, 20, 16).round()[:, None]
    q_nope = (inputs.q_nope.float() * factors).bfloat16()
    q_rope = (inputs.q_rope.float() / factors.clamp_max(2.0**-100)).bfloat16()
    judged(replace(inputs, q_nope=q_nope, q_rope=inputs.q_rope))
    judged(replace(inputs, q_nope=inputs.q_nope, q_rope=q_rope * 2.0**-120))
