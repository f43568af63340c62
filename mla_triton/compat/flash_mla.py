"""FlashMLA's interface: dense decoding over a paged latent cache, and prefill without a backward.

Attention over chosen tokens and caches in FP8 raise NotImplementedError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import mla_triton
from mla_triton.compat.conventions import (
    check_cache_dtype,
    check_rank,
    check_tensors,
    decode_by_kv_head,
    only,
)
from mla_triton.validate import fail, number

__all__ = [
    "FlashMLASchedMeta",
    "flash_attn_varlen_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]

DENSE_ALONE = ": attention over chosen tokens is not implemented"


class Shapes(NamedTuple):
    """What all calls with one `FlashMLASchedMeta` have in common."""

    batch: int
    s_q: int
    heads: int
    kv_heads: int
    page_size: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    causal: bool


@dataclass
class FlashMLASchedMeta:
    """The schedule of a step, made by the first call that it is given to and used by the others."""

    have_initialized: bool = False
    shapes: Shapes | None = None
    plan: mla_triton.Plan | None = None


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """A schedule that is still empty, and None. What older versions took is taken, and ignored."""
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: object = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention of absorbed queries over a paged latent cache.

    Args:
        q: `[batch, s_q, heads, head_dim]`, float16, bfloat16 or float32.
        k_cache: `[pages, page_size, kv_heads, head_dim]`, q's dtype; pages of any size.
        block_table: int32 `[batch, max_pages]`; entries past a request's pages may be anything.
        cache_seqlens: int32 `[batch]`.
        head_dim_v: leading columns of a key that are its value.
        tile_scheduler_metadata: of `get_mla_metadata`; calls that share one have the same shapes
            and the same lengths.
        softmax_scale: `head_dim ** -0.5` by default, which is that of no model whose queries are
            absorbed.
        causal: bottom-right aligned.

    Returns:
        out `[batch, s_q, heads, head_dim_v]` in q's dtype, and lse `[batch, heads, s_q]` float32,
        the natural logarithm. A row that sees no key has out 0 and lse +inf.

    Raises:
        NotImplementedError: an argument asks for sparse attention, a sink or an FP8 cache.
        TypeError, ValueError: an argument breaks a rule; the message names argument, rule and
            value.
    """
    sparse = {
        "indices": indices,
        "attn_sink": attn_sink,
        "extra_k_cache": extra_k_cache,
        "extra_indices_in_kvcache": extra_indices_in_kvcache,
        "topk_length": topk_length,
        "extra_topk_length": extra_topk_length,
    }
    for name, value in sparse.items():
        only(name, value, None, why=DENSE_ALONE)
    only("is_fp8_kvcache", is_fp8_kvcache, False)
    if num_splits is not None:
        fail(ValueError, "num_splits", "be None", type(num_splits).__name__)
    check_tensors(q=q, k_cache=k_cache, block_table=block_table, cache_seqlens=cache_seqlens)
    assert block_table is not None
    assert cache_seqlens is not None
    check_rank("q", q, "batch, s_q, heads, head_dim")
    check_rank("k_cache", k_cache, "pages, page_size, kv_heads, head_dim")
    check_cache_dtype("k_cache", k_cache, q)
    batch, s_q, heads, head_dim = q.shape
    _, page_size, kv_heads, _ = k_cache.shape
    if not 1 <= head_dim_v <= head_dim:
        fail(ValueError, "head_dim_v", f"be 1 to {head_dim}, q's columns", head_dim_v)
    out = q.new_empty(batch, s_q, heads, head_dim_v)
    lse = q.new_empty(batch, heads, s_q, dtype=torch.float32)
    shapes = Shapes(
        batch, s_q, heads, kv_heads, page_size, head_dim, head_dim_v, q.dtype, bool(causal)
    )
    decode_by_kv_head(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        softmax_scale=head_dim**-0.5 if softmax_scale is None else softmax_scale,
        causal=shapes.causal,
        plan=_plan_of(tile_scheduler_metadata, shapes, cache_seqlens),
        out=out,
        lse=lse.transpose(1, 2),
    )
    return out, lse.masked_fill_(lse == float("-inf"), float("inf"))


def _plan_of(meta: Any, shapes: Shapes, kv_lens: torch.Tensor) -> mla_triton.Plan:
    if not isinstance(meta, FlashMLASchedMeta):
        got = type(meta).__name__
        fail(TypeError, "tile_scheduler_metadata", "be one of get_mla_metadata", got)
    if meta.plan is None:
        plan = mla_triton.plan(
            kv_lens,
            heads=max(1, shapes.heads // max(1, shapes.kv_heads)),
            latent=shapes.head_dim_v,
            rope=shapes.head_dim - shapes.head_dim_v,
            dtype=shapes.dtype,
            s_q=shapes.s_q,
        )
        meta.have_initialized, meta.shapes, meta.plan = True, shapes, plan
    assert meta.shapes is not None
    for name, first, now in zip(Shapes._fields, meta.shapes, shapes, strict=True):
        if first != now:
            rule = f"be used with the {name} of its first call, {first}"
            fail(ValueError, "tile_scheduler_metadata", rule, now)
    return meta.plan


def flash_mla_sparse_fwd(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of a prompt over chosen tokens: not implemented, raises NotImplementedError."""
    raise NotImplementedError(f"flash_mla_sparse_fwd{DENSE_ALONE}")


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_qo: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of ragged sequences over expanded keys and values. There is no backward.

    Args:
        q, k, v: `[tokens, heads, head_dim]`, `[kv_tokens, kv_heads, head_dim]` and
            `[kv_tokens, kv_heads, head_dim_v]`.
        cu_seqlens_qo, cu_seqlens_kv: int32 `[batch + 1]`.
        max_seqlen_qo: an upper bound of the sequences' queries.
        softmax_scale: `head_dim ** -0.5` by default.
        causal: bottom-right aligned.
        max_seqlen_kv, deterministic, is_varlen: not needed; results are always deterministic.

    Returns:
        out `[tokens, heads, head_dim_v]`, and lse `[tokens, heads]` float32, the natural logarithm,
        which lies head by head in memory. A row that sees no key has out 0 and lse -inf.

    Raises:
        NotImplementedError: `dropout_p` is not 0.
        TypeError, ValueError: as in `mla_triton.prefill`; queries, keys or values that require grad
            while grad is enabled, among others.
    """
    only("dropout_p", dropout_p, 0.0)
    check_tensors(q=q, k=k, v=v)
    check_rank("q", q, "tokens, heads, head_dim")
    tokens, heads, head_dim = q.shape
    scale = head_dim**-0.5 if softmax_scale is None else number("softmax_scale", softmax_scale)
    lse = q.new_empty(heads, tokens, dtype=torch.float32)
    state = mla_triton.prefill(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_qo,
        cu_seqlens_k=cu_seqlens_kv,
        softmax_scale=scale,
        causal=bool(causal),
        max_seqlen_q=max_seqlen_qo,
        lse=lse.T,
    )
    return state.out, state.lse
