"""Gather: bit for bit what the reference reads, zero where there is no page, nothing elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from test_operators import fixed, launchers_made, needs_compiler, needs_kernels, no_waiting
from torch._subclasses.fake_tensor import FakeTensorMode

import mla_triton
from mla_triton import CSRPageTable, LatentCache
from mla_triton.cache.quantise import dequantise
from mla_triton.kernels.common.launch import Launcher
from mla_triton.ops import gather as operation
from mla_triton.testing import GatherInputs, gather_inputs, same_bits, untouched_padding
from mla_triton.testing.caches import FORMS
from mla_triton.testing.strategies import gather_problems

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NAN = float("nan")
by_form = pytest.mark.parametrize("form", FORMS)


@settings(max_examples=120)
@given(gather_problems())
def test_gathers_are_the_reference_bit_for_bit(inputs):
    got = inputs.call()
    assert same_bits(got, inputs.expected())
    for rows in got:
        assert rows[inputs.reached :].isnan().all()
        assert not rows[: inputs.reached].isnan().any()
        assert untouched_padding(rows) or not inputs.reached


@by_form
@pytest.mark.parametrize("csr", [False, True])
def test_by_a_loop_over_keys(form, csr, device):
    """Independent of the reference: the token that was put into a slot, rounded by hand."""
    inputs = gather_inputs(form=form, csr=csr, starts=(2, 1, 0, 3), device=device)
    out, rope_out = inputs.call()
    whole = inputs.cache if isinstance(inputs.cache, LatentCache) else LatentCache(inputs.cache)
    columns, keys = dequantise(whole, torch.float32, rope=64)
    if keys is None:
        columns, keys = columns[..., :-64], columns[..., -64:]
    row = 0
    bounds, starts = inputs.cu_seqlens_k.tolist(), inputs.starts.tolist()
    for request, first in enumerate(starts):
        for key in range(first, first + bounds[request + 1] - bounds[request]):
            if csr:
                indptr, indices = inputs.table
                page = int(indices[int(indptr[request]) + key // 4])
            else:
                page = int(inputs.table[request, key // 4])
            if 0 <= page < len(columns):
                expected = columns[page, key % 4], keys[page, key % 4]
            else:
                expected = torch.zeros_like(columns[0, 0]), torch.zeros_like(keys[0, 0])
            assert torch.equal(out[row], expected[0].bfloat16())
            assert torch.equal(rope_out[row], expected[1].bfloat16())
            row += 1
    assert row == inputs.reached


@pytest.mark.parametrize("impl", [None, "reference"])
@by_form
def test_keys_without_a_page_are_zero(form, impl, device):
    """Before the first, behind the table's last, and on a page that is none of the cache."""
    inputs = gather_inputs(form=form, lengths=(4, 7), starts=(-2, 30), spare=0, device=device)
    inputs.table.fill_(0)
    inputs.starts.copy_(torch.tensor([-2, inputs.table.shape[1] * 4 - 3]))
    for rows in inputs.call(impl=impl):
        assert (rows[:2] == 0).all()
        assert rows[2:7].any(1).all()
        assert (rows[7:] == 0).all()
    for wrong in (-1, -(2**31), 2**31 - 1, 10**6):
        inputs.table.fill_(wrong)
        for rows in inputs.call(impl=impl):
            assert (rows == 0).all()


def test_hostile_offsets_stay_inside_the_tensors(device):
    """Nothing is right about the result, but that it is there and nothing else is touched."""
    for csr in (False, True):
        inputs = gather_inputs(csr=csr, lengths=(3, 5, 4), starts=(0, 0, 0), device=device)
        for wrong in ([5, -7, 2**31 - 1, 3], [2**31 - 1] * 4, [-(2**31)] * 4, [9, 6, 3, 0]):
            inputs.cu_seqlens_k.copy_(torch.tensor(wrong))
            inputs.starts.copy_(torch.tensor([2**31 - 1, -(2**31), 5]))
            if csr:
                inputs.table.indptr.copy_(torch.tensor(wrong))
            out, rope_out = inputs.call()
            assert out.shape == inputs.out.shape
            assert rope_out.shape == inputs.rope_out.shape


@pytest.mark.parametrize("csr", [False, True])
def test_no_request_and_no_row(csr, device):
    none = gather_inputs(lengths=(0, 0), spare=0, csr=csr, device=device)
    assert none.call()[0].shape == (0, 512)
    int32 = {"dtype": torch.int32, "device": device}
    table: Any = torch.zeros(0, 4, **int32)
    if csr:
        table = CSRPageTable(torch.zeros(1, **int32), torch.zeros(0, **int32))
    bounds = torch.zeros(1, **int32)
    left, _ = mla_triton.gather(
        none.cache, table, bounds, out=torch.full((3, 576), 7.0, device=device)
    )
    assert (left == 7.0).all()


def test_results_that_are_made(device):
    cache = torch.randn(3, 4, 576, dtype=torch.float16, device=device)
    table = torch.tensor([[2, 0]], dtype=torch.int32, device=device)
    bounds = torch.tensor([0, 6], dtype=torch.int32, device=device)
    whole, nothing = mla_triton.gather(cache, table, bounds, rows=6)
    assert nothing is None
    assert torch.equal(whole, torch.cat([cache[2], cache[0, :2]]))
    latent, keys = mla_triton.gather(cache, table, bounds, rows=6, rope=64)
    assert torch.equal(torch.cat([latent, keys], -1), whole)
    pair = LatentCache(cache[..., :512], cache[..., 512:])
    from_pair = mla_triton.gather(pair, table, bounds, rows=6)
    assert torch.equal(from_pair[0], latent)
    assert torch.equal(from_pair[1], keys)
    single, _ = mla_triton.gather(cache, table, bounds, rows=6, dtype=torch.float32)
    assert torch.equal(single, whole.float())
    quantised = gather_inputs(form="fp8_ds_mla", device=device)
    made, made_keys = mla_triton.gather(
        quantised.cache, quantised.table, quantised.cu_seqlens_k, rows=quantised.reached
    )
    assert made.dtype == made_keys.dtype == torch.bfloat16
    assert same_bits((made,), (quantised.expected()[0][: quantised.reached],))


def test_results_may_be_columns_of_one_tensor(device):
    inputs = gather_inputs(form="fp8_ds_mla", device=device)
    whole = torch.full((len(inputs.out), 576), NAN, dtype=torch.bfloat16, device=device)
    inputs._replace(out=whole[:, :512], rope_out=whole[:, 512:])
    mla_triton.gather(
        inputs.cache, inputs.table, inputs.cu_seqlens_k, out=whole[:, :512], rope_out=whole[:, 512:]
    )
    assert same_bits((whole[:, :512].clone(), whole[:, 512:].clone()), inputs.expected())


def test_what_was_appended_comes_back(device):
    """Numbers that the cache holds exactly."""
    cache = torch.zeros(4, 8, 576, dtype=torch.bfloat16, device=device)
    tokens = torch.randn(20, 576, dtype=torch.bfloat16, device=device)
    table = torch.tensor([[3, 0], [1, -1]], dtype=torch.int32, device=device)
    slots = torch.cat([torch.arange(24, 32), torch.arange(0, 6), torch.arange(8, 14)]).to(device)
    mla_triton.append(cache, tokens[:, :512], tokens[:, 512:], slots)
    bounds = torch.tensor([0, 14, 20], dtype=torch.int32, device=device)
    rows, _ = mla_triton.gather(cache, table, bounds, rows=20)
    assert torch.equal(rows, tokens)


# -- as an operator


def operands(inputs: GatherInputs) -> list[Any]:
    cache = inputs.cache if isinstance(inputs.cache, LatentCache) else LatentCache(inputs.cache)
    csr = isinstance(inputs.table, CSRPageTable)
    table = [inputs.table.indices, inputs.table.indptr] if csr else [inputs.table, None]
    rest = [inputs.cu_seqlens_k, inputs.starts, inputs.out, inputs.rope_out, None]
    return [*cache, *table, *rest]


@needs_compiler
@pytest.mark.parametrize("form", ["fused", "pair", "fp8_ds_mla"])
def test_opcheck(form, device):
    inputs = gather_inputs(form=form, csr=form == "pair", starts=(0, 1, 2, 3), device=device)
    for rows in (inputs.out, inputs.rope_out):
        rows.zero_()
    utils = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    if form == "fp8_ds_mla":
        # It multiplies arguments, which PyTorch cannot do in e4m3.
        utils.remove("test_schema")
    torch.library.opcheck(torch.ops.mla_triton.gather.default, operands(inputs), test_utils=utils)


@by_form
def test_the_operator_is_the_function(form, device):
    inputs = gather_inputs(form=form, device=device)
    expected = inputs.call()
    torch.ops.mla_triton.gather(*operands(inputs))
    assert same_bits((inputs.out, inputs.rope_out), expected)


@needs_compiler
@by_form
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_equals_eager(backend, form, device):
    inputs = gather_inputs(form=form, spare=0, device=device)
    rows = inputs.reached
    inside = isinstance(inputs.cache, torch.Tensor) or inputs.cache.kpe is None
    rope = 64 if inside else None

    def step(cache, table, bounds):
        latent, keys = mla_triton.gather(cache, table, bounds, rows=rows, rope=rope)
        return latent + 1, keys * 2

    expected = step(inputs.cache, inputs.table, inputs.cu_seqlens_k)
    got = fixed(step, backend)(inputs.cache, inputs.table, inputs.cu_seqlens_k)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@by_form
def test_tensors_without_memory(form):
    inputs = gather_inputs(form=form)
    meta = GatherInputs(*(moved_meta(part) for part in inputs[:6]))
    out, _ = mla_triton.gather(
        meta.cache, meta.table, meta.cu_seqlens_k, out=meta.out, rope_out=meta.rope_out
    )
    assert out.shape == inputs.out.shape
    with FakeTensorMode(allow_non_fake_inputs=True):
        mla_triton.gather(
            inputs.cache, inputs.table, inputs.cu_seqlens_k, out=inputs.out,
            rope_out=inputs.rope_out,
        )  # fmt: skip


def moved_meta(value: Any) -> Any:
    if isinstance(value, LatentCache | CSRPageTable):
        return type(value)(*map(moved_meta, value))
    return None if value is None else value.to("meta")


@needs_kernels
@by_form
def test_nothing_waits_for_the_device(form, device, monkeypatch):
    inputs, launched = gather_inputs(form=form, device=device), []
    monkeypatch.setattr(Launcher, "__call__", lambda self, *_: launched.append(self))
    with monkeypatch.context() as patch:
        no_waiting(patch)
        mla_triton.gather(
            inputs.cache, inputs.table, inputs.cu_seqlens_k, out=inputs.out,
            rope_out=inputs.rope_out,
        )  # fmt: skip
    assert len(launched) == 1


@needs_kernels
def test_calls_that_differ_in_size_share_their_kernels(device, monkeypatch):
    made = launchers_made(monkeypatch)
    operation.prepare.cache_clear()
    for lengths in ((5,), (6, 9), (1, 0, 1), (300,)):
        gather_inputs(form="fp8_ds_mla", lengths=lengths, device=device).call()
        if lengths == (5,):
            made.clear()
    assert made == []
