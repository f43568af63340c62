"""Kernels for `tests/test_workers.py`: a small one, and one that is refused."""

from __future__ import annotations

import os

import triton
import triton.language as tl

if os.environ.get("ODD_KERNELS_PRINT"):
    print("words")
    os.write(1, b"words past Python")


@triton.jit
def fill(target, number, COUNT: tl.constexpr):
    """Sets `COUNT` elements."""
    tl.store(target + tl.arange(0, COUNT), number)


@triton.jit
def does_not_compile(target, number, COUNT: tl.constexpr):
    tl.store(target + tl.arange(0, COUNT), there_is_no_such_name)  # noqa: F821
