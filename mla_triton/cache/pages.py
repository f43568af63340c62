"""A paged latent cache and its page table, as values: views of the engine's memory, no copies."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LatentCache(NamedTuple):
    """A latent cache held as two tensors, the compressed latents and their rotary keys, or one that
    is quantised, with its scales.

    A cache in one 16-bit or float32 tensor `[pages, page_size, latent + rope]` needs no
    `LatentCache`: it is passed as it is.
    """

    ckv: torch.Tensor
    """`[pages, page_size, latent]`, or `[pages, page_size, latent + rope]` without `kpe`; any
    stride but the last, which must be 1. The queries' dtype, or float8_e4m3fn with `scales`."""
    kpe: torch.Tensor | None = None
    """`[pages, page_size, rope]` likewise, or None where the rotary key stands behind the latent or
    the model has none. Beside a quantised `ckv`, float8_e4m3fn with one scale for all tokens, or
    bfloat16 where a scale is of a group of columns."""
    scales: torch.Tensor | None = None
    """What e4m3 numbers are multiplied by: float32 `[2]`, one for all latents and one for all
    rotary keys; or `[pages, page_size, groups]`, one for each group of `latent / groups` columns of
    a token's latent, float32 or uint8 (e8m0: the exponent of a power of two, biased by 127)."""


class CSRPageTable(NamedTuple):
    """The pages of every request, one request after another (FlashInfer's and SGLang's layout)."""

    indptr: torch.Tensor
    """`[batch + 1]` int32: request b owns `indices[indptr[b]:indptr[b + 1]]`."""
    indices: torch.Tensor
    """`[pages in use]` int32 page ids."""
