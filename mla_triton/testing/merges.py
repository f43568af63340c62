"""Merges made to catch a kernel that reads, writes or computes what it must not.

Always: the out of an empty state is NaN. On request: rows with NaN between them, states far apart
in weight, rows that are empty in all states, rows that stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from mla_triton.state import AttentionState
from mla_triton.testing.problems import moved, padded

Spread = Literal["near", "far", "equal"]
SPREADS = {"near": 1.0, "far": 40.0, "equal": 0.0}
"""How far the lse of states lie apart: a few times this."""


@dataclass(frozen=True, repr=False)
class MergeInputs:
    """The arguments of one call of `mla_triton.merge`, and where they came from."""

    states: tuple[AttentionState, ...]
    mask: torch.Tensor | None
    dtype: torch.dtype
    """Of the `out` of the result."""
    is_stack: bool = False
    padding: int = 0
    """Columns between the rows of strided tensors."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The arguments of `merge_inputs` that made this."""

    @property
    def given(self) -> tuple[AttentionState, ...] | AttentionState:
        """The states as they are passed: views of a stack are passed as the stack."""
        if not self.is_stack:
            return self.states
        stacks = []
        for kind in (0, 1):
            one, other = self.states[0][kind], self.states[1][kind]
            step = other.storage_offset() - one.storage_offset()
            shape, strides = (len(self.states), *one.shape), (step, *one.stride())
            stacks.append(one.as_strided(shape, strides, one.storage_offset()))
        return AttentionState(*stacks)

    def call_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, for `mla_triton.merge` and for the reference."""
        return (self.given,), {"mask": self.mask}

    def output_buffers(self) -> dict[str, torch.Tensor]:
        """`out` and `lse` filled with NaN, strided where the inputs are."""
        out, lse = (torch.full_like(tensor, float("nan")) for tensor in self.states[0])
        out = out.to(self.dtype)
        return {"out": padded(out, self.padding), "lse": padded(lse, self.padding)}

    def to(self, device: torch.device | str) -> MergeInputs:
        """The same on another device, strides included."""
        if self.is_stack:
            # Views of one storage stay views of one.
            stack = AttentionState(*(moved(tensor, device) for tensor in self.given))
            states = tuple(map(AttentionState, stack.out.unbind(), stack.lse.unbind()))
        else:
            states = tuple(AttentionState(*(moved(t, device) for t in s)) for s in self.states)
        return replace(self, states=states, mask=moved(self.mask, device))

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.recipe.items())
        return f"merge_inputs({arguments})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How IPython and hypothesis print it, which would else spell out every tensor."""
        printer.text(repr(self))


def merge_inputs(
    *,
    states: int = 2,
    tokens: Sequence[int] = (5,),
    heads: int = 16,
    value_dim: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    first_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    stacked: bool = False,
    masked: bool = False,
    empty: float = 0.2,
    spread: Spread = "near",
    level: float = 0.0,
    strided: bool | int = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> MergeInputs:
    """Random states to be merged; the same arguments give the same values on every device.

    `tokens` are the leading dimensions of a state, `empty` is the share of its rows that are empty.
    The lse of states are around `level`, apart as `spread` says. `first_dtype`, of the first state,
    and `out_dtype`, of the result, are `dtype` and `first_dtype` by default. `strided` leaves 16
    bytes between rows, or as many columns as it says: an odd number misaligns them.
    """
    recipe = {name: value for name, value in locals().items() if name != "device"}
    padding = 16 // dtype.itemsize if strided is True else int(strided)
    generator = torch.Generator().manual_seed(seed)
    rows = (states, *tokens, heads)
    out = torch.randn(*rows, value_dim, generator=generator)
    lse = torch.randn(rows, generator=generator) * SPREADS[spread] + level
    if spread == "equal":
        out[:] = out[0].clone()
    is_empty = torch.rand(rows, generator=generator) < empty
    lse[is_empty] = float("-inf")
    out[is_empty] = float("nan")
    mask = torch.rand(tuple(tokens), generator=generator) < 0.5 if masked else None
    first_dtype = dtype if stacked or first_dtype is None else first_dtype
    if stacked:
        whole = padded(out.to(dtype), padding), padded(lse, padding)
        made = [AttentionState(*state) for state in zip(*whole, strict=True)]
    else:
        kinds = (first_dtype, *[dtype] * (states - 1))
        made = [
            AttentionState(padded(out[n].to(kind), padding), padded(lse[n], padding))
            for n, kind in enumerate(kinds)
        ]
    inputs = MergeInputs(
        states=tuple(made),
        mask=mask,
        dtype=first_dtype if out_dtype is None else out_dtype,
        is_stack=stacked,
        padding=padding,
        recipe=recipe,
    )
    return inputs.to(device)
