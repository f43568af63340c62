"""Numbers of a cache to bytes and back, in plain PyTorch: what every format means, to the bit.

Quantising is float32 arithmetic: a value times the reciprocal of its scale, both rounded to
nearest, then rounded to e4m3 (nearest, ties to even). What is too large for e4m3, infinity
included, becomes its largest number, 448, with its sign; NaN becomes 0x7f. The scale of a group
follows from its largest finite magnitude: one NaN or infinity is of its own element alone.
"""

from __future__ import annotations

import torch

from mla_triton.cache.formats import E4M3, CacheFormat
from mla_triton.cache.pages import LatentCache

E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-126
"""Of which the reciprocal is finite, and which no card flushes to zero."""
E8M0_NAN = 255
FLOAT32_NAN = 0x7FC00000


def to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """float32 values in float8_e4m3fn: to nearest, ties to even; saturated; NaN is 0x7f."""
    # Without a sign: cards' own conversions drop it.
    positive = values.float().masked_fill(values.isnan(), float("nan"))
    return positive.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def group_scales(values: torch.Tensor, groups: int, power_of_two: bool = False) -> torch.Tensor:
    """float32 scale of each of so many groups of columns: `[..., columns]` -> `[..., groups]`.

    The largest finite magnitude of a group by 448; with `power_of_two`, the next power of two that
    is not below it. Of a group of zeros the scale is 1; none is below 2**-126.
    """
    grouped = values.float().unflatten(-1, (groups, -1))
    largest = grouped.abs().masked_fill(~grouped.isfinite(), 0.0).amax(-1)
    # By a tensor: on a GPU, PyTorch divides by a number as it multiplies by its reciprocal.
    scales = (largest / torch.full_like(largest, E4M3_MAX)).clamp_min(SMALLEST_SCALE)
    if power_of_two:
        bits = scales.view(torch.int32)
        scales = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return scales.masked_fill(largest == 0, 1.0)


def to_e8m0(scales: torch.Tensor) -> torch.Tensor:
    """The biased exponents of float32 powers of two from 2**-126 on, as uint8."""
    return ((scales.contiguous().view(torch.int32) >> 23) & 0xFF).to(torch.uint8)


def from_e8m0(exponents: torch.Tensor) -> torch.Tensor:
    """uint8 as float32: 2**(e - 127), from 2**-127 on; 255 is NaN."""
    exponent = exponents.to(torch.int32)
    bits = (exponent << 23).masked_fill(exponent == 0, 1 << 22)
    return bits.masked_fill(exponent == E8M0_NAN, FLOAT32_NAN).view(torch.float32)


def float32_scales(scales: torch.Tensor) -> torch.Tensor:
    """The scales of a cache as float32 numbers."""
    return from_e8m0(scales) if scales.dtype == torch.uint8 else scales


def quantise(
    latent: torch.Tensor,
    rope: torch.Tensor | None,
    like: LatentCache | torch.Tensor,
    power_of_two: bool = True,
) -> LatentCache:
    """Tokens as a cache has them.

    Args:
        latent: `[..., latent]` float16, bfloat16, float32.
        rope: `[..., rope]` likewise, or None. It goes behind the latent, into the same columns and
            groups, where the cache has no `kpe`.
        like: the cache. Of its tensors dtypes and last dimensions matter; and, where there is one
            scale for all latents and one for all rotary keys, their values.
        power_of_two: whether float32 scales of groups are; e8m0 scales always are.

    Returns:
        `LatentCache(ckv, kpe, scales)` with the leading dimensions of `latent`; `scales` as in
        `like` where those are two for all tokens.
    """
    cache = LatentCache(like) if isinstance(like, torch.Tensor) else like
    ckv, kpe, scales = cache
    kept = None if kpe is None or rope is None else rope.to(kpe.dtype)
    if scales is None:
        whole = latent if kpe is not None else joined(latent, rope)
        return LatentCache(whole.to(ckv.dtype), kept)
    latent, rope = latent.float(), None if rope is None else rope.float()
    if scales.dim() == 1:
        latents = to_e4m3(latent * scales[0].reciprocal())
        keys = None if rope is None else to_e4m3(rope * scales[1].reciprocal())
        if kpe is not None:
            return LatentCache(latents, keys, scales)
        return LatentCache(joined(latents, keys), None, scales)
    whole = latent if kpe is not None else joined(latent, rope)
    is_e8m0 = scales.dtype == torch.uint8
    made = group_scales(whole, scales.shape[-1], power_of_two or is_e8m0)
    grouped = whole.unflatten(-1, (scales.shape[-1], -1))
    numbers = to_e4m3(grouped * made.reciprocal()[..., None]).flatten(-2)
    return LatentCache(numbers, kept, to_e8m0(made) if is_e8m0 else made)


def joined(latent: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
    if rope is None:
        return latent
    if latent.dtype != E4M3:
        return torch.cat([latent, rope], -1)
    # Of e4m3 there is no cat in older versions.
    return torch.cat([latent.view(torch.uint8), rope.view(torch.uint8)], -1).view(E4M3)


def dequantise(
    cache: LatentCache | torch.Tensor, dtype: torch.dtype = torch.float32, *, rope: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(columns of `ckv`, columns of `kpe` or None) of a cache, as numbers of a dtype.

    Exact in float64. In any other dtype a number is multiplied by its scale in float32, and then
    rounded again.

    Args:
        cache: `[..., columns]` tensors, with any leading dimensions.
        rope: of a `ckv` without `kpe`, with one scale for all latents and one for all rotary keys:
            how many of its columns, the last ones, are rotary. Of no meaning to others.
    """
    whole = LatentCache(cache) if isinstance(cache, torch.Tensor) else cache
    ckv, kpe, scales = whole
    if scales is None:
        return ckv.to(dtype), None if kpe is None else kpe.to(dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    factors = float32_scales(scales).to(exact)
    numbers = ckv.float().to(exact)
    if scales.dim() > 1:
        groups = numbers.unflatten(-1, (scales.shape[-1], -1))
        latents = (groups * factors[..., None]).flatten(-2)
        return latents.to(dtype), None if kpe is None else kpe.to(dtype)
    columns = torch.arange(ckv.shape[-1], device=ckv.device)
    inside = rope if kpe is None else 0
    each = factors[(columns >= ckv.shape[-1] - inside).long()]
    keys = None if kpe is None else (kpe.float().to(exact) * factors[1]).to(dtype)
    return (numbers * each).to(dtype), keys


def pack(
    form: CacheFormat, latent: torch.Tensor, rope: torch.Tensor | None, power_of_two: bool = True
) -> torch.Tensor:
    """Whole pages of a packed format: uint8 `[pages, form.page_bytes(page_size)]`, padding zero.

    `latent` is `[pages, page_size, latent]`, `rope` `[pages, page_size, rope]` or None; together
    they have the format's columns.
    """
    count, page_size = latent.shape[:2]
    size = form.page_bytes(page_size)
    pages = torch.zeros(count, size, dtype=torch.uint8, device=latent.device)
    views = form.views(pages, page_size)
    for view, part in zip(views, quantise(latent, rope, views, power_of_two), strict=True):
        if view is not None and part is not None:
            view.copy_(part)
    return pages


def unpack(
    form: CacheFormat, pages: torch.Tensor, page_size: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(latent `[pages, page_size, latent]`, rotary keys `[pages, page_size, rope]` or None)."""
    return dequantise(form.views(pages, page_size), dtype)
