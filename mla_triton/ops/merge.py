"""Merge: attention over all keys, from attention over parts of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch

from mla_triton import configs, reference, select, validate, validate_merge
from mla_triton import device as devices
from mla_triton.device import Device
from mla_triton.kernels.common.launch import Launcher
from mla_triton.kernels.portable.merge import MergeTensors
from mla_triton.ops.library import LIBRARY
from mla_triton.ops.plan import launcher
from mla_triton.ops.recall import is_plain_eager
from mla_triton.problem import MOST_APART, MergeProblem
from mla_triton.state import AttentionState


def merge(
    states: Sequence[AttentionState] | AttentionState,
    *,
    mask: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    impl: str | None = None,
) -> AttentionState:
    """Attention over all keys, from the states of the same queries over disjoint parts of them.

    The order of the states changes no more than roundings. A state that is empty (lse -inf) counts
    for nothing, whatever its `out` holds; of empty states alone the result is empty: out 0, lse
    -inf. A NaN reaches its own row. An lse of +inf, which no state over finite logits has, makes
    its row NaN.

    Args:
        states: two to eight `AttentionState`, each `[..., heads, value_dim]` and `[..., heads]`;
            or one `AttentionState` that is a stack of any number, `[states, ..., heads, value_dim]`
            and `[states, ..., heads]`. `out` float16, bfloat16 or float32; the first state's may be
            another than that of the others. `lse` float32, natural logarithm. Any strides but the
            last of `out`, the same for all separate states behind the first.
        mask: bool `[...]`: where it is False, the first state stays as it is, for all heads.
        out, lse: buffers for the result: `[..., heads, value_dim]` float16, bfloat16 or float32, by
            default the first state's dtype, and `[..., heads]` float32. They may be the `out` and
            the `lse` of a state: then the merge is in place.
        impl: "portable" or "reference"; refused with a reason where it cannot run, never replaced.

    Returns:
        `AttentionState(out, lse)`.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message names argument, rule and
            value.
        NotImplementedError: no implementation, or not `impl`, can take the problem; says why.

    Source: FlashAttention-2 (arXiv:2307.08691), section 2.3; docs/math.md has the formula.
    """
    outs, lses = validate_merge.unpack(states)
    validate.check_impl(impl)
    if mask is not None:
        validate.check_tensor("mask", mask)
    is_stack = len(outs) == 1
    if out is None:
        shape = outs[0].shape[1:] if is_stack else outs[0].shape
        out = outs[0].new_empty(shape)
    else:
        validate.check_tensor("out", out)
    if lse is None:
        shape = lses[0].shape[1:] if is_stack else lses[0].shape
        lse = lses[0].new_empty(shape, dtype=torch.float32)
    else:
        validate.check_tensor("lse", lse)
    if _is_direct(outs, lses, mask, out, lse):
        _merge(outs, lses, mask, out, lse, impl)
    else:
        torch.ops.mla_triton.merge(outs, lses, mask, out, lse, impl)
    return AttentionState(out, lse)


def _is_direct(
    outs: list[torch.Tensor],
    lses: list[torch.Tensor],
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> bool:
    """Whether the operator would do nothing but run its kernel: the way to it takes some time."""
    if not is_plain_eager() or (mask is not None and type(mask) is not torch.Tensor):
        return False
    is_here = out.is_cuda or out.device.type == "cpu"
    return is_here and all(type(t) is torch.Tensor for t in (*outs, *lses, out, lse))


LIBRARY.define(
    "merge(Tensor[] outs, Tensor[] lses, Tensor? mask, Tensor(a!) out, Tensor(b!) lse, str? impl) "
    "-> ()"
)


class Prepared(NamedTuple):
    """What an implementation needs for a problem on a device, found once and kept."""

    config: Any
    kernel: Launcher


@lru_cache(maxsize=1024)
def prepare(
    implementation: ModuleType, problem: MergeProblem, device: Device, index: int | None
) -> Prepared:
    config = configs.choose(implementation, problem, device, None).config
    return prepare_with(config, implementation, problem, device, index)


def prepare_with(
    config: Any,
    implementation: ModuleType,
    problem: MergeProblem,
    device: Device,
    index: int | None,
) -> Prepared:
    """The same with a config that is given rather than looked up."""
    return Prepared(
        config, launcher(implementation.variant(problem, config, device), device, index)
    )


def _merge(
    outs: list[torch.Tensor],
    lses: list[torch.Tensor],
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    impl: str | None,
) -> None:
    problem, layout, *_ = validate_merge.merge(outs, lses, mask, out, lse)
    device = devices.of(out.device)
    chosen = select.merge(problem, device, impl)
    if problem.rows == 0:
        return
    if chosen.name == "reference":
        if len(outs) == 1:
            states: Any = AttentionState(outs[0], lses[0])
        else:
            states = [AttentionState(*state) for state in zip(outs, lses, strict=True)]
        exact = reference.merge(states, mask=mask)
        out.copy_(exact.out)
        lse.copy_(exact.lse)
        return
    if len(outs) == 1:
        # The kernel has an address for the first of a stack, and finds the others from there.
        first = min(MOST_APART, problem.states)
        outs, lses = ([*stack.narrow(0, 0, first).unbind()] for stack in (outs[0], lses[0]))
    ready = prepare(chosen.module, problem, device, out.device.index)
    tensors = MergeTensors(outs, lses, mask, out, lse)
    chosen.module.launch(ready.kernel, problem, ready.config, layout, tensors)


def _merge_fake(
    outs: list[torch.Tensor],
    lses: list[torch.Tensor],
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    impl: str | None,
) -> None:
    """The rules alone: results go to `out` and `lse`, which are there."""
    validate_merge.merge_without_memory(outs, lses, mask, out, lse)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("merge", _merge, _key)
torch.library.register_fake("mla_triton::merge", _merge_fake, lib=LIBRARY)
