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


def check_append_inputs(
    cache: torch.Tensor | LatentCache,
    latent: torch.Tensor,
    rope: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    *,
    cos_sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    **_: object,
) -> None:
    """Reads slots and positions and checks what a caller of `mla_triton.append` means by them.

    That every slot is one of the cache, or -1, and is written once; that angles are known at every
    position. Takes the arguments of a call as they are; raises ValueError as `check_inputs`.
    """
    slots = slot_mapping.tolist()
    last = _first(cache).shape[0] * page_size(cache) - 1
    writers: dict[int, int] = {}
    for token, slot in enumerate(slots):
        if not -1 <= slot <= last:
            raise ValueError(
                f"slot_mapping must hold slots from 0 to {last}, or -1, got {slot} "
                f"for token {token}"
            )
        if slot in writers:
            raise ValueError(
                f"slot_mapping must name a slot once, got {slot} for tokens {writers[slot]} "
                f"and {token}"
            )
        if slot >= 0:
            writers[slot] = token
    if cos_sin is not None and positions is not None:
        for token, position in enumerate(positions.tolist()):
            if slots[token] >= 0 and not 0 <= position < len(cos_sin):
                raise ValueError(
                    f"positions must be rows of cos_sin, 0 to {len(cos_sin) - 1}, got {position} "
                    f"for token {token}"
                )


def check_gather_inputs(
    cache: torch.Tensor | LatentCache,
    page_table: torch.Tensor | CSRPageTable,
    cu_seqlens_k: torch.Tensor,
    *,
    rows: int,
    starts: torch.Tensor | None = None,
    **_: object,
) -> None:
    """Reads offsets, starts and page ids and checks what `mla_triton.gather` assumes of them.

    `rows` are those of its results. Takes the other arguments of a call as they are; raises
    ValueError as `check_inputs`.
    """
    offsets = cu_seqlens_k.tolist()
    _check_offsets("cu_seqlens_k", offsets)
    if offsets[-1] > rows:
        raise ValueError(f"cu_seqlens_k must end within the {rows} rows, got {offsets[-1]}")
    batch, size = len(offsets) - 1, page_size(cache)
    firsts = [0] * batch if starts is None else starts.tolist()
    limits = capacities(page_table, batch, size)
    ends = []
    for request, (first, limit) in enumerate(zip(firsts, limits, strict=True)):
        if first < 0:
            raise ValueError(f"starts must be at least 0, got {first} for request {request}")
        count = offsets[request + 1] - offsets[request]
        ends.append(first + count if count else 0)
        if ends[-1] > limit:
            raise ValueError(
                f"cu_seqlens_k must stay within the {limit} tokens of a request's "
                f"{limit // size} pages, got key {ends[-1] - 1} for request {request}"
            )
    _check_pages(cache, page_table, ends, firsts)


def check_copy_inputs(
    source_pages: torch.Tensor, target_pages: torch.Tensor, pages: tuple[int, int], in_place: bool
) -> None:
    """Reads page numbers and checks what a caller of `mla_triton.copy_pages` means by them.

    `pages` are those of the cache that is read and of the one that is written, which are one where
    `in_place`. That every pair is of pages there are, or has a -1; that no page is a target twice,
    nor a target and a source of another. Raises ValueError as `check_inputs`.
    """
    pairs = list(zip(source_pages.tolist(), target_pages.tolist(), strict=True))
    names = ("source_pages", "target_pages")
    for n, pair in enumerate(pairs):
        for name, page, count in zip(names, pair, pages, strict=True):
            if not -1 <= page < count:
                raise ValueError(
                    f"{name} must hold pages from 0 to {count - 1}, or -1, got {page} as number {n}"
                )
    copied = [(source, target) for source, target in pairs if min(source, target) >= 0]
    written: set[int] = set()
    for _, target in copied:
        if target in written:
            raise ValueError(f"target_pages must name a page once, got {target} twice")
        written.add(target)
    for source, target in copied:
        if in_place and source != target and source in written:
            raise ValueError(f"source_pages must be written by no other pair, got page {source}")


def _first(cache: torch.Tensor | LatentCache) -> torch.Tensor:
    return cache.ckv if isinstance(cache, LatentCache) else cache


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
    firsts: list[int] | None = None,
) -> None:
    """Of the pages of so many keys of each request, from key `firsts` on."""
    name = "page_table.indices" if isinstance(page_table, CSRPageTable) else "page_table"
    tensor = _first(cache)
    for request, length in enumerate(lengths):
        pages = pages_of(page_table, request, -(-length // tensor.shape[1])).tolist()
        first = 0 if firsts is None else firsts[request] // tensor.shape[1]
        for i, page in enumerate(pages[first:], first):
            if not 0 <= page < len(tensor):
                raise ValueError(
                    f"{name} must hold pages from 0 to {len(tensor) - 1}, got {page} "
                    f"as page {i} of request {request}"
                )
