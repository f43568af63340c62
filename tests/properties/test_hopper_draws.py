"""What the properties draw for the Hopper kernels, where there is no card for these.

The properties run as they stand, over the problems that they draw for `sm90` and make of those.
Each has to be one that `sm90` takes, and the reference computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import decodes
import prefills
import pytest
import test_batch_properties
import test_decode_properties
import test_prefill_properties
from executions import Execution, Shape
from hypothesis import given, settings
from hypothesis import strategies as st
from ways import Way

import mla_triton
from mla_triton import AttentionState, select
from mla_triton import device as devices
from mla_triton.testing import problem_of

EXAMPLES = 40
HOPPER = devices.from_label("9.0")
MODULES = (test_batch_properties, test_decode_properties, test_prefill_properties)
PROPERTIES = [
    pytest.param(
        made,
        prefills if "prefill" in f"{module.__name__} {name}" else decodes,
        id=f"{module.__name__}-{name.removeprefix('test_')}",
    )
    for module in MODULES
    for name, made in vars(module).items()
    if hasattr(made, "hypothesis")
]
REASONS = {
    decodes: lambda inputs: select.why_not_sm90(problem_of(inputs), HOPPER, "sm90", None),
    prefills: lambda inputs: select.why_not_sm90_prefill(problem_of(inputs), HOPPER, "sm90"),
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The problems that `sm90` was asked to compute."""
    problems: list[Any] = []
    for operation, why_not in REASONS.items():
        right = operation.run

        def run(
            inputs: Any,
            execution: Execution,
            right: Callable[..., AttentionState] = right,
            why_not: Callable[[Any], str | None] = why_not,
            plan: mla_triton.Plan | None = None,
            **options: Any,
        ) -> AttentionState:
            assert execution.impl == "sm90"
            assert why_not(inputs) is None, f"{inputs!r}: {why_not(inputs)}"
            problems.append(inputs)
            return right(inputs, Execution(Way("reference")), **options)

        for module in (operation, *MODULES):
            if vars(module).get("run") is right:
                monkeypatch.setattr(module, "run", run)
    for module in (decodes, *MODULES):
        if "plan_of" in vars(module):
            monkeypatch.setattr(module, "plan_of", lambda *_, **__: Mock(spec=mla_triton.Plan))
    refused = REASONS[decodes]
    monkeypatch.setattr(decodes, "is_refused", lambda inputs, _: refused(inputs) is not None)
    monkeypatch.setattr(prefills.devices, "current", lambda: HOPPER)
    for operation in REASONS:
        operation.taken.cache_clear()
    yield problems
    for operation in REASONS:
        operation.taken.cache_clear()


def shapes_of(made: Any) -> list[Shape]:
    """Those that a property is tried over, by whatever there is here."""
    (over,) = (mark for mark in made.pytestmark if mark.name == "parametrize")
    return [shape for _, shape in over.args[1]]


@pytest.mark.parametrize(("made", "operation"), PROPERTIES)
def test_hopper_takes_what_is_drawn_for_it(made, operation, asked):
    inner, execution = made.hypothesis.inner_test, Execution(Way("sm90"))
    tried = shapes_of(made)
    shapes = [shape for shape in operation.taken(execution) if shape in tried]
    share = -(-EXAMPLES // len(shapes))

    @settings(max_examples=share, database=None, derandomize=True)
    @given(data=st.data())
    def drawn(shape, data):
        inner(execution=execution, shape=shape, data=data)

    for shape in shapes:
        drawn(shape)
    # Not every example that hypothesis counts gets as far as a call.
    assert len(asked) >= EXAMPLES // 2
