"""vLLM's interface: the operations of its MLA back ends that it has in Triton and CUDA."""

from __future__ import annotations

import torch

import mla_triton
from mla_triton import AttentionState
from mla_triton.compat.conventions import (
    check_cache_dtype,
    check_rank,
    check_tensors,
    check_value_in_key,
    decode_by_kv_head,
    int32,
    only,
)
from mla_triton.compat.vllm_cache import (
    concat_and_cache_mla,
    cp_gather_and_upconvert_fp8_kv_cache,
    cp_gather_cache,
    gather_and_maybe_dequant_cache,
    swap_blocks,
)
from mla_triton.validate import fail

__all__ = [
    "concat_and_cache_mla",
    "cp_gather_and_upconvert_fp8_kv_cache",
    "cp_gather_cache",
    "decode_attention_fwd",
    "gather_and_maybe_dequant_cache",
    "merge_attn_states",
    "swap_blocks",
]


def decode_attention_fwd(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    req_to_token: torch.Tensor,
    b_seq_len: torch.Tensor,
    attn_logits: torch.Tensor | None,
    num_kv_splits: int,
    sm_scale: float,
    page_size: int = 1,
    logit_cap: float = 0.0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    is_mla: bool = False,
) -> None:
    """Attention of one query token a request over a paged latent cache, into `o` and `lse`.

    Args:
        q: `[batch, heads, latent + rope]`, float16, bfloat16 or float32.
        k_buffer: `[pages, page_size, kv_heads, latent + rope]`, or `[slots, kv_heads, latent +
            rope]` where `page_size` is 1; q's dtype.
        v_buffer: its leading `latent` columns, a view of it. With `is_mla` only its width counts.
        o: `[batch, heads, latent]`, q's dtype.
        lse: `[batch, heads]`, the natural logarithm; rounded where it is not float32. A row without
            keys has o 0 and lse -inf.
        req_to_token: `[batch, max_pages]` page ids; int32 is read as it is, int64 converted.
        b_seq_len: `[batch]` keys of each request, likewise.
        attn_logits: not needed.
        num_kv_splits: 1, which vLLM passes in its batch-invariant mode, asks for results that do
            not depend on the other requests, bit for bit (`batch_invariant` of
            `mla_triton.decode`). Any other number is not looked at.
        k_scale, v_scale: scales of FP8 caches; of others they are not applied.

    Raises:
        NotImplementedError: `logit_cap` is not 0, the cache is in FP8, or `v_buffer` is no view of
            `k_buffer`.
        TypeError, ValueError: an argument breaks a rule; the message names argument, rule and
            value.
    """
    only("logit_cap", logit_cap, 0.0)
    check_tensors(
        q=q, k_buffer=k_buffer, v_buffer=v_buffer, o=o, lse=lse,
        req_to_token=req_to_token, b_seq_len=b_seq_len,
    )  # fmt: skip
    check_rank("q", q, "batch, heads, head_dim")
    check_cache_dtype("k_buffer", k_buffer, q)
    check_rank("o", o, "batch, heads, latent")
    if not is_mla:
        check_value_in_key(k_buffer, v_buffer)
    if k_buffer.dim() == 3:
        k_buffer = k_buffer.unsqueeze(1)
    check_rank("k_buffer", k_buffer, "pages, page_size, kv_heads, head_dim")
    if k_buffer.shape[1] != page_size:
        rule = f"be that of k_buffer, {k_buffer.shape[1]}"
        fail(ValueError, "page_size", rule, page_size)
    exact = lse if lse.dtype == torch.float32 else lse.new_empty(lse.shape, dtype=torch.float32)
    decode_by_kv_head(
        q.unsqueeze(1),
        k_buffer,
        int32(req_to_token).flatten(1),
        int32(b_seq_len),
        softmax_scale=sm_scale,
        out=o.unsqueeze(1),
        lse=exact.unsqueeze(1),
        batch_invariant=num_kv_splits == 1,
    )
    if exact is not lse:
        lse.copy_(exact)


def merge_attn_states(
    output: torch.Tensor,
    prefix_output: torch.Tensor,
    prefix_lse: torch.Tensor,
    suffix_output: torch.Tensor,
    suffix_lse: torch.Tensor,
    output_lse: torch.Tensor | None = None,
    prefill_tokens_with_context: int | None = None,
    output_scale: torch.Tensor | None = None,
) -> None:
    """Attention over all keys, from that over a prefix and that over what follows, into `output`.

    Args:
        output, prefix_output, suffix_output: `[tokens, heads, value_dim]` float16, bfloat16 or
            float32; any strides but the last. `output` may be one of the others.
        prefix_lse, suffix_lse, output_lse: `[heads, tokens]` float32, natural logarithms; any
            strides. +inf counts as -inf: both mark an empty row.
        prefill_tokens_with_context: tokens from this one on have no prefix: they are those of the
            suffix, bit for bit, and their prefix is not read.

    Raises:
        NotImplementedError: `output_scale` is given: results in FP8 are not implemented.
        TypeError, ValueError: as in `mla_triton.merge`.
    """
    only("output_scale", output_scale, None)
    check_tensors(output=output, prefix_lse=prefix_lse, suffix_lse=suffix_lse)
    mask = None
    if prefill_tokens_with_context is not None:
        token = torch.arange(output.shape[0], device=output.device)
        mask = token < prefill_tokens_with_context
    # Where a merge is masked the first state stays: that has to be the suffix.
    states = [_state(suffix_output, suffix_lse), _state(prefix_output, prefix_lse)]
    lse = None if output_lse is None else output_lse.T
    mla_triton.merge(states, mask=mask, out=output, lse=lse)


def _state(out: torch.Tensor, lse: torch.Tensor) -> AttentionState:
    return AttentionState(out, lse.masked_fill(lse == float("inf"), float("-inf")).T)
