"""The tensors of one call, as the kernels take them."""

from __future__ import annotations

from typing import NamedTuple

import torch


class DecodeTensors(NamedTuple):
    """What a decode launch reads and writes; shapes as in `mla_triton.decode`."""

    q_nope: torch.Tensor
    q_rope: torch.Tensor | None
    ckv: torch.Tensor
    """The latents, or latents and rotary keys in one tensor."""
    kpe: torch.Tensor | None
    scales: torch.Tensor | None
    """Of a quantised cache; as `LatentCache` has them."""
    pages: torch.Tensor
    """Dense page table, or the indices of a CSR one."""
    indptr: torch.Tensor | None
    kv_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    schedule: torch.Tensor
    planned_kv_len: int
    """The bound of lengths that the schedule was made under."""
    partial_out: torch.Tensor
    """float32 `[Geometry.partial_rows, value_dim]`."""
    partial_lse: torch.Tensor
    """float32 `[Geometry.partial_rows]`, base 2."""
    out: torch.Tensor
    lse: torch.Tensor
    softmax_scale: float


class PrefillTensors(NamedTuple):
    """What a prefill launch reads and writes; shapes as in `mla_triton.prefill`."""

    q: torch.Tensor
    q_rope: torch.Tensor | None
    k: torch.Tensor
    k_rope: torch.Tensor | None
    """`[keys, rope]`, one for all heads."""
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    softmax_scale: float


def strides(tensor: torch.Tensor | None, ragged: bool) -> tuple[int, int, int]:
    """(request, token, head) strides of `[batch, s_q, heads, ...]` or `[tokens, heads, ...]`."""
    if tensor is None:
        return 0, 0, 0
    steps = tensor.stride()
    return (0, steps[0], steps[1]) if ragged else (steps[0], steps[1], steps[2])
