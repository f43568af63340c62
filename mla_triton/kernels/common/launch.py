"""From a kernel and its compile-time choices to machine code and a launch: the one path to Triton.

A `Variant` is everything machine code depends on. It compiles for any target without a GPU, and the
same variant is what a call launches, so that what was checked or warmed up is what runs. Triton's
own launch path (`kernel[grid](...)`) looks at every argument of every call to find the variant
again; a `Launcher` keeps the compiled handle and hands the arguments to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mla_triton.device import Device

TYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
ALIGNMENT = 16
"""What an aligned argument is a multiple of: bytes of a pointer, elements of a stride."""


def target_of(device: Device) -> GPUTarget:
    """What Triton calls a device; ValueError for one without machine code."""
    if device.backend == "hip":
        return GPUTarget("hip", device.arch, 64)
    if device.capability is None:
        raise ValueError(f"device must be a GPU to compile for, got {device.label}")
    major, minor = device.capability
    return GPUTarget("cuda", 10 * major + minor, 32)


def emulates_bf16(dtype: torch.dtype, device: Device) -> bool:
    """Whether bfloat16 arithmetic has to be spelt out: Triton's interpreter has none of its own."""
    return dtype == torch.bfloat16 and device.backend == "interpreter"


@dataclass(frozen=True)
class Variant:
    """A kernel at one set of compile-time choices."""

    function: Any
    """The `@triton.jit` function; its run-time arguments come first, its constants after them."""
    types: tuple[tuple[str, str], ...]
    """(name, Triton type) of the run-time arguments, in order."""
    constants: tuple[tuple[str, Any], ...]
    aligned: frozenset[str]
    """Arguments that are promised to be multiples of `ALIGNMENT`."""
    num_warps: int = 4
    num_stages: int = 1
    programmatic: bool = False
    """Launched so that it may begin before the kernel before it has ended."""

    def compile(self, device: Device) -> Any:
        """Machine code for `device`, as Triton's CompiledKernel; launches nothing, needs no GPU."""
        names = self.function.arg_names
        constants = dict(self.constants)
        signature = dict(self.types) | dict.fromkeys(constants, "constexpr")
        if tuple(signature) != tuple(names):
            raise ValueError(f"arguments of {self.function.__name__} must be {names}")
        source = ASTSource(
            self.function,
            signature,
            {(names.index(name),): value for name, value in constants.items()},
            {(names.index(name),): [["tt.divisibility", ALIGNMENT]] for name in self.aligned},
        )
        # Said, because Triton 3.10 turns its default round.
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }
        if self.programmatic:
            options["launch_pdl"] = True
        return triton.compile(source, target=target_of(device), options=options)


class Launcher:
    """A variant on one device: compiled at the first call, launched at every call."""

    def __init__(self, variant: Variant, device: Device, index: int | None) -> None:
        self.variant = variant
        self.device = device
        self.index = index
        self._pointers = sum(kind.startswith("*") for _, kind in variant.types)
        self._filler = (None,) * len(variant.constants)
        self._compiled: Any = None
        self._run: Any = None
        self._head: tuple[Any, Any] = (None, None)

    def __call__(self, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        """Launches on the device's current stream.

        `arguments` are in the variant's order: pointers first, as tensors (None for one that the
        variant does not read), then numbers.
        """
        if self.index is None:
            self.variant.function[grid](*arguments, **dict(self.variant.constants))
        elif torch.cuda.current_device() == self.index:
            self._launch(grid, arguments)
        else:
            with torch.cuda.device(self.index):
                self._launch(grid, arguments)

    def _launch(self, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        if self._run is None:
            self._load()
        count = self._pointers
        values = (
            *[None if tensor is None else tensor.data_ptr() for tensor in arguments[:count]],
            *arguments[count:],
            *self._filler,
        )
        stream = triton.runtime.driver.active.get_current_stream(self.index)
        hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
        metadata = None
        if any(chain is not None and chain.calls for chain in hooks):
            metadata = self._compiled.launch_metadata(grid, stream, *values)
        else:
            # A chain without a hook in it still costs its call.
            hooks = None, None
        self._run(*grid, stream, *self._head, metadata, *hooks, *values)

    def _load(self) -> None:
        compiled = self.variant.compile(self.device)
        # `run` puts the code on the current device and gives its launcher.
        self._run = compiled.run
        self._head = (compiled.function, compiled.packed_metadata)
        self._compiled = compiled
