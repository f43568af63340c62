"""A cache, a page table and offsets -> the problem of a gather, or an error that names the
argument, the rule and the value.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from mla_triton.cache import LatentCache
from mla_triton.problem_cache import FEW_TOKENS, GatherProblem
from mla_triton.validate import (
    DTYPES,
    INT32_MAX,
    LAST_DIMENSION,
    Facts,
    Layout,
    check_least,
    check_no_grad,
    check_page_table,
    exceeds_int32,
    facts,
    fail,
    integer,
    is_list,
    shape,
)
from mla_triton.validate_stored import (
    MOST_TOKENS,
    NAMED_DTYPES,
    Known,
    StoredFacts,
    are_aligned,
    check_apart,
    facts_of,
    find_stored,
    layout_of,
    named,
    row_aligned,
    size_of,
    slots_aligned,
)


class GatherCall(NamedTuple):
    """All that the rules of gather look at."""

    cache: StoredFacts
    pages: Facts
    indptr: Facts | None
    cu_seqlens_k: Facts
    starts: Facts | None
    out: Facts
    rope_out: Facts | None
    aligned: bool


def gather(
    cache: LatentCache,
    pages: torch.Tensor,
    indptr: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor,
    starts: torch.Tensor | None,
    out: torch.Tensor,
    rope_out: torch.Tensor | None,
    *,
    has_memory: bool = True,
) -> GatherProblem:
    """Checks one call of gather, as `mla_triton.gather` has unpacked it."""
    if torch.is_grad_enabled():
        check_no_grad(named(cache) | {"out": out, "rope_out": rope_out})
    call = GatherCall(
        facts_of(cache),
        facts(pages),
        None if indptr is None else facts(indptr),
        facts(cu_seqlens_k),
        None if starts is None else facts(starts),
        facts(out),
        None if rope_out is None else facts(rope_out),
        has_memory and are_aligned((cache.ckv, cache.kpe, out, rope_out)),
    )
    if not has_memory:
        found: GatherProblem = gather_of(call).problem
        return found
    known = known_gather(call)
    written = [out] if rope_out is None else [out, rope_out]
    integers = {"page_table": pages, "page_table.indptr": indptr, "starts": starts}
    check_apart(known, written, named(cache) | {"cu_seqlens_k": cu_seqlens_k} | integers)
    problem: GatherProblem = known.problem
    return problem


def gather_of(call: GatherCall) -> Known:
    """The problem of a call that keeps all rules."""
    out, pages, cu_seqlens_k = (Layout(*f) for f in (call.out, call.pages, call.cu_seqlens_k))
    indptr, starts, rope_out = map(layout_of, (call.indptr, call.starts, call.rope_out))
    table = "page_table" if indptr is None else "page_table.indices"
    integers = {
        table: pages, "page_table.indptr": indptr, "cu_seqlens_k": cu_seqlens_k, "starts": starts
    }  # fmt: skip
    for name, tensor in integers.items():
        if tensor is not None and tensor.dtype != torch.int32:
            fail(TypeError, name, "be int32", tensor.dtype)
    if out.dtype not in DTYPES:
        fail(TypeError, "out", f"be {NAMED_DTYPES}", out.dtype)
    if rope_out is not None and rope_out.dtype != out.dtype:
        fail(TypeError, "rope_out", f"have out's dtype {out.dtype}", rope_out.dtype)
    if len(out.shape) != 2 or out.shape[1] < 1:
        fail(ValueError, "out", "be [rows, latent] with at least one column", shape(out))
    rows, latent = out.shape
    if exceeds_int32(rows + INT32_MAX - MOST_TOKENS):
        fail(ValueError, "out", f"have at most {MOST_TOKENS} rows", rows)
    rope = 0
    if rope_out is not None:
        if len(rope_out.shape) != 2 or rope_out.shape[0] != rows or rope_out.shape[1] < 1:
            fail(ValueError, "rope_out", f"be [{rows}, rope] like out", shape(rope_out))
        rope = rope_out.shape[1]
    found = find_stored(call.cache, latent, rope)
    if not is_list(cu_seqlens_k) or cu_seqlens_k.shape[0] < 1:
        fail(ValueError, "cu_seqlens_k", "be contiguous [batch + 1]", cu_seqlens_k)
    batch = cu_seqlens_k.shape[0] - 1
    if starts is not None and not (is_list(starts) and starts.shape[0] == batch):
        fail(ValueError, "starts", f"be contiguous [{batch}]", starts)
    check_page_table(table, pages, indptr, batch, found.stored.page_size)
    results = {"out": out, "rope_out": rope_out}
    for name, tensor in results.items():
        if tensor is None:
            continue
        if not tensor.last_is_contiguous:
            fail(ValueError, name, LAST_DIMENSION, f"strides {tuple(tensor.strides)}")
        if tensor.may_overlap:
            rule = "be laid out without overlap"
            fail(ValueError, name, rule, f"strides {tuple(tensor.strides)}")
    for name, tensor in {**found.tensors, **integers, "rope_out": rope_out}.items():
        if tensor is not None and tensor.device != out.device:
            fail(ValueError, name, f"be on out's device {out.device}", tensor.device)
    problem = GatherProblem(
        dtype=out.dtype,
        stored=found.stored,
        csr=indptr is not None,
        starts=starts is not None,
        aligned=call.aligned
        and slots_aligned(found)
        and all(row_aligned(tensor) for tensor in results.values()),
        few=rows <= FEW_TOKENS,
        rows=rows,
        batch=batch,
    )
    sizes = [size_of(tensor) for tensor in results.values() if tensor is not None]
    ckv, kpe, scales = map(layout_of, call.cache)
    read = (ckv, kpe, scales, cu_seqlens_k, pages, indptr, starts)
    return Known(problem, tuple(sizes), tuple(map(size_of, read)))


known_gather = lru_cache(maxsize=1024)(gather_of)


def gathered_widths(
    cache: LatentCache, rope: int | None, rope_out: torch.Tensor | None
) -> tuple[int, int]:
    """Columns of the latents and of the rotary keys that a gather gives."""
    width = None if rope is None else integer("rope", rope)
    if width is not None:
        check_least("rope", width, 0)
    columns = cache.ckv.shape[-1] if cache.ckv.dim() else 0
    if cache.kpe is not None:
        own = cache.kpe.shape[-1] if cache.kpe.dim() else 0
        if width not in (None, own):
            fail(ValueError, "rope", f"be left out, or the {own} columns of cache.kpe", width)
        return columns, own
    if rope_out is not None:
        own = rope_out.shape[-1] if rope_out.dim() else 0
        if width not in (None, own):
            fail(ValueError, "rope", f"be left out, or the {own} columns of rope_out", width)
        width = own
    width = width or 0
    if width >= max(1, columns):
        fail(ValueError, "rope", f"be fewer than the {columns} columns of the cache", width)
    return columns - width, width


def gathered_dtype(
    cache: LatentCache, dtype: torch.dtype | None, out: torch.Tensor | None
) -> torch.dtype:
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in DTYPES):
        fail(TypeError, "dtype", f"be {NAMED_DTYPES}", dtype)
    if out is not None:
        if dtype not in (None, out.dtype):
            fail(TypeError, "dtype", f"be left out, or out's {out.dtype}", dtype)
        return out.dtype
    if dtype is not None:
        return dtype
    return cache.ckv.dtype if cache.scales is None else torch.bfloat16


def gathered_rows(rows: int | None, out: torch.Tensor | None) -> int:
    count = None if rows is None else integer("rows", rows)
    if out is not None:
        own = out.shape[0] if out.dim() else 0
        if count not in (None, own):
            fail(ValueError, "rows", f"be left out, or the {own} rows of out", count)
        return own
    if count is None:
        fail(ValueError, "rows", "be given where out is not", rows)
    check_least("rows", count, 0)
    return count
