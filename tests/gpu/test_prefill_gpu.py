"""Prefill as machine code on the GPU in this machine, against the float64 oracle and its budget.

By every implementation; what one of them does not take, it has to refuse.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import mla_triton
from mla_triton import device as devices
from mla_triton import select
from mla_triton.kernels import sm90
from mla_triton.kernels.portable import prefill as portable
from mla_triton.kernels.portable import prefill_config
from mla_triton.kernels.portable.prefill_config import Config
from mla_triton.kernels.sm90 import prefill_config as sm90_config
from mla_triton.ops import prefill as operation
from mla_triton.state import AttentionState
from mla_triton.testing import assert_within_budget, problem_of, untouched_padding
from mla_triton.testing.foreign_code import code_of
from mla_triton.testing.prefill_compilation import problem
from mla_triton.testing.prefill_problems import PrefillInputs, prefill_inputs, whole
from mla_triton.testing.problems import int32

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
HALVES = DTYPES[:2]
DIMS = [(192, 64, 128), (256, 64, 256), (128, 64, 128), (96, 32, 64)]
Q_LENS = (700, 0, 1, 63, 64, 65, 129, 17, 300)
K_LENS = (700, 90, 1000, 63, 0, 300, 128, 2048, 301)
by_dims = pytest.mark.parametrize(("qk", "rope", "v_dim"), DIMS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
SM90_CONFIGS = list(sm90_config.search_space(problem(), devices.from_label("9.0")))

here = devices.current()


def make(**recipe: Any) -> PrefillInputs:
    given = {"q_lens": Q_LENS, "k_lens": K_LENS, "device": "cuda"}
    return prefill_inputs(**(given | recipe))


@pytest.fixture(params=["portable", "sm90"])
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


def run(inputs: PrefillInputs, impl: str = "portable", **more: Any) -> AttentionState:
    arguments, options = inputs.call_arguments()
    return mla_triton.prefill(*arguments, **options, impl=impl, **more)


def is_refused(inputs: PrefillInputs, impl: str) -> bool:
    """Whether an implementation does not take the problem; it then has to say so when asked for."""
    reason = select.why_not_sm90_prefill(problem_of(inputs), here, impl)
    if impl == "portable" or reason is None:
        return False
    with pytest.raises(NotImplementedError) as error:
        run(inputs, impl)
    assert str(error.value) == f"impl 'sm90' cannot run this prefill: {reason}"
    return True


def check(inputs: PrefillInputs, impl: str = "portable", **more: Any) -> None:
    """Into buffers of NaN, so that a row that is not written shows."""
    if is_refused(inputs, impl):
        return
    state = run(inputs, impl, **inputs.output_buffers(), **more)
    assert_within_budget(state, inputs)
    assert untouched_padding(state.out)
    assert untouched_padding(state.lse)


def assert_equal(one: AttentionState, other: AttentionState) -> None:
    assert torch.equal(one.out, other.out)
    assert torch.equal(one.lse, other.lse)


def test_the_hopper_kernel_runs_here_if_this_is_hopper(impl):
    """So that what follows is not refusals alone."""
    is_hopper = here.capability == (9, 0)
    assert is_refused(make(), impl) is (impl == "sm90" and not is_hopper)


@by_half
@pytest.mark.parametrize("config", SM90_CONFIGS, ids=str)
def test_configs_of_the_hopper_kernel(monkeypatch, config, dtype):
    inputs = make(dtype=dtype, split_k=True)
    if is_refused(inputs, "sm90"):
        return
    module = sm90.load("prefill")[0]
    monkeypatch.setattr(module, "choose", lambda problem, device, tile: (config, "a test's"))
    operation.forget()
    try:
        check(inputs, "sm90")
        check(make(q_lens=[1500], k_lens=[2000], dtype=dtype), "sm90")
    finally:
        operation.forget()


@by_dtype
@by_dims
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("split", [(False, False), (False, True), (True, True)])
def test_ragged_batches(impl, split, causal, qk, rope, v_dim, dtype):
    split_q, split_k = split
    check(
        make(qk=qk, rope=rope, v_dim=v_dim, split_q=split_q, split_k=split_k, causal=causal,
             dtype=dtype),
        impl,
    )  # fmt: skip


@by_half
@by_dims
def test_long_sequences(impl, qk, rope, v_dim, dtype):
    recipe = {"qk": qk, "rope": rope, "v_dim": v_dim, "split_k": True, "dtype": dtype, "heads": 2}
    check(make(q_lens=[4096], k_lens=None, **recipe), impl)
    check(make(q_lens=[512, 1500], k_lens=[6000, 4097], **recipe), impl)


@by_half
@by_dims
@pytest.mark.parametrize("longest", [1, 16, 40])
def test_short_sequences_take_a_smaller_tile(impl, longest, qk, rope, v_dim, dtype):
    q_lens = [(7 * i) % longest + 1 for i in range(40)]
    k_lens = [(37 * i) % 300 for i in range(40)]
    check(
        make(q_lens=q_lens, k_lens=k_lens, qk=qk, rope=rope, v_dim=v_dim, split_k=True,
             dtype=dtype),
        impl,
    )  # fmt: skip


@by_half
def test_many_sequences(impl, dtype):
    """More than one look of the search for a program's tile."""
    q_lens = [(37 * i) % 40 for i in range(1500)]
    check(make(q_lens=q_lens, k_lens=[n + 5 for n in q_lens], heads=2, dtype=dtype), impl)


@by_dtype
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (5, 5), (12, 4), (16, 1), (128, 128)])
def test_heads(impl, heads, kv_heads, dtype):
    check(
        make(q_lens=[70, 5, 129], k_lens=[70, 200, 150], heads=heads, kv_heads=kv_heads,
             split_k=True, dtype=dtype),
        impl,
    )  # fmt: skip


@by_dtype
@pytest.mark.parametrize("strided", [True, 3, 16])
@pytest.mark.parametrize("split", [True, False])
def test_strides_and_buffers(impl, split, strided, dtype):
    check(make(strided=strided, split_q=split, split_k=split, dtype=dtype), impl)


@by_dtype
@pytest.mark.parametrize("logits", ["large", "equal_keys", "dominant_key"])
@pytest.mark.parametrize("constant_values", [False, True])
def test_hostile_values(impl, constant_values, logits, dtype):
    check(make(logits=logits, constant_values=constant_values, dtype=dtype), impl)


@by_dtype
@pytest.mark.parametrize("scale", [-0.05, 0.0, 1.0])
def test_any_finite_scale(impl, scale, dtype):
    check(replace(make(dtype=dtype), softmax_scale=scale), impl)


@by_half
@by_dims
def test_one_rope_for_all_heads_equals_copies_of_it(impl, qk, rope, v_dim, dtype):
    recipe = {"qk": qk, "rope": rope, "v_dim": v_dim, "dtype": dtype}
    inputs = make(split_k=True, split_q=True, **recipe)
    if not is_refused(inputs, impl):
        assert_equal(run(inputs, impl), run(whole(inputs), impl))


@by_half
@pytest.mark.parametrize("hint", [700, 701, 10**6])
def test_a_hint_of_the_longest_sequence_changes_nothing(impl, hint, dtype):
    inputs = make(dtype=dtype)
    if not is_refused(inputs, impl):
        assert_equal(run(inputs, impl, max_seqlen_q=hint), run(inputs, impl))


@by_half
@pytest.mark.parametrize(
    "config",
    [Config(128, 64, 8, 2), Config(128, 64, 8, 3), Config(64, 64, 4, 2), Config(64, 32, 4, 3)],
    ids=str,
)
def test_configs_that_a_tuner_may_choose(monkeypatch, config, dtype):
    inputs = make(dtype=dtype, split_k=True)
    valid, rule = prefill_config.is_valid(config, problem_of(inputs), here)
    if not valid:
        assert "bytes of shared memory" in rule
        return
    monkeypatch.setattr(portable, "choose", lambda problem, device, tile: (config, "a test's"))
    operation.forget()
    try:
        check(inputs)
    finally:
        operation.forget()


@by_half
@pytest.mark.parametrize("held", [0, 3, 10**6])
def test_heads_abreast(monkeypatch, impl, held, dtype):
    inputs = make(heads=7, dtype=dtype)
    one = inputs.k[:, 0].nbytes + inputs.v[:, 0].nbytes
    for config in (prefill_config, sm90_config):
        monkeypatch.setattr(config, "L2_BYTES", held * one)
    check(inputs, impl)


@by_dtype
@by_dims
def test_equal_bits_run_to_run(impl, qk, rope, v_dim, dtype):
    inputs = make(qk=qk, rope=rope, v_dim=v_dim, split_k=True, heads=16, dtype=dtype)
    if is_refused(inputs, impl):
        return
    first = run(inputs, impl)
    for _ in range(20):
        assert_equal(run(inputs, impl), first)


@by_half
def test_graph_with_new_offsets(impl, dtype):
    """The grid is for any lengths, so a replay follows offsets changed in place."""
    inputs = make(q_lens=[100, 28, 0, 300], k_lens=[100, 300, 5, 301], dtype=dtype)
    if is_refused(inputs, impl):
        return
    buffers = inputs.output_buffers()

    def step() -> None:
        run(inputs, impl, **buffers)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for q_lens, k_lens in (
        ([100, 28, 0, 300], [100, 300, 5, 301]),
        ([1, 1, 1, 425], [0, 1, 2, 703]),
        ([428, 0, 0, 0], [6, 700, 0, 0]),
        ([107] * 4, [176] * 4),
    ):
        inputs.cu_seqlens_q.copy_(int32([0, *torch.tensor(q_lens).cumsum(0).tolist()]))
        inputs.cu_seqlens_k.copy_(int32([0, *torch.tensor(k_lens).cumsum(0).tolist()]))
        for tensor in buffers.values():
            tensor.fill_(float("nan"))
        graph.replay()
        assert_within_budget(AttentionState(**buffers), inputs)


def test_nothing_waits_for_the_device(impl):
    inputs = make(dtype=torch.float16, split_k=True)
    if is_refused(inputs, impl):
        return
    run(inputs, impl)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, impl)
        run(inputs, impl, max_seqlen_q=700)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@by_half
@pytest.mark.parametrize("shared_offsets", [False, True])
def test_a_call_that_is_recalled(impl, shared_offsets, dtype):
    """The second call goes by the first one's launches, with other tensors."""
    first, second = (make(k_lens=None, dtype=dtype, split_k=True, seed=seed) for seed in (0, 1))
    if shared_offsets:
        first = replace(first, cu_seqlens_k=first.cu_seqlens_q)
    if is_refused(first, impl):
        return
    run(first, impl)
    assert operation.RECALLED._calls
    assert_within_budget(run(second, impl), second)


@by_half
def test_tensors_of_more_elements_than_32_bits_count(impl, dtype):
    """Queries, keys, values and result: the last sequences are what they are on their own."""
    if is_refused(make(dtype=dtype), impl):
        return
    heads, length, batch = 128, 100, 1400
    tokens = length * batch
    last = 3 * length
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of free GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)

    q, k, v = normal(tokens, heads, 192), normal(tokens, heads, 128), normal(tokens, heads, 128)
    k_rope = normal(tokens, 64)
    assert min(tensor.numel() for tensor in (q, k, v)) > 2**31
    steps = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * length
    options = {"softmax_scale": 192**-0.5, "max_seqlen_q": length, "impl": impl}
    state = mla_triton.prefill(
        q, k, v, k_rope=k_rope, cu_seqlens_q=steps, cu_seqlens_k=steps, **options
    )
    alone = mla_triton.prefill(
        q[-last:], k[-last:], v[-last:], k_rope=k_rope[-last:], cu_seqlens_q=steps[:4],
        cu_seqlens_k=steps[:4], **options,
    )  # fmt: skip
    assert_equal(AttentionState(state.out[-last:], state.lse[-last:]), alone)
    part = PrefillInputs(
        q[-last:, :2], k[-last:, :2], v[-last:, :2], steps[:4], steps[:4], 192**-0.5,
        k_rope=k_rope[-last:],
    )  # fmt: skip
    assert_within_budget(AttentionState(alone.out[:, :2], alone.lse[:, :2]), part)


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ([0, 2**31 - 1, -7, 1339], [-5, 2**31 - 1, 3, 60]),
        ([1339, 0, 1339, 0], [0, 4630, 0, 4630]),
        ([-(2**31), 2**31 - 1, -(2**31), 2**31 - 1], [2**31 - 1, -(2**31), 2**31 - 1, 0]),
    ],
)
def test_wrong_offsets_stay_inside_the_tensors(impl, queries, keys):
    """Results are then wrong, but nothing outside is read or written."""
    inputs = make(dtype=torch.float16)
    if is_refused(inputs, impl):
        return
    wrong = replace(inputs, cu_seqlens_q=int32(queries).cuda(), cu_seqlens_k=int32(keys).cuda())
    run(wrong, impl)
    torch.cuda.synchronize()
    check(inputs, impl)


@by_half
@by_dims
@pytest.mark.parametrize("label", ["8.0", "8.6", "8.9"])
def test_code_of_older_cards(label, qk, rope, v_dim, dtype):
    """What `mla_triton.testing.foreign_code` says: right numbers, not speed."""
    if here.capability is None or here.capability < (9, 0):
        pytest.skip("needs capability 9.0 or later")
    inputs = make(qk=qk, rope=rope, v_dim=v_dim, split_k=True, dtype=dtype)
    with code_of(label) as kernels:
        state = run(inputs)
        torch.cuda.synchronize()
    assert_within_budget(state, inputs)
    (kernel,) = kernels
    assert kernel.target == "sm_" + label.replace(".", "")
    assert kernel.uses("mma.sync")
    assert kernel.uses("cp.async")
    assert not kernel.uses("wgmma")
    assert kernel.shared <= devices.from_label(label).shared_memory
