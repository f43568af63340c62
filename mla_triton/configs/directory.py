"""Where tuned configurations of this machine are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """The user's own cache, made by whoever first writes to it.

    `MLA_TRITON_CACHE_DIR`, or `mla_triton` below `XDG_CACHE_HOME` (`~/.cache`).
    """
    named = os.environ.get("MLA_TRITON_CACHE_DIR")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mla_triton"
