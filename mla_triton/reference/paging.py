"""From a paged cache to the keys of one request.

Reads what a kernel may read and nothing else: page ids past the last used page may be any number,
and cache slots past the last key may hold NaN.
"""

from __future__ import annotations

import torch

from mla_triton.cache import CSRPageTable, LatentCache


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
    the numbers that it stands for. Columns from `value_dim` on are rotary keys: it is asked for
    where they stand behind latents that are quantised with one scale.
    """
    size = page_size(cache)
    pages = pages_of(page_table, request, -(-length // size))
    position = torch.arange(length, device=pages.device)
    page, slot = pages[position // size], position % size
    if not isinstance(cache, LatentCache):
        return cache[page, slot]
    latent = cache.ckv[page, slot]
    rope = latent[:, :0] if cache.kpe is None else cache.kpe[page, slot]
    if cache.scales is not None and cache.scales.dim() == 1:
        keys = torch.cat([latent.double(), rope.double()], dim=-1)
        split = value_dim if cache.kpe is None else latent.shape[1]
        return torch.cat(
            [keys[:, :split] * cache.scales[0].double(), keys[:, split:] * cache.scales[1].double()],
            dim=-1,
        )
    if cache.scales is not None:
        scales = scale_values(cache.scales[page, slot])
        width = latent.shape[1] // scales.shape[1]
        latent, rope = latent.double() * scales.repeat_interleave(width, dim=1), rope.double()
    return torch.cat([latent, rope], dim=-1)


def scale_values(scales: torch.Tensor) -> torch.Tensor:
    """float64 numbers that scales stand for: uint8 are exponents, 255 is NaN (OCP MX, e8m0)."""
    if scales.dtype != torch.uint8:
        return scales.double()
    powers = torch.ldexp(torch.ones_like(scales, dtype=torch.float64), scales.int() - 127)
    return powers.masked_fill(scales == 255, float("nan"))
