"""Changes of a decode problem after which the result can be told from that of the first.

A property of attention is a change and what it does to the result, and needs no oracle: the order
of requests, where pages lie and how long they are, keys in parts that are merged, keys that are
there twice. `docs/testing.md` says of each what has to hold. A change leaves its argument as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from mla_triton.cache import CSRPageTable, LatentCache
from mla_triton.cache.formats import E4M3
from mla_triton.testing.problems import UNUSED_PAGE, DecodeInputs, int32

# -- the parts of a problem


def pages_of(inputs: DecodeInputs) -> list[torch.Tensor]:
    """The pages that each request uses, in order."""
    size, table = page_size_of(inputs), inputs.page_table
    used = [-(-length // size) for length in inputs.kv_lens.tolist()]
    if isinstance(table, CSRPageTable):
        firsts = table.indptr[:-1].tolist()
        return [table.indices[n : n + count] for n, count in zip(firsts, used, strict=True)]
    return [row[:count] for row, count in zip(table, used, strict=True)]


def with_pages(
    inputs: DecodeInputs, pages: Sequence[torch.Tensor], kv_lens: Sequence[int]
) -> DecodeInputs:
    """Requests of other pages and lengths, in a table at least as wide as before."""
    device, table = inputs.kv_lens.device, inputs.page_table
    counts = torch.tensor([0, *map(len, pages)])
    if isinstance(table, CSRPageTable):
        spare = max(1, len(table.indices) - int(counts.sum()))
        unused = int32([UNUSED_PAGE] * spare).to(device)
        made: Any = CSRPageTable(counts.cumsum(0).int().to(device), torch.cat([*pages, unused]))
    else:
        width = max(table.shape[1], int(counts.max()))
        made = table.new_full((len(pages), width), UNUSED_PAGE)
        for row, own in zip(made, pages, strict=True):
            row[: len(own)] = own
    return replace(inputs, page_table=made, kv_lens=int32(kv_lens).to(device))


def with_queries(inputs: DecodeInputs, choose: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same with `choose(q)` in place of q_nope and of q_rope."""
    q_rope = None if inputs.q_rope is None else choose(inputs.q_rope)
    return replace(inputs, q_nope=choose(inputs.q_nope), q_rope=q_rope)


def page_size_of(inputs: DecodeInputs) -> int:
    first = inputs.cache if isinstance(inputs.cache, torch.Tensor) else inputs.cache.ckv
    return first.shape[1]


def paged(cache: torch.Tensor | LatentCache) -> list[torch.Tensor]:
    """What of a cache is laid out in pages, `[pages, page_size, columns]`."""
    tensors = [cache] if isinstance(cache, torch.Tensor) else list(cache)
    return [tensor for tensor in tensors if tensor is not None and tensor.ndim == 3]


def mapped(
    cache: torch.Tensor | LatentCache, change: Callable[[torch.Tensor], torch.Tensor]
) -> Any:
    """The cache with `change` of everything in it that is laid out in pages."""
    if isinstance(cache, torch.Tensor):
        return change(cache)
    parts: Any = (part if part is None or part.ndim != 3 else change(part) for part in cache)
    return LatentCache(*parts)


def copied(cache: torch.Tensor | LatentCache) -> Any:
    """A copy in which views of one memory are views of one memory."""
    memories: dict[int, torch.UntypedStorage] = {}

    def view(tensor: torch.Tensor) -> torch.Tensor:
        old = tensor.untyped_storage()
        new = memories.setdefault(old.data_ptr(), old.clone())
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return empty.set_(new, tensor.storage_offset(), tensor.shape, tensor.stride())

    if isinstance(cache, torch.Tensor):
        return view(cache)
    parts: Any = (None if tensor is None else view(tensor) for tensor in cache)
    return LatentCache(*parts)


def latents_of(inputs: DecodeInputs, cache: torch.Tensor | LatentCache) -> torch.Tensor:
    """`[pages, page_size, latent]`, in the numbers that the cache is stored in."""
    ckv = cache if isinstance(cache, torch.Tensor) else cache.ckv
    return ckv[..., : inputs.q_nope.shape[-1]]


def rotary_of(inputs: DecodeInputs, cache: torch.Tensor | LatentCache) -> torch.Tensor:
    """`[pages, page_size, rope]`, likewise."""
    if isinstance(cache, LatentCache) and cache.kpe is not None:
        return cache.kpe
    ckv = cache if isinstance(cache, torch.Tensor) else cache.ckv
    return ckv[..., inputs.q_nope.shape[-1] :]


# -- changes


def reordered(inputs: DecodeInputs, order: Sequence[int]) -> DecodeInputs:
    """Its requests in another order."""
    pages, lengths = pages_of(inputs), inputs.kv_lens.tolist()
    moved = with_pages(inputs, [pages[b] for b in order], [lengths[b] for b in order])
    return with_queries(moved, lambda q: q[list(order)])


def relocated(inputs: DecodeInputs, seed: int) -> DecodeInputs:
    """Its pages in other places of the cache, those that nobody owns as well."""
    count = paged(inputs.cache)[0].shape[0]
    generator = torch.Generator().manual_seed(seed)
    place = torch.randperm(count, generator=generator).to(inputs.kv_lens.device)
    order = place.argsort()
    cache = copied(inputs.cache)
    for new, old in zip(paged(cache), paged(inputs.cache), strict=True):
        new.copy_(as_bytes(old)[order].view(old.dtype))
    pages = [place[own.long()].int() for own in pages_of(inputs)]
    return with_pages(replace(inputs, cache=cache), pages, inputs.kv_lens.tolist())


def repaged(inputs: DecodeInputs, size: int) -> DecodeInputs:
    """The same memory as pages of `size`, a divisor of its page size."""
    each = page_size_of(inputs) // size
    parts = torch.arange(each, device=inputs.kv_lens.device, dtype=torch.int32)
    pages = [(own[:, None] * each + parts).flatten() for own in pages_of(inputs)]
    lengths = inputs.kv_lens.tolist()
    pages = [own[: -(-length // size)] for own, length in zip(pages, lengths, strict=True)]

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(-1, size, tensor.shape[-1])

    return with_pages(replace(inputs, cache=mapped(inputs.cache, cut)), pages, lengths)


def of_heads(inputs: DecodeInputs, heads: Sequence[int]) -> DecodeInputs:
    return with_queries(inputs, lambda q: q[..., list(heads), :])


def truncated(inputs: DecodeInputs, causal: bool) -> DecodeInputs:
    """Every query token of a causal problem as a request of its own, over the keys that it sees."""
    s_q, size = inputs.q_nope.shape[1], page_size_of(inputs)
    seen = [max(0, n - s_q + 1 + i) for n in inputs.kv_lens.tolist() for i in range(s_q)]
    pages = [own for own in pages_of(inputs) for _ in range(s_q)]
    pages = [own[: -(-length // size)] for own, length in zip(pages, seen, strict=True)]
    single = with_queries(replace(inputs, causal=causal), lambda q: q.flatten(0, 1)[:, None])
    return with_pages(single, pages, seen)


def partitioned(inputs: DecodeInputs, parts: int, seed: int) -> list[DecodeInputs]:
    """Each page is of a part by chance; whole pages. A part may have none of some requests."""
    generator, size = torch.Generator().manual_seed(seed), page_size_of(inputs)
    pages = pages_of(inputs)
    owners = [
        torch.randint(parts, (len(own),), generator=generator).to(own.device) for own in pages
    ]
    made = []
    for part in range(parts):
        chosen = [own[owner == part] for own, owner in zip(pages, owners, strict=True)]
        made.append(with_pages(inputs, chosen, [size * len(own) for own in chosen]))
    return made


def doubled(inputs: DecodeInputs) -> DecodeInputs:
    """Every key twice; whole pages."""
    pages = [own.repeat_interleave(2) for own in pages_of(inputs)]
    return with_pages(inputs, pages, (2 * inputs.kv_lens).tolist())


def with_a_constant_column(inputs: DecodeInputs) -> tuple[DecodeInputs, float]:
    """Keys that are alike in their last rotary column, and what they are there."""
    cache = copied(inputs.cache)
    column = rotary_of(inputs, cache)[..., -1:]
    # What nobody owns stays NaN.
    ones = torch.where(column.float().isnan(), column.float(), 1.0).to(column.dtype)
    column.copy_(ones)
    stored_as_e4m3 = column.dtype == E4M3
    scale = float(cache.scales[1]) if stored_as_e4m3 else 1.0
    return replace(inputs, cache=cache), scale


def shifted(inputs: DecodeInputs, by: float) -> DecodeInputs:
    """The last rotary column of all queries becomes `by`."""
    assert inputs.q_rope is not None
    q_rope = inputs.q_rope.clone()
    q_rope[..., -1] = by
    return replace(inputs, q_rope=q_rope)


def coarse(inputs: DecodeInputs) -> DecodeInputs:
    """Queries of few bits, of which a sixteenth is exact in every dtype."""
    return with_queries(inputs, lambda q: (q * 64).round() / 64)


def scaled(inputs: DecodeInputs, exponent: int) -> DecodeInputs:
    """Values 2**exponent as large, and logits as they were: latents (where a value goes on behind
    them, all of a key) against queries the less."""
    factor, cache = 2.0**exponent, copied(inputs.cache)
    whole_key = inputs.value_dim is not None
    if isinstance(cache, LatentCache) and cache.scales is not None:
        scales = cache.scales
        (scales[:1] if scales.ndim == 1 else scales).mul_(factor)
    else:
        latents_of(inputs, cache).mul_(factor)
    q_rope = inputs.q_rope
    if whole_key:
        assert q_rope is not None
        rotary_of(inputs, cache).mul_(factor)
        q_rope = q_rope / factor
    return replace(inputs, cache=cache, q_nope=inputs.q_nope / factor, q_rope=q_rope)


def emptied(inputs: DecodeInputs, request: int) -> DecodeInputs:
    """One request loses its keys."""
    lengths = inputs.kv_lens.clone()
    lengths[request] = 0
    return replace(inputs, kv_lens=lengths)


def joined_by_empty(inputs: DecodeInputs, places: Sequence[int]) -> DecodeInputs:
    """Requests without keys in between, at these places one after another."""
    pages, lengths, rows = (
        pages_of(inputs),
        inputs.kv_lens.tolist(),
        list(range(len(pages_of(inputs)))),
    )
    for place in places:
        pages.insert(place, inputs.kv_lens[:0])
        lengths.insert(place, 0)
        rows.insert(place, 0)
    return with_queries(with_pages(inputs, pages, lengths), lambda q: q[rows])


def poisoned(inputs: DecodeInputs, request: int, key: int, column: int) -> DecodeInputs:
    """NaN in one number of a latent that a request sees."""
    size, cache = page_size_of(inputs), copied(inputs.cache)
    latents = latents_of(inputs, cache)
    page = int(pages_of(inputs)[request][key // size])
    latents[page, key % size, column] = torch.tensor(float("nan")).to(latents.dtype)
    return replace(inputs, cache=cache)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """e4m3 as integers, which PyTorch can index everywhere."""
    return tensor.view(torch.uint8) if tensor.dtype == E4M3 else tensor
