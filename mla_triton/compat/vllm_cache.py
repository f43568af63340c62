"""vLLM's interface to the cache: what writes, reads and moves the tokens of its MLA back ends."""

from __future__ import annotations

import torch

import mla_triton
from mla_triton import LatentCache
from mla_triton.cache import FP8_DS_MLA
from mla_triton.cache.formats import E4M3
from mla_triton.compat.conventions import check_rank, check_tensors, only
from mla_triton.validate import fail, integer

__all__ = [
    "concat_and_cache_mla",
    "cp_gather_and_upconvert_fp8_kv_cache",
    "cp_gather_cache",
    "gather_and_maybe_dequant_cache",
    "swap_blocks",
]

CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_ds_mla")


def concat_and_cache_mla(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    scale: torch.Tensor | None,
) -> None:
    """Writes new tokens, latent and rotary key side by side, to the slots of a paged cache.

    Args:
        kv_c, k_pe: `[tokens, latent]` and `[tokens, rope]`; may have more rows than `slot_mapping`.
            `k_pe` may have no columns.
        kv_cache: `[pages, page_size, latent + rope]`, kv_c's dtype; with "fp8" uint8 or
            float8_e4m3fn; with "fp8_ds_mla" uint8 `[pages, page_size, 656]`.
        slot_mapping: int32 or int64 `[tokens]`, page * page_size + place; -1 is not written.
        kv_cache_dtype: "auto"; "fp8" or "fp8_e4m3", one scale for all numbers; "fp8_ds_mla",
            656 bytes a token, for bfloat16 tokens of 512 + 64 columns, or of 512, whose rotary keys
            are written as zeros. Scales of its groups are powers of two.
        scale: float32, one number, of "fp8" alone: a value is multiplied by its reciprocal.

    Raises:
        NotImplementedError: another `kv_cache_dtype`, or "fp8_ds_mla" of tokens of another dtype.
        TypeError, ValueError: as in `mla_triton.append`.
    """
    check_tensors(kv_c=kv_c, k_pe=k_pe, kv_cache=kv_cache, slot_mapping=slot_mapping)
    cache = _as_stored("kv_cache", kv_cache, kv_cache_dtype, scale, kv_c, "kv_c")
    tokens = slot_mapping.shape[0]
    latent, rope = kv_c[:tokens], k_pe[:tokens]
    has_keys = isinstance(cache, LatentCache) and cache.kpe is not None
    if has_keys and kv_c.dtype != torch.bfloat16:
        rule = "be bfloat16, as the rotary keys of fp8_ds_mla"
        fail(NotImplementedError, "kv_c", rule, kv_c.dtype)
    if has_keys and not rope.shape[-1]:
        rope = latent.new_zeros(1, FP8_DS_MLA.rope).expand(tokens, -1)
    mla_triton.append(cache, latent, rope if rope.shape[-1] else None, slot_mapping)


def gather_and_maybe_dequant_cache(
    src_cache: torch.Tensor,
    dst: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    token_to_seq: torch.Tensor | None,
    num_tokens: int | torch.Tensor,
    kv_cache_dtype: str,
    scale: torch.Tensor | None,
    seq_starts: torch.Tensor | None = None,
) -> None:
    """Reads keys of every request into rows, one request behind another, dequantised.

    Args:
        src_cache: as in `concat_and_cache_mla`.
        dst: `[rows, latent + rope]`; of src_cache's dtype with "auto", else float16, bfloat16 or
            float32. Rows that are no request's stay as they are.
        block_table: int32 `[batch, max_pages]` page ids. A key that it does not reach becomes 0.
        cu_seq_lens: int32 `[batch + 1]`, where the rows of each request begin, and the last's end.
        token_to_seq: not needed.
        num_tokens: the rows that are written; a tensor is waited for.
        kv_cache_dtype, scale: as in `concat_and_cache_mla`. Products with a scale are float32, and
            rounded to dst's dtype.
        seq_starts: int32 `[batch]`, the first key of each request to be read; 0 by default.

    Raises:
        NotImplementedError: another `kv_cache_dtype`.
        TypeError, ValueError: as in `mla_triton.gather`.
    """
    check_tensors(src_cache=src_cache, dst=dst, block_table=block_table, cu_seq_lens=cu_seq_lens)
    check_rank("dst", dst, "rows, columns")
    cache = _as_stored("src_cache", src_cache, kv_cache_dtype, scale, dst, "dst")
    waited = num_tokens.item() if isinstance(num_tokens, torch.Tensor) else num_tokens
    rows = integer("num_tokens", waited)
    if not 0 <= rows <= dst.shape[0]:
        fail(ValueError, "num_tokens", f"be 0 to {dst.shape[0]}, the rows of dst", rows)
    _gather(cache, dst[:rows], block_table, cu_seq_lens, seq_starts)


def cp_gather_cache(
    src_cache: torch.Tensor,
    dst: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    batch_size: int,
    seq_starts: torch.Tensor | None = None,
) -> None:
    """Reads tokens of every request into rows as they are: nothing is dequantised.

    Args:
        src_cache: `[pages, page_size, columns]` float16, bfloat16, float32, or of one byte a
            number.
        dst: `[rows, columns]`, src_cache's dtype. Rows that are no request's stay as they are.
        block_table: int32 `[batch_size or more, max_pages]` page ids. A token that it does not
            reach becomes 0.
        cu_seq_lens: int32 `[batch_size + 1 or more]`, where the rows of each request begin.
        seq_starts: int32 `[batch_size or more]`, the first token of each request to be read; 0 by
            default.

    Raises:
        NotImplementedError: tokens of an odd number of bytes, or at odd addresses.
        TypeError, ValueError: as in `mla_triton.gather`.
    """
    check_tensors(src_cache=src_cache, dst=dst, block_table=block_table, cu_seq_lens=cu_seq_lens)
    if dst.dtype != src_cache.dtype:
        fail(TypeError, "dst", f"have src_cache's dtype {src_cache.dtype}", dst.dtype)
    if src_cache.dtype.itemsize == 1:
        src_cache, dst = _in_pairs("src_cache", src_cache), _in_pairs("dst", dst)
    check_rank("cu_seq_lens", cu_seq_lens, "batch_size + 1")
    batch = _requests(batch_size, block_table, cu_seq_lens.shape[0] - 1)
    starts = None if seq_starts is None else seq_starts[:batch]
    _gather(src_cache, dst, block_table[:batch], cu_seq_lens[: batch + 1], starts)


def cp_gather_and_upconvert_fp8_kv_cache(
    src_cache: torch.Tensor,
    dst: torch.Tensor,
    block_table: torch.Tensor,
    workspace_starts: torch.Tensor,
    batch_size: int,
    seq_starts: torch.Tensor | None = None,
    host_cache: torch.Tensor | None = None,
    host_row_ids: torch.Tensor | None = None,
    device_row_ids: torch.Tensor | None = None,
) -> None:
    """Reads keys of every request from pages of 656 bytes a token into rows, dequantised.

    Args:
        src_cache: uint8 `[pages, page_size, 656]`.
        dst: `[rows, 576]` float16, bfloat16 or float32; its last row is the last request's.
        block_table, batch_size, seq_starts: as in `cp_gather_cache`.
        workspace_starts: int32 `[batch_size or more]`, where the rows of each request begin.

    Raises:
        NotImplementedError: tokens in the host's memory (`host_cache`, `host_row_ids`,
            `device_row_ids`).
        TypeError, ValueError: as in `mla_triton.gather`.
    """
    only("host_cache", host_cache, None)
    only("host_row_ids", host_row_ids, None)
    only("device_row_ids", device_row_ids, None)
    check_tensors(
        src_cache=src_cache, dst=dst, block_table=block_table, workspace_starts=workspace_starts
    )
    check_rank("dst", dst, "rows, columns")
    cache = _as_stored("src_cache", src_cache, "fp8_ds_mla", None, dst, "dst")
    check_rank("workspace_starts", workspace_starts, "batch_size")
    batch = _requests(batch_size, block_table, workspace_starts.shape[0])
    end = workspace_starts.new_full((1,), dst.shape[0])
    bounds = torch.cat([workspace_starts[:batch], end])
    starts = None if seq_starts is None else seq_starts[:batch]
    _gather(cache, dst, block_table[:batch], bounds, starts)


def swap_blocks(
    src: torch.Tensor,
    dst: torch.Tensor,
    block_size_in_bytes: int,
    block_mapping: torch.Tensor,
) -> None:
    """Copies pages of one cache to pages of another, or of the same; one launch for all of them.

    No page may be a target twice, nor, within one cache, a source and a target: what it then holds
    is undefined.

    Args:
        src, dst: `[pages, ...]` of one dtype and page shape; every page contiguous.
        block_size_in_bytes: from one page of src to the next.
        block_mapping: int32 or int64 `[pages to copy, 2]`, pages of src and of dst; on the CPU, as
            vLLM has it, or on the caches' device.

    Raises:
        NotImplementedError: caches on two devices.
        TypeError, ValueError: as in `mla_triton.copy_pages`.
    """
    check_tensors(src=src, dst=dst, block_mapping=block_mapping)
    if dst.device != src.device:
        fail(NotImplementedError, "dst", f"be on src's device {src.device}", dst.device)
    size = src.stride(0) * src.dtype.itemsize
    if block_size_in_bytes != size:
        fail(ValueError, "block_size_in_bytes", f"be that of src, {size}", block_size_in_bytes)
    if block_mapping.dim() != 2 or block_mapping.shape[1] != 2:
        shape = f"shape {tuple(block_mapping.shape)}"
        fail(ValueError, "block_mapping", "be [pages to copy, 2]", shape)
    sources, targets = block_mapping.to(src.device, non_blocking=True).T.contiguous().unbind()
    mla_triton.copy_pages(src, dst, sources, targets)


def _as_stored(
    name: str,
    cache: torch.Tensor,
    kv_cache_dtype: str,
    scale: torch.Tensor | None,
    numbers: torch.Tensor,
    numbers_name: str,
) -> torch.Tensor | LatentCache:
    """A cache as the operations take it, from vLLM's name of its numbers: views of its memory.

    `numbers` are what is written to it, or read from it.
    """
    only("kv_cache_dtype", kv_cache_dtype, *CACHE_DTYPES)
    check_rank(name, cache, "pages, page_size, columns")
    condition = f"where kv_cache_dtype is {kv_cache_dtype}"
    if kv_cache_dtype == "auto":
        if cache.dtype != numbers.dtype:
            rule = f"have {numbers_name}'s dtype {numbers.dtype} {condition}"
            fail(TypeError, name, rule, cache.dtype)
        return cache
    if cache.dtype not in (torch.uint8, E4M3):
        fail(TypeError, name, f"be uint8 or float8_e4m3fn {condition}", cache.dtype)
    if kv_cache_dtype == "fp8_ds_mla":
        size = FP8_DS_MLA.token_bytes
        pages, page_size, columns = cache.shape
        if min(pages, page_size) < 1 or columns != size or not cache[0].is_contiguous():
            rule = f"be [pages, page_size, {size}] with contiguous pages {condition}"
            got = f"shape {tuple(cache.shape)} and strides {tuple(cache.stride())}"
            fail(ValueError, name, rule, got)
        return FP8_DS_MLA.views(cache.view(torch.uint8), page_size)
    check_tensors(scale=scale)
    assert scale is not None
    if scale.dtype != torch.float32 or scale.numel() != 1 or scale.device != cache.device:
        rule = f"be one float32 number on {name}'s device {cache.device}"
        got = f"{scale.dtype} of shape {tuple(scale.shape)} on {scale.device}"
        fail(ValueError, "scale", rule, got)
    return LatentCache(cache.view(E4M3), None, scale.reshape(1).repeat(2))


def _requests(batch_size: int, block_table: torch.Tensor, with_offsets: int) -> int:
    """How many requests there are, of those in a table and of as many as have offsets."""
    check_rank("block_table", block_table, "batch_size, max_pages")
    batch = integer("batch_size", batch_size)
    most = min(block_table.shape[0], with_offsets)
    if not 0 <= batch <= most:
        fail(ValueError, "batch_size", f"be 0 to {most}, as tables and offsets are long", batch)
    return batch


def _in_pairs(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """One-byte numbers as half as many of 16 bits, which a gather keeps bit for bit."""
    *steps, last = tensor.stride()
    if last != 1 or any(n % 2 for n in (tensor.shape[-1], tensor.storage_offset(), *steps)):
        rule = "have tokens of an even number of bytes at even addresses"
        got = f"shape {tuple(tensor.shape)} and strides {tuple(tensor.stride())}"
        got = f"{got} from byte {tensor.storage_offset()} on"
        fail(NotImplementedError, name, rule, got)
    return tensor.view(torch.bfloat16)


def _gather(
    cache: torch.Tensor | LatentCache,
    dst: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    seq_starts: torch.Tensor | None,
) -> None:
    """Tokens into whole rows; rotary keys that a cache has apart go behind the latents."""
    out, rope_out = dst, None
    if isinstance(cache, LatentCache) and cache.kpe is not None:
        latent = cache.ckv.shape[-1]
        out, rope_out = dst[..., :latent], dst[..., latent:]
    mla_triton.gather(
        cache, block_table, cu_seq_lens, starts=seq_starts, out=out, rope_out=rope_out
    )
