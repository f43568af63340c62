"""Decode compiled for a card with any config, whatever the rules say of it."""

from __future__ import annotations

import torch

from mla_triton import device as devices
from mla_triton.kernels.portable.decode_config import Config
from mla_triton.testing.compilation import problem


def shared_memory_of(asked: tuple[str, str, tuple[int, int, int]]) -> int:
    """Bytes a program, of (card, dtype, config); Triton must not be interpreting."""
    from mla_triton.kernels.portable import decode

    label, dtype, config = asked
    card, what = devices.from_label(label), problem(getattr(torch, dtype))
    compiled = decode.compile(what, Config(*config), decode.geometry(what, card), card)
    return int(compiled.metadata.shared)
