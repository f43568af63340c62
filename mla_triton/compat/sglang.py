"""SGLang's interface: decoding of its Triton back end, for MLA, and the merges of its kernels."""

from __future__ import annotations

from typing import Any

import torch

from mla_triton import CSRPageTable
from mla_triton.compat import flashinfer, vllm
from mla_triton.compat.conventions import (
    check_cache_dtype,
    check_rank,
    check_tensors,
    check_value_in_key,
    decode_by_kv_head,
    int32,
    only,
)

__all__ = ["decode_attention_fwd", "merge_state", "merge_state_v2"]


def decode_attention_fwd(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    o: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    attn_logits: torch.Tensor | None,
    attn_lse: torch.Tensor | None,
    num_kv_splits: torch.Tensor | None,
    max_kv_splits: int | None,
    sm_scale: float,
    k_scale: float | None = None,
    v_scale: float | None = None,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    xai_temperature_len: int = -1,
) -> None:
    """Attention of one query token a request over a cache of token slots, into `o`.

    Args:
        q: `[batch, heads, latent + rope]`, float16, bfloat16 or float32.
        k_buffer: `[slots, kv_heads, latent + rope]`, q's dtype.
        v_buffer: its leading `latent` columns, a view of it.
        o: `[batch, heads, latent]`, q's dtype. A row without keys is 0.
        kv_indptr: `[batch + 1]` or longer, where each request's slots begin in `kv_indices`.
        kv_indices: slot ids; int32 is read as it is, int64 converted.
        attn_logits, attn_lse, num_kv_splits, max_kv_splits: not needed, and not written.
        k_scale, v_scale: 1 or None.

    Raises:
        NotImplementedError: an argument asks for scales, a soft cap, sinks or a temperature, the
            cache is in FP8, or `v_buffer` is no view of `k_buffer`.
        TypeError, ValueError: an argument breaks a rule; the message names argument, rule and
            value.
    """
    options: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "k_scale": (k_scale, (None, 1.0)),
        "v_scale": (v_scale, (None, 1.0)),
        "logit_cap": (logit_cap, (0.0,)),
        "sinks": (sinks, (None,)),
        "xai_temperature_len": (xai_temperature_len, (-1,)),
    }
    for name, (value, taken) in options.items():
        only(name, value, *taken)
    check_tensors(
        q=q, k_buffer=k_buffer, v_buffer=v_buffer, o=o, kv_indptr=kv_indptr, kv_indices=kv_indices
    )
    check_rank("q", q, "batch, heads, head_dim")
    check_cache_dtype("k_buffer", k_buffer, q)
    check_rank("o", o, "batch, heads, latent")
    check_rank("k_buffer", k_buffer, "slots, kv_heads, head_dim")
    check_value_in_key(k_buffer, v_buffer)
    indptr = int32(kv_indptr[: q.shape[0] + 1])
    decode_by_kv_head(
        q.unsqueeze(1),
        k_buffer.unsqueeze(1),
        CSRPageTable(indptr, int32(kv_indices)),
        indptr.diff(),
        softmax_scale=sm_scale,
        out=o.unsqueeze(1),
        lse=q.new_empty(q.shape[0], 1, q.shape[1], dtype=torch.float32),
    )


def merge_state(
    v_a: torch.Tensor,
    s_a: torch.Tensor,
    v_b: torch.Tensor,
    s_b: torch.Tensor,
    v_merged: torch.Tensor | None = None,
    s_merged: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two states of the same queries over disjoint keys, as one, by FlashInfer's conventions.

    Args:
        v_a, v_b: `[tokens, heads, head_dim]` float16, bfloat16 or float32.
        s_a, s_b: `[tokens, heads]`, base-2 logarithms. A state with -inf is empty.
        v_merged, s_merged: buffers for the result.

    Returns:
        v in v_a's dtype, and s float32; the buffers where they are given.

    Raises TypeError and ValueError as `mla_triton.merge` does.
    """
    v, s = flashinfer.merge_state(v_a, s_a, v_b, s_b)
    return (
        v if v_merged is None else v_merged.copy_(v),
        s if s_merged is None else s_merged.copy_(s),
    )


def merge_state_v2(
    v_a: torch.Tensor,
    s_a: torch.Tensor,
    v_b: torch.Tensor,
    s_b: torch.Tensor,
    v_merged: torch.Tensor | None = None,
    s_merged: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with natural logarithms, in which +inf counts as -inf: both mark an empty row."""
    check_tensors(v_a=v_a, s_a=s_a, s_b=s_b)
    check_rank("s_a", s_a, "tokens, heads")
    check_rank("s_b", s_b, "tokens, heads")
    if v_merged is None:
        v_merged = torch.empty_like(v_a)
    if s_merged is None:
        s_merged = torch.empty_like(s_a, dtype=torch.float32)
    check_rank("s_merged", s_merged, "tokens, heads")
    vllm.merge_attn_states(v_merged, v_a, s_a.float().T, v_b, s_b.float().T, s_merged.T)
    return v_merged, s_merged
