"""What the operations on a cache's tokens mean: append, gather and the copy of pages."""

from __future__ import annotations

import torch

from mla_triton.cache import LatentCache
from mla_triton.cache.quantise import quantise


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
            as_bytes(stored)[page, place] = as_bytes(part)


def last_of_each(slots: torch.Tensor, capacity: int) -> torch.Tensor:
    """Indices of the last token of every slot that is in the cache."""
    ordered, order = slots.sort(stable=True)
    is_last = torch.ones_like(ordered, dtype=torch.bool)
    is_last[:-1] = ordered[1:] != ordered[:-1]
    return order[is_last & (ordered >= 0) & (ordered < capacity)]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """e4m3 as uint8, which PyTorch can index on every device."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


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
