"""From a paged cache to the keys of one request.

Reads what a kernel may read and nothing else: page ids past the last used page may be any number,
and cache slots past the last key may hold NaN.
"""

from __future__ import annotations

import torch

from mla_triton.cache import CSRPageTable, LatentCache
from mla_triton.cache.quantise import dequantise


def page_size(cache: torch.Tensor | LatentCache) -> int:
    return (cache.ckv if isinstance(cache, LatentCache) else cache).shape[1]


def capacities(
    page_table: torch.Tensor | CSRPageTable, batch: int, tokens_per_page: int
) -> list[int]:
    """How many keys the pages of each request can hold."""
    if isinstance(page_table, CSRPageTable):
        bounds = page_table.indptr.tolist()
        return [(bounds[b + 1] - bounds[b]) * tokens_per_page for b in range(batch)]
    return [page_table.shape[1] * tokens_per_page] * batch


def visible_lengths(
    kv_lens: torch.Tensor,
    page_table: torch.Tensor | CSRPageTable,
    tokens_per_page: int,
    max_kv_len: int | None = None,
) -> list[int]:
    """`kv_lens` as the operations take them: at least 0, at most what the page table can hold and
    `max_kv_len`."""
    lengths = kv_lens.tolist()
    limits = capacities(page_table, len(lengths), tokens_per_page)
    if max_kv_len is not None:
        limits = [min(limit, max_kv_len) for limit in limits]
    return [max(0, min(n, limit)) for n, limit in zip(lengths, limits, strict=True)]


def pages_of(page_table: torch.Tensor | CSRPageTable, request: int, count: int) -> torch.Tensor:
    """The first `count` page ids of a request: `[count]` int64."""
    if isinstance(page_table, CSRPageTable):
        first = int(page_table.indptr[request])
        return page_table.indices[first : first + count].long()
    return page_table[request, :count].long()


def gather_keys(
    cache: torch.Tensor | LatentCache,
    page_table: torch.Tensor | CSRPageTable,
    request: int,
    length: int,
    value_dim: int | None = None,
) -> torch.Tensor:
    """The first `length` keys of a request, latent and rope part side by side.

    Returns `[length, latent + rope]` in the cache's dtype; of a quantised cache in float64, exactly
    the numbers that it stands for. Columns of `ckv` from `value_dim` on are rotary keys, which may
    have a scale of their own.
    """
    size = page_size(cache)
    pages = pages_of(page_table, request, -(-length // size))
    position = torch.arange(length, device=pages.device)
    page, slot = pages[position // size], position % size
    if not isinstance(cache, LatentCache):
        return cache[page, slot]
    latent = cache.ckv[page, slot]
    rope = None if cache.kpe is None else cache.kpe[page, slot]
    if cache.scales is not None:
        is_one = cache.scales.dim() == 1
        scales = cache.scales if is_one else cache.scales[page, slot]
        behind = 0 if value_dim is None else max(0, latent.shape[-1] - value_dim)
        rows = LatentCache(latent, rope, scales)
        latent, rope = dequantise(rows, torch.float64, rope=behind)
    return latent if rope is None else torch.cat([latent, rope], dim=-1)
