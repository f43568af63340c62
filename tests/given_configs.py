"""Decode with configs that a test chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

from mla_triton import configs
from mla_triton.configs import Choice
from mla_triton.ops import decode as operation


@contextmanager
def choosing(choose: Callable[..., Choice]) -> Iterator[None]:
    """Inside, `choose` is in the place of `mla_triton.configs.choose`, and takes what it takes."""
    operation.forget()
    try:
        with patch.object(configs, "choose", choose):
            yield
    finally:
        # Nothing that is kept may outlive what was chosen.
        operation.forget()
