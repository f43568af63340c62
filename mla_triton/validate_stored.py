"""A cache -> how its tokens lie, or an error that names the argument, the rule and the value; and
whether what is written shares memory with what is read.

What the rules of append, gather and copy_pages have in common. Rules are gone through once for
calls that are alike in all that the host knows. Addresses are not alike: those are looked at in
every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from mla_triton import memory
from mla_triton.cache import LatentCache
from mla_triton.problem_cache import Stored
from mla_triton.validate import (
    INT32_MAX,
    LAST_DIMENSION,
    Facts,
    Layout,
    check_stored_dtypes,
    facts,
    fail,
    scaled_group,
    shape,
)

ALIGNMENT = 16
"""Bytes that rows begin at multiples of, where they are aligned."""
NAMED_DTYPES = "float16, bfloat16 or float32"
INTEGERS = (torch.int32, torch.int64)
MOST_TOKENS = INT32_MAX - 128
"""Tokens are numbered in int32, those of a program that has fewer included."""


class StoredFacts(NamedTuple):
    """What the host knows of a cache."""

    ckv: Facts
    kpe: Facts | None
    scales: Facts | None


class Found(NamedTuple):
    """A cache's description, and the names of its tensors to a user."""

    stored: Stored
    tensors: dict[str, Layout]


class Known(NamedTuple):
    """A call that keeps all rules that need no address."""

    problem: Any
    written: tuple[int, ...]
    """Bytes that each of the tensors that are written reaches over."""
    read: tuple[int, ...]


# -- the cache


def facts_of(cache: LatentCache) -> StoredFacts:
    ckv, kpe, scales = cache
    return StoredFacts(
        facts(ckv),
        None if kpe is None else facts(kpe),
        None if scales is None else facts(scales),
    )


def layout_of(known: Facts | None) -> Layout | None:
    return None if known is None else Layout(*known)


def find_stored(known: StoredFacts, latent: int, rope: int) -> Found:
    """How a cache's tokens lie; raises where it is none, or not one of such tokens."""
    ckv, kpe, scales = Layout(*known.ckv), layout_of(known.kpe), layout_of(known.scales)
    name = "cache" if kpe is None and scales is None else "cache.ckv"
    check_stored_dtypes(name, ckv, kpe, scales)
    if len(ckv.shape) != 3 or ckv.shape[0] < 1 or ckv.shape[1] < 1:
        rule = "be [pages, page_size, columns] with at least one page of one token"
        fail(ValueError, name, rule, shape(ckv))
    pages, page_size, columns = ckv.shape
    inside = kpe is None
    if columns != (latent + rope if inside else latent):
        rule = f"have latent's {latent} columns"
        if inside:
            rule = f"have {latent + rope} columns (latent {latent} + rope {rope})"
        fail(ValueError, name, rule, columns)
    if kpe is not None and tuple(kpe.shape) != (pages, page_size, rope):
        rule = f"be {(pages, page_size, rope)} to go with cache.ckv and rope"
        fail(ValueError, "cache.kpe", rule, shape(kpe))
    scaling, group = "none", 0
    if scales is not None:
        group = scaled_group(scales, ckv)
        scaling = "groups" if group else "one"
    tensors = {name: ckv}
    if kpe is not None:
        tensors["cache.kpe"] = kpe
    if scales is not None:
        tensors["cache.scales"] = scales
    for tensor_name, tensor in tensors.items():
        if not tensor.last_is_contiguous:
            fail(ValueError, tensor_name, LAST_DIMENSION, f"strides {tuple(tensor.strides)}")
        if tensor.device != ckv.device:
            fail(ValueError, tensor_name, f"be on {name}'s device {ckv.device}", tensor.device)
    keys = ckv if kpe is None else kpe
    stored = Stored(
        latent=latent,
        rope=rope,
        latent_dtype=ckv.dtype,
        rope_dtype=keys.dtype,
        scaling=scaling,
        inside=inside,
        group=group,
        scale_dtype=None if scales is None else scales.dtype,
        page_size=page_size,
        latent_step=ckv.strides[1],
        rope_step=keys.strides[1],
        scale_step=scales.strides[1] if scales is not None and group else 0,
    )
    return Found(stored, tensors)


def parts(
    cache: LatentCache, stored: Stored
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(latents, rotary keys, scales of both) as kernels take them: keys that lie behind the latents
    are columns of their own."""
    ckv, kpe, scales = cache
    if not stored.rope or not stored.inside:
        return ckv, kpe, scales, scales
    latents, keys = ckv.split_with_sizes([stored.latent, stored.rope], -1)
    if stored.scaling != "groups" or scales is None or stored.latent % stored.group:
        return latents, keys, scales, scales
    first = stored.latent // stored.group
    return latents, keys, scales, scales.narrow(-1, first, scales.shape[-1] - first)


# -- where things lie


def named(cache: LatentCache, prefix: str = "cache") -> dict[str, torch.Tensor | None]:
    """A cache's tensors by the names that a user has for them."""
    ckv = prefix if cache.kpe is None and cache.scales is None else f"{prefix}.ckv"
    return {ckv: cache.ckv, f"{prefix}.kpe": cache.kpe, f"{prefix}.scales": cache.scales}


def are_aligned(tensors: Sequence[torch.Tensor | None]) -> bool:
    together = 0
    for tensor in tensors:
        if tensor is not None:
            together |= tensor.data_ptr()
    return together % ALIGNMENT == 0


def row_aligned(tensor: Layout | None) -> bool:
    """Whether every row begins at a multiple of 16 bytes, if the first does."""
    if tensor is None:
        return True
    rows = zip(tensor.shape[:-1], tensor.strides[:-1], strict=True)
    return all(step * tensor.dtype.itemsize % ALIGNMENT == 0 for size, step in rows if size > 1)


def slots_aligned(found: Found) -> bool:
    stored = found.stored
    behind = stored.latent * stored.latent_dtype.itemsize if stored.inside and stored.rope else 0
    wide = [tensor for name, tensor in found.tensors.items() if name != "cache.scales"]
    return behind % ALIGNMENT == 0 and all(map(row_aligned, wide))


def check_written(found: Found) -> tuple[int, ...]:
    """Bytes of each tensor that is written; raises where a token's place is another's, too."""
    sizes = []
    for name, tensor in found.tensors.items():
        if name == "cache.scales" and not found.stored.group:
            continue
        if tensor.may_overlap:
            rule = "be laid out without overlap"
            fail(ValueError, name, rule, f"strides {tuple(tensor.strides)}")
        sizes.append(size_of(tensor))
    return tuple(sizes)


def size_of(tensor: Layout | None) -> int:
    if tensor is None:
        return 0
    return memory.reach(tensor.dtype.itemsize, tuple(tensor.shape), tensor.strides)


def check_apart(
    known: Known,
    written: Sequence[torch.Tensor],
    read: dict[str, torch.Tensor | None],
    what: str = "the results",
) -> None:
    """Raises where what is written shares memory with what is read."""
    addresses = [tensor.data_ptr() for tensor in written]
    first = min(addresses)
    last = max(map(int.__add__, addresses, known.written))
    for (name, tensor), size in zip(read.items(), known.read, strict=True):
        if tensor is None:
            continue
        address = tensor.data_ptr()
        if address + size <= first or address >= last:
            continue
        if any(memory.share(memory.of(tensor), memory.of(place)) for place in written):
            fail(ValueError, name, f"share no memory with {what}", "tensors that overlap")
