"""Gathers made to catch a kernel that reads or writes what it must not.

Every slot of the cache holds a token; tables have pages that are none of the cache, and anything
past a request's pages; results are NaN, in rows that no request has and between rows too.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

import mla_triton
from mla_triton import reference
from mla_triton.cache import CSRPageTable, LatentCache
from mla_triton.testing.caches import PACKED, cache_memory
from mla_triton.testing.problems import moved, padded

NAN = float("nan")


class GatherInputs(NamedTuple):
    """The arguments of one call of `mla_triton.gather`, and where they came from."""

    cache: torch.Tensor | LatentCache
    table: torch.Tensor | CSRPageTable
    cu_seqlens_k: torch.Tensor
    starts: torch.Tensor | None
    out: torch.Tensor
    rope_out: torch.Tensor | None
    recipe: Mapping[str, Any] = MappingProxyType({})
    """The arguments of `gather_inputs` that made this."""

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.recipe.items())
        return f"gather_inputs({arguments})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How IPython and hypothesis print it, which would else spell out every tensor."""
        printer.text(repr(self))

    def call(self, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Into copies of the buffers."""
        out = moved_clone(self.out)
        rope_out = None if self.rope_out is None else moved_clone(self.rope_out)
        return mla_triton.gather(
            self.cache, self.table, self.cu_seqlens_k, starts=self.starts, out=out,
            rope_out=rope_out, **options,
        )  # fmt: skip

    def expected(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the reference makes of copies of the buffers."""
        out = moved_clone(self.out)
        rope_out = None if self.rope_out is None else moved_clone(self.rope_out)
        reference.gather(
            self.cache, self.table, self.cu_seqlens_k, starts=self.starts, out=out,
            rope_out=rope_out,
        )  # fmt: skip
        return out, rope_out

    @property
    def reached(self) -> int:
        """Rows that belong to a request."""
        return int(self.cu_seqlens_k[-1])


def moved_clone(tensor: torch.Tensor) -> torch.Tensor:
    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    whole = whole.set_(tensor.untyped_storage()).clone()
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def gather_inputs(
    *,
    form: str = "fused",
    lengths: tuple[int, ...] = (9, 0, 20, 1),
    starts: tuple[int, ...] | None = None,
    page_size: int = 4,
    latent: int = 512,
    rope: int = 64,
    cache_dtype: torch.dtype = torch.bfloat16,
    dtype: torch.dtype = torch.bfloat16,
    csr: bool = False,
    strided: int = 0,
    spare: int = 3,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> GatherInputs:
    """Requests of such lengths in pages at random, all slots filled; `spare` rows are nobody's.

    Some pages are none of the cache.
    """
    recipe = {name: value for name, value in locals().items() if name != "device"}
    generator = torch.Generator().manual_seed(seed)
    widths = (PACKED[form][1], 64) if form in PACKED else (latent, rope)
    firsts = starts or (0,) * len(lengths)
    pages_of = [max(0, -(-(f + n) // page_size)) for f, n in zip(firsts, lengths, strict=True)]
    pages = max(3, sum(pages_of))
    memory = cache_memory(
        form, pages=pages, page_size=page_size, latent=widths[0], rope=widths[1],
        dtype=cache_dtype, strided=strided, device=device,
    )  # fmt: skip
    slots = torch.arange(memory.capacity, device=device)
    tokens = [torch.randn(len(slots), width, generator=generator).to(device) for width in widths]
    reference.append(memory.cache, tokens[0], tokens[1] if widths[1] else None, slots)
    order = torch.randperm(pages, generator=generator).tolist()
    listed = [[order.pop() for _ in range(count)] for count in pages_of]
    for entries in listed:
        if len(entries) > 1 and torch.rand(1, generator=generator) < 0.3:
            entries[1] = [-1, pages, 2**31 - 1][len(entries) % 3]

    def int32(values: Any) -> torch.Tensor:
        return torch.as_tensor(values).to(device, torch.int32)

    table: Any
    if csr:
        bounds = torch.tensor([0, *pages_of]).cumsum(0)
        indices = [entry for entries in listed for entry in entries]
        table = CSRPageTable(int32(bounds), int32(indices or [0]))
    else:
        width = max(1, *pages_of)
        rows = [entries + [2**31 - 1] * (width - len(entries)) for entries in listed]
        table = int32(rows)
    bounds = torch.tensor([0, *lengths]).cumsum(0)

    def buffer(width: int) -> torch.Tensor:
        return padded(torch.full((int(bounds[-1]) + spare, width), NAN, dtype=dtype), strided)

    return GatherInputs(
        memory.cache,
        table,
        int32(bounds),
        None if starts is None else int32(starts),
        moved(buffer(widths[0]), device),
        moved(buffer(widths[1]), device) if widths[1] else None,
        recipe,
    )
