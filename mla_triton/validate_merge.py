"""States and buffers -> a merge's problem and layout, or an error that names the argument, the rule
and the value.

As in `mla_triton.validate` only what the host knows is looked at, and the rules are gone through
once for calls that are alike. Addresses are not alike, so where the result lies is looked at in
every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import torch

from mla_triton import memory
from mla_triton.memory import Region
from mla_triton.problem import MOST_APART, NO_STEPS, MergeLayout, MergeProblem, Steps
from mla_triton.state import AttentionState
from mla_triton.validate import (
    ALIGNMENT,
    DTYPES,
    INT32_MAX,
    LAST_DIMENSION,
    Facts,
    Layout,
    check_no_grad,
    check_results,
    check_tensor,
    exceeds_int32,
    facts,
    fail,
    rows_aligned,
    shape,
)

MOST_DIMENSIONS = 3
"""Evenly spaced dimensions that rows may lie in, together in all tensors of a call."""
NAMED_DTYPES = "float16, bfloat16 or float32"


class MergeCall(NamedTuple):
    """All that the rules of merge look at. A stack of states is one tensor of each kind."""

    outs: tuple[Facts, ...]
    lses: tuple[Facts, ...]
    mask: Facts | None
    out: Facts
    lse: Facts
    aligned: bool
    """Whether what the kernels access in wide steps begins at multiples of 16 bytes."""


class Span(NamedTuple):
    """How far a tensor goes from its address on."""

    size: int
    """Bytes."""
    is_alike: bool
    """Whether its elements lie as the result's do, so that the result may take their places."""


class Merge(NamedTuple):
    """A call that keeps all rules."""

    problem: MergeProblem
    layout: MergeLayout
    beside_out: tuple[Span, ...]
    """Of outs, lses, mask, out and lse, as far as `out` must lie apart from them."""
    beside_lse: tuple[Span, ...]


# -- types of arguments


def unpack(states: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(out of each state, lse of each); of a stack, the two tensors that it is."""
    if isinstance(states, AttentionState):
        _check_state("states", states)
        return [states.out], [states.lse]
    if not isinstance(states, Sequence) or isinstance(states, str):
        rule = "be a sequence of AttentionStates, or one that is a stack of them"
        fail(TypeError, "states", rule, type(states).__name__)
    if len(states) < 2:
        fail(ValueError, "states", "be two or more", len(states))
    if len(states) > MOST_APART:
        rule = f"be at most {MOST_APART} apart; a stack (one AttentionState) may hold any number"
        fail(ValueError, "states", rule, len(states))
    for place, state in enumerate(states):
        if not isinstance(state, AttentionState):
            fail(TypeError, f"states[{place}]", "be an AttentionState", type(state).__name__)
        _check_state(f"states[{place}]", state)
    return [state.out for state in states], [state.lse for state in states]


def _check_state(name: str, state: AttentionState) -> None:
    check_tensor(f"{name}.out", state.out)
    check_tensor(f"{name}.lse", state.lse)


# -- a call


def merge(
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> Merge:
    """Checks one call of merge, as `mla_triton.merge` has unpacked it."""
    if torch.is_grad_enabled():
        check_no_grad(_named(outs, lses, out, lse))
    given = [*outs, *lses, *(() if mask is None else (mask,)), out, lse]
    addresses = [tensor.data_ptr() for tensor in given]
    wide = addresses[-2]
    for address in addresses[: len(outs)]:
        wide |= address
    known = known_merge(_call_of(outs, lses, mask, out, lse, wide % ALIGNMENT == 0))
    if not (
        _are_apart(addresses[-2], known.beside_out, addresses)
        and _are_apart(addresses[-1], known.beside_lse, addresses)
    ):
        check_memory(outs, lses, mask, out, lse)
    return known


def merge_without_memory(
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """The rules as far as fake tensors of a compiler show them; sizes may be symbolic."""
    if torch.is_grad_enabled():
        check_no_grad(_named(outs, lses, out, lse))
    check_rules(_call_of(outs, lses, mask, out, lse, aligned=False))


def described(
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> MergeProblem:
    """What a call with such tensors, aligned, is to the package: found on no memory."""
    return merge_of(_call_of(outs, lses, mask, out, lse, aligned=True)).problem


def _call_of(
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    aligned: bool,
) -> MergeCall:
    return MergeCall(
        tuple([facts(tensor) for tensor in outs]),
        tuple([facts(tensor) for tensor in lses]),
        None if mask is None else facts(mask),
        facts(out),
        facts(lse),
        aligned,
    )


def _named(
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor], out: torch.Tensor, lse: torch.Tensor
) -> dict[str, torch.Tensor | None]:
    """What holds numbers, by the names that a user has for it."""
    named: dict[str, torch.Tensor | None] = {}
    for kind, given in (("out", outs), ("lse", lses)):
        named |= {_name(place, len(given), kind): tensor for place, tensor in enumerate(given)}
    return named | {"out": out, "lse": lse}


def _name(place: int, count: int, kind: str) -> str:
    """How a user speaks of the `out` or `lse` of a state."""
    return f"states.{kind}" if count == 1 else f"states[{place}].{kind}"


def merge_of(call: MergeCall) -> Merge:
    """The problem and the layout of a call that keeps all rules."""
    outs, lses, mask, out, lse = check_rules(call)
    count = len(outs) if len(outs) > 1 else outs[0].shape[0]
    nexts = (0, 0)
    if len(outs) == 1:
        nexts = outs[0].strides[0], lses[0].strides[0]
        # The others of a stack lie as the first does.
        outs, lses = ([_first_of(stack)] * 2 for stack in (outs[0], lses[0]))
    *lead, value_dim = out.shape
    rows = tuple(lead)
    steps = {
        "first_out": outs[0].strides[:-1],
        "first_lse": lses[0].strides,
        "other_out": outs[1].strides[:-1],
        "other_lse": lses[1].strides,
        "out": out.strides[:-1],
        "lse": lse.strides,
    }
    if mask is not None:
        steps["mask"] = (*mask.strides, 0)
    for kind, layouts in (("out", outs), ("lse", lses)):
        for place, layout in enumerate(layouts[2:], 2):
            _check_alike(_name(place, len(layouts), kind), f"states[1].{kind}", layout, layouts[1])
    sizes, collapsed = collapse(rows, list(steps.values()))
    if len(sizes) > MOST_DIMENSIONS:
        rule = f"have rows in at most {MOST_DIMENSIONS} evenly spaced dimensions, with out and lse"
        fail(ValueError, "states", rule, f"{len(sizes)}: sizes {sizes}")
    padding = MOST_DIMENSIONS - len(sizes)
    _, middle, inner = (*[1] * padding, *sizes)
    named = {
        name: (*[0] * padding, *tensor_steps)
        for name, tensor_steps in zip(steps, collapsed, strict=True)
    }
    wide = (outs[0], outs[1], out)
    total = 1
    for size in rows:
        total *= size
    problem = MergeProblem(
        first_dtype=outs[0].dtype,
        other_dtype=outs[1].dtype,
        out_dtype=out.dtype,
        states=count,
        value_dim=value_dim,
        masked=mask is not None,
        # Of one token, too, a mask is that of all its heads: no variant of its own for that.
        rank=max(1 if mask is None else 2, len(sizes)),
        aligned=call.aligned
        and nexts[0] % ALIGNMENT == 0
        and all(rows_aligned(layout) for layout in wide),
        rows=total,
    )
    places = _layout(middle, inner, named, *nexts)
    return Merge(problem, places, _spans(call, call.out), _spans(call, call.lse))


known_merge = lru_cache(maxsize=1024)(merge_of)


def _layout(
    middle: int, inner: int, steps: dict[str, tuple[int, ...]], next_out: int, next_lse: int
) -> MergeLayout:
    def of(name: str) -> Steps:
        outer_step, middle_step, inner_step = steps.get(name, NO_STEPS)
        return outer_step, middle_step, inner_step

    return MergeLayout(
        middle,
        inner,
        of("first_out"),
        of("first_lse"),
        of("other_out"),
        of("other_lse"),
        of("mask"),
        of("out"),
        of("lse"),
        next_out,
        next_lse,
    )


def collapse(
    sizes: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The same indices in as few dimensions as all tensors allow: (sizes, strides of each tensor).

    Dimensions of size 1 vanish, and two become one where every tensor steps through them evenly.
    """
    kept: list[int] = []
    steps: list[list[int]] = []
    for place in reversed(range(len(sizes))):
        here = [tensor[place] for tensor in strides]
        if sizes[place] == 1:
            continue
        if kept and here == [kept[0] * step for step in steps[0]]:
            kept[0] *= sizes[place]
        else:
            kept.insert(0, sizes[place])
            steps.insert(0, here)
    return tuple(kept), [tuple(step[tensor] for step in steps) for tensor in range(len(strides))]


# -- the rules


def check_rules(
    call: MergeCall,
) -> tuple[list[Layout], list[Layout], Layout | None, Layout, Layout]:
    """The layouts of a call, whose sizes may be symbolic; raises where it breaks a rule."""
    outs, lses = [Layout(*known) for known in call.outs], [Layout(*known) for known in call.lses]
    mask = None if call.mask is None else Layout(*call.mask)
    out, lse = Layout(*call.out), Layout(*call.lse)
    _check_dtypes_and_devices(outs, lses, mask, out, lse)
    is_stack = len(outs) == 1
    least = 3 if is_stack else 2
    name = _name(0, len(outs), "out")
    lead = "[states, ..., heads, value_dim]" if is_stack else "[..., heads, value_dim]"
    if len(outs[0].shape) < least:
        fail(ValueError, name, f"be {lead}", shape(outs[0]))
    *rows, value_dim = outs[0].shape
    if is_stack:
        count, *rows = rows
        if count < 2:
            fail(ValueError, name, "be a stack of two or more", shape(outs[0]))
    if rows[-1] < 1 or value_dim < 1:
        fail(ValueError, name, "have at least one head and one column", shape(outs[0]))
    for place, (state_out, state_lse) in enumerate(zip(outs, lses, strict=True)):
        whole = outs[0].shape
        _check_shape(_name(place, len(outs), "out"), state_out, tuple(whole))
        _check_shape(_name(place, len(outs), "lse"), state_lse, tuple(whole[:-1]))
    if mask is not None:
        _check_shape("mask", mask, tuple(rows[:-1]))
    check_results(out, lse, tuple(rows), value_dim)
    _check_rows(name, rows)
    for place, layout in enumerate([*outs, out]):
        if not layout.last_is_contiguous:
            argument = "out" if place == len(outs) else _name(place, len(outs), "out")
            fail(ValueError, argument, LAST_DIMENSION, f"strides {tuple(layout.strides)}")
    return outs, lses, mask, out, lse


def _check_dtypes_and_devices(
    outs: list[Layout], lses: list[Layout], mask: Layout | None, out: Layout, lse: Layout
) -> None:
    first, named = _name(0, len(outs), "out"), {}
    for place, (state_out, state_lse) in enumerate(zip(outs, lses, strict=True)):
        named[_name(place, len(outs), "out")] = state_out
        named[_name(place, len(outs), "lse")] = state_lse
        if state_out.dtype not in DTYPES:
            name = _name(place, len(outs), "out")
            fail(TypeError, name, f"be {NAMED_DTYPES}", state_out.dtype)
        if place > 1 and state_out.dtype != outs[1].dtype:
            rule = f"have states[1].out's dtype {outs[1].dtype}"
            fail(TypeError, f"states[{place}].out", rule, state_out.dtype)
        if state_lse.dtype != torch.float32:
            fail(TypeError, _name(place, len(outs), "lse"), "be float32", state_lse.dtype)
    if mask is not None and mask.dtype != torch.bool:
        fail(TypeError, "mask", "be bool", mask.dtype)
    if out.dtype not in DTYPES:
        fail(TypeError, "out", f"be {NAMED_DTYPES}", out.dtype)
    if lse.dtype != torch.float32:
        fail(TypeError, "lse", "be float32", lse.dtype)
    if mask is not None:
        named["mask"] = mask
    for name, layout in (named | {"out": out, "lse": lse}).items():
        if layout.device != outs[0].device:
            fail(ValueError, name, f"be on {first}'s device {outs[0].device}", layout.device)


def _check_shape(name: str, layout: Layout, expected: tuple[int, ...]) -> None:
    if tuple(layout.shape) != expected:
        fail(ValueError, name, f"be {expected}", shape(layout))


def _check_rows(name: str, sizes: Sequence[int]) -> None:
    rows = 1
    for size in sizes:
        rows = rows * size
    if exceeds_int32(rows):
        rule = f"have at most {INT32_MAX} rows (query tokens x heads)"
        fail(ValueError, name, rule, " x ".join(str(size) for size in sizes))


def _check_alike(name: str, model_name: str, layout: Layout, model: Layout) -> None:
    """Raises where a tensor lies otherwise than another of its shape."""
    for size, stride, expected in zip(layout.shape, layout.strides, model.strides, strict=True):
        if size > 1 and stride != expected:
            rule = f"have {model_name}'s strides {tuple(model.strides)}"
            fail(ValueError, name, rule, tuple(layout.strides))


def _first_of(stack: Layout) -> Layout:
    return Layout(stack.dtype, stack.device, stack.shape[1:], stack.strides[1:])


# -- where the result lies


def _spans(call: MergeCall, result: Facts) -> tuple[Span, ...]:
    masks = () if call.mask is None else (call.mask,)
    given = (*call.outs, *call.lses, *masks, call.out, call.lse)
    return tuple(
        Span(
            memory.reach(dtype.itemsize, tuple(size), stride),
            (dtype, tuple(size), stride) == (result[0], tuple(result[2]), result[3]),
        )
        for dtype, _, size, stride in given
    )


def _are_apart(address: int, spans: tuple[Span, ...], addresses: list[int]) -> bool:
    """Whether a result at an address is clear of the spans at others, or in one's place.

    Its own is the one that it is in place of at last. A quick answer: rows between rows are no.
    """
    size = max(span.size for span in spans if span.is_alike)
    for (other_size, is_alike), other in zip(spans, addresses, strict=True):
        distance = other - address
        if not (distance >= size or distance + other_size <= 0 or (is_alike and not distance)):
            return False
    return True


def check_memory(
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Raises unless each result is in place of a state, or lies apart from all that is read."""
    result_out, result_lse = memory.of(out), memory.of(lse)
    is_stack = len(outs) == 1
    for kind, result, own, foreign in (
        ("out", result_out, outs, lses),
        ("lse", result_lse, lses, outs),
    ):
        foreign_kind = "lse" if kind == "out" else "out"
        for place, tensor in enumerate(own):
            region = memory.of(tensor)
            if not _in_place(result, region, is_stack) and memory.share(result, region):
                _fail_overlap(kind, _name(place, len(own), kind))
        for place, tensor in enumerate(foreign):
            if memory.share(result, memory.of(tensor)):
                _fail_overlap(kind, _name(place, len(own), foreign_kind))
        if mask is not None and memory.share(result, memory.of(mask)):
            _fail_overlap(kind, "mask")
    if memory.share(result_out, result_lse):
        _fail_overlap("out", "lse")


def _in_place(result: Region, state: Region, is_stack: bool) -> bool:
    """Whether a result is where a state is, element by element."""
    distance, shape_of_one, strides = result.address - state.address, state.shape, state.strides
    if is_stack:
        step = state.strides[0] * state.item
        count, *rest = state.shape
        if step:
            place, distance = divmod(distance, step)
            if not 0 <= place < count:
                return False
        shape_of_one, strides = tuple(rest), state.strides[1:]
    if distance or result.item != state.item:
        return False
    places = zip(shape_of_one, result.strides, strides, strict=True)
    return all(size == 1 or one == other for size, one, other in places)


def _fail_overlap(name: str, other: str) -> NoReturn:
    rule = f"share no memory with {other}, or all of it with the same part of one state"
    fail(ValueError, name, rule, "tensors that overlap")
