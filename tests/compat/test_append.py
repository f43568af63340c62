"""New tokens into a paged cache in 16 bit, as FlashInfer and vLLM are asked to write them."""

from __future__ import annotations

import pytest
import torch

from mla_triton.compat import flashinfer, vllm

LATENT, ROPE, PAGE_SIZE, PAGES = 128, 32, 16, 9
HALVES = [torch.float16, torch.bfloat16]
by_half = pytest.mark.parametrize("dtype", HALVES, ids=str)


def int32(*values: int, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def tokens(
    count: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    drawn = torch.randn(count, LATENT + ROPE).to(device, dtype)
    return drawn[:, :LATENT], drawn[:, LATENT:]


@by_half
@pytest.mark.parametrize("has_rope", [True, False])
def test_flashinfer(has_rope, dtype, device):
    """Two requests, the second with older tokens, pages in no order, and one place left over."""
    kv_indptr, kv_indices = int32(0, 2, 5), int32(7, 2, 0, 8, 3)
    lengths, new = [20, 40], [20, 9]
    ckv, kpe = tokens(sum(new) + 1, dtype, device)
    kpe = kpe if has_rope else kpe[:, :0]
    caches = [
        torch.full((PAGES, PAGE_SIZE, part.shape[1]), 5.0, dtype=dtype, device=device)
        for part in (ckv, kpe)
    ]
    expected = [cache.clone() for cache in caches]
    place = 0
    for request, (length, count) in enumerate(zip(lengths, new, strict=True)):
        for position in range(length - count, length):
            page = int(kv_indices[int(kv_indptr[request]) + position // PAGE_SIZE])
            for cache, part in zip(expected, (ckv, kpe), strict=True):
                cache[page, position % PAGE_SIZE] = part[place]
            place += 1

    last = int32(20 - PAGE_SIZE, 40 - 2 * PAGE_SIZE, device=device)
    on_device = [tensor.to(device) for tensor in (kv_indices, kv_indptr)]
    seq_lens = flashinfer.get_seq_lens(on_device[1], last, PAGE_SIZE)
    assert seq_lens.tolist() == lengths
    requests, positions = flashinfer.get_batch_indices_positions(
        int32(0, 20, 29, device=device), seq_lens, place + 1
    )
    done = flashinfer.append_paged_mla_kv_cache(
        ckv, kpe, requests, positions, *caches, *on_device, last
    )
    assert done is None
    for cache, right in zip(caches, expected, strict=True):
        assert torch.equal(cache, right)


def test_flashinfer_of_no_tokens():
    ckv, kpe = tokens(0, torch.float16, "cpu")
    cache = torch.zeros(1, PAGE_SIZE, LATENT, dtype=torch.float16)
    none = int32()
    flashinfer.append_paged_mla_kv_cache(
        ckv, kpe, none, none, cache, cache[..., :ROPE], none, int32(0)
    )


@by_half
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_vllm(index_dtype, dtype, device):
    """One token is not to be written, and there are rows behind the last slot."""
    slots = [40, 3, -1, 143]
    kv_c, k_pe = tokens(len(slots) + 2, dtype, device)
    cache = torch.full((PAGES, PAGE_SIZE, LATENT + ROPE), 5.0, dtype=dtype, device=device)
    expected = cache.clone()
    for token, slot in enumerate(slots):
        if slot >= 0:
            row = torch.cat([kv_c[token], k_pe[token]])
            expected[slot // PAGE_SIZE, slot % PAGE_SIZE] = row
    mapping = torch.tensor(slots, dtype=index_dtype, device=device)
    scale = torch.tensor(0.5, device=device)
    assert vllm.concat_and_cache_mla(kv_c, k_pe, cache, mapping, "auto", scale) is None
    assert torch.equal(cache, expected)


FP8 = torch.zeros(2, PAGE_SIZE, LATENT + ROPE).to(torch.float8_e4m3fn)


def test_what_flashinfer_s_is_refused():
    ckv, kpe = tokens(1, torch.float16, "cpu")
    one = int32(0)
    with pytest.raises(NotImplementedError) as raised:
        flashinfer.append_paged_mla_kv_cache(
            ckv, kpe, one, one, FP8[..., :LATENT], FP8[..., LATENT:], one, int32(0, 1)
        )
    assert str(raised.value) == (
        "ckv_cache must have append_ckv's dtype torch.float16: quantised caches are not "
        "implemented, got torch.float8_e4m3fn"
    )
