"""Decode as machine code on the GPU in this machine, against the float64 oracle and its budget.

By every implementation, and by both forms of the Hopper kernel (`ways.py`); what one of them does
not take, it has to refuse.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ways import Way, is_refused, problem_of, run

import mla_triton
from mla_triton import device as devices
from mla_triton import select
from mla_triton.cache import LatentCache
from mla_triton.ops import decode as operation
from mla_triton.testing import assert_within_budget, decode_inputs, untouched_padding
from mla_triton.testing.problems import UNUSED_PAGE, DecodeInputs

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SKEWED = (5000, 0, 1, 63, 64, 65, 700, 2048)
DIMS = [(512, 64), (512, 0), (256, 64), (256, 32), (128, 32)]


def judge(way: Way, **recipe) -> None:
    """Within the budget, or refused with the reason, where the way does not take the problem."""
    inputs = decode_inputs(device="cuda", **recipe)
    if not is_refused(inputs, way):
        assert_within_budget(run(inputs, way), inputs)


def plan_of(inputs: DecodeInputs, impl: str | None = None) -> mla_triton.Plan:
    q_nope, q_rope = inputs.q_nope, inputs.q_rope
    return mla_triton.plan(
        inputs.kv_lens,
        heads=q_nope.shape[-2],
        latent=q_nope.shape[-1],
        rope=0 if q_rope is None else q_rope.shape[-1],
        dtype=q_nope.dtype,
        s_q=q_nope.shape[1],
        impl=impl,
    )


def test_the_hopper_kernel_runs_here_if_this_is_hopper(way):
    """So that what follows is not refusals alone."""
    inputs = decode_inputs(kv_lens=SKEWED, heads=16, device="cuda")
    is_hopper = devices.current().capability == (9, 0)
    assert is_refused(inputs, way) is (way.impl == "sm90" and not is_hopper)
    if way.blocks is not None and is_hopper:
        problem = problem_of(inputs)
        module = select.decode(problem, devices.current(), way.impl).module
        ready = operation.prepare(module, problem, devices.current(), 0, None, 8192)
        assert dict(ready.kernel.variant.constants)["BLOCKS"] == way.blocks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 2, 5, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128])
def test_heads(way, heads, dtype):
    judge(way, kv_lens=SKEWED, heads=heads, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 16, 32, 48, 64, 128, 192, 7])
@pytest.mark.parametrize("table", ["dense", "csr"])
def test_page_sizes(way, page_size, table, dtype):
    judge(way, kv_lens=SKEWED, heads=16, page_size=page_size, table=table, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("latent", "rope"), DIMS)
@pytest.mark.parametrize("heads", [8, 40])
def test_dims(way, latent, rope, heads, dtype):
    judge(way, kv_lens=SKEWED, heads=heads, latent=latent, rope=rope, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [8, 64])
def test_rope_inside_the_value(way, heads, dtype):
    judge(way, kv_lens=SKEWED, heads=heads, latent=448, rope=64, value_dim=512, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("s_q", [1, 2, 3, 4, 5, 8])
def test_query_tokens(way, s_q, causal, dtype):
    judge(way, kv_lens=SKEWED, s_q=s_q, heads=16, causal=causal, dtype=dtype)
    judge(way, kv_lens=SKEWED, s_q=s_q, heads=128, causal=causal, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [5, 16, 128])
def test_ragged_queries(way, heads, dtype):
    q_lens = (3, 2, 0, 70, 1, 64, 0, 9)
    judge(way, kv_lens=SKEWED, q_lens=q_lens, heads=heads, dtype=dtype)
    judge(way, kv_lens=SKEWED, q_lens=q_lens, heads=heads, dtype=dtype, causal=False, table="csr")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["fused", "pair"])
@pytest.mark.parametrize("strided", [True, 3, 16])
def test_strides_and_buffers(way, strided, layout, dtype):
    inputs = decode_inputs(
        kv_lens=SKEWED, s_q=2, heads=20, layout=layout, strided=strided, dtype=dtype, device="cuda"
    )
    if is_refused(inputs, way):
        return
    buffers = inputs.output_buffers()
    state = run(inputs, way, **buffers)
    assert state.out is buffers["out"]
    assert state.lse is buffers["lse"]
    assert_within_budget(state, inputs)
    assert untouched_padding(state.out)
    assert untouched_padding(state.lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logits", ["large", "equal_keys", "dominant_key"])
def test_hostile_logits(way, logits, dtype):
    judge(way, kv_lens=SKEWED, s_q=2, heads=16, logits=logits, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_and_skewed_batches(way, dtype):
    judge(way, kv_lens=[65536] + [100] * 40, heads=16, dtype=dtype)
    judge(way, kv_lens=[(37 * i) % 400 for i in range(300)], heads=16, dtype=dtype)
    judge(way, kv_lens=[(37 * i) % 90 for i in range(1100)], heads=8, dtype=dtype)
    judge(way, kv_lens=[0] * 9, heads=16, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tf32_is_used_only_on_request(way, dtype):
    inputs = decode_inputs(kv_lens=SKEWED, heads=16, dtype=dtype, device="cuda")
    if is_refused(inputs, way):
        return
    plain, again = run(inputs, way), run(inputs, way, allow_tf32=True)
    if dtype == torch.float32:
        assert not torch.equal(plain.out, again.out)
    else:
        assert torch.equal(plain.out, again.out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("kv_lens", [SKEWED, [3000] * 16, [40000]])
@pytest.mark.parametrize("page_size", [64, 1])
def test_equal_bits_run_to_run(way, kv_lens, heads, page_size, dtype):
    inputs = decode_inputs(
        kv_lens=kv_lens, heads=heads, page_size=page_size, dtype=dtype, device="cuda"
    )
    if is_refused(inputs, way):
        return
    first = run(inputs, way)
    for _ in range(20):
        again = run(inputs, way)
        assert torch.equal(first.out, again.out)
        assert torch.equal(first.lse, again.lse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 4, 16, 32])
def test_equal_bits_whatever_the_pages(way, size, dtype):
    """The same slots as pages of 64 and of fewer: keys come another way, in the same order."""
    inputs = decode_inputs(kv_lens=SKEWED, heads=40, dtype=dtype, device="cuda")
    if is_refused(inputs, way):
        return
    table = inputs.page_table.long()[:, :, None] * (64 // size)
    table = (table + torch.arange(64 // size, device="cuda")).flatten(1)
    small = replace(
        inputs,
        cache=inputs.cache.view(-1, size, inputs.cache.shape[-1]),
        page_table=table.clamp(max=UNUSED_PAGE).int(),
    )
    assert not is_refused(small, way)
    if way.blocks == 2 and size < 32:
        # There is no such form: the other one runs, and adds in another order.
        assert_within_budget(run(small, way), small)
        return
    expected, got = run(inputs, way), run(small, way)
    assert torch.equal(got.out, expected.out)
    assert torch.equal(got.lse, expected.lse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [16, 128])
def test_one_plan_for_all_layers(way, heads, dtype):
    layers = [
        decode_inputs(kv_lens=SKEWED, heads=heads, dtype=dtype, seed=seed, device="cuda")
        for seed in range(3)
    ]
    if is_refused(layers[0], way):
        return
    plan = plan_of(layers[0], way.impl)
    for inputs in layers:
        shared, own = run(inputs, way, plan=plan), run(inputs, way)
        assert torch.equal(shared.out, own.out)
        assert torch.equal(shared.lse, own.lse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("planned", [True, False])
def test_graph_with_new_lengths(way, planned, heads, dtype):
    """The schedule is captured with the rest, so a replay follows lengths changed in place."""
    inputs = decode_inputs(kv_lens=SKEWED, heads=heads, dtype=dtype, device="cuda")
    if is_refused(inputs, way):
        return
    buffers = inputs.output_buffers()

    def step() -> None:
        run(inputs, way, plan=plan_of(inputs, way.impl) if planned else None, **buffers)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for kv_lens in (SKEWED, (1, 0, 0, 63, 60, 1, 700, 2000), (4999, 0, 1, 2, 3, 4, 5, 6), [0] * 8):
        inputs.kv_lens.copy_(torch.tensor(kv_lens, dtype=torch.int32))
        for tensor in buffers.values():
            tensor.fill_(float("nan"))
        graph.replay()
        assert_within_budget(mla_triton.AttentionState(**buffers), inputs)


def test_follows_the_current_stream(way):
    inputs = decode_inputs(kv_lens=SKEWED, heads=16, dtype=torch.float16, device="cuda")
    if is_refused(inputs, way):
        return
    expected = run(inputs, way)
    side = torch.cuda.Stream()
    blank = torch.full_like(inputs.q_nope, float("nan"))
    late = blank.clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late.copy_(inputs.q_nope)
        state = run(replace(inputs, q_nope=late), way)
    side.synchronize()
    assert torch.equal(state.out, expected.out)


@pytest.mark.parametrize("page_size", [1, 64])
def test_a_cache_of_more_than_2_to_the_31_elements(way, page_size):
    """Every page of the request lies past the 2**31st element."""
    width = 512 + 64
    inputs = decode_inputs(
        kv_lens=[700, 0, 65], heads=16, dtype=torch.bfloat16, page_size=page_size, device="cuda"
    )
    if is_refused(inputs, way):
        return
    small = inputs.cache
    first = 2**31 // (page_size * width) + 1
    pages = first + small.shape[0]
    if torch.cuda.mem_get_info()[0] < pages * page_size * width * 2 + 2**31:
        pytest.skip("needs 7 GB of free GPU memory")
    expected = run(inputs, way)
    cache = torch.full((pages, page_size, width), float("nan"), dtype=torch.bfloat16, device="cuda")
    cache[first:] = small
    table = torch.where(inputs.page_table == UNUSED_PAGE, UNUSED_PAGE, inputs.page_table + first)
    state = run(replace(inputs, cache=cache, page_table=table.to(torch.int32)), way)
    assert torch.equal(state.out, expected.out)
    assert torch.equal(state.lse, expected.lse)
    assert_within_budget(state, inputs)


def test_wrong_page_ids_and_lengths_stay_inside_the_tensors(way):
    """Results are then wrong, but nothing outside is read: the sanitizer runs this too."""
    inputs = decode_inputs(kv_lens=[300, 100], heads=16, dtype=torch.float16, device="cuda")
    if is_refused(inputs, way):
        return
    inputs.page_table.copy_(torch.tensor([[-5], [UNUSED_PAGE]], dtype=torch.int32))
    inputs.kv_lens.copy_(torch.tensor([2**31 - 1, -7], dtype=torch.int32))
    run(inputs, way)
    torch.cuda.synchronize()


# -- how pages lie


def spread(tensor: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """The same pages with so many pages of NaN before and after each."""
    apart = tensor.new_full((tensor.shape[0], before + 1 + after, *tensor.shape[1:]), float("nan"))
    apart[:, before] = tensor
    return apart[:, before]


def ragged_pages(tensor: torch.Tensor) -> torch.Tensor:
    """The same pages with 16 bytes of NaN behind each, which is no whole slot."""
    pages, slots, width = tensor.shape
    padded = tensor.new_full((pages, slots * width + 8), float("nan"))
    whole = padded[:, : slots * width].view(pages, slots, width)
    whole.copy_(tensor)
    return whole


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("heads", [16, 128])
def test_a_layer_of_a_cache_of_all_layers(way, heads, page_size, dtype):
    """What lies between the pages is another layer's; behind the last page nothing may be read."""
    inputs = decode_inputs(
        kv_lens=SKEWED, heads=heads, page_size=page_size, dtype=dtype, device="cuda"
    )
    for before, after in ((0, 2), (2, 0), (1, 1)):
        layer = replace(inputs, cache=spread(inputs.cache, before, after))
        if not is_refused(layer, way):
            assert_within_budget(run(layer, way), layer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pair_of_tensors(way, dtype):
    inputs = decode_inputs(kv_lens=SKEWED, heads=40, layout="pair", dtype=dtype, device="cuda")
    ckv, kpe = inputs.cache
    for pair in (
        LatentCache(ckv, kpe),
        LatentCache(spread(ckv, 1, 1), spread(kpe, 1, 1)),
        # Not spaced alike: the Hopper kernel has no descriptor for it, and copies row by row.
        LatentCache(spread(ckv, 1, 1), kpe),
        LatentCache(ragged_pages(ckv), kpe),
        LatentCache(ckv, ragged_pages(kpe)),
    ):
        given = replace(inputs, cache=pair)
        if not is_refused(given, way):
            assert_within_budget(run(given, way), given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pages_that_are_no_whole_slots_apart(way, dtype):
    inputs = decode_inputs(kv_lens=SKEWED, heads=40, dtype=dtype, device="cuda")
    given = replace(inputs, cache=ragged_pages(inputs.cache))
    if not is_refused(given, way):
        assert_within_budget(run(given, way), given)


def test_a_cache_of_one_page(way):
    judge(way, kv_lens=[40], heads=40)
    judge(way, kv_lens=[64], heads=128, s_q=2)
