"""What the host knows of a call that writes, reads or moves tokens of a cache.

As in `mla_triton.problem`, what changes from step to step and changes no code is carried along but
left out of equality.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

FEW_TOKENS = 1024
"""Tokens of a call that is over before memory is busy: latency is all there is to it."""


@dataclass(frozen=True)
class Stored:
    """How the tokens of a cache lie, and as what numbers.

    A token has two parts, its latent and its rotary key. The second may lie in the columns behind
    the first, or in a tensor of its own: to a kernel that is all the same.
    """

    latent: int
    """Columns."""
    rope: int
    """Columns; 0 where there is none."""
    latent_dtype: torch.dtype
    rope_dtype: torch.dtype
    scaling: str
    """Of latents: "none"; "one" scale for all of them, and one for all rotary keys; "groups", a
    scale for each group of columns."""
    inside: bool
    """Whether the rotary key lies behind the latent, and in groups where that does."""
    group: int
    """Columns that share a scale; 0 without groups."""
    scale_dtype: torch.dtype | None
    page_size: int
    latent_step: int
    """Elements from a token's latent to the next one's in a page."""
    rope_step: int
    scale_step: int

    @property
    def rope_scaling(self) -> str:
        """The same of rotary keys: those in a tensor of their own are in no groups."""
        return "none" if self.scaling == "groups" and not self.inside else self.scaling


@dataclass(frozen=True)
class AppendProblem:
    """Tokens to be written to the slots of a cache."""

    dtype: torch.dtype
    """Of the tokens."""
    stored: Stored
    power_of_two: bool
    """Whether float32 scales of groups are."""
    slot_dtype: torch.dtype
    norm_dtype: torch.dtype | None
    """Of the weight of a fused RMSNorm."""
    rotation: str | None
    """"interleaved" or "half", the pairs of a fused rotation."""
    cos_sin_dtype: torch.dtype | None
    position_dtype: torch.dtype | None
    aligned: bool
    """Whether every row begins at a multiple of 16 bytes."""
    few: bool
    """Whether there are `FEW_TOKENS` at most."""
    tokens: int = field(default=FEW_TOKENS, compare=False)


@dataclass(frozen=True)
class GatherProblem:
    """Tokens of requests, to be read from the pages of a cache into rows."""

    dtype: torch.dtype
    """Of the rows."""
    stored: Stored
    csr: bool
    starts: bool
    """Whether each request's rows begin with a key of its own, not with the first."""
    aligned: bool
    few: bool
    """Whether there are `FEW_TOKENS` rows at most."""
    rows: int = field(default=FEW_TOKENS, compare=False)
    batch: int = field(default=1, compare=False)


@dataclass(frozen=True)
class CopyProblem:
    """Whole pages, to be copied."""

    words: tuple[int, ...]
    """Words of a page in each of the tensors that make up a cache."""
    word_bytes: int
    """4 where every page begins at a multiple of 16 bytes, else 1."""
    id_dtype: torch.dtype
    pages: int = field(default=1, compare=False)
    """To be copied."""
