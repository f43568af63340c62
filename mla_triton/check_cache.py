"""Appends to, gathers from and copies of pages of small caches of every form, held bit for bit
against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import mla_triton
from mla_triton import reference, select, validate, validate_append, validate_copy, validate_gather
from mla_triton.cache import LatentCache
from mla_triton.testing import append_inputs, gather_inputs, same_bits
from mla_triton.testing.caches import FORMS, MARGIN, PACKED, CacheMemory

PAGE_SIZE = 16


class CacheCall(NamedTuple):
    """A call that is ready to be made."""

    choose: Callable[..., select.Selection]
    problem: Any
    fault: Callable[[], str]
    """Makes it; what is wrong with its result, or nothing."""


@dataclass(frozen=True)
class CacheCase:
    """One operation over a cache of one of `mla_triton.testing.caches.FORMS`."""

    operation: str
    """append, gather or copy_pages."""
    form: str
    tokens: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> str:
        """ "append t20 fp8_v4"."""
        return f"{self.operation} t{self.tokens} {self.form}"

    @property
    def call(self) -> str:
        return f"page {PAGE_SIZE}"

    def prepared(self, device: torch.device) -> CacheCall:
        return {"append": _append, "gather": _gather, "copy_pages": _copy}[self.operation](
            self, device
        )


def caches(on_gpu: bool) -> list[CacheCase]:
    """Each operation on each form; 16 bit in one tensor and in two, and all that are quantised."""
    tokens = 2000 if on_gpu else 20
    operations = ("append", "gather", "copy_pages")
    return [CacheCase(operation, form, tokens) for operation in operations for form in FORMS]


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE_SIZE) + 3


def _append(case: CacheCase, device: torch.device) -> CacheCall:
    inputs = append_inputs(
        form=case.form, tokens=case.tokens, pages=_pages(case.tokens), page_size=PAGE_SIZE,
        dtype=case.dtype, device=device,
    )  # fmt: skip
    (cache, latent, rope, slots), options = inputs.call_arguments()
    problem = validate_append.append(
        validate.unpack_cache(cache), latent, rope, slots, None, None, None, "interleaved",
        options["power_of_two_scales"],
    )  # fmt: skip

    def fault() -> str:
        made = inputs.fresh()
        arguments, options = made.call_arguments()
        mla_triton.append(*arguments, **options)
        return _difference(made.memory, inputs.expected(torch.float32))

    return CacheCall(select.append, problem, fault)


def _gather(case: CacheCase, device: torch.device) -> CacheCall:
    shares = (case.tokens // 2, 0, case.tokens // 3, 1)
    inputs = gather_inputs(
        form=case.form, lengths=shares, page_size=PAGE_SIZE, cache_dtype=case.dtype,
        dtype=case.dtype, device=device,
    )  # fmt: skip
    problem = validate_gather.gather(
        validate.unpack_cache(inputs.cache), *validate.unpack_page_table(inputs.table),
        inputs.cu_seqlens_k, inputs.starts, inputs.out, inputs.rope_out,
    )  # fmt: skip

    def fault() -> str:
        is_right = same_bits(inputs.call(), inputs.expected())
        return "" if is_right else "rows are not the reference's"

    return CacheCall(select.gather, problem, fault)


def _copy(case: CacheCase, device: torch.device) -> CacheCall:
    """Pages that were appended to into others of the same cache; one number is none of it."""
    inputs = append_inputs(
        form=case.form, tokens=case.tokens, pages=_pages(case.tokens), page_size=PAGE_SIZE,
        dtype=case.dtype, device=device,
    )  # fmt: skip
    memory = inputs.expected(torch.float32)
    half = _pages(case.tokens) // 2
    sources = torch.arange(half, device=device)
    targets = sources + half
    targets[0] = -1
    named = validate_copy.cache_parts(_pages_of(memory), "cache")
    parts = list(named.values())
    problem = validate_copy.copy_pages(list(named), parts, parts, sources, targets)

    def fault() -> str:
        made, wanted = memory.copy(), memory.copy()
        pages = _pages_of(made)
        mla_triton.copy_pages(pages, pages, sources, targets)
        right = list(validate_copy.cache_parts(_pages_of(wanted), "cache").values())
        reference.copy_pages(right, right, sources, targets)
        return _difference(made, wanted)

    return CacheCall(select.copy_pages, problem, fault)


def _pages_of(memory: CacheMemory) -> torch.Tensor | LatentCache:
    """What is copied: packed pages as the bytes that they are in."""
    if memory.form not in PACKED:
        return memory.cache
    pages = memory.parts[0].shape[0]
    return memory.buffers[0][MARGIN:-MARGIN].view(pages, -1)


def _difference(got: CacheMemory, wanted: CacheMemory) -> str:
    count = got.differs(wanted)
    return f"{count} bytes are not the reference's" if count else ""
