"""From a kernel and its compile-time choices to machine code and a launch: the one path to Triton.

A `Variant` is everything machine code depends on. It compiles for any target without a GPU, and the
same variant is what a call launches, so that what was checked or warmed up is what runs. Triton's
own launch path (`kernel[grid](...)`) looks at every argument of every call to find the variant
again; a `Launcher` keeps the compiled handle and hands the arguments to it.

Arguments come in three kinds and in this order: pointers, given as tensors; maps, TMA descriptors,
given as a `View` of a tensor; numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mla_triton.device import Device

TYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
Grid = tuple[int, int, int]
Launch = Callable[[Grid, Sequence[Any]], None]
"""What launches a kernel: takes a grid, and arguments as a `Launcher` does."""
KNOWN_LAUNCHER = "3.6."
"""The version of Triton whose launcher for NVIDIA is known well enough to call its compiled part
alone."""
ALIGNMENT = 16
"""What an aligned argument is a multiple of: bytes of a pointer, elements of a stride."""
KEPT_MAPS = 4096
"""TMA descriptors that a launcher keeps: two for each layer's cache."""
Sizes = tuple[int, ...]


class View(NamedTuple):
    """A tensor as a kernel's TMA descriptor sees it, whatever its own shape is."""

    tensor: torch.Tensor
    shape: Sizes
    strides: Sizes
    """Elements from one index to the next; 1 in the last dimension."""


@dataclass(frozen=True)
class Described:
    """Memory at an address, with the attributes that Triton asks a descriptor for."""

    address: int
    shape: Sizes
    strides: Sizes
    padding: str = "zero"
    round_f32_to_tf32: bool = False

    @property
    def base(self) -> Described:
        return self

    def data_ptr(self) -> int:
        return self.address


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
    max_registers: int | None = None
    """Registers of a thread at most, where the compiler can be told (NVIDIA)."""
    source: type[ASTSource] = ASTSource
    """What Triton calls a source in the language of the function: Triton, or Gluon's own."""

    def compile(self, device: Device) -> Any:
        """Machine code for `device`, as Triton's CompiledKernel; launches nothing, needs no GPU."""
        return self._compile(self.source, device)

    def is_compiled(self, device: Device) -> bool:
        """Whether Triton's cache holds the machine code; compiles nothing."""
        try:
            self._compile(type("Cached", (NeverMade, self.source), {}), device)
        except NotCompiled:
            return False
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process, where the function is imported: there it may be compiled though it
        is interpreted here."""
        function = self.function.fn
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        del values["function"]
        return _variant_of, (function.__module__, function.__name__, values)

    def _compile(self, source_type: type[ASTSource], device: Device) -> Any:
        names = self.function.arg_names
        constants = dict(self.constants)
        signature = dict(self.types) | dict.fromkeys(constants, "constexpr")
        if tuple(signature) != tuple(names):
            raise ValueError(f"arguments of {self.function.__name__} must be {names}")
        source = source_type(
            self.function,
            signature,
            {(names.index(name),): value for name, value in constants.items()},
            # In order: Triton's cache key is made of this mapping's text, and a set's order is
            # another in every process.
            {
                (place,): [["tt.divisibility", ALIGNMENT]]
                for place, name in enumerate(names)
                if name in self.aligned
            },
        )
        # Said, because Triton 3.10 turns its default round.
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }
        if self.programmatic:
            options["launch_pdl"] = True
        if self.max_registers is not None and device.backend == "cuda":
            options["maxnreg"] = self.max_registers
        return triton.compile(source, target=target_of(device), options=options)


def _variant_of(module: str, name: str, values: dict[str, Any]) -> Variant:
    return Variant(getattr(import_module(module), name), **values)


class NotCompiled(Exception):
    """Triton's cache does not hold a kernel."""


class NeverMade:
    """Mixed into a source: Triton finds it in its cache, or not at all."""

    def make_ir(self, *_: Any, **__: Any) -> Any:
        raise NotCompiled


class Launcher:
    """A variant on one device: compiled at the first call, launched at every call."""

    def __init__(self, variant: Variant, device: Device, index: int | None) -> None:
        self.variant = variant
        self.device = device
        self.index = index
        self.pointers = sum(kind.startswith("*") for _, kind in variant.types)
        self.maps = sum(kind.startswith("tensordesc") for _, kind in variant.types)
        self._filler = (None,) * len(variant.constants)
        self._compiled: Any = None
        self._run: Any = None
        self._head: tuple[Any, ...] = ()
        self._describe: Callable[..., Sequence[Any]] | None = None
        self._map = lru_cache(KEPT_MAPS)(self._make_map)

    def __call__(self, grid: Grid, arguments: Sequence[Any]) -> None:
        """Launches on the device's current stream.

        `arguments` are in the variant's order: pointers first, as tensors (None for one that the
        variant does not read), then maps, as views, then numbers.
        """
        if self.index is None:
            self.variant.function[grid](*arguments, **dict(self.variant.constants))
            return
        tensors, rest = self.split(arguments)
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        launch_in_order([(self, grid, addresses, rest)])

    def split(self, arguments: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """(tensors that the kernel is given an address of, everything else)."""
        if not self.maps:
            return arguments[: self.pointers], arguments[self.pointers :]
        views = arguments[self.pointers : self.pointers + self.maps]
        numbers = arguments[self.pointers + self.maps :]
        return (
            [*arguments[: self.pointers], *(view.tensor for view in views)],
            [*((view.shape, view.strides) for view in views), *numbers],
        )

    def launch(
        self,
        stream: int,
        hooks: tuple[Any, Any] | None,
        grid: Grid,
        addresses: Sequence[int | None],
        numbers: Sequence[Any],
    ) -> None:
        """Launches on a stream of the current device, which is this launcher's.

        Addresses and numbers are those of what `split` gives.
        """
        if self._run is None:
            self.load()
        if self.maps:
            addresses, numbers = self._with_maps(addresses, numbers)
        values = (*addresses, *numbers, *self._filler)
        if hooks is None:
            self._run(*grid, stream, *self._head, None, None, None, *values)
        else:
            metadata = self._compiled.launch_metadata(grid, stream, *values)
            self._run(*grid, stream, *self._head, metadata, *hooks, *values)

    def load(self) -> None:
        """Puts the code, compiled if need be, on the current device, which is this launcher's."""
        compiled = self.variant.compile(self.device)
        # `run` puts the code on the current device and gives its launcher.
        self._run = compiled.run
        self._head = (compiled.function, compiled.packed_metadata)
        self._compiled = compiled
        if self.device.backend == "cuda" and triton.__version__.startswith(KNOWN_LAUNCHER):
            run = compiled.run
            if not run.global_scratch_size and not run.profile_scratch_size:
                # What it does in Python is to allocate scratch memory: not for these kernels.
                self._run = run.launch
                if self.maps:
                    # And to make descriptors, anew at every launch.
                    self._run = inspect.getclosurevars(run.launch).nonlocals["launcher"]
                    self._describe = triton.backends.nvidia.driver.make_tensordesc_arg
                flags = run.launch_cooperative_grid, run.launch_pdl, None, None
                self._head = (compiled.function, *flags, compiled.packed_metadata)

    def _with_maps(
        self, addresses: Sequence[int | None], numbers: Sequence[Any]
    ) -> tuple[Sequence[int | None], Sequence[Any]]:
        """The pointers' addresses, and what stands for the maps before the numbers."""
        described: list[Any] = []
        for place in range(self.maps):
            shape, strides = numbers[place]
            described += self._map(place, addresses[self.pointers + place], shape, strides)
        return addresses[: self.pointers], [*described, *numbers[self.maps :]]

    def _make_map(self, place: int, address: int, shape: Sizes, strides: Sizes) -> Sequence[Any]:
        """What the launch is given for a map: the same for the same memory."""
        described = Described(address, shape, strides)
        if self._describe is None:
            return [described]
        return self._describe(described, self._compiled.metadata.tensordesc_meta[place])


def launch_in_order(
    launches: Sequence[tuple[Launcher, Grid, Sequence[int | None], Sequence[Any]]],
) -> None:
    """Launches (launcher, grid, addresses, numbers), all of one device, on its current stream."""
    index = launches[0][0].index
    if torch.cuda.current_device() == index:
        _launch_here(index, launches)
    else:
        with torch.cuda.device(index):
            _launch_here(index, launches)


def _launch_here(index: int | None, launches: Sequence[Any]) -> None:
    stream = triton.runtime.driver.active.get_current_stream(index)
    knobs = triton.knobs.runtime
    enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook
    # A chain without a hook in it still costs its call.
    hooks = (enter, leave) if getattr(enter, "calls", 0) or getattr(leave, "calls", 0) else None
    for launcher, grid, addresses, numbers in launches:
        launcher.launch(stream, hooks, grid, addresses, numbers)


class Recording:
    """The launches of a call, to be made again for tensors that are alike.

    Everything but addresses stays: kernels, grids, sizes, strides, options. `tensors` are those of
    the call, in an order that `replay` is given them in, too.
    """

    def __init__(self, tensors: Sequence[torch.Tensor | None]) -> None:
        self._given = sum(tensor is not None for tensor in tensors)
        # None is the address of what a kernel does not read: one place more, at the end.
        self._places = {id(tensor): place for place, tensor in enumerate(tensors)} | {id(None): -1}
        self._steps: list[tuple[Launcher, Grid, list[int], Sequence[Any]]] = []

    @property
    def is_replayable(self) -> bool:
        """Not if interpreted, nor if one tensor is given twice: the next call's may be two."""
        distinct = len(self._places) - 1 == self._given
        return distinct and all(launcher.index is not None for launcher, *_ in self._steps)

    def launching(self, launcher: Launcher) -> Launch:
        """The launcher, whose launches are recorded as they are made."""

        def launch(grid: Grid, arguments: Sequence[Any]) -> None:
            tensors, rest = launcher.split(arguments)
            places = [self._places[id(tensor)] for tensor in tensors]
            self._steps.append((launcher, grid, places, tuple(rest)))
            launcher(grid, arguments)

        return launch

    def replay(self, addresses: Sequence[int | None]) -> None:
        """Makes the launches again, with the tensors at these addresses."""
        known = (*addresses, None)
        launch_in_order(
            [
                (launcher, grid, [known[place] for place in places], numbers)
                for launcher, grid, places, numbers in self._steps
            ]
        )
