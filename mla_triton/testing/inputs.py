"""The rules about values on the device, which no operation reads in the hot path."""

from __future__ import annotations

from itertools import pairwise

import torch

from mla_triton.cache import CSRPageTable, LatentCache
from mla_triton.reference.paging import capacities, page_size, pages_of


def check_inputs(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor | None,
    cache: torch.Tensor | LatentCache,
    page_table: torch.Tensor | CSRPageTable,
    kv_lens: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    max_kv_len: int | None = None,
    **_: object,
) -> None:
    """Reads lengths, offsets and page ids and checks what `mla_triton.decode` assumes of them.

    Takes the arguments of a call as they are, of types and shapes that the call accepts. Raises
    ValueError naming the argument, the rule and the value that breaks it.
    """
    batch, tokens_per_page = kv_lens.shape[0], page_size(cache)
    if cu_seqlens_q is not None:
        _check_offsets("cu_seqlens_q", cu_seqlens_q.tolist())
        tokens, end = q_nope.shape[0], int(cu_seqlens_q[-1])
        if end != tokens:
            raise ValueError(f"cu_seqlens_q must end at the {tokens} tokens of q_nope, got {end}")
    if isinstance(page_table, CSRPageTable):
        _check_offsets("page_table.indptr", page_table.indptr.tolist())
        count, end = len(page_table.indices), int(page_table.indptr[-1])
        if end > count:
            raise ValueError(
                f"page_table.indptr must end within the {count} page_table.indices, got {end}"
            )
    limits = capacities(page_table, batch, tokens_per_page)
    _check_lengths(kv_lens.tolist(), limits, tokens_per_page, max_kv_len)
    _check_pages(cache, page_table, kv_lens.tolist())


def check_prefill_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    **_: object,
) -> None:
    """Reads the offsets and checks what `mla_triton.prefill` assumes of them.

    Takes the arguments of a call as they are, of types and shapes that the call accepts. Raises
    ValueError naming the argument, the rule and the value that breaks it.
    """
    for name, tensor, rows, whose in (
        ("cu_seqlens_q", cu_seqlens_q, q.shape[0], "q"),
        ("cu_seqlens_k", cu_seqlens_k, k.shape[0], "k"),
    ):
        offsets = tensor.tolist()
        _check_offsets(name, offsets)
        if offsets[-1] > rows:
            raise ValueError(
                f"{name} must end within the {rows} tokens of {whose}, got {offsets[-1]}"
            )
    longest = max((end - first for first, end in pairwise(cu_seqlens_q.tolist())), default=0)
    if max_seqlen_q is not None and longest > max_seqlen_q:
        raise ValueError(
            f"max_seqlen_q must be at least the longest sequence's queries, {longest}, "
            f"got {max_seqlen_q}"
        )


def _check_offsets(name: str, offsets: list[int]) -> None:
    if offsets[0] != 0:
        raise ValueError(f"{name} must start at 0, got {offsets[0]}")
    for i, (before, after) in enumerate(pairwise(offsets)):
        if after < before:
            raise ValueError(
                f"{name} must not decrease, got {before} then {after} at index {i + 1}"
            )


def _check_lengths(
    lengths: list[int], limits: list[int], tokens_per_page: int, max_kv_len: int | None
) -> None:
    for request, (length, limit) in enumerate(zip(lengths, limits, strict=True)):
        if length < 0:
            raise ValueError(f"kv_lens must be at least 0, got {length} for request {request}")
        if length > limit:
            raise ValueError(
                f"kv_lens must be at most the {limit} tokens of a request's "
                f"{limit // tokens_per_page} pages, got {length} for request {request}"
            )
        if max_kv_len is not None and length > max_kv_len:
            raise ValueError(
                f"kv_lens must be at most max_kv_len = {max_kv_len}, got {length} "
                f"for request {request}"
            )


def _check_pages(
    cache: torch.Tensor | LatentCache,
    page_table: torch.Tensor | CSRPageTable,
    lengths: list[int],
) -> None:
    name = "page_table.indices" if isinstance(page_table, CSRPageTable) else "page_table"
    tensor = cache.ckv if isinstance(cache, LatentCache) else cache
    for request, length in enumerate(lengths):
        pages = pages_of(page_table, request, -(-length // tensor.shape[1])).tolist()
        for i, page in enumerate(pages):
            if not 0 <= page < len(tensor):
                raise ValueError(
                    f"{name} must hold pages from 0 to {len(tensor) - 1}, got {page} "
                    f"as page {i} of request {request}"
                )
