"""The one place that asks which GPU this is and what it can do.

Everything else reads a `Device`: a plain value that a live card, a capability typed by a user
(`mla-triton explain --capability 8.9`) and Triton's interpreter all give alike.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

KIB = 1024


@dataclass(frozen=True)
class Device:
    """A compute device as the kernels see it."""

    name: str
    backend: str
    """"cuda", "hip", "interpreter" (Triton on the CPU) or "cpu" (no Triton)."""
    arch: str
    """"sm_90", "gfx942", or the back end's name on the CPU."""
    sm_count: int
    """Streaming multiprocessors (NVIDIA) or compute units (AMD)."""
    shared_memory: int
    """Bytes of shared memory that one program may use."""
    modelled: bool = False
    """True for a card described by its capability alone, not present in this machine."""

    @property
    def capability(self) -> tuple[int, int] | None:
        """(major, minor) on NVIDIA, else None."""
        if self.backend != "cuda":
            return None
        number = int(self.arch.removeprefix("sm_"))
        return number // 10, number % 10

    @property
    def label(self) -> str:
        """The capability as users write it: "8.9", "gfx942", "interpreter", "cpu"."""
        if self.capability is None:
            return self.arch
        return f"{self.capability[0]}.{self.capability[1]}"

    @property
    def runs_triton(self) -> bool:
        return self.backend != "cpu"

    @property
    def has_async_copy(self) -> bool:
        """cp.async: global to shared memory without registers."""
        return self.capability is not None and self.capability >= (8, 0)

    @property
    def has_wgmma(self) -> bool:
        """Warpgroup matrix instructions: Hopper alone; Blackwell has tcgen05 instead."""
        return self.capability is not None and self.capability[0] == 9

    @property
    def has_tcgen05(self) -> bool:
        return self.capability is not None and self.capability[0] == 10

    @property
    def has_tma(self) -> bool:
        return self.capability is not None and self.capability >= (9, 0)

    @property
    def has_tf32(self) -> bool:
        """Matrix instructions that round float32 operands to tf32 (xf32 on AMD)."""
        return self.arch == "gfx942" or self.has_async_copy

    @property
    def has_fp8(self) -> bool:
        """e4m3 conversion in hardware."""
        if self.backend == "hip":
            return self.arch in ("gfx942", "gfx950")
        return self.capability is not None and self.capability >= (8, 9)

    @property
    def has_programmatic_launch(self) -> bool:
        """A dependent kernel may start its prologue before the one before it has ended."""
        return self.capability is not None and self.capability >= (9, 0)

    def features(self) -> dict[str, bool]:
        names = ("async_copy", "wgmma", "tcgen05", "tma", "tf32", "fp8", "programmatic_launch")
        return {name: getattr(self, f"has_{name}") for name in names}


# SM count of the usual card, and the shared memory one program may take (CUDA C++ Programming
# Guide, table of technical specifications; AMD: LDS of a compute unit).
KNOWN = {
    "8.0": ("A100", 108, 163 * KIB),
    "8.6": ("RTX 3090", 82, 99 * KIB),
    "8.7": ("Jetson Orin", 16, 163 * KIB),
    "8.9": ("RTX 4090", 128, 99 * KIB),
    "9.0": ("H200", 132, 227 * KIB),
    "10.0": ("B200", 148, 227 * KIB),
    "10.3": ("B300", 148, 227 * KIB),
    "11.0": ("Jetson Thor", 20, 227 * KIB),
    "12.0": ("RTX 5090", 170, 99 * KIB),
    "12.1": ("DGX Spark", 48, 99 * KIB),
    "gfx942": ("MI300X", 304, 64 * KIB),
    "gfx950": ("MI355X", 256, 160 * KIB),
}

CPU = Device("cpu", "cpu", "cpu", sm_count=1, shared_memory=0)

# Few parts, so that interpreted tests still split, and no limit that Python would have.
INTERPRETER = Device("Triton interpreter", "interpreter", "interpreter", 4, 1 << 30)


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def from_label(label: str) -> Device:
    """A card described by its capability ("8.9") or architecture ("gfx942"), without having one.

    Raises ValueError for a label that names no card the package knows.
    """
    if label in ("cpu", "interpreter"):
        return CPU if label == "cpu" else INTERPRETER
    if label not in KNOWN:
        known = ", ".join(KNOWN)
        raise ValueError(f"capability must be one of {known}, got {label!r}")
    name, sm_count, shared_memory = KNOWN[label]
    if label.startswith("gfx"):
        return Device(name, "hip", label, sm_count, shared_memory, modelled=True)
    arch = "sm_" + label.replace(".", "")
    return Device(name, "cuda", arch, sm_count, shared_memory, modelled=True)


def of(device: torch.device) -> Device:
    """The device that tensors on `device` are computed on."""
    if device.type != "cuda":
        return INTERPRETER if device.type == "cpu" and interpreting() else CPU
    index = torch.cuda.current_device() if device.index is None else device.index
    return _live(index)


def current() -> Device:
    """The GPU in this machine, or else what CPU tensors run on."""
    return of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@cache
def _live(index: int) -> Device:
    # torch's stubs lack some of the properties that it has.
    properties: Any = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
        shared_memory = KNOWN[arch][2] if arch in KNOWN else 64 * KIB
        return Device(properties.name, "hip", arch, properties.multi_processor_count, shared_memory)
    return Device(
        properties.name,
        "cuda",
        f"sm_{properties.major}{properties.minor}",
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )
