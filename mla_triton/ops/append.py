"""Append: this step's tokens into the pages of a latent cache."""

from __future__ import annotations

import torch

from mla_triton import debug, reference, select, validate, validate_append, validate_stored
from mla_triton import device as devices
from mla_triton.cache import LatentCache
from mla_triton.kernels.portable.append import AppendTensors
from mla_triton.ops.library import LIBRARY
from mla_triton.ops.prepare import prepare
from mla_triton.ops.recall import is_plain_eager


def append(
    cache: torch.Tensor | LatentCache,
    latent: torch.Tensor,
    rope: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    cos_sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    rope_style: str = "interleaved",
    power_of_two_scales: bool = True,
    impl: str | None = None,
) -> None:
    """Writes tokens to the slots of a cache, in the cache's numbers; one launch.

    A slot is `page * page_size + place`. Nothing is written for a token whose slot is negative or
    not in the cache. Of several tokens with one slot, that slot holds a mixture, each number that
    of one of them; the reference keeps the last. All other slots are as they were.

    Args:
        cache: `[pages, page_size, latent + rope]`, or a `LatentCache`, of any format.
        latent: `[tokens, latent]` float16, bfloat16 or float32; any stride but the last.
        rope: `[tokens, rope]` likewise, the rotary key; None where the model has none. It goes into
            `cache.kpe`, or behind the latent where there is none.
        slot_mapping: int32 or int64 `[tokens]`.
        norm_weight: `[latent]`, of an RMSNorm that the latent goes through first, with `norm_eps`.
        cos_sin: `[max_positions, rope]` float16, bfloat16 or float32, cosines in the first half of
            the columns and sines in the second, of a rotation that the key goes through first; with
            `positions`, int32 or int64 `[tokens]`, clamped to those that there are.
        rope_style: which columns are a pair: "interleaved", neighbours; "half", one of each half.
        power_of_two_scales: whether float32 scales of groups are; e8m0 scales always are.
        impl: "portable" or "reference"; refused with a reason where it cannot run, never replaced.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message names argument, rule and
            value.
        NotImplementedError: no implementation, or not `impl`, can take the problem; says why.
    """
    parts = validate.unpack_cache(cache)
    validate.check_impl(impl)
    validate.check_tensor("latent", latent)
    validate.check_tensor("slot_mapping", slot_mapping)
    given = {"rope": rope, "norm_weight": norm_weight, "cos_sin": cos_sin, "positions": positions}
    for name, tensor in given.items():
        if tensor is not None:
            validate.check_tensor(name, tensor)
    validate_append.check_style(rope_style)
    validate.check_flag("power_of_two_scales", power_of_two_scales)
    eps = validate.number("norm_eps", norm_eps)
    tensors = (*parts, latent, rope, slot_mapping, norm_weight, cos_sin, positions)
    direct = is_plain_eager() and all(t is None or type(t) is torch.Tensor for t in tensors)
    if direct and (latent.is_cuda or latent.device.type == "cpu"):
        _append(*tensors, eps, rope_style, power_of_two_scales, impl)
    else:
        torch.ops.mla_triton.append(*tensors, eps, rope_style, power_of_two_scales, impl)


LIBRARY.define(
    "append(Tensor(a!) ckv, Tensor(b!)? kpe, Tensor(c!)? scales, Tensor latent, Tensor? rope, "
    "Tensor slot_mapping, Tensor? norm_weight, Tensor? cos_sin, Tensor? positions, "
    "float norm_eps, str rope_style, bool power_of_two_scales, str? impl) -> ()"
)


def _append(
    ckv: torch.Tensor,
    kpe: torch.Tensor | None,
    scales: torch.Tensor | None,
    latent: torch.Tensor,
    rope: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    norm_weight: torch.Tensor | None,
    cos_sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    norm_eps: float,
    rope_style: str,
    power_of_two_scales: bool,
    impl: str | None,
) -> None:
    cache = LatentCache(ckv, kpe, scales)
    problem = validate_append.append(
        cache, latent, rope, slot_mapping, norm_weight, cos_sin, positions, rope_style,
        power_of_two_scales,
    )  # fmt: skip
    if debug.wanted(latent):
        debug.check_append(cache, latent, rope, slot_mapping, cos_sin, positions)
    device = devices.of(latent.device)
    chosen = select.append(problem, device, impl)
    if problem.tokens == 0:
        return
    if chosen.name == "reference":
        reference.append(
            cache, latent, rope, slot_mapping, norm_weight=norm_weight, norm_eps=norm_eps,
            cos_sin=cos_sin, positions=positions, rope_style=rope_style,
            power_of_two_scales=power_of_two_scales,
        )  # fmt: skip
        return
    ready = prepare(chosen.module, problem, device, latent.device.index)
    latents, keys, own_scales, key_scales = validate_stored.parts(cache, problem.stored)
    tensors = AppendTensors(
        latent, rope, slot_mapping, latents, keys, own_scales, key_scales, norm_weight, cos_sin,
        positions, norm_eps,
    )  # fmt: skip
    chosen.module.launch(ready.kernel, problem, ready.config, tensors)


def _append_fake(
    ckv: torch.Tensor,
    kpe: torch.Tensor | None,
    scales: torch.Tensor | None,
    latent: torch.Tensor,
    rope: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    norm_weight: torch.Tensor | None,
    cos_sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    norm_eps: float,
    rope_style: str,
    power_of_two_scales: bool,
    impl: str | None,
) -> None:
    """The rules alone: what is written is there."""
    validate_append.append(
        LatentCache(ckv, kpe, scales), latent, rope, slot_mapping, norm_weight, cos_sin, positions,
        rope_style, power_of_two_scales, has_memory=False,
    )  # fmt: skip


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("append", _append, _key)
torch.library.register_fake("mla_triton::append", _append_fake, lib=LIBRARY)
