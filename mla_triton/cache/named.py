"""Caches by the names of their formats, as command lines and tuned rows have them.

"16bit" is a cache in the queries' dtype; "fp8" e4m3 with one scale for all latents and one for all
rotary keys; the others are packed formats (`mla_triton.cache.formats`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch

from mla_triton.cache.formats import E4M3, PACKED_FORMATS
from mla_triton.cache.pages import LatentCache
from mla_triton.cache.quantise import quantise
from mla_triton.problem import DecodeProblem, Storage

PACKED = {form.name: form for form in PACKED_FORMATS}
CACHE_FORMATS = ("16bit", "fp8", *PACKED)
ONE_SCALE = 2.0**-6
"""Of latents and of rotary keys in a cache of N(0,1) values: the largest of them stay below 448."""
CHUNK_BYTES = 1 << 26
"""Of a cache, what is quantised at once."""


def why_not(name: str, dtype: torch.dtype, latent: int, rope: int, value_dim: int) -> str | None:
    """The rule that keeps a format from being the cache of a model, or None."""
    if name != "16bit" and dtype == torch.float32:
        return f"cache_format must be 16bit for float32, got {name}"
    if name not in PACKED:
        return None
    form = PACKED[name]
    inside = form.latent + form.rope == latent + rope == value_dim
    apart = (form.latent, form.rope, value_dim) == (latent, rope, latent)
    if not (inside or apart) or (form.rope and form.rope != rope):
        got = f"{latent} + {rope} with values of {value_dim}"
        return f"cache_format must be one for keys of {got}, got {name}"
    if form.rope and dtype != torch.bfloat16:
        kind = str(dtype).removeprefix("torch.")
        return f"dtype must be bfloat16 where cache_format is {name}, got {kind}"
    return None


def page_bytes(name: str, page_size: int, columns: int) -> int:
    """Bytes of a page of a quantised cache; `columns` are those of a key."""
    return PACKED[name].page_bytes(page_size) if name in PACKED else page_size * columns


def parts(name: str, pages: torch.Tensor, page_size: int) -> LatentCache:
    """Pages of a quantised cache, uint8 `[pages, page_bytes]`, as what `mla_triton.decode` takes.

    The scales of "fp8", which has none in its pages, are new.
    """
    if name in PACKED:
        return PACKED[name].views(pages, page_size)
    scales = torch.full((2,), ONE_SCALE, device=pages.device)
    return LatentCache(pages.view(E4M3).view(pages.shape[0], page_size, -1), None, scales)


def fill(
    name: str, pages: torch.Tensor, page_size: int, columns: int, generator: torch.Generator
) -> None:
    """Writes quantised N(0,1) keys into pages, a part of them at a time."""
    for some in pages.split(max(1, CHUNK_BYTES // pages.shape[1])):
        made = parts(name, some, page_size)
        keys = torch.empty(some.shape[0], page_size, columns, device=pages.device)
        keys.normal_(generator=generator)
        latent = made.ckv.shape[-1]
        rope = keys[..., latent:] if latent < columns else None
        for view, part in zip(made, quantise(keys[..., :latent], rope, made), strict=True):
            if view is not None and part is not None:
                view.copy_(part)


def over(problem: DecodeProblem, name: str) -> DecodeProblem:
    """A problem over a fused cache in the queries' dtype as that over one of a format.

    Raises ValueError where the format is none for it.
    """
    if name == "16bit":
        return problem
    if name not in CACHE_FORMATS:
        raise ValueError(f"cache_format must be one of {', '.join(CACHE_FORMATS)}, got {name!r}")
    rule = why_not(name, problem.dtype, problem.latent, problem.rope, problem.value_dim)
    if rule is not None:
        raise ValueError(rule)
    if name == "fp8":
        return replace(problem, storage=Storage(None, 0, torch.float32, 0))
    form = PACKED[name]
    latents, keys, scales = form.steps
    rope = torch.bfloat16 if form.rope else None
    return replace(
        problem,
        fused=not form.rope,
        ckv_stride_slot=latents,
        kpe_stride_slot=keys if form.rope else 0,
        storage=Storage(rope, form.group, form.scale_dtype, scales),
    )


def over_storage(problem: DecodeProblem, name: str) -> Iterator[DecodeProblem]:
    """The same for `Storage.name`, which tuned rows have: with contiguous parts; none where no
    cache of the problem can be stored so."""
    found = re.fullmatch(r"fp8-(\d+)-(float32|e8m0)", name)
    if name in ("16bit", "fp8"):
        yield over(problem, name)
    elif found is not None:
        group, columns = int(found[1]), problem.value_dim
        scale = torch.uint8 if found[2] == "e8m0" else torch.float32
        pair = problem.key_tail > 0
        if group and columns % group == 0:
            yield replace(
                problem,
                fused=not pair,
                ckv_stride_slot=columns,
                kpe_stride_slot=problem.rope if pair else 0,
                storage=Storage(problem.dtype if pair else None, group, scale, columns // group),
            )


def name_of(problem: DecodeProblem) -> str:
    """The format of a problem's cache; ValueError where it has none of these names."""
    storage = problem.storage
    if storage is None or not storage.group:
        return "fp8" if storage is not None else "16bit"
    for name, form in PACKED.items():
        if (form.group, form.scale_dtype) == (storage.group, storage.scale):
            return name
    raise ValueError(f"cache must be of a known format, got {storage}")
