"""The shapes that are measured, and what each must at least move and compute."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

LATENT, ROPE = 512, 64
ELEMENT = 2
"""Bytes of a bfloat16."""
PAGE_SIZE = 64
OTHER_PAGE_SIZES = (1, 16, 32, 128)
SOFTMAX_SCALE = 192**-0.5
SUSTAINED_CELL = "s4096-b128-h128"
SUSTAINED_SECONDS = 1.5
"""What is also measured under a load that makes a card lower its clocks, and for how long."""


@dataclass(frozen=True)
class Cell:
    """Decode of `batch` requests of `kv_len` tokens each, or of `kv_lens`, up to `kv_len`."""

    kv_len: int
    batch: int
    heads: int
    s_q: int = 1
    kv_lens: tuple[int, ...] | None = None
    page_size: int = PAGE_SIZE

    @property
    def name(self) -> str:
        if self.kv_lens is not None:
            return f"skewed-b{self.batch}-h{self.heads}"
        tail = f"-q{self.s_q}" if self.s_q > 1 else ""
        if self.page_size != PAGE_SIZE:
            tail += f"-p{self.page_size}"
        return f"s{self.kv_len}-b{self.batch}-h{self.heads}{tail}"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Cached tokens of each request."""
        return self.kv_lens or (self.kv_len,) * self.batch

    @property
    def cache_bytes(self) -> int:
        return sum(self.lengths) * (LATENT + ROPE) * ELEMENT

    @property
    def bytes(self) -> int:
        """Every cached token once, q and out."""
        rows = self.batch * self.s_q * self.heads
        return self.cache_bytes + rows * (LATENT + ROPE + LATENT) * ELEMENT

    @property
    def flops(self) -> int:
        """The masked keys of s_q > 1 are counted too, as the peers' figures do."""
        return 2 * sum(self.lengths) * self.s_q * self.heads * (LATENT + ROPE + LATENT)

    def floor(self, read_gbps: float, matmul_tflops: float) -> float:
        """Microseconds that no implementation can beat, given measured ceilings."""
        return max(self.bytes / (read_gbps * 1e3), self.flops / (matmul_tflops * 1e6))


def skewed(batch: int = 64, shortest: int = 128, longest: int = 32768, seed: int = 7) -> Cell:
    """Requests of 128 heads with log-uniform lengths; by default 277050 tokens in all."""
    draw = random.Random(seed)
    spread = longest / shortest
    lengths = tuple(round(shortest * spread ** draw.random()) for _ in range(batch))
    return Cell(max(lengths), batch, 128, kv_lens=lengths)


def other_pages() -> list[Cell]:
    """What shows the cost of a page size, against the same cell with pages of 64."""
    return [
        Cell(4096, 128, heads, page_size=size) for heads in (64, 128) for size in OTHER_PAGE_SIZES
    ]


def all_cells() -> list[Cell]:
    cells = [
        Cell(kv_len, batch, heads)
        for kv_len in (1024, 4096, 16384, 65536)
        for batch in (1, 16, 128)
        for heads in (16, 64, 128)
        if kv_len < 65536 or batch == 1
    ]
    return [*cells, Cell(4096, 128, 128, s_q=2), skewed(), *other_pages()]


def select(patterns: Sequence[str]) -> list[Cell]:
    """The cells whose name matches one of the shell patterns ("s4096-*", "*-b1-h16"); all without.

    Raises ValueError for a pattern that matches nothing.
    """
    cells = all_cells()
    if not patterns:
        return cells
    for pattern in patterns:
        if not any(fnmatchcase(cell.name, pattern) for cell in cells):
            raise ValueError(
                f"cells must match one of {[cell.name for cell in cells]}, got {pattern!r}"
            )
    return [cell for cell in cells if any(fnmatchcase(cell.name, p) for p in patterns)]
