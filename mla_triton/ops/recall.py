"""Calls like an earlier one: its launches again, with other addresses.

A step of an engine makes one call for each layer, and all of them are alike in everything that
the host knows: shapes, strides, dtypes, devices and options. The first goes the way of the data,
step by step, and is remembered here with the launches that came of it. The others are recognised
and launch the same: operator, validation and selection would cost more host time than the kernels
need on the device. What a compiler, a mode or a profiler has to see goes the ordinary way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from mla_triton import debug
from mla_triton.kernels.common.launch import Recording
from mla_triton.validate import ALIGNMENT

_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
_functorch = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)

Tensors = tuple[torch.Tensor | None, ...]
Options = tuple[object, ...]
Known = tuple[torch.dtype, torch.device, torch.Size, tuple[int, ...] | None]
"""dtype, device, shape and strides of a tensor; None for those that a contiguous one has, so far as
they matter."""


def is_plain_eager() -> bool:
    """Whether an operator called now would do nothing but run its kernel.

    False where this version of PyTorch cannot tell.
    """
    return (
        not torch.compiler.is_compiling()
        and _dispatch_modes is not None
        and _functorch is not None
        and _dispatch_modes() == 0
        and _functorch() is None
        and torch._C._get_tracing_state() is None
        and not torch._C._autograd._profiler_enabled()
    )


class Call(NamedTuple):
    """A call that was made, as far as the host knows it, and its launches."""

    options: Options
    known: tuple[Known | None, ...]
    wide: tuple[int, ...]
    """Places of its tensors that kernels access in wide steps."""
    is_aligned: bool
    recording: Recording
    make_own: Callable[[], Tensors] | None
    """Makes the tensors of a call that it was not given."""


class Memory:
    """The latest different calls of one operation, the latest first.

    `own` are the places of tensors that a call may make for itself, `wide` those of tensors that
    kernels access in wide steps, so that alignment decides which kernels run; not in a call in
    which such a tensor is a mere list of numbers.
    """

    def __init__(self, own: slice, wide: Sequence[int], size: int = 8) -> None:
        self._own = own
        self._wide = wide
        self._size = size
        self._calls: tuple[Call, ...] = ()

    def again(self, tensors: Tensors, options: Options) -> bool:
        """Makes a call by the launches of an earlier one that was alike, if there was one."""
        if debug.switched_on() or not is_plain_eager():
            return False
        call = self._find(tensors, options)
        if call is None:
            return False
        if call.make_own is not None:
            tensors = (*tensors[: self._own.start], *call.make_own(), *tensors[self._own.stop :])
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        if _are_aligned(addresses, call.wide) != call.is_aligned:
            return False
        call.recording.replay(addresses)
        return True

    def keep(
        self,
        tensors: Tensors,
        options: Options,
        recording: Recording,
        make_own: Callable[[], Tensors] | None,
    ) -> None:
        """Remembers a call that was recorded."""
        if debug.switched_on() or not recording.is_replayable:
            return
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        known = tuple(map(_known, tensors))
        wide = tuple(
            place
            for place in self._wide
            if (tensor := tensors[place]) is not None and tensor.dim() > 1
        )
        is_aligned = _are_aligned(addresses, wide)
        call = Call(options, known, wide, is_aligned, recording, make_own)
        self._calls = (call, *self._calls[: self._size - 1])

    def clear(self) -> None:
        self._calls = ()

    def _find(self, tensors: Tensors, options: Options) -> Call | None:
        grad = torch.is_grad_enabled()
        for call in self._calls:
            if call.options == options and _alike(call.known, tensors, grad):
                return call
        return None


def _are_aligned(addresses: Sequence[int | None], wide: Sequence[int]) -> bool:
    together = 0
    for place in wide:
        together |= addresses[place] or 0
    return together % ALIGNMENT == 0


def _known(tensor: torch.Tensor | None) -> Known | None:
    if tensor is None:
        return None
    strides = None if tensor.is_contiguous() else tensor.stride()
    return tensor.dtype, tensor.device, tensor.shape, strides


def _alike(known: Sequence[Known | None], tensors: Tensors, grad: bool) -> bool:
    """Whether tensors are plain ones with these facts, and none of them would need a backward."""
    plain = torch.Tensor
    for facts, tensor in zip(known, tensors, strict=True):
        if facts is None or tensor is None:
            if (facts is None) != (tensor is None):
                return False
            continue
        dtype, device, shape, strides = facts
        if (
            type(tensor) is not plain
            or tensor.dtype is not dtype
            or tensor.shape != shape
            or not (tensor.is_contiguous() if strides is None else tensor.stride() == strides)
            or tensor.device != device
            or (grad and tensor.requires_grad)
        ):
            return False
    return True
