"""The code generated for capabilities 8.0 and 8.9, executed on a later card and held to the oracle.

`mla_triton.testing.foreign_code` says what this proves and what it does not.
"""

from __future__ import annotations

import pytest
import torch
from quantised_forms import FORMS

import mla_triton
from mla_triton import device as devices
from mla_triton.testing import assert_within_budget, decode_inputs
from mla_triton.testing.foreign_code import Generated, code_of

LABELS = ["8.0", "8.6", "8.9"]
DTYPES = [torch.float16, torch.bfloat16]
SKEWED = (5000, 0, 1, 63, 64, 65, 700, 2048)

here = devices.current()
pytestmark = pytest.mark.skipif(
    here.capability is None or here.capability < (9, 0), reason="needs capability 9.0 or later"
)


def run_as(label: str, **recipe) -> list[Generated]:
    """Decodes as that capability would, judges the result, and hands back the kernels."""
    inputs = decode_inputs(kv_lens=SKEWED, device="cuda", **recipe)
    arguments, options = inputs.call_arguments()
    with code_of(label) as kernels:
        state = mla_triton.decode(*arguments, **options, impl="portable")
        again = mla_triton.decode(*arguments, **options, impl="portable")
        torch.cuda.synchronize()
    assert_within_budget(state, inputs)
    assert torch.equal(state.out, again.out)
    assert torch.equal(state.lse, again.lse)
    return kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [5, 16, 32, 128])
@pytest.mark.parametrize("label", LABELS)
def test_decode(label, heads, dtype):
    kernels = run_as(label, heads=heads, dtype=dtype)
    arch, limit = "sm_" + label.replace(".", ""), devices.from_label(label).shared_memory
    assert {kernel.target for kernel in kernels} == {arch}
    assert all(kernel.shared <= limit for kernel in kernels)
    (attention,) = [k for k in kernels if k.uses("mma.sync")]
    assert attention.uses("cp.async")
    assert not any(k.uses("wgmma") or k.uses("cp.async.bulk") for k in kernels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", ["8.0", "8.9"])
@pytest.mark.parametrize(
    "recipe",
    [
        {"page_size": 1},
        {"page_size": 16, "table": "csr"},
        {"page_size": 48},
        {"s_q": 3},
        {"s_q": 2, "heads": 128, "causal": False},
        {"q_lens": (3, 2, 0, 70, 1, 64, 0, 9)},
        {"latent": 256, "rope": 32, "heads": 40},
        {"latent": 256, "rope": 64, "heads": 32},
        {"latent": 512, "rope": 0},
        {"latent": 448, "rope": 64, "value_dim": 512, "heads": 64},
        {"layout": "pair", "strided": True},
        {"strided": 3},
        {"logits": "large"},
    ],
    ids=str,
)
def test_forms(label, dtype, recipe):
    kernels = run_as(label, dtype=dtype, **recipe)
    assert not any(kernel.uses("wgmma") for kernel in kernels)


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("form", ["fp8 fused", "fp8 rope inside", "656", "584"])
@pytest.mark.parametrize("label", ["8.0", "8.9"])
def test_quantised_caches(label, form, heads):
    """8.0 converts e4m3 by integer arithmetic, 8.9 has an instruction."""
    kernels = run_as(label, heads=heads, **FORMS[form])
    (attention,) = [k for k in kernels if k.uses("mma.sync")]
    assert attention.uses("cp.async")
    assert attention.uses("cvt.rn.f16x2.e4m3x2") is (label == "8.9")
    limit = devices.from_label(label).shared_memory
    assert all(kernel.shared <= limit for kernel in kernels)


def test_float16_over_a_quantised_cache():
    for label in ("8.0", "8.9"):
        run_as(label, dtype=torch.float16, s_q=2, **FORMS["fp8 pair"])


def test_the_card_itself_is_back_afterwards():
    with code_of("8.9"):
        assert devices.current().label == "8.9"
    assert devices.current() == here


def test_later_cards_are_refused():
    with (
        pytest.raises(ValueError, match="must be a capability before this card's"),
        code_of("12.0"),
    ):
        pass
