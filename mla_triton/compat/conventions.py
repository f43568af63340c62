"""What the interfaces have in common: refusals, bases of logarithms, several latents a token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

import mla_triton
from mla_triton import CSRPageTable
from mla_triton.validate import check_tensor, fail

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


def only(argument: str, value: Any, *taken: Any, why: str = "") -> None:
    """Raises NotImplementedError unless an argument has one of the values that are implemented."""
    is_tensor = isinstance(value, torch.Tensor)
    if any(value is one or (not is_tensor and value == one) for one in taken):
        return
    rule = f"be {' or '.join(str(one) for one in taken)}{why}"
    fail(NotImplementedError, argument, rule, "a tensor" if is_tensor else value)


def check_tensors(**given: Any) -> None:
    for name, value in given.items():
        check_tensor(name, value)


def check_rank(argument: str, tensor: torch.Tensor, names: str) -> None:
    """Raises ValueError unless a tensor has the dimensions that are named, as in "batch, heads"."""
    if tensor.dim() != names.count(",") + 1:
        fail(ValueError, argument, f"be [{names}]", f"shape {tuple(tensor.shape)}")


def check_cache_dtype(
    argument: str, cache: torch.Tensor, like: torch.Tensor, name: str = "q"
) -> None:
    """Raises NotImplementedError unless a cache has the dtype of the tensor that is named."""
    if cache.dtype != like.dtype:
        rule = f"have {name}'s dtype {like.dtype}: quantised caches are not implemented"
        fail(NotImplementedError, argument, rule, cache.dtype)


def int32(tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """Indices as the operations read them; itself where it is that already."""
    return tensor.to(device=device, dtype=torch.int32, non_blocking=True)


def bound_of(lengths: Sequence[int]) -> int:
    """A bound of lengths that stays as it is while they grow a little, so that calls stay alike."""
    longest = max(lengths, default=0)
    return 1 << max(longest - 1, 0).bit_length()


def natural(lse: torch.Tensor) -> torch.Tensor:
    """A base-2 logarithm as a natural one, in a tensor of its own."""
    return lse.float() * LN_2


def to_base_2(lse: torch.Tensor) -> torch.Tensor:
    """A natural logarithm as one to base 2, in place."""
    return lse.mul_(LOG2_E)


def set_empty(out: torch.Tensor, lse: torch.Tensor) -> None:
    """Writes the state of queries that see no key."""
    out.zero_()
    lse.fill_(float("-inf"))


def check_value_in_key(k_buffer: torch.Tensor, v_buffer: torch.Tensor) -> None:
    """Raises NotImplementedError unless values are the leading columns of the keys: the latent."""
    sizes, steps = k_buffer.shape[:-1], (k_buffer.stride(), v_buffer.stride())
    same = (
        v_buffer.data_ptr() == k_buffer.data_ptr()
        and v_buffer.shape[:-1] == sizes
        and v_buffer.shape[-1] <= k_buffer.shape[-1]
        and all(one == other or size == 1 for size, one, other in zip(sizes, *steps, strict=False))
    )
    if not same:
        rule = "be a view of k_buffer's leading columns, as the latent of MLA is"
        fail(NotImplementedError, "v_buffer", rule, "a tensor of its own")


def decode_by_kv_head(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    page_table: torch.Tensor | CSRPageTable,
    kv_lens: torch.Tensor,
    *,
    out: torch.Tensor,
    lse: torch.Tensor,
    **options: Any,
) -> None:
    """Decode over a cache whose tokens have a latent for each KV head.

    Args:
        q: `[batch, s_q, heads, latent + rope]`. Query head i has KV head i // (heads // kv_heads).
        k_cache: `[pages, page_size, kv_heads, latent + rope]`; may have no page at all.
        page_table, kv_lens: as in `mla_triton.decode`.
        out, lse: `[batch, s_q, heads, latent]` and `[batch, s_q, heads]`; any strides.
        options: further ones of `mla_triton.decode`; the same for every KV head, a plan, too.
    """
    heads, kv_heads, latent = q.shape[2], k_cache.shape[2], out.shape[-1]
    if kv_heads < 1 or heads % kv_heads:
        rule = f"have a multiple of the cache's {kv_heads} heads"
        fail(ValueError, "q", rule, heads)
    indices = page_table.indices if isinstance(page_table, CSRPageTable) else page_table
    if not k_cache.shape[0] or not indices.shape[-1]:
        set_empty(out, lse)
        return
    group = heads // kv_heads
    for kv_head in range(kv_heads):
        mine = slice(kv_head * group, (kv_head + 1) * group)
        query = q[:, :, mine]
        mla_triton.decode(
            query[..., :latent],
            query[..., latent:] if query.shape[-1] > latent else None,
            k_cache[:, :, kv_head],
            page_table,
            kv_lens,
            out=out[:, :, mine],
            lse=lse[:, :, mine],
            **options,
        )
