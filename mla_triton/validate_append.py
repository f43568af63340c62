"""Tokens and a cache -> the problem of an append, or an error that names the argument, the rule and
the value.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from mla_triton.cache import LatentCache
from mla_triton.problem_cache import FEW_TOKENS, AppendProblem
from mla_triton.validate import (
    DTYPES,
    INT32_MAX,
    LAST_DIMENSION,
    Facts,
    Layout,
    check_no_grad,
    exceeds_int32,
    facts,
    fail,
    is_list,
    shape,
)
from mla_triton.validate_stored import (
    INTEGERS,
    MOST_TOKENS,
    NAMED_DTYPES,
    Known,
    StoredFacts,
    are_aligned,
    check_apart,
    check_written,
    facts_of,
    find_stored,
    layout_of,
    named,
    row_aligned,
    size_of,
    slots_aligned,
)

STYLES = ("interleaved", "half")


class AppendCall(NamedTuple):
    """All that the rules of append look at."""

    cache: StoredFacts
    latent: Facts
    rope: Facts | None
    slots: Facts
    norm_weight: Facts | None
    cos_sin: Facts | None
    positions: Facts | None
    style: str
    power_of_two: bool
    aligned: bool
    """Whether what the kernels access in wide steps begins at multiples of 16 bytes."""


def check_style(style: Any) -> None:
    if style not in STYLES:
        fail(ValueError, "rope_style", 'be "interleaved" or "half"', repr(style))


def append(
    cache: LatentCache,
    latent: torch.Tensor,
    rope: torch.Tensor | None,
    slots: torch.Tensor,
    norm_weight: torch.Tensor | None,
    cos_sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    style: str,
    power_of_two: bool,
    *,
    has_memory: bool = True,
) -> AppendProblem:
    """Checks one call of append, as `mla_triton.append` has unpacked it."""
    if torch.is_grad_enabled():
        given = {"latent": latent, "rope": rope, "norm_weight": norm_weight, "cos_sin": cos_sin}
        check_no_grad(given | named(cache))
    wide = (latent, rope, cache.ckv, cache.kpe, norm_weight, cos_sin)
    call = AppendCall(
        facts_of(cache),
        facts(latent),
        None if rope is None else facts(rope),
        facts(slots),
        None if norm_weight is None else facts(norm_weight),
        None if cos_sin is None else facts(cos_sin),
        None if positions is None else facts(positions),
        style,
        power_of_two,
        has_memory and are_aligned(wide),
    )
    if not has_memory:
        found: AppendProblem = append_of(call).problem
        return found
    known = known_append(call)
    problem: AppendProblem = known.problem
    written = [cache.ckv, cache.kpe, cache.scales if problem.stored.group else None]
    read = {
        "latent": latent, "rope": rope, "slot_mapping": slots, "norm_weight": norm_weight,
        "cos_sin": cos_sin, "positions": positions,
    }  # fmt: skip
    there = [tensor for tensor in written if tensor is not None]
    check_apart(known, there, read, "the cache")
    return problem


def append_of(call: AppendCall) -> Known:
    """The problem of a call that keeps all rules."""
    latent, slots = Layout(*call.latent), Layout(*call.slots)
    rope, norm_weight, cos_sin, positions = map(
        layout_of, (call.rope, call.norm_weight, call.cos_sin, call.positions)
    )
    read = {
        "latent": latent, "rope": rope, "slot_mapping": slots, "norm_weight": norm_weight,
        "cos_sin": cos_sin, "positions": positions,
    }  # fmt: skip
    for name in ("latent", "norm_weight", "cos_sin"):
        tensor = read[name]
        if tensor is not None and tensor.dtype not in DTYPES:
            fail(TypeError, name, f"be {NAMED_DTYPES}", tensor.dtype)
    if rope is not None and rope.dtype != latent.dtype:
        fail(TypeError, "rope", f"have latent's dtype {latent.dtype}", rope.dtype)
    for name in ("slot_mapping", "positions"):
        tensor = read[name]
        if tensor is not None and tensor.dtype not in INTEGERS:
            fail(TypeError, name, "be int32 or int64", tensor.dtype)
    if len(latent.shape) != 2 or latent.shape[1] < 1:
        fail(ValueError, "latent", "be [tokens, latent] with at least one column", shape(latent))
    tokens, width = latent.shape
    if exceeds_int32(tokens + INT32_MAX - MOST_TOKENS):
        fail(ValueError, "latent", f"have at most {MOST_TOKENS} tokens", tokens)
    rope_width = 0
    if rope is not None:
        if len(rope.shape) != 2 or rope.shape[0] != tokens or rope.shape[1] < 1:
            fail(ValueError, "rope", f"be [{tokens}, rope] like latent", shape(rope))
        rope_width = rope.shape[1]
    found = find_stored(call.cache, width, rope_width)
    for name, tensor, expected in (
        ("slot_mapping", slots, tokens), ("positions", positions, tokens),
        ("norm_weight", norm_weight, width),
    ):  # fmt: skip
        if tensor is not None and not (is_list(tensor) and tensor.shape[0] == expected):
            fail(ValueError, name, f"be contiguous [{expected}]", tensor)
    _check_rotation(rope_width, cos_sin, positions)
    for name, tensor in read.items():
        if tensor is None:
            continue
        if not tensor.last_is_contiguous:
            fail(ValueError, name, LAST_DIMENSION, f"strides {tuple(tensor.strides)}")
    every = {**read, **found.tensors}
    for name, tensor in every.items():
        if tensor is not None and tensor.device != latent.device:
            fail(ValueError, name, f"be on latent's device {latent.device}", tensor.device)
    written = check_written(found)
    stored = found.stored
    problem = AppendProblem(
        dtype=latent.dtype,
        stored=stored,
        power_of_two=call.power_of_two or stored.scale_dtype == torch.uint8,
        slot_dtype=slots.dtype,
        norm_dtype=None if norm_weight is None else norm_weight.dtype,
        rotation=None if cos_sin is None else call.style,
        cos_sin_dtype=None if cos_sin is None else cos_sin.dtype,
        position_dtype=None if positions is None else positions.dtype,
        aligned=call.aligned
        and slots_aligned(found)
        and all(row_aligned(tensor) for tensor in (latent, rope, cos_sin)),
        few=tokens <= FEW_TOKENS,
        tokens=tokens,
    )
    return Known(problem, written, tuple(size_of(tensor) for tensor in read.values()))


known_append = lru_cache(maxsize=1024)(append_of)


def _check_rotation(rope: int, cos_sin: Layout | None, positions: Layout | None) -> None:
    if (cos_sin is None) != (positions is None):
        got = "None" if positions is None else "a tensor"
        fail(ValueError, "positions", "be given if, and only if, cos_sin is", got)
    if cos_sin is None:
        return
    if rope == 0 or rope % 2:
        fail(ValueError, "rope", "have an even number of columns where cos_sin is given", rope)
    if len(cos_sin.shape) != 2 or cos_sin.shape[0] < 1 or cos_sin.shape[1] != rope:
        rule = f"be [max_positions, {rope}] with at least one position"
        fail(ValueError, "cos_sin", rule, shape(cos_sin))
