"""Decode against the two oracles, on data that punishes every stray read, and its invariants."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings

import mla_triton
from mla_triton import testing
from mla_triton.kernels.common.paged import slot_offset
from mla_triton.kernels.common.tiles import narrow
from mla_triton.testing.problems import DecodeInputs, decode_inputs, untouched_padding
from mla_triton.testing.strategies import decode_problems

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def run(inputs: DecodeInputs, **options) -> mla_triton.AttentionState:
    """Decodes into buffers of NaN, by the portable kernels, and checks what lies between rows."""
    arguments, own = inputs.call_arguments()
    buffers = inputs.output_buffers()
    state = mla_triton.decode(*arguments, **own, **buffers, **({"impl": "portable"} | options))
    assert state.out is buffers["out"]
    assert untouched_padding(state.out)
    assert untouched_padding(state.lse)
    return state


def check(inputs: DecodeInputs, **options) -> mla_triton.AttentionState:
    state = run(inputs, **options)
    testing.assert_within_budget(state, inputs)
    return state


def equal(one: mla_triton.AttentionState, other: mla_triton.AttentionState) -> bool:
    return torch.equal(one.out, other.out) and torch.equal(one.lse, other.lse)


@given(decode_problems(rope_in_value=(False,)))
@settings(max_examples=60)
def test_hostile_problems(inputs):
    check(inputs)


@given(
    decode_problems(
        dims=((448, 64), (96, 32)), rope_in_value=(True,), layouts=("fused",), max_kv_len=90
    )
)
@settings(max_examples=12)
def test_rope_inside_the_value(inputs):
    check(inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("latent", "rope", "value_dim"),
    [
        (512, 64, None),
        (512, 0, None),
        (256, 64, None),
        (256, 32, None),
        (128, 32, None),
        (448, 64, 512),
    ],
)
def test_model_dimensions(dtype, latent, rope, value_dim):
    check(
        decode_inputs(
            kv_lens=[130, 0, 33],
            heads=6,
            latent=latent,
            rope=rope,
            value_dim=value_dim,
            dtype=dtype,
        )
    )


@pytest.mark.parametrize("page_size", [1, 16, 32, 64, 128, 3, 48, 100, 192])
def test_page_sizes(page_size):
    check(decode_inputs(kv_lens=[150, 64, 1], heads=4, latent=128, rope=32, page_size=page_size))


@pytest.mark.parametrize("heads", [1, 2, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 63, 96, 128])
def test_head_counts(heads):
    check(decode_inputs(kv_lens=[70, 9], heads=heads, latent=128, rope=32, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logits", ["large", "equal_keys", "dominant_key"])
def test_extreme_logits(dtype, logits):
    check(decode_inputs(kv_lens=[200, 31], heads=5, logits=logits, dtype=dtype, s_q=2))


def test_a_row_that_sees_no_key_is_zero_with_lse_minus_infinity():
    inputs = decode_inputs(kv_lens=[0, 2], s_q=4, heads=3, latent=128, rope=32)
    state = check(inputs)
    assert (state.out[0] == 0).all()
    assert (state.out[1, :2] == 0).all()
    assert (state.lse[0] == -torch.inf).all()
    assert (state.lse[1, :2] == -torch.inf).all()
    assert state.lse[1, 2:].isfinite().all()


@pytest.mark.parametrize(
    ("keys", "parts", "splits"),
    [(60, 48, 2), (200, 48, 7), (400, 48, 13), (1000, 48, 32), (2560, 60, 40), (28_800, 200, 150)],
)
def test_a_group_of_any_number_of_pieces(keys, parts, splits):
    """The more pieces, the more of them the merge takes in one load, up to a limit."""
    kv_lens = [4] * 3 + [keys]
    inputs = decode_inputs(kv_lens=kv_lens, heads=2, latent=128, rope=32, dtype=torch.float32)
    plan = mla_triton.plan(
        inputs.kv_lens, heads=2, latent=128, rope=32, dtype=torch.float32, parts=parts
    )
    groups = plan.schedule[2 + 2 * (parts + 1) :].view(-1, 4)
    assert groups[3, 2] == splits
    check(inputs, plan=plan)


def test_page_size_does_not_matter():
    """The same keys in pages of 1 and of 16 give the same bits: blocks begin at the same keys."""
    inputs = decode_inputs(kv_lens=[96, 160], heads=4, latent=128, rope=32, page_size=16)
    columns = torch.arange(inputs.page_table.shape[1] * 16)
    used = columns < inputs.kv_lens[:, None]
    pages = inputs.page_table.repeat_interleave(16, 1).long()
    slots = torch.where(used, pages * 16 + columns % 16, 2**31 - 1).int()
    flat = replace(inputs, cache=inputs.cache.reshape(-1, 1, 160), page_table=slots)
    assert equal(run(inputs), run(flat))


def test_ragged_queries_equal_uniform_ones():
    inputs = decode_inputs(kv_lens=[100, 70], s_q=2, heads=4, latent=128, rope=32)
    ragged = replace(
        inputs,
        q_nope=inputs.q_nope.flatten(0, 1),
        q_rope=inputs.q_rope.flatten(0, 1),
        cu_seqlens_q=torch.tensor([0, 2, 4], dtype=torch.int32),
    )
    one, other = run(inputs), run(ragged)
    testing.assert_within_budget(other, ragged)
    assert torch.equal(one.out.flatten(0, 1), other.out)


def test_many_ragged_queries_make_several_groups():
    inputs = decode_inputs(
        kv_lens=[90, 40, 200], q_lens=[1, 0, 60], heads=6, latent=128, rope=32, causal=True
    )
    check(inputs)


def test_one_key_is_returned_exactly():
    inputs = decode_inputs(kv_lens=[1], heads=3, latent=128, rope=32)
    page = int(inputs.page_table[0, 0])
    expected = inputs.cache[page, 0, :128].expand(1, 1, 3, 128)
    assert torch.equal(run(inputs).out, expected)


def test_bounds_hold_on_lengths_and_pages_that_lie():
    """Lengths past the table, negative ones, and page ids outside the cache: no stray access."""
    inputs = decode_inputs(kv_lens=[64, 64, 64], heads=2, latent=128, rope=32, page_size=16)
    cache = torch.nan_to_num(inputs.cache)
    table = inputs.page_table.clone()
    table[1, 1] = 2**31 - 1
    table[1, 2] = -(2**31)
    wild = replace(
        inputs,
        cache=cache,
        page_table=table,
        max_kv_len=64,
        kv_lens=torch.tensor([2**31 - 1, 64, -7], dtype=torch.int32),
    )
    state = run(wild)
    assert state.out.isfinite().all()
    assert (state.lse[2] == -torch.inf).all()
    longest = replace(wild, kv_lens=torch.tensor([64, 64, 0], dtype=torch.int32))
    assert torch.equal(run(longest).out[0], state.out[0])


def test_a_plan_serves_new_lengths_after_update():
    first = decode_inputs(kv_lens=[300, 20, 0], heads=4, latent=128, rope=32)
    second = decode_inputs(kv_lens=[5, 310, 222], heads=4, latent=128, rope=32, seed=1)
    plan = mla_triton.plan(first.kv_lens, heads=4, latent=128, rope=32)
    check(first, plan=plan)
    plan.update(second.kv_lens)
    check(second, plan=plan)


def test_a_plan_made_without_a_bound_serves_a_bounded_call():
    """A length past `max_kv_len` is cut there, whatever the schedule was made for."""
    inputs = decode_inputs(kv_lens=[300, 200], heads=4, latent=128, rope=32)
    plan = mla_triton.plan(inputs.kv_lens, heads=4, latent=128, rope=32)
    check(replace(inputs, max_kv_len=130), plan=plan)


def test_reference_runs_when_asked_for():
    inputs = decode_inputs(kv_lens=[40, 0], heads=3, latent=96, rope=24)
    state = run(inputs, impl="reference")
    testing.assert_within_budget(state, inputs)


def test_empty_batch():
    q = torch.empty(0, 1, 4, 512)
    table = torch.empty(0, 1, dtype=torch.int32)
    state = mla_triton.decode(
        q,
        None,
        torch.zeros(1, 64, 512),
        table,
        torch.empty(0, dtype=torch.int32),
        softmax_scale=1.0,
    )
    assert state.out.shape == (0, 1, 4, 512)
    assert state.lse.shape == (0, 1, 4)


@triton.jit
def offset_kernel(target, STRIDE: tl.constexpr, PAGE_SIZE: tl.constexpr):
    slots = tl.arange(0, PAGE_SIZE)
    tl.store(target + slots, slot_offset(slots, STRIDE, PAGE_SIZE).to(tl.int64))


@pytest.mark.parametrize("stride", [576, 2**25 - 1, 2**25, 2**26, 2**31 + 16])
def test_offsets_in_a_page_do_not_overflow(stride):
    """A cache laid out slot by slot has pages whose tokens lie gigabytes apart."""
    target = torch.empty(64, dtype=torch.int64)
    offset_kernel[(1,)](target, stride, 64)
    assert target.tolist() == [slot * stride for slot in range(64)]


@triton.jit
def round_kernel(source, target):
    offsets = tl.arange(0, 1024)
    x = tl.load(source + offsets)
    tl.store(target + offsets, narrow(x, tl.bfloat16, True))


def test_interpreter_rounds_bfloat16_to_nearest():
    """The interpreter of Triton 3.6 truncates: the kernel spells the rounding out."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(1024, generator=generator) * 10.0 ** torch.randint(
        -20, 20, (1024,), generator=generator
    )
    source[:4] = torch.tensor([0.0, -0.0, float("inf"), float("nan")])
    target = torch.empty(1024, dtype=torch.bfloat16)
    round_kernel[(1,)](source, target)
    assert target[3].isnan()
    numbers = source.isfinite()
    expected = source.bfloat16()
    assert torch.equal(target[numbers].view(torch.int16), expected[numbers].view(torch.int16))
    assert target[2] == float("inf")
