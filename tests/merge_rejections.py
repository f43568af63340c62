"""Every rule about the arguments of merge: a call that breaks it, and the exact message."""

from __future__ import annotations

from typing import Any

import torch
from rejections import TURING, Call, Rejection, spaced, to_meta

import mla_triton
from mla_triton import select
from mla_triton.problem import MergeProblem
from mla_triton.state import AttentionState

TOKENS, HEADS, VALUE = 3, 2, 16
PLAIN = MergeProblem(
    torch.float16, torch.float16, torch.float16, 2, VALUE, False, 1, True, TOKENS * HEADS
)


def state(*lead: int, dtype: torch.dtype = torch.float16, value: int = VALUE) -> AttentionState:
    shape = lead or (TOKENS, HEADS)
    return AttentionState(torch.zeros(*shape, value, dtype=dtype), torch.zeros(*shape))


def states(count: int = 2) -> list[AttentionState]:
    return [state() for _ in range(count)]


def merge(given: Any, **options: Any) -> Call:
    return lambda: mla_triton.merge(given, **options)


def changed(place: int, kind: str, change: Any, count: int = 2, **options: Any) -> Call:
    """A call whose state at a place has its `out` or `lse` changed."""

    def call() -> Any:
        given = states(count)
        given[place] = given[place]._replace(**{kind: change(getattr(given[place], kind))})
        return mla_triton.merge(given, **options)

    return call


def buffered(given: Any = None, **buffers: Any) -> Call:
    """A call whose buffers are functions of the states."""

    def call() -> Any:
        made = states() if given is None else given
        return mla_triton.merge(made, **{name: make(made) for name, make in buffers.items()})

    return call


def stack(*sizes: int) -> AttentionState:
    return AttentionState(torch.zeros(*sizes, dtype=torch.float16), torch.zeros(*sizes[:-1]))


def huge() -> AttentionState:
    """More rows than can be numbered, without memory."""
    return AttentionState(
        torch.empty(2**25, 128, 4, dtype=torch.float16, device="meta"),
        torch.empty(2**25, 128, device="meta"),
    )


def scattered() -> AttentionState:
    """Rows in four dimensions of which no two are one."""
    out = torch.zeros(3, 3, 3, 3, VALUE, dtype=torch.float16)[:2, :2, :2, :2]
    return AttentionState(out, torch.zeros(2, 2, 2, 2))


GRAD = "a tensor that does: call under torch.no_grad() or pass it detached"
NO_GRAD = "not require grad while grad is enabled (there is no backward)"
SHARED = "or all of it with the same part of one state, got tensors that overlap"

# fmt: off
MERGE = [
    Rejection("merge: states are a tensor", merge(torch.zeros(2)), TypeError,
        "states must be a sequence of AttentionStates, or one that is a stack of them, got Tensor"),
    Rejection("merge: one state in a list", merge(states(1)), ValueError,
        "states must be two or more, got 1"),
    Rejection("merge: nine states apart", merge(states(9)), ValueError,
        "states must be at most 8 apart; a stack (one AttentionState) may hold any number, got 9"),
    Rejection("merge: a pair of tensors", merge([state(), tuple(state())]), TypeError,
        "states[1] must be an AttentionState, got tuple"),
    Rejection("merge: out is no tensor", changed(1, "out", lambda t: t.tolist()), TypeError,
        "states[1].out must be a torch.Tensor, got list"),
    Rejection("merge: lse is None", changed(0, "lse", lambda t: None), TypeError,
        "states[0].lse must be a torch.Tensor, got NoneType"),
    Rejection("merge: out of a stack is no tensor",
        merge(AttentionState([], torch.zeros(2))), TypeError,
        "states.out must be a torch.Tensor, got list"),
    Rejection("merge: lse of a stack is no tensor",
        merge(AttentionState(torch.zeros(2, 2, 2), None)), TypeError,
        "states.lse must be a torch.Tensor, got NoneType"),
    Rejection("merge: mask is no tensor", merge(states(), mask=True), TypeError,
        "mask must be a torch.Tensor, got bool"),
    Rejection("merge: buffer is no tensor", merge(states(), out=()), TypeError,
        "out must be a torch.Tensor, got tuple"),
    Rejection("merge: lse buffer is no tensor", merge(states(), lse=0), TypeError,
        "lse must be a torch.Tensor, got int"),
    Rejection("merge: impl of wrong type", merge(states(), impl=1), TypeError,
        "impl must be a str or None, got int"),
    Rejection("merge: impl unknown", merge(states(), impl="sm90"), ValueError,
        "impl must be one of portable, reference, got 'sm90'"),

    Rejection("merge: float64", changed(0, "out", torch.Tensor.double), TypeError,
        "states[0].out must be float16, bfloat16 or float32, got torch.float64"),
    Rejection("merge: integers", changed(1, "out", torch.Tensor.int), TypeError,
        "states[1].out must be float16, bfloat16 or float32, got torch.int32"),
    Rejection("merge: stack of float64", merge(state(2, 3, 2, dtype=torch.float64)), TypeError,
        "states.out must be float16, bfloat16 or float32, got torch.float64"),
    Rejection("merge: a third dtype", changed(2, "out", torch.Tensor.float, 3), TypeError,
        "states[2].out must have states[1].out's dtype torch.float16, got torch.float32"),
    Rejection("merge: lse not float32", changed(1, "lse", torch.Tensor.double), TypeError,
        "states[1].lse must be float32, got torch.float64"),
    Rejection("merge: lse of a stack not float32",
        merge(stack(2, 3, 2, 16)._replace(lse=torch.zeros(2, 3, 2).half())), TypeError,
        "states.lse must be float32, got torch.float16"),
    Rejection("merge: mask not bool", merge(states(), mask=torch.ones(TOKENS)), TypeError,
        "mask must be bool, got torch.float32"),
    Rejection("merge: out buffer of integers",
        merge(states(), out=torch.zeros(TOKENS, HEADS, VALUE, dtype=torch.int8)), TypeError,
        "out must be float16, bfloat16 or float32, got torch.int8"),
    Rejection("merge: lse buffer not float32",
        merge(states(), lse=torch.zeros(TOKENS, HEADS).half()), TypeError,
        "lse must be float32, got torch.float16"),

    Rejection("merge: a state elsewhere", changed(1, "out", to_meta), ValueError,
        "states[1].out must be on states[0].out's device cpu, got meta"),
    Rejection("merge: an lse elsewhere", changed(0, "lse", to_meta, lse=torch.zeros(TOKENS, HEADS)),
        ValueError, "states[0].lse must be on states[0].out's device cpu, got meta"),
    Rejection("merge: a mask elsewhere",
        merge(states(), mask=torch.ones(TOKENS, dtype=torch.bool, device="meta")), ValueError,
        "mask must be on states[0].out's device cpu, got meta"),
    Rejection("merge: a buffer elsewhere",
        merge(states(), out=to_meta(state().out)), ValueError,
        "out must be on states[0].out's device cpu, got meta"),
    Rejection("merge: an lse buffer elsewhere",
        merge(states(), lse=to_meta(state().lse)), ValueError,
        "lse must be on states[0].out's device cpu, got meta"),
    Rejection("merge: an lse of a stack elsewhere",
        merge(stack(2, 3, 2, 16)._replace(lse=to_meta(torch.zeros(2, 3, 2))),
            lse=torch.zeros(3, 2)), ValueError,
        "states.lse must be on states.out's device cpu, got meta"),
    Rejection("merge: out requires grad",
        changed(1, "out", lambda t: t.requires_grad_()), ValueError,
        f"states[1].out must {NO_GRAD}, got {GRAD}"),
    Rejection("merge: lse requires grad",
        changed(0, "lse", lambda t: t.requires_grad_()), ValueError,
        f"states[0].lse must {NO_GRAD}, got {GRAD}"),
    Rejection("merge: out of a stack requires grad",
        buffered(out=lambda _: state().out.requires_grad_()), ValueError,
        f"out must {NO_GRAD}, got {GRAD}"),
    Rejection("merge: lse buffer requires grad",
        buffered(lse=lambda _: state().lse.requires_grad_()), ValueError,
        f"lse must {NO_GRAD}, got {GRAD}"),

    Rejection("merge: one dimension",
        merge([AttentionState(torch.zeros(VALUE), torch.zeros(()))] * 2), ValueError,
        f"states[0].out must be [..., heads, value_dim], got shape ({VALUE},)"),
    Rejection("merge: a state for a stack", merge(state(2)), ValueError,
        "states.out must be [states, ..., heads, value_dim], got shape (2, 16)"),
    Rejection("merge: a stack of one", merge(stack(1, 3, 2, 16)), ValueError,
        "states.out must be a stack of two or more, got shape (1, 3, 2, 16)"),
    Rejection("merge: zero heads", merge([state(3, 0), state(3, 0)]), ValueError,
        "states[0].out must have at least one head and one column, got shape (3, 0, 16)"),
    Rejection("merge: zero columns of a stack", merge(stack(2, 3, 2, 0)), ValueError,
        "states.out must have at least one head and one column, got shape (2, 3, 2, 0)"),
    Rejection("merge: other shapes", changed(1, "out", lambda t: t[:2]), ValueError,
        "states[1].out must be (3, 2, 16), got shape (2, 2, 16)"),
    Rejection("merge: lse of another shape", changed(1, "lse", lambda t: t.mT), ValueError,
        "states[1].lse must be (3, 2), got shape (2, 3)"),
    Rejection("merge: lse of a stack of another shape",
        merge(stack(2, 3, 2, 16)._replace(lse=torch.zeros(3, 2))), ValueError,
        "states.lse must be (2, 3, 2), got shape (3, 2)"),
    Rejection("merge: mask with heads",
        merge(states(), mask=torch.ones(TOKENS, HEADS, dtype=torch.bool)), ValueError,
        "mask must be (3,), got shape (3, 2)"),
    Rejection("merge: buffer of another shape",
        merge(states(), out=torch.zeros(3, 2, 8)), ValueError,
        "out must be (3, 2, 16), got shape (3, 2, 8)"),
    Rejection("merge: lse buffer of another shape",
        merge(states(), lse=torch.zeros(2, 3)), ValueError,
        "lse must be (3, 2), got shape (2, 3)"),
    Rejection("merge: too many rows", lambda: mla_triton.merge([huge(), huge()]), ValueError,
        "states[0].out must have at most 2147483647 rows (query tokens x heads), "
        "got 33554432 x 128"),
    Rejection("merge: last stride", changed(1, "out", spaced), ValueError,
        "states[1].out must have a contiguous last dimension (stride 1), got strides (64, 32, 2)"),
    Rejection("merge: last stride of a stack",
        merge(stack(2, 3, 2, 16)._replace(out=spaced(stack(2, 3, 2, 16).out))), ValueError,
        "states.out must have a contiguous last dimension (stride 1), "
        "got strides (192, 64, 32, 2)"),
    Rejection("merge: last stride of the buffer", merge(states(), out=spaced(state().out)),
        ValueError,
        "out must have a contiguous last dimension (stride 1), got strides (64, 32, 2)"),
    Rejection("merge: an expanded buffer",
        merge(states(), out=torch.zeros(VALUE).expand(TOKENS, HEADS, VALUE)), ValueError,
        "out must be laid out without overlap, got strides (0, 0, 1)"),
    Rejection("merge: an expanded lse",
        merge(states(), lse=torch.zeros(1).expand(TOKENS, HEADS)), ValueError,
        "lse must be laid out without overlap, got strides (0, 0)"),
    Rejection("merge: unlike strides",
        changed(2, "out", lambda t: torch.zeros(TOKENS, HEADS, 32).half()[..., :16], 3), ValueError,
        "states[2].out must have states[1].out's strides (32, 16, 1), got (64, 32, 1)"),
    Rejection("merge: unlike strides of lse",
        changed(2, "lse", lambda t: t.mT.contiguous().mT, 3), ValueError,
        "states[2].lse must have states[1].lse's strides (2, 1), got (1, 3)"),
    Rejection("merge: four dimensions", merge([scattered(), state(2, 2, 2, 2)]), ValueError,
        "states must have rows in at most 3 evenly spaced dimensions, with out and lse, "
        "got 4: sizes (2, 2, 2, 2)"),

    Rejection("merge: out in part of a state",
        buffered(stack(2, 4, 2, 16), out=lambda s: s.out.flatten(0, 1)[1:5]), ValueError,
        f"out must share no memory with states.out, {SHARED}"),
    Rejection("merge: out across a state",
        buffered(out=lambda s: s[1].out.as_strided((TOKENS, HEADS, VALUE), (16, 48, 1))),
        ValueError,
        f"out must share no memory with states[1].out, {SHARED}"),
    Rejection("merge: out in an lse",
        buffered([state(3, 2, value=2), state(3, 2, value=2)],
            out=lambda s: s[0].lse.view(torch.float16).view(3, 2, 2)), ValueError,
        f"out must share no memory with states[0].lse, {SHARED}"),
    Rejection("merge: lse in an out",
        buffered([state(3, 2, value=2), state(3, 2, value=2)],
            lse=lambda s: s[1].out.view(torch.float32).view(3, 2)), ValueError,
        f"lse must share no memory with states[1].out, {SHARED}"),
    Rejection("merge: lse in part of a stack",
        buffered(stack(3, 4, 2, 16), lse=lambda s: s.lse.flatten(0, 1)[1:5]), ValueError,
        f"lse must share no memory with states.lse, {SHARED}"),
    Rejection("merge: lse across a state",
        buffered(lse=lambda s: s[0].lse.as_strided((TOKENS, HEADS), (1, 3))), ValueError,
        f"lse must share no memory with states[0].lse, {SHARED}"),
    Rejection("merge: lse and out in a stack's other half",
        buffered(stack(2, 4, 2, 2), out=lambda s: s.lse.flatten().view(torch.float16)[:16]
            .view(4, 2, 2)), ValueError,
        f"out must share no memory with states.lse, {SHARED}"),
    Rejection("merge: lse in a stack's out",
        buffered(stack(2, 4, 2, 2), lse=lambda s: s.out.flatten().view(torch.float32)[:8]
            .view(4, 2)), ValueError,
        f"lse must share no memory with states.out, {SHARED}"),

    Rejection("merge: no kernel for the card",
        lambda: select.merge(PLAIN, TURING, "portable"), NotImplementedError,
        "impl 'portable' cannot run this merge: it needs capability 8.0 or later, this card has "
        "7.5"),
    Rejection("merge: no implementation for the card",
        lambda: select.merge(PLAIN, TURING), NotImplementedError,
        "no implementation of merge can run on 7.5: portable: it needs capability 8.0 or later, "
        "this card has 7.5; reference: it copies, in float64; on a GPU it runs only when asked "
        "for (impl='reference')"),
]
# fmt: on


def mask_and_result() -> list[Rejection]:
    """Results in a mask's memory, and in each other's."""
    memory = torch.zeros(TOKENS * HEADS * VALUE * 2, dtype=torch.int8)
    mask = memory[:TOKENS].view(torch.bool)
    out = memory.view(torch.float16).view(TOKENS, HEADS, VALUE)
    lse = memory[: TOKENS * HEADS * 4].view(torch.float32).view(TOKENS, HEADS)
    return [
        Rejection(
            "merge: out in the mask",
            merge(states(), mask=mask, out=out),
            ValueError,
            f"out must share no memory with mask, {SHARED}",
        ),
        Rejection(
            "merge: lse in the mask",
            merge(states(), mask=mask, lse=lse),
            ValueError,
            f"lse must share no memory with mask, {SHARED}",
        ),
        Rejection(
            "merge: lse in the result's out",
            merge(states(), out=out, lse=lse),
            ValueError,
            f"out must share no memory with lse, {SHARED}",
        ),
    ]


MERGE += mask_and_result()
