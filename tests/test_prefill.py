"""Prefill against the two oracles, on data that punishes every stray read, and its invariants."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

import mla_triton
from mla_triton import device as devices
from mla_triton import testing
from mla_triton.kernels.portable import prefill as portable
from mla_triton.kernels.portable import prefill_config
from mla_triton.kernels.portable.prefill_config import Config
from mla_triton.ops import prefill as operation
from mla_triton.state import AttentionState
from mla_triton.testing import problem_of
from mla_triton.testing.prefill_problems import PrefillInputs, prefill_inputs, whole
from mla_triton.testing.problems import int32, untouched_padding
from mla_triton.testing.strategies import prefill_problems

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DIMS = ((192, 64, 128), (256, 64, 256), (128, 64, 128), (96, 32, 64))
SMALL = {"qk": 96, "rope": 32, "v_dim": 64}
LENS = {"q_lens": [5, 0, 40, 33, 7], "k_lens": [70, 9, 0, 33, 3]}


def run(inputs: PrefillInputs, **options) -> AttentionState:
    """Prefills into buffers of NaN, by the portable kernel, and checks what lies between rows."""
    arguments, own = inputs.call_arguments()
    buffers = inputs.output_buffers()
    state = mla_triton.prefill(*arguments, **own, **buffers, **({"impl": "portable"} | options))
    assert state.out is buffers["out"]
    assert state.lse is buffers["lse"]
    assert untouched_padding(state.out)
    assert untouched_padding(state.lse)
    return state


def check(inputs: PrefillInputs, **options) -> AttentionState:
    state = run(inputs, **options)
    testing.assert_within_budget(state, inputs)
    return state


def assert_equal(one: AttentionState, other: AttentionState) -> None:
    assert torch.equal(one.out, other.out)
    assert torch.equal(one.lse, other.lse)


# -- right, on every kind of data


@given(prefill_problems())
@settings(max_examples=60)
def test_hostile_problems(inputs):
    check(inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("qk", "rope", "v_dim"), DIMS)
@pytest.mark.parametrize("split", [False, True])
def test_model_dimensions(split, qk, rope, v_dim, dtype):
    check(
        prefill_inputs(
            q_lens=[3, 40], k_lens=[70, 41], heads=2, qk=qk, rope=rope, v_dim=v_dim,
            split_k=split, split_q=split, dtype=dtype,
        )
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logits", ["large", "equal_keys", "dominant_key"])
@pytest.mark.parametrize("constant_values", [False, True])
def test_extreme_values(constant_values, logits, dtype):
    check(
        prefill_inputs(
            q_lens=[50, 9], k_lens=[50, 100], dtype=dtype, logits=logits,
            constant_values=constant_values, **SMALL,
        )
    )  # fmt: skip


@pytest.mark.parametrize("scale", [-0.1, -3.0, 0.0, 1e-40, 1.0])
@pytest.mark.parametrize("causal", [False, True])
def test_any_finite_scale(causal, scale):
    inputs = prefill_inputs(**LENS, dtype=torch.float32, causal=causal, **SMALL)
    check(replace(inputs, softmax_scale=scale))


@pytest.mark.parametrize(
    ("block_m", "block_n"), [(16, 16), (16, 64), (64, 32), (32, 64), (128, 16)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_any_tiles_give_the_answer(monkeypatch, causal, block_m, block_n):
    config = Config(block_m, block_n, 4, 1)
    monkeypatch.setattr(portable, "choose", lambda problem, device, tile: (config, "a test's"))
    operation.forget()
    try:
        check(prefill_inputs(q_lens=[70, 3], k_lens=[130, 64], heads=2, causal=causal, **SMALL))
    finally:
        operation.forget()


@pytest.mark.parametrize(("kv_heads_held", "abreast"), [(0, 2), (1, 2), (2, 4), (9, 6)])
def test_any_number_of_heads_abreast(monkeypatch, kv_heads_held, abreast):
    """Heads that share keys go together; the last group of heads may be smaller."""
    inputs = prefill_inputs(
        q_lens=[40, 39], heads=6, kv_heads=3, dtype=torch.float32, split_k=True, **SMALL
    )
    problem = problem_of(inputs)
    one = inputs.k[:, 0].nbytes + inputs.v[:, 0].nbytes
    monkeypatch.setattr(prefill_config, "L2_BYTES", kv_heads_held * one)
    assert prefill_config.heads_abreast(problem) == abreast
    check(inputs)


def test_more_sequences_than_one_look_finds():
    """The search for a program's tile goes on behind the sequences that it sees at once."""
    q_lens = [i % 3 for i in range(int(portable.SEQUENCES.value) + 70)]
    q_lens[10], q_lens[-5] = 40, 35
    check(prefill_inputs(q_lens=q_lens, heads=1, dtype=torch.float16, **SMALL))


# -- edges


def test_a_row_that_sees_no_key_is_zero_with_lse_minus_infinity():
    inputs = prefill_inputs(q_lens=[4, 3, 40], k_lens=[0, 1, 5], dtype=torch.float16, **SMALL)
    state = check(inputs)
    empty = [*range(4), 4, 5, *range(7, 42)]
    assert (state.out[empty] == 0).all()
    assert (state.lse[empty] == -torch.inf).all()
    seeing = [row for row in range(47) if row not in empty]
    assert state.lse[seeing].isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
def test_empty_sequences_change_nothing(causal):
    """Bit for bit, whether they lack queries, keys, or both."""
    inputs = prefill_inputs(q_lens=[5, 40], k_lens=[70, 33], causal=causal, **SMALL)
    expected = run(inputs)
    with_empty = replace(
        inputs,
        cu_seqlens_q=int32([0, 0, 5, 5, 45, 45, 45]),
        cu_seqlens_k=int32([0, 0, 70, 70, 103, 103, 103]),
    )
    assert_equal(run(with_empty), expected)


def test_keys_without_queries_are_passed_over():
    inputs = prefill_inputs(q_lens=[5, 0, 40], k_lens=[70, 33, 10], dtype=torch.float32, **SMALL)
    inputs.k[70:103] = torch.nan
    inputs.v[70:103] = torch.nan
    state = run(inputs)
    assert state.out.isfinite().all()
    parts = replace(inputs, cu_seqlens_q=int32([0, 5]), cu_seqlens_k=int32([0, 70]))
    assert torch.equal(run(parts).out[:5], state.out[:5])


def test_what_is_wrong_in_one_sequence_stays_there():
    inputs = prefill_inputs(q_lens=[20, 9, 40], k_lens=[21, 45, 50], dtype=torch.float16, **SMALL)
    expected = run(inputs)
    inputs.k[21:66], inputs.v[21:66], inputs.q[20:29] = torch.nan, torch.inf, torch.nan
    state = run(inputs)
    others = [*range(20), *range(29, 69)]
    assert torch.equal(state.out[others], expected.out[others])
    assert torch.equal(state.lse[others], expected.lse[others])


def test_rows_behind_the_last_sequence_are_not_written():
    inputs = prefill_inputs(q_lens=[5, 40], **SMALL)
    shorter = replace(inputs, cu_seqlens_q=int32([0, 5, 38]), causal=False)
    state = run(shorter)
    assert state.out[:38].isfinite().all()
    assert state.out[38:].isnan().all()
    assert state.lse[38:].isnan().all()


def test_one_key_is_returned_exactly():
    inputs = prefill_inputs(q_lens=[3], k_lens=[1], causal=False, **SMALL)
    assert torch.equal(run(inputs).out, inputs.v[:1].expand(3, -1, -1))


@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_to_compute(batch):
    offsets = torch.zeros(batch + 1, dtype=torch.int32)
    q, k, v = torch.empty(0, 4, 192), torch.empty(0, 2, 192), torch.empty(0, 2, 128)
    state = mla_triton.prefill(
        q, k, v, cu_seqlens_q=offsets, cu_seqlens_k=offsets, softmax_scale=1.0
    )
    assert state.out.shape == (0, 4, 128)
    assert state.lse.shape == (0, 4)


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ([0, 2**31 - 1, -7, 45], [-5, 2**31 - 1, 3, 60]),
        ([45, 0, 45, 0], [0, 60, 0, 60]),
        ([-(2**31), 2**31 - 1, -(2**31), 2**31 - 1], [2**31 - 1, -(2**31), 2**31 - 1, 0]),
    ],
)
def test_bounds_hold_on_offsets_that_lie(queries, keys):
    """Negative, decreasing and far too large: no access outside the tensors."""
    inputs = prefill_inputs(q_lens=[45], k_lens=[60], heads=2, **SMALL)
    wild = replace(inputs, cu_seqlens_q=int32(queries), cu_seqlens_k=int32(keys))
    run(wild)
    run(wild, max_seqlen_q=45)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("qk", "rope", "v_dim"), DIMS)
@pytest.mark.parametrize("split_q", [False, True])
def test_one_rope_for_all_heads_equals_copies_of_it(split_q, qk, rope, v_dim, dtype):
    inputs = prefill_inputs(
        q_lens=[40, 3], k_lens=[41, 50], heads=2, qk=qk, rope=rope, v_dim=v_dim, dtype=dtype,
        split_k=True, split_q=split_q,
    )  # fmt: skip
    assert_equal(run(inputs), run(whole(inputs)))


def test_grouped_heads_equal_repeated_ones():
    inputs = prefill_inputs(**LENS, heads=6, kv_heads=2, split_k=True, dtype=torch.float16)
    repeated = replace(
        inputs, k=inputs.k.repeat_interleave(3, 1), v=inputs.v.repeat_interleave(3, 1)
    )
    assert_equal(run(inputs), run(repeated))


@pytest.mark.parametrize("strided", [True, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(dtype, strided):
    plain = prefill_inputs(**LENS, split_k=True, split_q=True, dtype=dtype, **SMALL)
    apart = prefill_inputs(
        **LENS, split_k=True, split_q=True, dtype=dtype, strided=strided, **SMALL
    )
    assert apart.k.stride() != plain.k.stride()
    assert_equal(run(apart), run(plain))


def test_keys_and_values_as_columns_of_one_projection():
    """As kv_b_proj leaves them: `[tokens, heads, nope + v]`."""
    inputs = prefill_inputs(**LENS, split_k=True, dtype=torch.float16)
    both = torch.cat([inputs.k, inputs.v], -1)
    k, v = both.split([128, 128], -1)
    assert k.data_ptr() != v.data_ptr()
    assert_equal(run(replace(inputs, k=k, v=v)), run(inputs))


def test_one_tensor_of_offsets_for_queries_and_keys(monkeypatch):
    """As most prompts have it; the next call like it may come with two."""
    kept = []
    monkeypatch.setattr(operation.RECALLED, "keep", lambda *given: kept.append(given[2]))
    inputs = prefill_inputs(q_lens=[5, 40], **SMALL)
    expected = run(inputs)
    assert_equal(run(replace(inputs, cu_seqlens_k=inputs.cu_seqlens_q)), expected)
    for recording in kept:
        assert len(recording._places) - 1 == recording._given == 7


def test_run_to_run_bitwise_equality():
    inputs = prefill_inputs(**LENS, **SMALL)
    assert_equal(run(inputs), run(inputs))


@pytest.mark.parametrize("hint", [40, 41, 1000])
def test_a_hint_of_the_longest_sequence_changes_nothing(hint):
    inputs = prefill_inputs(**LENS, **SMALL)
    assert_equal(run(inputs, max_seqlen_q=hint), run(inputs))


def test_a_hint_spares_programs_and_never_adds_any():
    problem = replace(problem_of(prefill_inputs(**LENS)), queries=1000, batch=100)
    config = Config(64, 64, 4, 2)
    without = prefill_config.tile_slots(problem, config)
    assert without == 1000 // 64 + 100
    assert prefill_config.tile_slots(replace(problem, max_seqlen_q=64), config) == 100
    assert prefill_config.tile_slots(replace(problem, max_seqlen_q=5000), config) == without
    assert prefill_config.tile_slots(replace(problem, max_seqlen_q=0), config) == 1


def test_the_grid_has_a_slot_for_every_tile():
    for lens in ([1] * 9, [64] * 3, [65, 63, 0, 128], [0, 0], [1000], [0, 640, 1, 1]):
        problem = replace(
            problem_of(prefill_inputs(q_lens=[1], **SMALL)), queries=sum(lens), batch=len(lens)
        )
        for block_m in (16, 64, 128):
            tiles = sum(-(-n // block_m) for n in lens)
            config = Config(block_m, 64, 4, 2)
            assert prefill_config.tile_slots(problem, config) >= tiles
            hinted = replace(problem, max_seqlen_q=max(lens))
            assert prefill_config.tile_slots(hinted, config) >= tiles


# -- implementations


def test_the_reference_runs_when_asked_for():
    inputs = prefill_inputs(**LENS, qk=40, rope=8, v_dim=24)
    testing.assert_within_budget(run(inputs, impl="reference"), inputs)


def test_fields_of_a_problem(device):
    inputs = prefill_inputs(
        q_lens=[5, 30], heads=6, kv_heads=2, split_k=True, dtype=torch.float16, device=device
    )
    problem = problem_of(inputs)
    assert (problem.heads, problem.kv_heads, problem.group) == (6, 2, 3)
    assert (problem.qk_dim, problem.value_dim) == (192, 128)
    assert (problem.q_nope, problem.k_nope) == (192, 128)
    assert (problem.batch, problem.queries) == (2, 35)
    assert problem.usual_queries == 32
    assert problem.aligned
    assert not problem_of(prefill_inputs(**LENS, strided=1)).aligned


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"qk_dim": 160}, None),
        ({"qk_dim": 200}, "queries and keys must have a power of two columns, or the sum of two"),
        ({"qk_dim": 320}, "from 16 to 256, got 320"),
        ({"qk_dim": 136}, "from 16 to 256, got 136"),
        ({"value_dim": 96}, "v must have 16, 32, 64, 128 or 256 columns, got 96"),
    ],
)
def test_reasons_against_a_problem(changes, reason):
    problem = replace(problem_of(prefill_inputs(**LENS)), **changes)
    found = prefill_config.why_not(problem, devices.from_label("9.0"))
    assert found is None if reason is None else reason in found


def test_every_card_has_a_config_for_every_width():
    for label in devices.KNOWN:
        card = devices.from_label(label)
        for qk, rope, v_dim in DIMS:
            for dtype in DTYPES:
                for usual in (1, 16, 64, 128):
                    problem = replace(
                        problem_of(prefill_inputs(**LENS)), dtype=dtype, qk_dim=qk, q_nope=qk,
                        k_nope=qk - rope, value_dim=v_dim, usual_queries=usual,
                    )  # fmt: skip
                    config, reason = prefill_config.choose(problem, card)
                    valid, rule = prefill_config.is_valid(config, problem, card)
                    assert valid, rule
                    assert reason.endswith(rule)


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (Config(24, 64, 4, 2), "block_m must be one of (16, 32, 64, 128, 256), got 24"),
        (Config(64, 8, 4, 2), "block_n must be one of (16, 32, 64, 128, 256), got 8"),
        (Config(64, 64, 3, 2), "num_warps must be one of (1, 2, 4, 8), got 3"),
        (Config(64, 64, 4, 0), "num_stages must be in [1, 6], got 0"),
        (Config(128, 128, 8, 2), "needs 133120 bytes of shared memory, 8.9 has 101376"),
    ],
)
def test_configs_that_are_refused(config, rule):
    problem = problem_of(prefill_inputs(**LENS))
    card = devices.from_label("8.9")
    assert prefill_config.is_valid(config, problem, card) == (False, rule)
