"""Problems over quantised caches, in every form, and what may lie in their caches."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from mla_triton.cache.formats import E4M3
from mla_triton.cache.quantise import E8M0_NAN
from mla_triton.kernels.portable.tiles16 import half_of, whole_of
from mla_triton.testing import DecodeInputs, decode_inputs

FORMS = {
    "fp8 fused": {"stored": "fp8"},
    "fp8 pair": {"stored": "fp8", "layout": "pair"},
    "fp8 without rope": {"stored": "fp8", "rope": 0},
    "fp8 rope inside": {"stored": "fp8", "latent": 448, "value_dim": 512},
    "groups": {"stored": "fp8_groups"},
    "656": {"stored": "fp8_ds_mla"},
    "584": {"stored": "fp8_v4", "latent": 448, "value_dim": 512},
    "528": {"stored": "fp8_v41", "latent": 448, "value_dim": 512},
}
FORMS_BY_DTYPE = [
    (form, dtype)
    for form in FORMS
    for dtype in (torch.float16, torch.bfloat16)
    # Their rotary keys are bfloat16, and so must the queries be.
    if dtype == torch.bfloat16 or form not in ("656", "584")
]
SCALED = ("fp8 fused", "fp8 pair", "groups", "584", "528")
"""Forms that differ in how numbers and scales lie."""
NAN_BYTES = (0x7F, 0xFF)


def inputs_of(form: str, **changes) -> DecodeInputs:
    return decode_inputs(
        **{"kv_lens": [70, 0, 33], "s_q": 2, "heads": 4, "page_size": 16} | FORMS[form] | changes
    )


def with_cache(inputs: DecodeInputs, **parts) -> DecodeInputs:
    return replace(inputs, cache=inputs.cache._replace(**parts))


def owned_slots(inputs: DecodeInputs, requests) -> torch.Tensor:
    """`[pages, page_size]`: slots of keys of these requests of a dense table."""
    ckv = inputs.cache.ckv
    owned = torch.zeros(ckv.shape[:2], dtype=torch.bool, device=ckv.device)
    for request in requests:
        keys = torch.arange(int(inputs.kv_lens[request]), device=ckv.device)
        pages = inputs.page_table[request].long()[keys // ckv.shape[1]]
        owned[pages, keys % ckv.shape[1]] = True
    return owned


def spoilt(inputs: DecodeInputs, slots: torch.Tensor) -> DecodeInputs:
    """The same problem with NaN in these slots, of either sign: numbers, rotary keys and scales."""
    ckv, kpe, scales = (None if part is None else part.clone() for part in inputs.cache)
    both = torch.tensor(NAN_BYTES, dtype=torch.uint8, device=ckv.device)
    ckv.view(torch.uint8)[slots] = both.repeat(ckv.shape[-1] // 2)
    if kpe is not None and kpe.dtype == E4M3:
        kpe.view(torch.uint8)[slots] = both.repeat(kpe.shape[-1] // 2)
    elif kpe is not None:
        kpe[slots] = float("nan")
    if scales.dim() > 1:
        scales[slots] = E8M0_NAN if scales.dtype == torch.uint8 else float("nan")
    return with_cache(inputs, ckv=ckv, kpe=kpe, scales=scales)


def all_scales(inputs: DecodeInputs, exponent: int) -> DecodeInputs:
    """The same problem with scales of 2**exponent, and latents a 32nd of what they were: none is
    too large for bfloat16, which a number of 448 times the largest scales is.

    Queries are as small as scales are large, and the factor of the logits is so where they would
    not be normal numbers: logits are as they were.
    """
    scales, ckv = inputs.cache.scales, inputs.cache.ckv
    same = exponent + 127 if scales.dtype == torch.uint8 else 2.0**exponent
    smaller = (ckv.float() / 32).to(E4M3)
    by = max(-100, min(-exponent, 100))
    has_own_rope = scales.dim() > 1 and inputs.cache.kpe is not None
    rope_by = by + exponent if has_own_rope else by
    return replace(
        with_cache(inputs, ckv=smaller, scales=torch.full_like(scales, same)),
        q_nope=inputs.q_nope * 2.0**by,
        q_rope=inputs.q_rope * 2.0**rope_by,
        softmax_scale=inputs.softmax_scale * 2.0 ** (-exponent - by),
    )


@triton.jit
def _convert(source, target, DECODE: tl.constexpr):
    place = tl.arange(0, 256)
    numbers = whole_of(half_of(tl.load(source + place), DECODE), DECODE)
    tl.store(target + place, numbers)


def wrong_bytes(decode: str, device: str) -> list[int]:
    """Those of the 256 bytes that a way to convert e4m3 takes for another number."""
    source = torch.arange(256, device=device).to(torch.uint8)
    want = source.view(E4M3).float()
    got = torch.empty(256, dtype=torch.float16, device=device)
    _convert[(1,)](source.view(E4M3) if decode == "native" else source, got, decode)
    same = (got == want) | (got.isnan() & want.isnan())
    return source[~same].tolist()
