"""A paged latent cache and its page table, as values: views of the engine's memory, no copies."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LatentCache(NamedTuple):
    """A latent cache held as two tensors: the compressed latents and their rotary keys.

    A cache in one tensor `[pages, page_size, latent + rope]` needs no `LatentCache`: it is passed
    as it is.
    """

    ckv: torch.Tensor
    """`[pages, page_size, latent]`; any stride but the last, which must be 1."""
    kpe: torch.Tensor | None = None
    """`[pages, page_size, rope]` likewise, or None where the model has no separate rotary key."""


class CSRPageTable(NamedTuple):
    """The pages of every request, one request after another (FlashInfer's and SGLang's layout)."""

    indptr: torch.Tensor
    """`[batch + 1]` int32: request b owns `indices[indptr[b]:indptr[b + 1]]`."""
    indices: torch.Tensor
    """`[pages in use]` int32 page ids."""
