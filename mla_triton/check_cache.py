"""Appends to, gathers from and copies of pages of small caches of every form, held bit for bit
against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mla_triton.testing import append_inputs, copy_inputs, gather_inputs
from mla_triton.testing.cache_results import CacheInputs
from mla_triton.testing.caches import FORMS

PAGE_SIZE = 16
FACTORIES: dict[str, Callable[..., CacheInputs]] = {
    "append": append_inputs,
    "gather": gather_inputs,
    "copy_pages": copy_inputs,
}


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

    def recipe(self) -> dict[str, Any]:
        """Arguments of the operation's factory."""
        recipe: dict[str, Any] = {"form": self.form, "page_size": PAGE_SIZE, "dtype": self.dtype}
        if self.operation == "append":
            return recipe | {"tokens": self.tokens, "pages": _pages(self.tokens)}
        if self.operation == "gather":
            lengths = (self.tokens // 2, 0, self.tokens // 3, 1)
            return recipe | {"lengths": lengths, "cache_dtype": self.dtype}
        return recipe | {"pages": 2 * _pages(self.tokens)}

    def inputs(self, device: torch.device) -> CacheInputs:
        return FACTORIES[self.operation](**self.recipe(), device=device)


def caches(on_gpu: bool) -> list[CacheCase]:
    """Each operation on each form; 16 bit in one tensor and in two, and all that are quantised."""
    tokens = 2000 if on_gpu else 20
    operations = ("append", "gather", "copy_pages")
    return [CacheCase(operation, form, tokens) for operation in operations for form in FORMS]


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE_SIZE) + 3
