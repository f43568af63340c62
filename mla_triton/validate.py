"""Tensors and options -> Problem, or an error that names the argument, the rule and the value.

Only what the host knows is looked at: shapes, strides, dtypes and devices. Values on the device
(lengths, page ids) are checked by `mla_triton.testing.check_inputs`, and kept harmless by the
kernels.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch

from mla_triton.cache import CSRPageTable, LatentCache
from mla_triton.problem import DecodeProblem

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INT32_MAX = 2**31 - 1
ALIGNMENT = 16


def fail(error: type[Exception], argument: str, rule: str, value: object) -> NoReturn:
    raise error(f"{argument} must {rule}, got {value}")


def check_tensor(argument: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        fail(TypeError, argument, "be a torch.Tensor", type(value).__name__)


def unpack_cache(cache: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(latents, or latents and rotary keys in one; rotary keys of their own or None)."""
    if isinstance(cache, LatentCache):
        check_tensor("cache.ckv", cache.ckv)
        if cache.kpe is not None:
            check_tensor("cache.kpe", cache.kpe)
        return cache.ckv, cache.kpe
    if not isinstance(cache, torch.Tensor):
        fail(TypeError, "cache", "be a torch.Tensor or a LatentCache", type(cache).__name__)
    return cache, None


def unpack_page_table(page_table: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(dense table or CSR indices, CSR indptr or None)."""
    if isinstance(page_table, CSRPageTable):
        check_tensor("page_table.indptr", page_table.indptr)
        check_tensor("page_table.indices", page_table.indices)
        return page_table.indices, page_table.indptr
    if not isinstance(page_table, torch.Tensor):
        rule = "be a torch.Tensor or a CSRPageTable"
        fail(TypeError, "page_table", rule, type(page_table).__name__)
    return page_table, None


def decode(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor | None,
    ckv: torch.Tensor,
    kpe: torch.Tensor | None,
    pages: torch.Tensor,
    indptr: torch.Tensor | None,
    kv_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    value_dim: int | None,
    max_kv_len: int | None,
    allow_tf32: bool,
) -> DecodeProblem:
    """Checks one call of decode, as `mla_triton.decode` has unpacked it."""
    ragged = cu_seqlens_q is not None
    csr = indptr is not None
    fused = kpe is None
    cache_name = "cache" if fused else "cache.ckv"
    table_name = "page_table.indices" if csr else "page_table"

    dtype, device = q_nope.dtype, q_nope.device
    if dtype not in DTYPES:
        fail(TypeError, "q_nope", "be float16, bfloat16 or float32", dtype)
    values = [("q_rope", q_rope), (cache_name, ckv), ("cache.kpe", kpe), ("out", out)]
    integers = [
        (table_name, pages),
        ("page_table.indptr", indptr),
        ("kv_lens", kv_lens),
        ("cu_seqlens_q", cu_seqlens_q),
    ]
    for name, tensor in values:
        if tensor is not None and tensor.dtype != dtype:
            fail(TypeError, name, f"have q_nope's dtype {dtype}", tensor.dtype)
    for name, tensor in integers:
        if tensor is not None and tensor.dtype != torch.int32:
            fail(TypeError, name, "be int32", tensor.dtype)
    if lse.dtype != torch.float32:
        fail(TypeError, "lse", "be float32", lse.dtype)
    for name, tensor in (*values, *integers, ("lse", lse)):
        if tensor is not None and tensor.device != device:
            fail(ValueError, name, f"be on q_nope's device {device}", tensor.device)
    if torch.is_grad_enabled():
        check_no_grad(("q_nope", q_nope), *values)

    form = "[tokens, heads, latent]" if ragged else "[batch, s_q, heads, latent]"
    if q_nope.dim() != 3 + (not ragged):
        with_or_without = "with" if ragged else "without"
        rule = f"be {form} {with_or_without} cu_seqlens_q"
        fail(ValueError, "q_nope", rule, f"shape {shape(q_nope)}")
    *lead, heads, latent = q_nope.shape
    if heads < 1 or latent < 1:
        fail(
            ValueError, "q_nope", "have at least one head and one column", f"shape {shape(q_nope)}"
        )
    rope = 0
    if q_rope is not None:
        if q_rope.shape[:-1] != q_nope.shape[:-1]:
            rule = f"be {(*lead, heads)} x rope like q_nope"
            fail(ValueError, "q_rope", rule, f"shape {shape(q_rope)}")
        rope = q_rope.shape[-1]
    value = latent if value_dim is None else value_dim
    if value not in (latent, latent + rope):
        rule = f"be q_nope's width {latent} or, with the rope part inside, {latent + rope}"
        fail(ValueError, "value_dim", rule, value)

    if ckv.dim() != 3 or ckv.shape[0] < 1 or ckv.shape[1] < 1:
        rule = "be [pages, page_size, width] with at least one page of one token"
        fail(ValueError, cache_name, rule, f"shape {shape(ckv)}")
    num_pages, page_size, width = ckv.shape
    if fused:
        if width != latent + rope:
            rule = f"be {latent + rope} wide (latent {latent} + rope {rope} of the queries)"
            fail(ValueError, "cache", rule, f"width {width}")
    else:
        assert kpe is not None
        if value != latent:
            fail(
                ValueError,
                "cache",
                f"be one tensor where value_dim is {value}",
                "a LatentCache pair",
            )
        if width != latent:
            fail(ValueError, "cache.ckv", f"be {latent} wide like q_nope", f"width {width}")
        if tuple(kpe.shape) != (num_pages, page_size, rope):
            rule = f"be {(num_pages, page_size, rope)} to go with cache.ckv and q_rope"
            fail(ValueError, "cache.kpe", rule, f"shape {shape(kpe)}")

    if kv_lens.dim() != 1 or not kv_lens.is_contiguous():
        fail(ValueError, "kv_lens", "be contiguous [batch]", layout(kv_lens))
    batch = kv_lens.shape[0]
    if ragged:
        assert cu_seqlens_q is not None
        if cu_seqlens_q.shape != (batch + 1,) or not cu_seqlens_q.is_contiguous():
            rule = f"be contiguous [batch + 1] = [{batch + 1}]"
            fail(ValueError, "cu_seqlens_q", rule, layout(cu_seqlens_q))
        queries, s_q = lead[0], None
    else:
        if lead[0] != batch:
            fail(ValueError, "kv_lens", f"have q_nope's batch of {lead[0]}", f"{batch} entries")
        queries, s_q = lead[0] * lead[1], lead[1]
    capacity = check_page_table(table_name, pages, indptr, batch, page_size)
    if max_kv_len is not None:
        if max_kv_len < 0:
            fail(ValueError, "max_kv_len", "be 0 or more", max_kv_len)
        if max_kv_len > capacity:
            rule = f"reach max_kv_len {max_kv_len} with pages of {page_size}"
            fail(ValueError, table_name, rule, f"{capacity // page_size} entries ({capacity} keys)")
        capacity = max_kv_len
    if not math.isfinite(softmax_scale):
        fail(ValueError, "softmax_scale", "be finite", softmax_scale)

    rows = (*lead, heads)
    if tuple(out.shape) != (*rows, value):
        fail(ValueError, "out", f"be {(*rows, value)}", f"shape {shape(out)}")
    if tuple(lse.shape) != rows:
        fail(ValueError, "lse", f"be {rows}", f"shape {shape(lse)}")
    for name, tensor in (("q_nope", q_nope), *values):
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            rule = "have a contiguous last dimension (stride 1)"
            fail(ValueError, name, rule, f"strides {tuple(tensor.stride())}")

    return DecodeProblem(
        dtype=dtype,
        batch=batch,
        s_q=s_q,
        queries=queries,
        heads=heads,
        latent=latent,
        rope=rope,
        value_dim=value,
        page_size=page_size,
        csr=csr,
        # One query is the last one: it sees every key, causal or not.
        causal=causal and s_q != 1,
        fused=fused,
        ckv_stride_slot=ckv.stride(1),
        kpe_stride_slot=0 if kpe is None else kpe.stride(1),
        aligned=all(aligned(t) for t in (q_nope, q_rope, ckv, kpe, out) if t is not None),
        allow_tf32=allow_tf32 and dtype == torch.float32,
        max_kv_len=min(capacity, INT32_MAX),
        num_pages=num_pages,
    )


def check_no_grad(*tensors: tuple[str, torch.Tensor | None]) -> None:
    for name, tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            rule = "not require grad while grad is enabled (there is no backward)"
            way_out = "a tensor that does: call under torch.no_grad() or pass it detached"
            fail(ValueError, name, rule, way_out)


def check_page_table(
    name: str, pages: torch.Tensor, indptr: torch.Tensor | None, batch: int, page_size: int
) -> int:
    """The most keys a request may have, as far as the table's shape tells."""
    if indptr is None:
        if pages.dim() != 2 or pages.shape[0] != batch or pages.shape[1] < 1:
            rule = f"be [batch, max_pages] = [{batch}, 1 or more]"
            fail(ValueError, name, rule, f"shape {shape(pages)}")
        if pages.shape[1] > 1 and pages.stride(1) != 1:
            rule = "have a contiguous last dimension (stride 1)"
            fail(ValueError, name, rule, f"strides {tuple(pages.stride())}")
        return pages.shape[1] * page_size
    if indptr.shape != (batch + 1,) or not indptr.is_contiguous():
        rule = f"be contiguous [batch + 1] = [{batch + 1}]"
        fail(ValueError, "page_table.indptr", rule, layout(indptr))
    if pages.dim() != 1 or not pages.is_contiguous():
        fail(ValueError, name, "be contiguous [pages in use]", layout(pages))
    return pages.shape[0] * page_size


def aligned(tensor: torch.Tensor) -> bool:
    """Whether every row of a tensor begins at a multiple of 16 bytes, and provably so."""
    strides = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    return tensor.data_ptr() % ALIGNMENT == 0 and all(
        stride % ALIGNMENT == 0 for size, stride in strides if size > 1
    )


def shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def layout(tensor: torch.Tensor) -> str:
    return f"shape {shape(tensor)} and strides {tuple(tensor.stride())}"
