"""Split-KV absorbed attention over a paged latent cache, for Hopper, in Gluon.

What: as `mla_triton.kernels.portable.decode`, over the same schedule, into the same partial
results. Where: capability 9.0 exactly.

Work: program (lane, part) walks the groups of its part, with a tile of 64 rows, in three
partitions: two warpgroups, each of which keeps one half of the latent output in registers (64 x 256
float32: 128 a thread), and one warp that loads keys by TMA. A key block is 64 keys. How the two
share the work is one of two forms: `asymmetric.py` for few rows, `pairs.py` for many; each says
what its shared memory holds and which barriers it has.

Budget at latent 512 + rope 64: 225 and 218 KiB of shared memory; 168 registers a thread as
launched, 240 for a warpgroup and 24 for the loader once they are apart.
"""

from __future__ import annotations

from typing import Any

import torch

from mla_triton.device import Device
from mla_triton.kernels.common.launch import TYPE_NAMES, Launch, Variant
from mla_triton.kernels.common.tensors import DecodeTensors
from mla_triton.kernels.sm90 import asymmetric, gather, pairs, quantised
from mla_triton.kernels.sm90.decode_config import (
    BLOCK,
    NAME,
    OP,
    Config,
    choose,
    gathers,
    geometry,
    heuristic,
    is_valid,
    row_tile,
    search_space,
    tuning_point,
    why_not,
)
from mla_triton.kernels.sm90.gluon import GluonASTSource, gl, gluon
from mla_triton.kernels.sm90.pieces import KEYS, ROWS, Call, barriers
from mla_triton.kernels.sm90.views import maps, row_strides, sizes
from mla_triton.plan import Geometry
from mla_triton.problem import DecodeProblem

__all__ = [
    "NAME",
    "OP",
    "Config",
    "choose",
    "compile",
    "geometry",
    "heuristic",
    "is_valid",
    "launch",
    "row_tile",
    "search_space",
    "tuning_point",
    "variant",
    "why_not",
]

REGISTERS_AT_LAUNCH = 168
REGISTERS = gl.constexpr(240)
"""Of a thread of a warpgroup, once the loader has given its own away."""
LOADER_REGISTERS = gl.constexpr(24)
TILE = gl.NVMMASharedLayout(128, 16, 2)
"""How a tile of 16-bit numbers lies in shared memory for TMA and wgmma: in 128-byte swizzles."""
ARGUMENTS = (
    ("q_nope", "*T"),
    ("q_rope", "*T"),
    ("pages", "*i32"),
    ("indptr", "*i32"),
    ("kv_lens", "*i32"),
    ("cu_seqlens_q", "*i32"),
    ("schedule", "*i32"),
    ("partial_out", "*fp32"),
    ("partial_lse", "*fp32"),
    ("out", "*T"),
    ("lse", "*fp32"),
    ("ckv", "*T"),
    ("kpe", "*T"),
    ("half_map", "map of half of a latent"),
    ("rope_map", "map of a rotary key"),
    ("q_nope_stride_b", "i64"),
    ("q_nope_stride_s", "i64"),
    ("q_nope_stride_h", "i64"),
    ("q_rope_stride_b", "i64"),
    ("q_rope_stride_s", "i64"),
    ("q_rope_stride_h", "i64"),
    ("out_stride_b", "i64"),
    ("out_stride_s", "i64"),
    ("out_stride_h", "i64"),
    ("lse_stride_b", "i64"),
    ("lse_stride_s", "i64"),
    ("lse_stride_h", "i64"),
    ("ckv_stride_page", "i64"),
    ("ckv_stride_slot", "i64"),
    ("kpe_stride_page", "i64"),
    ("kpe_stride_slot", "i64"),
    ("table_size", "i64"),
    ("page_rows", "i32"),
    ("rope_column", "i32"),
    ("batch", "i32"),
    ("s_q", "i32"),
    ("queries", "i32"),
    ("heads", "i32"),
    ("max_kv_len", "i32"),
    ("planned_kv_len", "i32"),
    ("num_pages", "i32"),
    ("parts", "i32"),
    ("scale_log2", "fp32"),
)
ALIGNED = frozenset(
    name
    for name, _ in ARGUMENTS
    if name in ("q_nope", "q_rope", "out", "partial_out", "ckv", "kpe", "rope_column")
    or (name.startswith(("q_", "out_", "ckv_", "kpe_")) and "_stride_" in name)
)


_asymmetric, _pairs = asymmetric.Shared, pairs.Shared
_load_blocks, _scores, _rest = (
    asymmetric.load_keys,
    asymmetric.attend_scores,
    asymmetric.attend_right,
)
_load_rows, ARRIVALS, WARPS = gather.load_rows, gather.ARRIVALS, gather.WARPS
_load_pairs, _left, _right = pairs.load_pairs, pairs.attend_left, pairs.attend_right


@gluon.jit
def decode_kernel(
    q_nope, q_rope, pages, indptr, kv_lens, cu_seqlens_q, schedule,
    partial_out, partial_lse, out, lse, ckv, kpe, half_map, rope_map,
    q_nope_stride_b, q_nope_stride_s, q_nope_stride_h,
    q_rope_stride_b, q_rope_stride_s, q_rope_stride_h,
    out_stride_b, out_stride_s, out_stride_h, lse_stride_b, lse_stride_s, lse_stride_h,
    ckv_stride_page, ckv_stride_slot, kpe_stride_page, kpe_stride_slot,
    table_size, page_rows, rope_column, batch, s_q, queries, heads, max_kv_len, planned_kv_len,
    num_pages, parts, scale_log2,
    HALF: gl.constexpr, TAIL: gl.constexpr, PAGE_SIZE: gl.constexpr, CSR: gl.constexpr,
    RAGGED: gl.constexpr, CAUSAL: gl.constexpr, GATHER: gl.constexpr,
    FUSED: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = out.dtype.element_ty
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    call = Call(
        pages, indptr, kv_lens, cu_seqlens_q, schedule, table_size, batch, s_q, queries, heads,
        max_kv_len, planned_kv_len, parts, PAGE_SIZE, CSR, RAGGED, CAUSAL, GATHER, ROWS, KEYS,
    )  # fmt: skip
    query_left = gl.allocate_shared_memory(dtype, [1, ROWS, HALF], LAYOUT)
    query_right = gl.allocate_shared_memory(dtype, [1, ROWS, HALF], LAYOUT)
    left = gl.allocate_shared_memory(dtype, [2, KEYS, HALF], LAYOUT)
    right = gl.allocate_shared_memory(dtype, [2, KEYS, HALF], LAYOUT)
    if TAIL > 0:
        rope = gl.allocate_shared_memory(dtype, [2, KEYS, TAIL], LAYOUT)
    elif BLOCKS == 2:
        # Pairs have their weights there, with rotary keys or without.
        rope = gl.allocate_shared_memory(dtype, [2, ROWS, KEYS], LAYOUT)
    else:
        rope = left
    if BLOCKS == 2:
        left_full, right_full = barriers(2, 1), barriers(2, 1)
        if TAIL > 0:
            query_rope = gl.allocate_shared_memory(dtype, [1, ROWS, TAIL], LAYOUT)
            rope_full = barriers(2, 1)
        else:
            query_rope = query_left
            rope_full = left_full
        shared = _pairs(
            query_left, query_right, query_rope, left, right, rope,
            gl.allocate_shared_memory(gl.float32, [4, ROWS], VECTOR),
            left_full, right_full, rope_full, barriers(2, 1), barriers(2, 1),
            barriers(2, 1), barriers(1, 2), barriers(1, 1), barriers(1, 1),
        )  # fmt: skip
        gl.warp_specialize(
            [
                (_left, (
                    call, shared, q_nope, q_rope, out, lse, partial_out, partial_lse, scale_log2,
                    q_nope_stride_b, q_nope_stride_s, q_nope_stride_h,
                    q_rope_stride_b, q_rope_stride_s, q_rope_stride_h,
                    out_stride_b, out_stride_s, out_stride_h,
                    lse_stride_b, lse_stride_s, lse_stride_h, HALF, TAIL,
                )),
                (_right, (
                    call, shared, q_nope, out, partial_out, scale_log2,
                    q_nope_stride_b, q_nope_stride_s, q_nope_stride_h,
                    out_stride_b, out_stride_s, out_stride_h, HALF, TAIL,
                )),
                (_load_pairs, (
                    call, shared, half_map, rope_map, rope_column, page_rows, num_pages, HALF, TAIL,
                )),
            ],
            [4, 1],
            [REGISTERS, LOADER_REGISTERS],
        )  # fmt: skip
    else:
        shared = _asymmetric(
            query_left, query_right, left, right, rope,
            gl.allocate_shared_memory(dtype, [2, ROWS, KEYS], LAYOUT),
            gl.allocate_shared_memory(gl.float32, [3, ROWS], VECTOR),
            barriers(2, ARRIVALS if GATHER else 1), barriers(2, ARRIVALS if GATHER else 1),
            barriers(2, 1), barriers(2, 1), barriers(2, 1), barriers(2, 1), barriers(1, 1),
            barriers(1, 1),
        )  # fmt: skip
        gl.warp_specialize(
            [
                (_scores, (
                    call, shared, q_nope, q_rope, out, lse, partial_out, partial_lse, scale_log2,
                    q_nope_stride_b, q_nope_stride_s, q_nope_stride_h,
                    q_rope_stride_b, q_rope_stride_s, q_rope_stride_h,
                    out_stride_b, out_stride_s, out_stride_h,
                    lse_stride_b, lse_stride_s, lse_stride_h, HALF, TAIL,
                )),
                (_rest, (
                    call, shared, out, partial_out, out_stride_b, out_stride_s, out_stride_h, HALF,
                )),
                (_load_rows, (
                    call, shared, ckv, kpe, ckv_stride_page, ckv_stride_slot,
                    kpe_stride_page, kpe_stride_slot, num_pages, HALF, TAIL, FUSED,
                )) if GATHER else (_load_blocks, (
                    call, shared, half_map, rope_map, rope_column, page_rows, num_pages, HALF, TAIL,
                )),
            ],
            [4, WARPS if GATHER else 1],
            [REGISTERS - 8 * GATHER, LOADER_REGISTERS + 16 * GATHER],
        )  # fmt: skip


def variant(problem: DecodeProblem, config: Config, geometry: Geometry, device: Device) -> Variant:
    """The kernel for a problem: everything but sizes that change from step to step is constant."""
    if problem.storage is not None:
        return quantised.variant(problem, config, geometry, device)
    box = BLOCK if gathers(problem) else min(BLOCK, problem.page_size)
    half = problem.value_dim // 2
    kinds = {
        "*T": f"*{TYPE_NAMES[problem.dtype]}",
        "map of half of a latent": map_type(problem.dtype, box, half),
        "map of a rotary key": map_type(problem.dtype, box, problem.key_tail or half),
    }
    return Variant(
        decode_kernel,
        tuple((name, kinds.get(kind, kind)) for name, kind in ARGUMENTS),
        (
            ("HALF", half),
            ("TAIL", problem.key_tail),
            ("PAGE_SIZE", problem.page_size),
            ("CSR", problem.csr),
            ("RAGGED", problem.ragged),
            ("CAUSAL", problem.causal),
            ("GATHER", gathers(problem)),
            # Boxes of TMA do not ask whose tensor they are of.
            ("FUSED", gathers(problem) and problem.fused),
            ("BLOCKS", config.blocks),
        ),
        ALIGNED,
        programmatic=True,
        max_registers=REGISTERS_AT_LAUNCH,
        source=GluonASTSource,
    )


def map_type(dtype: torch.dtype, rows: int, columns: int) -> str:
    """What Triton calls a TMA descriptor of tiles."""
    return f"tensordesc<{TYPE_NAMES[dtype]}[{rows}, {columns}],{TILE!r}>"


def arguments(problem: DecodeProblem, geometry: Geometry, tensors: DecodeTensors) -> list[Any]:
    """The run-time arguments, in the order of `ARGUMENTS`."""
    t = tensors
    return [
        t.q_nope,
        t.q_rope,
        t.pages,
        t.indptr,
        t.kv_lens,
        t.cu_seqlens_q,
        t.schedule,
        t.partial_out,
        t.partial_lse,
        t.out,
        t.lse,
        t.ckv,
        t.kpe,
        *maps(problem, t),
        *row_strides(problem, t),
        t.ckv.stride(0),
        problem.ckv_stride_slot,
        0 if t.kpe is None else t.kpe.stride(0),
        problem.kpe_stride_slot,
        t.pages.shape[0] if problem.csr else t.pages.stride(0),
        problem.page_slots,
        problem.value_dim if problem.fused else 0,
        *sizes(problem, geometry, t),
    ]


def compile(problem: DecodeProblem, config: Config, geometry: Geometry, device: Device) -> Any:
    """Machine code for `device`; launches nothing and needs no GPU."""
    return variant(problem, config, geometry, device).compile(device)


def launch(
    launcher: Launch, problem: DecodeProblem, geometry: Geometry, tensors: DecodeTensors
) -> None:
    """Writes `out` and `lse`, or partial results where the schedule cuts a group."""
    if problem.storage is not None:
        quantised.launch(launcher, problem, geometry, tensors)
        return
    launcher((geometry.lanes, geometry.parts, 1), arguments(problem, geometry, tensors))
