"""The tensors and options of a prefill -> PrefillProblem, or an error that names the argument, the
rule and the value.

As in `mla_triton.validate`, only what the host knows is looked at, and calls that are alike in it
go through the rules once. Offsets live on the device: the kernels keep wrong ones harmless, and
`mla_triton.debug` verifies them on request.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from mla_triton.problem import LARGEST_TILE, PrefillProblem, usual_queries
from mla_triton.validate import (
    ALIGNMENT,
    DTYPES,
    LAST_DIMENSION,
    Facts,
    Layout,
    check_least,
    check_no_grad,
    check_results,
    check_rows,
    exceeds_int32,
    facts,
    fail,
    is_list,
    number,
    rows_aligned,
    shape,
)


class PrefillCall(NamedTuple):
    """All that the rules of prefill look at."""

    q: Facts
    q_rope: Facts | None
    k: Facts
    k_rope: Facts | None
    v: Facts
    cu_seqlens_q: Facts
    cu_seqlens_k: Facts
    out: Facts
    lse: Facts
    causal: bool
    negative_scale: bool
    max_seqlen_q: int | None
    batch_invariant: bool
    aligned: bool
    """Whether what the kernels read in wide loads begins at multiples of 16 bytes."""


def prefill(
    q: torch.Tensor,
    q_rope: torch.Tensor | None,
    k: torch.Tensor,
    k_rope: torch.Tensor | None,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    max_seqlen_q: int | None,
    batch_invariant: bool = False,
    has_memory: bool = True,
) -> PrefillProblem:
    """Checks one call of prefill.

    Without `has_memory` (fake tensors of a compiler, the meta device) the rules are the same, and
    sizes may be symbolic.
    """
    values = {"q": q, "q_rope": q_rope, "k": k, "k_rope": k_rope, "v": v, "out": out}
    if torch.is_grad_enabled():
        check_no_grad(values)
    number("softmax_scale", softmax_scale)
    address = 0
    if has_memory:
        for tensor in values.values():
            if tensor is not None:
                address |= tensor.data_ptr()
    call = PrefillCall(
        facts(q),
        None if q_rope is None else facts(q_rope),
        facts(k),
        None if k_rope is None else facts(k_rope),
        facts(v),
        facts(cu_seqlens_q),
        facts(cu_seqlens_k),
        facts(out),
        facts(lse),
        causal,
        # Of a symbolic scale it is not asked: a compiler's calls are checked, not computed.
        has_memory and softmax_scale < 0,
        max_seqlen_q,
        batch_invariant,
        address % ALIGNMENT == 0,
    )
    return known_problem(call) if has_memory else prefill_problem(call)


def prefill_problem(call: PrefillCall) -> PrefillProblem:
    """The problem of a call that keeps all rules."""
    q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse = (
        Layout(*known)
        for known in (
            call.q, call.k, call.v, call.cu_seqlens_q, call.cu_seqlens_k, call.out, call.lse
        )
    )  # fmt: skip
    q_rope, k_rope = (
        None if known is None else Layout(*known) for known in (call.q_rope, call.k_rope)
    )
    values = {"q": q, "q_rope": q_rope, "k": k, "k_rope": k_rope, "v": v, "out": out}
    offsets = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    _check_dtypes_and_devices(values, offsets, lse)
    queries, heads, q_nope = _check_heads("q", q)
    keys, kv_heads, k_nope = _check_heads("k", k)
    if heads % kv_heads:
        fail(ValueError, "q", f"have a multiple of k's {kv_heads} heads", heads)
    width = _check_widths(q, q_rope, k, k_rope)
    if len(v.shape) != 3 or v.shape[:2] != k.shape[:2] or v.shape[2] < 1:
        fail(ValueError, "v", f"be [{keys}, {kv_heads}, 1 or more columns] like k", shape(v))
    check_rows("q", queries, heads)
    if exceeds_int32(keys):
        fail(ValueError, "k", "have at most 2147483647 tokens", keys)
    batch = _check_offsets(cu_seqlens_q, cu_seqlens_k)
    if call.max_seqlen_q is not None:
        check_least("max_seqlen_q", call.max_seqlen_q, 0)
    check_results(out, lse, (queries, heads), v.shape[2])
    for name, tensor in values.items():
        if tensor is not None and not tensor.last_is_contiguous:
            fail(ValueError, name, LAST_DIMENSION, f"strides {tuple(tensor.strides)}")

    # Of sizes that are symbolic nothing is asked: the answer would become a condition of the code.
    symbolic = any(isinstance(size, torch.SymInt) for size in (queries, batch))
    is_any = symbolic or call.batch_invariant
    return PrefillProblem(
        dtype=q.dtype,
        heads=heads,
        kv_heads=kv_heads,
        qk_dim=width,
        value_dim=v.shape[2],
        q_nope=q_nope,
        k_nope=k_nope,
        causal=call.causal,
        usual_queries=LARGEST_TILE if is_any else usual_queries(queries, batch),
        batch_invariant=call.batch_invariant,
        negative_scale=call.negative_scale,
        aligned=call.aligned and all(rows_aligned(t) for t in values.values() if t is not None),
        distinct=all(_rows_distinct(t) for t in values.values() if t is not None),
        batch=batch,
        queries=queries,
        keys=keys,
        max_seqlen_q=call.max_seqlen_q,
    )


# An engine makes a few of these per step; the bound is for one that never repeats itself.
known_problem = lru_cache(maxsize=4096)(prefill_problem)


def _rows_distinct(tensor: Layout) -> bool:
    """Whether no two rows lie on each other. A stride that is symbolic is not asked."""
    rows = zip(tensor.shape[:-1], tensor.strides[:-1], strict=True)
    return not any(isinstance(step, int) and step == 0 and size > 1 for size, step in rows)


def _check_dtypes_and_devices(
    values: dict[str, Layout | None], offsets: dict[str, Layout], lse: Layout
) -> None:
    q = values["q"]
    assert q is not None
    if q.dtype not in DTYPES:
        fail(TypeError, "q", "be float16, bfloat16 or float32", q.dtype)
    for name, tensor in values.items():
        if tensor is not None and tensor.dtype != q.dtype:
            fail(TypeError, name, f"have q's dtype {q.dtype}", tensor.dtype)
    for name, tensor in offsets.items():
        if tensor.dtype != torch.int32:
            fail(TypeError, name, "be int32", tensor.dtype)
    if lse.dtype != torch.float32:
        fail(TypeError, "lse", "be float32", lse.dtype)
    for name, tensor in (values | offsets | {"lse": lse}).items():
        if tensor is not None and tensor.device != q.device:
            fail(ValueError, name, f"be on q's device {q.device}", tensor.device)


def _check_heads(name: str, tensor: Layout) -> tuple[int, int, int]:
    """(tokens, heads, columns)."""
    if len(tensor.shape) != 3 or tensor.shape[1] < 1 or tensor.shape[2] < 1:
        rule = "be [tokens, heads, columns] with at least one head and one column"
        fail(ValueError, name, rule, shape(tensor))
    tokens, heads, columns = tensor.shape
    return tokens, heads, columns


def _check_widths(q: Layout, q_rope: Layout | None, k: Layout, k_rope: Layout | None) -> int:
    """Columns of a whole query and of a whole key."""
    q_width, k_width = q.shape[2], k.shape[2]
    if q_rope is not None:
        if len(q_rope.shape) != 3 or q_rope.shape[:2] != q.shape[:2] or q_rope.shape[2] < 1:
            rule = f"be [{q.shape[0]}, {q.shape[1]}, rope] like q"
            fail(ValueError, "q_rope", rule, shape(q_rope))
        q_width += q_rope.shape[2]
    if k_rope is not None:
        if len(k_rope.shape) != 2 or k_rope.shape[0] != k.shape[0] or k_rope.shape[1] < 1:
            rule = f"be [{k.shape[0]}, rope], one for all heads"
            fail(ValueError, "k_rope", rule, shape(k_rope))
        k_width += k_rope.shape[1]
    if q_width != k_width:
        parts = "k and k_rope" if k_rope is not None else "k"
        whole = f"be as wide as q{'' if q_rope is None else ' and q_rope'}, {q_width} columns"
        fail(ValueError, parts, whole, k_width)
    return q_width


def _check_offsets(cu_seqlens_q: Layout, cu_seqlens_k: Layout) -> int:
    """The batch."""
    if not is_list(cu_seqlens_q) or cu_seqlens_q.shape[0] < 1:
        fail(ValueError, "cu_seqlens_q", "be contiguous [batch + 1]", cu_seqlens_q)
    count = cu_seqlens_q.shape[0]
    if not is_list(cu_seqlens_k) or cu_seqlens_k.shape[0] != count:
        rule = f"be contiguous [batch + 1] = [{count}]"
        fail(ValueError, "cu_seqlens_k", rule, cu_seqlens_k)
    return count - 1


def out_shape(q: torch.Tensor, v: torch.Tensor) -> tuple[int, ...]:
    """The shape of `out`; that of arguments which break a rule is any."""
    if q.dim() == 0 or v.dim() == 0:
        return tuple(q.shape)
    return *q.shape[:-1], v.shape[-1]
