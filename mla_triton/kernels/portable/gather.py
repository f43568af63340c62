"""Tokens of requests from the pages of a latent cache into rows, in Triton: the opposite of append.

What: row r belongs to the request b with `cu_seqlens_k[b] <= r < cu_seqlens_k[b + 1]`, and becomes
its key number `starts[b] + r - cu_seqlens_k[b]`, in 16 bit or float32, multiplied by its scales. A
key that has no page in the cache becomes 0; a row of no request is left as it is. Where: NVIDIA
from capability 8.0 on, AMD CDNA3 and later, Triton's interpreter.

Work: a program takes some whole rows, whatever requests they are of: each row finds its own by
bisection, so that long requests and short ones, and requests with none, cost the same a row.

Budget: as append's; every element is read once and written once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from mla_triton.device import Device
from mla_triton.kernels.common.e4m3 import bytes_of, converts_e4m3, decode_e4m3, decode_e8m0
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
from mla_triton.problem_cache import GatherProblem

__all__ = [
    "NAME",
    "OP",
    "Config",
    "GatherTensors",
    "choose",
    "compile",
    "heuristic",
    "is_valid",
    "launch",
    "tuning_point",
    "variant",
    "why_not",
]

OP = "gather"
NAME = "portable"
NUMBERS = (
    "latents_page", "keys_page", "scales_page", "out_row", "rope_out_row", "table_row", "width",
    "num_pages",
)  # fmt: skip


class GatherTensors(NamedTuple):
    """What a launch reads and writes."""

    latents: torch.Tensor
    """`[pages, page_size, latent]`, of the cache."""
    keys: torch.Tensor | None
    """`[pages, page_size, rope]`, of the cache."""
    scales: torch.Tensor | None
    """Float32 `[2]`, or `[pages, page_size, groups]`."""
    key_scales: torch.Tensor | None
    """The same `[2]`, or the scales of the groups of keys behind the latents."""
    pages: torch.Tensor
    """Dense page table, or the indices of a CSR one."""
    indptr: torch.Tensor | None
    cu_seqlens_k: torch.Tensor
    starts: torch.Tensor | None
    out: torch.Tensor
    rope_out: torch.Tensor | None


def why_not(problem: GatherProblem, device: Device) -> str | None:
    """The reason this implementation cannot take a problem, or None."""
    return why_not_stored(problem.stored, device)


@triton.jit
def request_of(cu_seqlens_k, row, batch, steps):
    """The last request that begins at each row or before it; one of the batch in any case."""
    low = row * 0
    high = low + batch
    for _ in range(steps):
        middle = (low + high) // 2
        begins = tl.load(cu_seqlens_k + middle) <= row
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle)
    return low


@triton.jit
def page_ids(
    pages, indptr, request, key, is_row, table_row, width,
    PAGE_SIZE: tl.constexpr, CSR: tl.constexpr,
):  # fmt: skip
    """Page ids (int64) of keys, -1 where the table has none: `width` entries, or `width` a row."""
    if CSR:
        first = tl.load(indptr + request).to(tl.int64)
        end = tl.load(indptr + request + 1).to(tl.int64)
        first = tl.minimum(tl.maximum(first, 0), width)
        entries = tl.minimum(tl.maximum(end, first), width) - first
    else:
        first = request.to(tl.int64) * table_row
        entries = width
    has_page = is_row & (key >= 0) & (key < entries * PAGE_SIZE)
    place = tl.where(has_page, first + key // PAGE_SIZE, 0)
    return tl.load(pages + place, mask=has_page, other=-1).to(tl.int64)


@triton.jit
def load_columns(
    rows, scales, scale_places, is_there,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    SCALING: tl.constexpr, PART: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Columns of a part: as the cache has them, or in float32 by their scales; else 0.

    `rows` points to the part in each token's slot. `scales` are those of groups, a token's at
    `scale_places`, or one for each part.
    """
    column = tl.arange(0, COLUMNS)
    is_column = is_there[:, None] & (column < WIDTH)[None, :]
    values = tl.load(rows[:, None] + column[None, :], mask=is_column, other=0)
    if SCALING == "none":
        return values
    elif SCALING == "one":
        factor = tl.load(scales + PART + tl.arange(0, 1))
        scaled = decode_e4m3(values, NATIVE) * factor[None, :]
        # The scale may be no number.
        return tl.where(is_column, scaled, 0.0)
    else:
        GROUPS: tl.constexpr = COLUMNS // GROUP
        group = tl.arange(0, GROUPS)
        is_group = is_there[:, None] & (group < WIDTH // GROUP)[None, :]
        factors = tl.load((scales + scale_places)[:, None] + group[None, :], mask=is_group, other=0)
        if scales.dtype.element_ty == tl.uint8:
            factors = decode_e8m0(factors)
        grouped = tl.reshape(decode_e4m3(values, NATIVE), (ROWS, GROUPS, GROUP))
        return tl.reshape(grouped * factors[:, :, None], (ROWS, COLUMNS))


@triton.jit
def store_row(
    values, base, row, step, is_row, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr, EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    """Writes the columns of rows, rounded to what `base` points to."""
    TYPE: tl.constexpr = base.dtype.element_ty
    if values.dtype != TYPE:
        values = narrow(values.to(tl.float32), TYPE, EMULATE_BF16)
    column = tl.arange(0, COLUMNS)
    tl.store(
        row_pointers(base, row, step, ALIGNED)[:, None] + column[None, :],
        values,
        mask=is_row[:, None] & (column < WIDTH)[None, :],
    )


@triton.jit
def gather_kernel(
    latents, keys, scales, key_scales, pages, indptr, cu_seqlens_k, starts, out, rope_out,
    latents_page, keys_page, scales_page, out_row, rope_out_row, table_row, width, num_pages,
    rows, batch, steps,
    LATENT: tl.constexpr, COLUMNS: tl.constexpr, ROPE: tl.constexpr, KEY_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, PAGE_SIZE: tl.constexpr, LATENTS_STEP: tl.constexpr,
    KEYS_STEP: tl.constexpr, SCALES_STEP: tl.constexpr, GROUP: tl.constexpr, SCALING: tl.constexpr,
    KEY_SCALING: tl.constexpr, CSR: tl.constexpr, STARTS: tl.constexpr, ALIGNED: tl.constexpr,
    NATIVE: tl.constexpr, EMULATE_BF16: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    request = request_of(cu_seqlens_k, row, batch, steps)
    begin = tl.load(cu_seqlens_k + request)
    end = tl.load(cu_seqlens_k + request + 1)
    is_row = (row < rows) & (row >= begin) & (row < end)
    key = row.to(tl.int64) - begin
    if STARTS:
        key += tl.load(starts + request)
    page = page_ids(pages, indptr, request, key, is_row, table_row, width, PAGE_SIZE, CSR)
    is_there = (page >= 0) & (page < num_pages)
    page = tl.where(is_there, page, 0)
    place = tl.where(is_there, key % PAGE_SIZE, 0)

    scale_places = page * scales_page + place * SCALES_STEP
    values = load_columns(
        slot_pointers(latents, page, place, latents_page, LATENTS_STEP, ALIGNED), scales,
        scale_places, is_there, LATENT, COLUMNS, ROWS, GROUP, SCALING, 0, NATIVE,
    )  # fmt: skip
    if ROPE > 0:
        key_values = load_columns(
            slot_pointers(keys, page, place, keys_page, KEYS_STEP, ALIGNED), key_scales,
            scale_places, is_there, ROPE, KEY_COLUMNS, ROWS, GROUP, KEY_SCALING, 1, NATIVE,
        )  # fmt: skip
    row = row.to(tl.int64)
    store_row(values, out, row, out_row, is_row, LATENT, COLUMNS, ALIGNED, EMULATE_BF16)
    if ROPE > 0:
        store_row(
            key_values, rope_out, row, rope_out_row, is_row, ROPE, KEY_COLUMNS, ALIGNED,
            EMULATE_BF16,
        )  # fmt: skip


def variant(problem: GatherProblem, config: Config, device: Device) -> Variant:
    """The kernel for a problem: how many rows, requests and pages there are is not constant."""
    stored = problem.stored
    dtypes = {
        "latents": stored.latent_dtype,
        "keys": stored.rope_dtype,
        "scales": stored.scale_dtype,
        "key_scales": stored.scale_dtype,
        "pages": torch.int32,
        "indptr": torch.int32,
        "cu_seqlens_k": torch.int32,
        "starts": torch.int32,
        "out": problem.dtype,
        "rope_out": problem.dtype,
    }
    return Variant(
        gather_kernel,
        (
            *((name, pointer_type(dtype)) for name, dtype in dtypes.items()),
            *((name, "i64") for name in NUMBERS),
            *((name, "i32") for name in ("rows", "batch", "steps")),
        ),
        (
            ("LATENT", stored.latent),
            ("COLUMNS", columns(problem)),
            ("ROPE", stored.rope),
            ("KEY_COLUMNS", triton.next_power_of_2(stored.rope)),
            ("ROWS", config.rows),
            ("PAGE_SIZE", stored.page_size),
            ("LATENTS_STEP", stored.latent_step),
            ("KEYS_STEP", stored.rope_step),
            ("SCALES_STEP", stored.scale_step),
            ("GROUP", stored.group),
            ("SCALING", stored.scaling),
            ("KEY_SCALING", stored.rope_scaling),
            ("CSR", problem.csr),
            ("STARTS", problem.starts),
            ("ALIGNED", problem.aligned),
            ("NATIVE", converts_e4m3(device)),
            ("EMULATE_BF16", emulates_bf16(problem.dtype, device)),
        ),
        frozenset(("latents", "keys", "out", "rope_out")) if problem.aligned else frozenset(),
        config.num_warps,
    )


def compile(problem: GatherProblem, config: Config, device: Device) -> Any:
    """Machine code for `device`; launches nothing and needs no GPU."""
    return variant(problem, config, device).compile(device)


def launch(
    launcher: Launch, problem: GatherProblem, config: Config, tensors: GatherTensors
) -> None:
    """Writes `out` and `rope_out`."""
    latents, keys, scales, pages = tensors.latents, tensors.keys, tensors.scales, tensors.pages
    if latents.device.type == "cpu":
        latents, keys = bytes_of(latents), bytes_of(keys)  # type: ignore[assignment]
    launcher(
        (cdiv(problem.rows, config.rows), 1, 1),
        [
            latents,
            keys,
            scales,
            tensors.key_scales,
            pages,
            tensors.indptr,
            tensors.cu_seqlens_k,
            tensors.starts,
            tensors.out,
            tensors.rope_out,
            latents.stride(0),
            0 if keys is None else keys.stride(0),
            scales.stride(0) if problem.stored.group and scales is not None else 0,
            tensors.out.stride(0),
            0 if tensors.rope_out is None else tensors.rope_out.stride(0),
            0 if problem.csr else pages.stride(0),
            pages.shape[-1],
            latents.shape[0],
            problem.rows,
            problem.batch,
            problem.batch.bit_length(),
        ],
    )
