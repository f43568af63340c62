"""What the Hopper kernels take of Gluon, under one set of names.

Gluon is experimental: names move from one release of Triton to the next. This module alone imports
it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.experimental.gluon
import triton.experimental.gluon.language
from triton.experimental.gluon import _runtime
from triton.experimental.gluon.language.nvidia import ampere, hopper
from triton.language import core


def _first(module: Any, *names: str) -> Any:
    """The attribute that this release has; AttributeError naming all of them where it has none."""
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"Triton {triton.__version__} has none of {', '.join(names)}")


gluon = triton.experimental.gluon
gl = triton.experimental.gluon.language
GluonASTSource = _runtime.GluonASTSource
aggregate = core._aggregate
mbarrier = hopper.mbarrier
fence_async_shared = hopper.fence_async_shared
warpgroup_mma = hopper.warpgroup_mma
warpgroup_mma_wait = hopper.warpgroup_mma_wait
# The newer name first: a release that has both refuses the older one when it is called.
copy_tile = _first(hopper.tma, "async_load", "async_copy_global_to_shared")
copy_async = _first(ampere.async_copy, "async_load", "async_copy_global_to_shared")
commit_copies = ampere.async_copy.commit_group
arrive_copies = ampere.async_copy.mbarrier_arrive
wait_copies = ampere.async_copy.wait_group
sync_threads = _first(gl, "barrier", "thread_barrier")
