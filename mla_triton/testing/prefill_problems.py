"""Prefill problems made to catch a kernel that reads, writes or computes what it must not.

Always: behind the last sequence's keys, values and rotary keys there are rows of NaN. On request:
strided views with NaN between their rows, logits of about 900 either way, equal keys, one key that
outweighs all others, values that are all alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, pairwise
from typing import Any

import torch

from mla_triton.testing.problems import (
    LARGE_LOGIT,
    Logits,
    head_major,
    int32,
    moved,
    padded,
    shape_keys,
)

SPARE_ROWS = 5
"""Rows of NaN behind the last key."""


@dataclass(frozen=True, repr=False)
class PrefillInputs:
    """The arguments of one call of `mla_triton.prefill`, and where they came from."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    softmax_scale: float
    causal: bool = True
    q_rope: torch.Tensor | None = None
    k_rope: torch.Tensor | None = None
    padding: int = 0
    """Columns between the rows of strided tensors."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The arguments of `prefill_inputs` that made this problem."""

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    def call_arguments(self) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """Positional and keyword arguments, for `mla_triton.prefill` and for the reference."""
        names = ("cu_seqlens_q", "cu_seqlens_k", "softmax_scale", "causal", "q_rope", "k_rope")
        return (self.q, self.k, self.v), {name: getattr(self, name) for name in names}

    def output_buffers(self) -> dict[str, torch.Tensor]:
        """`out` and `lse` filled with NaN, strided where the inputs are."""
        rows, device = self.q.shape[:-1], self.q.device
        out = torch.full((*rows, self.v.shape[-1]), float("nan"), dtype=self.dtype, device=device)
        lse = torch.full(rows, float("nan"), dtype=torch.float32, device=device)
        return {"out": padded(out, self.padding), "lse": padded(lse, self.padding)}

    def to(self, device: torch.device | str) -> PrefillInputs:
        """The same problem on another device, strides included."""
        return replace(self, **{f.name: moved(getattr(self, f.name), device) for f in fields(self)})

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.recipe.items())
        return f"prefill_inputs({arguments})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How IPython and hypothesis print it, which would else spell out every tensor."""
        printer.text(repr(self))


def prefill_inputs(
    *,
    q_lens: Sequence[int],
    k_lens: Sequence[int] | None = None,
    heads: int = 4,
    kv_heads: int | None = None,
    qk: int = 192,
    v_dim: int = 128,
    rope: int = 64,
    split_q: bool = False,
    split_k: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = True,
    strided: bool | int = False,
    logits: Logits = "normal",
    constant_values: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> PrefillInputs:
    """A random prefill problem; the same arguments give the same values on every device.

    `q_lens` and `k_lens` are the queries and keys of each sequence, as many keys as queries by
    default; either may be 0, and queries may outnumber keys. The last `rope` columns of a key are
    the same in all heads; `split_k` gives them as a tensor of their own, `split_q` those of the
    queries. `strided` leaves 16 bytes between the rows of all tensors, or as many columns as it
    says: an odd number misaligns them. Queries then also lie head by head. `logits` is as in
    `decode_inputs`.
    """
    recipe = {name: value for name, value in locals().items() if name != "device"}
    padding = 16 // dtype.itemsize if strided is True else int(strided)
    generator = torch.Generator().manual_seed(seed)
    q_bounds = list(accumulate(q_lens, initial=0))
    k_bounds = list(accumulate(q_lens if k_lens is None else k_lens, initial=0))
    kv_heads, scale, nope = kv_heads or heads, qk**-0.5, qk - rope

    query = torch.randn(q_bounds[-1], heads, qk, generator=generator)
    if logits == "large":
        query *= LARGE_LOGIT / (3 * scale * qk**0.5)
    keys = torch.randn(k_bounds[-1], kv_heads, qk, generator=generator)
    for queries, own in zip(pairwise(q_bounds), pairwise(k_bounds), strict=True):
        shape_keys(keys[slice(*own)], query[slice(*queries)], logits, generator)
    keys[..., nope:] = keys[:, :1, nope:].clone()
    values = torch.randn(k_bounds[-1], kv_heads, v_dim, generator=generator)
    if constant_values:
        values[:] = torch.randn(v_dim, generator=generator)

    query, keys, values = (tensor.to(dtype) for tensor in (query, keys, values))
    keys, values = _with_spare_rows(keys), _with_spare_rows(values)
    inputs = PrefillInputs(
        q=head_major(query[..., :nope] if split_q else query, padding),
        k=padded(keys[..., :nope] if split_k else keys, padding),
        v=padded(values, padding),
        cu_seqlens_q=int32(q_bounds),
        cu_seqlens_k=int32(k_bounds),
        softmax_scale=scale,
        causal=causal,
        q_rope=padded(query[..., nope:], padding) if split_q else None,
        k_rope=padded(keys[:, 0, nope:], padding) if split_k else None,
        padding=padding,
        recipe=recipe,
    )
    return inputs.to(device)


def whole(inputs: PrefillInputs) -> PrefillInputs:
    """The same problem with rotary columns copied to where a query or a key has the others."""
    q, k = inputs.q, inputs.k
    if inputs.q_rope is not None:
        q = torch.cat([q, inputs.q_rope], dim=-1)
    if inputs.k_rope is not None:
        shared = inputs.k_rope[:, None].expand(-1, k.shape[1], -1)
        k = torch.cat([k, shared], dim=-1)
    return replace(inputs, q=q, k=k, q_rope=None, k_rope=None)


def _with_spare_rows(tensor: torch.Tensor) -> torch.Tensor:
    spare = tensor.new_full((SPARE_ROWS, *tensor.shape[1:]), float("nan"))
    return torch.cat([tensor, spare])
