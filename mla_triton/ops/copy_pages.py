"""Copy of whole pages of a latent cache: a request that branches, a cache that moves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mla_triton import debug, reference, select, validate, validate_copy
from mla_triton import device as devices
from mla_triton.cache import LatentCache
from mla_triton.kernels.portable.copy_pages import CopyTensors
from mla_triton.ops.library import LIBRARY
from mla_triton.ops.prepare import prepare
from mla_triton.ops.recall import is_plain_eager


def copy_pages(
    cache_from: torch.Tensor | LatentCache,
    cache_to: torch.Tensor | LatentCache,
    source_pages: torch.Tensor,
    target_pages: torch.Tensor,
    *,
    impl: str | None = None,
) -> None:
    """Copies pages of one cache to pages of another, or of the same; one launch.

    A pair of which either number is negative, or behind the cache's last page, is left out. No page
    may be a target twice, nor, within one cache, a source and a target (but of itself): which of
    the bytes it then has is undefined; no other page is touched.

    Args:
        cache_from, cache_to: `[pages, ...]` of any dtype, or two `LatentCache` of the same form;
            every page contiguous. Packed pages are the uint8 tensor that they are in. The caches
            may be the same, but overlap in no other way.
        source_pages, target_pages: int32 or int64 `[pages to copy]`.
        impl: "portable" or "reference"; refused with a reason where it cannot run, never replaced.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message names argument, rule and
            value.
        NotImplementedError: no implementation, or not `impl`, can take the problem; says why.
    """
    read = validate_copy.cache_parts(cache_from, "cache_from")
    written = validate_copy.cache_parts(cache_to, "cache_to")
    validate_copy.check_alike(read, written)
    validate.check_tensor("source_pages", source_pages)
    validate.check_tensor("target_pages", target_pages)
    validate.check_impl(impl)
    names, ones, others = list(read), list(read.values()), list(written.values())
    tensors = (*ones, *others, source_pages, target_pages)
    direct = is_plain_eager() and all(type(t) is torch.Tensor for t in tensors)
    if direct and (source_pages.is_cuda or source_pages.device.type == "cpu"):
        _copy_pages(names, ones, others, source_pages, target_pages, impl)
    else:
        torch.ops.mla_triton.copy_pages(names, ones, others, source_pages, target_pages, impl)


LIBRARY.define(
    "copy_pages(str[] names, Tensor[] read, Tensor(a!)[] written, Tensor source_pages, "
    "Tensor target_pages, str? impl) -> ()"
)


def _copy_pages(
    names: Sequence[str],
    read: Sequence[torch.Tensor],
    written: Sequence[torch.Tensor],
    source_pages: torch.Tensor,
    target_pages: torch.Tensor,
    impl: str | None,
) -> None:
    problem = validate_copy.copy_pages(names, read, written, source_pages, target_pages)
    if debug.wanted(source_pages):
        debug.check_copy(read, written, source_pages, target_pages)
    device = devices.of(source_pages.device)
    chosen = select.copy_pages(problem, device, impl)
    if problem.pages == 0:
        return
    if chosen.name == "reference":
        reference.copy_pages(read, written, source_pages, target_pages)
        return
    ready = prepare(chosen.module, problem, device, source_pages.device.index)
    tensors = CopyTensors(read, written, source_pages, target_pages)
    chosen.module.launch(ready.kernel, problem, ready.config, tensors)


def _copy_pages_fake(
    names: Sequence[str],
    read: Sequence[torch.Tensor],
    written: Sequence[torch.Tensor],
    source_pages: torch.Tensor,
    target_pages: torch.Tensor,
    impl: str | None,
) -> None:
    """The rules alone: what is written is there."""
    validate_copy.copy_pages(names, read, written, source_pages, target_pages, has_memory=False)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("copy_pages", _copy_pages, _key)
torch.library.register_fake("mla_triton::copy_pages", _copy_pages_fake, lib=LIBRARY)
