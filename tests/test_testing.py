"""The tools that judge kernels: they poison what they promise, accept what is right in any order of
operations, and reject what is wrong.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from flash_model import Faults, flash_decode, to_bfloat16, to_tf32
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mla_triton import reference, testing
from mla_triton.cache import CSRPageTable, LatentCache
from mla_triton.state import AttentionState
from mla_triton.testing import Budget, DecodeInputs, decode_inputs
from mla_triton.testing.problems import UNUSED_PAGE
from mla_triton.testing.strategies import decode_problems

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOGITS = ["normal", "large", "equal_keys", "dominant_key"]


def small(**changes: Any) -> DecodeInputs:
    options = {"kv_lens": [0, 1, 2, 16, 37], "heads": 3, "latent": 32, "rope": 8, "page_size": 16}
    return decode_inputs(**{**options, **changes})


def same_precision(inputs: DecodeInputs) -> AttentionState:
    arguments, options = inputs.call_arguments()
    return reference.decode_same_precision(*arguments, **options)


def cache_of(inputs: DecodeInputs) -> torch.Tensor:
    """`[pages, page_size, latent + rope]`, whatever the layout."""
    if not isinstance(inputs.cache, LatentCache):
        return inputs.cache
    return torch.cat([part for part in inputs.cache if part is not None], dim=-1)


def used_pages(inputs: DecodeInputs) -> list[list[int]]:
    counts = [-(-n // cache_of(inputs).shape[1]) for n in inputs.kv_lens.tolist()]
    table = inputs.page_table
    if isinstance(table, CSRPageTable):
        bounds = table.indptr.tolist()
        return [table.indices[bounds[b] :][:n].tolist() for b, n in enumerate(counts)]
    return [table[b, :n].tolist() for b, n in enumerate(counts)]


def tensors_of(inputs: DecodeInputs) -> dict[str, torch.Tensor]:
    pair = isinstance(inputs.cache, LatentCache)
    caches = inputs.cache._asdict() if pair else {"c": inputs.cache}
    both = {"q_nope": inputs.q_nope, "q_rope": inputs.q_rope, **caches, **inputs.output_buffers()}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


# Problems


@pytest.mark.parametrize("layout", ["fused", "pair"])
@pytest.mark.parametrize("page_size", [1, 16, 5])
def test_every_slot_without_a_key_is_poisoned(page_size: int, layout: str) -> None:
    inputs = small(page_size=page_size, layout=layout)
    owned = torch.zeros(cache_of(inputs).shape[:2], dtype=torch.bool)
    for length, pages in zip(inputs.kv_lens.tolist(), used_pages(inputs), strict=True):
        for position in range(length):
            page, slot = pages[position // page_size], position % page_size
            assert not owned[page, slot]
            owned[page, slot] = True
    assert torch.equal(cache_of(inputs).isnan(), ~owned[..., None].expand(-1, -1, 40))
    free = ~owned.any(-1)
    assert free.sum() >= 2


def test_pages_are_scattered() -> None:
    (pages,) = used_pages(small(kv_lens=[640]))
    assert pages != sorted(pages)
    assert len(set(pages)) == 40


def test_the_table_is_poisoned_past_the_used_pages() -> None:
    dense, csr = small().page_table, small(table="csr").page_table
    assert isinstance(dense, torch.Tensor)
    assert (dense == UNUSED_PAGE).sum(-1).tolist() == [4, 3, 3, 3, 1]
    assert isinstance(csr, CSRPageTable)
    assert csr.indptr.tolist() == [0, 0, 1, 2, 3, 6]
    assert (csr.indices == UNUSED_PAGE).tolist() == [False] * 6 + [True]
    assert dense.dtype == csr.indptr.dtype == csr.indices.dtype == torch.int32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["fused", "pair"])
def test_strided_tensors_are_padded_with_nan(dtype: torch.dtype, layout: str) -> None:
    plain = tensors_of(small(dtype=dtype, layout=layout))
    for strided in (True, 1, 7):
        inputs = small(dtype=dtype, layout=layout, strided=strided)
        columns = 16 // dtype.itemsize if strided is True else strided
        for name, tensor in tensors_of(inputs).items():
            assert not tensor.is_contiguous()
            assert tensor.stride(-1) == 1
            assert testing.untouched_padding(tensor), name
            rows = tensor.numel() // tensor.shape[-1]
            size = tensor.untyped_storage().nbytes() // tensor.element_size()
            assert size == tensor.numel() + rows * columns
            assert torch.equal(tensor.nan_to_num(), plain[name].nan_to_num())
        heads, tokens = inputs.q_nope.stride(2), inputs.q_nope.stride(1)
        assert heads > tokens


def test_a_write_past_a_row_is_found() -> None:
    out = small(strided=True).output_buffers()["out"]
    assert testing.untouched_padding(out)
    out.zero_()
    assert testing.untouched_padding(out)
    out.as_strided((1,), (1,), out.shape[-1]).zero_()
    assert not testing.untouched_padding(out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_what_was_asked_for(dtype: torch.dtype) -> None:
    def weights(logits: str) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = small(kv_lens=[200], heads=20, dtype=dtype, logits=logits)
        keys = reference.gather_keys(inputs.cache, inputs.page_table, 0, 200).double()
        query = torch.cat([inputs.q_nope, inputs.q_rope], -1)[0, 0].double()  # type: ignore[list-item]
        scores = query @ keys.T * inputs.softmax_scale
        return scores, scores.softmax(-1)

    assert weights("normal")[0].abs().amax() < 50
    large = weights("large")[0]
    assert large.amax() > 600
    assert large.amin() < -600
    equal = weights("equal_keys")[1]
    assert (equal.amax(-1) / equal.amin(-1) - 1).abs().amax() < 2**-40
    dominant = weights("dominant_key")[1]
    assert (dominant.amax(-1) > 0.9).all()
    assert len(dominant.argmax(-1).unique()) == 1


def test_same_seed_same_problem() -> None:
    for one, other in zip(tensors_of(small()).values(), tensors_of(small()).values(), strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    assert not torch.equal(small(seed=1).q_nope, small().q_nope)


def test_its_text_makes_it_again() -> None:
    inputs = small(q_lens=[1, 0, 2, 3, 1], dtype=torch.float16, strided=7, table="csr")
    again = eval(repr(inputs), {"decode_inputs": decode_inputs, "torch": torch})
    assert repr(again) == repr(inputs)
    assert torch.equal(again.q_nope, inputs.q_nope)
    assert again.q_nope.stride() == inputs.q_nope.stride()


@pytest.mark.parametrize("layout", ["fused", "pair"])
@pytest.mark.parametrize("table", ["dense", "csr"])
def test_moving_keeps_strides(layout: str, table: str) -> None:
    inputs = small(layout=layout, table=table, strided=7)
    moved = inputs.to("meta")
    for name, tensor in tensors_of(moved).items():
        assert tensor.device.type == "meta"
        assert tensor.stride() == tensors_of(inputs)[name].stride()
    assert moved.kv_lens.device.type == "meta"


def test_call_arguments_are_those_of_the_reference() -> None:
    inputs = small(q_lens=[1, 0, 2, 3, 1], value_dim=40, causal=False)
    arguments, options = inputs.call_arguments()
    state = reference.decode(*arguments, **options)
    assert state.out.shape == inputs.output_buffers()["out"].shape == (7, 3, 40)
    assert state.lse.shape == inputs.output_buffers()["lse"].shape
    assert options["causal"] is False


def test_models_are_those_of_the_reference_table() -> None:
    v3 = testing.MODELS["DeepSeek-V3"]
    assert (v3.heads, v3.latent, v3.rope, v3.v, v3.value_dim) == (128, 512, 64, 128, 512)
    assert v3.softmax_scale == 192**-0.5
    v4 = testing.MODELS["DeepSeek-V4-Flash"]
    assert v4.value_dim == v4.latent + v4.rope == v4.v == 512
    for model in testing.MODELS.values():
        assert 1 <= model.heads <= 128
        assert model.context % 1024 == 0


# Budgets


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_right_results_are_accepted(dtype: torch.dtype, logits: str) -> None:
    inputs = small(kv_lens=[0, 1, 3, 64, 700], s_q=2, dtype=dtype, logits=logits, strided=True)
    budget = testing.decode_budget(inputs)
    testing.assert_within_budget(same_precision(inputs), inputs, budget)
    for tile, parts in ((32, 1), (16, 7), (128, 2)):
        testing.assert_within_budget(flash_decode(inputs, tile, parts), inputs, budget)


@given(
    decode_problems(dims=((128, 32), (64, 0), (16, 8)), heads=(1, 2, 5), max_kv_len=140),
    st.sampled_from([8, 16, 64]),
    st.integers(1, 4),
)
def test_any_right_result_is_accepted(inputs: DecodeInputs, tile: int, parts: int) -> None:
    testing.assert_within_budget(flash_decode(inputs, tile, parts), inputs)


FAULTS = {
    "scale a thousandth too large": Faults(scale=1.001),
    "scale a thousandth too small": Faults(scale=0.999),
    "queries see one key too many": Faults(see=1),
    "queries see one key too few": Faults(see=-1),
    "first key dropped": Faults(drop=0),
    "last key of a tile dropped": Faults(drop=31),
    "a key in the middle dropped": Faults(drop=200),
    "accumulator not rescaled": Faults(forget_rescale=True),
    "last part lost": Faults(lose_part=True),
    "rope left out": Faults(skip_rope=True),
    "heads swapped": Faults(swap_heads=True),
    "lse in base 2": Faults(lse_in_base_2=True),
}
FAULTS_OF_FINER_DTYPES = {
    "weights rounded to bfloat16": Faults(round_weights=to_bfloat16),
    "partial results rounded to bfloat16": Faults(round_partial=to_bfloat16),
    "operands rounded to bfloat16": Faults(round_operand=to_bfloat16),
}


@lru_cache
def many_keys(dtype: torch.dtype, logits: str = "normal") -> tuple[DecodeInputs, Budget]:
    inputs = decode_inputs(
        kv_lens=[300, 270], s_q=2, heads=4, latent=128, rope=32, dtype=dtype, logits=logits
    )
    return inputs, testing.decode_budget(inputs)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_results_are_rejected(dtype: torch.dtype, fault: str) -> None:
    inputs, budget = many_keys(dtype)
    assert testing.compare(flash_decode(inputs), inputs, budget).ok
    assert not testing.compare(flash_decode(inputs, faults=FAULTS[fault]), inputs, budget).ok


@pytest.mark.parametrize("fault", FAULTS_OF_FINER_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bfloat16_where_it_must_not_be_is_rejected(dtype: torch.dtype, fault: str) -> None:
    inputs, budget = many_keys(dtype)
    faults = FAULTS_OF_FINER_DTYPES[fault]
    report = testing.compare(flash_decode(inputs, faults=faults), inputs, budget)
    assert not report.ok
    assert report.message.startswith("out ")


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_accumulator_in_bfloat16_is_rejected(dtype: torch.dtype) -> None:
    inputs, budget = many_keys(dtype)
    assert testing.compare(flash_decode(inputs, 16, 1), inputs, budget).ok
    state = flash_decode(inputs, 16, 1, Faults(round_accumulator=to_bfloat16))
    assert not testing.compare(state, inputs, budget).ok


def test_tf32_is_rejected_unless_it_is_allowed() -> None:
    inputs, budget = many_keys(torch.float32)
    state = flash_decode(inputs, faults=Faults(round_operand=to_tf32, round_weights=to_tf32))
    assert not testing.compare(state, inputs, budget).ok
    allowed = testing.decode_budget(inputs, allow_tf32=True)
    testing.assert_within_budget(state, inputs, allowed)
    coarser = Faults(round_operand=to_bfloat16)
    assert not testing.compare(flash_decode(inputs, faults=coarser), inputs, allowed).ok


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_data_finds_a_lost_part(dtype: torch.dtype, logits: str) -> None:
    inputs, budget = many_keys(dtype, logits)
    state = flash_decode(inputs, faults=Faults(lose_part=True))
    assert not testing.compare(state, inputs, budget).ok


def test_a_short_request_does_not_excuse_a_long_one() -> None:
    # Averaged over hundreds of keys, results are much smaller than those of a single key: what is
    # a rounding there is a gross error here.
    inputs = small(kv_lens=[1, 700], dtype=torch.bfloat16)
    state = flash_decode(inputs)
    assert testing.compare(state, inputs).ok
    state.out[1] += torch.finfo(torch.bfloat16).eps / 2 * state.out[0].abs().amax()
    report = testing.compare(state, inputs)
    assert not report.ok
    assert report.message.startswith("out error")
    assert "at out[1, " in report.message


def test_nan_and_infinity_are_compared_first() -> None:
    inputs = small(dtype=torch.float32)
    budget = testing.decode_budget(inputs)
    for value in (float("nan"), float("inf"), -float("inf")):
        state = same_precision(inputs)
        state.out[4, 0, 2, 31] = value
        state.out[3] += 1
        report = testing.compare(state, inputs, budget)
        assert report.message.startswith(f"out[4, 0, 2, 31] is {value}, expected ")
        assert report.message.endswith("(1 such elements)")
    state = same_precision(inputs)
    state.lse[0, 0, 1] = float("inf")
    assert testing.compare(state, inputs, budget).message == (
        "lse[0, 0, 1] is inf, expected -inf (1 such elements)"
    )


def test_empty_rows_have_no_budget() -> None:
    inputs = small(kv_lens=[0, 5], dtype=torch.bfloat16)
    state = same_precision(inputs)
    state.out[0, 0, 1, 3] = 2**-100
    message = testing.compare(state, inputs).message
    assert "out error 7.89e-31 is over its budget 0 at out[0, 0, 1, 3]: " in message
    assert message.count("(1 of 6 rows)") == 2


def test_nan_where_the_oracle_has_it_is_right() -> None:
    inputs = small(kv_lens=[20, 20])
    cache_of(inputs)[used_pages(inputs)[1][0], 3] = float("nan")
    assert testing.compare(same_precision(inputs), inputs).ok
    assert not testing.compare(same_precision(small(kv_lens=[20, 20])), inputs).ok


def test_shape_and_dtype_are_compared() -> None:
    inputs = small(kv_lens=[5])
    out, lse = same_precision(inputs)
    assert testing.compare(AttentionState(out[..., :1], lse), inputs).message == (
        "out is torch.bfloat16 [1, 1, 3, 1], expected torch.bfloat16 [1, 1, 3, 32]"
    )
    assert testing.compare(AttentionState(out, lse.double()), inputs).message == (
        "lse is torch.float64 [1, 1, 3], expected torch.float32 [1, 1, 3]"
    )


def test_the_report_has_the_worst_row() -> None:
    inputs = small(dtype=torch.float32)
    budget = testing.decode_budget(inputs)
    state = same_precision(inputs)
    state.lse[3, 0, 1] += 1
    report = testing.compare(state, inputs, budget)
    assert report.lse_budget == budget.lse[3, 0, 1].item()
    assert report.lse_error == pytest.approx(1, abs=report.lse_budget)
    assert report.out_error <= report.out_budget
    assert report.out_rms_error <= report.out_rms_budget
    assert "lse[3, 0, 1]: " in report.message
    assert "(1 of 15 rows)" in report.message
    with pytest.raises(AssertionError, match=r"lse error 1 is over.*\ndecode_inputs\(kv_lens="):
        testing.assert_within_budget(state, inputs, budget)


def test_nothing_to_compare_is_right() -> None:
    inputs = small(kv_lens=[4], q_lens=[0])
    assert testing.compare(same_precision(inputs), inputs).ok


# Arguments


def check(inputs: DecodeInputs, **changes: Any) -> None:
    arguments, options = replace(inputs, **changes).call_arguments()
    testing.check_inputs(*arguments, **options)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_good_inputs_pass() -> None:
    for table in ("dense", "csr"):
        for layout in ("fused", "pair"):
            check(small(table=table, layout=layout))
            check(small(table=table, layout=layout, q_lens=[0, 3, 0, 1, 0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kv_lens": int32(0, -1, 2, 16, 37)},
            "kv_lens must be at least 0, got -1 for request 1",
        ),
        (
            {"kv_lens": int32(0, 1, 2, 16, 65)},
            "kv_lens must be at most the 64 tokens of a request's 4 pages, got 65 for request 4",
        ),
        (
            {"max_kv_len": 36},
            "kv_lens must be at most max_kv_len = 36, got 37 for request 4",
        ),
        (
            {"kv_lens": int32(0, 17, 2, 16, 37)},
            f"page_table must hold pages from 0 to 10, got {UNUSED_PAGE} as page 1 of request 1",
        ),
    ],
)
def test_values_of_a_dense_table_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check(small(), **changes)


@pytest.mark.parametrize(
    ("indptr", "indices", "message"),
    [
        ([1, 1, 1, 2, 3, 6], None, "page_table.indptr must start at 0, got 1"),
        (
            [0, 0, 1, 0, 3, 6],
            None,
            "page_table.indptr must not decrease, got 1 then 0 at index 3",
        ),
        (
            [0, 0, 1, 2, 3, 8],
            None,
            "page_table.indptr must end within the 7 page_table.indices, got 8",
        ),
        (
            [0, 0, 1, 2, 3, 5],
            None,
            "kv_lens must be at most the 32 tokens of a request's 2 pages, got 37 for request 4",
        ),
        (
            None,
            [0, 1, 2, 3, -1, 4, 5],
            "page_table.indices must hold pages from 0 to 10, got -1 as page 1 of request 4",
        ),
        (
            None,
            [0, 1, 11, 3, 0, 4, 5],
            "page_table.indices must hold pages from 0 to 10, got 11 as page 0 of request 3",
        ),
    ],
)
def test_values_of_a_csr_table_are_checked(
    indptr: list[int] | None, indices: list[int] | None, message: str
) -> None:
    inputs = small(table="csr")
    assert isinstance(inputs.page_table, CSRPageTable)
    table = CSRPageTable(
        inputs.page_table.indptr if indptr is None else int32(*indptr),
        inputs.page_table.indices if indices is None else int32(*indices),
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check(inputs, page_table=table)


@pytest.mark.parametrize(
    ("cu_seqlens_q", "message"),
    [
        ([1, 1, 2, 3, 4, 5], "cu_seqlens_q must start at 0, got 1"),
        ([0, 2, 1, 3, 4, 5], "cu_seqlens_q must not decrease, got 2 then 1 at index 2"),
        ([0, 1, 2, 3, 4, 4], "cu_seqlens_q must end at the 5 tokens of q_nope, got 4"),
        ([0, 1, 2, 3, 4, 6], "cu_seqlens_q must end at the 5 tokens of q_nope, got 6"),
    ],
)
def test_offsets_of_queries_are_checked(cu_seqlens_q: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check(small(q_lens=[1] * 5), cu_seqlens_q=int32(*cu_seqlens_q))


# Strategies


@given(decode_problems(max_kv_len=70))
def test_drawn_problems_are_valid(inputs: DecodeInputs) -> None:
    check(inputs)
    assert max(inputs.kv_lens.tolist()) <= 70
    assert cache_of(inputs).isnan().any()
    testing.assert_within_budget(same_precision(inputs), inputs)


@given(
    decode_problems(
        dtypes=[torch.float16], dims=[(32, 8)], rope_in_value=[True], page_sizes=[3], heads=[7],
        logits=["large"], tables=["csr"], layouts=["fused"], paddings=[5], ragged=[True],
        max_batch=2, max_s_q=2, max_kv_len=9,
    )
)  # fmt: skip
def test_drawn_problems_keep_their_restrictions(inputs: DecodeInputs) -> None:
    assert inputs.q_nope.dtype == torch.float16
    assert inputs.q_nope.shape[1:] == (7, 32)
    assert inputs.value_dim == 40
    assert isinstance(inputs.cache, torch.Tensor)
    assert inputs.cache.shape[1:] == (3, 40)
    assert inputs.cache.stride(1) == 45
    assert isinstance(inputs.page_table, CSRPageTable)
    assert inputs.cu_seqlens_q is not None
    assert inputs.cu_seqlens_q.diff().amax() <= 2
    assert len(inputs.kv_lens) <= 2
    assert inputs.recipe["logits"] == "large"


@pytest.mark.parametrize(
    "wanted",
    [
        lambda i: 0 in i.kv_lens,
        lambda i: i.q_nope.dim() == 4 and i.q_nope.shape[1] > int(i.kv_lens.amax()) > 0,
        lambda i: i.cu_seqlens_q is not None and (i.cu_seqlens_q.diff() == 0).any(),
        lambda i: i.q_rope is None,
        lambda i: i.value_dim is not None,
        lambda i: not i.causal,
        lambda i: any(n and n % i.recipe["page_size"] == 0 for n in i.recipe["kv_lens"]),
    ],
    ids=[
        "no keys",
        "s_q > kv_len",
        "no queries",
        "no rope",
        "rope inside",
        "not causal",
        "full page",
    ],
)
def test_drawn_problems_reach_the_corners(wanted: Any) -> None:
    from hypothesis import find

    assert wanted(find(decode_problems(max_kv_len=40, dims=[(16, 0), (16, 8)]), wanted))


def test_a_failing_problem_prints_itself() -> None:
    @settings(max_examples=1, phases=[Phase.generate], database=None)
    @given(decode_problems())
    def fails(inputs: DecodeInputs) -> None:
        raise AssertionError

    with pytest.raises(AssertionError) as caught:
        fails()
    printed = "\n".join(caught.value.__notes__)
    assert "decode_inputs(kv_lens=[" in printed
    assert "tensor(" not in printed


def test_testing_needs_no_hypothesis() -> None:
    check = (
        "import sys; sys.modules['hypothesis'] = None; import mla_triton.testing as t; "
        "assert all(hasattr(t, name) for name in t.__all__)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
