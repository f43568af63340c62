"""`mla_triton.compat.flashinfer` has FlashInfer's conventions, and refuses what is not there."""

from __future__ import annotations

from typing import Any

import pytest
import rival_calls
import torch
from rival_calls import MLACase, as_natural

from mla_triton.compat import flashinfer

SMALL = {"heads": 3, "latent": 128, "rope": 32, "page_size": 16}
KV_LENS = [40, 0, 1, 33]
HALVES = [torch.float16, torch.bfloat16]
by_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
CPU = torch.device("cpu")


# -- the MLA wrapper


@by_half
@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize(
    "queries",
    [{}, {"s_q": 3}, {"s_q": 3, "causal": False}, {"q_lens": [2, 1, 0, 4]}],
    ids=["one", "three", "not causal", "ragged"],
)
def test_mla(queries, buffered, dtype, device):
    rival_calls.flashinfer_mla(
        kv_lens=KV_LENS, buffered=buffered, dtype=dtype, device=device, **SMALL, **queries
    )


def test_mla_with_the_shapes_of_deepseek_v3(device):
    rival_calls.flashinfer_mla(
        kv_lens=[70], heads=2, dtype=torch.float16, device=device, backend="fa3"
    )


@pytest.mark.parametrize(
    "other",
    [
        {"rope": 0},
        {"page_size": 1},
        {"strided": True},
        {"indptr_on": "cpu", "too_long": 2},
        {"index_dtype": torch.int64},
        {"use_natural": True},
        {"kv_lens": [0, 0]},
    ],
    ids=str,
)
def test_mla_of_other_kinds(other, device):
    given = {"kv_lens": [20, 3], "dtype": torch.float16, "device": device, **SMALL}
    rival_calls.flashinfer_mla(**(given | other))


@pytest.mark.parametrize("queries", [{}, {"q_lens": [2, 1, 0, 4]}], ids=["one", "ragged"])
def test_a_later_plan_is_that_of_later_runs(queries, device):
    """Into the same buffers, and with the schedule of the first run made again."""
    given = {"dtype": torch.float16, "device": device, **SMALL, **queries}
    case = MLACase(kv_lens=KV_LENS, **given)
    wrapper = case.buffered_wrapper()
    schedules = set()
    for kv_lens, q_lens in ((KV_LENS, [2, 1, 0, 4]), ([3, 0, 1, 17], [1, 4, 2, 0])):
        case = case.changed(kv_lens, q_lens if queries else None)
        wrapper.plan(*case.metadata, *case.facts)
        out, lse = case.run(wrapper, return_lse=True)
        case.judge(out, as_natural(lse))
        schedules.add(id(wrapper._plan))
    assert len(schedules) == 1
    # More query tokens for each request are another schedule.
    case = MLACase(kv_lens=KV_LENS, **(given | {"q_lens": None, "s_q": 2}))
    wrapper.plan(*case.metadata, *case.facts)
    out, lse = case.run(wrapper, return_lse=True)
    case.judge(out, as_natural(lse))


def test_layers_share_a_schedule(device):
    case = MLACase(kv_lens=[40, 3], dtype=torch.float16, device=device, **SMALL)
    wrapper = case.wrapper()
    wrapper.plan(*case.metadata, *case.facts)
    first = case.run(wrapper)
    plan = wrapper._plan
    assert torch.equal(case.run(wrapper), first)
    assert wrapper._plan is plan


def test_rows_behind_the_last_request_are_padding(device):
    """More rows than the plan knows of: what belongs to a request is right."""
    case = MLACase(kv_lens=[40, 3], dtype=torch.float16, device=device, **SMALL)
    wrapper = case.wrapper()
    wrapper.plan(*case.metadata, *case.facts)
    tokens = case.q_nope.shape[0]
    q_nope, q_pe = (torch.cat([x, rival_calls.like_nan(x)]) for x in (case.q_nope, case.q_pe))
    out, lse = wrapper.run(q_nope, q_pe, *case.caches, return_lse=True)
    case.judge(out[:tokens], as_natural(lse[:tokens]))


def test_mla_with_natural_logarithms_planned(device):
    case = MLACase(kv_lens=[20], dtype=torch.float16, device=device, **SMALL)
    wrapper = case.wrapper()
    wrapper.plan(*case.metadata, *case.facts, lse_mode="basee")
    out, lse = case.run(wrapper, return_lse=True)
    case.judge(out, lse)


def test_no_pages_at_all(device):
    case = MLACase(kv_lens=[0, 0], dtype=torch.float16, device=device, **SMALL)
    wrapper = case.wrapper()
    wrapper.plan(*case.metadata, *case.facts)
    ckv, kpe = (cache[:0] for cache in case.caches)
    out, lse = wrapper.run(case.q_nope, case.q_pe, ckv, kpe, return_lse=True)
    assert (out == 0).all()
    assert (lse == -float("inf")).all()


def test_a_captured_run_keeps_its_query_tokens():
    """What a capture on a GPU leaves behind, without one: replays cannot follow another number."""
    case = MLACase(kv_lens=[20, 3], dtype=torch.float16, device="cpu", **SMALL)
    more = MLACase(kv_lens=[20, 3], s_q=2, dtype=torch.float16, device="cpu", **SMALL)
    wrapper = case.buffered_wrapper()
    wrapper.plan(*case.metadata, *case.facts)
    wrapper._is_captured = True
    wrapper.plan(*case.metadata, *case.facts)
    with pytest.raises(ValueError, match=r"^qo_indptr must ") as raised:
        wrapper.plan(*more.metadata, *more.facts)
    rule = "give each request the 1 query tokens of the captured run"
    assert str(raised.value) == f"qo_indptr must {rule}, got 2"


def test_a_captured_ragged_run_reads_its_query_tokens():
    """Equal requests are no reason to leave the offsets out; only more tokens cannot be served."""
    given = {"kv_lens": [20, 3], "dtype": torch.float16, "device": "cpu", **SMALL}
    case = MLACase(q_lens=[3, 1], **given)
    wrapper = case.buffered_wrapper()
    wrapper.plan(*case.metadata, *case.facts)
    case.run(wrapper)
    wrapper._is_captured = True
    plan = wrapper._plan
    equal = case.changed([20, 3], [2, 2])
    wrapper.plan(*equal.metadata, *equal.facts)
    out, lse = equal.run(wrapper, return_lse=True)
    equal.judge(out, as_natural(lse))
    assert wrapper._plan is plan
    more = MLACase(q_lens=[3, 2], **given)
    with pytest.raises(ValueError, match=r"^qo_indptr must ") as raised:
        wrapper.plan(*more.metadata, *more.facts)
    message = "qo_indptr must end within the 4 tokens of the captured run, got 5"
    assert str(raised.value) == message


def planned(**changes: Any) -> tuple[MLACase, Any]:
    case = MLACase(kv_lens=[20, 3], dtype=torch.float16, device="cpu", **SMALL)
    wrapper = case.wrapper()
    names = (
        "qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr", "num_heads", "head_dim_ckv",
        "head_dim_kpe", "page_size", "causal", "sm_scale", "q_data_type", "kv_data_type",
    )  # fmt: skip
    given = dict(zip(names, (*case.metadata, *case.facts), strict=True))
    wrapper.plan(**(given | changes))
    return case, wrapper


SHORT = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"use_profiler": True}, NotImplementedError, "use_profiler must be False, got True"),
        (
            {"kv_data_type": torch.float8_e4m3fn},
            NotImplementedError,
            "kv_data_type must be torch.float16 like q_data_type, got torch.float8_e4m3fn",
        ),
        (
            {"q_data_type": torch.float8_e4m3fn},
            NotImplementedError,
            "q_data_type must be float16, bfloat16 or float32, got torch.float8_e4m3fn",
        ),
        (
            {"lse_mode": "base10"},
            ValueError,
            "lse_mode must be one of none, base2, basee, got base10",
        ),
        (
            {"qo_indptr": SHORT},
            ValueError,
            "qo_indptr must be [batch + 1] = [3] or longer, got shape (2,)",
        ),
        (
            {"kv_indptr": SHORT},
            ValueError,
            "kv_indptr must be [batch + 1] = [3] or longer, got shape (2,)",
        ),
        (
            {"sm_scale": float("nan")},
            ValueError,
            "sm_scale must be finite in float32, got nan",
        ),
    ],
)
def test_what_plan_refuses(changes, error, message):
    with pytest.raises(error) as raised:
        planned(**changes)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    "name",
    [
        "profiler_buffer", "kv_len", "page_table", "o_scale", "ckv_scale", "ckv_scale_arr",
        "kpe_scale",
    ],
)  # fmt: skip
def test_options_that_run_refuses(name):
    case, wrapper = planned()
    with pytest.raises(NotImplementedError) as raised:
        case.run(wrapper, **{name: 0.5})
    assert str(raised.value) == f"{name} must be None, got 0.5"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"num_heads": 4},
            ValueError,
            "q_nope must be [tokens, 4, 128], as plan was told, got shape (2, 3, 128)",
        ),
        (
            {"head_dim_kpe": 64},
            ValueError,
            "q_pe must be [tokens, 3, 64], as plan was told, got shape (2, 3, 32)",
        ),
        (
            {"page_size": 8},
            ValueError,
            "ckv_cache must be [pages, 8, 128], as plan was told, got shape (6, 16, 128)",
        ),
        (
            {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16},
            TypeError,
            "q_nope must have the dtype of plan, torch.bfloat16, got torch.float16",
        ),
    ],
)
def test_a_layer_that_is_not_the_planned_one(changes, error, message):
    case, wrapper = planned(**changes)
    with pytest.raises(error) as raised:
        case.run(wrapper)
    assert str(raised.value) == message


def test_results_for_other_tokens():
    case, wrapper = planned()
    with pytest.raises(ValueError, match=r"^lse must ") as raised:
        case.run(wrapper, lse=torch.zeros(3, 3))
    assert str(raised.value) == "lse must have q_nope's 2 tokens, got shape (3, 3)"


def test_a_run_without_a_plan():
    case, _ = planned()
    with pytest.raises(ValueError, match=r"^run must follow a call of plan, got none$"):
        case.run(case.wrapper())


def test_buffers_that_are_missing_or_too_small():
    workspace = torch.zeros(1)
    with pytest.raises(TypeError, match=r"^qo_indptr must be a torch.Tensor, got NoneType$"):
        flashinfer.BatchMLAPagedAttentionWrapper(workspace, use_cuda_graph=True)
    small = MLACase(kv_lens=[3, 3], dtype=torch.float16, device="cpu", **SMALL)
    longer = MLACase(kv_lens=[900, 3], dtype=torch.float16, device="cpu", **SMALL)
    wider = MLACase(kv_lens=[3, 3, 3], dtype=torch.float16, device="cpu", **SMALL)
    wrapper = small.buffered_wrapper()
    for case, message in (
        (longer, "kv_indices must fit its buffer of 13, got 59"),
        (wider, "kv_len_arr must be as long as its buffer, 2, got 3"),
    ):
        with pytest.raises(ValueError, match=r"^kv_") as raised:
            wrapper.plan(*case.metadata, *case.facts)
        assert str(raised.value) == message


# -- prefill

PREFILL = {"heads": 4, "kv_heads": 2, "qk": 96, "v_dim": 64, "rope": 32}


@by_half
@pytest.mark.parametrize("causal", [True, False])
def test_ragged_prefill(causal, dtype, device):
    rival_calls.flashinfer_ragged(
        q_lens=[5, 0, 9], k_lens=[9, 4, 7], causal=causal, dtype=dtype, device=device, **PREFILL
    )


@pytest.mark.parametrize("other", [{"layout": "HND"}, {"indptr_on": "cpu"}], ids=str)
def test_ragged_prefill_of_other_kinds(other, device):
    rival_calls.flashinfer_ragged(
        q_lens=[5, 3], dtype=torch.float16, device=device, **PREFILL, **other
    )


@by_half
@pytest.mark.parametrize(
    ("q_len", "k_len", "causal"), [(7, 20, True), (7, 20, False), (7, 3, True)]
)
def test_single_prefill(q_len, k_len, causal, dtype, device):
    for layout in ("NHD", "HND"):
        rival_calls.flashinfer_single(
            q_len=q_len, k_len=k_len, causal=causal, layout=layout, dtype=dtype, device=device,
            **PREFILL,
        )  # fmt: skip


def ragged_wrapper(**options: Any) -> flashinfer.BatchPrefillWithRaggedKVCacheWrapper:
    return flashinfer.BatchPrefillWithRaggedKVCacheWrapper(torch.zeros(1), **options)


OFFSETS = torch.tensor([0, 2, 5], dtype=torch.int32)


def test_ragged_prefill_into_buffers_of_a_graph(device):
    """The buffers are what later runs read, whatever `plan` was given."""
    buffers = [torch.full((3,), 99, dtype=torch.int32, device=device) for _ in range(2)]
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
        torch.zeros(1, device=device), use_cuda_graph=True, qo_indptr_buf=buffers[0],
        kv_indptr_buf=buffers[1],
    )  # fmt: skip
    q = torch.randn(5, 2, 64, device=device)
    wrapper.plan(OFFSETS.clone(), OFFSETS.clone(), 2, 2, 64, causal=True, q_data_type="float32")
    assert all(torch.equal(buffer.cpu(), OFFSETS) for buffer in buffers)
    out = wrapper.run(q, q, q)
    assert torch.equal(out[[0, 2]], q[[0, 2]])  # of a request's first token, the only key
    buffers[0][1] = buffers[1][1] = 3
    out = wrapper.run(q, q, q)
    assert torch.equal(out[[0, 3]], q[[0, 3]])
    with pytest.raises(ValueError, match=r"^qo_indptr must be as long as its buffer, 3, got 2$"):
        wrapper.plan(OFFSETS[:2], OFFSETS[:2], 2, 2, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"custom_mask": OFFSETS}, "custom_mask must be None, got a tensor"),
        ({"packed_custom_mask": OFFSETS}, "packed_custom_mask must be None, got a tensor"),
        ({"pos_encoding_mode": "ALIBI"}, "pos_encoding_mode must be NONE, got ALIBI"),
        ({"window_left": 128}, "window_left must be -1, got 128"),
        ({"logits_soft_cap": 30.0}, "logits_soft_cap must be None or 0.0, got 30.0"),
        ({"prefix_len_ptr": OFFSETS}, "prefix_len_ptr must be None, got a tensor"),
        ({"token_pos_in_items_ptr": OFFSETS}, "token_pos_in_items_ptr must be None, got a tensor"),
        ({"max_item_len_ptr": OFFSETS}, "max_item_len_ptr must be None, got a tensor"),
        ({"token_pos_in_items_len": 3}, "token_pos_in_items_len must be 0, got 3"),
        (
            {"kv_data_type": "float8_e4m3fn"},
            "kv_data_type must be torch.float16 like q_data_type, got torch.float8_e4m3fn",
        ),
        (
            {"o_data_type": torch.float32},
            "o_data_type must be torch.float16 like q_data_type, got torch.float32",
        ),
    ],
)
def test_what_the_plan_of_prefill_refuses(changes, message):
    with pytest.raises(NotImplementedError) as raised:
        ragged_wrapper().plan(OFFSETS, OFFSETS, 2, 2, 64, **changes)
    assert str(raised.value) == message


@pytest.mark.parametrize("name", ["q_scale", "k_scale", "v_scale", "o_scale"])
def test_scales_that_prefill_refuses(name):
    wrapper, q = ragged_wrapper(), torch.zeros(5, 2, 64, dtype=torch.float16)
    wrapper.plan(OFFSETS, OFFSETS, 2, 2, 64)
    with pytest.raises(NotImplementedError) as raised:
        wrapper.run(q, q, q, **{name: 0.5})
    assert str(raised.value) == f"{name} must be None, got 0.5"


def test_rules_of_the_ragged_wrapper():
    wrapper, q = ragged_wrapper(), torch.zeros(5, 2, 64, dtype=torch.float16)
    cases = [
        (lambda: wrapper.run(q, q, q), "run must follow a call of plan, got none"),
        (
            lambda: wrapper.plan(OFFSETS, OFFSETS[1:], 2, 2, 64),
            "kv_indptr must be [batch + 1] like qo_indptr, (3,), got (2,)",
        ),
        (
            lambda: wrapper.plan(OFFSETS, OFFSETS, 2, 2, 64, q_data_type="half a float"),
            "q_data_type, kv_data_type or o_data_type must be a dtype, got half a float",
        ),
        (lambda: ragged_wrapper(kv_layout="HDN"), "kv_layout must be one of NHD, HND, got HDN"),
        (
            lambda: ragged_wrapper(use_cuda_graph=True),
            "qo_indptr_buf must be a torch.Tensor, got NoneType",
        ),
        (
            lambda: ragged_wrapper(custom_mask_buf=OFFSETS),
            "custom_mask_buf must be None, got a tensor",
        ),
        (
            lambda: ragged_wrapper(mask_indptr_buf=OFFSETS),
            "mask_indptr_buf must be None, got a tensor",
        ),
    ]
    for call, message in cases:
        with pytest.raises((TypeError, ValueError, NotImplementedError)) as raised:
            call()
        assert str(raised.value) == message
    wrapper.plan(OFFSETS, OFFSETS, 2, 2, 64)
    with pytest.raises(TypeError) as raised:
        wrapper.run(q.float(), q, q)
    assert str(raised.value) == ("q must have the dtype of plan, torch.float16, got torch.float32")
    with pytest.raises(ValueError, match=r"^v must ") as raised:
        wrapper.run(q, q, q[..., :32])
    assert str(raised.value) == "v must be [tokens, 2, 64], as plan was told, got shape (5, 2, 32)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_q": OFFSETS}, "scale_q must be None, got a tensor"),
        ({"scale_k": OFFSETS}, "scale_k must be None, got a tensor"),
        ({"scale_v": OFFSETS}, "scale_v must be None, got a tensor"),
        ({"o_dtype": torch.float16}, "o_dtype must be None or torch.float32, got torch.float16"),
        ({"custom_mask": OFFSETS}, "custom_mask must be None, got a tensor"),
        ({"window_left": 3}, "window_left must be -1, got 3"),
    ],
)
def test_what_single_prefill_refuses(options, message):
    q = torch.zeros(5, 2, 64)
    with pytest.raises(NotImplementedError) as raised:
        flashinfer.single_prefill_with_kv_cache(q, q, q, **options)
    assert str(raised.value) == message


# -- merges

MERGE = {"heads": 4, "value_dim": 64}


@by_half
def test_merge_state(dtype, device):
    rival_calls.flashinfer_merge_two(dtype=dtype, device=device, **MERGE)


@by_half
@pytest.mark.parametrize("masked", [False, True])
def test_merge_state_in_place(masked, dtype, device):
    rival_calls.flashinfer_merge_in_place(masked=masked, dtype=dtype, device=device, **MERGE)


@by_half
@pytest.mark.parametrize("states", [2, 5, 17])
def test_merge_states(states, dtype, device):
    rival_calls.flashinfer_merge_many(states=states, dtype=dtype, device=device, **MERGE)


def test_merge_of_fewer_than_two_states(device):
    v, s = torch.randn(3, 1, 2, 8, device=device), torch.randn(3, 1, 2, device=device)
    s[0, 0, 0], v[0, 0, 0] = -float("inf"), float("nan")
    merged, lse = flashinfer.merge_states(v, s)
    expected = v.squeeze(1).clone()
    expected[0, 0] = 0
    assert torch.equal(merged, expected)
    torch.testing.assert_close(lse, s.squeeze(1))
    merged, lse = flashinfer.merge_states(v[:, :0], s[:, :0])
    assert torch.equal(merged, torch.zeros_like(expected))
    assert (lse == -float("inf")).all()


def test_rules_of_merges():
    s = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"^v must ") as raised:
        flashinfer.merge_states(torch.zeros(3, 2, 8), s)
    message = "v must be [tokens, states, heads, head_dim], got shape (3, 2, 8)"
    assert str(raised.value) == message


# -- pages


def test_where_new_tokens_go(device):
    """Request 1 gets none; request 2 has older tokens; two entries are left over."""
    append_indptr = torch.tensor([0, 3, 3, 5], dtype=torch.int32, device=device)
    seq_lens = torch.tensor([3, 9, 7], device=device)
    requests, positions = flashinfer.get_batch_indices_positions(append_indptr, seq_lens, 7)
    assert requests.dtype == positions.dtype == torch.int32
    assert requests.tolist() == [0, 0, 0, 2, 2, -1, -1]
    assert positions.tolist() == [0, 1, 2, 5, 6, 0, 0]


def test_lengths_from_pages(device):
    kv_indptr = torch.tensor([0, 3, 3, 4], dtype=torch.int32, device=device)
    last = torch.tensor([13, 0, 16], dtype=torch.int32, device=device)
    assert flashinfer.get_seq_lens(kv_indptr, last, 16).tolist() == [45, 0, 16]


def test_names_are_where_flashinfer_has_them():
    assert flashinfer.mla.BatchMLAPagedAttentionWrapper
    assert flashinfer.prefill.single_prefill_with_kv_cache
    assert flashinfer.page.get_batch_indices_positions
    assert flashinfer.cascade.merge_states
    for name in flashinfer.__all__:
        assert hasattr(flashinfer, name)
