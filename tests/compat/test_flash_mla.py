"""`mla_triton.compat.flash_mla` has FlashMLA's conventions, and refuses what it does not have."""

from __future__ import annotations

from typing import Any

import pytest
import rival_calls
import torch

from mla_triton.compat import flash_mla

SMALL = {"heads": 3, "latent": 128, "rope": 32, "page_size": 16}
HALVES = [torch.float16, torch.bfloat16]
by_half = pytest.mark.parametrize("dtype", HALVES, ids=str)


@by_half
@pytest.mark.parametrize(("s_q", "causal"), [(1, True), (1, False), (3, True), (3, False)])
def test_dense_decode(s_q, causal, dtype, device):
    rival_calls.flash_mla_decode(
        kv_lens=[40, 0, 1, 33], s_q=s_q, causal=causal, dtype=dtype, device=device, **SMALL
    )


@by_half
@pytest.mark.parametrize("kv_heads", [2, 3])
def test_latents_of_several_kv_heads(kv_heads, dtype, device):
    rival_calls.flash_mla_decode(
        kv_heads, kv_lens=[20, 0], s_q=2, dtype=dtype, device=device, **SMALL
    )


def test_the_shapes_of_deepseek_v3(device):
    rival_calls.flash_mla_decode(kv_lens=[70], heads=2, dtype=torch.float16, device=device)


def test_a_scale_of_the_model(device):
    rival_calls.flash_mla_decode(
        scale=0.17, kv_lens=[20], dtype=torch.float32, device=device, **SMALL
    )


def test_one_schedule_serves_calls_of_the_same_shapes_and_lengths(device):
    meta, none = flash_mla.get_mla_metadata(torch.zeros(1), 4, num_heads_k=1)
    assert none is None
    assert not meta.have_initialized
    given = {"kv_lens": [40, 3], "dtype": torch.float32, "device": device, **SMALL}
    rival_calls.flash_mla_decode(metas=[meta], **given)
    assert meta.have_initialized
    plan = meta.plan
    rival_calls.flash_mla_decode(metas=[meta], seed=1, **given)
    assert meta.plan is plan


def call(**changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    given = {
        "q": torch.zeros(2, 1, 4, 160, dtype=torch.float16),
        "k_cache": torch.zeros(3, 16, 1, 160, dtype=torch.float16),
        "block_table": torch.zeros(2, 2, dtype=torch.int32),
        "cache_seqlens": torch.ones(2, dtype=torch.int32),
        "head_dim_v": 128,
        "tile_scheduler_metadata": flash_mla.get_mla_metadata()[0],
    }
    return flash_mla.flash_mla_with_kvcache(**(given | changes))


@pytest.mark.parametrize("without", ["pages", "a table"])
def test_nothing_to_attend_to(without):
    if without == "pages":
        out, lse = call(k_cache=torch.zeros(0, 16, 1, 160, dtype=torch.float16))
    else:
        out, lse = call(block_table=torch.zeros(2, 0, dtype=torch.int32))
    assert (out == 0).all()
    assert (lse == float("inf")).all()


ONES = torch.ones(2)
DENSE = "be None: attention over chosen tokens is not implemented, got a tensor"
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    *(
        ({name: ONES}, NotImplementedError, f"{name} must {DENSE}")
        for name in (
            "indices", "attn_sink", "extra_k_cache", "extra_indices_in_kvcache", "topk_length",
            "extra_topk_length",
        )
    ),
    (
        {"is_fp8_kvcache": True},
        NotImplementedError,
        "is_fp8_kvcache must be False, got True",
    ),
    (
        {"k_cache": torch.zeros(3, 16, 1, 656, dtype=torch.uint8)},
        NotImplementedError,
        "k_cache must have q's dtype torch.float16: quantised caches are not implemented, "
        "got torch.uint8",
    ),
    ({"num_splits": ONES}, ValueError, "num_splits must be None, got Tensor"),
    (
        {"tile_scheduler_metadata": ONES},
        TypeError,
        "tile_scheduler_metadata must be one of get_mla_metadata, got Tensor",
    ),
    ({"cache_seqlens": None}, TypeError, "cache_seqlens must be a torch.Tensor, got NoneType"),
    (
        {"q": torch.zeros(2, 4, 160, dtype=torch.float16)},
        ValueError,
        "q must be [batch, s_q, heads, head_dim], got shape (2, 4, 160)",
    ),
    (
        {"k_cache": torch.zeros(3, 16, 160, dtype=torch.float16)},
        ValueError,
        "k_cache must be [pages, page_size, kv_heads, head_dim], got shape (3, 16, 160)",
    ),
    (
        {"k_cache": torch.zeros(3, 16, 3, 160, dtype=torch.float16)},
        ValueError,
        "q must have a multiple of the cache's 3 heads, got 4",
    ),
    ({"head_dim_v": 161}, ValueError, "head_dim_v must be 1 to 160, q's columns, got 161"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"), REFUSED, ids=["-".join(case[0]) for case in REFUSED]
)
def test_refusals(changes, error, message):
    with pytest.raises(error) as raised:
        call(**changes)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("changes", "name", "first", "now"),
    [
        ({"q": torch.zeros(2, 1, 2, 160, dtype=torch.float16)}, "heads", 4, 2),
        ({"q": torch.zeros(2, 2, 4, 160, dtype=torch.float16)}, "s_q", 1, 2),
        ({"k_cache": torch.zeros(3, 32, 1, 160, dtype=torch.float16)}, "page_size", 16, 32),
        ({"causal": True}, "causal", False, True),
    ],
)
def test_a_schedule_keeps_its_shapes(changes, name, first, now):
    meta, _ = flash_mla.get_mla_metadata()
    call(tile_scheduler_metadata=meta)
    with pytest.raises(ValueError, match=r"^tile_scheduler_metadata must ") as raised:
        call(tile_scheduler_metadata=meta, **changes)
    rule = f"be used with the {name} of its first call, {first}"
    assert str(raised.value) == f"tile_scheduler_metadata must {rule}, got {now}"


@by_half
@pytest.mark.parametrize("causal", [True, False])
def test_prefill(causal, dtype, device):
    rival_calls.flash_mla_prefill(
        q_lens=[5, 0, 9], k_lens=[9, 4, 7], heads=4, kv_heads=2, causal=causal, dtype=dtype,
        device=device,
    )  # fmt: skip


def test_the_lse_of_prefill_lies_head_by_head(device):
    q = torch.zeros(5, 2, 64, device=device)
    offsets = torch.tensor([0, 5], dtype=torch.int32, device=device)
    _, lse = flash_mla.flash_attn_varlen_func(q, q, q, offsets, offsets, 5, 5)
    assert lse.shape == (5, 2)
    assert lse.stride() == (1, 5)


def test_what_prefill_refuses():
    q = torch.zeros(5, 2, 64)
    offsets = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(NotImplementedError) as raised:
        flash_mla.flash_attn_varlen_func(q, q, q, offsets, offsets, 5, 5, dropout_p=0.1)
    assert str(raised.value) == "dropout_p must be 0.0, got 0.1"
    q.requires_grad_()
    with pytest.raises(ValueError, match=r"^q must not require grad while grad is enabled"):
        flash_mla.flash_attn_varlen_func(q, q, q, offsets, offsets, 5, 5)


def test_sparse_prefill_is_refused():
    with pytest.raises(NotImplementedError) as raised:
        flash_mla.flash_mla_sparse_fwd(ONES, ONES, ONES, 1.0)
    message = "flash_mla_sparse_fwd: attention over chosen tokens is not implemented"
    assert str(raised.value) == message
