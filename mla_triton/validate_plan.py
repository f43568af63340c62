"""Checks one call of plan -> the DecodeProblem that it is made for, or an error that names the
argument, the rule and the value."""

from __future__ import annotations

from typing import Any

import torch

from mla_triton.cache import named
from mla_triton.plan import MAX_PARTS, fixed_pieces
from mla_triton.problem import USUAL_PAGE, DecodeProblem
from mla_triton.validate import (
    DTYPES,
    INT32_MAX,
    Layout,
    check_flag,
    check_impl,
    check_least,
    check_lengths,
    check_rows,
    check_tensor,
    check_value_dim,
    facts,
    fail,
    integer,
)


def plan(
    kv_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    *,
    heads: int,
    latent: int,
    rope: int,
    dtype: torch.dtype,
    s_q: int,
    queries: int | None,
    value_dim: int | None,
    max_kv_len: int | None,
    parts: int | None,
    batch_invariant: bool,
    cache_format: str,
    impl: str | None,
) -> DecodeProblem:
    """Checks one call of plan. Page size, strides and causality, which a plan leaves open, are
    those of an ordinary call."""
    plan_lengths(kv_lens, cu_seqlens_q)
    check_impl(impl)
    if not isinstance(cache_format, str):
        fail(TypeError, "cache_format", "be a str", type(cache_format).__name__)
    check_flag("batch_invariant", batch_invariant)
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        fail(TypeError, "dtype", "be float16, bfloat16 or float32", dtype)
    heads, latent, rope, s_q = (
        _size(name, size, least)
        for name, size, least in (
            ("heads", heads, 1),
            ("latent", latent, 1),
            ("rope", rope, 0),
            ("s_q", s_q, 1),
        )
    )
    queries, value_dim, max_kv_len, parts = (
        None if size is None else _size(name, size, least)
        for name, size, least in (
            ("queries", queries, 0),
            ("value_dim", value_dim, 1),
            ("max_kv_len", max_kv_len, 0),
            ("parts", parts, 1),
        )
    )
    if parts is not None and parts > MAX_PARTS:
        fail(ValueError, "parts", f"be at most {MAX_PARTS}", parts)
    if batch_invariant and parts is not None:
        fail(ValueError, "parts", "be left out where batch_invariant is set", parts)
    if batch_invariant and max_kv_len is None:
        fail(ValueError, "max_kv_len", "be given where batch_invariant is set", None)
    if (queries is None) != (cu_seqlens_q is None):
        fail(ValueError, "queries", "be given if, and only if, cu_seqlens_q is", queries)
    if cu_seqlens_q is not None and s_q != 1:
        fail(ValueError, "s_q", "be left out where cu_seqlens_q is given", s_q)
    value = check_value_dim(value_dim, latent, rope)
    batch = kv_lens.shape[0]
    if queries is None:
        queries = batch * s_q
    check_rows("heads", queries, heads)
    bound = INT32_MAX if max_kv_len is None else min(max_kv_len, INT32_MAX)
    problem = DecodeProblem(
        dtype=dtype,
        batch=batch,
        s_q=s_q if cu_seqlens_q is None else None,
        queries=queries,
        heads=heads,
        latent=latent,
        rope=rope,
        value_dim=value,
        page_size=USUAL_PAGE,
        csr=False,
        causal=False,
        fused=True,
        ckv_stride_slot=latent + rope,
        kpe_stride_slot=0,
        page_slots=USUAL_PAGE,
        fixed_pieces=fixed_pieces(bound) if batch_invariant else 0,
        max_kv_len=bound,
    )
    return named.over(problem, cache_format)


def _size(argument: str, value: Any, least: int) -> int:
    size = integer(argument, value)
    check_least(argument, size, least)
    return size


def plan_lengths(kv_lens: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> None:
    """Checks the tensors that a schedule is made of."""
    check_tensor("kv_lens", kv_lens)
    if kv_lens.dtype != torch.int32:
        fail(TypeError, "kv_lens", "be int32", kv_lens.dtype)
    if cu_seqlens_q is None:
        check_lengths(Layout(*facts(kv_lens)), None)
        return
    check_tensor("cu_seqlens_q", cu_seqlens_q)
    if cu_seqlens_q.dtype != torch.int32:
        fail(TypeError, "cu_seqlens_q", "be int32", cu_seqlens_q.dtype)
    if cu_seqlens_q.device != kv_lens.device:
        rule = f"be on kv_lens's device {kv_lens.device}"
        fail(ValueError, "cu_seqlens_q", rule, cu_seqlens_q.device)
    check_lengths(Layout(*facts(kv_lens)), Layout(*facts(cu_seqlens_q)))
