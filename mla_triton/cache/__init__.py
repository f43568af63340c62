"""How a latent cache and its page table are described to the operations."""

from mla_triton.cache.pages import CSRPageTable, LatentCache

__all__ = ["CSRPageTable", "LatentCache"]
