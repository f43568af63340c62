"""Decode over quantised caches: the reference, and the rules of what a cache may be."""

import pytest
import torch

import mla_triton
from mla_triton import testing
from mla_triton.cache.quantise import dequantise

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
