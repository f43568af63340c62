"""Changes of a prefill problem after which the result can be told from that of the first.

What `mla_triton.testing.decode_changes` is for a decode. Every change leaves its argument as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch

from mla_triton.testing.prefill_problems import PrefillInputs
from mla_triton.testing.problems import int32

# -- the parts of a problem


def spans(offsets: torch.Tensor) -> list[range]:
    """The rows of each sequence."""
    return [range(first, end) for first, end in pairwise(offsets.tolist())]


def with_rows(
    inputs: PrefillInputs,
    queries: Sequence[Sequence[int]] | None = None,
    keys: Sequence[Sequence[int]] | None = None,
) -> PrefillInputs:
    """Sequences of these rows of the problem's queries and keys; behind the keys there is NaN."""
    made = inputs
    if queries is not None:
        rows = [row for own in queries for row in own]
        made = replace(
            made,
            q=like(inputs.q, inputs.q[rows]),
            q_rope=None if inputs.q_rope is None else like(inputs.q_rope, inputs.q_rope[rows]),
            cu_seqlens_q=offsets_of(queries, inputs.q.device),
        )
    if keys is not None:
        end = int(inputs.cu_seqlens_k[-1])
        rows = [row for own in keys for row in own] + [*range(end, len(inputs.k))]
        made = replace(
            made,
            k=like(inputs.k, inputs.k[rows]),
            v=like(inputs.v, inputs.v[rows]),
            k_rope=None if inputs.k_rope is None else like(inputs.k_rope, inputs.k_rope[rows]),
            cu_seqlens_k=offsets_of(keys, inputs.k.device),
        )
    return made


def offsets_of(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """int32 `[sequences + 1]`: where each sequence of these rows begins."""
    return int32([*accumulate(map(len, rows), initial=0)]).to(device)


def like(before: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values with as many columns between their rows as there were."""
    width = before.shape[-1]
    wider = values.new_full((*values.shape[:-1], min(before.stride()[:-1])), float("nan"))
    if before.stride(-2) < width or wider.shape[-1] < width:
        return values
    wider[..., :width] = values
    return wider[..., :width]


# -- changes


def reordered(inputs: PrefillInputs, order: Sequence[int]) -> PrefillInputs:
    """Its sequences in another order."""
    queries, keys = spans(inputs.cu_seqlens_q), spans(inputs.cu_seqlens_k)
    return with_rows(inputs, [queries[b] for b in order], [keys[b] for b in order])


def without_keys(inputs: PrefillInputs, sequence: int) -> PrefillInputs:
    """One sequence loses its keys."""
    keys: list[Sequence[int]] = [*spans(inputs.cu_seqlens_k)]
    keys[sequence] = []
    return with_rows(inputs, keys=keys)


def joined_by_empty(inputs: PrefillInputs, places: Sequence[int]) -> PrefillInputs:
    """Sequences without queries and keys in between."""
    queries: list[Sequence[int]] = [*spans(inputs.cu_seqlens_q)]
    keys: list[Sequence[int]] = [*spans(inputs.cu_seqlens_k)]
    for place in places:
        queries.insert(place, [])
        keys.insert(place, [])
    return with_rows(inputs, queries, keys)


def of_heads(inputs: PrefillInputs, heads: Sequence[int]) -> PrefillInputs:
    """Some of the heads, each with its keys."""
    own = [head * inputs.k.shape[1] // inputs.q.shape[1] for head in heads]
    return replace(
        inputs,
        q=inputs.q[:, list(heads)],
        q_rope=None if inputs.q_rope is None else inputs.q_rope[:, list(heads)],
        k=inputs.k[:, own],
        v=inputs.v[:, own],
    )


def partitioned(inputs: PrefillInputs, parts: int, seed: int) -> list[PrefillInputs]:
    """Each key is of a part by chance."""
    generator = torch.Generator().manual_seed(seed)
    keys = spans(inputs.cu_seqlens_k)
    owners = [torch.randint(parts, (len(own),), generator=generator).tolist() for own in keys]

    def of(part: int) -> list[list[int]]:
        return [
            [key for key, owner in zip(own, given, strict=True) if owner == part]
            for own, given in zip(keys, owners, strict=True)
        ]

    return [with_rows(inputs, keys=of(part)) for part in range(parts)]


def query_chunks(inputs: PrefillInputs, size: int) -> Iterator[tuple[list[int], PrefillInputs]]:
    """At most `size` queries of each sequence at a time, over the keys that they see, and which
    rows they are. Chunks are counted from the last query, which sees every key."""
    queries, keys = spans(inputs.cu_seqlens_q), spans(inputs.cu_seqlens_k)
    for behind in range(0, max(map(len, queries)), size):
        ends = [max(0, len(own) - behind) for own in queries]
        chosen = [own[max(0, end - size) : end] for own, end in zip(queries, ends, strict=True)]
        seen = [own[: max(0, len(own) - behind)] if inputs.causal else own for own in keys]
        yield [row for own in chosen for row in own], with_rows(inputs, chosen, seen)


def truncated(inputs: PrefillInputs) -> PrefillInputs:
    """Every query of a causal problem as a sequence of its own, over the keys that it sees."""
    queries, keys = spans(inputs.cu_seqlens_q), spans(inputs.cu_seqlens_k)
    single = [[row] for own in queries for row in own]
    seen = [
        own[: max(0, len(own) - len(asking) + i + 1)]
        for own, asking in zip(keys, queries, strict=True)
        for i in range(len(asking))
    ]
    return replace(with_rows(inputs, single, seen), causal=False)


def doubled(inputs: PrefillInputs) -> PrefillInputs:
    """Every key twice."""
    keys = [[key for key in own for _ in range(2)] for own in spans(inputs.cu_seqlens_k)]
    return with_rows(inputs, keys=keys)


def shifted(inputs: PrefillInputs, by: float) -> PrefillInputs:
    """Keys that are 1 in their last rotary column, queries that are `by` in it."""
    key, query = inputs.k if inputs.k_rope is None else inputs.k_rope, inputs.q
    key = key.clone()
    key[: int(inputs.cu_seqlens_k[-1]), ..., -1] = 1.0
    query = (inputs.q if inputs.q_rope is None else inputs.q_rope).clone()
    query[..., -1] = by
    keys: dict[str, Any] = {"k" if inputs.k_rope is None else "k_rope": key}
    queries: dict[str, Any] = {"q" if inputs.q_rope is None else "q_rope": query}
    return replace(inputs, **keys, **queries)


def scaled(inputs: PrefillInputs, exponent: int) -> PrefillInputs:
    """Values 2**exponent as large."""
    return replace(inputs, v=like(inputs.v, inputs.v * 2**exponent))


def poisoned(inputs: PrefillInputs, sequence: int, key: int, column: int) -> PrefillInputs:
    """NaN in one number of each head's value of a key."""
    v = like(inputs.v, inputs.v.clone())
    v[spans(inputs.cu_seqlens_k)[sequence][key], :, column] = float("nan")
    return replace(inputs, v=v)
