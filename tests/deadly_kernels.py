"""A module that ends every process that is told to be ended: as a compiler's crash does."""

from __future__ import annotations

import os
import signal

import triton
import triton.language as tl

if os.environ.get("DEADLY_KERNELS"):
    os.kill(os.getpid(), signal.SIGKILL)


@triton.jit
def fill(target, number, COUNT: tl.constexpr):
    tl.store(target + tl.arange(0, COUNT), number)
