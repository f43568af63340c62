"""By what a property is tried: implementations, the forms of the Hopper kernel, older cards' code.

Without a GPU these are the reference and the portable kernels in Triton's interpreter. On one they
are all implementations that there are for it, and what is generated for capabilities 8.0 and 8.9.

Shapes are parameters of a test and not drawn, so that each is tried by everything that takes it. Of
the rest that kernels are compiled for there is as little as a property needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, note, settings
from hypothesis import strategies as st
from ways import Way, forced

import mla_triton
from mla_triton import AttentionState
from mla_triton import device as devices
from mla_triton.testing.foreign_code import code_of

COMPILED = torch.cuda.is_available() and not devices.interpreting()
DEVICE = "cuda" if COMPILED else "cpu"
OLDER_CODE = ("8.0", "8.9")

INTERPRETED_SHARE = 6
"""A call takes a tenth of a second in the interpreter: of a profile's examples, one in so many."""

Shape = Mapping[str, Any]
"""The arguments of `decode_inputs` and its like that kernels are compiled for."""


class Execution(NamedTuple):
    """An implementation, and the capability whose code it runs if that is not this GPU's own."""

    way: Way
    label: str | None = None

    def __str__(self) -> str:
        return str(self.way) if self.label is None else f"{self.way} as on {self.label}"

    @property
    def impl(self) -> str:
        return self.way.impl

    @contextmanager
    def in_force(self, cache: Path) -> Iterator[Execution]:
        """Inside, calls with this `impl` run as said here; `cache` keeps older cards' code."""
        with ExitStack() as stack:
            if self.label is not None:
                stack.enter_context(code_of(self.label, cache))
            stack.enter_context(forced(self.way))
            yield self


def executions(*hopper: Way) -> list[Execution]:
    """Those of an operation, with the ways that are for capability 9.0 alone."""
    found = [Execution(Way("reference")), Execution(Way("portable"))]
    here = devices.current().capability
    if COMPILED and here == (9, 0):
        found += map(Execution, hopper)
    if COMPILED and here is not None and here >= (9, 0):
        found += [Execution(Way("portable"), label) for label in OLDER_CODE]
    return found


def over(pairs: Iterable[tuple[Execution, Shape]]) -> pytest.MarkDecorator:
    """A test for each execution and shape."""
    listed = list(pairs)
    names = [
        f"{execution} {'-'.join(map(str, shape.values()))}".replace("torch.", "")
        for execution, shape in listed
    ]
    return pytest.mark.parametrize(
        ("execution", "shape"), listed, ids=names, indirect=["execution"]
    )


def most_examples() -> int:
    """As many as the profile says, or a share of them where they are slow."""
    return settings.default.max_examples // (1 if COMPILED else INTERPRETED_SHARE)


def examples(pairs: Sequence[tuple[Execution, Shape]]) -> settings:
    """Of each shape so many that every execution has them all, however few shapes it takes; but for
    older cards' code, which has a few shapes and as many examples of each as the others."""
    taken = Counter(execution for execution, _ in pairs if execution.label is None)
    return settings(max_examples=max(1, -(-most_examples() // min(taken.values()))))


@st.composite
def seeds(draw: st.DrawFn) -> int:
    """Of a problem, never 0: the simplest example, which hypothesis tries first, is none of the few
    that a shape has."""
    seed = draw(st.integers(0, 2**16))
    assume(seed != 0)
    return seed


def is_half(shape: Shape) -> bool:
    """float16, which is as good a way as any to tell shapes apart."""
    return shape["dtype"] == torch.float16


def parts_of(shape: Shape, shapes: Sequence[Shape]) -> int:
    """In how many parts keys are partitioned: a merge of so many states is a kernel of its own."""
    return 2 + shapes.index(shape) % 3


def reproduction(inputs: Any, change: str, execution: Execution) -> None:
    """A failing example prints this line: what was computed, over what, by what."""
    note(f"inputs = {inputs!r}; {change}; by {execution}")


def merge(states: Any, execution: Execution, **options: Any) -> AttentionState:
    """By the reference where it is the reference's states, else by the kernel there is."""
    impl = "reference" if execution.impl == "reference" else "portable"
    return mla_triton.merge(states, impl=impl, **options)


def picking(heads: int, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """float64 `[heads, rows, columns]`: each row has a single 1 or -1, each in its own column."""
    made = torch.zeros(heads, rows, columns, dtype=torch.float64)
    for head in made:
        chosen = torch.randperm(columns, generator=generator)[:rows]
        signs = torch.randint(2, (rows,), generator=generator) * 2.0 - 1
        head[torch.arange(rows), chosen] = signs.double()
    return made.to(DEVICE)
