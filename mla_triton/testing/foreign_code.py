"""Runs on the GPU in this machine the code that is generated for another capability.

PTX made for an older target is legal on every later card. So on a Hopper card the code paths of
Ampere and Ada (mma.sync, cp.async, their configs and geometries) can be executed, not only
compiled: PTX whose `.target` is the older capability is assembled for the card that is there, and
ptxas refuses in it whatever the older card does not have.

What this shows: that the code generated for that capability computes the right numbers. What it
does not show: that it fits the older card (the compiler's metadata does, for shared memory), what
the older card's own assembler makes of it, and anything about its speed.
"""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton

from mla_triton import device as devices
from mla_triton.device import Device
from mla_triton.ops import decode, prefill

_visits = itertools.count()


@dataclass(frozen=True)
class Generated:
    """One kernel as it was compiled."""

    name: str
    ptx: str
    shared: int
    """Bytes of shared memory."""

    @property
    def target(self) -> str:
        """Such as "sm_89"."""
        line = next(line for line in self.ptx.splitlines() if line.startswith(".target"))
        return line.split()[1].rstrip(",")

    def uses(self, instruction: str) -> bool:
        """Whether an instruction such as "mma.sync" or "wgmma" is in the PTX, by its beginning."""
        return re.search(rf"(?<![\w.]){re.escape(instruction)}", self.ptx) is not None


@contextmanager
def assembled_for(card: Device, cache: Path | None = None) -> Iterator[list[Generated]]:
    """Inside, code for any older capability is assembled for `card`; yields what is compiled.

    Triton's cache knows nothing of the change, so a fresh one is used, or a folder `cache` that
    holds nothing else: what is found there is not compiled, and not yielded.
    """
    if card.capability is None:
        raise ValueError(f"card must be an NVIDIA GPU, got {card.label}")
    major, minor = card.capability
    kernels: list[Generated] = []

    def inspect(
        backend: Any = None,
        stages: Any = None,
        options: Any = None,
        language: Any = None,
        capability: Any = None,
    ) -> Any:
        if stages is None:  # later versions of Triton ask for a part of the cache key
            return f"assembled for {card.arch}", card.arch

        def assemble(ptx: str, metadata: dict[str, Any]) -> Any:
            kernels.append(Generated(metadata["name"], ptx, metadata["shared"]))
            return backend.make_cubin(ptx, metadata, options, 10 * major + minor)

        stages["cubin"] = assemble
        return None

    knobs = triton.knobs
    with tempfile.TemporaryDirectory() as fresh, knobs.cache.scope(), knobs.runtime.scope():
        knobs.cache.dir = fresh if cache is None else str(cache)
        knobs.runtime.add_stages_inspection_hook = inspect
        yield kernels


@contextmanager
def code_of(label: str, cache: Path | None = None) -> Iterator[list[Generated]]:
    """Inside, every operation on the current GPU runs what capability `label` would run.

    Implementation, config and geometry are chosen as on that card, but for the number of SMs, which
    is this card's. Yields the kernels as they are compiled; `cache` is as in `assembled_for`. Not
    thread-safe.

    Raises ValueError where `label` is not an older capability than this GPU's.
    """
    here, foreign = devices.current(), devices.from_label(label)
    if (foreign.capability or (99, 0)) >= (here.capability or (0, 0)):
        raise ValueError(f"label must be a capability before this card's {here.label}, got {label}")
    # Compiled kernels are kept by device: a name of its own for each visit, so that each compiles.
    disguised = Device(
        f"{here.name} running code for {label}, visit {next(_visits)}",
        foreign.backend,
        foreign.arch,
        here.sm_count,
        min(here.shared_memory, foreign.shared_memory),
    )
    index, live = torch.cuda.current_device(), devices._live

    def disguise(asked: int) -> Device:
        return disguised if asked == index else live(asked)

    # A call like one that was made before would make that one's launches again.
    forget_calls()
    try:
        with assembled_for(here, cache) as kernels, patch.object(devices, "_live", disguise):
            yield kernels
    finally:
        forget_calls()


def forget_calls() -> None:
    """Lets the next call of each operation go the whole way."""
    decode.RECALLED.clear()
    prefill.RECALLED.clear()
