"""How a latent cache and its page table are described to the operations."""

from mla_triton.cache.formats import FP8_DS_MLA, FP8_V4, FP8_V41, CacheFormat
from mla_triton.cache.pages import CSRPageTable, LatentCache

__all__ = ["FP8_DS_MLA", "FP8_V4", "FP8_V41", "CSRPageTable", "CacheFormat", "LatentCache"]
