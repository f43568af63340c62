"""`mla_triton.compat` on the GPU in this machine: larger calls of every interface, CUDA graphs.

The small calls, and what is refused, are in `tests/compat/`, which runs on a GPU, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import rival_calls
import torch
from rival_calls import INF, MLACase, as_natural, judge, like_nan

from mla_triton.compat import flash_mla, flashinfer, sglang, vllm
from mla_triton.testing import decode_inputs, prefill_inputs
from mla_triton.testing.problems import int32

HALVES = [torch.float16, torch.bfloat16]
KV_LENS = (1100, 0, 1, 63, 64, 65, 700, 130)
by_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
by_heads = pytest.mark.parametrize("heads", [1, 9, 16, 63, 128])


def on_gpu(dtype: torch.dtype, **recipe: Any) -> dict[str, Any]:
    return {"kv_lens": KV_LENS, "dtype": dtype, "device": "cuda"} | recipe


def capture(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of a step that has run before on another stream, as graphs are usually captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- FlashMLA


@by_half
@by_heads
@pytest.mark.parametrize(("s_q", "causal"), [(1, True), (2, True), (4, False)])
def test_flash_mla(s_q, causal, heads, dtype):
    rival_calls.flash_mla_decode(**on_gpu(dtype, heads=heads, s_q=s_q, causal=causal))


@by_half
@pytest.mark.parametrize("s_q", [1, 2])
@pytest.mark.parametrize(("kv_heads", "heads"), [(2, 32), (3, 21), (8, 16), (8, 1)])
def test_flash_mla_of_several_kv_heads(kv_heads, heads, s_q, dtype):
    """`heads` are those of each KV head."""
    rival_calls.flash_mla_decode(kv_heads, **on_gpu(dtype, heads=heads, s_q=s_q))


@by_half
@pytest.mark.parametrize(("qk", "v_dim"), [(192, 128), (128, 128)])
@pytest.mark.parametrize("causal", [True, False])
def test_flash_mla_prefill(causal, qk, v_dim, dtype):
    rival_calls.flash_mla_prefill(
        q_lens=[70, 0, 130], k_lens=[90, 4, 130], heads=4, kv_heads=2, qk=qk, v_dim=v_dim,
        causal=causal, dtype=dtype, device="cuda",
    )  # fmt: skip


@by_half
def test_flash_mla_in_a_graph(dtype):
    """Layers that share what the first of them has made: a replay follows the lengths."""
    inputs = decode_inputs(**on_gpu(dtype, heads=16, s_q=2))
    q, k_cache = rival_calls.joined(inputs), inputs.cache.unsqueeze(2)

    def step() -> list[tuple[torch.Tensor, torch.Tensor]]:
        meta, _ = flash_mla.get_mla_metadata()
        return [
            flash_mla.flash_mla_with_kvcache(
                q, k_cache, inputs.page_table, inputs.kv_lens, 512, meta,
                softmax_scale=inputs.softmax_scale, causal=True,
            )
            for _ in range(2)
        ]  # fmt: skip

    graph, layers = capture(step)
    for lengths in (KV_LENS, (5, 0, 0, 63, 1, 65, 699, 128)):
        inputs.kv_lens.copy_(int32(lengths))
        for tensor in (*layers[0], *layers[1]):
            tensor.fill_(float("nan"))
        graph.replay()
        for out, lse in layers:
            judge(out, torch.where(lse == INF, -INF, lse).transpose(1, 2), inputs)


# -- FlashInfer


@by_half
@by_heads
@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize(
    "queries",
    [{}, {"s_q": 3}, {"s_q": 3, "causal": False}, {"q_lens": (3, 2, 0, 17, 1, 9, 0, 4)}],
    ids=["one", "three", "not causal", "ragged"],
)
def test_flashinfer_mla(queries, buffered, heads, dtype):
    rival_calls.flashinfer_mla(buffered=buffered, **on_gpu(dtype, heads=heads), **queries)


@by_half
@pytest.mark.parametrize(
    "other",
    [
        {"rope": 0, "s_q": 3},
        {"page_size": 1},
        {"page_size": 16},
        {"strided": True},
        {"indptr_on": "cpu", "too_long": 2},
        {"index_dtype": torch.int64},
        {"use_natural": True},
        {"kv_lens": (0, 0)},
    ],
    ids=str,
)
def test_flashinfer_mla_of_other_kinds(other, dtype):
    rival_calls.flashinfer_mla(**(on_gpu(dtype, heads=16) | other))


@by_half
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("is_warm", [True, False])
@pytest.mark.parametrize(
    "q_lens", [None, ((3, 2, 0, 17, 1, 9, 0, 4), (0, 0, 20, 3, 3, 3, 3, 4))], ids=["one", "ragged"]
)
def test_flashinfer_plans_before_replays(q_lens, is_warm, heads, dtype):
    """`plan` writes what a captured `run` reads, whether an eager run made the schedule or not."""
    first, then = (None, None) if q_lens is None else q_lens
    recipe = on_gpu(dtype, heads=heads)
    case = MLACase(**recipe, **({} if first is None else {"q_lens": first}))
    wrapper = case.buffered_wrapper()
    wrapper.plan(*case.metadata, *case.facts)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        return case.run(wrapper, return_lse=True)

    if is_warm:
        graph, (out, lse) = capture(step)
    else:
        # Kernels are compiled by another wrapper; in this one the capture comes first.
        other = case.buffered_wrapper()
        other.plan(*case.metadata, *case.facts)
        case.run(other, return_lse=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = step()
    fewer = (1000, 0, 0, 63, 5, 64, 1, 129)
    for now in (case, case.changed(fewer, then), case):
        wrapper.plan(*now.metadata, *now.facts)
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        now.judge(out, as_natural(lse))
    if q_lens is None:
        more = MLACase(**recipe, s_q=2)
        with pytest.raises(ValueError, match=r"^qo_indptr must give each request the 1 query"):
            wrapper.plan(*more.metadata, *more.facts)


@by_half
def test_runs_wait_for_nothing(dtype):
    case = MLACase(**on_gpu(dtype, heads=16))
    wrapper = case.wrapper()
    wrapper.plan(*case.metadata, *case.facts)
    inputs = prefill_inputs(q_lens=[9, 70], dtype=dtype, device="cuda")
    state = torch.randn(9, 4, 64, device="cuda"), torch.randn(9, 4, device="cuda")
    indptr = torch.arange(3, dtype=torch.int32, device="cuda")

    def step() -> None:
        out, lse = case.run(wrapper, return_lse=True)
        case.run(wrapper, out=out, lse=lse)
        flashinfer.single_prefill_with_kv_cache(inputs.q, inputs.k, inputs.v, return_lse=True)
        flashinfer.merge_state(*state, *state)
        flashinfer.get_batch_indices_positions(indptr, indptr[1:], 4)

    step()
    with no_waiting():
        step()


@by_half
@pytest.mark.parametrize("causal", [True, False])
def test_flashinfer_ragged(causal, dtype):
    rival_calls.flashinfer_ragged(
        q_lens=[70, 0, 130], k_lens=[90, 4, 300], heads=4, causal=causal, dtype=dtype,
        device="cuda",
    )  # fmt: skip


@by_half
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_flashinfer_single(layout, dtype):
    rival_calls.flashinfer_single(
        q_len=150, k_len=300, heads=4, layout=layout, dtype=dtype, device="cuda"
    )


@by_half
def test_flashinfer_ragged_in_a_graph(dtype):
    inputs = prefill_inputs(
        q_lens=[100, 28], k_lens=[100, 300], heads=2, dtype=dtype, device="cuda"
    )
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
        torch.empty(1, device="cuda"), use_cuda_graph=True,
        qo_indptr_buf=torch.zeros(3, dtype=torch.int32, device="cuda"),
        kv_indptr_buf=torch.zeros(3, dtype=torch.int32, device="cuda"),
    )  # fmt: skip

    def plan(q_indptr: torch.Tensor, k_indptr: torch.Tensor) -> None:
        wrapper.plan(q_indptr, k_indptr, 2, 2, 192, 128, causal=True, q_data_type=dtype)

    plan(inputs.cu_seqlens_q, inputs.cu_seqlens_k)
    graph, (out, lse) = capture(lambda: wrapper.run_return_lse(inputs.q, inputs.k, inputs.v))
    for q_bounds, k_bounds in (([0, 100, 128], [0, 100, 400]), ([0, 3, 128], [0, 250, 397])):
        plan(int32(q_bounds), int32(k_bounds))
        inputs.cu_seqlens_q.copy_(int32(q_bounds))
        inputs.cu_seqlens_k.copy_(int32(k_bounds))
        out.fill_(float("nan"))
        graph.replay()
        judge(out, as_natural(lse), inputs)


@by_half
@pytest.mark.parametrize("value_dim", [64, 128, 512])
def test_flashinfer_merges(value_dim, dtype):
    given = {"tokens": (300,), "heads": 16, "value_dim": value_dim, "dtype": dtype}
    rival_calls.flashinfer_merge_two(**given, device="cuda")
    for masked in (False, True):
        rival_calls.flashinfer_merge_in_place(**given, masked=masked, device="cuda")
    for states in (2, 4, 17):
        rival_calls.flashinfer_merge_many(**given, states=states, device="cuda")


# -- vLLM and SGLang


@by_half
@by_heads
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_vllm(page_size, heads, dtype):
    rival_calls.vllm_decode(**on_gpu(dtype, heads=heads, page_size=page_size))


@by_half
@pytest.mark.parametrize("with_context", [None, 128])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("value_dim", [32, 48, 128, 256, 512])
def test_vllm_merge(value_dim, in_place, with_context, dtype):
    rival_calls.vllm_merge(
        tokens=(613,), heads=8, value_dim=value_dim, empty=0.1 if with_context is None else 0.0,
        with_context=with_context, in_place=in_place, dtype=dtype, device="cuda",
    )  # fmt: skip


@by_half
@by_heads
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_sglang(index_dtype, heads, dtype):
    rival_calls.sglang_decode(index_dtype=index_dtype, **on_gpu(dtype, heads=heads))


@by_half
def test_decoding_of_vllm_and_sglang_in_a_graph(dtype):
    inputs = decode_inputs(**on_gpu(dtype, heads=16, page_size=1))
    q, k_buffer = rival_calls.joined(inputs).squeeze(1), inputs.cache
    pages = sum(KV_LENS)
    bounds = torch.zeros(len(KV_LENS) + 1, dtype=torch.int32, device="cuda")
    indices = torch.zeros(pages, dtype=torch.int32, device="cuda")
    outs = [like_nan(inputs.q_nope.squeeze(1)) for _ in range(2)]
    lse = torch.empty(q.shape[:2], device="cuda")

    def step() -> None:
        vllm.decode_attention_fwd(
            q, k_buffer, k_buffer[..., :512], outs[0], lse, inputs.page_table, inputs.kv_lens,
            None, 4, inputs.softmax_scale,
        )  # fmt: skip
        sglang.decode_attention_fwd(
            q, k_buffer, k_buffer[..., :512], outs[1], bounds, indices, None, None, None, 8,
            inputs.softmax_scale,
        )  # fmt: skip

    graph, _ = capture(step)
    for lengths in (KV_LENS, (5, 0, 0, 63, 1, 65, 699, 128)):
        inputs.kv_lens.copy_(int32(lengths))
        slots = [row[:n] for row, n in zip(inputs.page_table, lengths, strict=True)]
        bounds[1:] = torch.tensor(lengths).cumsum(0)
        indices[: sum(lengths)] = torch.cat(slots)
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        for out in outs:
            judge(out.unsqueeze(1), lse.unsqueeze(1), inputs)
