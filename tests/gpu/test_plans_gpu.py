"""Plans on the GPU in this machine: whatever a plan was cut for, a call that takes it is right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quantised_forms import FORMS, inputs_of
from ways import Way, is_refused, problem_of

import mla_triton
from mla_triton import device as devices
from mla_triton import select
from mla_triton.ops.plan import planned_geometry
from mla_triton.testing import assert_same_bits, assert_within_budget, decode_inputs
from mla_triton.testing import plan_of as formatted_plan
from mla_triton.testing.problems import DecodeInputs

KV_LENS = (5000, 0, 1, 63, 64, 65, 700, 2048)
RECIPES = (
    {},
    {"page_size": 1},
    {"page_size": 48, "table": "csr"},
    {"page_size": 16, "layout": "pair"},
    {"strided": 3},
    {"latent": 256, "rope": 64},
    {"s_q": 3},
    {"q_lens": (3, 2, 0, 70, 1, 64, 0, 9)},
)


def plan_of(inputs: DecodeInputs, impl: str | None) -> mla_triton.Plan:
    q_nope, ragged = inputs.q_nope, inputs.cu_seqlens_q is not None
    return mla_triton.plan(
        inputs.kv_lens,
        heads=q_nope.shape[-2],
        latent=q_nope.shape[-1],
        rope=inputs.q_rope.shape[-1],
        dtype=q_nope.dtype,
        s_q=1 if ragged else q_nope.shape[1],
        cu_seqlens_q=inputs.cu_seqlens_q,
        queries=q_nope.shape[0] if ragged else None,
        impl=impl,
    )


def decode(inputs: DecodeInputs, plan: mla_triton.Plan) -> mla_triton.AttentionState:
    arguments, options = inputs.call_arguments()
    return mla_triton.decode(*arguments, **options, plan=plan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 16, 40, 128])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_call_follows_the_plan_of_any_implementation(way, recipe, heads, dtype):
    """The plan's own implementation runs where it takes the cache, and portable where not."""
    inputs = decode_inputs(kv_lens=KV_LENS, heads=heads, dtype=dtype, device="cuda", **recipe)
    device, problem = devices.current(), problem_of(inputs)
    if way.impl == "sm90" and select.why_not_sm90(problem.as_planned(), device, "sm90", None):
        with pytest.raises(NotImplementedError, match=r"^impl 'sm90' cannot run this decode: "):
            plan_of(inputs, way.impl)
        return
    plan = plan_of(inputs, way.impl)
    state = decode(inputs, plan)
    assert_within_budget(state, inputs)
    chosen = select.decode(problem, device, None, planned_geometry(plan.key))
    assert chosen.name == ("portable" if is_refused(inputs, way) else way.impl)


@pytest.mark.parametrize("heads", [1, 16, 40, 128])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_plan_of_a_call_that_names_nothing(recipe, heads):
    inputs = decode_inputs(kv_lens=KV_LENS, heads=heads, device="cuda", **recipe)
    plan = plan_of(inputs, None)
    assert_within_budget(decode(inputs, plan), inputs)
    changed = torch.tensor((70, 900, 0, 64, 1, 4999, 2, 130), dtype=torch.int32, device="cuda")
    inputs.kv_lens.copy_(torch.minimum(changed, inputs.kv_lens))
    plan.update(inputs.kv_lens, inputs.cu_seqlens_q)
    assert_within_budget(decode(inputs, plan), inputs)


@pytest.mark.parametrize("heads", [16, 128])
def test_a_call_with_a_plan_of_its_own_has_the_bits_of_one_without(heads):
    """Plan and call choose alike, and so cut alike."""
    inputs = decode_inputs(kv_lens=KV_LENS, heads=heads, device="cuda")
    arguments, options = inputs.call_arguments()
    own, planned = mla_triton.decode(*arguments, **options), decode(inputs, plan_of(inputs, None))
    assert torch.equal(own.out, planned.out)
    assert torch.equal(own.lse, planned.lse)


@pytest.mark.parametrize("heads", [16, 40, 128])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("impl", [None, "portable", "sm90"])
def test_a_plan_that_knows_the_format_changes_no_bit(impl, form, heads):
    """Cut as the call itself cuts, few requests and many, alone and batch-invariant."""
    device = devices.current()
    for changes in (
        {},
        {"kv_lens": [3000, 70, 1, 900]},
        {"kv_lens": [(37 * i) % 400 for i in range(200)]},
        {"page_size": 16, "table": "csr"},
        {"q_lens": (3, 2, 0, 70, 1, 64, 0, 9)},
    ):
        inputs = inputs_of(
            form, **{"kv_lens": KV_LENS, "s_q": 1, "page_size": 64, "heads": heads} | changes,
            device="cuda",
        )  # fmt: skip
        if impl == "sm90" and is_refused(inputs, Way("sm90")):
            with pytest.raises(NotImplementedError, match=r"^impl 'sm90' cannot run this decode: "):
                formatted_plan(inputs, impl)
            continue
        arguments, options = inputs.call_arguments()
        longest = max(inputs.kv_lens.tolist())
        for batch_invariant in (False, True):
            more = {"batch_invariant": True, "max_kv_len": longest} if batch_invariant else {}
            options |= {"batch_invariant": batch_invariant, "impl": impl}
            plan = formatted_plan(inputs, impl, **more)
            own = mla_triton.decode(*arguments, **options)
            planned = mla_triton.decode(*arguments, **options, plan=plan)
            assert_same_bits(planned, own)
            assert_within_budget(planned, inputs)
            problem = replace(problem_of(inputs), fixed_pieces=plan.problem.fixed_pieces)
            chosen = select.decode(problem, device, impl)
            assert chosen.module.geometry(problem, device) == plan.geometry


@pytest.mark.parametrize("heads", [16, 40, 128])
@pytest.mark.parametrize("form", [None, "fp8 fused", "656"])
def test_a_plan_of_another_format_is_followed(form, heads):
    given = {"kv_lens": KV_LENS, "s_q": 1, "page_size": 64, "heads": heads, "device": "cuda"}
    inputs = decode_inputs(**given) if form is None else inputs_of(form, **given)
    for cache_format in ("16bit", "fp8", "fp8_ds_mla"):
        for impl in (None, "portable", "sm90"):
            if impl == "sm90" and devices.current().capability != (9, 0):
                continue
            plan = formatted_plan(inputs, impl, cache_format=cache_format)
            assert_within_budget(decode(inputs, plan), inputs)


def test_layers_with_other_caches_share_a_plan():
    """One plan, and beside a layer that its implementation takes one that it does not."""
    paged = [
        decode_inputs(kv_lens=KV_LENS, heads=128, page_size=page_size, device="cuda")
        for page_size in (64, 1, 16)
    ]
    plan = plan_of(paged[0], None)
    for inputs in paged:
        assert_within_budget(decode(replace(inputs, kv_lens=paged[0].kv_lens), plan), inputs)
