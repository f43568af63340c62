"""Decode and prefill with configs that a test chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

from mla_triton import configs
from mla_triton.configs import Choice
from mla_triton.ops import decode, prefill


@contextmanager
def choosing(choose: Callable[..., Choice]) -> Iterator[None]:
    """Inside, `choose` is in the place of `mla_triton.configs.choose`, and takes what it takes."""
    forget()
    try:
        with patch.object(configs, "choose", choose):
            yield
    finally:
        # Nothing that is kept may outlive what was chosen.
        forget()


def forget() -> None:
    """Lets the next calls look their configs up."""
    decode.forget()
    prefill.forget()
