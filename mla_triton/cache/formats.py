"""Page formats of a latent cache: what a token has, and where its bytes lie in a page.

One description each. From it follow the views that kernels read and write through
(`CacheFormat.views`), and byte-exact packing and unpacking in plain PyTorch.

A page holds some parts of every token: its latent, its rotary key, its scales. A part is either
interleaved, token after token with the other parts, or lies behind the data of the whole page.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla_triton.cache.pages import LatentCache

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class CacheFormat:
    """Bytes of a token, and the numbers that they are."""

    name: str
    latent: int
    """Columns of a latent, as the cache has them; in e4m3."""
    rope: int
    """Columns of the rotary key that lie apart from the latent, in bfloat16."""
    group: int
    """Columns of a latent that share a scale."""
    scale_dtype: torch.dtype
    """float32; or uint8, an e8m0 number: the exponent of a power of two, biased by 127."""
    scale_bytes: int
    """Bytes that a token's scales take, padding included."""
    scales_behind: bool = False
    """Whether the scales of a page lie behind all of its tokens' data."""
    page_multiple: int = 1
    """Bytes that a page is padded to a multiple of."""

    @property
    def groups(self) -> int:
        return self.latent // self.group

    @property
    def data_bytes(self) -> int:
        """Of a token, in the part of a page that is interleaved."""
        return self.latent + 2 * self.rope + (0 if self.scales_behind else self.scale_bytes)

    @property
    def token_bytes(self) -> int:
        return self.latent + 2 * self.rope + self.scale_bytes

    @property
    def steps(self) -> tuple[int, int, int]:
        """Elements from one token's latent, rotary key and scales to the next one's in a page."""
        scales = self.scale_bytes if self.scales_behind else self.data_bytes
        return self.data_bytes, self.data_bytes // 2, scales // self.scale_dtype.itemsize

    def page_bytes(self, page_size: int) -> int:
        whole = page_size * self.token_bytes
        return -(-whole // self.page_multiple) * self.page_multiple

    def views(self, pages: torch.Tensor, page_size: int) -> LatentCache:
        """The parts of packed pages, as views of their memory.

        Args:
            pages: uint8 `[pages, page_bytes(page_size)]`, or any shape of so many bytes a page
                behind the first dimension (`[pages, page_size, 1, token_bytes]`); a page is
                contiguous.
            page_size: tokens of a page.

        Returns:
            `LatentCache(ckv, kpe, scales)`: e4m3 `[pages, page_size, latent]`, bfloat16
            `[pages, page_size, rope]` or None, and scales `[pages, page_size, groups]`.
        """
        if pages.dtype != torch.uint8:
            raise TypeError(f"pages must be uint8, got {pages.dtype}")
        size = self.page_bytes(page_size)
        if pages[0].numel() != size or not pages[0].is_contiguous():
            rule = f"have {size} contiguous bytes a page ({self.name}, {page_size} tokens)"
            got = f"shape {tuple(pages.shape)} and strides {tuple(pages.stride())}"
            raise ValueError(f"pages must {rule}, got {got}")
        data, flat = self.data_bytes, pages.flatten(1)

        # By slices: of a compiled function's views the compiler asks how they were made.
        def part(dtype: torch.dtype, columns: int, first: int, token: int) -> torch.Tensor:
            begin = first - first % token if first >= token * page_size else 0
            tokens = flat[:, begin : begin + page_size * token].unflatten(1, (page_size, token))
            inside = first - begin
            return tokens[..., inside : inside + columns * dtype.itemsize].view(dtype)

        latent_first = 0
        scales_first = page_size * data if self.scales_behind else self.latent
        scales_token = self.scale_bytes if self.scales_behind else data
        rope_first = self.latent + (0 if self.scales_behind else self.scale_bytes)
        return LatentCache(
            part(E4M3, self.latent, latent_first, data),
            part(torch.bfloat16, self.rope, rope_first, data) if self.rope else None,
            part(self.scale_dtype, self.groups, scales_first, scales_token),
        )


FP8_DS_MLA = CacheFormat("fp8_ds_mla", 512, 64, 128, torch.float32, 16)
"""DeepSeek-V3.2 (FlashMLA, vLLM): 656 bytes a token: 512 e4m3, 4 float32 scales, 64 bfloat16."""
FP8_V4 = CacheFormat("fp8_v4", 448, 64, 64, torch.uint8, 8, scales_behind=True, page_multiple=576)
"""DeepSeek-V4: 584 bytes a token: 448 e4m3 and 64 bfloat16, and behind those of the whole page for
each token 7 e8m0 scales and a byte of padding; a page takes a multiple of 576 bytes."""
FP8_V41 = CacheFormat("fp8_v41", 512, 0, 32, torch.uint8, 16)
"""528 bytes a token: 512 e4m3, the rotary part inside, and 16 e8m0 scales."""
PACKED_FORMATS = (FP8_DS_MLA, FP8_V4, FP8_V41)
