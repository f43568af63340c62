"""Decode over quantised caches as machine code, by each implementation, against the oracle.

Few kernels and many values: a case runs all that its kernel can be asked for.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quantised_forms import (
    FORMS,
    FORMS_BY_DTYPE,
    SCALED,
    all_scales,
    inputs_of,
    owned_slots,
    spoilt,
    with_cache,
)
from quantised_forms import wrong_bytes as wrong_bytes_by
from ways import Way, is_refused, run

import mla_triton
from mla_triton import device as devices
from mla_triton.kernels.portable.decode import decoding
from mla_triton.testing import assert_within_budget, untouched_padding
from mla_triton.testing import plan_of as formatted_plan
from mla_triton.testing.problems import DecodeInputs

SKEWED = (5000, 0, 1, 63, 64, 65, 700, 2048, 300)
RAGGED = (3, 2, 0, 70, 1, 64, 0, 9, 4)
FEW = 3
"""Requests to which the Hopper kernel gives whole SMs; all of `SKEWED` share them."""
MANY = tuple(131 * i % 700 for i in range(40))
"""Requests that the Hopper kernel takes by tiles of 64 rows, if they have more than 32."""
WAYS = (Way("portable"), Way("sm90"))
HOPPER_FORMS = ("fp8 fused", "fp8 pair", "fp8 without rope", "groups", "656")
"""Forms that the Hopper kernel reads."""
ALL_SCALED = (*SCALED, "656")
ALL_HEADS = (1, 2, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128)
BF16 = torch.bfloat16


def made(form: str, **changes) -> DecodeInputs:
    usual = {"kv_lens": SKEWED, "s_q": 1, "heads": 16, "page_size": 64, "device": "cuda"}
    return inputs_of(form, **(usual | changes))


def judge(inputs: DecodeInputs, way: Way, **more) -> mla_triton.AttentionState | None:
    """Twice the same bits within the budget; or None, refused with the reason."""
    if is_refused(inputs, way):
        return None
    state, again = (run(inputs, way, **inputs.output_buffers(), **more) for _ in range(2))
    assert_within_budget(state, inputs)
    assert torch.equal(state.out, again.out)
    assert torch.equal(state.lse, again.lse)
    assert not inputs.padding or (untouched_padding(state.out) and untouched_padding(state.lse))
    return state


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_each_implementation_takes_what_it_is_for(way):
    """So that what follows is not refusals alone."""
    is_hopper = devices.current().capability == (9, 0)
    for form in FORMS:
        takes = way.impl == "portable" or (is_hopper and form in HOPPER_FORMS)
        assert is_refused(made(form), way) is not takes, form


def test_every_byte_becomes_its_number():
    for decode in {decoding(devices.current()), "words", "bytes"}:
        assert not wrong_bytes_by(decode, "cuda"), decode


@pytest.mark.parametrize("heads", [(1, 5), (16,), (33,), (128,)], ids=str)
@pytest.mark.parametrize("s_q", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_heads_and_query_tokens(way, form, s_q, heads):
    for count in heads:
        for kv_lens in (SKEWED, SKEWED[:FEW], MANY):
            judge(made(form, kv_lens=kv_lens, heads=count, s_q=s_q, seed=count), way)


@pytest.mark.parametrize(("form", "dtype"), [p for p in FORMS_BY_DTYPE if p[1] != BF16], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_float16(way, form, dtype):
    for shape in (
        {"heads": 16},
        {"heads": 33, "s_q": 2, "causal": False},
        {"heads": 40, "kv_lens": MANY},
    ):
        for logits in ("normal", "large", "dominant_key"):
            judge(made(form, dtype=dtype, logits=logits, **shape), way)


@pytest.mark.parametrize(
    "changes",
    [
        {"page_size": 1},
        {"page_size": 16, "table": "csr", "q_lens": RAGGED, "heads": 5},
        {"page_size": 48},
        {"page_size": 32, "strided": True, "heads": 20},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_ways_to_call(way, form, changes):
    judge(made(form, **changes), way)
    few = {"kv_lens": SKEWED[:FEW]}
    few |= {"q_lens": RAGGED[:FEW]} if "q_lens" in changes else {}
    judge(made(form, **(changes | few)), way)
    if "q_lens" not in changes:
        judge(made(form, kv_lens=[(37 * i) % 400 for i in range(200)], **changes), way)
    changes = changes | {"heads": 48, "kv_lens": MANY}
    many = {"q_lens": (RAGGED * 5)[: len(MANY)]} if "q_lens" in changes else {}
    judge(made(form, **(changes | many)), way)


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("form", ["fp8 fused", "656"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_number_of_heads_and_size_of_page(way, form, page_size):
    for heads in ALL_HEADS:
        judge(made(form, heads=heads, page_size=page_size, seed=heads), way)
        few = {"kv_lens": SKEWED[-FEW:], "seed": heads}
        judge(made(form, heads=heads, page_size=page_size, **few), way)
        if heads > 32:
            judge(made(form, heads=heads, page_size=page_size, kv_lens=MANY, seed=heads), way)
    for shape in (
        {"heads": 16, "s_q": 4},
        {"heads": 40, "s_q": 3, "causal": False},
        {"heads": 5, "q_lens": RAGGED},
        {"heads": 20, "q_lens": RAGGED, "table": "csr"},
    ):
        judge(made(form, page_size=page_size, **shape), way)


@pytest.mark.parametrize("sizes", [(0.5, 1.0), (-12, 4), (-40, 20)], ids=str)
@pytest.mark.parametrize("form", ["groups", "656"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_scales_that_differ_from_key_to_key(way, form, sizes):
    """Any float32 number, not powers of two alone; and 0."""
    for shape in ({"heads": 16}, {"heads": 33}, {"heads": 24, "kv_lens": MANY}):
        inputs = made(form, s_q=2, **shape)
        scales = inputs.cache.scales
        generator = torch.Generator("cuda").manual_seed(7)
        factor = torch.rand(scales.shape, generator=generator, device="cuda")
        factor = torch.exp2(factor * (sizes[1] - sizes[0]) + sizes[0])
        zero = torch.rand(scales.shape, generator=generator, device="cuda") < 0.05
        scaled = with_cache(inputs, scales=(scales * factor).masked_fill(zero, 0.0))
        judge(replace(scaled, softmax_scale=inputs.softmax_scale * 2.0 ** -max(0, sizes[1])), way)


@pytest.mark.parametrize("form", ["fp8 fused", "groups"])
def test_misaligned_rows(form):
    judge(made(form, strided=3), WAYS[0])


@pytest.mark.parametrize("logits", ["large", "equal_keys", "dominant_key"])
@pytest.mark.parametrize("form", ALL_SCALED)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_hostile_logits(way, form, logits):
    for kv_lens in (SKEWED, SKEWED[:FEW]):
        judge(made(form, kv_lens=kv_lens, logits=logits), way)
    judge(made(form, kv_lens=(*MANY, 5000), logits=logits, heads=64), way)


@pytest.mark.parametrize("shape", [{}, {"heads": 64, "kv_lens": SKEWED * 4}], ids=str)
@pytest.mark.parametrize("form", ALL_SCALED)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_scales_and_slots(way, form, shape):
    """Scales of any size; NaN wherever no key of the request is."""
    for exponent in (-110, 63, 65, 119, 120, 122):
        judge(all_scales(made(form, **shape), exponent), way)
    inputs = made(form, **shape)
    expected = judge(inputs, way)
    if expected is None:
        return
    everything = range(len(inputs.kv_lens))
    for kept in (everything, everything[:1], everything[-1:]):
        state = run(spoilt(inputs, ~owned_slots(inputs, kept)), way)
        assert torch.equal(state.out[list(kept)], expected.out[list(kept)])
        assert torch.equal(state.lse[list(kept)], expected.lse[list(kept)])
    assert state.out[0].isnan().all(), "its keys were spoilt"


@pytest.mark.parametrize("kv_lens", [SKEWED, SKEWED * 4], ids=["9 requests", "36 requests"])
@pytest.mark.parametrize("form", ALL_SCALED)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_queries_that_are_not_finite(way, form, kv_lens):
    inputs = made(form, heads=33, kv_lens=kv_lens)
    if is_refused(inputs, way):
        return
    expected = run(inputs, way)
    others = torch.ones(expected.lse.shape, dtype=torch.bool, device="cuda")
    inputs.q_nope[0, 0, 2, 7] = float("inf")
    inputs.q_rope[7, 0, 32, 9] = float("nan")
    others[0, 0, 2] = others[7, 0, 32] = False
    state = run(inputs, way)
    assert torch.equal(state.out[others], expected.out[others])
    assert torch.equal(state.lse[others], expected.lse[others])
    assert state.out[~others].isnan().all()


def plan_of(inputs: DecodeInputs, impl: str | None) -> mla_triton.Plan:
    """Made without a word about the cache."""
    q_nope = inputs.q_nope
    return mla_triton.plan(
        inputs.kv_lens,
        heads=q_nope.shape[-2],
        latent=q_nope.shape[-1],
        rope=inputs.q_rope.shape[-1],
        value_dim=inputs.value_dim,
        dtype=q_nope.dtype,
        s_q=q_nope.shape[1],
        impl=impl,
    )


@pytest.mark.parametrize("heads", [16, 33, 128])
@pytest.mark.parametrize("form", ["fp8 fused", "656", "584"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_plan_that_knows_no_cache_is_followed(way, form, heads):
    inputs = made(form, heads=heads)
    if is_refused(inputs, way):
        return
    planners = [None, "portable"]
    if devices.current().capability == (9, 0) and form != "584":
        planners.append("sm90")
    for planner in planners:
        plan = plan_of(inputs, planner)
        judge(inputs, way, plan=plan)
        # Without a word about the implementation, too.
        arguments, options = inputs.call_arguments()
        assert_within_budget(mla_triton.decode(*arguments, **options, plan=plan), inputs)


@pytest.mark.parametrize("planned", ["no plan", "a plan", "a plan of the format"])
@pytest.mark.parametrize(
    "shape", [{}, {"heads": 64, "kv_lens": SKEWED * 4}], ids=["16 heads", "64 heads"]
)
@pytest.mark.parametrize("form", ["fp8 fused", "656", "584"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_graph_with_new_lengths(way, form, shape, planned):
    inputs = made(form, **shape)
    if is_refused(inputs, way):
        return
    buffers = inputs.output_buffers()

    def step() -> None:
        plan = None
        if planned != "no plan":
            make = plan_of if planned == "a plan" else formatted_plan
            plan = make(inputs, None)
        run(inputs, way, plan=plan, **buffers)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    others = (1, 0, 0, 63, 60, 1, 700, 2000, 299), (4999, 0, 1, 2, 3, 4, 5, 6, 0), [0] * len(SKEWED)
    times = len(inputs.kv_lens) // len(SKEWED)
    for kv_lens in (SKEWED, *others):
        inputs.kv_lens.copy_(torch.tensor(list(kv_lens) * times, dtype=torch.int32))
        for tensor in buffers.values():
            tensor.fill_(float("nan"))
        graph.replay()
        assert_within_budget(mla_triton.AttentionState(**buffers), inputs)
