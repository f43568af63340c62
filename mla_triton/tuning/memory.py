"""Values that trials share: as many as the largest of them needs, made once."""

from __future__ import annotations

import torch


class Memory:
    """One large tensor of N(0,1) values, of which every trial takes slices; or of bytes that a
    trial fills."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._values: torch.Tensor | None = None

    def take(self, dtype: torch.dtype, count: int) -> torch.Tensor:
        """`count` values; those of an earlier call may be the same memory."""
        held = self._values
        if held is None or held.dtype != dtype or held.numel() < count:
            # Freed first: two of them may be more than the card has.
            self._values = held = None
            torch.cuda.empty_cache()
            generator = torch.Generator(self.device).manual_seed(0)
            self._values = torch.empty(count, dtype=dtype, device=self.device)
            if dtype.is_floating_point:
                self._values.normal_(generator=generator)
        assert self._values is not None
        return self._values[:count]
