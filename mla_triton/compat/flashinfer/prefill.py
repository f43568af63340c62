"""`flashinfer.prefill`: attention of ragged prompts over expanded keys and values."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

import mla_triton
from mla_triton.compat.conventions import (
    bound_of,
    check_rank,
    check_tensors,
    int32,
    only,
    to_base_2,
)
from mla_triton.validate import fail, number

__all__ = [
    "BatchPrefillWithRaggedKVCacheWrapper",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
]

LAYOUTS = ("NHD", "HND")


def single_prefill_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale_q: torch.Tensor | None = None,
    scale_k: torch.Tensor | None = None,
    scale_v: torch.Tensor | None = None,
    o_dtype: torch.dtype | None = None,
    custom_mask: torch.Tensor | None = None,
    packed_custom_mask: torch.Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of one prompt over its expanded keys and values.

    Args:
        q: `[tokens, heads, head_dim_qk]`.
        k, v: `[kv_tokens, kv_heads, head_dim_qk]` and `[kv_tokens, kv_heads, head_dim_vo]`; with
            the layout "HND" the heads come first.
        causal: bottom-right aligned.
        sm_scale: `head_dim_qk ** -0.5` by default.
        use_fp16_qk_reduction, rope_scale, rope_theta, backend: change nothing; sums are float32.

    Returns:
        out `[tokens, heads, head_dim_vo]`, or with `return_lse` (out, lse `[tokens, heads]`
        float32, to base 2). A row that sees no key has out 0 and lse -inf.

    Raises:
        NotImplementedError: a mask, a window, a soft cap, a position encoding, scales of quantised
            values or another dtype for the result are asked for.
        TypeError, ValueError: as in `mla_triton.prefill`.
    """
    _refuse_masks(custom_mask, packed_custom_mask, pos_encoding_mode, window_left, logits_soft_cap)
    _refuse_scales(scale_q=scale_q, scale_k=scale_k, scale_v=scale_v)
    check_tensors(q=q, k=k, v=v)
    only("o_dtype", o_dtype, None, q.dtype)
    k, v = _tokens_first(k, v, kv_layout)
    step = torch.arange(2, dtype=torch.int32, device=q.device)
    state = mla_triton.prefill(
        q,
        k,
        v,
        cu_seqlens_q=step * q.shape[0],
        cu_seqlens_k=step * k.shape[0],
        softmax_scale=_scale(sm_scale, q.shape[-1]),
        causal=bool(causal),
    )
    return (state.out, to_base_2(state.lse)) if return_lse else state.out


def single_prefill_with_kv_cache_return_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`single_prefill_with_kv_cache` with `return_lse`."""
    out, lse = single_prefill_with_kv_cache(q, k, v, **(options | {"return_lse": True}))
    return out, lse


class BatchPrefillWithRaggedKVCacheWrapper:
    """Attention of a batch of prompts: `plan` once a step, `run` once a layer.

    As in FlashInfer, `plan` reads `qo_indptr`, and so waits for the device where it lives there;
    with `use_cuda_graph` it does not: it writes to the buffers that are given here, from which a
    captured `run` is replayed.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        kv_indptr_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        """
        Args:
            float_workspace_buffer: says on which device; nothing is kept in it.
            kv_layout: "NHD", or "HND" for keys and values with the heads first.
            qo_indptr_buf, kv_indptr_buf: int32 `[batch + 1]`, with `use_cuda_graph`.
            backend: any name; what runs is chosen by `mla_triton.prefill`.
        """
        check_tensors(float_workspace_buffer=float_workspace_buffer)
        only("custom_mask_buf", custom_mask_buf, None)
        only("mask_indptr_buf", mask_indptr_buf, None)
        _check_layout(kv_layout)
        self.device = float_workspace_buffer.device
        self._kv_layout = kv_layout
        self._use_cuda_graph = use_cuda_graph
        if use_cuda_graph:
            check_tensors(qo_indptr_buf=qo_indptr_buf, kv_indptr_buf=kv_indptr_buf)
            assert qo_indptr_buf is not None
            assert kv_indptr_buf is not None
            self._cu_seqlens_q, self._cu_seqlens_k = qo_indptr_buf, kv_indptr_buf
        self._is_planned = False

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: torch.Tensor | None = None,
        token_pos_in_items_ptr: torch.Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        """Takes where each prompt begins, and what all layers have in common.

        Args:
            qo_indptr, kv_indptr: `[batch + 1]`, of queries and of keys; may be on the CPU.
            sm_scale: `head_dim_qk ** -0.5` by default.
            use_fp16_qk_reduction, rope_scale, rope_theta, non_blocking, fixed_split_size,
                disable_split_kv: change nothing; keys are never split.

        Raises:
            NotImplementedError: a mask, a window, a soft cap, a position encoding, several items in
                a prompt, or dtypes that differ are asked for.
            TypeError, ValueError: an argument breaks a rule; the message names argument, rule and
                value.
        """
        _refuse_masks(
            custom_mask, packed_custom_mask, pos_encoding_mode, window_left, logits_soft_cap
        )
        items = {
            "prefix_len_ptr": prefix_len_ptr,
            "token_pos_in_items_ptr": token_pos_in_items_ptr,
            "max_item_len_ptr": max_item_len_ptr,
        }
        for name, value in items.items():
            only(name, value, None)
        only("token_pos_in_items_len", token_pos_in_items_len, 0)
        dtype = _dtype(q_data_type)
        for name, other in (("kv_data_type", kv_data_type), ("o_data_type", o_data_type)):
            if other is not None:
                only(name, _dtype(other), dtype, why=" like q_data_type")
        check_tensors(qo_indptr=qo_indptr, kv_indptr=kv_indptr)
        if qo_indptr.dim() != 1 or qo_indptr.shape != kv_indptr.shape:
            rule = f"be [batch + 1] like qo_indptr, {tuple(qo_indptr.shape)}"
            fail(ValueError, "kv_indptr", rule, tuple(kv_indptr.shape))
        if self._use_cuda_graph:
            buffer = self._cu_seqlens_q
            if qo_indptr.shape != buffer.shape:
                rule = f"be as long as its buffer, {buffer.shape[0]}"
                fail(ValueError, "qo_indptr", rule, qo_indptr.shape[0])
            self._cu_seqlens_q.copy_(qo_indptr)
            self._cu_seqlens_k.copy_(kv_indptr)
            self._max_seqlen_q = None
        else:
            self._cu_seqlens_q = int32(qo_indptr, self.device)
            self._cu_seqlens_k = int32(kv_indptr, self.device)
            lengths = [end - begin for begin, end in pairwise(qo_indptr.tolist())]
            self._max_seqlen_q = bound_of(lengths)
        self._heads, self._kv_heads = num_qo_heads, num_kv_heads
        self._widths = head_dim_qk, head_dim_qk if head_dim_vo is None else head_dim_vo
        self._dtype = dtype
        self._causal = bool(causal)
        self._scale = _scale(sm_scale, head_dim_qk)
        self._is_planned = True

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        o_scale: float | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of one layer.

        Args:
            q: `[tokens, num_qo_heads, head_dim_qk]`.
            k, v: `[kv_tokens, num_kv_heads, head_dim_qk]` and `[kv_tokens, num_kv_heads,
                head_dim_vo]`, or with the heads first, as the layout says.
            out, lse: buffers for the result; `lse` is written whether or not it is returned.
            enable_pdl: changes nothing.

        Returns:
            out `[tokens, num_qo_heads, head_dim_vo]`, or with `return_lse` (out, lse `[tokens,
            num_qo_heads]` float32, to base 2). A row that sees no key has out 0 and lse -inf.

        Raises:
            NotImplementedError: scales of quantised values are given.
            TypeError, ValueError: an argument breaks a rule, or is not what `plan` was told; the
                message names argument, rule and value.
        """
        _refuse_scales(q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, o_scale=o_scale)
        if not self._is_planned:
            fail(ValueError, "run", "follow a call of plan", "none")
        check_tensors(q=q, k=k, v=v)
        k, v = _tokens_first(k, v, self._kv_layout)
        qk, vo = self._widths
        planned = (("q", q, self._heads, qk), ("k", k, self._kv_heads, qk))
        for name, tensor, heads, width in (*planned, ("v", v, self._kv_heads, vo)):
            check_rank(name, tensor, "tokens, heads, head_dim")
            if tensor.dtype != self._dtype:
                fail(TypeError, name, f"have the dtype of plan, {self._dtype}", tensor.dtype)
            if tuple(tensor.shape[1:]) != (heads, width):
                rule = f"be [tokens, {heads}, {width}], as plan was told"
                fail(ValueError, name, rule, f"shape {tuple(tensor.shape)}")
        is_lse_wanted = return_lse or lse is not None
        state = mla_triton.prefill(
            q,
            k,
            v,
            cu_seqlens_q=self._cu_seqlens_q,
            cu_seqlens_k=self._cu_seqlens_k,
            softmax_scale=self._scale,
            causal=self._causal,
            max_seqlen_q=self._max_seqlen_q,
            out=out,
            lse=lse,
        )
        if is_lse_wanted:
            to_base_2(state.lse)
        return (state.out, state.lse) if return_lse else state.out

    def run_return_lse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`run` with `return_lse`."""
        out, lse = self.run(q, k, v, **options, return_lse=True)
        return out, lse


def _refuse_masks(
    custom_mask: torch.Tensor | None,
    packed_custom_mask: torch.Tensor | None,
    pos_encoding_mode: str,
    window_left: int,
    logits_soft_cap: float | None,
) -> None:
    only("custom_mask", custom_mask, None)
    only("packed_custom_mask", packed_custom_mask, None)
    only("pos_encoding_mode", pos_encoding_mode, "NONE")
    only("window_left", window_left, -1)
    only("logits_soft_cap", logits_soft_cap, None, 0.0)


def _refuse_scales(**scales: Any) -> None:
    for name, value in scales.items():
        only(name, value, None)


def _scale(sm_scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if sm_scale is None else number("sm_scale", sm_scale)


def _dtype(named: str | torch.dtype) -> torch.dtype:
    dtype = getattr(torch, named, None) if isinstance(named, str) else named
    if not isinstance(dtype, torch.dtype):
        fail(TypeError, "q_data_type, kv_data_type or o_data_type", "be a dtype", named)
    return dtype


def _check_layout(kv_layout: str) -> None:
    if kv_layout not in LAYOUTS:
        fail(ValueError, "kv_layout", f"be one of {', '.join(LAYOUTS)}", kv_layout)


def _tokens_first(
    k: torch.Tensor, v: torch.Tensor, kv_layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of keys and values as `mla_triton.prefill` takes them."""
    _check_layout(kv_layout)
    return (k.transpose(0, 1), v.transpose(0, 1)) if kv_layout == "HND" else (k, v)
