"""Gather: keys of requests from the pages of a latent cache into contiguous rows."""

from __future__ import annotations

import torch

from mla_triton import debug, reference, select, validate, validate_gather, validate_stored
from mla_triton import device as devices
from mla_triton.cache import CSRPageTable, LatentCache
from mla_triton.kernels.portable.gather import GatherTensors
from mla_triton.ops.library import LIBRARY
from mla_triton.ops.prepare import prepare
from mla_triton.ops.recall import is_plain_eager


def gather(
    cache: torch.Tensor | LatentCache,
    page_table: torch.Tensor | CSRPageTable,
    cu_seqlens_k: torch.Tensor,
    *,
    rows: int | None = None,
    rope: int | None = None,
    starts: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    rope_out: torch.Tensor | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Reads keys of every request into rows, one request behind another, dequantised; one launch.

    Rows `cu_seqlens_k[b]` to `cu_seqlens_k[b + 1]` become keys of request b, from `starts[b]` on. A
    key that the page table does not reach, or whose page is none of the cache, becomes 0. Rows
    behind the last offset are left as they are.

    Args:
        cache: as in `mla_triton.append`, in any format.
        page_table: int32 `[batch, max_pages]`, or a `CSRPageTable`.
        cu_seqlens_k: int32 `[batch + 1]`, where the rows of each request begin, and the last's end.
        rows: of the results, where `out` is not given: the host does not read the last offset.
        rope: the last columns of a cache without `kpe` that are the rotary key; 0 by default. Taken
            from `rope_out` where that is given.
        starts: int32 `[batch]`, the first key of each request to be read; 0 by default.
        dtype: float16, bfloat16 or float32; by default the cache's, bfloat16 of a quantised one.
            Products with scales are float32, and rounded to it.
        out, rope_out: buffers for the results.
        impl: "portable" or "reference"; refused with a reason where it cannot run, never replaced.

    Returns:
        `[rows, latent]`, and `[rows, rope]` or, without rotary columns, None.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message names argument, rule and
            value.
        NotImplementedError: no implementation, or not `impl`, can take the problem; says why.
    """
    parts = validate.unpack_cache(cache)
    pages, indptr = validate.unpack_page_table(page_table)
    validate.check_tensor("cu_seqlens_k", cu_seqlens_k)
    validate.check_impl(impl)
    given = {"starts": starts, "out": out, "rope_out": rope_out}
    for name, tensor in given.items():
        if tensor is not None:
            validate.check_tensor(name, tensor)
    out, rope_out = _buffers(parts, rows, rope, dtype, out, rope_out)
    tensors = (*parts, pages, indptr, cu_seqlens_k, starts, out, rope_out)
    direct = is_plain_eager() and all(t is None or type(t) is torch.Tensor for t in tensors)
    if direct and (out.is_cuda or out.device.type == "cpu"):
        _gather(*tensors, impl)
    else:
        torch.ops.mla_triton.gather(*tensors, impl)
    return out, rope_out


def _buffers(
    cache: LatentCache,
    rows: int | None,
    rope: int | None,
    dtype: torch.dtype | None,
    out: torch.Tensor | None,
    rope_out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The results' memory, made where it is not given."""
    latent, width = validate_gather.gathered_widths(cache, rope, rope_out)
    kind = validate_gather.gathered_dtype(cache, dtype, out)
    count = validate_gather.gathered_rows(rows, out)
    if out is None:
        out = cache.ckv.new_empty(count, latent, dtype=kind)
    if rope_out is None and width:
        rope_out = out.new_empty(count, width)
    return out, rope_out


LIBRARY.define(
    "gather(Tensor ckv, Tensor? kpe, Tensor? scales, Tensor pages, Tensor? indptr, "
    "Tensor cu_seqlens_k, Tensor? starts, Tensor(a!) out, Tensor(b!)? rope_out, str? impl) -> ()"
)


def _gather(
    ckv: torch.Tensor,
    kpe: torch.Tensor | None,
    scales: torch.Tensor | None,
    pages: torch.Tensor,
    indptr: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor,
    starts: torch.Tensor | None,
    out: torch.Tensor,
    rope_out: torch.Tensor | None,
    impl: str | None,
) -> None:
    cache = LatentCache(ckv, kpe, scales)
    problem = validate_gather.gather(cache, pages, indptr, cu_seqlens_k, starts, out, rope_out)
    if debug.wanted(out):
        debug.check_gather(cache, pages, indptr, cu_seqlens_k, starts, problem.rows)
    device = devices.of(out.device)
    chosen = select.gather(problem, device, impl)
    if problem.rows == 0 or problem.batch == 0:
        return
    if chosen.name == "reference":
        table = pages if indptr is None else CSRPageTable(indptr, pages)
        reference.gather(cache, table, cu_seqlens_k, starts=starts, out=out, rope_out=rope_out)
        return
    ready = prepare(chosen.module, problem, device, out.device.index)
    latents, keys, own_scales, key_scales = validate_stored.parts(cache, problem.stored)
    tensors = GatherTensors(
        latents, keys, own_scales, key_scales, pages, indptr, cu_seqlens_k, starts, out, rope_out
    )
    chosen.module.launch(ready.kernel, problem, ready.config, tensors)


def _gather_fake(
    ckv: torch.Tensor,
    kpe: torch.Tensor | None,
    scales: torch.Tensor | None,
    pages: torch.Tensor,
    indptr: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor,
    starts: torch.Tensor | None,
    out: torch.Tensor,
    rope_out: torch.Tensor | None,
    impl: str | None,
) -> None:
    """The rules alone: results go to `out` and `rope_out`, which are there."""
    cache = LatentCache(ckv, kpe, scales)
    validate_gather.gather(
        cache, pages, indptr, cu_seqlens_k, starts, out, rope_out, has_memory=False
    )


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("gather", _gather, _key)
torch.library.register_fake("mla_triton::gather", _gather_fake, lib=LIBRARY)
