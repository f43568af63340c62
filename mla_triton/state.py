"""The one thing that every attention operation returns."""

from __future__ import annotations

from typing import NamedTuple

import torch


class AttentionState(NamedTuple):
    """Attention over some set of keys, in the form that merges with attention over another set.

    A row that saw no key has `out` 0 and `lse` -inf.
    """

    out: torch.Tensor
    """`[..., heads, value_dim]`, in q's dtype."""
    lse: torch.Tensor
    """`[..., heads]` float32: natural logarithm of the sum of exponentials of the scaled logits."""
