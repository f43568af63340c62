"""Where a result was computed: versions, driver, cards, directories."""

from __future__ import annotations

import platform
import subprocess
from typing import Any

import torch
import triton

import mla_triton
from mla_triton import debug
from mla_triton import device as devices
from mla_triton.configs import cache_directory
from mla_triton.explain import device_facts, device_line


def facts() -> dict[str, Any]:
    """Plain values, ready for JSON. The directories may hold a user's name."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "versions": {
            "mla_triton": mla_triton.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "platform": platform.platform(),
        "torch_built_for": _built_for(),
        "driver": driver(),
        "devices": [device_facts(devices.of(torch.device("cuda", n))) for n in range(count)],
        "interpreter": devices.interpreting(),
        "debug_checks": debug.switched_on(),
        "cache_directory": str(cache_directory()),
        "triton_cache_directory": str(triton.knobs.cache.dir),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people: a name, and what it is."""
    return [f"{name:<11} {value}".rstrip() for name, value in entries(found)]


def entries(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of each line; a name that is empty goes on with the one before."""
    cpu = "the portable kernels, interpreted" if found["interpreter"] else "the reference"
    made = list(found["versions"].items())
    made.append(("platform", found["platform"]))
    if found["torch_built_for"] is not None:
        made.append(("built for", found["torch_built_for"]))
    if found["driver"] is not None:
        made.append(("driver", found["driver"]))
    for device in found["devices"]:
        made.append(("device", device_line(device)))
        made += [("configs", table) for table in device["tables"] or ["no table: heuristic"]]
    if not found["devices"]:
        made.append(("device", "no GPU"))
    state = "on" if found["interpreter"] else "off"
    made.append(("interpreter", f"{state}: CPU tensors run {cpu}"))
    if found["debug_checks"]:
        made.append(("debug", "calls verify lengths, page ids and plans (MLA_TRITON_DEBUG)"))
    made.append(("cache", found["cache_directory"]))
    made.append(("", f"{found['triton_cache_directory']} (Triton's own)"))
    return made


def _built_for() -> str | None:
    """What the PyTorch here was compiled for; None of a build for the CPU."""
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return None if torch.version.cuda is None else f"CUDA {torch.version.cuda}"


def driver() -> str | None:
    """The version of the GPU's driver as `nvidia-smi` says it; None where there is none to ask."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return ", ".join(sorted(set(done.stdout.split()))) or None
