"""Absorbed attention over a paged latent cache: the definition, and what a precision can give.

`decode` is the oracle. `decode_same_precision` rounds where any kernel of that precision has to
round and nowhere else, so that its distance from the oracle is the error a kernel cannot avoid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from mla_triton.cache import CSRPageTable, LatentCache
from mla_triton.reference.paging import gather_keys, page_size, visible_lengths
from mla_triton.state import AttentionState


class Request(NamedTuple):
    """One request of a batch, gathered."""

    rows: int | slice
    """Its place in the leading dimension of q, out and lse."""
    query: torch.Tensor
    """`[s_q, heads, latent + rope]`, at least one query."""
    keys: torch.Tensor
    """`[kv_len, latent + rope]`, at least one key."""
    visible: torch.Tensor
    """`[s_q, kv_len]` bool: whether a query sees a key."""


def requests(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor | None,
    cache: torch.Tensor | LatentCache,
    page_table: torch.Tensor | CSRPageTable,
    kv_lens: torch.Tensor,
    *,
    causal: bool = True,
    cu_seqlens_q: torch.Tensor | None = None,
    value_dim: int | None = None,
    max_kv_len: int | None = None,
) -> Iterator[Request]:
    """The requests of a batch that have both queries and keys; arguments as in `decode`."""
    query = q_nope if q_rope is None else torch.cat([q_nope, q_rope], dim=-1)
    lengths = visible_lengths(kv_lens, page_table, page_size(cache), max_kv_len)
    places: list[int | slice] = list(range(len(lengths)))
    if cu_seqlens_q is not None:
        bounds = cu_seqlens_q.tolist()
        places = [slice(a, b) for a, b in pairwise(bounds)]
    for request, (rows, length) in enumerate(zip(places, lengths, strict=True)):
        s_q = query[rows].shape[0]
        if s_q and length:
            keys = gather_keys(cache, page_table, request, length, value_dim or q_nope.shape[-1])
            yield Request(rows, query[rows], keys, visible_keys(s_q, length, causal, keys.device))


def decode(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor | None,
    cache: torch.Tensor | LatentCache,
    page_table: torch.Tensor | CSRPageTable,
    kv_lens: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    cu_seqlens_q: torch.Tensor | None = None,
    value_dim: int | None = None,
    max_kv_len: int | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> AttentionState:
    """Attention of absorbed queries over a paged latent cache.

    Arguments are those of `mla_triton.decode`. A length beyond what the page table can hold or
    beyond `max_kv_len` counts as that limit, a negative one as 0. Returns out `[..., heads,
    value_dim]` and lse `[..., heads]`, both in `compute_dtype`.
    """
    value_dim = q_nope.shape[-1] if value_dim is None else value_dim
    state = empty_state(q_nope, value_dim, compute_dtype, compute_dtype)
    for rows, query, keys, visible in requests(
        q_nope, q_rope, cache, page_table, kv_lens,
        causal=causal, cu_seqlens_q=cu_seqlens_q, value_dim=value_dim, max_kv_len=max_kv_len,
    ):  # fmt: skip
        keys = keys.to(compute_dtype)
        weights, lse = softmax(query.to(compute_dtype), keys, visible, softmax_scale)
        state.out[rows] = weights @ keys[:, :value_dim]
        state.lse[rows] = lse
    return state


def softmax(
    query: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention weights `[s_q, heads, kv_len]` and lse `[s_q, heads]` of one request.

    The weights of a query that sees nothing are 0.
    """
    hidden = ~visible[:, None, :]
    logits = (query @ keys.T * softmax_scale).masked_fill(hidden, float("-inf"))
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp().masked_fill(hidden, 0.0), lse


def decode_same_precision(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor | None,
    cache: torch.Tensor | LatentCache,
    page_table: torch.Tensor | CSRPageTable,
    kv_lens: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    cu_seqlens_q: torch.Tensor | None = None,
    value_dim: int | None = None,
    max_kv_len: int | None = None,
    allow_tf32: bool = False,
) -> AttentionState:
    """What q's precision can give: the same attention with a kernel's roundings.

    Operands of both products are in q's dtype, sums and softmax in float32; the probabilities,
    largest 1, are rounded to q's dtype before the second product and divided by their sum after it.
    With `allow_tf32`, float32 operands lose the bits that TF32 tensor cores do not read.
    Returns out in q's dtype and lse float32.
    """
    value_dim = q_nope.shape[-1] if value_dim is None else value_dim
    state = empty_state(q_nope, value_dim, q_nope.dtype, torch.float32)

    def operand(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(q_nope.dtype).float()
        return _truncate_to_tf32(tensor) if allow_tf32 else tensor

    with full_float32():
        for rows, query, keys, visible in requests(
            q_nope, q_rope, cache, page_table, kv_lens,
            causal=causal, cu_seqlens_q=cu_seqlens_q, value_dim=value_dim, max_kv_len=max_kv_len,
        ):  # fmt: skip
            out, lse = attend_rounded(
                query, keys, keys[:, :value_dim], visible, softmax_scale, operand
            )
            state.out[rows] = out.to(q_nope.dtype)
            state.lse[rows] = lse
    return state


def attend_rounded(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    softmax_scale: float,
    operand: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention `[s_q, heads, value_dim]` and lse `[s_q, heads]` of one request, both float32.

    `operand` rounds what goes into a product; the result is float32, whatever it has lost.
    """
    seen = visible[:, None, :]
    logits = operand(query) @ operand(keys).T * softmax_scale
    logits = logits.masked_fill(~seen, float("-inf"))
    peak = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights = (logits - peak).exp()
    total = weights.sum(-1, keepdim=True)
    product = operand(weights) @ operand(values)
    empty = ~seen.any(-1, keepdim=True)
    return (product / total).masked_fill(empty, 0.0), (peak + total.log()).squeeze(-1)


def empty_state(
    q_nope: torch.Tensor, value_dim: int, out_dtype: torch.dtype, lse_dtype: torch.dtype
) -> AttentionState:
    rows = q_nope.shape[:-1]
    out = torch.zeros(*rows, value_dim, dtype=out_dtype, device=q_nope.device)
    lse = torch.full(rows, float("-inf"), dtype=lse_dtype, device=q_nope.device)
    return AttentionState(out, lse)


def visible_keys(s_q: int, kv_len: int, causal: bool, device: torch.device) -> torch.Tensor:
    key = torch.arange(kv_len, device=device)
    last = torch.full((s_q, 1), kv_len - 1, device=device)
    if causal:
        last = torch.arange(kv_len - s_q, kv_len, device=device)[:, None]
    return key <= last


def _truncate_to_tf32(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 matrices in float32 on every device, whatever the program has chosen."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        chosen = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(chosen)
        return
    # The older functions raise where a program has used this newer interface.
    mkldnn: Any = torch.backends.mkldnn
    backends = (torch.backends.cuda.matmul, mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
