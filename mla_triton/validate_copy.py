"""Two caches and page numbers -> the problem of a copy of pages, or an error that names the
argument, the rule and the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from mla_triton.problem_cache import CopyProblem
from mla_triton.validate import (
    Facts,
    Layout,
    check_no_grad,
    facts,
    fail,
    is_list,
    shape,
    unpack_cache,
)
from mla_triton.validate_stored import (
    ALIGNMENT,
    INTEGERS,
    Known,
    are_aligned,
    check_apart,
    size_of,
)


class CopyCall(NamedTuple):
    """All that the rules of copy_pages look at."""

    read: tuple[Facts, ...]
    written: tuple[Facts, ...]
    names: tuple[str, ...]
    """Of the parts: of a cache in one tensor, none."""
    sources: Facts
    targets: Facts
    aligned: bool


def cache_parts(cache: Any, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a cache whose pages are copied, by name."""
    if isinstance(cache, torch.Tensor):
        return {"": cache}
    found = unpack_cache(cache, name)._asdict()
    # One scale for all latents and one for all keys are no part of a page.
    return {
        f".{part}": tensor
        for part, tensor in found.items()
        if tensor is not None and not (part == "scales" and tensor.dim() == 1)
    }


def check_alike(read: dict[str, torch.Tensor], written: dict[str, torch.Tensor]) -> None:
    """Raises where two caches are not in the same number of tensors."""
    if list(read) != list(written):
        got = " and ".join(f"cache_to{name}" for name in written)
        rule = f"be in the tensors of cache_from ({', '.join(f'cache_to{n}' for n in read)})"
        fail(ValueError, "cache_to", rule, got)


def copy_pages(
    names: Sequence[str],
    read: Sequence[torch.Tensor],
    written: Sequence[torch.Tensor],
    sources: torch.Tensor,
    targets: torch.Tensor,
    *,
    has_memory: bool = True,
) -> CopyProblem:
    """Checks one call of copy_pages, as `mla_triton.copy_pages` has unpacked it."""
    if torch.is_grad_enabled():
        check_no_grad({f"cache_from{n}": t for n, t in zip(names, read, strict=True)})
        check_no_grad({f"cache_to{n}": t for n, t in zip(names, written, strict=True)})
    call = CopyCall(
        tuple(map(facts, read)),
        tuple(map(facts, written)),
        tuple(names),
        facts(sources),
        facts(targets),
        has_memory and are_aligned((*read, *written)),
    )
    if not has_memory:
        found: CopyProblem = copy_of(call).problem
        return found
    known = known_copy(call)
    # A page may go to another of the same cache, but caches may not overlap in any other way.
    same = {
        f"cache_from{name}": None if _is_same(one, other) else one
        for name, one, other in zip(names, read, written, strict=True)
    }
    check_apart(known, written, same | {"source_pages": sources, "target_pages": targets})
    problem: CopyProblem = known.problem
    return problem


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.stride(0) == other.stride(0)


def copy_of(call: CopyCall) -> Known:
    """The problem of a call that keeps all rules."""
    sources, targets = Layout(*call.sources), Layout(*call.targets)
    read, written = ([Layout(*f) for f in cache] for cache in (call.read, call.written))
    for name, ids in (("source_pages", sources), ("target_pages", targets)):
        if ids.dtype not in INTEGERS:
            fail(TypeError, name, "be int32 or int64", ids.dtype)
    if targets.dtype != sources.dtype:
        fail(TypeError, "target_pages", f"have source_pages's dtype {sources.dtype}", targets.dtype)
    if not is_list(sources):
        fail(ValueError, "source_pages", "be contiguous [pages to copy]", sources)
    if not is_list(targets) or targets.shape != sources.shape:
        fail(ValueError, "target_pages", f"be contiguous [{sources.shape[0]}]", targets)
    words, is_aligned = [], call.aligned
    for part, one, other in zip(call.names, read, written, strict=True):
        _check_page("cache_from" + part, one)
        _check_page("cache_to" + part, other)
        if (other.dtype, other.shape[1:]) != (one.dtype, one.shape[1:]):
            rule = f"have pages of {one.dtype} {tuple(one.shape[1:])}, as cache_from"
            got = f"{other.dtype} {tuple(other.shape[1:])}"
            fail(ValueError, "cache_to" + part, rule, got)
        size = one.dtype.itemsize
        for number in one.shape[1:]:
            size *= number
        words.append(size)
        steps = (one.strides[0], other.strides[0])
        is_aligned = is_aligned and not any(s * one.dtype.itemsize % ALIGNMENT for s in steps)
        is_aligned = is_aligned and size % 4 == 0
    for part, tensor in [
        *((f"cache_from{part}", tensor) for part, tensor in zip(call.names, read, strict=True)),
        *((f"cache_to{part}", tensor) for part, tensor in zip(call.names, written, strict=True)),
        ("target_pages", targets),
    ]:
        if tensor.device != sources.device:
            fail(ValueError, part, f"be on source_pages's device {sources.device}", tensor.device)
    for name, cache in (("cache_from", read), ("cache_to", written)):
        for tensor in cache[1:]:
            if tensor.shape[0] != cache[0].shape[0]:
                rule = f"have as many pages in every tensor as the first, {cache[0].shape[0]}"
                fail(ValueError, name, rule, tensor.shape[0])
    word = 4 if is_aligned else 1
    problem = CopyProblem(
        words=tuple(size // word for size in words),
        word_bytes=word,
        id_dtype=sources.dtype,
        pages=sources.shape[0],
    )
    return Known(
        problem, tuple(map(size_of, written)), tuple(map(size_of, (*read, sources, targets)))
    )


known_copy = lru_cache(maxsize=1024)(copy_of)


def _check_page(name: str, tensor: Layout) -> None:
    if len(tensor.shape) < 2 or min(tensor.shape) < 1:
        fail(ValueError, name, "be [pages, ...] with at least one page", shape(tensor))
    inside = 1
    for size, step in zip(reversed(tensor.shape[1:]), reversed(tensor.strides[1:]), strict=True):
        if size > 1 and step != inside:
            rule = "have contiguous pages (packed ones are copied as the uint8 tensor they are in)"
            fail(ValueError, name, rule, f"strides {tuple(tensor.strides)}")
        inside *= size
    if tensor.shape[0] > 1 and tensor.strides[0] < inside:
        rule = "be laid out without overlap"
        fail(ValueError, name, rule, f"strides {tuple(tensor.strides)}")
