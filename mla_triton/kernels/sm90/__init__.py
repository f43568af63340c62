"""Kernels for Hopper (capability 9.0), in Gluon."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch


@lru_cache(maxsize=1)
def load_decode() -> tuple[ModuleType | None, str]:
    """(the decode module, "") or, with a Triton whose Gluon it cannot use, (None, why)."""
    try:
        return import_module("mla_triton.kernels.sm90.decode"), ""
    except (ImportError, AttributeError) as error:
        # Gluon is experimental: a name that moved is no reason to go without any kernel.
        return None, f"this Triton's Gluon is not one that it knows: {error}"


def why_not_loaded() -> str | None:
    """The reason why there is no decode module, or None.

    A compiler that traces a plan cannot look into an import, and is told that there is one: what
    runs if there is none follows the plan.
    """
    return None if torch.compiler.is_compiling() else load_decode()[1] or None
