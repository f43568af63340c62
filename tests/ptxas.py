"""What ptxas says while it makes machine code."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import triton


def with_remarks(compile_one: Callable[[], Any]) -> tuple[Any, str]:
    """What a call compiles, whatever the cache holds, and the log of that."""
    said = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), redirect_stdout(said):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        compiled = compile_one()
    return compiled, said.getvalue()
