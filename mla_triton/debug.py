"""The debug switch: with `MLA_TRITON_DEBUG=1` in the environment, calls verify what is not read.

That is what only the device knows (lengths, offsets, slots, page ids, whether a plan is of these
lengths), and whether results lie apart from what is read. Every call then waits for the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache

import torch

from mla_triton import memory
from mla_triton.cache import CSRPageTable, LatentCache
from mla_triton.validate import fail


@cache
def switched_on() -> bool:
    return os.environ.get("MLA_TRITON_DEBUG", "0").lower() in ("1", "true", "on", "yes", "y")


def wanted(tensor: torch.Tensor) -> bool:
    """Whether a call with this tensor is to be verified; the environment is read once.

    Not while a CUDA graph is captured: nothing can be read there.
    """
    if not switched_on():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def check_decode(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor | None,
    ckv: torch.Tensor,
    kpe: torch.Tensor | None,
    scales: torch.Tensor | None,
    pages: torch.Tensor,
    indptr: torch.Tensor | None,
    kv_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    max_kv_len: int | None,
) -> None:
    """Raises ValueError naming argument, rule and value, as `mla_triton.testing.check_inputs`."""
    # Only here, so that an ordinary call does not load what tests need.
    from mla_triton.testing.inputs import check_inputs

    check_inputs(
        q_nope,
        q_rope,
        ckv if kpe is None and scales is None else LatentCache(ckv, kpe, scales),
        pages if indptr is None else CSRPageTable(indptr, pages),
        kv_lens,
        cu_seqlens_q=cu_seqlens_q,
        max_kv_len=max_kv_len,
    )
    cache_name = "cache" if kpe is None and scales is None else "cache.ckv"
    read = {"q_nope": q_nope, "q_rope": q_rope, cache_name: ckv, "cache.kpe": kpe}
    read["cache.scales"] = scales
    _check_apart(out, lse, read)


def check_prefill(
    q: torch.Tensor,
    q_rope: torch.Tensor | None,
    k: torch.Tensor,
    k_rope: torch.Tensor | None,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    max_seqlen_q: int | None,
) -> None:
    """The same for a prefill, as `mla_triton.testing.check_prefill_inputs`."""
    from mla_triton.testing.inputs import check_prefill_inputs

    check_prefill_inputs(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q
    )
    _check_apart(out, lse, {"q": q, "q_rope": q_rope, "k": k, "k_rope": k_rope, "v": v})


def check_append(
    cache: LatentCache,
    latent: torch.Tensor,
    rope: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    cos_sin: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> None:
    """The same for an append, as `mla_triton.testing.check_append_inputs`."""
    from mla_triton.testing.inputs import check_append_inputs

    check_append_inputs(cache, latent, rope, slot_mapping, cos_sin=cos_sin, positions=positions)


def check_gather(
    cache: LatentCache,
    pages: torch.Tensor,
    indptr: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor,
    starts: torch.Tensor | None,
    rows: int,
) -> None:
    """The same for a gather, as `mla_triton.testing.check_gather_inputs`."""
    from mla_triton.testing.inputs import check_gather_inputs

    table = pages if indptr is None else CSRPageTable(indptr, pages)
    check_gather_inputs(cache, table, cu_seqlens_k, rows=rows, starts=starts)


def check_copy(
    read: Sequence[torch.Tensor],
    written: Sequence[torch.Tensor],
    source_pages: torch.Tensor,
    target_pages: torch.Tensor,
) -> None:
    """The same for a copy of pages, as `mla_triton.testing.check_copy_inputs`."""
    from mla_triton.testing.inputs import check_copy_inputs

    in_place = memory.share(memory.of(read[0]), memory.of(written[0]))
    check_copy_inputs(source_pages, target_pages, (len(read[0]), len(written[0])), in_place)


def _check_apart(
    out: torch.Tensor, lse: torch.Tensor, read: dict[str, torch.Tensor | None]
) -> None:
    for name, result, others in (("out", out, read | {"lse": lse}), ("lse", lse, read)):
        for other_name, other in others.items():
            if other is not None and memory.share(memory.of(result), memory.of(other)):
                rule = f"not share memory with {other_name}"
                fail(ValueError, name, rule, "tensors that overlap")


def check_schedule(
    schedule: torch.Tensor,
    make_schedule: Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor, list[int]], None],
    kv_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    planned: list[int],
) -> None:
    """Raises ValueError where the schedule of a plan is not that of the lengths there are now."""
    # Made over a copy: what a schedule leaves unwritten stays equal.
    fresh = schedule.clone()
    make_schedule(kv_lens, cu_seqlens_q, fresh, planned)
    if not torch.equal(schedule, fresh):
        rule = "be of the lengths of this call (Plan.update makes it so)"
        fail(ValueError, "plan", rule, "a schedule of other lengths")
