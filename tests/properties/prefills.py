"""Prefills for the properties: the shapes that kernels are compiled for, and changes of a problem.

A change is what a property is about: it takes a problem and gives one whose result can be told from
that of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from executions import COMPILED, DEVICE, Execution, Shape
from hypothesis import strategies as st

import mla_triton
from mla_triton import AttentionState, select, validate_prefill
from mla_triton import device as devices
from mla_triton.testing import PrefillInputs, prefill_inputs
from mla_triton.testing.problems import int32

LONGEST = 600 if COMPILED else 40
"""Queries of a sequence, and keys; tiles have up to 128 of them, 32 in the interpreter."""
SMALL: Shape = {"qk": 96, "rope": 32, "v_dim": 64}
SHAPES: tuple[Shape, ...] = (
    {"qk": 192, "rope": 64, "v_dim": 128, "heads": 2, "split_q": True, "split_k": True}
    | {"dtype": torch.bfloat16},
    {"qk": 128, "rope": 64, "v_dim": 128, "heads": 4, "kv_heads": 2, "dtype": torch.float16},
    {"qk": 256, "rope": 64, "v_dim": 256, "heads": 1, "split_k": True, "dtype": torch.float16},
    {**SMALL, "heads": 3, "dtype": torch.float32},
    {**SMALL, "heads": 2, "split_k": True, "strided": True, "dtype": torch.bfloat16},
)
if COMPILED:
    SHAPES += ({**SHAPES[0], "heads": 32, "dtype": torch.float16},)


@cache
def taken(execution: Execution) -> tuple[Shape, ...]:
    """The shapes that it takes."""
    if execution.impl != "sm90":
        return SHAPES

    def takes(shape: Shape) -> bool:
        problem = problem_of(prefill_inputs(q_lens=[1], device=DEVICE, **shape))
        return select.why_not_sm90_prefill(problem, devices.current(), execution.impl) is None

    return tuple(shape for shape in SHAPES if takes(shape))


@st.composite
def problems(
    draw: st.DrawFn,
    execution: Execution,
    *,
    causal: Sequence[bool] = (True, False),
    where: Callable[[Shape], bool] = lambda shape: True,
    at_least: int = 0,
    batch: int = 3,
) -> PrefillInputs:
    """A problem of one of the shapes, of up to `batch` sequences with `at_least` so many keys."""
    shape = draw(st.sampled_from([shape for shape in taken(execution) if where(shape)]))
    pair = st.tuples(st.integers(1, LONGEST), st.integers(at_least, LONGEST))
    lens = draw(st.lists(pair, min_size=min(2, batch), max_size=batch))
    return prefill_inputs(
        q_lens=[q for q, _ in lens],
        k_lens=[k for _, k in lens],
        causal=draw(st.sampled_from(causal)),
        seed=draw(st.integers(0, 2**16)),
        device=DEVICE,
        **shape,
    )


def run(inputs: PrefillInputs, execution: Execution, **options: Any) -> AttentionState:
    """Into buffers of NaN."""
    arguments, own = inputs.call_arguments()
    buffers = inputs.output_buffers()
    return mla_triton.prefill(*arguments, **own, **buffers, impl=execution.impl, **options)


def problem_of(inputs: PrefillInputs) -> Any:
    """What a call with these inputs is to the package."""
    buffers = inputs.output_buffers()
    return validate_prefill.prefill(
        inputs.q, inputs.q_rope, inputs.k, inputs.k_rope, inputs.v, inputs.cu_seqlens_q,
        inputs.cu_seqlens_k, buffers["out"], buffers["lse"],
        softmax_scale=inputs.softmax_scale, causal=inputs.causal, max_seqlen_q=None,
    )  # fmt: skip


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
            cu_seqlens_q=offsets_of(queries),
        )
    if keys is not None:
        end = int(inputs.cu_seqlens_k[-1])
        rows = [row for own in keys for row in own] + [*range(end, len(inputs.k))]
        made = replace(
            made,
            k=like(inputs.k, inputs.k[rows]),
            v=like(inputs.v, inputs.v[rows]),
            k_rope=None if inputs.k_rope is None else like(inputs.k_rope, inputs.k_rope[rows]),
            cu_seqlens_k=offsets_of(keys),
        )
    return made


def offsets_of(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return int32([*accumulate(map(len, rows), initial=0)]).to(DEVICE)


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
    keys = {"k" if inputs.k_rope is None else "k_rope": key}
    queries = {"q" if inputs.q_rope is None else "q_rope": query}
    return replace(inputs, **keys, **queries)


def scaled(inputs: PrefillInputs, exponent: int) -> PrefillInputs:
    """Values 2**exponent as large."""
    return replace(inputs, v=like(inputs.v, inputs.v * 2**exponent))


def poisoned(inputs: PrefillInputs, sequence: int, key: int, column: int) -> PrefillInputs:
    """NaN in one number of each head's value of a key."""
    v = like(inputs.v, inputs.v.clone())
    v[spans(inputs.cu_seqlens_k)[sequence][key], :, column] = float("nan")
    return replace(inputs, v=v)
