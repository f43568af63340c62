"""A cache and its tokens -> the problem of an append, a gather or a copy, or an error that names the
argument, the rule and the value.

As in `mla_triton.validate` only what the host knows is looked at, and the rules are gone through
once for calls that are alike. Addresses are not alike, so whether what is written shares memory
with what is read is looked at in every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from mla_triton import memory
from mla_triton.cache import LatentCache
from mla_triton.cache.formats import E4M3
from mla_triton.problem_cache import (
    FEW_TOKENS,
    AppendProblem,
    CopyProblem,
    GatherProblem,
    Stored,
)
from mla_triton.validate import (
    DTYPES,
    INT32_MAX,
    LAST_DIMENSION,
    Facts,
    Layout,
    check_no_grad,
    check_tensor,
    exceeds_int32,
    facts,
    fail,
    is_list,
    shape,
)

ALIGNMENT = 16
"""Bytes that rows begin at multiples of, where they are aligned."""
INTEGERS = (torch.int32, torch.int64)
NAMED_DTYPES = "float16, bfloat16 or float32"
STYLES = ("interleaved", "half")
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


def unpack_cache(cache: Any, name: str = "cache") -> LatentCache:
    """The cache as a LatentCache; TypeError for anything else."""
    if isinstance(cache, torch.Tensor):
        return LatentCache(cache)
    if not isinstance(cache, LatentCache):
        fail(TypeError, name, "be a torch.Tensor or a LatentCache", type(cache).__name__)
    for part, tensor in zip(LatentCache._fields, cache, strict=True):
        if tensor is not None or part == "ckv":
            check_tensor(f"{name}.{part}", tensor)
    return cache


def facts_of(cache: LatentCache) -> StoredFacts:
    ckv, kpe, scales = cache
    return StoredFacts(
        facts(ckv),
        None if kpe is None else facts(kpe),
        None if scales is None else facts(scales),
    )


def _layout(known: Facts | None) -> Layout | None:
    return None if known is None else Layout(*known)


def find_stored(known: StoredFacts, latent: int | None, rope: int) -> Found:
    """How a cache's tokens lie; raises where it is none, or not one of such tokens.

    Without `latent`, that is what the cache's columns leave.
    """
    ckv, kpe, scales = Layout(*known.ckv), _layout(known.kpe), _layout(known.scales)
    name = "cache" if kpe is None and scales is None else "cache.ckv"
    _check_numbers(name, ckv, kpe, scales)
    if len(ckv.shape) != 3 or ckv.shape[0] < 1 or ckv.shape[1] < 1:
        rule = "be [pages, page_size, columns] with at least one page of one token"
        fail(ValueError, name, rule, shape(ckv))
    pages, page_size, columns = ckv.shape
    inside = kpe is None
    if latent is None:
        latent = columns - rope if inside else columns
        if latent < 1:
            rule = f"be fewer than the {columns} columns of {name}"
            fail(ValueError, "rope", rule, rope)
    if columns != (latent + rope if inside else latent):
        wide = f"{latent + rope} wide (latent {latent} + rope {rope})" if inside else f"{latent} wide"
        fail(ValueError, name, f"be {wide}", f"width {columns}")
    if kpe is not None and tuple(kpe.shape) != (pages, page_size, rope):
        rule = f"be {(pages, page_size, rope)} to go with cache.ckv and rope"
        fail(ValueError, "cache.kpe", rule, shape(kpe))
    scaling, group = _check_scales(scales, pages, page_size, columns)
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


def _check_numbers(name: str, ckv: Layout, kpe: Layout | None, scales: Layout | None) -> None:
    """Raises where dtypes are not those of a cache."""
    if ckv.dtype not in (*DTYPES, E4M3):
        fail(TypeError, name, "be float16, bfloat16, float32 or float8_e4m3fn", ckv.dtype)
    if (scales is not None) != (ckv.dtype == E4M3):
        rule = "be given if, and only if, cache.ckv is float8_e4m3fn"
        got = f"{'no' if scales is None else 'a'} tensor beside {ckv.dtype}"
        fail(ValueError, "cache.scales", rule, got)
    if scales is not None and scales.dtype not in (torch.float32, torch.uint8):
        fail(TypeError, "cache.scales", "be float32, or uint8 (e8m0) for groups", scales.dtype)
    if kpe is None:
        return
    if scales is None:
        if kpe.dtype != ckv.dtype:
            fail(TypeError, "cache.kpe", f"have cache.ckv's dtype {ckv.dtype}", kpe.dtype)
    elif len(scales.shape) == 1:
        if kpe.dtype != E4M3:
            rule = "be float8_e4m3fn, as cache.ckv, beside one scale for each"
            fail(TypeError, "cache.kpe", rule, kpe.dtype)
    elif kpe.dtype not in (torch.bfloat16, torch.float16):
        rule = "be bfloat16 or float16 beside scales of groups"
        fail(TypeError, "cache.kpe", rule, kpe.dtype)


def _check_scales(
    scales: Layout | None, pages: int, page_size: int, columns: int
) -> tuple[str, int]:
    """(how latents are scaled, columns of a group)."""
    if scales is None:
        return "none", 0
    if len(scales.shape) == 1:
        if tuple(scales.shape) != (2,) or scales.dtype != torch.float32:
            rule = "be float32 [2], one for latents and one for rotary keys, or of groups"
            fail(ValueError, "cache.scales", rule, f"{scales.dtype} of {shape(scales)}")
        return "one", 0
    is_of_slots = len(scales.shape) == 3 and tuple(scales.shape[:2]) == (pages, page_size)
    if not is_of_slots or scales.shape[2] < 1 or columns % scales.shape[2]:
        rule = f"be [2], or [{pages}, {page_size}, groups] with a divisor of {columns} groups"
        fail(ValueError, "cache.scales", rule, shape(scales))
    return "groups", columns // scales.shape[2]


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
    return latents, keys, scales, scales[..., stored.latent // stored.group :]


# -- append


class AppendCall(NamedTuple):
    """All that the rules of append look at."""

    cache: StoredFacts
    latent: Facts
    rope: Facts | None
    slots: Facts
    norm_weight: Facts | None
    cos_sin: Facts | None
    positions: Facts | None
    style: str
    power_of_two: bool
    aligned: bool
    """Whether what the kernels access in wide steps begins at multiples of 16 bytes."""


def check_style(style: Any) -> None:
    if style not in STYLES:
        fail(ValueError, "rope_style", 'be "interleaved" or "half"', repr(style))


def append(
    cache: LatentCache,
    latent: torch.Tensor,
    rope: torch.Tensor | None,
    slots: torch.Tensor,
    norm_weight: torch.Tensor | None,
    cos_sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    style: str,
    power_of_two: bool,
    *,
    has_memory: bool = True,
) -> AppendProblem:
    """Checks one call of append, as `mla_triton.append` has unpacked it."""
    if torch.is_grad_enabled():
        named = {"latent": latent, "rope": rope, "norm_weight": norm_weight, "cos_sin": cos_sin}
        check_no_grad(named | _named(cache))
    wide = (latent, rope, cache.ckv, cache.kpe, norm_weight, cos_sin)
    call = AppendCall(
        facts_of(cache),
        facts(latent),
        None if rope is None else facts(rope),
        facts(slots),
        None if norm_weight is None else facts(norm_weight),
        None if cos_sin is None else facts(cos_sin),
        None if positions is None else facts(positions),
        style,
        power_of_two,
        has_memory and _are_aligned(wide),
    )
    if not has_memory:
        found: AppendProblem = append_of(call).problem
        return found
    known = known_append(call)
    problem: AppendProblem = known.problem
    written = [cache.ckv, cache.kpe, cache.scales if problem.stored.group else None]
    read = {
        "latent": latent, "rope": rope, "slot_mapping": slots, "norm_weight": norm_weight,
        "cos_sin": cos_sin, "positions": positions,
    }  # fmt: skip
    _check_apart(known, [tensor for tensor in written if tensor is not None], read)
    return problem


def append_of(call: AppendCall) -> Known:
    """The problem of a call that keeps all rules."""
    latent, slots = Layout(*call.latent), Layout(*call.slots)
    rope, norm_weight, cos_sin, positions = map(
        _layout, (call.rope, call.norm_weight, call.cos_sin, call.positions)
    )
    read = {
        "latent": latent, "rope": rope, "slot_mapping": slots, "norm_weight": norm_weight,
        "cos_sin": cos_sin, "positions": positions,
    }  # fmt: skip
    for name in ("latent", "norm_weight", "cos_sin"):
        tensor = read[name]
        if tensor is not None and tensor.dtype not in DTYPES:
            fail(TypeError, name, f"be {NAMED_DTYPES}", tensor.dtype)
    if rope is not None and rope.dtype != latent.dtype:
        fail(TypeError, "rope", f"have latent's dtype {latent.dtype}", rope.dtype)
    for name in ("slot_mapping", "positions"):
        tensor = read[name]
        if tensor is not None and tensor.dtype not in INTEGERS:
            fail(TypeError, name, "be int32 or int64", tensor.dtype)
    if len(latent.shape) != 2 or latent.shape[1] < 1:
        fail(ValueError, "latent", "be [tokens, latent] with at least one column", shape(latent))
    tokens, width = latent.shape
    if exceeds_int32(tokens + INT32_MAX - MOST_TOKENS):
        fail(ValueError, "latent", f"have at most {MOST_TOKENS} tokens", tokens)
    rope_width = 0
    if rope is not None:
        if len(rope.shape) != 2 or rope.shape[0] != tokens or rope.shape[1] < 1:
            fail(ValueError, "rope", f"be [{tokens}, rope] like latent", shape(rope))
        rope_width = rope.shape[1]
    found = find_stored(call.cache, width, rope_width)
    for name, tensor, expected in (
        ("slot_mapping", slots, tokens), ("positions", positions, tokens),
        ("norm_weight", norm_weight, width),
    ):  # fmt: skip
        if tensor is not None and not (is_list(tensor) and tensor.shape[0] == expected):
            fail(ValueError, name, f"be contiguous [{expected}]", tensor)
    _check_rotation(rope_width, cos_sin, positions)
    for name, tensor in read.items():
        if tensor is None:
            continue
        if not tensor.last_is_contiguous:
            fail(ValueError, name, LAST_DIMENSION, f"strides {tuple(tensor.strides)}")
    every = {**read, **found.tensors}
    for name, tensor in every.items():
        if tensor is not None and tensor.device != latent.device:
            fail(ValueError, name, f"be on latent's device {latent.device}", tensor.device)
    written = _check_written(found)
    stored = found.stored
    problem = AppendProblem(
        dtype=latent.dtype,
        stored=stored,
        power_of_two=call.power_of_two or stored.scale_dtype == torch.uint8,
        slot_dtype=slots.dtype,
        norm_dtype=None if norm_weight is None else norm_weight.dtype,
        rotation=None if cos_sin is None else call.style,
        cos_sin_dtype=None if cos_sin is None else cos_sin.dtype,
        position_dtype=None if positions is None else positions.dtype,
        aligned=call.aligned
        and _rows_aligned(found)
        and all(_row_aligned(tensor) for tensor in (latent, rope, cos_sin)),
        few=tokens <= FEW_TOKENS,
        tokens=tokens,
    )
    return Known(problem, written, tuple(_size(tensor) for tensor in read.values()))


known_append = lru_cache(maxsize=1024)(append_of)


def _check_rotation(rope: int, cos_sin: Layout | None, positions: Layout | None) -> None:
    if (cos_sin is None) != (positions is None):
        got = "None" if positions is None else "a tensor"
        fail(ValueError, "positions", "be given if, and only if, cos_sin is", got)
    if cos_sin is None:
        return
    if rope == 0 or rope % 2:
        fail(ValueError, "rope", "have an even number of columns where cos_sin is given", rope)
    if len(cos_sin.shape) != 2 or cos_sin.shape[0] < 1 or cos_sin.shape[1] != rope:
        rule = f"be [max_positions, {rope}] with at least one position"
        fail(ValueError, "cos_sin", rule, shape(cos_sin))


# -- where things lie


def _named(cache: LatentCache, prefix: str = "cache") -> dict[str, torch.Tensor | None]:
    """A cache's tensors by the names that a user has for them."""
    ckv = prefix if cache.kpe is None and cache.scales is None else f"{prefix}.ckv"
    return {ckv: cache.ckv, f"{prefix}.kpe": cache.kpe, f"{prefix}.scales": cache.scales}


def _are_aligned(tensors: Sequence[torch.Tensor | None]) -> bool:
    together = 0
    for tensor in tensors:
        if tensor is not None:
            together |= tensor.data_ptr()
    return together % ALIGNMENT == 0


def _row_aligned(tensor: Layout | None) -> bool:
    """Whether every row begins at a multiple of 16 bytes, if the first does."""
    if tensor is None:
        return True
    rows = zip(tensor.shape[:-1], tensor.strides[:-1], strict=True)
    return all(step * tensor.dtype.itemsize % ALIGNMENT == 0 for size, step in rows if size > 1)


def _rows_aligned(found: Found) -> bool:
    stored = found.stored
    behind = stored.latent * stored.latent_dtype.itemsize if stored.inside and stored.rope else 0
    wide = [tensor for name, tensor in found.tensors.items() if name != "cache.scales"]
    return behind % ALIGNMENT == 0 and all(map(_row_aligned, wide))


def _check_written(found: Found) -> tuple[int, ...]:
    """Bytes of each tensor that is written; raises where a token's place is another's, too."""
    sizes = []
    for name, tensor in found.tensors.items():
        if name == "cache.scales" and not found.stored.group:
            continue
        if tensor.may_overlap:
            rule = "be laid out without overlap"
            fail(ValueError, name, rule, f"strides {tuple(tensor.strides)}")
        sizes.append(_size(tensor))
    return tuple(sizes)


def _size(tensor: Layout | None) -> int:
    if tensor is None:
        return 0
    return memory.reach(tensor.dtype.itemsize, tuple(tensor.shape), tensor.strides)


def _check_apart(
    known: Known, written: Sequence[torch.Tensor], read: dict[str, torch.Tensor | None]
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
            fail(ValueError, name, "share no memory with the cache", "tensors that overlap")


# -- gather


class GatherCall(NamedTuple):
    """All that the rules of gather look at."""

    cache: StoredFacts
    pages: Facts
    indptr: Facts | None
    cu_seqlens_k: Facts
    starts: Facts | None
    out: Facts
    rope_out: Facts | None
    aligned: bool
