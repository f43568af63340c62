"""Tokens into the slots of a paged latent cache, in Triton: normed, rotated, quantised on the way.

What: row n of the latents and of the rotary keys goes to slot `slots[n]`, as the cache has its
numbers; where asked for, the latent through an RMSNorm and the key through a rotation first, in
float32, with no rounding in between. Where: NVIDIA from capability 8.0 on, AMD CDNA3 and later,
Triton's interpreter. A slot that is negative, or behind the cache's last, is not written.

Work: a program takes some whole tokens: all loads first, those of angles behind the rest, because
they wait for positions; then keys, whose angles come last, and latents; each in accesses of 16
bytes a thread where rows are aligned. A warp alone, so that sums and maxima over a row's columns
stay within it. Every element is read once and written once: many tokens are bound by memory, few by
the way from a slot's number to its address, which the loads of the row do not wait for.

Budget: no shared memory but for what the compiler exchanges between layouts; the columns of `rows`
tokens in registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from mla_triton.device import Device
from mla_triton.kernels.common.e4m3 import (
    bytes_of,
    converts_e4m3,
    encode_e4m3,
    encode_e8m0,
    group_scales,
    reciprocal,
)
from mla_triton.kernels.common.launch import Launch, Variant, emulates_bf16
from mla_triton.kernels.common.slots import (
    pointer_type,
    row_pointers,
    slot_pointers,
    why_not_stored,
)
from mla_triton.kernels.common.tiles import narrow
from mla_triton.kernels.common.token_config import (
    Config,
    choose,
    columns,
    heuristic,
    is_valid,
    tuning_point,
)
from mla_triton.plan import cdiv
from mla_triton.problem_cache import AppendProblem

__all__ = [
    "NAME",
    "OP",
    "AppendTensors",
    "Config",
    "choose",
    "compile",
    "heuristic",
    "is_valid",
    "launch",
    "tuning_point",
    "variant",
    "why_not",
]

OP = "append"
NAME = "portable"
NUMBERS = (
    "latent_row", "rope_row", "latents_page", "keys_page", "scales_page", "cos_sin_row", "capacity",
)  # fmt: skip


class AppendTensors(NamedTuple):
    """What a launch reads and writes."""

    latent: torch.Tensor
    rope: torch.Tensor | None
    slots: torch.Tensor
    latents: torch.Tensor
    """`[pages, page_size, latent]`, of the cache."""
    keys: torch.Tensor | None
    """`[pages, page_size, rope]`, of the cache."""
    scales: torch.Tensor | None
    """Float32 `[2]`, or `[pages, page_size, groups]`."""
    key_scales: torch.Tensor | None
    """The same `[2]`, or the scales of the groups of keys behind the latents."""
    norm_weight: torch.Tensor | None
    cos_sin: torch.Tensor | None
    positions: torch.Tensor | None
    norm_eps: float


def why_not(problem: AppendProblem, device: Device) -> str | None:
    """The reason this implementation cannot take a problem, or None."""
    reason = why_not_stored(problem.stored, device)
    half, group = problem.stored.rope // 2, problem.stored.group
    is_grouped = problem.rotation == "half" and problem.stored.rope_scaling == "groups"
    if reason is None and is_grouped and half % group:
        reason = f"half of the rope part, {half} columns, must be whole groups of {group}"
    return reason


@triton.jit
def normalised(values, weight, eps, WIDTH: tl.constexpr):
    """Rows by the root of their mean square, times a weight, in float32."""
    values = values.to(tl.float32)
    mean = tl.sum(values * values, 1) / WIDTH
    return values * tl.rsqrt(mean + eps)[:, None] * weight.to(tl.float32)[None, :]


@triton.jit
def rotated(first, second, cos, sin):
    """Pairs turned by their angles, in float32."""
    first, second = first.to(tl.float32), second.to(tl.float32)
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def store_columns(
    values, rows, scales, scale_places, is_row, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, SCALING: tl.constexpr,
    PART: tl.constexpr, POWER_OF_TWO: tl.constexpr, NATIVE: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """Writes columns of a part from `FIRST` on, in the cache's numbers, and the groups' scales.

    `rows` points to the part in each token's slot. `scales` are those of groups, a token's at
    `scale_places`, or one for each part.
    """
    column = tl.arange(0, COLUMNS)
    pointers = (rows + FIRST)[:, None] + column[None, :]
    is_column = is_row[:, None] & (column < WIDTH)[None, :]
    TYPE: tl.constexpr = rows.dtype.element_ty
    if SCALING == "none":
        if values.dtype != TYPE:
            values = narrow(values.to(tl.float32), TYPE, EMULATE_BF16)
        tl.store(pointers, values, mask=is_column)
    elif SCALING == "one":
        factor = reciprocal(tl.load(scales + PART + tl.arange(0, 1)))
        tl.store(pointers, encode_e4m3(values.to(tl.float32) * factor[None, :], NATIVE), is_column)
    else:
        GROUPS: tl.constexpr = COLUMNS // GROUP
        grouped = tl.reshape(values.to(tl.float32), (ROWS, GROUPS, GROUP))
        made, inverse = group_scales(grouped, POWER_OF_TWO)
        scaled = tl.reshape(grouped * inverse[:, :, None], (ROWS, COLUMNS))
        tl.store(pointers, encode_e4m3(scaled, NATIVE), mask=is_column)
        group = tl.arange(0, GROUPS)
        if scales.dtype.element_ty == tl.uint8:
            made = encode_e8m0(made)
        tl.store(
            (scales + scale_places + FIRST // GROUP)[:, None] + group[None, :],
            made,
            mask=is_row[:, None] & (group < WIDTH // GROUP)[None, :],
        )


@triton.jit
def append_kernel(
    latent, rope, slots, latents, keys, scales, key_scales, norm_weight, cos_sin, positions,
    latent_row, rope_row, latents_page, keys_page, scales_page, cos_sin_row, capacity,
    tokens, max_positions, norm_eps,
    LATENT: tl.constexpr, COLUMNS: tl.constexpr, ROPE: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, PAGE_SIZE: tl.constexpr, LATENTS_STEP: tl.constexpr,
    KEYS_STEP: tl.constexpr, SCALES_STEP: tl.constexpr, GROUP: tl.constexpr, SCALING: tl.constexpr,
    KEY_SCALING: tl.constexpr, POWER_OF_TWO: tl.constexpr, NORM: tl.constexpr,
    ROTATION: tl.constexpr, ALIGNED: tl.constexpr, NATIVE: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token = token < tokens
    slot = tl.load(slots + token, mask=is_token, other=-1).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    is_column = column < LATENT
    row = token.to(tl.int64)
    values = tl.load(
        row_pointers(latent, row, latent_row, ALIGNED)[:, None] + column[None, :],
        mask=is_token[:, None] & is_column[None, :],
        other=0.0,
    )
    if NORM:
        weight = tl.load(norm_weight + column, mask=is_column, other=0.0)

    # HALF is a power of two that holds half of the rope part's columns.
    if ROPE > 0:
        pair = tl.arange(0, HALF)
        key_column = tl.arange(0, 2 * HALF)
        key_rows = row_pointers(rope, row, rope_row, ALIGNED)
        is_pair = is_token[:, None] & (pair < ROPE // 2)[None, :]
        if ROTATION == "half":
            pairs = key_rows[:, None] + pair[None, :]
            first = tl.load(pairs, mask=is_pair, other=0.0)
            second = tl.load(pairs + ROPE // 2, mask=is_pair, other=0.0)
        else:
            key = tl.load(
                key_rows[:, None] + key_column[None, :],
                mask=is_token[:, None] & (key_column < ROPE)[None, :],
                other=0.0,
            )
        if ROTATION != "none":
            position = tl.load(positions + token, mask=is_token, other=0).to(tl.int64)
            # Or the compiler has everything wait for the positions, before it loads latents.
            tl.debug_barrier()
            position = tl.minimum(tl.maximum(position, 0), max_positions - 1)
            angles = row_pointers(cos_sin, position, cos_sin_row, ALIGNED)
            angles = angles[:, None] + pair[None, :]
            cos = tl.load(angles, mask=is_pair, other=0.0)
            sin = tl.load(angles + ROPE // 2, mask=is_pair, other=0.0)

    is_written = (slot >= 0) & (slot < capacity)
    slot = tl.where(is_written, slot, 0)
    page = slot // PAGE_SIZE
    place = slot % PAGE_SIZE
    latent_rows = slot_pointers(latents, page, place, latents_page, LATENTS_STEP, ALIGNED)
    scale_place = page * scales_page + place * SCALES_STEP
    if ROPE > 0:
        rows = slot_pointers(keys, page, place, keys_page, KEYS_STEP, ALIGNED)
        if ROTATION == "interleaved":
            first, second = tl.split(tl.reshape(key, (ROWS, HALF, 2)))
        if ROTATION != "none":
            first, second = rotated(first, second, cos, sin)
        if ROTATION == "half":
            store_columns(
                first, rows, key_scales, scale_place, is_written, 0, ROPE // 2, HALF, ROWS,
                GROUP, KEY_SCALING, 1, POWER_OF_TWO, NATIVE, EMULATE_BF16,
            )  # fmt: skip
            store_columns(
                second, rows, key_scales, scale_place, is_written, ROPE // 2, ROPE // 2, HALF, ROWS,
                GROUP, KEY_SCALING, 1, POWER_OF_TWO, NATIVE, EMULATE_BF16,
            )  # fmt: skip
        else:
            if ROTATION == "interleaved":
                key = tl.reshape(tl.join(first, second), (ROWS, 2 * HALF))
            store_columns(
                key, rows, key_scales, scale_place, is_written, 0, ROPE, 2 * HALF, ROWS,
                GROUP, KEY_SCALING, 1, POWER_OF_TWO, NATIVE, EMULATE_BF16,
            )  # fmt: skip
    if NORM:
        values = normalised(values, weight, norm_eps, LATENT)
    store_columns(
        values, latent_rows, scales, scale_place, is_written, 0, LATENT, COLUMNS, ROWS,
        GROUP, SCALING, 0, POWER_OF_TWO, NATIVE, EMULATE_BF16,
    )  # fmt: skip


def variant(problem: AppendProblem, config: Config, device: Device) -> Variant:
    """The kernel for a problem: how many tokens, pages and positions there are is not constant."""
    stored = problem.stored
    dtypes = {
        "latent": problem.dtype,
        "rope": problem.dtype,
        "slots": problem.slot_dtype,
        "latents": stored.latent_dtype,
        "keys": stored.rope_dtype,
        "scales": stored.scale_dtype,
        "key_scales": stored.scale_dtype,
        "norm_weight": problem.norm_dtype,
        "cos_sin": problem.cos_sin_dtype,
        "positions": problem.position_dtype,
    }
    made = (stored.latent_dtype, stored.rope_dtype)
    aligned = ("latent", "rope", "latents", "keys", "norm_weight", "cos_sin")
    return Variant(
        append_kernel,
        (
            *((name, pointer_type(dtype)) for name, dtype in dtypes.items()),
            *((name, "i64") for name in NUMBERS),
            ("tokens", "i32"),
            ("max_positions", "i64"),
            ("norm_eps", "fp32"),
        ),
        (
            ("LATENT", stored.latent),
            ("COLUMNS", columns(problem)),
            ("ROPE", stored.rope),
            ("HALF", triton.next_power_of_2(cdiv(stored.rope, 2))),
            ("ROWS", config.rows),
            ("PAGE_SIZE", stored.page_size),
            ("LATENTS_STEP", stored.latent_step),
            ("KEYS_STEP", stored.rope_step),
            ("SCALES_STEP", stored.scale_step),
            ("GROUP", stored.group),
            ("SCALING", stored.scaling),
            ("KEY_SCALING", stored.rope_scaling),
            ("POWER_OF_TWO", problem.power_of_two),
            ("NORM", problem.norm_dtype is not None),
            ("ROTATION", problem.rotation or "none"),
            ("ALIGNED", problem.aligned),
            ("NATIVE", converts_e4m3(device)),
            ("EMULATE_BF16", any(emulates_bf16(dtype, device) for dtype in made)),
        ),
        frozenset(aligned) if problem.aligned else frozenset(),
        config.num_warps,
    )


def compile(problem: AppendProblem, config: Config, device: Device) -> Any:
    """Machine code for `device`; launches nothing and needs no GPU."""
    return variant(problem, config, device).compile(device)


def launch(
    launcher: Launch,
    problem: AppendProblem,
    config: Config,
    tensors: AppendTensors,
) -> None:
    """Writes the tokens to their slots."""
    latents, keys, scales = tensors.latents, tensors.keys, tensors.scales
    rope, cos_sin = tensors.rope, tensors.cos_sin
    has_groups = problem.stored.scaling == "groups"
    if latents.device.type == "cpu":
        latents, keys = bytes_of(latents), bytes_of(keys)  # type: ignore[assignment]
    launcher(
        (cdiv(problem.tokens, config.rows), 1, 1),
        [
            tensors.latent,
            rope,
            tensors.slots,
            latents,
            keys,
            scales,
            tensors.key_scales,
            tensors.norm_weight,
            cos_sin,
            tensors.positions,
            tensors.latent.stride(0),
            0 if rope is None else rope.stride(0),
            latents.stride(0),
            0 if keys is None else keys.stride(0),
            scales.stride(0) if has_groups and scales is not None else 0,
            0 if cos_sin is None else cos_sin.stride(0),
            latents.shape[0] * latents.shape[1],
            tensors.latent.shape[0],
            1 if cos_sin is None else cos_sin.shape[0],
            tensors.norm_eps,
        ],
    )
