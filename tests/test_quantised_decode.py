"""Decode over quantised caches: the reference, and the rules of what a cache may be."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

import mla_triton
from mla_triton import testing
from mla_triton.cache.formats import E4M3
from mla_triton.cache.quantise import E8M0_NAN, dequantise
from mla_triton.testing.strategies import decode_problems

FORMS = {
    "fp8 fused": {"stored": "fp8"},
    "fp8 pair": {"stored": "fp8", "layout": "pair"},
    "fp8 without rope": {"stored": "fp8", "rope": 0},
    "fp8 rope inside": {"stored": "fp8", "latent": 448, "value_dim": 512},
    "groups": {"stored": "fp8_groups"},
    "656": {"stored": "fp8_ds_mla"},
    "584": {"stored": "fp8_v4", "latent": 448, "value_dim": 512},
    "528": {"stored": "fp8_v41", "latent": 448, "value_dim": 512},
}


def inputs_of(form, **changes):
    return testing.decode_inputs(
        **{"kv_lens": [70, 0, 33], "s_q": 2, "heads": 4, "page_size": 16} | FORMS[form] | changes
    )


FORMS_BY_DTYPE = [
    (form, dtype)
    for form in FORMS
    for dtype in (torch.float16, torch.bfloat16)
    # Their rotary keys are bfloat16, and so must the queries be.
    if dtype == torch.bfloat16 or form not in ("656", "584")
]


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
    inputs = inputs_of(form, dtype=dtype)
    arguments, options = inputs.call_arguments()
    state = mla_triton.decode(*arguments, **options, **inputs.output_buffers(), impl="portable")
    testing.assert_within_budget(state, inputs)


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
    inputs = inputs_of(form, **changes)
    arguments, options = inputs.call_arguments()
    state = mla_triton.decode(*arguments, **options, **inputs.output_buffers(), impl="portable")
    testing.assert_within_budget(state, inputs)


@settings(max_examples=15)
@given(
    decode_problems(
        dtypes=(torch.float16, torch.bfloat16),
        dims=((128, 32), (256, 64), (128, 0)),
        stored=("fp8", "fp8_groups", "fp8_ds_mla", "fp8_v4", "fp8_v41"),
        heads=(1, 5, 16, 20),
        max_batch=2,
        max_s_q=2,
        max_kv_len=90,
    )
)
def test_any_quantised_problem(inputs):
    judged(inputs)


def judged(inputs):
    arguments, options = inputs.call_arguments()
    state = mla_triton.decode(*arguments, **options, **inputs.output_buffers(), impl="portable")
    testing.assert_within_budget(state, inputs)
    return state


# -- what scales, bytes and queries may be

SCALED = ("fp8 fused", "fp8 pair", "groups", "584", "528")


def with_cache(inputs, **parts):
    return replace(inputs, cache=inputs.cache._replace(**parts))


def all_scales(inputs, exponent):
    """The same problem with scales of 2**exponent, and latents a 32nd of what they were: none is
    too large for bfloat16, which a number of 448 times the largest scales is."""
    scales, ckv = inputs.cache.scales, inputs.cache.ckv
    same = exponent + 127 if scales.dtype == torch.uint8 else 2.0**exponent
    smaller = (ckv.float() / 32).to(E4M3)
    return with_cache(inputs, ckv=smaller, scales=torch.full_like(scales, same))


@pytest.mark.parametrize("exponent", [-110, 119, 120, 122])
@pytest.mark.parametrize("form", SCALED)
def test_tiny_and_huge_scales(form, exponent):
    """Queries are as small as scales are large, and the factor of the logits is so where they would
    not be normal numbers: logits are as they were."""
    inputs = all_scales(inputs_of(form, s_q=1, kv_lens=[40]), exponent)
    by = max(-100, min(-exponent, 100))
    inputs = replace(
        inputs,
        q_nope=inputs.q_nope * 2.0**by,
        q_rope=inputs.q_rope * 2.0**by,
        softmax_scale=inputs.softmax_scale * 2.0 ** (-exponent - by),
    )
    out = judged(inputs).out
    assert out.isfinite().all()
    assert out.abs().max() > 2.0 ** (exponent - 9)


@pytest.mark.parametrize("form", ["fp8 fused", "fp8 pair", "groups"])
def test_a_scale_of_zero_makes_every_key_alike(form):
    inputs = inputs_of(form)
    state = judged(with_cache(inputs, scales=torch.zeros_like(inputs.cache.scales)))
    assert (state.out == 0).all()


def owned_slots(inputs, requests):
    """`[pages, page_size]`: slots of keys of these requests."""
    ckv = inputs.cache.ckv
    owned = torch.zeros(ckv.shape[:2], dtype=torch.bool)
    for request in requests:
        length = int(inputs.kv_lens[request])
        keys = torch.arange(length)
        pages = inputs.page_table[request].long()[keys // ckv.shape[1]]
        owned[pages, keys % ckv.shape[1]] = True
    return owned


NAN_BYTES = torch.tensor([0x7F, 0xFF], dtype=torch.uint8)


def spoilt(inputs, slots):
    """The same problem with NaN in these slots, of either sign: numbers, rotary keys and scales."""
    ckv, kpe, scales = (None if part is None else part.clone() for part in inputs.cache)
    ckv.view(torch.uint8)[slots] = NAN_BYTES.repeat(ckv.shape[-1] // 2)
    if kpe is not None and kpe.dtype == E4M3:
        kpe.view(torch.uint8)[slots] = NAN_BYTES.repeat(kpe.shape[-1] // 2)
    elif kpe is not None:
        kpe[slots] = float("nan")
    if scales.dim() > 1:
        scales[slots] = E8M0_NAN if scales.dtype == torch.uint8 else float("nan")
    return with_cache(inputs, ckv=ckv, kpe=kpe, scales=scales)


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


def run(inputs):
    arguments, options = inputs.call_arguments()
    return mla_triton.decode(*arguments, **options, **inputs.output_buffers(), impl="portable")


@pytest.mark.parametrize(
    ("part", "number"), [("q_nope", float("inf")), ("q_rope", float("nan"))]
)
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
