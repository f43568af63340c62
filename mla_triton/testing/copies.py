"""Copies of pages made to catch a kernel that reads or writes what it must not.

Pages hold random bytes, NaN of every kind among them. Before the first page, behind the last and
between pages there are canaries, and some page numbers are none of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mla_triton import reference, validate_copy
from mla_triton.cache import LatentCache
from mla_triton.testing.caches import MARGIN, PACKED, CacheMemory, cache_memory


@dataclass(frozen=True, repr=False)
class CopyInputs:
    """The arguments of one call of `mla_triton.copy_pages`, and where they came from."""

    source: CacheMemory
    target: CacheMemory
    """The same object where pages are copied within one cache."""
    source_pages: torch.Tensor
    target_pages: torch.Tensor
    recipe: dict[str, Any] = field(default_factory=dict)
    """The arguments of `copy_inputs` that made this."""

    def call_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, for `mla_triton.copy_pages`."""
        caches = pages_of(self.source), pages_of(self.target)
        return (*caches, self.source_pages, self.target_pages), {}

    def fresh(self) -> CopyInputs:
        """The same with a target of its own."""
        target = self.target.copy()
        is_one = self.source is self.target
        return replace(self, source=target if is_one else self.source, target=target)

    def expected(self) -> CacheMemory:
        """What the reference leaves in a copy of the target."""
        made = self.fresh()
        (source, target, *numbers), _ = made.call_arguments()
        read, written = (
            list(validate_copy.cache_parts(cache, "cache").values()) for cache in (source, target)
        )
        reference.copy_pages(read, written, *numbers)
        return made.target

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.recipe.items())
        return f"copy_inputs({arguments})"


def pages_of(memory: CacheMemory) -> torch.Tensor | LatentCache:
    """What is copied of a cache: packed pages as the bytes that they are in."""
    if memory.form not in PACKED:
        return memory.cache
    return memory.buffers[0][MARGIN:-MARGIN].view(memory.parts[0].shape[0], -1)


def copy_inputs(
    *,
    form: str = "fused",
    pages: int = 8,
    page_size: int = 16,
    latent: int = 512,
    rope: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    apart: bool = False,
    page_dtype: torch.dtype = torch.int64,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> CopyInputs:
    """Pages of one of `mla_triton.testing.caches.FORMS`, half of them to the other half, at random.

    With `apart` all pages of one cache go to those of another. Of the pairs the first has a target
    and the last a source that is no page, and neither is copied. The same arguments give the same
    values on every device.
    """
    recipe = {name: value for name, value in locals().items() if name != "device"}
    generator = torch.Generator().manual_seed(seed)

    def filled() -> CacheMemory:
        made = cache_memory(
            form, pages=pages, page_size=page_size, latent=latent, rope=rope, dtype=dtype
        )
        for part in made.parts:
            stored = part.of(made.buffers).view(torch.uint8)
            stored.copy_(torch.randint(256, stored.shape, generator=generator, dtype=torch.uint8))
        return made.to(device)

    source = filled()
    target = filled() if apart else source
    order = torch.randperm(pages, generator=generator)
    sources, targets = (
        (order, torch.randperm(pages, generator=generator))
        if apart
        else (order[: pages // 2], order[pages // 2 :][: pages // 2])
    )
    sources, targets = sources.to(page_dtype), targets.to(page_dtype)
    targets[:1] = -1
    sources[1:][-1:] = torch.iinfo(page_dtype).max
    return CopyInputs(source, target, sources.to(device), targets.to(device), recipe)
