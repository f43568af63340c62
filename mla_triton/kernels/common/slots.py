"""What kernels on the slots of a cache share: how their tokens lie, and which they cannot take."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mla_triton.device import Device
from mla_triton.kernels.common.launch import TYPE_NAMES
from mla_triton.problem_cache import Stored

MAX_LATENT = 4096
"""Columns of a token, which one program has to hold whole."""
NAMES = TYPE_NAMES | {
    torch.float8_e4m3fn: "u8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


def pointer_type(dtype: torch.dtype | None) -> str:
    """Triton's name; e4m3 is bytes to it. Of what is absent it is of no matter."""
    return "*i32" if dtype is None else f"*{NAMES[dtype]}"


def why_not_card(device: Device) -> str | None:
    """The reason no kernel here can run on a card, or None."""
    if not device.runs_triton:
        return "the tensors are on the CPU and Triton's interpreter is off (TRITON_INTERPRET=1)"
    if device.capability is not None and device.capability < (8, 0):
        return f"it needs capability 8.0 or later, this card has {device.label}"
    return None


def why_not_stored(stored: Stored, device: Device) -> str | None:
    """The reason no kernel here can take tokens that lie so, or None."""
    reason = why_not_card(device)
    if reason is not None:
        return reason
    if max(stored.latent, stored.rope) > MAX_LATENT:
        return f"latent and rope must be at most {MAX_LATENT}, got {stored.latent}, {stored.rope}"
    if stored.group & (stored.group - 1):
        return f"groups must be of a power of two of columns, got {stored.group}"
    widths = (stored.latent, stored.rope) if stored.inside and stored.group else ()
    if any(width % stored.group for width in widths):
        return f"latent and rope part must be whole groups of {stored.group} columns"
    return None


@triton.jit
def row_pointers(base, row, step, ALIGNED: tl.constexpr):
    """Pointers to rows, int64, so many elements apart; aligned ones at multiples of 16 bytes."""
    offsets = row * step
    # Said of a result: of a function's argument it would be lost where the function is inlined.
    if ALIGNED:
        offsets = tl.multiple_of(offsets, 128 // base.dtype.element_ty.primitive_bitwidth)
    return base + offsets


@triton.jit
def slot_pointers(base, page, place, page_step, STEP: tl.constexpr, ALIGNED: tl.constexpr):
    """The same to the tokens at a place, int64, in a page."""
    offsets = page * page_step + place * STEP
    if ALIGNED:
        offsets = tl.multiple_of(offsets, 128 // base.dtype.element_ty.primitive_bitwidth)
    return base + offsets
