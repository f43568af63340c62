"""`flashinfer.page`: where new tokens go in a paged cache."""

from __future__ import annotations

import torch

from mla_triton.compat.conventions import check_tensors, int32

__all__ = ["get_batch_indices_positions", "get_seq_lens"]


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
