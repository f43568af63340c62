"""A decode kernel in PyTorch, with the faults that kernels have.

Without a fault it does what ours do, tiles, running maximum, base 2, parts merged by lse, so that
the error budget is tried on an order of operations that the same-precision run does not have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mla_triton.reference.decode import Request, requests
from mla_triton.state import AttentionState
from mla_triton.testing import DecodeInputs

LOG2_E = math.log2(math.e)


def keep(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def to_bfloat16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16().float()


def to_tf32(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@dataclass(frozen=True)
class Faults:
    scale: float = 1.0
    """Factor on softmax_scale."""
    see: int = 0
    """Keys that a query sees beyond, or short of, its last one."""
    drop: int | None = None
    """A key that is passed over."""
    forget_rescale: bool = False
    """Leaves the accumulator at the old maximum when a new one comes."""
    lose_part: bool = False
    """Merges all parts but the last."""
    skip_rope: bool = False
    swap_heads: bool = False
    lse_in_base_2: bool = False
    round_operand: Callable[[torch.Tensor], torch.Tensor] = keep
    round_weights: Callable[[torch.Tensor], torch.Tensor] = keep
    round_accumulator: Callable[[torch.Tensor], torch.Tensor] = keep
    round_partial: Callable[[torch.Tensor], torch.Tensor] = keep


def flash_decode(
    inputs: DecodeInputs, tile: int = 32, parts: int = 3, faults: Faults | None = None
) -> AttentionState:
    faults = faults or Faults()
    arguments, options = inputs.call_arguments()
    del options["softmax_scale"]
    buffers = inputs.output_buffers()
    out, lse = buffers["out"].zero_(), buffers["lse"].fill_(-math.inf)
    for request in requests(*arguments, **options):
        length = len(request.keys)
        tiles = -(-length // tile)
        step = -(-tiles // parts) * tile
        states = [
            _part(inputs, request, begin, min(length, begin + step), tile, faults)
            for begin in range(0, length, step)
        ]
        if faults.lose_part and len(states) > 1:
            states.pop()
        merged_out, merged_lse = _merge(states, faults)
        out[request.rows] = merged_out.to(out.dtype)
        lse[request.rows] = merged_lse * (LOG2_E if faults.lse_in_base_2 else 1.0)
    if faults.swap_heads:
        out = out.roll(1, dims=-2)
    return AttentionState(out, lse)


def _part(
    inputs: DecodeInputs,
    request: Request,
    begin: int,
    end: int,
    tile: int,
    faults: Faults,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, latent = inputs.q_nope.dtype, inputs.q_nope.shape[-1]
    value_dim = inputs.value_dim or latent
    scale = torch.tensor(inputs.softmax_scale * faults.scale * LOG2_E)
    query = faults.round_operand(request.query.float())
    s_q = len(query)
    running_max = torch.full(query.shape[:-1], -math.inf)
    total = torch.zeros_like(running_max)
    accumulator = torch.zeros(*running_max.shape, value_dim)
    for first in range(begin, end, tile):
        position = torch.arange(first, min(end, first + tile))
        keys = faults.round_operand(request.keys[position].to(dtype).float())
        last = torch.full((s_q, 1), len(request.keys))
        if inputs.causal:
            last = torch.arange(s_q)[:, None] + len(request.keys) - s_q + faults.see
        visible = (position <= last) & (position != faults.drop)
        width = latent if faults.skip_rope else query.shape[-1]
        logits = query[..., :width] @ keys[:, :width].T * scale
        logits = logits.masked_fill(~visible[:, None], -math.inf)
        new_max = torch.maximum(running_max, logits.amax(-1))
        base = new_max.masked_fill(new_max == -math.inf, 0.0)
        weights = torch.exp2(logits - base[..., None])
        rescale = torch.exp2(running_max - base)
        total = total * rescale + weights.sum(-1)
        if not faults.forget_rescale:
            accumulator = accumulator * rescale[..., None]
        weights = faults.round_weights(weights.to(dtype).float())
        accumulator = faults.round_accumulator(accumulator + weights @ keys[:, :value_dim])
        running_max = new_max
    seen = total > 0
    out = torch.where(seen[..., None], accumulator / total[..., None], 0.0)
    return out, torch.where(seen, (running_max + total.log2()) / LOG2_E, -math.inf)


def _merge(
    states: list[tuple[torch.Tensor, torch.Tensor]], faults: Faults
) -> tuple[torch.Tensor, torch.Tensor]:
    outs = torch.stack([faults.round_partial(out) for out, _ in states])
    lses = torch.stack([lse for _, lse in states])
    largest = lses.amax(0)
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    weights = torch.exp(lses - largest)
    total = weights.sum(0)
    out = (outs * weights[..., None]).sum(0) / total.clamp_min(1e-38)[..., None]
    return out, largest + total.log()
