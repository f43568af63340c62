"""Kernels for Hopper (capability 9.0), in Gluon."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch


@cache
def load(operation: str) -> tuple[ModuleType | None, str]:
    """(the module of an operation, "") or, with a Triton whose Gluon it cannot use, (None, why)."""
    try:
        return import_module(f"mla_triton.kernels.sm90.{operation}"), ""
    except (ImportError, AttributeError) as error:
        # Gluon is experimental: a name that moved is no reason to go without any kernel.
        return None, f"this Triton's Gluon is not one that it knows: {error}"


def why_not_loaded(operation: str) -> str | None:
    """The reason why there is no module of an operation, or None.

    A compiler that traces a plan cannot look into an import, and is told that there is one: what
    runs if there is none follows the plan.
    """
    return None if torch.compiler.is_compiling() else load(operation)[1] or None
