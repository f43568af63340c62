"""The appends, gathers and copies of pages that an engine makes with real tensors, up to the
kernels they ask for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from mla_triton import configs
from mla_triton.cache import LatentCache, named
from mla_triton.cache.formats import E4M3
from mla_triton.device import Device
from mla_triton.kernels.common.launch import Variant
from mla_triton.kernels.portable import append, copy_pages, gather
from mla_triton.tuning.deployment import Deployment
from mla_triton.validate_append import append as check_append
from mla_triton.validate_copy import cache_parts
from mla_triton.validate_copy import copy_pages as check_copy
from mla_triton.validate_gather import gather as check_gather

PAGES = 3


def cache_of(
    what: Deployment, dtype: torch.dtype, page_size: int, layout: str, form: str
) -> tuple[torch.Tensor | None, LatentCache]:
    """(packed pages or None, parts), in memory as an engine has it."""
    width = what.latent + what.rope
    if form in named.PACKED:
        pages = torch.zeros(PAGES, named.page_bytes(form, page_size, width), dtype=torch.uint8)
        return pages, named.parts(form, pages, page_size)
    kind = dtype if form == "16bit" else E4M3
    scales = None if form == "16bit" else torch.ones(2)

    def zeros(columns: int) -> torch.Tensor:
        return torch.zeros(PAGES, page_size, columns, dtype=torch.float32).to(kind)

    if layout == "pair":
        return None, LatentCache(
            zeros(what.latent), zeros(what.rope) if what.rope else None, scales
        )
    return None, LatentCache(zeros(width), None, scales)


def kernels_of(what: Deployment, tokens: Sequence[int], device: Device) -> Iterator[Variant]:
    """Those of calls with so many tokens each, over every cache that the deployment may have."""
    for dtype, page_size, layout, form in itertools.product(
        what.dtypes, what.page_sizes, what.layouts, what.cache_formats
    ):
        packed, cache = cache_of(what, dtype, page_size, layout, form)
        for count in tokens:
            for module, problem in (
                *_appends(what, cache, dtype, count),
                *_gathers(what, cache, dtype, form, count),
                (copy_pages, _copy(cache if packed is None else packed)),
            ):
                config = configs.choose(module, problem, device).config
                yield module.variant(problem, config, device)


def _appends(what: Deployment, cache: LatentCache, dtype: torch.dtype, tokens: int) -> Iterator:
    latent, rope = what.latent, what.rope
    projected = torch.zeros(tokens, latent + rope, dtype=dtype)
    slots = torch.zeros(tokens, dtype=torch.int64)
    plain = (cache, projected[:, :latent], projected[:, latent:] if rope else None, slots)
    for style in what.appends:
        if style == "plain":
            yield append, check_append(*plain, None, None, None, "interleaved", True)
            continue
        for angles in (torch.float32, dtype):
            table = torch.zeros(40, rope, dtype=angles) if rope else None
            positions = slots if rope else None
            weight = torch.ones(latent, dtype=dtype)
            yield append, check_append(*plain, weight, table, positions, style, True)


def _gathers(
    what: Deployment, cache: LatentCache, dtype: torch.dtype, form: str, tokens: int
) -> Iterator:
    latent, rope = what.latent, what.rope
    bounds, starts = torch.zeros(3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    dense = (torch.zeros(2, 2, dtype=torch.int32), None)
    csr = (torch.zeros(4, dtype=torch.int32), torch.zeros(3, dtype=torch.int32))
    for name, first in itertools.product(what.tables, (None, starts)):
        table = csr if name == "csr" else dense
        out = torch.zeros(tokens, latent, dtype=dtype)
        rope_out = torch.zeros(tokens, rope, dtype=dtype) if rope else None
        yield gather, check_gather(cache, *table, bounds, first, out, rope_out)
        if cache.kpe is None and form != "fp8":
            whole = torch.zeros(tokens, latent + rope, dtype=dtype)
            yield gather, check_gather(cache, *table, bounds, first, whole, None)


def _copy(cache: torch.Tensor | LatentCache):
    moved = cache_parts(cache, "cache")
    parts, ids = list(moved.values()), torch.zeros(2, dtype=torch.int64)
    return check_copy(list(moved), parts, [torch.zeros_like(part) for part in parts], ids, ids)
