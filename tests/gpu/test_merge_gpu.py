"""Merge on the GPU in this machine: right in every form, in place, captured, far out in memory."""

from __future__ import annotations

import pytest
import torch
from test_merge import merge, same_bits

import mla_triton
from mla_triton import AttentionState, validate_merge
from mla_triton import device as devices
from mla_triton.kernels.portable import merge as portable
from mla_triton.ops import merge as operation
from mla_triton.testing import (
    assert_within_budget,
    decode_inputs,
    merge_inputs,
    untouched_padding,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
INF = float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("states", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("stacked", [False, True])
def test_states(stacked, states, dtype):
    for masked in (False, True):
        inputs = merge_inputs(
            states=states, tokens=(7, 3), heads=20, dtype=dtype, stacked=stacked, masked=masked,
            device="cuda",
        )  # fmt: skip
        assert_within_budget(merge(inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("states", [9, 15, 16, 64])
def test_long_stacks(states, dtype):
    inputs = merge_inputs(
        states=states, tokens=(33,), heads=16, dtype=dtype, stacked=True, device="cuda"
    )
    assert_within_budget(merge(inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value_dim", [1, 7, 16, 64, 96, 128, 192, 256, 500, 512, 1024, 4096])
def test_widths(value_dim, dtype):
    inputs = merge_inputs(
        states=3, tokens=(5,), heads=6, value_dim=value_dim, dtype=dtype, device="cuda"
    )
    assert_within_budget(merge(inputs), inputs)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("first_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, first_dtype, out_dtype):
    inputs = merge_inputs(
        states=3, tokens=(70,), heads=5, dtype=dtype, first_dtype=first_dtype,
        out_dtype=out_dtype, device="cuda",
    )  # fmt: skip
    assert_within_budget(merge(inputs, **inputs.output_buffers()), inputs)


@pytest.mark.parametrize("spread", ["near", "far", "equal"])
@pytest.mark.parametrize("level", [0.0, 900.0, -900.0])
def test_magnitudes(level, spread):
    for dtype in DTYPES:
        inputs = merge_inputs(
            states=4, tokens=(64,), heads=8, dtype=dtype, spread=spread, level=level, device="cuda"
        )
        assert_within_budget(merge(inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [True, 3, 16])
@pytest.mark.parametrize("stacked", [False, True])
def test_strides_and_buffers(stacked, strided, dtype):
    inputs = merge_inputs(
        states=4, tokens=(6, 5), heads=12, dtype=dtype, strided=strided, stacked=stacked,
        masked=True, device="cuda",
    )  # fmt: skip
    buffers = inputs.output_buffers()
    state = merge(inputs, **buffers)
    assert state.out is buffers["out"]
    assert_within_budget(state, inputs)
    assert untouched_padding(state.out)
    assert untouched_padding(state.lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("states", [2, 8, 20])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("first_dtype", [None, torch.float32])
def test_in_place_is_as_apart(first_dtype, masked, states, dtype):
    """Warps of one program read the lse of a row that one of them overwrites: many rows, so that
    a warp ahead of the others would show, and several times."""
    for seed in range(5):
        recipe = {
            "states": states, "tokens": (1500,), "heads": 16, "dtype": dtype, "masked": masked,
            "first_dtype": first_dtype, "stacked": states > 8, "seed": seed,
        }  # fmt: skip
        inputs = merge_inputs(**recipe, device="cuda")
        expected = merge(inputs)
        first = inputs.states[0]
        merged = merge(inputs, out=first.out, lse=first.lse)
        assert merged.out is first.out
        assert same_bits(merged, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_of_the_last_state(dtype):
    inputs = merge_inputs(states=3, tokens=(2000,), heads=16, dtype=dtype, device="cuda")
    expected = merge(inputs)
    assert same_bits(merge(inputs, out=inputs.states[2].out, lse=inputs.states[2].lse), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 1, 4])
def test_empty_states_are_neutral_to_the_bit(place, dtype):
    alone = AttentionState(
        torch.randn(300, 16, 512, device="cuda").to(dtype),
        torch.randn(300, 16, device="cuda") * 100,
    )
    states = [
        AttentionState(torch.full_like(alone.out, what), torch.full_like(alone.lse, -INF))
        for what in (float("nan"), INF, -INF, 7.0)
    ]
    states.insert(place, alone)
    assert same_bits(mla_triton.merge(states), alone)


@pytest.mark.parametrize("states", [2, 8, 11])
def test_empty_states_alone_stay_empty(states):
    inputs = merge_inputs(
        states=states, heads=16, tokens=(40,), empty=1.0, stacked=True, device="cuda"
    )
    merged = merge(inputs)
    assert (merged.out == 0).all()
    assert (merged.lse == -INF).all()


@pytest.mark.parametrize("strange", [float("nan"), INF])
@pytest.mark.parametrize("place", [0, 1, 9])
def test_a_strange_lse_is_of_its_row_alone(place, strange):
    inputs = merge_inputs(states=10, tokens=(40,), heads=16, stacked=True, device="cuda")
    inputs.states[place].lse[2, 1] = strange
    merged = merge(inputs)
    assert merged.lse[2, 1].isnan()
    assert merged.out[2, 1].isnan().all()
    merged.lse[2, 1] = merged.out[2, 1] = 0.0
    assert not merged.lse.isnan().any()
    assert not merged.out.isnan().any()


def test_where_the_mask_is_false_the_first_state_stays_as_it_is():
    inputs = merge_inputs(tokens=(900,), heads=16, masked=True, device="cuda")
    merged, kept = merge(inputs), ~inputs.mask
    first = AttentionState(*(tensor[kept] for tensor in inputs.states[0]))
    assert same_bits(AttentionState(*(tensor[kept] for tensor in merged)), first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_parts_of_a_decode_are_the_whole(dtype):
    """Decoded by the kernels, each into its own dtype but for the result."""
    inputs = decode_inputs(
        kv_lens=[0, 5, 400, 900], heads=16, dtype=torch.float32, causal=False, device="cuda"
    )
    (q_nope, q_rope, cache, table, kv_lens), options = inputs.call_arguments()
    cut = 5
    parts = [
        mla_triton.decode(q_nope, q_rope, cache, pages.contiguous(), lengths, **options)
        for pages, lengths in (
            (table[:, :cut], kv_lens.clamp(max=64 * cut)),
            (table[:, cut:], (kv_lens - 64 * cut).clamp(min=0)),
        )
    ]
    out = torch.empty(parts[0].out.shape, dtype=dtype, device="cuda")
    merged = mla_triton.merge(parts, out=out)
    if dtype == torch.float32:
        assert_within_budget(merged, inputs)
    assert merged.out.dtype == dtype
    assert (merged.lse[0] == -INF).all()


@pytest.mark.parametrize("states", [2, 12])
def test_equal_bits_run_to_run(states):
    inputs = merge_inputs(
        states=states, tokens=(3000,), heads=16, stacked=states > 8, device="cuda"
    )
    first = merge(inputs)
    for _ in range(20):
        assert same_bits(merge(inputs), first)


def test_a_cuda_graph_merges_what_is_there_at_each_replay():
    inputs = merge_inputs(tokens=(64,), heads=16, empty=0.0, device="cuda")
    buffers = inputs.output_buffers()
    merge(inputs, **buffers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merge(inputs, **buffers)
    for seed in (1, 2):
        other = merge_inputs(tokens=(64,), heads=16, seed=seed, device="cuda")
        for state, new in zip(inputs.states, other.states, strict=True):
            for tensor, values in zip(state, new, strict=True):
                tensor.copy_(values)
        graph.replay()
        assert_within_budget(AttentionState(**buffers), other)


def test_rows_past_two_to_the_31_elements():
    """More than 2**31 elements in each state, and the last rows are right."""
    tokens, heads, value_dim = 2**31 // (128 * 512) + 5, 128, 512
    needed = 3 * tokens * heads * value_dim * 2
    if torch.cuda.mem_get_info()[0] < needed + 2**30:
        pytest.skip(f"needs {needed >> 30} GiB of free memory")

    def state(fill: float) -> AttentionState:
        shape = (tokens, heads, value_dim)
        out = torch.full(shape, fill, dtype=torch.bfloat16, device="cuda")
        return AttentionState(out, torch.zeros(tokens, heads, device="cuda"))

    one, other = state(1.0), state(1.0)
    few = merge_inputs(tokens=(7,), heads=heads, device="cuda")
    for whole, part in zip((one, other), few.states, strict=True):
        whole.out[-7:], whole.lse[-7:] = part
    merged = mla_triton.merge([one, other])
    assert_within_budget(AttentionState(merged.out[-7:], merged.lse[-7:]), few)
    assert (merged.out[:-7] == 1.0).all()
    mask = torch.ones(tokens, dtype=torch.bool, device="cuda")
    mask[-3:] = False
    again = mla_triton.merge([one, other], mask=mask, out=one.out, lse=one.lse)
    last = few.states[0]
    assert same_bits(
        AttentionState(again.out[-3:], again.lse[-3:]),
        AttentionState(last.out[-3:], last.lse[-3:]),
    )
    assert torch.equal(again.out[-7:-3].view(torch.int16), merged.out[-7:-3].view(torch.int16))


def test_every_config_is_right():
    """Those that the heuristic never takes here, too."""
    inputs = merge_inputs(states=3, tokens=(50,), heads=16, masked=True, device="cuda")
    device, index = devices.current(), torch.cuda.current_device()
    outs, lses = validate_merge.unpack(inputs.given)
    buffers = inputs.output_buffers()
    found = validate_merge.merge(outs, lses, inputs.mask, **buffers)
    tensors = portable.MergeTensors(outs, lses, inputs.mask, **buffers)
    tried = 0
    for rows in (1, 2, 4, 8, 16, 32):
        for warps in portable.WARPS:
            config = portable.Config(rows, warps)
            if not portable.is_valid(config, found.problem, device)[0]:
                continue
            ready = operation.prepare_with(config, portable, found.problem, device, index)
            for buffer in buffers.values():
                buffer.fill_(float("nan"))
            portable.launch(ready.kernel, found.problem, config, found.layout, tensors)
            assert_within_budget(AttentionState(**buffers), inputs)
            tried += 1
    assert tried > 10


def test_another_stream_and_the_operator():
    inputs = merge_inputs(tokens=(64,), heads=16, device="cuda")
    expected = merge(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        there = merge(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    assert same_bits(there, expected)
    buffers = inputs.output_buffers()
    outs, lses = ([state[kind] for state in inputs.states] for kind in (0, 1))
    torch.ops.mla_triton.merge(outs, lses, None, buffers["out"], buffers["lse"], None)
    assert same_bits(AttentionState(**buffers), expected)


def test_the_reference_is_never_taken_by_itself():
    wide = merge_inputs(tokens=(1,), heads=1, value_dim=4097, device="cuda")
    with pytest.raises(NotImplementedError, match=r"^no implementation of merge can run on "):
        merge(wide)
    assert_within_budget(merge(wide, impl="reference"), wide)
