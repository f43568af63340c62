"""`flashinfer.page`: new tokens into a paged cache, and where they go."""

from __future__ import annotations

import torch

import mla_triton
from mla_triton import LatentCache
from mla_triton.compat.conventions import check_cache_dtype, check_rank, check_tensors, int32

__all__ = ["append_paged_mla_kv_cache", "get_batch_indices_positions", "get_seq_lens"]


def append_paged_mla_kv_cache(
    append_ckv: torch.Tensor,
    append_kpe: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor | None = None,
) -> None:
    """Writes new tokens to the pages of their requests; nothing is read back from the device.

    Args:
        append_ckv, append_kpe: `[tokens, head_dim_ckv]` and `[tokens, head_dim_kpe]`.
        batch_indices, positions: `[tokens]`, of `get_batch_indices_positions`. A token of request
            -1 is not written.
        ckv_cache, kpe_cache: `[pages, page_size, head_dim_ckv]` and `[pages, page_size,
            head_dim_kpe]`; the latter, and `append_kpe`, may have no columns.
        kv_indices, kv_indptr: the pages of all requests, those of the new tokens included.
        kv_last_page_len: not needed.

    Raises:
        NotImplementedError: a cache of another dtype than the tokens: quantised caches are not
            implemented here.
        TypeError, ValueError: as in `mla_triton.append`.
    """
    check_tensors(
        append_ckv=append_ckv, append_kpe=append_kpe, batch_indices=batch_indices,
        positions=positions, ckv_cache=ckv_cache, kpe_cache=kpe_cache, kv_indices=kv_indices,
        kv_indptr=kv_indptr,
    )  # fmt: skip
    check_rank("ckv_cache", ckv_cache, "pages, page_size, head_dim_ckv")
    check_cache_dtype("ckv_cache", ckv_cache, append_ckv, "append_ckv")
    if not append_ckv.shape[0]:
        return
    page_size, position = ckv_cache.shape[1], positions.long()
    begin = kv_indptr.to(positions.device).index_select(0, batch_indices.clamp_min(0))
    entry = (begin + position // page_size).clamp(0, kv_indices.shape[0] - 1)
    page = kv_indices.to(positions.device)[entry].long()
    slots = page * page_size + position % page_size
    has_rope = kpe_cache.shape[-1] > 0
    mla_triton.append(
        LatentCache(ckv_cache, kpe_cache if has_rope else None),
        append_ckv,
        append_kpe if has_rope else None,
        torch.where(batch_indices < 0, -1, slots),
    )


def get_batch_indices_positions(
    append_indptr: torch.Tensor, seq_lens: torch.Tensor, nnz: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each new token, its request and its position there: the new ones are a request's last.

    Args:
        append_indptr: `[batch + 1]`, where each request's new tokens begin.
        seq_lens: `[batch]`, tokens of each request with the new ones.
        nnz: how many tokens there is room for. Those past the last request have request -1 and
            position 0.

    Returns:
        Two int32 tensors `[nnz]`. Nothing is read back from the device.
    """
    check_tensors(append_indptr=append_indptr, seq_lens=seq_lens)
    ends = int32(append_indptr[1:])
    token = torch.arange(nnz, dtype=torch.int32, device=ends.device)
    request = torch.searchsorted(ends, token, right=True, out_int32=True)
    inside = request < ends.shape[0]
    request = torch.where(inside, request, 0)
    before = int32(seq_lens, ends.device) - ends
    position = before.index_select(0, request) + token
    return torch.where(inside, request, -1), torch.where(inside, position, 0)


def get_seq_lens(
    kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int
) -> torch.Tensor:
    """Tokens of each request `[batch]`, from the number of its pages and the tokens on the last."""
    full = (kv_indptr.diff() - 1).clamp_min(0)
    return full * page_size + kv_last_page_len
