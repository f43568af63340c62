"""What the operations on a cache's tokens mean: append, gather and the copy of pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mla_triton.cache import CSRPageTable, LatentCache
from mla_triton.cache.quantise import dequantise, quantise
from mla_triton.reference.paging import capacities, pages_of

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""By the bytes of a number."""


def append(
    cache: torch.Tensor | LatentCache,
    latent: torch.Tensor,
    rope: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    cos_sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    rope_style: str = "interleaved",
    power_of_two_scales: bool = True,
    compute_dtype: torch.dtype = torch.float64,
) -> None:
    """Writes tokens to the slots of a cache; arguments are those of `mla_triton.append`.

    Norm and rotation are computed in `compute_dtype`, and rounded to float32 once. Of tokens with
    the same slot, the last is kept.
    """
    whole = LatentCache(cache) if isinstance(cache, torch.Tensor) else cache
    pages, page_size = whole.ckv.shape[:2]
    kept = last_of_each(slot_mapping.long(), pages * page_size)
    latent = latent[kept]
    if norm_weight is not None:
        latent = normalised(latent, norm_weight, norm_eps, compute_dtype).float()
    if rope is not None:
        rope = rope[kept]
        if cos_sin is not None and positions is not None:
            place = positions[kept].long().clamp(0, cos_sin.shape[0] - 1)
            rope = rotated(rope, cos_sin[place], rope_style, compute_dtype).float()
    slots = slot_mapping.long()[kept]
    page, place = slots // page_size, slots % page_size
    tokens = quantise(latent, rope, whole, power_of_two_scales)
    for stored, part in zip(whole, tokens, strict=True):
        if stored is not None and part is not None and stored.dim() == 3:
            as_integers(stored)[page, place] = as_integers(part)


def last_of_each(slots: torch.Tensor, capacity: int) -> torch.Tensor:
    """Indices of the last token of every slot that is in the cache."""
    ordered, order = slots.sort(stable=True)
    is_last = torch.ones_like(ordered, dtype=torch.bool)
    is_last[:-1] = ordered[1:] != ordered[:-1]
    return order[is_last & (ordered >= 0) & (ordered < capacity)]


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers as integers of as many bits: PyTorch indexes e4m3 on no GPU, and where it is to be
    deterministic it writes other NaN than it is given."""
    return tensor.view(INTEGERS[tensor.element_size()])


def normalised(
    latent: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """RMSNorm over the columns, in a dtype."""
    latent = latent.to(dtype)
    return latent * (latent.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(dtype)


def rotated(
    rope: torch.Tensor, cos_sin: torch.Tensor, style: str, dtype: torch.dtype
) -> torch.Tensor:
    """Keys `[tokens, rope]` turned by the angles of `cos_sin` `[tokens, rope]`, in a dtype."""
    cos, sin = cos_sin.to(dtype).chunk(2, -1)
    rope = rope.to(dtype)
    first, second = (
        rope.unflatten(-1, (-1, 2)).unbind(-1) if style == "interleaved" else rope.chunk(2, -1)
    )
    turned = first * cos - second * sin, second * cos + first * sin
    if style == "interleaved":
        return torch.stack(turned, -1).flatten(-2)
    return torch.cat(turned, -1)


def gather(
    cache: torch.Tensor | LatentCache,
    page_table: torch.Tensor | CSRPageTable,
    cu_seqlens_k: torch.Tensor,
    *,
    starts: torch.Tensor | None = None,
    out: torch.Tensor,
    rope_out: torch.Tensor | None = None,
) -> None:
    """Writes keys of every request to rows; arguments are those of `mla_triton.gather`."""
    whole = LatentCache(cache) if isinstance(cache, torch.Tensor) else cache
    bounds = cu_seqlens_k.tolist()
    batch = len(bounds) - 1
    firsts = [0] * batch if starts is None else starts.tolist()
    pages, page_size = whole.ckv.shape[:2]
    limits = capacities(page_table, batch, page_size)
    rope = 0 if rope_out is None else rope_out.shape[1]
    for request, (first, limit) in enumerate(zip(firsts, limits, strict=True)):
        begin, end = bounds[request], bounds[request + 1]
        key = torch.arange(first, first + end - begin, device=out.device)
        table = pages_of(page_table, request, limit // page_size)
        has_page = (key >= 0) & (key < limit)
        page = torch.full_like(key, -1)
        page[has_page] = table[key[has_page] // page_size]
        is_there = (page >= 0) & (page < pages)
        tokens = page[is_there], key[is_there] % page_size
        latents, keys = _tokens(whole, tokens, out.dtype, rope)
        rows = torch.arange(begin, end, device=out.device)
        for result, values in ((out, latents), (rope_out, keys)):
            if result is not None:
                result[rows] = 0
                as_integers(result)[rows[is_there]] = as_integers(values)


def _tokens(
    cache: LatentCache, places: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype, rope: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents, rotary keys) of the tokens at some (pages, slots)."""
    ckv, kpe, scales = cache
    chosen = LatentCache(
        as_integers(ckv)[places].view(ckv.dtype),
        None if kpe is None else as_integers(kpe)[places].view(kpe.dtype),
        scales if scales is None or scales.dim() == 1 else scales[places],
    )
    latents, keys = dequantise(chosen, dtype, rope=rope)
    if keys is None:
        return latents[:, : latents.shape[1] - rope], latents[:, latents.shape[1] - rope :]
    return latents, keys


def copy_pages(
    read: Sequence[torch.Tensor],
    written: Sequence[torch.Tensor],
    source_pages: torch.Tensor,
    target_pages: torch.Tensor,
) -> None:
    """Copies pages of each tensor to pages of its counterpart, as `mla_triton.copy_pages`.

    All are read before any is written, and of several for one target the last is kept.
    """
    for one, other in zip(read, written, strict=True):
        sources = source_pages.long()
        is_valid = (sources >= 0) & (sources < one.shape[0])
        targets = target_pages.long().masked_fill(~is_valid, -1)
        kept = last_of_each(targets, other.shape[0])
        as_integers(other)[targets[kept]] = as_integers(one)[sources[kept]]
