"""A card that is not there: what tests ask CUDA for happens on the CPU, in Triton's interpreter."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton.testing
from torch.overrides import TorchFunctionMode

NOT_ASKING = ("mla_triton", "torch", "triton")
"""Packages that have to know that there is no card."""

IS_CUDA = torch.Tensor.is_cuda.__get__

LIMITS = {
    "b": 2,
    "batch_size": 3,
    "h_q": 16,
    "kv_len": 97,
    "kv_len_0": 11,
    "kv_len_1": 33,
    "kv_len_2": 140,
    "max_seq_len": 160,
    "mean_sk": 150,
    "num_heads": 8,
    "num_query_heads": 4,
    "num_tokens": 140,
    "qo_len": 17,
    "s_k": 150,
    "seq_len": 128,
}
"""Of a test's parameters, the largest that the interpreter can wait for."""


def limited(name: str, value: Any) -> Any:
    """A parameter cut to its limit; large ones that differ mostly still differ."""
    limit = LIMITS.get(name)
    if limit is None or type(value) is not int or value <= limit:
        return value
    return limit - value % 3 if limit > 16 else limit


def is_asked_by_a_test() -> bool:
    """Whether who called the caller is neither the package nor what it stands on."""
    name = sys._getframe(2).f_globals.get("__name__", "")
    return name.split(".")[0] not in NOT_ASKING


def moved(value: Any) -> Any:
    is_cuda = str(value).startswith("cuda") if isinstance(value, (str, torch.device)) else False
    return "cpu" if is_cuda else value


class OnCPU(TorchFunctionMode):
    """Makes every tensor that is asked for on CUDA a CPU tensor, which says that it is not."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func == IS_CUDA and is_asked_by_a_test():
            return True
        if "device" in kwargs:
            kwargs["device"] = moved(kwargs["device"])
        if func is torch.Tensor.to:
            kwargs = {name: moved(value) for name, value in kwargs.items()}
            # A bare number there is the index of a card.
            args = tuple("cpu" if type(value) is int else moved(value) for value in args)
        return func(*args, **kwargs)


class Generator(torch.Generator):
    """One of random numbers on the CPU, whichever card it is asked for."""

    def __new__(cls, device: Any = None) -> Any:
        return super().__new__(cls, device="cpu")


class Event:
    """One that was always just recorded, a millisecond after any other."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Any) -> float:
        return 1.0


def once(function: Any, *args: Any, **kwargs: Any) -> float:
    """`do_bench` where time means nothing: one more call, which has to work."""
    function()
    return 1.0


def idle() -> Callable[..., None]:
    """Does nothing; one of its own for each name, for torch.compile tells functions apart."""
    return lambda *args, **kwargs: None


@contextlib.contextmanager
def pretended_card() -> Iterator[None]:
    """Within it, tests that ask for a Hopper card find one, and their tensors lie on the CPU."""
    set_default_device = torch.set_default_device
    cuda = {
        "Event": Event,
        "empty_cache": idle(),
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "none, interpreted",
        "is_available": lambda: is_asked_by_a_test(),
        "manual_seed": idle(),
        "mem_get_info": lambda device=None: (0, 0),
        "set_device": idle(),
        "synchronize": idle(),
    }
    accelerator = {"device_count": lambda: 1, "set_device_index": idle(), "synchronize": idle()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **cuda))
        stack.enter_context(mock.patch.multiple(torch.accelerator, **accelerator))
        stack.enter_context(mock.patch.object(torch, "Event", Event))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(triton.testing, "do_bench", once))
        stack.enter_context(
            mock.patch.object(
                torch, "set_default_device", lambda device: set_default_device(moved(device))
            )
        )
        stack.enter_context(OnCPU())
        yield
