"""The ways in which a decode can be computed on a GPU: the implementations, and the Hopper kernel's
two forms, whichever of them its configs would choose.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from given_configs import choosing

import mla_triton
from mla_triton import configs, select
from mla_triton import device as devices
from mla_triton.configs import Choice
from mla_triton.device import Device
from mla_triton.kernels.sm90.decode_config import Config
from mla_triton.testing import DecodeInputs, problem_of


class Way(NamedTuple):
    impl: str
    blocks: int | None = None
    """The form of the Hopper kernel."""

    def __str__(self) -> str:
        return self.impl if self.blocks is None else f"{self.impl}-{self.blocks}"


WAYS = (Way("portable"), Way("sm90", 1), Way("sm90", 2))


@contextmanager
def forced(way: Way) -> Iterator[None]:
    """Inside, the Hopper kernel runs in the form that the way says, where the problem allows it."""
    if way.blocks is None:
        yield
        return
    config, right = Config(way.blocks), configs.choose

    def choose(
        implementation: ModuleType, problem: Any, device: Device, row_tile: int | None = None
    ) -> Choice:
        is_meant = implementation.NAME == "sm90"
        if is_meant and implementation.is_valid(config, problem, device, row_tile)[0]:
            return Choice(config, "user", "said by a test", None)
        return right(implementation, problem, device, row_tile)

    with choosing(choose):
        yield


def run(inputs: DecodeInputs, way: Way, **more: Any) -> mla_triton.AttentionState:
    arguments, options = inputs.call_arguments()
    return mla_triton.decode(*arguments, **options, impl=way.impl, **more)


def is_refused(inputs: DecodeInputs, way: Way) -> bool:
    """Whether the way does not take the problem; it then has to say so when it is asked for."""
    if way.impl == "portable":
        return False
    device = devices.of(inputs.q_nope.device)
    reason = select.why_not_sm90(problem_of(inputs), device, way.impl, None)
    if reason is None:
        return False
    with pytest.raises(NotImplementedError) as error:
        run(inputs, way)
    assert str(error.value) == f"impl 'sm90' cannot run this decode: {reason}"
    return True
